package serve

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// begin serves Test/Do by f on one end of a connection, of which it returns the other, and what Conn has said.
func begin(t *testing.T, limits Limits, f func(context.Context, []byte) ([]byte, error)) (net.Conn, chan error) {
	t.Helper()
	server, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	server.RegisterService("Test", &ttrpc.ServiceDesc{Methods: map[string]ttrpc.Method{
		"Do": func(ctx context.Context, unmarshal func(any) error) (any, error) {
			in := new(wrapperspb.BytesValue)
			if err := unmarshal(in); err != nil {
				return nil, err
			}
			out, err := f(ctx, in.Value)
			return wrapperspb.Bytes(out), err
		},
	}})
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	client, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	said, ended := make(chan error, 1), make(chan struct{})
	go func() {
		said <- Conn(ctx, server, conn, limits)
		close(ended)
	}()
	t.Cleanup(func() {
		client.Close()
		cancel()
		<-ended
		server.Close()
	})
	return client, said
}

// frame is a message of ttrpc.
func frame(stream uint32, kind byte, payload []byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(payload)))
	b = binary.BigEndian.AppendUint32(b, stream)
	return append(append(b, kind, 0), payload...)
}

// request is a call of Test/Do.
func request(t *testing.T, stream uint32, size int) []byte {
	t.Helper()
	in, err := proto.Marshal(wrapperspb.Bytes(make([]byte, size)))
	if err != nil {
		t.Fatal(err)
	}
	b, err := proto.Marshal(&ttrpc.Request{Service: "Test", Method: "Do", Payload: in})
	if err != nil {
		t.Fatal(err)
	}
	return frame(stream, kindRequest, b)
}

// TestCallsWait has calls that are not answered yet: no more are taken than the limits allow, and all in the end.
func TestCallsWait(t *testing.T) {
	for _, tt := range []struct {
		name   string
		limits Limits
		size   int
		want   int64 // are executed
	}{
		{"calls", Limits{Calls: 3}, 10, 3},
		{"bytes", Limits{Bytes: 2 << 20}, 1 << 20, 2},
		{"one that is larger than all", Limits{Bytes: 1000}, 3 << 20, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			const all = 12
			var begun, returned atomic.Int64
			leave := make(chan struct{})
			client, _ := begin(t, tt.limits, func(ctx context.Context, in []byte) ([]byte, error) {
				begun.Add(1)
				<-leave
				returned.Add(1)
				return in, nil
			})
			var sending sync.WaitGroup
			sending.Go(func() {
				for n := range uint32(all) {
					if _, err := client.Write(request(t, 2*n+1, tt.size)); err != nil {
						t.Error(err)
						return
					}
				}
			})
			for deadline := time.Now().Add(10 * time.Second); begun.Load() < tt.want && time.Now().Before(deadline); {
				time.Sleep(time.Millisecond)
			}
			time.Sleep(100 * time.Millisecond) // for what must not come
			if got := begun.Load(); got != tt.want {
				t.Errorf("%d calls are executed, want %d", got, tt.want)
			}
			close(leave)
			for range all {
				var header [headerSize]byte
				if _, err := io.ReadFull(client, header[:]); err != nil {
					t.Fatal(err)
				}
				if _, err := io.CopyN(io.Discard, client, int64(binary.BigEndian.Uint32(header[:4]))); err != nil {
					t.Fatal(err)
				}
			}
			sending.Wait()
			if got := returned.Load(); got != all {
				t.Errorf("%d calls were executed, want %d", got, all)
			}
		})
	}
}

// TestUnread has a client that reads nothing: its connection is closed, which says so. One that reads slowly is served.
func TestUnread(t *testing.T) {
	answer := func(context.Context, []byte) ([]byte, error) { return make([]byte, 3<<20), nil }
	client, said := begin(t, Limits{Patience: 200 * time.Millisecond}, answer)
	if _, err := client.Write(request(t, 1, 1)); err != nil {
		t.Fatal(err)
	}
	for left := 3 << 20; left > 0; { // takes longer than the patience
		n, err := client.Read(make([]byte, 256<<10))
		if err != nil {
			t.Fatalf("who reads slowly is given up with %d bytes left: %v", left, err)
		}
		left -= n
		time.Sleep(30 * time.Millisecond)
	}
	if _, err := client.Write(request(t, 3, 1)); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-said:
		if err == nil || !strings.Contains(err.Error(), "has read nothing for 200ms") {
			t.Errorf("got %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Error("the connection of who does not read stays open")
	}
}

// TestFaults has what a client of ttrpc never sends: the connection ends.
func TestFaults(t *testing.T) {
	for _, tt := range []struct {
		name string
		send []byte
		want string
	}{
		{"data", append(request(t, 1, 1), frame(1, kindData, []byte("more"))...), "kind 3"},
		{"response", frame(1, kindResponse, nil), "kind 2"},
		{"even", request(t, 2, 1), "number 2"},
		{"again", append(request(t, 5, 1), request(t, 5, 1)...), "number 5 after 5"},
		{"back", append(request(t, 5, 1), request(t, 3, 1)...), "number 3 after 5"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			client, said := begin(t, Limits{}, func(context.Context, []byte) ([]byte, error) { return nil, nil })
			if _, err := client.Write(tt.send); err != nil {
				t.Fatal(err)
			}
			select {
			case err := <-said:
				if err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("got %v, want %q in it", err, tt.want)
				}
			case <-time.After(10 * time.Second):
				t.Error("the connection goes on")
			}
		})
	}
}

// TestTooLong has a request that is longer than ttrpc allows, which it answers itself, and calls go on.
func TestTooLong(t *testing.T) {
	client, _ := begin(t, Limits{Calls: 1, Bytes: 1}, func(context.Context, []byte) ([]byte, error) { return nil, nil })
	var sending sync.WaitGroup
	sending.Go(func() {
		client.Write(frame(1, kindRequest, make([]byte, 5<<20)))
		client.Write(request(t, 3, 1))
	})
	for _, want := range []uint32{1, 3} {
		var header [headerSize]byte
		if _, err := io.ReadFull(client, header[:]); err != nil {
			t.Fatal(err)
		}
		io.CopyN(io.Discard, client, int64(binary.BigEndian.Uint32(header[:4])))
		if got := binary.BigEndian.Uint32(header[4:8]); got != want {
			t.Errorf("call %d is answered, want %d", got, want)
		}
	}
	sending.Wait()
}
