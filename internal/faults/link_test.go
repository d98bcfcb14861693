package faults

import (
	"bytes"
	"errors"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/drafter-vm/drafter/pkg/wire"
)

// talk is what a source says in these tests: a preface and four frames.
func talk() (all []byte, ends []int) {
	all = wire.Preface{Newest: 2, Oldest: 1, Role: wire.RoleSource, Streams: 1}.Append(nil)
	ends = append(ends, len(all))
	for _, f := range []struct {
		t wire.Type
		n int
	}{{wire.TypeManifest, 100}, {wire.TypeHeartbeat, 0}, {wire.TypeData, 5000}, {wire.TypeCommit, 0}} {
		all = wire.Append(all, wire.Header{Type: f.t}, bytes.Repeat([]byte{7}, f.n))
		if f.t != wire.TypeHeartbeat {
			ends = append(ends, len(all))
		}
	}
	return all, ends
}

// TestLink says the same over links with a fault each, and looks at what arrives.
func TestLink(t *testing.T) {
	all, ends := talk()
	flipped := bytes.Clone(all)
	flipped[ends[1]] ^= 0x10
	for _, tt := range []struct {
		fault Fault
		want  []byte
		ends  bool // the receiver comes to the end of the stream
		other bool // and can still answer
	}{
		{Fault{Kind: Cut, At: Point{}}, nil, true, false},
		{Fault{Kind: Cut, At: Point{Frames: 1}}, all[:ends[0]], true, false},
		{Fault{Kind: Cut, At: Point{Frames: 3}}, all[:ends[2]], true, false},
		{Fault{Kind: Cut, At: Point{Bytes: 40}}, all[:40], true, false},
		{Fault{Kind: Cut, At: Point{Bytes: int64(ends[1]) + 3000}}, all[:ends[1]+3000], true, false},
		{Fault{Kind: Cut, At: Point{Before: wire.TypeCommit}}, all[:ends[2]], true, false},
		{Fault{Kind: Cut, Direction: ToSource, At: Point{Frames: 1}}, all, false, true},
		{Fault{Kind: Cut, Stream: 1, At: Point{Frames: 1}}, all, false, true},
		{Fault{Kind: Cut, Stream: AnyStream, At: Point{Frames: 1}}, all[:ends[0]], true, false},
		{Fault{Kind: Truncate, At: Point{Frames: 2}}, all[:ends[1]], true, true},
		{Fault{Kind: Stall, At: Point{Frames: 2}}, all[:ends[1]], false, true},
		{Fault{Kind: Delay, At: Point{Frames: 2}, Wait: time.Minute}, all[:ends[1]], false, true},
		{Fault{Kind: Throttle, At: Point{Bytes: 48}, Rate: 1}, all[:48], false, true},
		{Fault{Kind: Flip, At: Point{Frames: 2}}, nil, false, true}, // what follows is garbage, and may be no frame
	} {
		t.Run(tt.fault.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := NewLink(tt.fault)
				defer l.Close()
				a, b := l.Pipes(1)
				go a[0].Write(all)
				var got []byte
				ended, answered := false, false
				go func() {
					buf := make([]byte, 1000)
					for {
						n, err := b[0].Read(buf)
						got = append(got, buf[:n]...)
						if err != nil {
							ended = errors.Is(err, io.EOF) || errors.Is(err, io.ErrClosedPipe)
							return
						}
					}
				}()
				go func() {
					answer := make([]byte, 5)
					_, err := io.ReadFull(a[0], answer)
					answered = err == nil && string(answer) == "hello"
				}()
				time.Sleep(time.Second)
				synctest.Wait() // which, unlike the clock, orders what the others wrote before what is read here
				if tt.want != nil && !bytes.Equal(got, tt.want) || tt.want == nil && tt.fault.Kind == Cut && len(got) > 0 {
					t.Errorf("%d bytes arrived, want %d", len(got), len(tt.want))
				}
				if tt.fault.Kind == Flip && !bytes.HasPrefix(flipped, got) {
					t.Error("what arrived is not what was sent but for one bit")
				}
				go b[0].Write([]byte("hello"))
				time.Sleep(time.Second)
				synctest.Wait()
				if ended != tt.ends || answered != tt.other && tt.fault.Direction != ToSource {
					t.Errorf("ended %t, want %t; answered %t, want %t", ended, tt.ends, answered, tt.other)
				}
			})
		})
	}
}

// TestLinkReleases lets pass what a stall held.
func TestLinkReleases(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		all, ends := talk()
		reached := make(chan struct{})
		l := NewLink(Fault{Kind: Stall, At: Point{Before: wire.TypeCommit}, Reached: func() { close(reached) }})
		defer l.Close()
		a, b := l.Pipes(1)
		go a[0].Write(all)
		got := make([]byte, len(all))
		if _, err := io.ReadFull(b[0], got[:ends[2]]); err != nil {
			t.Fatal(err)
		}
		<-reached
		if p := l.Passed(ToDestination, 0); len(p.Frames) != 3 || p.Bytes != int64(ends[2]) {
			t.Errorf("%v passed, want %d bytes in 3 frames", p, ends[2])
		}
		l.Release()
		if _, err := io.ReadFull(b[0], got[ends[2]:]); err != nil || !bytes.Equal(got, all) {
			t.Errorf("what was held arrives as something else: %v", err)
		}
	})
}

// TestLinkListens puts a link between two TCP connections.
func TestLinkListens(t *testing.T) {
	all, ends := talk()
	source, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	l := NewLink(Fault{Kind: Cut, At: Point{Frames: 3}})
	defer l.Close()
	addr, err := l.Listen(source.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	for stream, want := range [][]byte{all[:ends[2]], all} { // the fault is of the first
		destination, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		conn, err := source.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Write(all); err != nil {
			t.Fatal(err)
		}
		if stream == 1 {
			conn.Close()
		}
		got, _ := io.ReadAll(destination) // it may end with a reset
		if !bytes.Equal(got, want) {
			t.Errorf("stream %d: %d bytes arrived, want %d", stream, len(got), len(want))
		}
		destination.Close()
		conn.Close()
	}
	l.Refuse(true)
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if n, err := conn.Read(make([]byte, 1)); err == nil {
		t.Errorf("a network that is down gave %d bytes", n)
	}
}
