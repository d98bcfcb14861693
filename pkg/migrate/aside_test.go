package migrate

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/pkg/block"
)

func TestAside(t *testing.T) {
	const size = 10*block.PageSize + 100
	dev := block.NewMemory(size)
	was := make([]byte, size)
	fill(was, 1)
	if _, err := dev.WriteAt(was, 0); err != nil {
		t.Fatal(err)
	}
	list := []block.Range{{Offset: 0, Length: block.PageSize}, {Offset: 2 * block.PageSize, Length: 3 * block.PageSize}, {Offset: 5 * block.PageSize, Length: block.PageSize}, {Offset: 10 * block.PageSize, Length: 100}}
	a, err := setAside(t.Context(), dev, list)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := dev.WriteAt(make([]byte, size), 0); err != nil { // the guest goes on
		t.Fatal(err)
	}
	for _, r := range []block.Range{{Offset: 0, Length: 4096}, {Offset: 2*4096 + 7, Length: 100}, {Offset: 3 * 4096, Length: 3 * 4096}, {Offset: 10*4096 + 1, Length: 99}} {
		p := make([]byte, r.Length)
		if n, err := a.ReadAt(p, r.Offset); err != nil || n != len(p) || !bytes.Equal(p, was[r.Offset:r.End()]) {
			t.Errorf("%d bytes at %d: read %d, %v", r.Length, r.Offset, n, err)
		}
	}
	if n, err := a.ReadAt(make([]byte, 200), 10*4096+50); n != 50 || err != io.EOF {
		t.Errorf("past the end: read %d, %v", n, err)
	}
	for _, r := range []block.Range{{Offset: 4096, Length: 1}, {Offset: 4000, Length: 200}, {Offset: 9 * 4096, Length: 4096}} {
		if _, err := a.ReadAt(make([]byte, r.Length), r.Offset); !errors.Is(err, errNotAside) {
			t.Errorf("%d bytes at %d, which were not put aside: %v", r.Length, r.Offset, err)
		}
	}
}

// A guest of which a copy is made goes on before what is left of it is sent, whatever the link; and the copy is of the moment at which
// it stood still.
func TestCopyGoesOn(t *testing.T) {
	noLeak(t)
	r := newRig(smallShape)
	r.copying()
	r.guest.busy, r.guest.pace = true, 10*time.Microsecond
	a, b := pipes(2)
	o := r.move(t.Context(), a, b)
	if got := r.verify(t, o); got != "source" || o.srcErr != nil {
		t.Fatalf("guest is at the %s: %v; %v", got, o.srcErr, o.dstErr)
	}
	var names []string
	for _, p := range o.src.Parts {
		names = append(names, p.Name)
	}
	if !slices.Contains(names, PartAside) || slices.Contains(names, PartTransfer) {
		t.Errorf("the pause was spent on %q", names)
	}
}
