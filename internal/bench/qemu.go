package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/ram"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/vmm"
	"github.com/drafter-vm/drafter/pkg/vmm/qemu"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
)

// stockVM is a machine of a package in a QEMU that migrates by itself: the reference. Its disk is a file that the
// destination opens too, so QEMU has only memory and device state to move.
type stockVM struct {
	machine vmm.Machine
	monitor *monitor
	memory  *ram.Memory
	folder  string
}

// stockLimit is what QEMU's pre-copy gets as the longest downtime, and what our engine aims at, in milliseconds.
const stockLimit = 20

// stockPatience is how long QEMU's pre-copy may try to keep to stockLimit before it gets its own default.
const stockPatience = 20 * time.Second

// startStock starts a machine that waits for its state.
func startStock(ctx context.Context, pkg *vmpackage.Package, disk, netns string) (_ *stockVM, err error) {
	vm := &stockVM{}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("start a stock QEMU: %w", err), vm.close())
		}
	}()
	config, err := readDevice(pkg, runner.ConfigDevice)
	if err != nil {
		return nil, err
	}
	desc, err := runner.ParseDescription(config)
	if err != nil {
		return nil, err
	}
	if vm.folder, err = os.MkdirTemp("", "drafter-bench-"); err != nil { // mode 0700; short enough for sockets
		return nil, err
	}
	if vm.memory, err = ram.Create("stock", desc.MemorySize); err != nil {
		return nil, err
	}
	var disks []vmm.Attachment
	for _, d := range desc.Disks {
		disks = append(disks, vmm.Attachment{Name: d.Name, Path: disk})
	}
	socket := filepath.Join(vm.folder, "monitor.sock")
	vm.machine, err = qemu.New(qemu.Options{}).Start(ctx, vmm.Config{
		Spec: desc.Spec, Dir: vm.folder, Memory: vm.memory.File(), NUMANode: -1, Disks: disks, Netns: netns, Interface: "tap0", Logger: quiet,
		Spawn: func(cmd *exec.Cmd) error {
			// It is to run by itself as soon as it has what it needs. (The first one gets its state from a package: to
			// that -S makes no difference.)
			cmd.Args = slices.DeleteFunc(cmd.Args, func(arg string) bool { return arg == "-S" })
			cmd.Args = append(cmd.Args, "-qmp", "unix:"+socket+",server=on,wait=off")
			return cmd.Start()
		},
	})
	if err != nil {
		return nil, err
	}
	vm.monitor, err = dialMonitor(ctx, socket)
	return vm, err
}

// resumeStock starts a machine and resumes the package in it.
func resumeStock(ctx context.Context, pkg *vmpackage.Package, disk, netns string) (_ *stockVM, err error) {
	vm, err := startStock(ctx, pkg, disk, netns)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("resume in a stock QEMU: %w", err), vm.close())
		}
	}()
	saved, err := openDevice(pkg, runner.MemoryDevice)
	if err != nil {
		return nil, err
	}
	defer saved.Close()
	if err := copyData(vm.memory.Device(), saved); err != nil {
		return nil, err
	}
	stateDevice, err := openDevice(pkg, runner.StateDevice)
	if err != nil {
		return nil, err
	}
	defer stateDevice.Close()
	state, err := runner.ReadSaved(stateDevice, false)
	if err != nil {
		return nil, err
	}
	if err := vm.machine.Load(ctx, bytes.NewReader(state)); err != nil {
		return nil, err
	}
	return vm, vm.machine.Resume(ctx)
}

// stockMove is what QEMU says of its migration.
type stockMove struct {
	Downtime, Total time.Duration
	Bytes           int64
}

// moveStock has QEMU migrate from one machine to another; runs is called as soon as the guest runs there.
func moveStock(ctx context.Context, from, to *stockVM, postcopy bool, runs func() error) (stockMove, error) {
	move, err := from.migrate(ctx, to, postcopy, runs)
	if err != nil {
		return move, fmt.Errorf("QEMU's own migration: %w", err)
	}
	return move, nil
}

func (vm *stockVM) migrate(ctx context.Context, to *stockVM, postcopy bool, runs func() error) (move stockMove, err error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	type capability struct {
		Capability string `json:"capability"`
		State      bool   `json:"state"`
	}
	for _, m := range []*monitor{vm.monitor, to.monitor} {
		m.forget() // the state of a package was loaded by a migration too
		if err := m.execute(ctx, "migrate-set-capabilities", map[string]any{"capabilities": []capability{
			{"events", true}, {"x-ignore-shared", false}, {"postcopy-ram", postcopy},
		}}, nil); err != nil {
			return move, err
		}
		// No bound on the link, as with ours, and announcements as QEMU has them by default.
		if err := m.execute(ctx, "migrate-set-parameters", map[string]any{
			"max-bandwidth": 100 << 30, "downtime-limit": stockLimit, "announce-rounds": 5,
		}, nil); err != nil {
			return move, err
		}
	}
	if err := to.monitor.execute(ctx, "migrate-incoming", map[string]any{"uri": "tcp:127.0.0.1:0"}, nil); err != nil {
		return move, err
	}
	var incoming struct {
		Addresses []struct {
			Host string `json:"host"`
			Port string `json:"port"`
		} `json:"socket-address"`
	}
	for len(incoming.Addresses) == 0 {
		if err := to.monitor.execute(ctx, "query-migrate", nil, &incoming); err != nil {
			return move, err
		}
		if err := wait(ctx, time.Millisecond); err != nil {
			return move, err
		}
	}
	uri := "tcp:127.0.0.1:" + incoming.Addresses[0].Port
	if err := vm.monitor.execute(ctx, "migrate", map[string]any{"uri": uri}, nil); err != nil {
		return move, err
	}
	if postcopy {
		// After one pass over everything, as our engine and QEMU's documentation have it.
		if _, err := vm.monitor.event(ctx, "MIGRATION_PASS 2", "MIGRATION completed", "MIGRATION failed"); err != nil {
			return move, err
		}
		// It fails when there was nothing left to do.
		if err := vm.monitor.execute(ctx, "migrate-start-postcopy", nil, nil); err != nil {
			if _, ended := vm.monitor.event(ctx, "MIGRATION completed"); ended != nil {
				return move, errors.Join(err, ended)
			}
		}
	}
	patience, stop := context.WithTimeout(ctx, stockPatience)
	_, err = to.monitor.event(patience, "RESUME")
	stop()
	if err != nil && ctx.Err() == nil {
		const stockDefault = 300
		if err := vm.monitor.execute(ctx, "migrate-set-parameters", map[string]any{"downtime-limit": stockDefault}, nil); err != nil {
			return move, err
		}
		_, err = to.monitor.event(ctx, "RESUME")
	}
	if err != nil {
		return move, errors.Join(err, vm.failure(ctx))
	}
	if err := runs(); err != nil {
		return move, err
	}
	ended, err := vm.monitor.event(ctx, "MIGRATION completed", "MIGRATION failed")
	if err != nil {
		return move, err
	}
	if ended == "MIGRATION failed" {
		return move, vm.failure(ctx)
	}
	var report struct {
		Total    int64 `json:"total-time"` // milliseconds, as the next
		Downtime int64 `json:"downtime"`
		RAM      struct {
			Transferred int64 `json:"transferred"`
		} `json:"ram"`
	}
	if err := vm.monitor.execute(ctx, "query-migrate", nil, &report); err != nil {
		return move, err
	}
	return stockMove{
		Downtime: time.Duration(report.Downtime) * time.Millisecond, Total: time.Duration(report.Total) * time.Millisecond, Bytes: report.RAM.Transferred,
	}, nil
}

// failure is what the source says of a migration that did not go well.
func (vm *stockVM) failure(ctx context.Context) error {
	var report json.RawMessage
	if err := vm.monitor.execute(context.WithoutCancel(ctx), "query-migrate", nil, &report); err != nil {
		return err
	}
	return fmt.Errorf("its source says %s", report)
}

func (vm *stockVM) close() error {
	var errs []error
	if vm.monitor != nil {
		vm.monitor.close()
	}
	if vm.machine != nil {
		errs = append(errs, vm.machine.Close())
	}
	if vm.memory != nil {
		errs = append(errs, vm.memory.Close())
	}
	if vm.folder != "" {
		errs = append(errs, os.RemoveAll(vm.folder))
	}
	return errors.Join(errs...)
}

// openDevice opens a device of a package to be read.
func openDevice(pkg *vmpackage.Package, name string) (block.Device, error) {
	for _, d := range pkg.Devices {
		if d.Name == name {
			return block.OpenFile(d.Path, block.FileOptions{ReadOnly: true})
		}
	}
	return nil, fmt.Errorf("the package has no device %q", name)
}

// readDevice reads a device whole.
func readDevice(pkg *vmpackage.Package, name string) ([]byte, error) {
	dev, err := openDevice(pkg, name)
	if err != nil {
		return nil, err
	}
	defer dev.Close()
	content := make([]byte, dev.Size())
	_, err = io.ReadFull(io.NewSectionReader(dev, 0, dev.Size()), content)
	return content, err
}

// copyData copies what is not a hole.
func copyData(to, from block.Device) error {
	buf := make([]byte, mib)
	for off := int64(0); ; {
		r, err := block.NextData(from, off)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		for at, end := r.Offset, r.Offset+r.Length; at < end; at += int64(len(buf)) {
			part := buf[:min(int64(len(buf)), end-at)]
			if _, err := from.ReadAt(part, at); err != nil && !errors.Is(err, io.EOF) {
				return err
			}
			if _, err := to.WriteAt(part, at); err != nil {
				return err
			}
		}
		off = r.Offset + r.Length
	}
}
