package migrate

import (
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/wire"
)

// sharingTarget has the source's memory itself, which nobody writes to meanwhile but the source's guest.
type sharingTarget struct {
	*target
	names []string
	share func(name string) bool
}

func (t *sharingTarget) Prepare(ctx context.Context, m *wire.Manifest) ([]block.Device, error) {
	out, err := t.target.Prepare(ctx, m)
	for i, d := range m.Devices {
		t.names = append(t.names, d.Name)
		if err == nil && t.share(d.Name) {
			out[i] = untouchable{out[i]}
		}
	}
	return out, err
}

func (t *sharingTarget) Shared() (out []bool) {
	for _, name := range t.names {
		out = append(out, t.share(name))
	}
	return out
}

// Bases implements BaseTarget: of what is shared nobody asks.
func (t *sharingTarget) Bases(_ context.Context, m *wire.Manifest) ([]*BaseIndex, error) {
	for _, d := range m.Devices {
		if t.share(d.Name) && d.Base != "" {
			return nil, errors.New("a shared device is to become a base")
		}
	}
	return make([]*BaseIndex, len(m.Devices)), nil
}

type untouchable struct{ block.Device }

var errTouched = errors.New("what is shared was touched")

func (untouchable) ReadAt([]byte, int64) (int, error)       { return 0, errTouched }
func (untouchable) WriteAt([]byte, int64) (int, error)      { return 0, errTouched }
func (untouchable) Discard(int64, int64) error              { return errTouched }
func (untouchable) NextData(int64) (r block.Range, e error) { return r, errTouched }
func (untouchable) Flush() error                            { return errTouched }

// A device that the destination has itself is neither read nor written nor tracked, whatever the guest does.
func TestShared(t *testing.T) {
	for _, busy := range []bool{false, true} {
		noLeak(t)
		r := newRig(smallShape)
		r.guest.busy = busy
		r.target.make = func(name string, size int64) block.Device {
			for _, d := range r.source.Devices {
				if d.Name == name && name == "memory" {
					return d.Device
				}
			}
			return block.NewMemory(size)
		}
		r.dest.Target = &sharingTarget{target: r.target, share: func(name string) bool { return name == "memory" }}
		r.source.Devices[0].Handle = "7:42"
		a, b := pipes(2)
		o := r.move(t.Context(), a, b)
		if got := r.verify(t, o); got != "destination" {
			t.Fatalf("guest is at the %s: %v; %v", got, o.srcErr, o.dstErr)
		}
		for side, rep := range map[string]*Report{"source": o.src, "destination": o.dst} {
			_, memory := rep.Digests["memory"]
			_, disk := rep.Digests["disk"]
			if !slices.Equal(rep.Shared, []string{"memory"}) || memory || !disk {
				t.Errorf("%s: shared %q, digests %v", side, rep.Shared, rep.Digests)
			}
		}
		rounds, bytes := 0, int64(0)
		for _, round := range o.src.Rounds {
			if round.Device == "memory" {
				rounds, bytes = rounds+1, bytes+round.Bytes
			}
		}
		if rounds != 1 || bytes != 0 {
			t.Errorf("%d bytes of what is shared were sent in %d rounds", bytes, rounds)
		}
	}
}

// What was not offered is not taken.
func TestSharedUnasked(t *testing.T) {
	noLeak(t)
	r := newRig(smallShape)
	r.dest.Target = &sharingTarget{target: r.target, share: func(name string) bool { return name == "disk" }}
	r.source.Devices[0].Handle = "7:42"
	a, b := pipes(1)
	o := r.move(t.Context(), a, b)
	if got := r.verify(t, o); got != "source" || !errors.Is(o.srcErr, wire.ErrMalformed) || !strings.Contains(o.srcErr.Error(), `"disk"`) {
		t.Errorf("guest is at the %s: %v", got, o.srcErr)
	}
}

func TestBlank(t *testing.T) {
	b := blank(5000)
	p := []byte{1, 2, 3, 4}
	if n, err := b.ReadAt(p, 4998); n != 2 || err != io.EOF || p[0]|p[1] != 0 || p[2] != 3 {
		t.Errorf("read %d, %v: %v", n, err, p)
	}
	if _, err := b.ReadAt(p, 5000); err != io.EOF {
		t.Errorf("read past the end: %v", err)
	}
	if _, err := b.WriteAt(p, 0); err == nil {
		t.Error("it was written to")
	}
}
