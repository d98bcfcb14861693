package peer

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
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
	device := Device{DeviceConfig: d.Config}
	if x, err := cfg.index(t.Context(), device, nil); err != nil || x.Digest() != want.Digest() {
		t.Errorf("got %v, %v, want %v", x, err, want.Digest())
	}
	opened, err := os.Stat(d.Config.Base)
	if err != nil {
		t.Fatal(err)
	}
	if x, err := cfg.index(t.Context(), device, opened); err != nil || x.Digest() != want.Digest() {
		t.Errorf("the base that is in use: %v, %v", x, err)
	}
	text, err := os.ReadFile(d.Config.Base)
	if err == nil {
		err = errors.Join(os.WriteFile(d.Config.Base+".new", text, 0o600), os.Rename(d.Config.Base+".new", d.Config.Base))
	}
	if err != nil {
		t.Fatal(err)
	}
	if x, err := cfg.index(t.Context(), device, opened); x != nil || err != nil {
		t.Errorf("a base that was replaced while it is in use has the index %v, %v", x, err)
	}
	required := device
	required.SharedBase = true
	if x, err := cfg.index(t.Context(), required, opened); x != nil || err == nil || !strings.Contains(err.Error(), "is another file than the one that the VM has been using") {
		t.Errorf("one that is to be on both sides: %v, %v", x, err)
	}
	inPlace := device
	inPlace.Overlay, inPlace.State = "", ""
	if x, err := cfg.index(t.Context(), inPlace, nil); x != nil || err != nil {
		t.Errorf("a base that is written to has the index %v, %v", x, err)
	}
	inPlace.Shared = true
	if x, err := cfg.index(t.Context(), inPlace, nil); err != nil || x.Digest() != want.Digest() {
		t.Errorf("of a shared disk: %v, %v, want %v", x, err, want.Digest())
	}
	gone := device
	gone.Base += "-gone"
	if x, err := cfg.index(t.Context(), gone, nil); x != nil || err != nil {
		t.Errorf("a base that is not there has the index %v, %v", x, err)
	}
	gone.SharedBase = true
	if x, err := cfg.index(t.Context(), gone, nil); x != nil || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a base that is to be on both sides, and is not there: %v, %v", x, err)
	}
	cfg.Devices = []Device{device, gone}
	if err := cfg.IndexBases(t.Context()); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), `"disk"`) {
		t.Errorf("IndexBases: %v", err)
	}
}
