package testvnc

import (
	"bytes"
	"context"
	"errors"
	"image"
	"image/color"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

// A server's side of RFC 6143, 7.1 to 7.3: its version, security none, that it is fine, and a screen of 4 by 2 with the name "x".
const (
	version = "RFB 003.008\n"
	none    = "\x01\x01"
	fine    = "\x00\x00\x00\x00"
	screen  = "\x00\x04\x00\x02" + "\x20\x18\x00\x01\x00\xff\x00\xff\x00\xff\x10\x08\x00\x00\x00\x00" + "\x00\x00\x00\x01x"
)

// serve says what a server says, whatever it hears, and returns a client's end of the connection and what has been heard.
func serve(t *testing.T, says string) (net.Conn, func() string) {
	t.Helper()
	client, server := net.Pipe()
	var heard bytes.Buffer
	done := make(chan struct{})
	go func() {
		defer close(done)
		io.Copy(&heard, server)
	}()
	go func() {
		io.WriteString(server, says)
	}()
	return client, func() string {
		client.Close()
		<-done
		return heard.String()
	}
}

func TestScreen(t *testing.T) {
	// The left half of the lower line, and, in the same message, the pixel right of it.
	pixels := "\x00\x00\x00\x02" +
		"\x00\x00\x00\x01\x00\x02\x00\x01\x00\x00\x00\x00" + "\x01\x02\x03\x00\x04\x05\x06\x00" +
		"\x00\x02\x00\x01\x00\x01\x00\x01\x00\x00\x00\x00" + "\x07\x08\x09\x00"
	conn, heard := serve(t, version+none+fine+screen+"\x02"+"\x03\x00\x00\x00\x00\x00\x00\x03cut"+pixels) // after a bell, and something that was cut
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	c, err := New(ctx, conn)
	if err != nil {
		t.Fatal(err)
	}
	if c.Name() != "x" {
		t.Errorf("the screen's name is %q, want %q", c.Name(), "x")
	}
	got, err := c.Wait(ctx, func(i *image.RGBA) bool { return i.RGBAAt(0, 1).A != 0 })
	if err != nil {
		t.Fatal(err)
	}
	want := image.NewRGBA(image.Rect(0, 0, 4, 2))
	for x := range 3 {
		want.SetRGBA(x, 1, color.RGBA{uint8(3*x + 1), uint8(3*x + 2), uint8(3*x + 3), 255})
	}
	if !bytes.Equal(got.Pix, want.Pix) {
		t.Errorf("the screen is %v, want %v", got.Pix, want.Pix)
	}
	if _, err := c.Settled(ctx, time.Millisecond); err != nil {
		t.Error(err)
	}
	if err := errors.Join(c.Type("aB\n"), c.Point(3, 1)); err != nil {
		t.Error(err)
	}
	if err := c.Type("ä"); err == nil || !strings.Contains(err.Error(), "ä") {
		t.Errorf("a key that is not known: got error %v", err)
	}
	key := func(down, key string) string { return "\x04" + down + "\x00\x00\x00\x00" + key }
	keys := key("\x01", "\x00a") + key("\x00", "\x00a") +
		key("\x01", "\xff\xe1") + key("\x01", "\x00B") + key("\x00", "\x00B") + key("\x00", "\xff\xe1") +
		key("\x01", "\xff\x0d") + key("\x00", "\xff\x0d")
	all := heard()
	for what, want := range map[string]string{
		"the handshake": version + "\x01\x01", "a request of all": "\x03\x00\x00\x00\x00\x00\x00\x04\x00\x02",
		"a request of changes": "\x03\x01\x00\x00\x00\x00\x00\x04\x00\x02", "keys": keys, "the pointer": "\x05\x00\x00\x03\x00\x01",
	} {
		if !strings.Contains(all, want) {
			t.Errorf("the server did not hear %s, %q: %q", what, want, all)
		}
	}
	if err := c.Type("x"); err == nil {
		t.Error("typing over a connection that has ended is no error")
	}
	if _, err := c.Wait(ctx, func(*image.RGBA) bool { return false }); err == nil || ctx.Err() != nil {
		t.Errorf("waiting on a connection that has ended: got error %v", err)
	}
}

func TestRefusals(t *testing.T) {
	for _, test := range []struct{ name, says, want string }{
		{"version", "RFB 003.003\n", "3.8"},
		{"no security that we know", version + "\x01\x02", "security"},
		{"refused", version + "\x00\x00\x00\x00\x03why", "why"},
		{"refused after all", version + none + "\x00\x00\x00\x01\x00\x00\x00\x03why", "why"},
		{"a screen that is too large", version + none + fine + "\xff\xff\x00\x02" + screen[4:], "65535 by 2"},
		{"a name that is too long", version + none + fine + screen[:20] + "\xff\xff\xff\xff", "4294967295 bytes"},
		{"unknown message", version + none + fine + screen + "\x07", "unknown type 7"},
		{"unknown encoding", version + none + fine + screen + "\x00\x00\x00\x01\x00\x00\x00\x00\x00\x01\x00\x01\x00\x00\x00\x10", "encoding 16"},
		{"pixels outside", version + none + fine + screen + "\x00\x00\x00\x01\x00\x04\x00\x00\x00\x01\x00\x01\x00\x00\x00\x00", "outside"},
	} {
		t.Run(test.name, func(t *testing.T) {
			conn, _ := serve(t, test.says)
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			c, err := New(ctx, conn)
			if err == nil {
				_, err = c.Wait(ctx, func(*image.RGBA) bool { return false })
				c.Close()
			}
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got error %v, want one with %q", err, test.want)
			}
		})
	}
}
