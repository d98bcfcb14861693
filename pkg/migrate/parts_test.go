package migrate

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/zeebo/xxh3"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/wire"
)

func TestPolicy(t *testing.T) {
	// rounds makes a history; each takes 100 ms, and a block has 4096 bytes.
	rounds := func(blocks ...int64) (out []Round) {
		for i, n := range blocks {
			out = append(out, Round{Index: i, Blocks: n, Bytes: n * 4096, Duration: Millis(100 * time.Millisecond)})
		}
		return out
	}
	for _, tc := range []struct {
		name   string
		policy Policy
		sent   []Round
		dirty  int64
		want   Verdict
	}{
		{"zero policy", Policy{}, rounds(1000), 500, Verdict{true, "0 cycles are the maximum"}},
		{"zero policy, clean", Policy{}, rounds(1000), 0, Verdict{true, "nothing is dirty"}},
		{"no history", Policy{}, nil, 5, Verdict{true, "0 cycles are the maximum"}},
		{"clean, minimum not reached", Policy{MinCycles: 5, MaxCycles: 20}, rounds(1000), 0, Verdict{true, "nothing is dirty"}},
		{"too dirty", Policy{MaxDirtyBlocks: 10, MaxCycles: 5}, rounds(1000, 20), 11, Verdict{false, "11 dirty blocks are more than 10"}},
		{"few enough", Policy{MaxDirtyBlocks: 10, MaxCycles: 5}, rounds(1000, 20), 10, Verdict{true, "10 dirty blocks are at most 10"}},
		{"few enough at once", Policy{MaxDirtyBlocks: 10, MaxCycles: 5}, rounds(1000), 10, Verdict{true, "10 dirty blocks are at most 10"}},
		{"minimum not reached", Policy{MaxDirtyBlocks: 10, MinCycles: 2, MaxCycles: 5}, rounds(1000, 9), 8, Verdict{false, "1 of 2 quiet cycles done"}},
		{"minimum reached", Policy{MaxDirtyBlocks: 10, MinCycles: 2, MaxCycles: 5}, rounds(1000, 9, 8), 8, Verdict{true, "8 dirty blocks are at most 10"}},
		{"a loud cycle starts the count again", Policy{MaxDirtyBlocks: 10, MinCycles: 2, MaxCycles: 9}, rounds(1000, 9, 50, 8), 8, Verdict{false, "1 of 2 quiet cycles done"}},
		{"maximum reached", Policy{MaxDirtyBlocks: 10, MinCycles: 2, MaxCycles: 3}, rounds(1000, 90, 90, 90), 90, Verdict{true, "3 cycles are the maximum"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := tc.policy.Decide(tc.sent, Dirty{tc.dirty, tc.dirty * 4096}); got != tc.want {
				t.Errorf("got %+v, want %+v", got, tc.want)
			}
		})
	}
}

// scripted is a tracker that reports what a list says, one entry for each Collect.
type scripted struct{ lists [][]block.Range }

func (s *scripted) Start(context.Context) error { return nil }
func (s *scripted) Stop() error                 { return nil }
func (s *scripted) Collect(context.Context) (out []block.Range, _ error) {
	if len(s.lists) > 0 {
		out, s.lists = s.lists[0], s.lists[1:]
	}
	return out, nil
}

// The cycles of a migration are those the policies ask for, with the throttle between them.
func TestCycles(t *testing.T) {
	page := func(n int64) block.Range { return block.Range{Offset: n * 4096, Length: 4096} }
	synctest.Test(t, func(t *testing.T) {
		r := newRig(nil)
		add := func(name string, p Policy, lists ...[]block.Range) {
			r.source.Devices = append(r.source.Devices, SourceDevice{Name: name, Device: block.NewMemory(1 << 20), Policy: p, Tracker: &scripted{lists}})
			r.target.sizes[name] = 1 << 20
		}
		add("memory", Policy{MaxDirtyBlocks: 1, MaxCycles: 5, CycleThrottle: 10 * time.Second},
			[]block.Range{page(1), page(3)},            // too many: a cycle
			[]block.Range{page(5), page(7)},            // written during the throttle
			[]block.Range{page(9), page(11), page(13)}, // too many: another cycle
			nil,
			[]block.Range{page(2)},          // few enough
			[]block.Range{page(4), page(6)}, // while getting ready for the pause: too many, once more
			[]block.Range{page(8)})          // while pausing
		add("disk", Policy{CycleThrottle: time.Hour}, []block.Range{page(7)}, []block.Range{page(8)}, []block.Range{page(7)}, nil, nil)
		a, b := pipes(1)
		began := time.Now()
		o := r.move(t.Context(), a, b)
		if o.srcErr != nil || o.dstErr != nil {
			t.Fatal(o.srcErr, o.dstErr)
		}
		if spent := time.Since(began); spent < 20*time.Second || spent > 21*time.Second {
			t.Errorf("took %v", spent)
		}
		got := map[string][]int64{}
		for _, x := range o.src.Rounds {
			got[x.Device] = append(got[x.Device], x.Blocks)
		}
		want := map[string][]int64{"memory": {0, 4, 3, 3, 1}, "disk": {0, 2}}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("blocks of rounds %v, want %v", got, want)
		}
		if !strings.Contains(o.src.Reasons["memory"], "1 dirty blocks are at most 1") {
			t.Errorf("reasons %v", o.src.Reasons)
		}
		js, err := json.Marshal(o.src)
		if err != nil {
			t.Fatal(err)
		}
		var back Report
		if err := json.Unmarshal(js, &back); err != nil || back.Outcome != "moved" || len(back.Rounds) != 7 {
			t.Errorf("%s: %v", js, err)
		}
	})
}

// Ranges against a bitmap of bytes.
func TestRanges(t *testing.T) {
	const size = 200
	r := rand.New(rand.NewPCG(5, 6))
	list := func() (out []block.Range, set [size]bool) {
		for off := int64(r.IntN(20)); off < size; {
			n := min(1+int64(r.IntN(20)), size-off)
			out = append(out, block.Range{Offset: off, Length: n})
			for i := off; i < off+n; i++ {
				set[i] = true
			}
			off += n + int64(r.IntN(20))
		}
		return out, set
	}
	bits := func(t *testing.T, l []block.Range) (set [size]bool) {
		t.Helper()
		end := int64(-1)
		for _, x := range l {
			if x.Offset < end || x.Length <= 0 {
				t.Fatalf("list %v is not in order", l)
			}
			end = x.End()
			for i := x.Offset; i < end; i++ {
				set[i] = true
			}
		}
		return set
	}
	for range 500 {
		a, as := list()
		b, bs := list()
		u := bits(t, union(slices.Clone(a), slices.Clone(b)))
		outside, inside := split(a, b)
		o, in := bits(t, outside), bits(t, inside)
		blocks := map[int64]bool{}
		for i := range size {
			if u[i] != (as[i] || bs[i]) || o[i] != (as[i] && !bs[i]) || in[i] != (as[i] && bs[i]) {
				t.Fatalf("%v and %v at %d", a, b, i)
			}
			if as[i] {
				blocks[int64(i)/16] = true
			}
		}
		if d := measure(a, 16); d.Blocks != int64(len(blocks)) {
			t.Fatalf("%v has %d blocks, counted %d", a, len(blocks), d.Blocks)
		}
	}
	got := normalize([]block.Range{{Offset: 100, Length: 5}, {Offset: 5000, Length: 5000}, {Offset: 20479, Length: 1}, {Offset: 40000, Length: 100}}, 40050)
	if want := []block.Range{{Offset: 0, Length: 12288}, {Offset: 16384, Length: 4096}, {Offset: 36864, Length: 3186}}; !slices.Equal(got, want) {
		t.Errorf("normalized %v, want %v", got, want)
	}
}

// What a digest costs is bounded by what comes, also of pages that lie far from each other in a device of any size.
func TestDigestSparse(t *testing.T) {
	const pages, apart = 1000, chunkPages * block.PageSize
	d := newDigest(pages * apart)
	data := bytes.Repeat([]byte{1}, block.PageSize)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for n := range int64(pages) {
		d.write(n*apart, data)
	}
	runtime.ReadMemStats(&after)
	if each := (after.TotalAlloc - before.TotalAlloc) / pages; each > 5<<10 {
		t.Errorf("a page that lies alone costs %d bytes", each)
	}
	for n := range int64(pages) {
		if d.isZero(n*apart, block.PageSize) || !d.isZero(n*apart+block.PageSize, apart-block.PageSize) {
			t.Fatalf("what is noted around %d is something else", n*apart)
		}
	}
}

// The running digest is the one block finds by reading everything.
func TestDigest(t *testing.T) {
	for _, size := range []int64{0, 1, 4096, 100_000, chunkPages*block.PageSize + 5000} {
		mem := block.NewMemory(size)
		d := newDigest(size)
		r := rand.New(rand.NewPCG(1, uint64(size)))
		pages := (size + block.PageSize - 1) / block.PageSize
		for range 200 {
			if size == 0 {
				break
			}
			off := r.Int64N(pages) * block.PageSize
			n := min(size-off, block.PageSize*(1+r.Int64N(20)))
			if r.IntN(3) == 0 {
				d.zero(off, n)
				if !d.isZero(off, n) {
					t.Errorf("zeros are not zero")
				}
				if err := mem.Discard(off, n); err != nil {
					t.Fatal(err)
				}
				continue
			}
			p := make([]byte, n)
			if r.IntN(4) > 0 {
				fill(p, r.Uint64())
			}
			d.write(off, p)
			if _, err := mem.WriteAt(p, off); err != nil {
				t.Fatal(err)
			}
		}
		want, err := block.Digest(t.Context(), mem)
		if err != nil {
			t.Fatal(err)
		}
		if got := d.sum(); got != want {
			t.Errorf("size %d: digest %x, content has %x", size, got, want)
		}
	}
}

func TestWindow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWindow(100, 2)
		if err := w.acquire(0, 60); err != nil {
			t.Fatal(err)
		}
		got := make(chan error)
		go func() { got <- w.acquire(1, 60) }()
		synctest.Wait()
		select {
		case <-got:
			t.Fatal("window overrun")
		default:
		}
		for _, bad := range []int64{61, -1} {
			if err := w.ack(0, bad); !errors.Is(err, wire.ErrMalformed) {
				t.Errorf("ack of %d: %v", bad, err)
			}
		}
		if err := w.ack(2, 0); !errors.Is(err, wire.ErrMalformed) {
			t.Errorf("ack of an unknown device: %v", err)
		}
		if err := w.ack(0, 20); err != nil {
			t.Fatal(err)
		}
		if err := <-got; err != nil {
			t.Fatal(err)
		}
		go func() { got <- w.drained(0) }()
		synctest.Wait()
		w.fail(io.EOF)
		if err := <-got; err != io.EOF {
			t.Errorf("drained: %v", err)
		}
		if err := w.acquire(0, 1); err != io.EOF {
			t.Errorf("acquire after failure: %v", err)
		}
	})
}

// The packer allocates nothing, and what it makes of a page does not depend on its neighbours.
func TestPackAllocatesNothing(t *testing.T) {
	mem := block.NewMemory(1 << 20)
	p := make([]byte, 8192)
	for off := int64(0); off < 1<<20; off += 1 << 14 {
		fill(p, uint64(off))
		mem.WriteAt(p, off)
	}
	s := &source{window: newWindow(1<<40, 1)}
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	s.link = &link{ctx: ctx, bulk: make(chan *wire.Buffer, 100)}
	d := &sourceDevice{SourceDevice: SourceDevice{Name: "memory", Device: mem}, size: 1 << 20, digest: newDigest(1 << 20)}
	j := job{device: d, n: 2}
	j.ranges[0] = block.Range{Offset: 4096, Length: 200 << 10}
	j.ranges[1] = block.Range{Offset: 800 << 10, Length: 8192}
	n := testing.AllocsPerRun(200, func() {
		if err := s.pack(&j); err != nil {
			t.Fatal(err)
		}
		for len(s.link.bulk) > 0 {
			(<-s.link.bulk).Release()
		}
	})
	if n > 0.5 { // the pool may be emptied by a collection
		t.Errorf("%v allocations per job", n)
	}
}

// canned is a stream whose peer says what it was going to say: start at once, rest when it was accepted. Then it waits a
// moment for the end, and is gone.
type canned struct {
	start, rest     io.Reader
	accepted, ended chan struct{}
	once            [2]sync.Once
}

func newCanned(start, rest []byte) *canned {
	return &canned{start: bytes.NewReader(start), rest: bytes.NewReader(rest), accepted: make(chan struct{}), ended: make(chan struct{})}
}

func (c *canned) Read(p []byte) (int, error) {
	if n, err := c.start.Read(p); err == nil {
		return n, nil
	}
	<-c.accepted
	if n, err := c.rest.Read(p); err == nil {
		return n, nil
	}
	select {
	case <-c.ended:
	case <-time.After(20 * time.Millisecond):
	}
	return 0, io.EOF
}

func (c *canned) Write(p []byte) (int, error) {
	switch wire.Type(p[0]) {
	case wire.TypeAccept:
		c.once[0].Do(func() { close(c.accepted) })
	case wire.TypeAbort, wire.TypeBye:
		c.Close()
	}
	return len(p), nil
}

func (c *canned) Close() error {
	c.once[0].Do(func() { close(c.accepted) })
	c.once[1].Do(func() { close(c.ended) })
	return nil
}

// FuzzDestination feeds a whole destination with the frames of a source gone mad. It must end, with the guest discarded
// unless a commit came in order, and hold no more than its devices and buffers.
func FuzzDestination(f *testing.F) {
	preface := wire.Preface{Newest: wire.Version, Oldest: 1, Role: wire.RoleSource, Streams: 1}.Append(nil)
	m := &wire.Manifest{ID: "fuzz", Window: wire.MinWindow, Devices: []wire.Device{{Name: "memory", Size: 1 << 20}, {Name: "disk", Size: 5000}}}
	payload, err := m.Encode()
	if err != nil {
		f.Fatal(err)
	}
	start := wire.Append(preface, wire.Header{Type: wire.TypeManifest}, payload)

	// Each frame is made of 8 bytes of the input: type, flags, device, page of the offset (2), kind of length, content (2).
	types := []wire.Type{wire.TypeData, wire.TypeZero, wire.TypeRoundEnd, wire.TypeState, wire.TypeFinal, wire.TypeCommit,
		wire.TypeHeartbeat, wire.TypeBye, wire.TypeAbort, wire.TypeManifest, wire.TypeAck, wire.TypeAccept, wire.TypeRunning, wire.TypePrepared, 0x40}
	frames := func(in []byte) (out []byte) {
		for ; len(in) >= 8; in = in[8:] {
			h := wire.Header{Type: types[int(in[0])%len(types)], Flags: in[1] & (3 | wire.FlagZstd), Device: uint16(in[2] % 3), Offset: uint64(in[3])<<8 | uint64(in[4])}
			var p []byte
			switch h.Type {
			case wire.TypeData:
				h.Offset *= 4096
				p = bytes.Repeat([]byte{in[6]}, []int{4096, 904, 8192, 65536, 1, 5000}[int(in[5])%6])
				if h.Flags&wire.FlagZstd != 0 && in[7]%4 != 0 {
					p = payloadOf(len(p), frameOf(f, p[:len(p)-int(in[7]%2)]))
				}
			case wire.TypeZero:
				var b [wire.ZeroFrameSize]byte
				wire.PutZero(b[:], 0, 0, int64(in[5])*4096+int64(in[6])*904)
				h.Offset, p = h.Offset*4096, b[wire.HeaderSize:]
			case wire.TypeRoundEnd:
				p = make([]byte, 4)
			case wire.TypeState:
				p = make([]byte, int(in[5])*100)
			case wire.TypeFinal, wire.TypePrepared:
				// Right for devices of zeros to which nothing was sent, and no device state, when in[6] is 0.
				var none xxh3.Hasher128
				p = (&wire.Summary{State: wire.Part{Digest: stateHash(&none)},
					Devices: []wire.Part{{Total: int64(in[6]), Digest: newDigest(1 << 20).sum()}, {Digest: newDigest(5000).sum()}}}).Encode()
			case wire.TypeAbort:
				p = wire.Abort{Code: wire.Code(in[6]), Reason: "x"}.Encode()
			case wire.TypeManifest:
				p = payload
			}
			if in[7] == 255 { // now and then a frame that is no frame
				p = in[:8]
			}
			out = wire.Append(out, h, p)
		}
		return out
	}
	f.Add([]byte{0, 0, 0, 0, 1, 0, 7, 0, 1, 0, 0, 0, 0, 9, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 3, 1, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0}, true)
	f.Add([]byte{3, 1, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0}, true) // a whole migration of nothing
	f.Add(wire.Append(nil, wire.Header{Type: wire.TypeData, Offset: 1 << 62, Length: 5}, []byte("hello")), false)
	f.Fuzz(func(t *testing.T, in []byte, shaped bool) {
		r := newRig(nil)
		r.target.sizes = map[string]int64{"memory": 1 << 20, "disk": 5000}
		r.dest.MaxState = 10_000
		if shaped {
			in = frames(in)
		}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := Receive(t.Context(), []io.ReadWriter{newCanned(start, in)}, r.dest)
		runtime.ReadMemStats(&after)
		ran := r.target.runs == 1
		if ran != (err == nil) || !ran && r.target.devices != nil && r.target.discards != 1 {
			t.Errorf("ran %d, discarded %d, error %v", r.target.runs, r.target.discards, err)
		}
		if ran && r.dst.commits != 1 {
			t.Errorf("ran without a record")
		}
		if grown := after.TotalAlloc - before.TotalAlloc; grown > 32<<20+10*uint64(len(in)) {
			t.Errorf("allocated %d bytes for %d received", grown, len(in))
		}
	})
}

// TestDatagramsRefused gives both sides a socket of datagrams.
func TestDatagramsRefused(t *testing.T) {
	for _, network := range []string{"udp", "unixgram", "unixpacket"} {
		t.Run(network, func(t *testing.T) {
			var conn io.ReadWriteCloser
			var err error
			switch network {
			case "udp":
				conn, err = net.Dial("udp", "127.0.0.1:9")
			case "unixgram":
				conn, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "s"), Net: "unixgram"})
			default:
				l, e := net.ListenUnix("unixpacket", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "s"), Net: "unixpacket"})
				if e != nil {
					t.Fatal(e)
				}
				defer l.Close()
				conn, err = net.DialUnix("unixpacket", nil, l.Addr().(*net.UnixAddr))
			}
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			_, sent := Send(t.Context(), []io.ReadWriter{conn}, SourceConfig{
				Devices: []SourceDevice{{Name: "disk", Device: block.NewMemory(4096)}}, Guest: struct{ Guest }{}})
			_, received := Receive(t.Context(), []io.ReadWriter{conn}, DestinationConfig{Target: struct{ Target }{}})
			for _, err := range []error{sent, received} {
				if err == nil || !strings.Contains(err.Error(), "quic://") || !strings.Contains(err.Error(), network) {
					t.Errorf("error %v, want one that names %s and quic://", err, network)
				}
			}
		})
	}
}
