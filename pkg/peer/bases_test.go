package peer

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/runner"
)

// onBase makes an overlay over a base of some pages, the last of which is not whole.
func onBase(t *testing.T) (runner.Device, []byte) {
	dir := t.TempDir()
	c := runner.DeviceConfig{Name: "disk", Base: filepath.Join(dir, "base"), Overlay: filepath.Join(dir, "overlay"), State: filepath.Join(dir, "state")}
	content := bytes.Repeat([]byte("base"), 64<<10)
	clear(content[8192:20000])
	content = content[:len(content)-100]
	if err := os.WriteFile(c.Base, content, 0o600); err != nil {
		t.Fatal(err)
	}
	base, err := block.OpenFile(c.Base, block.FileOptions{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	o, err := block.OpenOverlay(block.OverlayOptions{Base: base, BasePath: c.Base, Overlay: c.Overlay, State: c.State})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { o.Close() })
	return runner.Device{Config: c, Block: block.NewTracked(o), Overlay: o}, content
}

func isContent(t *testing.T, d block.Device, want []byte) {
	t.Helper()
	got := make([]byte, len(want))
	if _, err := d.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the device is not its base (%v)", err)
	}
}

func TestBecomeBase(t *testing.T) {
	d, content := onBase(t)
	for _, off := range []int64{0, 5000, 9000, 100_000, d.Block.Size() - 3} {
		if _, err := d.Block.WriteAt([]byte("new"), off); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Block.Discard(40_000, 30_000); err != nil {
		t.Fatal(err)
	}
	if err := becomeBase(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	isContent(t, d.Block, content)

	memory := runner.Device{Config: d.Config, Block: block.NewMemory(int64(len(content)))}
	if _, err := memory.Block.WriteAt([]byte("what a machine left"), 9000); err != nil {
		t.Fatal(err)
	}
	if err := becomeBase(t.Context(), memory); err != nil {
		t.Fatal(err)
	}
	isContent(t, memory.Block, content)

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := becomeBase(ctx, d); !errors.Is(err, context.Canceled) {
		t.Errorf("canceled: got error %v", err)
	}
}

func TestIndexOfBase(t *testing.T) {
	d, _ := onBase(t)
	cfg := Config{Logger: slog.New(slog.DiscardHandler)}
	base, err := block.OpenFile(d.Config.Base, block.FileOptions{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer base.Close()
	want, err := migrate.IndexBase(t.Context(), base)
	if err != nil {
		t.Fatal(err)
	}
	if x := cfg.index(t.Context(), d.Config); x == nil || x.Digest() != want.Digest() {
		t.Errorf("got %v, want %v", x, want.Digest())
	}
	inPlace := d.Config
	inPlace.Overlay, inPlace.State = "", ""
	if cfg.index(t.Context(), inPlace) != nil {
		t.Error("a base that is written to has an index")
	}
	gone := d.Config
	gone.Base += "-gone"
	if cfg.index(t.Context(), gone) != nil {
		t.Error("a base that is not there has an index")
	}
}
