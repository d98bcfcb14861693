package block_test

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/drafter-vm/drafter/pkg/block"
)

// TestOverlaySurvivesItsProcess checks that with a live file everything that was answered is there again for who takes over
// from a process that was killed, flushed or not.
func TestOverlaySurvivesItsProcess(t *testing.T) {
	const size = 1<<20 + 5*4096
	for seed := range uint64(20) {
		rng := rand.New(rand.NewPCG(seed, 1))
		dir := t.TempDir()
		content := make([]byte, size)
		for i := range content {
			content[i] = byte(rng.Uint32())
		}
		base := filepath.Join(dir, "base")
		if err := os.WriteFile(base, content, 0o600); err != nil {
			t.Fatal(err)
		}
		live := must[*os.File](t)(block.NewLive("test"))
		defer live.Close()
		open := func(name string, live *os.File) *block.Overlay {
			t.Helper()
			file := must[*block.File](t)(block.OpenFile(base, block.FileOptions{ReadOnly: true}))
			return must[*block.Overlay](t)(block.OpenOverlay(block.OverlayOptions{Base: file, BasePath: base,
				Overlay: filepath.Join(dir, name), State: filepath.Join(dir, name+".state"), BlockSize: 16 << 10, Live: live}))
		}
		name := "overlay"
		o := open(name, live)
		for generation := range 3 {
			for range 40 {
				off := rng.Int64N(size)
				n := min(1+rng.Int64N(40<<10), size-off)
				switch rng.IntN(5) {
				case 0:
					if err := o.Discard(off, n); err != nil {
						t.Fatal(err)
					}
					clear(content[off : off+n])
				case 1:
					if err := o.Flush(); err != nil {
						t.Fatal(err)
					}
				default:
					p := make([]byte, n)
					p[0] = byte(generation)
					mustWrite(t, o, p, off)
					copy(content[off:], p)
				}
			}
			// What a killed process leaves: its files as they are, and a lock that is gone.
			next := name + "'"
			for _, suffix := range []string{"", ".state"} {
				b := must[[]byte](t)(os.ReadFile(filepath.Join(dir, name+suffix)))
				if err := os.WriteFile(filepath.Join(dir, next+suffix), b, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			name = next
			old := o
			o = open(name, live)
			_ = old // it still has the file mapped, and nobody uses it
			got := make([]byte, size)
			if _, err := o.ReadAt(got, 0); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, content) {
				t.Fatalf("seed %d, generation %d: what was written before the process died is not there", seed, generation)
			}
		}
		// A flush by the one who took over makes all of it durable.
		if err := o.Flush(); err != nil {
			t.Fatal(err)
		}
		mustClose(t, o)
		o = open(name, nil)
		got := make([]byte, size)
		if _, err := o.ReadAt(got, 0); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, content) {
			t.Fatalf("seed %d: a flush after the takeover did not make durable what was written before it", seed)
		}
		mustClose(t, o)
	}
}

// TestLiveOfAnother checks that a live file of another device is refused.
func TestLiveOfAnother(t *testing.T) {
	dir := t.TempDir()
	live := must[*os.File](t)(block.NewLive("test"))
	defer live.Close()
	if err := live.Truncate(8); err != nil {
		t.Fatal(err)
	}
	base := filepath.Join(dir, "base")
	if err := os.WriteFile(base, make([]byte, 32<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := tryOverlay(t, block.OverlayOptions{BasePath: base, Overlay: filepath.Join(dir, "o"), State: filepath.Join(dir, "s"), Live: live}); err == nil {
		t.Error("a live file of another size was taken")
	}
}
