package transport

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"

	"github.com/flynn/noise"
)

// A psk channel is Noise_NNpsk0_25519_AESGCM_SHA256 (noiseprotocol.org, revision 34) with the prologue pskPrologue. Each message has its
// length before it, two bytes, big endian. After the two messages of the handshake, which have no payload, the side that has
// dialled sends an empty message: it proves that its first was not another's, sent again. Then follows content. Both sides replace the
// key of a direction (Rekey) after every rekeyAfter messages.
const (
	pskPrologue = "drafter psk 1"
	pskKeySize  = 32

	maxNoise    = 65535 // a message, in bytes
	noiseTag    = 16    // of that, what authenticates it
	noiseLength = 2     // before it

	// rekeyAfter keeps well below the 2^24 full records that AES-GCM may protect with one key in TLS (RFC 8446, 5.5), of 16 KiB where
	// these have 64.
	rekeyAfter = 1 << 20
)

var pskSuite = noise.NewCipherSuite(noise.DH25519, noise.CipherAESGCM, noise.HashSHA256)

func checkPSK(o Options, hostport string) error {
	if err := checkPort(o, hostport); err != nil {
		return err
	}
	_, err := o.key()
	return err
}

// key is the key for psk. Its errors do not quote it.
func (o Options) key() ([]byte, error) {
	text, from := o.Key, "the key"
	if text == "" {
		if o.KeyFile == "" {
			return nil, errors.New("both sides need the same key there: give its file")
		}
		if info, err := os.Stat(o.KeyFile); err == nil && !info.Mode().IsRegular() && !info.IsDir() {
			return nil, fmt.Errorf("the key in %q can be read once, and is read for each connection: give its text instead", o.KeyFile)
		}
		b, err := os.ReadFile(o.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("the key: %w", err)
		}
		text, from = string(b), fmt.Sprintf("the key in %q", o.KeyFile)
	}
	text = strings.TrimSpace(text)
	for _, decode := range []func(string) ([]byte, error){hex.DecodeString, base64.StdEncoding.DecodeString} {
		if key, err := decode(text); err == nil && len(key) == pskKeySize {
			return key, nil
		}
	}
	return nil, fmt.Errorf("%s is not %d bytes in hexadecimal or base64, as of: openssl rand -hex %d", from, pskKeySize, pskKeySize)
}

func dialPSK(ctx context.Context, o Options, hostport string) (net.Conn, error) {
	conn, err := dialTCP(ctx, o, hostport)
	if err != nil {
		return nil, err
	}
	return &pskConn{Conn: conn, options: o, initiator: true, rekeyAfter: rekeyAfter}, nil
}

func listenPSK(ctx context.Context, o Options, hostport string) (net.Listener, error) {
	l, err := listenTCP(ctx, o, hostport)
	if err != nil {
		return nil, err
	}
	return wrapped{l, func(conn net.Conn) net.Conn { return &pskConn{Conn: conn, options: o, rekeyAfter: rekeyAfter} }}, nil
}

// pskConn is a Noise channel.
type pskConn struct {
	net.Conn
	options    Options
	initiator  bool
	rekeyAfter uint64

	begin   sync.Mutex // guards the handshake
	done    bool
	err     error
	binding []byte // the hash of the handshake

	reading sync.Mutex // guards what follows
	in      direction
	raw     []byte // of the message being read, all that has come
	rest    []byte // of the last message, what was not read yet

	writing sync.Mutex // guards what follows
	out     direction
	buf     []byte
	broken  error // a part of a message may be on its way, and nothing can follow it
}

// direction is one of the two.
type direction struct {
	cipher *noise.CipherState
	count  uint64
}

// next is called for each message.
func (d *direction) next(rekeyAfter uint64) {
	if d.count++; d.count%rekeyAfter == 0 {
		d.cipher.Rekey()
	}
}

func (c *pskConn) handshake(ctx context.Context) (Identity, error) {
	c.begin.Lock()
	defer c.begin.Unlock()
	if !c.done {
		c.done = true
		if c.err = interruptible(ctx, c.Conn, c.agree); c.err != nil {
			c.binding = nil
		}
	}
	return c.identity(), c.err
}

// identity is called with begin held.
func (c *pskConn) identity() Identity {
	if c.done && c.err == nil {
		return Identity{Method: "psk"}
	}
	return Identity{}
}

// Identity is for IdentityOf.
func (c *pskConn) Identity() Identity {
	c.begin.Lock()
	defer c.begin.Unlock()
	return c.identity()
}

// ChannelBinding is for bound: the hash of the handshake (Noise, 11.2).
func (c *pskConn) ChannelBinding() []byte {
	c.begin.Lock()
	defer c.begin.Unlock()
	return c.binding
}

// agree makes the channel.
func (c *pskConn) agree() error {
	key, err := c.options.key()
	if err != nil {
		return err
	}
	s, err := noise.NewHandshakeState(noise.Config{CipherSuite: pskSuite, Random: rand.Reader, Pattern: noise.HandshakeNN, Initiator: c.initiator,
		Prologue: []byte(pskPrologue), PresharedKey: key})
	if err != nil {
		return err
	}
	send := func() (first, second *noise.CipherState, err error) {
		message, first, second, err := s.WriteMessage(make([]byte, noiseLength), nil)
		if err == nil {
			binary.BigEndian.PutUint16(message, uint16(len(message)-noiseLength))
			_, err = c.Conn.Write(message)
		}
		return first, second, err
	}
	receive := func() (first, second *noise.CipherState, err error) {
		var length [noiseLength]byte
		if _, err := io.ReadFull(c.Conn, length[:]); err != nil {
			return nil, nil, fmt.Errorf("the other side ended the handshake: %w; it has another key, or is no psk:// peer", err)
		}
		message := make([]byte, binary.BigEndian.Uint16(length[:]))
		if len(message) > 32+noiseTag { // an ephemeral key, no payload
			return nil, nil, fmt.Errorf("%w: it does not speak psk", ErrRefused)
		}
		if _, err := io.ReadFull(c.Conn, message); err != nil {
			return nil, nil, err
		}
		_, first, second, err = s.ReadMessage(nil, message)
		if err != nil {
			return nil, nil, fmt.Errorf("%w: it has another key, or does not speak psk", ErrRefused)
		}
		return first, second, nil
	}
	if c.initiator {
		if _, _, err := send(); err != nil {
			return err
		}
		if c.out.cipher, c.in.cipher, err = receive(); err != nil {
			return err
		}
		c.binding = s.ChannelBinding()
		return c.writeMessage(nil)
	}
	if _, _, err := receive(); err != nil {
		return err
	}
	if c.in.cipher, c.out.cipher, err = send(); err != nil {
		return err
	}
	c.binding = s.ChannelBinding()
	switch proof, err := c.readMessage(); {
	case err != nil:
		return err
	case len(proof) > 0:
		return fmt.Errorf("%w: it does not speak psk", ErrRefused)
	}
	return nil
}

// readMessage returns the content of the next message, valid until the next call. When it fails for want of time, it can be called
// again.
func (c *pskConn) readMessage() ([]byte, error) {
	if c.raw == nil {
		c.raw = make([]byte, 0, noiseLength+maxNoise)
	}
	for {
		want := noiseLength
		if len(c.raw) >= noiseLength {
			want += int(binary.BigEndian.Uint16(c.raw))
			if len(c.raw) == want {
				break
			}
		}
		n, err := c.Conn.Read(c.raw[len(c.raw):want])
		c.raw = c.raw[:len(c.raw)+n]
		if n == 0 && err != nil {
			if err == io.EOF && len(c.raw) > 0 {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
	}
	message := c.raw[noiseLength:]
	c.raw = c.raw[:0]
	content, err := c.in.cipher.Decrypt(message[:0], nil, message)
	if err != nil {
		return nil, fmt.Errorf("%w: a message was changed on its way", ErrRefused)
	}
	c.in.next(c.rekeyAfter)
	return content, nil
}

func (c *pskConn) writeMessage(p []byte) error {
	if c.broken != nil {
		return c.broken
	}
	b, err := c.out.cipher.Encrypt(append(c.buf[:0], 0, 0), nil, p)
	if err != nil {
		return err
	}
	c.buf = b
	binary.BigEndian.PutUint16(b, uint16(len(b)-noiseLength))
	c.out.next(c.rekeyAfter)
	_, c.broken = c.Conn.Write(b)
	return c.broken
}

func (c *pskConn) Read(p []byte) (int, error) {
	if _, err := c.handshake(context.Background()); err != nil {
		return 0, err
	}
	c.reading.Lock()
	defer c.reading.Unlock()
	for len(c.rest) == 0 {
		if len(p) == 0 {
			return 0, nil
		}
		content, err := c.readMessage()
		if err != nil {
			return 0, err
		}
		c.rest = content
	}
	n := copy(p, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}

// Write writes messages. After an error, for want of time too, the channel is of no use: a part of one may be on its way.
func (c *pskConn) Write(p []byte) (n int, err error) {
	if _, err := c.handshake(context.Background()); err != nil {
		return 0, err
	}
	c.writing.Lock()
	defer c.writing.Unlock()
	for len(p) > 0 {
		part := p[:min(len(p), maxNoise-noiseTag)]
		if err := c.writeMessage(part); err != nil {
			return n, err
		}
		n += len(part)
		p = p[len(part):]
	}
	return n, nil
}
