package e2e

import (
	"bytes"
	"context"
	"io"
	"sync"
	"testing"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/peer"
	"github.com/drafter-vm/drafter/pkg/runner"
)

// runnerConfig is an instance of the package with overlays in folder.
func (g *guest) runnerConfig(t *testing.T, folder string) runner.Config {
	t.Helper()
	cfg := g.config(t, folder)
	return runner.Config{Backend: cfg.Backend, Host: cfg.Host, ResumeTimeout: cfg.ResumeTimeout, Devices: peer.DeviceConfigs(cfg.Devices)}
}

// TestLateDevices runs a guest at its destination while half of its memory and disk have not arrived there and are garbage
// instead. What it touches is asked for, the rest comes by and by.
func TestLateDevices(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	ctx := newContext(t)
	source, err := runner.Resume(ctx, g.runnerConfig(t, shortDir(t)))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Kill() // if it comes to that
	g.loadMemory(t)
	g.do(t, "disk disk start 1024")
	if err := source.Suspend(ctx); err != nil {
		t.Fatal(err)
	}
	var state bytes.Buffer
	if err := source.SaveState(ctx, &state); err != nil {
		t.Fatal(err)
	}

	content := make(map[string]block.Device)
	var incoming []runner.Incoming
	for _, d := range source.Devices() {
		// A copy, as the source's machine would take a part of what the console is told.
		copied := block.NewMemory(d.Block.Size())
		if err := block.Copy(ctx, copied, d.Block, block.CopyOptions{}); err != nil {
			t.Fatal(err)
		}
		content[d.Config.Name] = copied
		incoming = append(incoming, runner.Incoming{Name: d.Config.Name, Size: d.Block.Size()})
	}
	desc := source.Description()
	if err := source.Kill(); err != nil {
		t.Fatal(err)
	}
	folder := shortDir(t)
	destination, err := runner.Prepare(ctx, g.runnerConfig(t, folder), "late", desc, incoming)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { destination.Close(context.WithoutCancel(ctx)) }()
	missing := make(map[string][]block.Range)
	garbage := bytes.Repeat([]byte{0xee}, 64<<10)
	pages := 0
	for _, d := range destination.Devices() {
		name := d.Config.Name
		if err := block.Copy(ctx, d.Block, content[name], block.CopyOptions{}); err != nil {
			t.Fatal(err)
		}
		if name != runner.MemoryDevice && !runner.IsDisk(name) {
			continue
		}
		if !destination.CanPostpone(name) {
			t.Skipf("device %q cannot arrive late on this host", name)
		}
		for off := int64(0); off < d.Block.Size(); {
			r, err := block.NextData(d.Block, off)
			if err == io.EOF {
				break
			} else if err != nil {
				t.Fatal(err)
			}
			// Runs of one to sixteen pages, as far apart.
			n := 4096 * (1 + int64(pages)%16)
			r = block.Range{Offset: r.Offset / 4096 * 4096, Length: min(n, d.Block.Size()-r.Offset/4096*4096)}
			if _, err := d.Block.WriteAt(garbage[:r.Length], r.Offset); err != nil {
				t.Fatal(err)
			}
			missing[name] = append(missing[name], r)
			pages++
			off = r.End() + n
		}
	}

	asked := make(chan func(map[string]runner.Late) error, 1<<20)
	late, err := destination.Postpone(ctx, missing, func(name string, r block.Range) {
		asked <- func(late map[string]runner.Late) error {
			p := make([]byte, r.Length)
			if _, err := content[name].ReadAt(p, r.Offset); err != nil && err != io.EOF {
				return err
			}
			return late[name].Fill(r.Offset, p)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	var work sync.WaitGroup
	demanded := 0
	stop := make(chan struct{})
	work.Go(func() {
		for {
			select {
			case fill := <-asked:
				demanded++
				if err := fill(late); err != nil {
					t.Error(err)
				}
			case <-stop:
				return
			}
		}
	})
	t.Logf("%d bytes in %d runs arrive late", destination.Missing(), pages)
	if err := destination.Load(ctx, &state); err != nil {
		t.Fatal(err)
	}
	if err := destination.Own(ctx, "test"); err != nil {
		t.Fatal(err)
	}
	if err := destination.Run(ctx); err != nil {
		t.Fatal(err)
	}
	if err := destination.AfterResume(ctx); err != nil {
		t.Fatal(err)
	}
	g.do(t, "echo hello")
	g.do(t, "mem stop")
	g.do(t, "disk disk status")
	if err := destination.Complete(ctx); err == nil {
		t.Error("an instance is complete of which something is missing")
	}
	if err := destination.Close(ctx); err == nil {
		t.Error("an instance was saved of which something is missing")
	}
	for name, l := range late {
		for off := int64(0); ; {
			r, err := l.NextMissing(off)
			if err == io.EOF {
				break
			}
			r.Length = min(r.Length, 256<<10)
			p := make([]byte, r.Length)
			if _, err := content[name].ReadAt(p, r.Offset); err != nil && err != io.EOF {
				t.Fatal(err)
			}
			if err := l.Fill(r.Offset, p); err != nil {
				t.Fatal(err)
			}
			off = r.End()
		}
	}
	close(stop)
	work.Wait()
	if err := destination.Complete(ctx); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d pages and blocks were asked for", demanded)
	if demanded == 0 {
		t.Error("nothing was asked for")
	}
	g.do(t, "mem verify")
	g.do(t, "disk disk verify")
	if err := destination.Close(ctx); err != nil {
		t.Fatal(err)
	}
	if destination, err = runner.Resume(ctx, g.runnerConfig(t, folder)); err != nil {
		t.Fatal(err)
	}
	g.do(t, "mem verify")
	g.do(t, "disk disk verify")
}
