package migrate

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"testing"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/wire"
)

// testdata/v1.source and v1.destination are what the two sides of goldenRig's migration said, recorded from the release that
// spoke version 1 only. They never change: a release that speaks version n gets along with the streams of n−1.

// goldenRig is the migration that testdata/v1.* records: two devices, one of them written to between rounds.
func goldenRig() *rig {
	r := newRig([]shape{{"disk", 20_000, 0.5, false, Policy{}}})
	mem := block.NewMemory(64 << 10)
	for _, off := range []int64{0, 8192, 12288, 40960} {
		p := make([]byte, 4096)
		fill(p, uint64(off)+1)
		if _, err := mem.WriteAt(p, off); err != nil {
			panic(err)
		}
	}
	lists := [][]block.Range{{{Offset: 8192, Length: 8192}, {Offset: 20480, Length: 4096}}, {{Offset: 8192, Length: 4096}}, {{Offset: 40960, Length: 4096}}}
	r.source.Devices = append(r.source.Devices, SourceDevice{Name: "memory", Device: mem, Tracker: &scripted{lists}, Policy: Policy{MaxDirtyBlocks: 2, MaxCycles: 2}})
	r.target.sizes["memory"] = 64 << 10
	r.guest.state = r.guest.state[:1000]
	r.source.ID, r.source.Concurrency = "golden", 1
	return r
}

// replay plays one side of a conversation as it was recorded, each frame when it was due: after the other side's frame that
// it answers. It returns what the other side said.
func replay(t *testing.T, name string, conn net.Conn) []message {
	t.Helper()
	recorded, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	due := map[wire.Type]wire.Type{ // a recorded frame: what must have been heard before
		wire.TypeAccept: wire.TypeManifest, wire.TypePrepared: wire.TypeFinal, wire.TypeRunning: wire.TypeCommit,
		wire.TypeData: wire.TypeAccept, wire.TypeZero: wire.TypeAccept, wire.TypeCommit: wire.TypePrepared, wire.TypeBye: wire.TypeRunning,
	}
	var mu sync.Mutex // guards what follows
	changed := sync.NewCond(&mu)
	heard, ended := map[wire.Type]bool{}, false
	totals := map[uint16]uint64{}
	var said []message
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := wire.ReadPreface(conn); err != nil {
			t.Errorf("preface: %v", err)
		}
		in := wire.NewReader(conn)
		for {
			h, err := in.Next()
			p := make([]byte, h.Length)
			if err == nil {
				err = in.Payload(p)
			}
			mu.Lock()
			if err == nil {
				heard[h.Type] = true
				said = append(said, message{h, p})
				if h.Type == wire.TypeData || h.Type == wire.TypeZero {
					totals[h.Device] += wire.HeaderSize + uint64(h.Length)
				}
			} else {
				ended = true
			}
			changed.Broadcast()
			mu.Unlock()
			if err != nil {
				return
			}
		}
	})
	if _, err := conn.Write(recorded[:wire.PrefaceSize]); err != nil {
		t.Errorf("write: %v", err)
	}
	out := wire.NewReader(bytes.NewReader(recorded[wire.PrefaceSize:]))
	for {
		h, err := out.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		p := make([]byte, h.Length)
		if err := out.Payload(p); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		mu.Lock()
		for !ended && (due[h.Type] != 0 && !heard[due[h.Type]] && !(h.Type == wire.TypeBye && name == "v1.destination" && heard[wire.TypeBye]) ||
			h.Type == wire.TypeAck && totals[h.Device] < h.Offset) {
			changed.Wait()
		}
		mu.Unlock()
		if _, err := conn.Write(wire.Append(nil, h, p)); err != nil {
			t.Errorf("write %v: %v", h.Type, err)
			break
		}
	}
	wg.Wait()
	conn.Close()
	return said
}

func TestRecordedVersion1(t *testing.T) {
	noLeak(t)
	t.Run("source", func(t *testing.T) {
		r := goldenRig()
		r.target.world = &world{}
		a, b := net.Pipe()
		done := make(chan error, 1)
		var rep *Report
		go func() {
			var err error
			rep, err = Receive(context.Background(), []io.ReadWriter{b}, r.dest)
			done <- err
		}()
		said := replay(t, "v1.source", a)
		if err := <-done; err != nil || rep.Outcome != "running" {
			t.Fatalf("%v: %v", rep, err)
		}
		r.verifyContent(t)
		for _, m := range said {
			if err := m.Check(1); err != nil {
				t.Errorf("we said: %v", err)
			}
		}
	})
	for _, others := range []string{"silent", "closed"} {
		t.Run("source of three streams dialed, "+others, func(t *testing.T) {
			r := goldenRig()
			r.target.world = &world{}
			var near []net.Conn
			var far []io.ReadWriter
			for range 3 {
				a, b := net.Pipe()
				near, far = append(near, a), append(far, b)
			}
			for _, i := range []int{0, 2} {
				if others == "closed" {
					near[i].Close()
				}
			}
			done := make(chan error, 1)
			var rep *Report
			go func() {
				var err error
				rep, err = Receive(context.Background(), far, r.dest)
				done <- err
			}()
			replay(t, "v1.source", near[1])
			if err := <-done; err != nil || rep.Outcome != "running" || rep.Streams != 1 {
				t.Fatalf("%v: %v", rep, err)
			}
			r.verifyContent(t)
			for _, i := range []int{0, 2} {
				if _, err := near[i].Read(make([]byte, 100)); err == nil && others == "silent" {
					_, err = near[i].Read(make([]byte, 100))
					if err == nil {
						t.Errorf("stream %d was not closed", i)
					}
				}
			}
		})
	}
	t.Run("destination", func(t *testing.T) {
		r := goldenRig()
		r.guest.run()
		r.source.Goal.PostCopy = true // of which nothing comes
		r.source.Devices[0].Policy = Policy{MaxDirtyBlocks: 1 << 20}
		a, b := net.Pipe()
		done := make(chan error, 1)
		var rep *Report
		go func() {
			var err error
			rep, err = Send(context.Background(), []io.ReadWriter{a}, r.source)
			done <- err
		}()
		said := replay(t, "v1.destination", b)
		if err := <-done; err != nil || rep.Outcome != "moved" {
			t.Fatalf("%v: %v", rep, err)
		}
		for _, m := range said {
			if err := m.Check(1); err != nil {
				t.Errorf("we said: %v", err)
			}
		}
	})
}

// Each side with a peer that speaks an older version: pre-copy, and the promises of that version.
func TestOlderPeer(t *testing.T) {
	noLeak(t)
	for _, who := range []string{"source", "destination"} {
		for _, streams := range []int{1, 3} {
			t.Run(fmt.Sprintf("%s,streams=%d", who, streams), func(t *testing.T) {
				r := newRig(smallShape)
				r.guest.busy = true
				late := r.postCopy(1)
				if who == "source" {
					r.source.newest = 1
				} else {
					r.dest.newest = 1
				}
				x := newExchange(streams, nil)
				r.connect(x)
				a, b := x.pair()
				o := r.move(t.Context(), a, b)
				if got := r.verify(t, o); got != "destination" {
					t.Errorf("guest is at the %s: %v; %v", got, o.srcErr, o.dstErr)
				}
				if late.postpones != 0 || o.src.LateBytes != 0 {
					t.Errorf("%d bytes were postponed", o.src.LateBytes)
				}
			})
		}
	}
	t.Run("cut", func(t *testing.T) {
		r := newRig(smallShape)
		r.dest.newest = 1
		x := newExchange(1, nil)
		r.connect(x)
		a, b := x.pair()
		r.dest.OnState = func(s DestinationState) {
			if s == DestinationCommitting {
				interruptAll(b)
			}
		}
		r.verifyEnd(t, r.move(t.Context(), a, b), "in-doubt", "running")
	})
}
