package block_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/drafter-vm/drafter/pkg/block"
)

// TestLazyWaits reads a missing block: the read asks for it once, waits, and is woken by Fill.
func TestLazyWaits(t *testing.T) {
	asked := make(chan block.Range, 10)
	l := must[*block.Lazy](t)(block.NewLazy(block.NewMemory(1<<20), block.LazyOptions{
		Fetch: func(_ context.Context, r block.Range) error { asked <- r; return nil },
	}))
	defer l.Close()
	const readers = 5
	var wg sync.WaitGroup
	for range readers {
		wg.Go(func() {
			p := make([]byte, 100)
			if _, err := l.ReadAt(p, 8192+50); err != nil || !bytes.Equal(p, bytes.Repeat([]byte{7}, 100)) {
				t.Errorf("ReadAt: %x, %v", p[:4], err)
			}
		})
	}
	if r := <-asked; r != (block.Range{Offset: 8192, Length: 4096}) {
		t.Errorf("it asks for %+v", r)
	}
	if in := l.InFlight(); len(in) != 1 || in[0] != (block.Range{Offset: 8192, Length: 4096}) {
		t.Errorf("in flight is %v", in)
	}
	if err := l.Fill(8192, bytes.Repeat([]byte{7}, 4096)); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	select {
	case r := <-asked:
		t.Errorf("it asks again, for %+v", r)
	default:
	}
	if n := l.Missing(); n != 1<<20-4096 {
		t.Errorf("%d bytes are missing", n)
	}
}

// TestLazyKeepsNewer checks that Fill does not bring back what was overwritten, zeroed or discarded.
func TestLazyKeepsNewer(t *testing.T) {
	l := must[*block.Lazy](t)(block.NewLazy(block.NewMemory(64<<10), block.LazyOptions{}))
	defer l.Close()
	mustWrite(t, l, bytes.Repeat([]byte{1}, 8192), 4096)
	if err := l.Discard(16384, 4096); err != nil {
		t.Fatal(err)
	}
	if err := l.FillZero(20480, 4096); err != nil {
		t.Fatal(err)
	}
	if r, err := l.NextMissing(4096); err != nil || r != (block.Range{Offset: 12288, Length: 4096}) {
		t.Errorf("NextMissing is %+v, %v", r, err)
	}
	if err := l.Fill(0, bytes.Repeat([]byte{9}, 64<<10)); err != nil {
		t.Fatal(err)
	}
	if err := l.Wait(t.Context()); err != nil {
		t.Error(err)
	}
	want := bytes.Repeat([]byte{9}, 64<<10)
	copy(want[4096:], bytes.Repeat([]byte{1}, 8192))
	clear(want[16384:24576])
	got := make([]byte, 64<<10)
	if _, err := l.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("contents differ, %v", err)
	}
	if _, err := l.NextMissing(0); err != io.EOF {
		t.Errorf("NextMissing: %v, want io.EOF", err)
	}
}

// TestLazyErrors checks that an error of Fetch reaches those who wait, that the next read asks again, and that Fail and
// Close wake who waits.
func TestLazyErrors(t *testing.T) {
	gone := errors.New("the source is gone")
	fetches, broken := make(chan block.Range, 100), true
	var l *block.Lazy
	l = must[*block.Lazy](t)(block.NewLazy(block.NewMemory(1<<20), block.LazyOptions{
		Fetch: func(_ context.Context, r block.Range) error {
			fetches <- r
			if broken {
				return gone
			}
			if r.Offset == 0 {
				return l.Fill(r.Offset, make([]byte, r.Length))
			}
			return nil // never comes
		},
	}))
	if _, err := l.ReadAt(make([]byte, 10_000), 0); !errors.Is(err, gone) {
		t.Errorf("ReadAt: %v", err)
	}
	if _, err := l.WriteAt(make([]byte, 10), 10); !errors.Is(err, gone) {
		t.Errorf("WriteAt: %v", err)
	}
	if in := l.InFlight(); len(in) != 0 {
		t.Errorf("in flight is %v", in)
	}
	broken = false
	if _, err := l.ReadAt(make([]byte, 10), 0); err != nil {
		t.Errorf("ReadAt when the source is back: %v", err)
	}
	for len(fetches) > 0 {
		<-fetches
	}
	errs := make(chan error)
	wait := func() {
		_, err := l.ReadAt(make([]byte, 10), 500_000)
		errs <- err
	}
	go wait()
	<-fetches
	l.Fail(gone)
	if err := <-errs; !errors.Is(err, gone) {
		t.Errorf("ReadAt when Fail is called: %v", err)
	}
	go wait()
	<-fetches
	mustClose(t, l)
	if err := <-errs; !errors.Is(err, os.ErrClosed) {
		t.Errorf("ReadAt when Close is called: %v", err)
	}
	if err := l.Wait(context.Background()); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Wait after Close: %v", err)
	}
	if err := l.Fill(0, make([]byte, 4096)); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Fill after Close: %v", err)
	}
}

func TestLazyRefuses(t *testing.T) {
	for _, opts := range []block.LazyOptions{
		{BlockSize: 1000}, {Missing: []block.Range{{Offset: 1, Length: 4096}}}, {Missing: []block.Range{{Offset: 0, Length: 100}}}, {Missing: []block.Range{{Offset: 1 << 20, Length: 4096}}},
	} {
		if _, err := block.NewLazy(block.NewMemory(1<<20), opts); !errors.Is(err, os.ErrInvalid) {
			t.Errorf("NewLazy(%+v): %v", opts, err)
		}
	}
	l := must[*block.Lazy](t)(block.NewLazy(block.NewMemory(1<<20), block.LazyOptions{}))
	defer l.Close()
	for _, r := range []block.Range{{Offset: 1, Length: 4096}, {Offset: 0, Length: 4095}, {Offset: 1 << 20, Length: 4096}, {Offset: -4096, Length: 4096}, {Offset: 0, Length: 0}} {
		if err := l.Fill(r.Offset, make([]byte, r.Length)); err == nil {
			t.Errorf("Fill(%d, %d bytes) succeeded", r.Offset, r.Length)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := l.Wait(ctx); !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "1048576") {
		t.Errorf("Wait: %v", err)
	}
}
