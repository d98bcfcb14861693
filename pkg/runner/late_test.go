package runner

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"

	"github.com/drafter-vm/drafter/pkg/block"
)

// A kernel arrives while its guest runs, also in a process that follows another: a guest does not wait for it, but who boots does.
func TestLateKernel(t *testing.T) {
	for _, overlay := range []bool{false, true} {
		dir := t.TempDir()
		synctest.Test(t, func(t *testing.T) { testLateKernel(t, dir, overlay) })
	}
}

func testLateKernel(t *testing.T, dir string, overlay bool) {
	want := bytes.Repeat([]byte("boots"), 2*block.PageSize)
	size := int64(len(want))
	c := DeviceConfig{Name: KernelDevice, Base: filepath.Join(dir, "vmlinux")}
	if overlay {
		c.Overlay, c.State = filepath.Join(dir, "overlay"), filepath.Join(dir, "state")
		if err := os.WriteFile(c.Base, make([]byte, size), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	openIt := func(mode openMode) *Instance {
		t.Helper()
		d, err := openDevice(c, mode, size, liveFiles{})
		if err != nil {
			t.Fatal(err)
		}
		return &Instance{devices: []*device{d}, path: filepath.Join(dir, "vm")}
	}
	// It is here already, in use by others perhaps.
	if !overlay {
		if err := os.WriteFile(c.Base, want, 0o600); err != nil {
			t.Fatal(err)
		}
		i := openIt(openReceive)
		if i.CanPostpone(KernelDevice) {
			t.Error("one that is here may be written to")
		}
		i.leave(t)
		if err := os.Remove(c.Base); err != nil {
			t.Fatal(err)
		}
	}

	i := openIt(openReceive)
	if !i.CanPostpone(KernelDevice) || i.CanPostpone(InitrdDevice) {
		t.Errorf("a kernel can be late: %t; one that there is not: %t", i.CanPostpone(KernelDevice), i.CanPostpone(InitrdDevice))
	}
	if err := i.devices[0].makeLazy([]block.Range{{Length: size}}, &i.late); err != nil {
		t.Fatal(err)
	}
	if i.Missing() != size || i.GuestLacks() {
		t.Errorf("%d bytes are missing of %d, and the guest may need them: %t", i.Missing(), size, i.GuestLacks())
	}
	if err := i.late.device(KernelDevice).Fill(0, want[:block.PageSize]); err != nil {
		t.Fatal(err)
	}
	i.leave(t)

	if i = openIt(openExisting); !i.devices[0].canBeLate() {
		t.Fatal("it cannot go on arriving")
	}
	if err := i.devices[0].makeLazy(nil, &i.late); err != nil {
		t.Fatal(err)
	}
	if i.Missing() != size-block.PageSize {
		t.Errorf("in another process %d bytes are missing", i.Missing())
	}
	if err := os.MkdirAll(i.path, 0o700); err != nil {
		t.Fatal(err)
	}
	booted := make(chan struct{})
	go func() {
		defer close(booted)
		path, err := i.bootFile(t.Context(), KernelDevice)
		if err != nil {
			t.Error(err)
		} else if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
			t.Errorf("it would boot from something else (%v)", err)
		}
	}()
	synctest.Wait()
	select {
	case <-booted:
		t.Error("it did not wait")
	default:
	}
	if err := i.late.device(KernelDevice).Fill(block.PageSize, want[block.PageSize:]); err != nil {
		t.Error(err)
	}
	<-booted
	if err := i.complete(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(c.listFile()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the list is left: %v", err)
	}
	i.leave(t)
	i = openIt(openExisting)
	if got := content(t, i.devices[0]); !bytes.Equal(got, want) {
		t.Error("it is another afterwards")
	}
	i.leave(t)
}

// Who waits for a kernel that does not come can be told to stop.
func TestLateKernelCanceled(t *testing.T) {
	dir := t.TempDir()
	d, err := openDevice(DeviceConfig{Name: KernelDevice, Base: filepath.Join(dir, "vmlinux")}, openReceive, block.PageSize, liveFiles{})
	if err != nil {
		t.Fatal(err)
	}
	i := &Instance{devices: []*device{d}, path: dir}
	if err := d.makeLazy([]block.Range{{Length: block.PageSize}}, &i.late); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := i.bootFile(ctx, KernelDevice); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	i.leave(t)
}
