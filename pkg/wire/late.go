package wire

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math/bits"
)

// Accept is the payload of an Accept frame: what the destination can do, and wants. The zero value is an empty payload,
// which is all that version 1 allows.
type Accept struct {
	// Copy asks for a copy: the guest is not given away and runs on at the source.
	Copy bool `json:"copy,omitempty"`
	// Postpone says, for each device of the manifest, whether pages of it may be missing when the guest runs. Empty: none.
	Postpone []bool `json:"postpone,omitempty"`
	// Based says, for each device of the manifest, whether it holds the base that the manifest names for it, so that only
	// what differs from it need come. Empty: none.
	Based []bool `json:"based,omitempty"`
	// Stored says, for each device of the manifest, whether the destination fetches what is stored of it. Empty: none.
	Stored []bool `json:"stored,omitempty"`
	// Bare says that the destination makes its devices anew, and has bases of none.
	Bare bool `json:"bare,omitempty"`
	// Shared says, for each device of the manifest, whether the destination has it itself, by its handle: nothing of it comes. Empty:
	// none.
	Shared []bool `json:"shared,omitempty"`
	// Network answers the manifest's. Empty: connections are not kept.
	Network json.RawMessage `json:"network,omitempty"`
}

// Encode returns the payload of an Accept frame.
func (a *Accept) Encode() ([]byte, error) {
	b, err := json.Marshal(a)
	if err != nil {
		return nil, fmt.Errorf("encode accept: %w", err)
	}
	if string(b) == "{}" {
		return nil, nil
	}
	return b, nil
}

// DecodeAccept decodes the payload of an Accept frame that answers a manifest of n devices.
func DecodeAccept(b []byte, n int) (*Accept, error) {
	a := new(Accept)
	if len(b) == 0 {
		return a, nil
	}
	if len(b) > MaxPayload {
		return nil, fmt.Errorf("%w: accept of %d bytes", ErrMalformed, len(b))
	}
	if err := json.Unmarshal(b, a); err != nil {
		return nil, fmt.Errorf("%w: accept: %w", ErrMalformed, err)
	}
	if len(a.Network) > MaxNetwork {
		return nil, fmt.Errorf("%w: accept has %d bytes of the guest's network", ErrMalformed, len(a.Network))
	}
	for _, list := range [][]bool{a.Postpone, a.Based, a.Stored, a.Shared} {
		if len(list) != 0 && len(list) != n {
			return nil, fmt.Errorf("%w: accept speaks of %d devices, the manifest of %d", ErrMalformed, len(list), n)
		}
	}
	return a, nil
}

// Run is some pages of a device in a row.
type Run struct {
	Page, Pages int64 // Pages > 0
}

// MaxPages is how many pages a device has at most.
const MaxPages = MaxDeviceSize / PageSize

// Most a run can add to a payload: two numbers below MaxPages.
var maxRun = 2 * ((bits.Len64(MaxPages) + 6) / 7)

// EncodeMissing passes on the Missing frames that list runs, which ascend without touching, of a device, until send fails.
// An empty list is one frame. The payload is send's only during the call.
func EncodeMissing(device uint16, runs []Run, send func(Header, []byte) error) error {
	return encodeRuns(TypeMissing, device, runs, true, send)
}

// EncodeAbsent is EncodeMissing for Absent frames, of which many lists may precede the last of a device.
func EncodeAbsent(device uint16, runs []Run, last bool, send func(Header, []byte) error) error {
	return encodeRuns(TypeAbsent, device, runs, last, send)
}

func encodeRuns(of Type, device uint16, runs []Run, last bool, send func(Header, []byte) error) error {
	var payload []byte
	for {
		h := Header{Type: of, Device: device}
		payload = payload[:0]
		for end := int64(-1); len(runs) > 0 && len(payload) <= MaxPayload-maxRun; runs = runs[1:] {
			if end < 0 {
				h.Offset = uint64(runs[0].Page) * PageSize
			} else {
				payload = binary.AppendUvarint(payload, uint64(runs[0].Page-end))
			}
			payload = binary.AppendUvarint(payload, uint64(runs[0].Pages))
			end = runs[0].Page + runs[0].Pages
		}
		if len(runs) == 0 && last {
			h.Flags = FlagLast
		}
		h.Length = uint32(len(payload))
		if err := send(h, payload); err != nil || len(runs) == 0 {
			return err
		}
	}
}

// DecodeMissing decodes the payload of a Missing or Absent frame and passes on its runs, which ascend without touching, until f fails.
func DecodeMissing(h Header, payload []byte, f func(Run) error) error {
	bad := func(what string) error {
		return fmt.Errorf("%w: %v list of device %d: %s", ErrMalformed, h.Type, h.Device, what)
	}
	if h.Offset%PageSize != 0 || len(payload) == 0 && h.Offset != 0 {
		return bad("it does not begin with a page")
	}
	at := int64(h.Offset) / PageSize
	number := func() (int64, bool) {
		v, n := binary.Uvarint(payload)
		if n <= 0 || n > 1 && payload[n-1] == 0 || v == 0 || v > MaxPages {
			return 0, false
		}
		payload = payload[n:]
		return int64(v), true
	}
	for first := true; len(payload) > 0; first = false {
		if !first {
			gap, ok := number()
			if !ok {
				return bad("a gap is no number of pages")
			}
			at += gap
		}
		n, ok := number()
		if !ok {
			return bad("a run is no number of pages")
		}
		if at+n > MaxPages {
			return bad("it goes beyond the largest device")
		}
		if err := f(Run{Page: at, Pages: n}); err != nil {
			return err
		}
		at += n
	}
	return nil
}

// ParseDemand decodes the payload of a Demand frame: how many bytes, a positive number.
func ParseDemand(payload []byte) (int64, error) {
	n, err := ParseZero(payload)
	if err != nil {
		return 0, fmt.Errorf("%w: demand of %x bytes", ErrMalformed, payload)
	}
	return n, nil
}

// AppendDemand appends a Demand frame to b.
func AppendDemand(b []byte, device uint16, offset, n int64) []byte {
	var p [8]byte
	binary.BigEndian.PutUint64(p[:], uint64(n))
	return Append(b, Header{Type: TypeDemand, Device: device, Offset: uint64(offset)}, p[:])
}

// Standing is what a destination says about a migration when the two sides meet again.
type Standing string

const (
	NeverRan Standing = "never-ran" // the guest did not run here and never will; that is recorded durably
	Owned    Standing = "owned"     // the guest belongs here and will run
	Runs     Standing = "runs"      // it runs here
	Settled  Standing = "settled"   // it runs here, and nothing is missing, durably
)

// Rejoin is the payload of a Rejoin frame, behind a proof. For each device with Missing set, Missing frames follow, in which a device is
// known by its position here.
type Rejoin struct {
	ID       string   `json:"id"`       // its public part
	Standing Standing `json:"standing"` // of the guest, at the destination
	// Fresh: the destination remembers nothing of what it received before, so digests are of what comes from now on.
	Fresh   bool           `json:"fresh,omitempty"`
	Devices []RejoinDevice `json:"devices,omitempty"`

	proof, said []byte // of a payload that was decoded
}

// RejoinDevice is a device in a Rejoin.
type RejoinDevice struct {
	Device
	Missing bool `json:"missing,omitempty"` // pages of it are
}

func (r *Rejoin) check() error {
	switch r.Standing {
	case NeverRan, Owned, Runs, Settled:
	default:
		return fmt.Errorf("unknown standing %q", clip(printable(string(r.Standing)), MaxName))
	}
	m := Manifest{ID: r.ID, Window: MinWindow}
	for _, d := range r.Devices {
		m.Devices = append(m.Devices, d.Device)
	}
	return m.check()
}

// Encode returns the payload of a Rejoin frame, by which the destination proves that it is this side of the migration id, and says all
// this. It fails when a limit is broken.
func (r *Rejoin) Encode(id string, m Meeting) ([]byte, error) {
	r.ID = PublicID(id)
	if err := r.check(); err != nil {
		return nil, fmt.Errorf("encode rejoin: %w", err)
	}
	said, err := json.Marshal(r)
	if err == nil && proofSize+len(said) > MaxPayload {
		err = fmt.Errorf("at most %d bytes fit", MaxPayload-proofSize)
	}
	if err != nil {
		return nil, fmt.Errorf("encode rejoin of %d bytes: %w", len(said), err)
	}
	return append(prove(id, RoleDestination, m, said), said...), nil
}

// DecodeRejoin decodes the payload of a Rejoin frame.
func DecodeRejoin(b []byte) (*Rejoin, error) {
	if len(b) < proofSize || len(b) > MaxPayload {
		return nil, fmt.Errorf("%w: rejoin of %d bytes", ErrMalformed, len(b))
	}
	r := &Rejoin{proof: b[:proofSize], said: b[proofSize:]}
	if err := json.Unmarshal(r.said, r); err != nil {
		return nil, fmt.Errorf("%w: rejoin: %w", ErrMalformed, err)
	}
	if err := r.check(); err != nil {
		return nil, fmt.Errorf("%w: rejoin: %w", ErrMalformed, err)
	}
	return r, nil
}

// Proves reports whether it is the destination of the migration id that has said this, in this meeting.
func (r *Rejoin) Proves(id string, m Meeting) bool {
	return proves(r.proof, id, RoleDestination, m, r.said)
}
