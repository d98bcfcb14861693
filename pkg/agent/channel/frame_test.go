package channel

import (
	"bytes"
	"encoding/hex"
	"errors"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/iotest"
)

// TestGoldenFrames pins the bytes on the wire. A change here is a new Version.
func TestGoldenFrames(t *testing.T) {
	long := make([]byte, 300)
	for i := range long {
		long[i] = byte(i)
	}
	for _, c := range []struct {
		name string
		f    frame
		want string
	}{
		{"hello", frame{Version: 1, Type: frameHello, Nonce: 0x0102030405060708},
			"00 0d d74d0101 0102030405060708 01 01 01 05 9775f7f5 00"},
		{"welcome", frame{Version: 1, Type: frameWelcome, Nonce: 0x0102030405060708},
			"00 0d d74d0102 0102030405060708 01 01 01 05 c603bf5a 00"},
		{"reset at start", frame{Version: 1, Type: frameReset},
			"00 05 d74d0104 01 01 01 01 01 01 01 01 01 01 01 05 a6a1cf5d 00"},
		{"data", frame{Version: 1, Type: frameData, Nonce: 0x1122334455667788, Seq: 0x01000002, Payload: []byte("a\x00b")},
			"00 0e d74d0103 1122334455667788 01 01 03 02 61 06 62 1fec323f 00"},
		{"data of 300 bytes", frame{Version: 1, Type: frameData, Nonce: 1, Seq: 1, Payload: long}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, _ := appendFrame(nil, nil, c.f)
			if bytes.IndexByte(got[1:len(got)-1], 0) >= 0 {
				t.Errorf("zero byte inside a frame: %x", got)
			}
			want, err := hex.DecodeString(strings.ReplaceAll(c.want, " ", ""))
			if err != nil {
				t.Fatal(err)
			}
			if c.want != "" && !bytes.Equal(got, want) {
				t.Errorf("frame:\n got %x\nwant %x", got, want)
			}
			back, _, err := parseFrame(nil, got[1:len(got)-1])
			if err != nil || back.Type != c.f.Type || back.Nonce != c.f.Nonce || back.Seq != c.f.Seq || !bytes.Equal(back.Payload, c.f.Payload) {
				t.Errorf("decoded: got %+v, %v, want %+v", back, err, c.f)
			}
		})
	}
}

// TestStuffing compares with the examples of the paper.
func TestStuffing(t *testing.T) {
	run := func(from, to int) (b []byte) {
		for i := from; i <= to; i++ {
			b = append(b, byte(i))
		}
		return b
	}
	for _, c := range []struct{ name, plain, stuffed string }{
		{"empty", "", "\x01"},
		{"zero", "\x00", "\x01\x01"},
		{"two zeros", "\x00\x00", "\x01\x01\x01"},
		{"inner zero", "\x11\x22\x00\x33", "\x03\x11\x22\x02\x33"},
		{"last zero", "\x11\x00", "\x02\x11\x01"},
		{"254 bytes", string(run(1, 254)), "\xff" + string(run(1, 254))},
		{"255 bytes", string(run(1, 255)), "\xff" + string(run(1, 254)) + "\x02\xff"},
		{"zero and 254 bytes", string(run(0, 254)), "\x01\xff" + string(run(1, 254))},
		{"254 bytes and a zero", string(run(1, 254)) + "\x00", "\xff" + string(run(1, 254)) + "\x01\x01"},
		{"253 bytes and a zero", string(run(2, 254)) + "\x00", "\xfe" + string(run(2, 254)) + "\x01"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := appendStuffed(nil, []byte(c.plain)); string(got) != c.stuffed {
				t.Errorf("stuffed: got %x, want %x", got, c.stuffed)
			}
			if got, err := appendUnstuffed(nil, []byte(c.stuffed)); err != nil || string(got) != c.plain {
				t.Errorf("unstuffed: got %x, %v, want %x", got, err, c.plain)
			}
		})
	}
}

// frames encodes frames of growing size, one after the other.
func frames(n int) (stream []byte, offsets []int) {
	for i := range n {
		offsets = append(offsets, len(stream))
		f := frame{Version: Version, Type: frameData, Nonce: 42, Seq: uint32(i), Payload: bytes.Repeat([]byte{byte(i), 0, 7}, i+1)}
		encoded, _ := appendFrame(nil, nil, f)
		stream = append(stream, encoded...)
	}
	return stream, append(offsets, len(stream))
}

// TestResynchronise begins in the middle of a stream, at every byte, after every kind of rubbish: all frames that are
// whole arrive, and nothing else.
func TestResynchronise(t *testing.T) {
	const n = 8
	stream, offsets := frames(n)
	rubbish := map[string][]byte{
		"nothing":  nil,
		"zeros":    make([]byte, 70000),
		"ones":     bytes.Repeat([]byte{1}, 70000),
		"a header": {0, 0x0d, magic0, magic1, 1, 3, 1, 2, 3},
		"noise":    noise(70000),
	}
	for name, before := range rubbish {
		t.Run(name, func(t *testing.T) {
			for cut := range stream {
				first := 0 // the first frame that is whole after the cut
				for offsets[first] < cut {
					first++
				}
				if first > 0 && cut == offsets[first-1]+1 && (len(before) == 0 || before[len(before)-1] == 0) {
					first-- // all it lacks is a delimiter, which is not missed here
				}
				for _, reader := range []func(io.Reader) io.Reader{
					func(r io.Reader) io.Reader { return r },
					iotest.OneByteReader,
				} {
					if len(before) > 100 && cut%97 != 0 {
						continue // the long ones need not be run at every byte
					}
					d := newDecoder(reader(io.MultiReader(bytes.NewReader(before), bytes.NewReader(stream[cut:]))))
					for seq := first; seq < n; seq++ {
						f, err := d.next()
						if err != nil || f.Seq != uint32(seq) || len(f.Payload) != 3*(seq+1) {
							t.Fatalf("cut at %d: got frame %d and %v, want frame %d", cut, f.Seq, err, seq)
						}
					}
					if f, err := d.next(); err != io.EOF {
						t.Fatalf("cut at %d: after the last frame: got %+v, %v, want EOF", cut, f, err)
					}
				}
			}
		})
	}
}

func noise(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{2}).Read(b)
	return b
}

// TestDamage flips every bit of a frame: it must never be taken for a frame with other contents.
func TestDamage(t *testing.T) {
	encoded, _ := appendFrame(nil, nil, frame{Version: Version, Type: frameData, Nonce: 3, Seq: 9, Payload: []byte("payload")})
	next, _ := appendFrame(nil, nil, frame{Version: Version, Type: frameHello, Nonce: 4})
	for bit := range 8 * len(encoded) {
		damaged := bytes.Clone(encoded)
		damaged[bit/8] ^= 1 << (bit % 8)
		d := newDecoder(io.MultiReader(bytes.NewReader(damaged), bytes.NewReader(next)))
		f, err := d.next()
		if err == nil && f.Type == frameData && f.Nonce == 3 && string(f.Payload) == "payload" {
			f, err = d.next() // only a delimiter was hit
		}
		if err != nil || f.Type != frameHello || f.Nonce != 4 {
			t.Fatalf("bit %d: got %+v, %v, want the frame behind", bit, f, err)
		}
	}
}

// TestSizes decodes the longest frame and refuses a longer one.
func TestSizes(t *testing.T) {
	for _, payload := range [][]byte{make([]byte, MaxPayload), bytes.Repeat([]byte{1}, MaxPayload), noise(MaxPayload)} {
		encoded, _ := appendFrame(nil, nil, frame{Version: Version, Type: frameData, Payload: payload})
		if len(encoded) > 32<<10 {
			t.Errorf("encoded frame has %d bytes, more than the driver takes in one write", len(encoded))
		}
		if f, err := newDecoder(bytes.NewReader(encoded)).next(); err != nil || !bytes.Equal(f.Payload, payload) {
			t.Errorf("longest frame: got %d bytes, %v", len(f.Payload), err)
		}
	}
	for _, n := range []int{MaxPayload + 1, MaxPayload + 254, MaxPayload + 10000} {
		encoded, _ := appendFrame(nil, nil, frame{Version: Version, Type: frameData, Payload: bytes.Repeat([]byte{1}, n)})
		d := newDecoder(bytes.NewReader(encoded))
		if f, err := d.next(); err != io.EOF || d.discarded != 1 {
			t.Errorf("frame of %d bytes: got %d bytes, %v, %d discarded; want it discarded", n, len(f.Payload), err, d.discarded)
		}
	}
}

func FuzzDecoder(f *testing.F) {
	stream, _ := frames(3)
	f.Add(stream, 5)
	f.Add(stream[7:], 1)
	f.Add([]byte("\x00\x05\xd7M\x01\x04\x01\x00"), 3)
	f.Fuzz(func(t *testing.T, stream []byte, chunk int) {
		// However the stream is cut into reads, the frames are the same.
		decode := func(r io.Reader) (all []frame) {
			d := newDecoder(r)
			for {
				f, err := d.next()
				if err != nil {
					if !errors.Is(err, io.EOF) {
						t.Fatal(err)
					}
					return all
				}
				if len(f.Payload) > MaxPayload {
					t.Fatalf("payload of %d bytes", len(f.Payload))
				}
				f.Payload = bytes.Clone(f.Payload)
				all = append(all, f)
			}
		}
		whole := decode(bytes.NewReader(stream))
		parts := decode(&chunks{stream, max(1, chunk)})
		if len(whole) != len(parts) {
			t.Fatalf("%d frames in one read, %d in chunks of %d", len(whole), len(parts), chunk)
		}
		for i, f := range whole {
			// What was decoded encodes to what decodes to the same.
			encoded, _ := appendFrame(nil, nil, f)
			again := decode(bytes.NewReader(encoded))
			if len(again) != 1 || again[0].Nonce != f.Nonce || again[0].Seq != f.Seq || !bytes.Equal(again[0].Payload, f.Payload) {
				t.Fatalf("frame %d: got %+v, want %+v", i, again, f)
			}
		}
		// A frame behind anything is found, if a delimiter comes first, as it always does.
		hello, _ := appendFrame(nil, nil, frame{Version: Version, Type: frameHello, Nonce: 77})
		after := decode(bytes.NewReader(append(bytes.Clone(stream), hello...)))
		if len(after) == 0 || after[len(after)-1].Nonce != 77 {
			t.Fatal("the frame behind is not found")
		}
	})
}

type chunks struct {
	rest []byte
	n    int
}

func (c *chunks) Read(p []byte) (int, error) {
	if len(c.rest) == 0 {
		return 0, io.EOF
	}
	n := copy(p, c.rest[:min(c.n, len(c.rest))])
	c.rest = c.rest[n:]
	return n, nil
}

func BenchmarkFrame(b *testing.B) {
	for name, payload := range map[string][]byte{"noise": noise(MaxPayload), "zeros": make([]byte, MaxPayload), "text": bytes.Repeat([]byte("drafter "), MaxPayload/8)} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(MaxPayload)
			var encoded, scratch, body []byte
			for b.Loop() {
				encoded, scratch = appendFrame(encoded[:0], scratch, frame{Version: Version, Type: frameData, Nonce: 1, Payload: payload})
				var err error
				if _, body, err = parseFrame(body, encoded[1:len(encoded)-1]); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
