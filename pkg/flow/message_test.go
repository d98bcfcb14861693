package flow

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"
)

// TestFrames holds frames to bytes.
func TestFrames(t *testing.T) {
	var b bytes.Buffer
	if err := sayJSON(&b, message{Number: 1, Say: sayFlows, Flows: []flow{{6, netip.MustParseAddrPort("192.0.2.1:7"), netip.MustParseAddrPort("172.16.0.2:8"), 1, 300, 3}}}); err != nil {
		t.Fatal(err)
	}
	const text = `{"number":1,"say":"flows","flows":[{"p":6,"f":"192.0.2.1:7","t":"172.16.0.2:8","o":1,"s":300,"c":3}]}`
	if got, want := hex.EncodeToString(b.Bytes()), "02000065"+hex.EncodeToString([]byte(text)); got != want {
		t.Errorf("a message is %s, want %s", got, want)
	}
	if got := hex.EncodeToString(appendFrame(nil, framePing, nil)); got != "03000000" {
		t.Errorf("a ping is %s", got)
	}
	var m message
	if err := hearJSON(bufio.NewReader(&b), &m); err != nil || m.Say != sayFlows || len(m.Flows) != 1 {
		t.Errorf("it is read as %+v, %v", m, err)
	}
	for _, bad := range []string{"\x00\x00\x00\x00", "\x04\x00\x00\x00", "\x01\x01\x00\x41", "\x01\xff\xff\xff"} {
		if _, _, err := readFrame(bufio.NewReader(strings.NewReader(bad)), make([]byte, maxFrame)); !errors.Is(err, errMalformed) {
			t.Errorf("%q: got error %v", bad, err)
		}
	}
	if err := sayJSON(&b, message{Error: strings.Repeat("x", maxFrame)}); err == nil {
		t.Error("a message that is too large is sent")
	}
}

// TestHandshake: both sides prove to have the key, or nothing comes of it.
func TestHandshake(t *testing.T) {
	for _, c := range []struct {
		what        string
		dials, said string
		ok          bool
	}{{"the same key", "key", "key", true}, {"another key", "guess", "key", false}, {"no key", "", "key", false}} {
		t.Run(c.what, func(t *testing.T) {
			a, b := net.Pipe()
			done := make(chan error, 1)
			go func() {
				_, _, err := welcome(b, func(vm string, from, to uint32) (string, error) {
					if vm != "vm" || from != 1 || to != 2 {
						return "", errors.New("there is no such place here")
					}
					return c.said, nil
				})
				b.Close()
				done <- err
			}()
			_, err := greet(a, "vm", c.dials, 1, 2)
			a.Close()
			if there := <-done; (err == nil) != c.ok || (there == nil) != c.ok {
				t.Errorf("the one that dials says %v, the other one %v", err, there)
			}
		})
	}
	if proves(prove("key", 1, 2, "x", "y"), "key", 2, 1, "x", "y") || proves(prove("key", 1, 2, "x", "y"), "key", 1, 2, "y", "x") {
		t.Error("a proof is good for what it was not made for")
	}
}

func FuzzFrames(f *testing.F) {
	f.Add(appendFrame(nil, frameSay, []byte(`{"say":"flows","flows":[{"p":6,"f":"192.0.2.1:7","t":"172.16.0.2:8"}]}`)))
	f.Add(appendFrame(nil, framePacket, make([]byte, 50)))
	f.Add(appendFrame(nil, frameSay, []byte(`{"hello":"drafter flow 1","vm":"x","from":1,"to":2,"nonce":"y"}`)))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bufio.NewReader(bytes.NewReader(b))
		buffer := make([]byte, maxFrame)
		for {
			_, payload, err := readFrame(r, buffer)
			if err != nil {
				break
			}
			if len(payload) > maxFrame {
				t.Fatalf("payload of %d bytes", len(payload))
			}
		}
		var m message
		_ = hearJSON(bufio.NewReader(bytes.NewReader(b)), &m)
	})
}
