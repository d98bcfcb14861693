package wire

import (
	"bytes"
	"encoding/hex"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

// decodeMissing decodes whole frames.
func decodeMissing(t testing.TB, b []byte) (out []Run, frames int) {
	t.Helper()
	r := NewReader(bytes.NewReader(b))
	for last := false; !last; frames++ {
		h, err := r.Next()
		if err != nil {
			t.Fatal(err)
		}
		p := make([]byte, h.Length)
		if err := r.Payload(p); err != nil {
			t.Fatal(err)
		}
		if err := DecodeMissing(h, p, func(r Run) error { out = append(out, r); return nil }); err != nil {
			t.Fatal(err)
		}
		last = h.Flags&FlagLast != 0
	}
	return out, frames
}

func TestMissing(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for _, n := range []int{0, 1, 2, 100, 50_000} {
		var runs []Run
		for at := int64(0); len(runs) < n; {
			at += 1 + r.Int64N(1<<uint(r.IntN(12)))
			pages := 1 + r.Int64N(1<<uint(r.IntN(12)))
			runs = append(runs, Run{at, pages})
			at += pages
		}
		b := missing(7, runs...)
		got, frames := decodeMissing(t, b)
		if !slices.Equal(got, runs) || frames > 1+len(b)/(MaxPayload-100) {
			t.Errorf("%d runs became %d, in %d frames of together %d bytes", len(runs), len(got), frames, len(b))
		}
	}
	for want, tc := range map[string]struct {
		h Header
		p []byte
	}{
		"does not begin":      {Header{Offset: 5}, []byte{1}},
		"begin with a page":   {Header{Offset: 4096}, nil},
		"run is no number":    {Header{}, []byte{0}},
		"a run is no":         {Header{}, []byte{0x81, 0}}, // not the shortest form
		"a gap is no number":  {Header{}, []byte{1, 0, 1}},
		"gap is no number of": {Header{}, []byte{1, 0x80}},
		"largest device":      {Header{Offset: MaxDeviceSize - PageSize}, []byte{2}},
	} {
		err := DecodeMissing(tc.h, tc.p, func(Run) error { return nil })
		if !errors.Is(err, ErrMalformed) || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v %x: error %v, want %q", tc.h, tc.p, err, want)
		}
	}
}

func TestLateLimits(t *testing.T) {
	if _, err := DecodeAccept([]byte(`{"postpone":[true]}`), 2); !errors.Is(err, ErrMalformed) {
		t.Errorf("accept of too few devices: %v", err)
	}
	if a, err := DecodeAccept(nil, 2); err != nil || a.Copy || a.Postpone != nil {
		t.Errorf("empty accept: %+v, %v", a, err)
	}
	if b, err := new(Accept).Encode(); err != nil || b != nil {
		t.Errorf("the least a destination says in version 1: %q, %v", b, err)
	}
	for want, doc := range map[string]string{
		"standing \"dances\"": `{"id":"a","standing":"dances"}`,
		"migration id":        `{"id":"../a","standing":"runs"}`,
		"named twice":         `{"id":"a","standing":"runs","devices":[{"name":"x","size":1},{"name":"x","size":1}]}`,
		"size -1":             `{"id":"a","standing":"runs","devices":[{"name":"x","size":-1}]}`,
	} {
		if _, err := DecodeRejoin(append(make([]byte, proofSize), doc...)); !errors.Is(err, ErrMalformed) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error %v, want %q", doc, err, want)
		}
	}
	if _, err := DecodeRejoin(make([]byte, proofSize-1)); !errors.Is(err, ErrMalformed) {
		t.Errorf("half a proof: %v", err)
	}
	for _, bad := range []string{"../x", "", "a.b", "a.xyz!"} {
		if _, err := DecodeSeek([]byte(bad)); !errors.Is(err, ErrMalformed) {
			t.Errorf("seek of %q: %v", bad, err)
		}
	}
	for _, h := range []Header{{Type: TypeMissing}, {Type: TypeServe}, {Type: TypeAccept, Length: 2}} {
		if err := h.Check(1); !errors.Is(err, ErrMalformed) {
			t.Errorf("%v in version 1: %v", h.Type, err)
		}
		if err := h.Check(2); err != nil {
			t.Errorf("%v in version 2: %v", h.Type, err)
		}
	}
}

// TestProof holds proofs to bytes, and to what they must not be good for.
func TestProof(t *testing.T) {
	const id = "VM1.SECRET"
	m := Meeting{Source: End{1, CapBound}, Destination: End{2, CapBound}, Channels: [][]byte{{3}, {4, 5}}}
	said := []byte("said")
	source, destination := prove(id, RoleSource, m, nil), prove(id, RoleDestination, m, said)
	for want, got := range map[string][]byte{"98738e3aab5149e3045a3333a28df87d": source, "ff3fc7418374cba56d37f17ae51ab189": destination} {
		if hex.EncodeToString(got) != want {
			t.Errorf("proof %x, want %s", got, want)
		}
	}
	if b := EncodeSeek(id, m); string(b) != "VM1."+hex.EncodeToString(source) {
		t.Errorf("seek %q", b)
	}
	if b := EncodeSeek("VM1", m); string(b) != "VM1" {
		t.Errorf("seek %q", b)
	}
	for _, id := range []string{id, "VM1"} {
		s, err := DecodeSeek(EncodeSeek(id, m))
		if err != nil || s.ID != "VM1" || !s.Proves(id, m) {
			t.Errorf("seek of %q: %+v, %v", id, s, err)
		}
		r, err := DecodeRejoin(must((&Rejoin{Standing: Runs}).Encode(id, m)))
		if err != nil || r.ID != "VM1" || !r.Proves(id, m) {
			t.Errorf("rejoin of %q: %+v, %v", id, r, err)
		}
	}
	for name, change := range map[string]func(*Meeting){
		"turned round":          func(m *Meeting) { m.Source, m.Destination = m.Destination, m.Source },
		"source's session":      func(m *Meeting) { m.Source.Session++ },
		"destination's session": func(m *Meeting) { m.Destination.Session++ },
		"capability":            func(m *Meeting) { m.Source.Capabilities = 0 },
		"destination's too":     func(m *Meeting) { m.Destination.Capabilities = 0 },
		"channel":               func(m *Meeting) { m.Channels = [][]byte{{3}, {4, 6}} },
		"channels' border":      func(m *Meeting) { m.Channels = [][]byte{{3, 4}, {5}} },
		"fewer channels":        func(m *Meeting) { m.Channels = [][]byte{{3}} },
		"no channel":            func(m *Meeting) { m.Channels = nil },
	} {
		other := m
		change(&other)
		if proves(source, id, RoleSource, other, nil) || proves(destination, id, RoleDestination, other, said) {
			t.Errorf("%s: what was proven in one meeting proves in another", name)
		}
	}
	for _, bad := range []bool{
		proves(source, id, RoleDestination, m, nil), proves(destination, id, RoleSource, m, said), proves(nil, id, RoleSource, m, nil),
		proves(make([]byte, proofSize), id, RoleSource, m, nil), proves(destination, id, RoleDestination, m, []byte("others")),
		proves(source, "VM1.OTHER", RoleSource, m, nil), proves(source, "VM1", RoleSource, m, nil),
	} {
		if bad {
			t.Error("what does not prove is taken")
		}
	}
	runs := must((&Rejoin{Standing: Runs}).Encode(id, m))
	never := bytes.Replace(runs, []byte(Runs), []byte(NeverRan), 1)
	if r, err := DecodeRejoin(never); err != nil || r.Standing != NeverRan || r.Proves(id, m) {
		t.Errorf("a standing that was changed on its way proves: %+v, %v", r, err)
	}
	if a, b := NewID(), NewID(); a == b || PublicID(a) == a || PublicID(a) == PublicID(b) || len(EncodeSeek(a, m)) > MaxName || CheckName(a) != nil {
		t.Errorf("ids %q, %q", a, b)
	}
}

func TestNegotiatePurpose(t *testing.T) {
	ours := Preface{Newest: 2, Oldest: 1, Role: RoleSource, Streams: 1, Purpose: PurposeRejoin}
	for want, theirs := range map[string]Preface{
		"":                     {Newest: 2, Oldest: 1, Role: RoleDestination, Purpose: PurposeRejoin},
		"with a new migration": {Newest: 2, Oldest: 1, Role: RoleDestination},
		"needs version 2":      {Newest: 1, Oldest: 1, Role: RoleDestination, Purpose: PurposeRejoin},
	} {
		if _, err := Negotiate(ours, theirs); (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, want %q", theirs, err, want)
		}
	}
	old := Preface{Newest: 1, Oldest: 1, Role: RoleDestination}.Append(nil)
	old[13] = 1 // what was to be ignored is
	if p, err := ReadPreface(bytes.NewReader(old)); err != nil || p.Purpose != PurposeMigrate {
		t.Errorf("%+v, %v", p, err)
	}
}

func FuzzLate(f *testing.F) {
	f.Add(missing(3, Run{5, 2}, Run{300, 1})[HeaderSize:], uint64(5*PageSize), 1)
	f.Add([]byte(`{"copy":true,"postpone":[true,false]}`), uint64(0), 2)
	f.Add([]byte(`0123456789abcdef{"id":"m1","standing":"runs","fresh":true,"devices":[{"name":"memory","size":4096,"missing":true}]}`), uint64(0), 0)
	f.Add([]byte("m1"), uint64(0), 0)
	f.Fuzz(func(t *testing.T, b []byte, offset uint64, n int) {
		if len(b) > MaxPayload {
			return
		}
		if h := (Header{Type: TypeMissing, Offset: offset, Length: uint32(len(b))}); h.check() == nil {
			var runs []Run
			if err := DecodeMissing(h, b, func(r Run) error { runs = append(runs, r); return nil }); err == nil {
				var again []byte
				if err := EncodeMissing(0, runs, func(_ Header, p []byte) error { again = append(again, p...); return nil }); err != nil || len(runs) < 1000 && !bytes.Equal(again, b) {
					t.Errorf("%x became %x, %v", b, again, err)
				}
			}
		}
		if a, err := DecodeAccept(b, n); err == nil {
			if _, err := a.Encode(); err != nil {
				t.Errorf("cannot encode what was decoded: %v", err)
			}
		}
		if r, err := DecodeRejoin(b); err == nil {
			if _, err := r.Encode(r.ID, Meeting{}); err != nil && len(b) < MaxPayload/8 {
				t.Errorf("cannot encode what was decoded: %v", err)
			}
		}
		if s, err := DecodeSeek(b); err == nil && CheckName(s.ID) != nil {
			t.Errorf("id %q", s.ID)
		}
		if v, err := ParseDemand(b); err == nil && v <= 0 {
			t.Errorf("demand of %d", v)
		}
	})
}
