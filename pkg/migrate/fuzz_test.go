package migrate

import (
	"bytes"
	"context"
	"io"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/zeebo/xxh3"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/wire"
)

// staged is canned whose peer says the rest when it hears that the guest is prepared, as a source would.
type staged struct {
	*canned
	prepared chan struct{}
	once     sync.Once
}

func newStaged(start, first, rest []byte) *staged {
	s := &staged{canned: newCanned(start, nil), prepared: make(chan struct{})}
	s.canned.rest = io.MultiReader(bytes.NewReader(first), gated{s.prepared}, bytes.NewReader(rest))
	return s
}

func (s *staged) Write(p []byte) (int, error) {
	switch wire.Type(p[0]) {
	case wire.TypePrepared, wire.TypeAbort, wire.TypeBye:
		s.once.Do(func() { close(s.prepared) })
	}
	return s.canned.Write(p)
}

func (s *staged) Close() error {
	s.once.Do(func() { close(s.prepared) })
	return s.canned.Close()
}

// gated is empty, which is known only when something has happened, or does not happen for a while.
type gated struct{ ch <-chan struct{} }

func (g gated) Read([]byte) (int, error) {
	select {
	case <-g.ch:
	case <-time.After(20 * time.Millisecond):
	}
	return 0, io.EOF
}

// FuzzLateDestination is FuzzDestination for version 2, with a target that may run before all is there: it must end, run only
// after a record, keep its promises about what is missing, and hold no more than its devices and buffers.
func FuzzLateDestination(f *testing.F) {
	preface := wire.Preface{Newest: 2, Oldest: 1, Role: wire.RoleSource, Streams: 1}.Append(nil)
	m := &wire.Manifest{ID: "fuzz", Window: wire.MinWindow, Devices: []wire.Device{{Name: "memory", Size: 1 << 20}, {Name: "disk", Size: 5000}}}
	payload, err := m.Encode()
	if err != nil {
		f.Fatal(err)
	}
	start := wire.Append(preface, wire.Header{Type: wire.TypeManifest}, payload)
	var none xxh3.Hasher128
	empty := func(total int64, state bool) []byte {
		s := &wire.Summary{Devices: []wire.Part{{Total: total, Digest: newDigest(1 << 20).sum()}, {Digest: newDigest(5000).sum()}}}
		if state {
			s.State.Digest = stateHash(&none)
		}
		return s.Encode()
	}
	// Each frame is made of 6 bytes of the input: type, flags, device, page, pages, content.
	types := []wire.Type{wire.TypeData, wire.TypeZero, wire.TypeState, wire.TypeMissing, wire.TypeFinal, wire.TypeCommit, wire.TypeServed,
		wire.TypeCopied, wire.TypeRoundEnd, wire.TypeBye, wire.TypeDemand, wire.TypeSettled, wire.TypeSeek, wire.TypeRejoin, wire.TypeServe, wire.TypeAbort}
	frames := func(in []byte) (first, rest []byte) {
		out := &first
		for ; len(in) >= 6; in = in[6:] {
			h := wire.Header{Type: types[int(in[0])%len(types)], Flags: in[1] & 1, Device: uint16(in[2] % 3), Offset: uint64(in[3]) * wire.PageSize}
			n := int64(in[4])
			var p []byte
			switch h.Type {
			case wire.TypeData:
				p = make([]byte, min(n*wire.PageSize, wire.MaxPayload))
				fill(p, uint64(in[5]))
			case wire.TypeZero:
				var b [wire.ZeroFrameSize]byte
				wire.PutZero(b[:], 0, 0, n*wire.PageSize)
				p = b[wire.HeaderSize:]
			case wire.TypeMissing:
				p = []byte{in[4], in[5]}[:in[1]>>1%3]
			case wire.TypeFinal:
				h, p = wire.Header{Type: h.Type}, empty(n*24, true)
			case wire.TypeServed, wire.TypeSettled:
				h, p = wire.Header{Type: h.Type}, empty(n*24, false)
			case wire.TypeState:
				h.Offset, h.Device, p = 0, 0, make([]byte, n)
			case wire.TypeRoundEnd:
				p = make([]byte, 4)
			case wire.TypeDemand:
				p = make([]byte, 8)
			case wire.TypeSeek:
				p = []byte("fuzz")
			default:
				h.Offset, h.Device, h.Flags = 0, 0, 0
			}
			if frame := wire.Append(nil, h, p); h.Type == wire.TypeData || h.Type == wire.TypeZero {
				var check [wire.CheckFrameSize]byte
				wire.PutCheck(check[:], frame)
				check[wire.CheckFrameSize-1] ^= in[1] >> 7 // damaged
				if in[1]&0x40 == 0 {
					*out = append(*out, check[:]...)
				}
			}
			*out = wire.Append(*out, h, p)
			if h.Type == wire.TypeFinal {
				out = &rest
			}
		}
		return first, rest
	}
	// A whole post-copy: one page of zeros is missing, and comes late.
	f.Add([]byte{2, 1, 0, 0, 0, 0, 3, 3, 0, 0, 1, 0, 4, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 6, 0, 0, 0, 2, 0, 9, 0, 0, 0, 0, 0})
	f.Add([]byte{2, 1, 0, 0, 0, 0, 3, 3, 0, 0, 9, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 200, 1, 0})
	f.Fuzz(func(t *testing.T, in []byte) {
		r := newRig(nil)
		r.target.sizes = map[string]int64{"memory": 1 << 20, "disk": 5000}
		r.dest.MaxState = 10_000
		late := r.postCopy(1)
		late.loads, late.uses = 0, 0
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		first, rest := frames(in)
		rep, err := Receive(context.Background(), []io.ReadWriter{newStaged(start, first, rest)}, r.dest)
		runtime.ReadMemStats(&after)
		ran := r.target.runs == 1
		t.Log(rep)
		if ran && r.dst.commits != 1 || !ran && err == nil {
			t.Errorf("ran: %t, %d records: %v", ran, r.dst.commits, err)
		}
		if err == nil && late.postpones > 0 {
			for _, l := range late.late {
				if l == nil {
					continue
				}
				if missing, err := l.NextMissing(0); err == nil || late.completes != 1 {
					t.Errorf("settled with %v missing, completed %d times", missing, late.completes)
				}
			}
		}
		if want := map[bool]int{true: 0, false: 1}[ran]; r.target.devices != nil && r.target.discards != want {
			t.Errorf("ran: %t, discarded %d times, %v", ran, r.target.discards, rep)
		}
		if grown := after.TotalAlloc - before.TotalAlloc; grown > 32<<20+10*uint64(len(in))*wire.MaxPayload/6 {
			t.Errorf("allocated %d bytes for %d received", grown, len(in))
		}
	})
}

// FuzzDemands has a destination demand whatever it likes of a source that serves: nothing but what is missing is sent, at most
// twice, and what waits is bounded.
func FuzzDemands(f *testing.F) {
	f.Add([]byte{0, 0, 1, 0, 0, 1, 0, 5, 200, 1, 0, 1})
	mem := block.NewMemory(1 << 20)
	p := make([]byte, 1<<20)
	fill(p, 1)
	if _, err := mem.WriteAt(p, 0); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		if len(in) > 3000 {
			return
		}
		s := &source{window: newWindow(1<<40, 2)}
		ctx, cancel := context.WithCancelCause(context.Background())
		defer cancel(nil)
		s.link = &link{ctx: ctx, fail: cancel, streams: []*stream{{urgent: make(chan *wire.Buffer)}}}
		for i := range 2 {
			s.devices = append(s.devices, &sourceDevice{SourceDevice: SourceDevice{Name: "memory", Device: mem}, index: i, size: 1 << 20, digest: newDigest(1 << 20)})
		}
		v := s.newServing([][]block.Range{{{Offset: 0, Length: 512 << 10}}, nil})
		var sent int64
		done := make(chan struct{})
		go func() {
			defer close(done)
			for b := range s.link.streams[0].urgent {
				sent += int64(b.N)
				b.Release()
			}
		}()
		v.start()
		for ; len(in) >= 3; in = in[3:] {
			r := block.Range{Offset: int64(in[1]) * 4096, Length: int64(in[2]) * 4096}
			if in[0]&4 != 0 {
				r.Offset++
			}
			err := s.demanded(s.serving.Load(), int(in[0]%3), r)
			if bad := in[0]%3 != 0 || r.Offset%4096 != 0 || r.End() > 1<<20; bad != (err != nil) {
				t.Errorf("demand %v of device %d: %v", r, in[0]%3, err)
			}
		}
		v.stop()
		close(s.link.streams[0].urgent)
		<-done
		if sent > 2*(512<<10)+2*129*wire.HeaderSize*17 {
			t.Errorf("sent %d bytes", sent)
		}
	})
}
