package wire

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strconv"
	"sync"
	"time"

	"github.com/zeebo/xxh3"
)

const (
	// HeaderSize is the length of an encoded Header in bytes.
	HeaderSize = 16
	// MaxPayload is the largest payload of a frame in bytes.
	MaxPayload = 64 << 10
	// PageSize is the unit, in bytes, of Data and Zero frames: offsets and lengths are multiples of it, except where a
	// device ends.
	PageSize = 4096
	// ZeroFrameSize is the length of an encoded Zero frame, header included.
	ZeroFrameSize = HeaderSize + 8
	// HeartbeatInterval is the longest time a living side leaves a stream silent.
	HeartbeatInterval = 250 * time.Millisecond
)

// ErrMalformed is wrapped by every decoding error that means the peer broke the specification.
var ErrMalformed = errors.New("malformed frame")

// Type says what a frame is. Values not listed here are refused. See docs/protocol.md for the ranges kept free.
type Type uint8

const (
	// Either side, any stream.
	TypeHeartbeat Type = 0x01 // I am alive; sent on a stream that was silent for HeartbeatInterval
	TypeBye       Type = 0x02 // the last frame of a stream: I have nothing more to say
	TypeAbort     Type = 0x03 // the last frame of a stream: the migration is over, and why

	// Preparation, stream 0.
	TypeManifest Type = 0x10 // source: what will come
	TypeAccept   Type = 0x11 // destination: ready for it, the VMM is waiting; what it can do

	// Content. Data and Zero travel on any stream, the others on stream 0.
	TypeData     Type = 0x20 // source: bytes of a device
	TypeZero     Type = 0x21 // source: a run of zeros of a device
	TypeRoundEnd Type = 0x22 // source: a device's round is complete when this many bytes have arrived
	TypeAck      Type = 0x23 // destination: this many bytes of a device were processed
	TypeCheck    Type = 0x24 // source, since version 2: the checksum of the Data or Zero frame that follows

	// Handover, stream 0.
	TypeState    Type = 0x30 // source: bytes of the device state of the VMM, in order
	TypeFinal    Type = 0x31 // source: everything was sent; totals and digests
	TypePrepared Type = 0x32 // destination: all of it arrived and is loaded; my totals and digests
	TypeCommit   Type = 0x33 // source: the guest is yours; its record of that is durable
	TypeRunning  Type = 0x34 // destination: the guest runs here

	// What follows the switch, stream 0; since version 2.
	TypeMissing Type = 0x40 // either: pages of a device that the destination will lack, or lacks, when the guest runs
	TypeDemand  Type = 0x41 // destination: somebody waits for these bytes of a device
	TypeServed  Type = 0x42 // source: all that was missing was sent; totals and digests
	TypeSettled Type = 0x43 // destination: nothing is missing, durably; its totals and digests
	TypeCopied  Type = 0x44 // source: the copy is good, and the guest runs on here

	// Content by reference, stream 0; since version 2, between two that have agreed on it.
	TypeAbsent Type = 0x50 // destination: pages of a device that it does not get from the store
	TypeIdle   Type = 0x51 // source: all else was sent; what is not fetched from the store yet can come from me

	// Meeting again, stream 0; since version 2.
	TypeSeek   Type = 0x60 // source: what has become of the migration of this id?
	TypeRejoin Type = 0x61 // destination: this has
	TypeServe  Type = 0x62 // source: understood, content comes
)

// Flags are per type; a flag a type does not have is refused.
const (
	// FlagLast marks the last State frame, and the last Missing or Absent frame of a device.
	FlagLast = 0x01
	// FlagFresh on a Serve says that the source remembers nothing of what it sent before.
	FlagFresh = 0x01
	// FlagNow on an Idle says that all of it is to come from the source, now.
	FlagNow = 0x01
	// FlagNeverRan on an Abort promises that the sender will never run this guest from this migration, and that the
	// promise is durable. It lets a source in doubt take its guest back.
	FlagNeverRan = 0x01
	// FlagZstd marks a Data frame whose content is compressed. Since version 2.
	FlagZstd = 0x10
)

// rule is what the specification says about one type. Sizes are of the payload, in bytes.
type rule struct {
	name     string
	since    uint16 // version; 0 is all of them
	min, max uint32
	flags    uint8
	device   bool // uses the device field, which is otherwise zero
	offset   bool // uses the offset field, which is otherwise zero
}

var rules = [256]rule{
	TypeHeartbeat: {name: "heartbeat"},
	TypeBye:       {name: "bye"},
	TypeAbort:     {name: "abort", min: 2, max: 2 + MaxReason, flags: FlagNeverRan},
	TypeManifest:  {name: "manifest", min: 2, max: MaxPayload},
	TypeAccept:    {name: "accept", max: MaxPayload},
	TypeCheck:     {name: "check", since: 2, min: 8, max: 8},
	TypeData:      {name: "data", min: 1, max: MaxPayload, flags: FlagZstd, device: true, offset: true},
	TypeZero:      {name: "zero", min: 8, max: 8, device: true, offset: true},
	TypeRoundEnd:  {name: "round-end", min: 4, max: 4, device: true, offset: true},
	TypeAck:       {name: "ack", device: true, offset: true},
	TypeState:     {name: "state", max: MaxPayload, flags: FlagLast, offset: true},
	TypeFinal:     {name: "final", min: summarySize, max: summarySize * (1 + MaxDevices)},
	TypePrepared:  {name: "prepared", min: summarySize, max: summarySize * (1 + MaxDevices)},
	TypeCommit:    {name: "commit"},
	TypeRunning:   {name: "running"},
	TypeMissing:   {name: "missing", since: 2, max: MaxPayload, flags: FlagLast, device: true, offset: true},
	TypeDemand:    {name: "demand", since: 2, min: 8, max: 8, device: true, offset: true},
	TypeServed:    {name: "served", since: 2, min: summarySize, max: summarySize * (1 + MaxDevices)},
	TypeSettled:   {name: "settled", since: 2, min: summarySize, max: summarySize * (1 + MaxDevices)},
	TypeCopied:    {name: "copied", since: 2},
	TypeAbsent:    {name: "absent", since: 2, max: MaxPayload, flags: FlagLast, device: true, offset: true},
	TypeIdle:      {name: "idle", since: 2, flags: FlagNow},
	TypeSeek:      {name: "seek", since: 2, min: 1, max: MaxName},
	TypeRejoin:    {name: "rejoin", since: 2, min: 2, max: MaxPayload},
	TypeServe:     {name: "serve", since: 2, flags: FlagFresh},
}

func (t Type) String() string {
	if n := rules[t].name; n != "" {
		return n
	}
	return "type 0x" + strconv.FormatUint(uint64(t), 16)
}

// Header opens every frame.
type Header struct {
	Type   Type   // of the frame
	Flags  uint8  // of this type
	Device uint16 // position in the manifest
	Length uint32 // of the payload, bytes
	Offset uint64 // byte position, or a total: see the type
}

// check holds a header against the specification.
func (h Header) check() error {
	r := &rules[h.Type]
	switch {
	case r.name == "":
		return fmt.Errorf("%w: unknown %v", ErrMalformed, h.Type)
	case h.Flags&^r.flags != 0:
		return fmt.Errorf("%w: %v frame with flags 0x%02x, allowed are 0x%02x", ErrMalformed, h.Type, h.Flags, r.flags)
	case h.Length < r.min || h.Length > r.max:
		return fmt.Errorf("%w: %v frame of %d bytes, allowed are %d to %d", ErrMalformed, h.Type, h.Length, r.min, r.max)
	case !r.device && h.Device != 0:
		return fmt.Errorf("%w: %v frame names device %d", ErrMalformed, h.Type, h.Device)
	case h.Device >= MaxDevices:
		return fmt.Errorf("%w: %v frame for device %d, there are at most %d", ErrMalformed, h.Type, h.Device, MaxDevices)
	case !r.offset && h.Offset != 0:
		return fmt.Errorf("%w: %v frame with offset %d", ErrMalformed, h.Type, h.Offset)
	case h.Offset > 1<<63-1:
		return fmt.Errorf("%w: %v frame with offset 0x%x", ErrMalformed, h.Type, h.Offset)
	}
	return nil
}

// Check holds a header that was decoded against an older version than the newest.
func (h Header) Check(version uint16) error {
	switch {
	case rules[h.Type].since > version:
		return fmt.Errorf("%w: %v frame in version %d of the protocol", ErrMalformed, h.Type, version)
	case h.Type == TypeData && version < 2 && h.Flags != 0:
		return fmt.Errorf("%w: data frame with flags 0x%02x in version %d of the protocol", ErrMalformed, h.Flags, version)
	case h.Type == TypeAccept && version < 2 && h.Length != 0:
		return fmt.Errorf("%w: accept frame of %d bytes in version %d of the protocol", ErrMalformed, h.Length, version)
	}
	return nil
}

// Put encodes the header into the first HeaderSize bytes of b.
func (h Header) Put(b []byte) {
	_ = b[HeaderSize-1]
	b[0], b[1] = byte(h.Type), h.Flags
	binary.BigEndian.PutUint16(b[2:], h.Device)
	binary.BigEndian.PutUint32(b[4:], h.Length)
	binary.BigEndian.PutUint64(b[8:], h.Offset)
}

// ParseHeader decodes the first HeaderSize bytes of b, and checks them against the specification.
func ParseHeader(b []byte) (Header, error) {
	_ = b[HeaderSize-1]
	h := Header{
		Type:   Type(b[0]),
		Flags:  b[1],
		Device: binary.BigEndian.Uint16(b[2:]),
		Length: binary.BigEndian.Uint32(b[4:]),
		Offset: binary.BigEndian.Uint64(b[8:]),
	}
	return h, h.check()
}

// Append appends a whole frame to b. The header's Length is taken from the payload.
func Append(b []byte, h Header, payload []byte) []byte {
	h.Length = uint32(len(payload))
	var e [HeaderSize]byte
	h.Put(e[:])
	return append(append(b, e[:]...), payload...)
}

// Check is what a Check frame says of the frame behind it. The zero value is of a frame that has none before it.
type Check struct {
	sum   uint64
	there bool
}

// CheckFrameSize is the size of a Check frame in bytes.
const CheckFrameSize = HeaderSize + 8

// sumOf is the sum of a frame: xxh3-64 of its payload, seeded with that of its header.
func sumOf(header, payload []byte) uint64 { return xxh3.HashSeed(payload, xxh3.Hash(header)) }

// PutCheck encodes a Check frame for a frame, whole as it will be sent, into the first CheckFrameSize bytes of b.
func PutCheck(b, frame []byte) {
	_ = b[CheckFrameSize-1]
	Header{Type: TypeCheck, Length: 8}.Put(b)
	binary.BigEndian.PutUint64(b[HeaderSize:], sumOf(frame[:HeaderSize], frame[HeaderSize:]))
}

// ParseCheck decodes the payload of a Check frame.
func ParseCheck(payload []byte) (Check, error) {
	if len(payload) != 8 {
		return Check{}, fmt.Errorf("%w: check of %d bytes", ErrMalformed, len(payload))
	}
	return Check{binary.BigEndian.Uint64(payload), true}, nil
}

// Size is how many bytes of the stream the check took.
func (c Check) Size() int64 {
	if c.there {
		return CheckFrameSize
	}
	return 0
}

// Verify reports whether a received frame is the one that was checked, undamaged.
func (c Check) Verify(h Header, payload []byte) error {
	var b [HeaderSize]byte
	h.Put(b[:])
	switch {
	case !c.there:
		return fmt.Errorf("%w: %v frame without the check that is due before it", ErrMalformed, h.Type)
	case sumOf(b[:], payload) != c.sum:
		return fmt.Errorf("%w: %v frame that was damaged on its way: its checksum is another", ErrMalformed, h.Type)
	}
	return nil
}

// PutZero encodes a Zero frame into the first ZeroFrameSize bytes of b: n zeros of device at offset.
func PutZero(b []byte, device uint16, offset, n int64) {
	_ = b[ZeroFrameSize-1]
	Header{Type: TypeZero, Device: device, Length: 8, Offset: uint64(offset)}.Put(b)
	binary.BigEndian.PutUint64(b[HeaderSize:], uint64(n))
}

// ParseZero decodes the payload of a Zero frame: the length of the run in bytes, which is positive.
func ParseZero(payload []byte) (int64, error) {
	if len(payload) != 8 {
		return 0, fmt.Errorf("%w: zero frame of %d bytes", ErrMalformed, len(payload))
	}
	n := binary.BigEndian.Uint64(payload)
	if n == 0 || n > MaxDeviceSize {
		return 0, fmt.Errorf("%w: run of %d zeros", ErrMalformed, n)
	}
	return int64(n), nil
}

// readAhead is how much a Reader takes from its stream beyond what was asked: enough that four dirty pages, each a frame
// of its own, come with one system call; small, because a full frame's payload is read past it, straight to its place.
const readAhead = 16 << 10

// Reader decodes the frames of one stream, after its preface.
type Reader struct {
	br   *bufio.Reader
	head [HeaderSize]byte
	left uint32 // payload bytes of the current frame not yet read
}

// NewReader returns a Reader on r, from which it may read ahead.
func NewReader(r io.Reader) *Reader { return &Reader{br: bufio.NewReaderSize(r, readAhead)} }

// Next reads a header, after skipping what is left of the last payload. A stream that ends between two frames gives
// io.EOF; inside one, io.ErrUnexpectedEOF.
func (r *Reader) Next() (Header, error) {
	if r.left > 0 {
		n, err := r.br.Discard(int(r.left))
		r.left -= uint32(n)
		if err != nil {
			return Header{}, unexpected(err)
		}
	}
	if _, err := io.ReadFull(r.br, r.head[:]); err != nil {
		return Header{}, err
	}
	h, err := ParseHeader(r.head[:])
	if err == nil {
		r.left = h.Length
	}
	return h, err
}

// Payload reads the next len(p) bytes of the current frame's payload, of which there must be that many left.
func (r *Reader) Payload(p []byte) error {
	if uint64(len(p)) > uint64(r.left) {
		return fmt.Errorf("read payload: %d bytes asked, %d left", len(p), r.left)
	}
	n, err := io.ReadFull(r.br, p)
	r.left -= uint32(n)
	return unexpected(err)
}

func unexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// BufferSize is the capacity of a Buffer: one largest frame, or one largest payload's worth of single pages, each in its
// own frame, with a Zero frame to spare at the end, and all of them with checks.
const BufferSize = MaxPayload + (MaxPayload/PageSize)*(CheckFrameSize+HeaderSize) + 2*(CheckFrameSize+ZeroFrameSize)

// Buffer holds whole frames on their way to a stream, or a payload on its way from one. It comes from a pool: whoever
// holds it last calls Release, and does not touch it again.
type Buffer struct {
	Header Header           // of the payload, when the Buffer holds one that was received
	N      int              // bytes in use
	Check  Check            // that came before the payload
	B      [BufferSize]byte // the frames
}

var buffers = sync.Pool{New: func() any { return new(Buffer) }}

// NewBuffer returns an empty buffer with arbitrary contents.
func NewBuffer() *Buffer {
	b := buffers.Get().(*Buffer)
	b.Header, b.N, b.Check = Header{}, 0, Check{}
	return b
}

// Release gives the buffer back.
func (b *Buffer) Release() { buffers.Put(b) }

// Bytes returns the bytes in use.
func (b *Buffer) Bytes() []byte { return b.B[:b.N] }

// Append adds a whole frame. The caller knows that it fits.
func (b *Buffer) Append(h Header, payload []byte) {
	b.N = len(Append(b.B[:b.N:BufferSize], h, payload))
}
