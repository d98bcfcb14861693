// Package testvnc looks at a guest's screen and types on its keyboard, for tests: a client of the Remote Framebuffer protocol
// (RFC 6143, "VNC"), as much of it as that needs. It asks for raw pixels, and for no security, so it is for servers that are reached over
// loopback, or in a test's own network.
package testvnc

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"image"
	"image/draw"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"time"
)

// Keys that are no characters, by the numbers of X11 (RFC 6143, 7.5.4).
const (
	keyEnter = 0xff0d
	keyShift = 0xffe1
)

// Sizes a server may name: more would be a mistake, and would be allocated.
const (
	maxSide = 8192
	maxText = 1 << 16
)

// Client is a connection to a VNC server, and what its screen shows. Its methods may be called at the same time.
type Client struct {
	conn net.Conn
	name string
	done chan struct{} // closed when the connection has ended

	write sync.Mutex // orders messages to the server

	mu      sync.Mutex // guards what follows
	screen  *image.RGBA
	painted bool          // the whole screen has come once
	changed chan struct{} // closed and replaced when the screen changes, closed when the connection ends
	err     error         // why it has ended
}

// New speaks the protocol over conn, which it closes when that fails, and follows the screen from then on.
func New(ctx context.Context, conn net.Conn) (_ *Client, err error) {
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	defer func() {
		if err != nil {
			conn.Close()
			err = fmt.Errorf("begin VNC with %v: %w", conn.RemoteAddr(), err)
		}
	}()
	c := &Client{conn: conn, done: make(chan struct{}), changed: make(chan struct{})}
	if err := c.handshake(); err != nil {
		return nil, err
	}
	go c.follow()
	return c, nil
}

// handshake agrees on version 3.8 without security, and asks for raw pixels (RFC 6143, 7.1 to 7.3, 7.5.1 and 7.5.2).
func (c *Client) handshake() error {
	var version [12]byte
	if err := c.read(version[:]); err != nil {
		return err
	}
	if string(version[:]) != "RFB 003.008\n" {
		return fmt.Errorf("the server says %q, not that it speaks RFB 3.8", version)
	}
	var types [1]byte
	if err := errors.Join(c.send(version[:]), c.read(types[:])); err != nil {
		return err
	}
	if types[0] == 0 {
		why, err := c.text()
		return errors.Join(fmt.Errorf("the server refuses: %s", why), err)
	}
	offered := make([]byte, types[0])
	if err := c.read(offered); err != nil {
		return err
	}
	const none = 1
	if !slices.Contains(offered, none) {
		return fmt.Errorf("the server wants a security of the types %d, not none (%d)", offered, none)
	}
	var result [4]byte
	if err := errors.Join(c.send([]byte{none}), c.read(result[:])); err != nil {
		return err
	}
	if result != [4]byte{} {
		why, err := c.text()
		return errors.Join(fmt.Errorf("the server refuses: %s", why), err)
	}
	var init [20]byte // size and pixel format
	if err := errors.Join(c.send([]byte{1}), c.read(init[:])); err != nil {
		return err
	}
	w, h := int(binary.BigEndian.Uint16(init[0:])), int(binary.BigEndian.Uint16(init[2:]))
	if w == 0 || h == 0 || w > maxSide || h > maxSide {
		return fmt.Errorf("the server has a screen of %d by %d", w, h)
	}
	c.screen = image.NewRGBA(image.Rect(0, 0, w, h))
	var err error
	if c.name, err = c.text(); err != nil {
		return err
	}
	// 32 bits, 24 of them colour: the bytes are red, green, blue, nothing.
	format := []byte{0, 0, 0, 0, 32, 24, 0, 1, 0, 255, 0, 255, 0, 255, 0, 8, 16, 0, 0, 0}
	encodings := []byte{2, 0, 0, 1, 0, 0, 0, 0} // raw alone
	return errors.Join(c.send(format), c.send(encodings), c.ask(false))
}

// ask asks for the screen, or for what changes of it (RFC 6143, 7.5.3).
func (c *Client) ask(changes bool) error {
	m := []byte{3, 0}
	if changes {
		m[1] = 1
	}
	m = binary.BigEndian.AppendUint16(m, 0)
	m = binary.BigEndian.AppendUint16(m, 0)
	m = binary.BigEndian.AppendUint16(m, uint16(c.screen.Rect.Dx()))
	m = binary.BigEndian.AppendUint16(m, uint16(c.screen.Rect.Dy()))
	return c.send(m)
}

func (c *Client) send(m []byte) error {
	c.write.Lock()
	defer c.write.Unlock()
	_, err := c.conn.Write(m)
	return err
}

func (c *Client) read(b []byte) error {
	_, err := io.ReadFull(c.conn, b)
	return err
}

// text reads a string with its length.
func (c *Client) text() (string, error) {
	var n [4]byte
	if err := c.read(n[:]); err != nil {
		return "", err
	}
	length := binary.BigEndian.Uint32(n[:])
	if length > maxText {
		return "", fmt.Errorf("the server sends a text of %d bytes", length)
	}
	b := make([]byte, length)
	return string(b), c.read(b)
}

// follow reads what the server says until the connection ends.
func (c *Client) follow() {
	defer close(c.done)
	for {
		if err := c.message(); err != nil {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.err = fmt.Errorf("VNC with %v: %w", c.conn.RemoteAddr(), err)
			close(c.changed)
			return
		}
	}
}

// message reads one message of the server (RFC 6143, 7.6).
func (c *Client) message() error {
	var head [4]byte
	if err := c.read(head[:1]); err != nil {
		return err
	}
	switch head[0] {
	case 0: // pixels
		if err := c.read(head[1:]); err != nil {
			return err
		}
		// All at once, or a picture would be of two moments.
		var parts []*image.RGBA
		for range binary.BigEndian.Uint16(head[2:]) {
			part, err := c.rectangle()
			if err != nil {
				return err
			}
			parts = append(parts, part)
		}
		c.mu.Lock()
		for _, part := range parts {
			draw.Draw(c.screen, part.Rect, part, part.Rect.Min, draw.Src)
		}
		c.painted = true
		close(c.changed)
		c.changed = make(chan struct{})
		c.mu.Unlock()
		return c.ask(true)
	case 2: // bell
		return nil
	case 3: // something was cut
		if err := c.read(head[1:]); err != nil {
			return err
		}
		_, err := c.text()
		return err
	}
	return fmt.Errorf("the server sends a message of the unknown type %d", head[0])
}

// rectangle reads a part of the screen.
func (c *Client) rectangle() (*image.RGBA, error) {
	var head [12]byte
	if err := c.read(head[:]); err != nil {
		return nil, err
	}
	if encoding := int32(binary.BigEndian.Uint32(head[8:])); encoding != 0 {
		return nil, fmt.Errorf("the server sends pixels in encoding %d, not as they are (0)", encoding)
	}
	at := func(i int) int { return int(binary.BigEndian.Uint16(head[i:])) }
	r := image.Rect(at(0), at(2), at(0)+at(4), at(2)+at(6))
	if !r.In(c.screen.Rect) { // it never changes size, as we know not how
		return nil, fmt.Errorf("the server sends pixels at %v, outside of its screen %v", r, c.screen.Rect)
	}
	part := image.NewRGBA(r)
	if err := c.read(part.Pix); err != nil {
		return nil, err
	}
	for i := 3; i < len(part.Pix); i += 4 {
		part.Pix[i] = 255
	}
	return part, nil
}

// Name is what the server calls its screen.
func (c *Client) Name() string { return c.name }

// Screen is a copy of what the screen shows now.
func (c *Client) Screen() *image.RGBA {
	c.mu.Lock()
	defer c.mu.Unlock()
	return &image.RGBA{Pix: slices.Clone(c.screen.Pix), Stride: c.screen.Stride, Rect: c.screen.Rect}
}

// Wait waits until the screen shows what is waited for, and returns it. Each picture that is asked about is a copy.
func (c *Client) Wait(ctx context.Context, shows func(*image.RGBA) bool) (*image.RGBA, error) {
	for {
		c.mu.Lock()
		changed, painted, err := c.changed, c.painted, c.err
		c.mu.Unlock()
		screen := c.Screen()
		if painted && shows(screen) {
			return screen, nil
		}
		if err != nil {
			return screen, err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return screen, fmt.Errorf("wait for something on the screen: %w", ctx.Err())
		}
	}
}

// Settled waits until the screen has not changed for a while, and returns it.
func (c *Client) Settled(ctx context.Context, quiet time.Duration) (*image.RGBA, error) {
	for {
		c.mu.Lock()
		changed, painted, err := c.changed, c.painted, c.err
		c.mu.Unlock()
		if err != nil {
			return c.Screen(), err
		}
		enough := time.NewTimer(quiet)
		select {
		case <-changed:
			enough.Stop()
		case <-enough.C:
			if painted {
				return c.Screen(), nil
			}
		case <-ctx.Done():
			enough.Stop()
			return c.Screen(), fmt.Errorf("wait until the screen stands still: %w", ctx.Err())
		}
	}
}

// shifted are the characters that a US keyboard has above others.
const shifted = `~!@#$%^&*()_+{}|:"<>?`

// Type types a text on a US keyboard, of ASCII characters and line breaks.
func (c *Client) Type(text string) error {
	for _, r := range text {
		key := uint32(r)
		switch {
		case r == '\n':
			key = keyEnter
		case r < ' ' || r > '~':
			return fmt.Errorf("type %q: %q is on no key that is known here", text, r)
		}
		shift := r >= 'A' && r <= 'Z' || strings.ContainsRune(shifted, r)
		var keys []byte
		if shift {
			keys = event(keys, true, keyShift)
		}
		keys = event(event(keys, true, key), false, key)
		if shift {
			keys = event(keys, false, keyShift)
		}
		if err := c.send(keys); err != nil {
			return fmt.Errorf("type %q: %w", text, err)
		}
	}
	return nil
}

// event appends that a key goes down or up (RFC 6143, 7.5.4).
func event(m []byte, down bool, key uint32) []byte {
	m = append(m, 4, 0, 0, 0)
	if down {
		m[len(m)-3] = 1
	}
	return binary.BigEndian.AppendUint32(m, key)
}

// Point moves the pointer to a place on the screen (RFC 6143, 7.5.5).
func (c *Client) Point(x, y int) error {
	m := binary.BigEndian.AppendUint16([]byte{5, 0}, uint16(x))
	return c.send(binary.BigEndian.AppendUint16(m, uint16(y)))
}

// Close ends the connection.
func (c *Client) Close() error {
	err := c.conn.Close()
	<-c.done
	return err
}
