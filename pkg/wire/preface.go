package wire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"syscall"
)

const (
	// Version is the newest version of the protocol this package speaks. A release that introduces version n keeps n−1.
	Version = 2
	// OldestVersion is the oldest.
	OldestVersion = 1

	// Magic opens every stream, in both directions.
	Magic = "DRAFTER\x00"

	// PrefaceSize is the length of an encoded Preface in bytes, in this and every later version.
	PrefaceSize = 32

	// MaxStreams is how many streams one migration may use.
	MaxStreams = 64
)

var (
	// ErrNotDrafter is wrapped when the peer's first bytes are not a Drafter's.
	ErrNotDrafter = errors.New("peer is not a Drafter")
	// ErrVersion is wrapped when the peer is a Drafter with which no version is shared.
	ErrVersion = errors.New("no common protocol version")
)

// Role is the part a peer plays in a migration.
type Role uint8

const (
	RoleSource      Role = 1 // has the guest
	RoleDestination Role = 2 // will have it
)

func (r Role) String() string {
	switch r {
	case RoleSource:
		return "source"
	case RoleDestination:
		return "destination"
	}
	return fmt.Sprintf("role %d", uint8(r))
}

// Opposite is the role of whoever meets a role.
func (r Role) Opposite() Role {
	if r == RoleSource {
		return RoleDestination
	}
	return RoleSource
}

// Purpose says what streams are for. It exists since version 2; before, it is always to migrate.
type Purpose uint8

const (
	PurposeMigrate Purpose = 0 // a new migration
	PurposeRejoin  Purpose = 1 // one that was committed goes on
)

func (p Purpose) String() string {
	switch p {
	case PurposeMigrate:
		return "a new migration"
	case PurposeRejoin:
		return "a migration that goes on"
	}
	return fmt.Sprintf("purpose %d", uint8(p))
}

// Preface is the first thing each side sends on each stream.
//
// Both sides number their streams and choose a session, so that whoever accepts connections can tell which belong
// together. From then on the source's numbers count. A destination of version 1 sends zeros.
type Preface struct {
	Newest, Oldest uint16  // versions the sender speaks
	Role           Role    // of the sender
	Purpose        Purpose // of all streams of the session
	Stream         uint8   // which stream of the sender's session this is, from 0
	Streams        uint8   // how many there are
	Session        uint64  // chosen at random by the sender, the same on all its streams
	Capabilities   uint32  // what the sender can do beyond the version, the same on all its streams; unknown bits are ignored
}

// CapBound is the capability of a side that can bind its proofs to the channel of each of its streams: see [Meeting].
const CapBound = 1 << 0

// Append appends the encoded preface to b.
func (p Preface) Append(b []byte) []byte {
	b = append(b, Magic...)
	b = binary.BigEndian.AppendUint16(b, p.Newest)
	b = binary.BigEndian.AppendUint16(b, p.Oldest)
	b = append(b, byte(p.Role), byte(p.Purpose), p.Stream, p.Streams)
	b = binary.BigEndian.AppendUint64(b, p.Session)
	b = binary.BigEndian.AppendUint32(b, p.Capabilities)
	return append(b, 0, 0, 0, 0)
}

// ReadPreface reads a preface and not a byte more. It stops at the first byte that is not a Drafter's, so that a foreign
// peer which says little and then waits is recognised by what it said: the error wraps [ErrNotDrafter], quotes it, and
// names the protocol if it is a common one.
//
// Versions are not judged here (see [Negotiate]), the fields of a shared layout are.
func ReadPreface(r io.Reader) (Preface, error) {
	var b [PrefaceSize]byte
	for n := 0; n < len(b); {
		m, err := r.Read(b[n:])
		n += m
		if k := min(n, len(Magic)); string(b[:k]) != Magic[:k] {
			return Preface{}, foreign(b[:n])
		}
		if n == len(b) {
			break // an error that came along belongs to the next read
		}
		if err == io.EOF {
			if n == 0 {
				return Preface{}, fmt.Errorf("read preface: peer closed the stream without a word (%s): %w", silence, io.ErrUnexpectedEOF)
			}
			return Preface{}, fmt.Errorf("read preface: stream ended after %d of %d bytes: %w", n, len(b), io.ErrUnexpectedEOF)
		}
		if n == 0 && errors.Is(err, syscall.ECONNRESET) {
			return Preface{}, fmt.Errorf("read preface: peer reset the stream without a word (%s): %w", silence, err)
		}
		if err != nil {
			return Preface{}, fmt.Errorf("read preface: %w", err)
		}
	}
	p := Preface{
		Newest:       binary.BigEndian.Uint16(b[8:]),
		Oldest:       binary.BigEndian.Uint16(b[10:]),
		Role:         Role(b[12]),
		Purpose:      Purpose(b[13]),
		Stream:       b[14],
		Streams:      b[15],
		Session:      binary.BigEndian.Uint64(b[16:]),
		Capabilities: binary.BigEndian.Uint32(b[24:]),
	}
	if p.Newest < 2 {
		p.Purpose = PurposeMigrate // the byte was to be ignored
	}
	if p.Oldest == 0 || p.Oldest > p.Newest {
		return Preface{}, fmt.Errorf("read preface: %w: version range %d to %d", ErrMalformed, p.Oldest, p.Newest)
	}
	return p, nil
}

// silence is what may be behind it.
const silence = "it may want to be dialled in another way, such as tls:// or psk://; its log may say why"

// foreign describes a peer by its first words.
func foreign(b []byte) error {
	var hint string
	switch {
	case len(b) >= 2 && b[0] == 0x16 && b[1] == 0x03:
		hint = " (TLS: is one end configured with TLS and the other without?)"
	case bytes.HasPrefix(b, []byte("SSH-")):
		hint = " (SSH)"
	case bytes.HasPrefix(b, []byte("NBDMAGIC")):
		hint = " (NBD)"
	case bytes.HasPrefix(b, []byte("HTTP/")), httpRequest(b):
		hint = " (HTTP)"
	}
	return fmt.Errorf("%w: expected a stream that begins with %q, got %q%s", ErrNotDrafter, Magic, b, hint)
}

func httpRequest(b []byte) bool {
	method, _, _ := strings.Cut(string(b), " ")
	switch method {
	case "GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "CONNECT", "TRACE", "PRI":
		return true
	}
	return false
}

// Negotiate chooses the version two peers speak: the newest both know. Both sides compute the same answer from the two
// prefaces, so nothing more is exchanged. It also checks that the roles fit.
func Negotiate(ours, theirs Preface) (uint16, error) {
	v := min(ours.Newest, theirs.Newest)
	if v < ours.Oldest || v < theirs.Oldest {
		return 0, fmt.Errorf("%w: peer speaks %d to %d, we speak %d to %d: update the older side",
			ErrVersion, theirs.Oldest, theirs.Newest, ours.Oldest, ours.Newest)
	}
	switch {
	case theirs.Role != RoleSource && theirs.Role != RoleDestination:
		return 0, fmt.Errorf("negotiate: %w: unknown %v", ErrMalformed, theirs.Role)
	case theirs.Role == ours.Role:
		return 0, fmt.Errorf("negotiate: both ends are the %v of the migration; one must send and the other receive", ours.Role)
	case theirs.Role == RoleSource && (theirs.Streams == 0 || theirs.Streams > MaxStreams || theirs.Stream >= theirs.Streams):
		return 0, fmt.Errorf("negotiate: %w: stream %d of %d", ErrMalformed, theirs.Stream, theirs.Streams)
	case theirs.Purpose != ours.Purpose:
		return 0, fmt.Errorf("negotiate: the %v comes with %v, we with %v", theirs.Role, theirs.Purpose, ours.Purpose)
	case v < 2 && ours.Purpose != PurposeMigrate:
		return 0, fmt.Errorf("negotiate: %w: %v needs version 2, we have %d in common", ErrVersion, ours.Purpose, v)
	}
	return v, nil
}
