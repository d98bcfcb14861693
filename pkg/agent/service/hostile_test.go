package service

import (
	"bufio"
	"context"
	"encoding/binary"
	"io"
	"net"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// hostile is a guest's connection on which it calls, past every client.
func (w *world) hostile() net.Conn {
	w.t.Helper()
	conn, err := w.dial(w.t.Context(), 9000)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { conn.Close() })
	if err := writeHello(conn, hello{Service: "test", Version: 1, Oldest: 1, Calls: true}); err != nil {
		w.t.Fatal(err)
	}
	if _, err := readHello(bufio.NewReaderSize(io.LimitReader(conn, maxHello), maxHello)); err != nil {
		w.t.Fatal(err)
	}
	return conn
}

// flood sends calls of Test/Do for as long as they are taken, up to n, and returns how many were. A call that is not taken for a second
// is not.
func (w *world) flood(conn net.Conn, n, size int) (taken int) {
	w.t.Helper()
	in, err := proto.Marshal(wrapperspb.Bytes(make([]byte, size)))
	if err != nil {
		w.t.Fatal(err)
	}
	call, err := proto.Marshal(&ttrpc.Request{Service: "test.v1.Test", Method: "Do", Payload: in})
	if err != nil {
		w.t.Fatal(err)
	}
	for ; taken < n; taken++ {
		head := binary.BigEndian.AppendUint32(nil, uint32(len(call)))
		head = append(binary.BigEndian.AppendUint32(head, uint32(2*taken+1)), 1, 0)
		conn.SetWriteDeadline(time.Now().Add(time.Second))
		if _, err := conn.Write(append(head, call...)); err != nil {
			return taken
		}
	}
	return taken
}

// TestUnreadAnswers has a guest that calls and reads no answer: neither what it asks for nor what it is refused grows the host.
func TestUnreadAnswers(t *testing.T) {
	type method = func(context.Context, string) (string, error)
	for _, tt := range []struct {
		name        string
		calls, size int
		do          method
		goroutines  int
		bytes       uint64
	}{
		{"echo", 1500, 1 << 20, func(_ context.Context, in string) (string, error) { return in, nil }, 100, 128 << 20},
		// With small requests, what is behind each counts: the socket takes some thousand of these before anybody reads them.
		{"refused", 30000, 1000, func(ctx context.Context, in string) (string, error) { <-ctx.Done(); return "", ctx.Err() }, 400, 128 << 20},
		{"large answers", 30000, 1000, func(context.Context, string) (string, error) { return string(make([]byte, 1<<20)), nil }, 400, 256 << 20},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t)
			w.host(answers(tt.do))
			conn := w.hostile()
			runtime.GC()
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			goroutines := runtime.NumGoroutine()
			taken := w.flood(conn, tt.calls, tt.size)
			if taken == tt.calls {
				t.Errorf("all of %d calls were taken", taken)
			}
			if got := runtime.NumGoroutine() - goroutines; got > tt.goroutines {
				t.Errorf("there are %d more goroutines after %d calls", got, taken)
			}
			runtime.GC()
			runtime.ReadMemStats(&after)
			if got := int64(after.HeapAlloc) - int64(before.HeapAlloc); got > int64(tt.bytes) {
				t.Errorf("there are %d MiB more in use after %d calls", got>>20, taken)
			}
			t.Logf("%d calls, %d goroutines, %d MiB", taken, runtime.NumGoroutine()-goroutines, (int64(after.HeapAlloc)-int64(before.HeapAlloc))>>20)
		})
	}
}

// TestManyCallsAtOnce has a client that reads, with more calls than are executed at a time: all are answered, and none is lost.
func TestManyCallsAtOnce(t *testing.T) {
	w := newWorld(t)
	w.host(answers(func(_ context.Context, in string) (string, error) { return in, nil }))
	g := w.guest(nil)
	var calls sync.WaitGroup
	for range 200 {
		calls.Go(func() {
			in, got := string(make([]byte, 200<<10)), ""
			if err := g.Call(t.Context(), ask(in, &got)); err != nil || got != in {
				t.Errorf("got %d bytes, %v", len(got), err)
			}
		})
	}
	calls.Wait()
}

// TestCallsLimit has one call more than Config.Calls: it is refused, not kept waiting.
func TestCallsLimit(t *testing.T) {
	w := newWorld(t)
	var begun sync.WaitGroup
	begun.Add(2)
	leave := make(chan struct{})
	w.host(func(c *Config) {
		c.Calls = 2
		answers(func(_ context.Context, in string) (string, error) {
			if in == "wait" {
				begun.Done()
				<-leave
			}
			return in, nil
		})(c)
	})
	g := w.guest(nil)
	var calls sync.WaitGroup
	for range 2 {
		calls.Go(func() {
			if err := g.Call(t.Context(), ask("wait", new(string))); err != nil {
				t.Error(err)
			}
		})
	}
	begun.Wait()
	if err := g.Call(t.Context(), ask("now", new(string))); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("got %v", err)
	}
	close(leave)
	calls.Wait()
	if err := g.Call(t.Context(), ask("now", new(string))); err != nil {
		t.Error(err)
	}
}
