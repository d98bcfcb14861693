package wire

import (
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"regexp"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Limits of messages.
const (
	MaxDevices    = 256     // per migration
	MaxName       = 64      // bytes of a device name, or of a migration id
	MaxDeviceSize = 1 << 46 // bytes: 64 TiB
	MaxReason     = 1024    // bytes of the text of an Abort
	MinWindow     = 2 * (HeaderSize + MaxPayload)
	MaxWindow     = 1 << 30 // bytes
)

// A name can never be taken for a path: no separator, no leading dot.
var namePattern = regexp.MustCompile(`^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$`)

var digestPattern = regexp.MustCompile(`^[0-9a-f]{32}$`)

// CheckName reports why s cannot be a device name or a migration id.
func CheckName(s string) error {
	if !namePattern.MatchString(s) {
		return fmt.Errorf("name %q: use 1 to %d letters, digits, '.', '_' or '-', not beginning with '.'", clip(s, MaxName), MaxName)
	}
	return nil
}

// CheckID reports why s cannot be the id of a migration: it is no name, or its public part is too long for a Seek to have it beside a proof.
func CheckID(s string) error {
	if err := CheckName(s); err != nil {
		return err
	}
	if public := PublicID(s); public != s && len(public)+len(secretMark)+2*proofSize > MaxName {
		return fmt.Errorf("id %q…: its public part, before the first %q, has %d bytes, and may have %d where a secret follows", public, secretMark, len(public), MaxName-len(secretMark)-2*proofSize)
	}
	return nil
}

// Device describes a device in a Manifest.
type Device struct {
	Name string `json:"name"` // unique in the manifest: see CheckName
	Size int64  `json:"size"` // bytes

	// Base is the digest, in hexadecimal, of the base that the device was made from, if there is one that the destination
	// may hold too.
	Base string `json:"base,omitempty"`

	// Stored, if set, is by which a destination can find, in a store that both can reach, what the device held a while ago. It is JSON, opaque
	// here, and names no secret.
	Stored json.RawMessage `json:"stored,omitempty"`

	// Handle, if set, is by which a destination on the source's host can have the device itself. Its form is the two ends' own.
	Handle string `json:"handle,omitempty"`
}

// MaxHandle is the most bytes of a Handle, and MaxStored of what Stored says.
const (
	MaxHandle = 64
	MaxStored = 1 << 10
)

// Manifest says what a migration will bring. A device is known by its position from then on.
type Manifest struct {
	ID      string          `json:"id"`             // of the migration, with its secret
	Window  int64           `json:"window"`         // bytes of content frames the source keeps unacknowledged at most
	Devices []Device        `json:"devices"`        // a device is known by its position here
	Spec    json.RawMessage `json:"spec,omitempty"` // the machine; opaque here

	// Network is what the destination needs to keep the guest's connections; opaque here. Empty: they are not kept.
	Network json.RawMessage `json:"network,omitempty"`
}

// MaxNetwork is the most bytes of what a manifest and its answer say of the guest's network.
const MaxNetwork = 24 << 10

func (m *Manifest) check() error {
	if err := CheckID(m.ID); err != nil {
		return fmt.Errorf("migration id: %w", err)
	}
	if m.Window < MinWindow || m.Window > MaxWindow {
		return fmt.Errorf("window of %d bytes: allowed are %d to %d", m.Window, MinWindow, MaxWindow)
	}
	if len(m.Network) > MaxNetwork {
		return fmt.Errorf("%d bytes of the guest's network: at most %d are allowed", len(m.Network), MaxNetwork)
	}
	if len(m.Devices) > MaxDevices {
		return fmt.Errorf("%d devices: at most %d are allowed", len(m.Devices), MaxDevices)
	}
	seen := make(map[string]bool, len(m.Devices))
	for _, d := range m.Devices {
		if err := CheckName(d.Name); err != nil {
			return fmt.Errorf("device: %w", err)
		}
		if seen[d.Name] {
			return fmt.Errorf("device %q is named twice", d.Name)
		}
		seen[d.Name] = true
		if d.Size < 0 || d.Size > MaxDeviceSize {
			return fmt.Errorf("device %q: size %d: allowed are 0 to %d bytes", d.Name, d.Size, int64(MaxDeviceSize))
		}
		if d.Base != "" && !digestPattern.MatchString(d.Base) {
			return fmt.Errorf("device %q: base %q is not a digest", d.Name, clip(printable(d.Base), 2*len(Digest{})))
		}
		if len(d.Stored) > MaxStored {
			return fmt.Errorf("device %q: %d bytes of what is stored of it: at most %d are allowed", d.Name, len(d.Stored), MaxStored)
		}
		if len(d.Handle) > MaxHandle || d.Handle != printable(d.Handle) {
			return fmt.Errorf("device %q: handle %q: at most %d printable bytes are allowed", d.Name, clip(printable(d.Handle), MaxHandle), MaxHandle)
		}
	}
	return nil
}

// Encode returns the payload of a Manifest frame. It fails when the manifest breaks a limit.
func (m *Manifest) Encode() ([]byte, error) {
	if err := m.check(); err != nil {
		return nil, fmt.Errorf("encode manifest: %w", err)
	}
	b, err := json.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encode manifest: %w", err)
	}
	if len(b) > MaxPayload {
		return nil, fmt.Errorf("encode manifest: %d bytes with its machine description, at most %d fit", len(b), MaxPayload)
	}
	return b, nil
}

// DecodeManifest decodes the payload of a Manifest frame.
func DecodeManifest(b []byte) (*Manifest, error) {
	m := new(Manifest)
	if len(b) > MaxPayload {
		return nil, fmt.Errorf("%w: manifest of %d bytes", ErrMalformed, len(b))
	}
	if err := json.Unmarshal(b, m); err != nil {
		return nil, fmt.Errorf("%w: manifest: %w", ErrMalformed, err)
	}
	if err := m.check(); err != nil {
		return nil, fmt.Errorf("%w: manifest: %w", ErrMalformed, err)
	}
	return m, nil
}

// Digest is a 128-bit content digest; see docs/protocol.md for how it is computed.
type Digest [16]byte

// String is the digest in hexadecimal.
func (d Digest) String() string { return hex.EncodeToString(d[:]) }

// Part is what one side knows of one device, or of the device state: how much was sent and what it adds up to.
type Part struct {
	Total  int64  // bytes of content frames, headers included; for the state, its length
	Digest Digest // of that content
}

const summarySize = 8 + 16

// Summary is the payload of Final and Prepared.
type Summary struct {
	State   Part   // of the device state
	Devices []Part // in manifest order
}

// Encode returns the payload of a Final or Prepared frame.
func (s *Summary) Encode() []byte {
	b := make([]byte, 0, summarySize*(1+len(s.Devices)))
	add := func(p Part) {
		b = binary.BigEndian.AppendUint64(b, uint64(p.Total))
		b = append(b, p.Digest[:]...)
	}
	add(s.State)
	for _, d := range s.Devices {
		add(d)
	}
	return b
}

// DecodeSummary decodes the payload of a Final or Prepared frame, which must speak of exactly n devices.
func DecodeSummary(b []byte, n int) (*Summary, error) {
	if len(b) != summarySize*(1+n) {
		return nil, fmt.Errorf("%w: summary of %d bytes, %d devices need %d", ErrMalformed, len(b), n, summarySize*(1+n))
	}
	parts := make([]Part, 1+n)
	for i := range parts {
		t := binary.BigEndian.Uint64(b[i*summarySize:])
		if t > 1<<63-1 {
			return nil, fmt.Errorf("%w: total 0x%x in summary", ErrMalformed, t)
		}
		parts[i] = Part{Total: int64(t), Digest: Digest(b[i*summarySize+8 : (i+1)*summarySize])}
	}
	return &Summary{State: parts[0], Devices: parts[1:]}, nil
}

// Code classifies the reason of an Abort. Numbers are for ever: do not reorder. A code that the receiver does not know
// is an abort all the same.
type Code uint16

const (
	CodeInternal Code = 1 // the sender failed; the reason is in its own log
	CodeRefused  Code = 2 // the destination does not take this machine
	CodeCanceled Code = 3 // someone stopped the sender
	CodeProtocol Code = 4 // the receiver of this frame broke the specification
	CodeTimeout  Code = 5 // the receiver of this frame was silent, or a step took too long
	CodeDigest   Code = 6 // the content that arrived is not the content that was sent
	CodeDevice   Code = 7 // a device of the sender failed
)

func (c Code) String() string {
	names := [...]string{CodeInternal: "internal error", CodeRefused: "refused", CodeCanceled: "canceled", CodeProtocol: "protocol error",
		CodeTimeout: "timeout", CodeDigest: "digest mismatch", CodeDevice: "device error"}
	if int(c) < len(names) && names[c] != "" {
		return names[c]
	}
	return fmt.Sprintf("code %d", uint16(c))
}

// Abort is the payload of an Abort frame.
type Abort struct {
	Code   Code   // what kind of reason
	Reason string // for a person; at most MaxReason bytes of printable text
}

// Encode returns the payload of an Abort frame, with the reason cleaned and cut to what is allowed.
func (a Abort) Encode() []byte {
	b := binary.BigEndian.AppendUint16(nil, uint16(a.Code))
	return append(b, clip(printable(a.Reason), MaxReason)...)
}

// DecodeAbort decodes the payload of an Abort frame. The reason is made printable, so that it can go to a log or a
// terminal.
func DecodeAbort(b []byte) (Abort, error) {
	if len(b) < 2 || len(b) > 2+MaxReason {
		return Abort{}, fmt.Errorf("%w: abort of %d bytes", ErrMalformed, len(b))
	}
	return Abort{Code: Code(binary.BigEndian.Uint16(b)), Reason: clip(printable(string(b[2:])), MaxReason)}, nil
}

// printable replaces what could drive a terminal or forge a line of a log.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
}

// clip cuts s to at most n bytes without splitting a character.
func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}

// ParseRoundEnd decodes the payload of a RoundEnd frame: the number of the round, from 0.
func ParseRoundEnd(b []byte) (uint32, error) {
	if len(b) != 4 {
		return 0, fmt.Errorf("%w: round-end of %d bytes", ErrMalformed, len(b))
	}
	return binary.BigEndian.Uint32(b), nil
}
