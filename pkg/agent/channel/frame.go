package channel

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
)

// Version is the version of the frame layer. An end ignores frames of any other.
const Version = 1

const (
	// MaxPayload is the largest payload of a frame in bytes: an encoded frame then fits the 32 KiB that Linux's
	// virtio_console driver takes in one write.
	MaxPayload = 31 << 10

	headerSize  = 16
	trailerSize = 4
	maxBody     = headerSize + MaxPayload + trailerSize
	maxEncoded  = maxBody + maxBody/254 + 1 // without the delimiters

	magic0, magic1 = 0xd7, 0x4d

	delimiter = 0 // between frames, and nowhere inside one
)

// frameType is the fourth byte of a frame. Numbers are for good; an end ignores types it does not know.
type frameType uint8

const (
	frameHello   frameType = 1 // host → guest: begin session Nonce, whatever there was before
	frameWelcome frameType = 2 // guest → host: session Nonce has begun
	frameData    frameType = 3 // both ways: the next bytes of session Nonce
	frameReset   frameType = 4 // both ways: session Nonce is over, or unknown here. Nonce 0, guest → host: I have just started
)

// frame is one message of the layer.
type frame struct {
	Version uint8
	Type    frameType
	Nonce   uint64 // of the session
	Seq     uint32 // DATA: 0, 1, … in each direction of a session, wrapping; else 0
	Payload []byte // DATA: 1 to MaxPayload bytes; else empty, and ignored if not
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// appendFrame appends the encoded frame, with its delimiters, to dst. scratch is a buffer to build the frame in; both
// are returned for the next call.
func appendFrame(dst, scratch []byte, f frame) (encoded, body []byte) {
	body = append(scratch[:0], magic0, magic1, f.Version, byte(f.Type))
	body = binary.BigEndian.AppendUint64(body, f.Nonce)
	body = binary.BigEndian.AppendUint32(body, f.Seq)
	body = append(body, f.Payload...)
	body = binary.BigEndian.AppendUint32(body, crc32.Checksum(body, castagnoli))
	dst = append(dst, delimiter)
	dst = appendStuffed(dst, body)
	return append(dst, delimiter), body
}

// Why a run of bytes between two delimiters is no frame. They are counted, not reported: finding such runs is normal.
var (
	errStuffing = errors.New("byte stuffing is broken")
	errLength   = errors.New("frame is too short or too long")
	errMagic    = errors.New("magic is missing")
	errChecksum = errors.New("checksum does not match")
)

// parseFrame decodes the bytes between two delimiters into buf, which the frame's payload then points into.
func parseFrame(buf, encoded []byte) (f frame, body []byte, err error) {
	body, err = appendUnstuffed(buf[:0], encoded)
	if err != nil {
		return frame{}, body, err
	}
	if len(body) < headerSize+trailerSize || len(body) > maxBody {
		return frame{}, body, errLength
	}
	if body[0] != magic0 || body[1] != magic1 {
		return frame{}, body, errMagic
	}
	end := len(body) - trailerSize
	if binary.BigEndian.Uint32(body[end:]) != crc32.Checksum(body[:end], castagnoli) {
		return frame{}, body, errChecksum
	}
	return frame{
		Version: body[2],
		Type:    frameType(body[3]),
		Nonce:   binary.BigEndian.Uint64(body[4:]),
		Seq:     binary.BigEndian.Uint32(body[12:]),
		Payload: body[headerSize:end],
	}, body, nil
}

// appendStuffed appends src in consistent overhead byte stuffing (COBS): the same bytes without a zero, by replacing
// each zero by the distance to the next.
func appendStuffed(dst, src []byte) []byte {
	for {
		zeros := leading(src, 0) // each a step of its own, and common
		dst = append(dst, manyOnes[:zeros]...)
		src = src[zeros:]
		run := src[:min(len(src), 254)]
		n := bytes.IndexByte(run, 0)
		switch {
		case n >= 0: // n bytes, and the zero that the next code stands for
			dst = append(dst, byte(n+1))
			dst = append(dst, run[:n]...)
			src = src[n+1:]
		case len(run) == 254: // 254 bytes, and no zero
			dst = append(dst, 255)
			dst = append(dst, run...)
			if src = src[254:]; len(src) == 0 {
				return dst
			}
		default: // the end
			dst = append(dst, byte(len(run)+1))
			return append(dst, run...)
		}
	}
}

// appendUnstuffed is the inverse of appendStuffed. src has no zeros.
func appendUnstuffed(dst, src []byte) ([]byte, error) {
	for len(src) > 0 {
		if ones := leading(src[:len(src)-1], 1); ones > 0 { // each a zero, but for the last byte of all
			dst = append(dst, manyZeros[:ones]...)
			src = src[ones:]
		}
		code := int(src[0])
		if code == 0 || code > len(src) {
			return dst, errStuffing
		}
		dst = append(dst, src[1:code]...)
		src = src[code:]
		if code < 255 && len(src) > 0 {
			dst = append(dst, 0)
		}
	}
	return dst, nil
}

// leading is how many bytes of value c b begins with, up to the size of the arrays below.
func leading(b []byte, c byte) (n int) {
	b = b[:min(len(b), len(manyOnes))]
	for n < len(b) && b[n] == c {
		n++
	}
	return n
}

var (
	manyZeros [1024]byte
	manyOnes  = [1024]byte(bytes.Repeat([]byte{1}, 1024))
)

// decoder finds the frames in a stream that may begin anywhere, and may hold anything between them.
type decoder struct {
	r       io.Reader
	buf     []byte // what was read; buf[pos:] is not yet looked at
	pos     int
	partial []byte // the beginning of a frame whose end was not in buf
	tooLong bool   // partial would exceed maxEncoded: skip to the next delimiter
	body    []byte // backs the last frame's payload

	discarded int // runs of bytes that were no frame
}

func newDecoder(r io.Reader) *decoder {
	return &decoder{
		r:       r,
		buf:     make([]byte, 0, 64<<10),
		partial: make([]byte, 0, maxEncoded),
		body:    make([]byte, 0, maxBody+maxBody/254),
	}
}

// next returns the next valid frame. Its payload is valid until the next call. An error is the reader's.
func (d *decoder) next() (frame, error) {
	for {
		rest := d.buf[d.pos:]
		i := bytes.IndexByte(rest, delimiter)
		if i < 0 {
			d.keep(rest)
			n, err := d.r.Read(d.buf[:cap(d.buf)])
			d.buf, d.pos = d.buf[:n], 0
			if n == 0 && err != nil {
				return frame{}, err
			}
			continue
		}
		d.pos += i + 1
		encoded := rest[:i]
		if len(d.partial) > 0 || d.tooLong {
			d.keep(encoded)
			encoded = d.partial
		}
		tooLong := d.tooLong || len(encoded) > maxEncoded
		d.partial, d.tooLong = d.partial[:0], false
		if len(encoded) == 0 && !tooLong {
			continue // two delimiters in a row
		}
		if !tooLong {
			f, body, err := parseFrame(d.body, encoded)
			d.body = body
			if err == nil {
				return f, nil
			}
		}
		d.discarded++
	}
}

// keep remembers p as a part of a frame that is not complete.
func (d *decoder) keep(p []byte) {
	if d.tooLong || len(d.partial)+len(p) > maxEncoded {
		d.partial, d.tooLong = d.partial[:0], true
		return
	}
	d.partial = append(d.partial, p...)
}

// forget drops the beginning of a frame whose rest will not come.
func (d *decoder) forget() {
	d.buf, d.pos, d.partial, d.tooLong = d.buf[:0], 0, d.partial[:0], false
}
