package runner

import (
	"fmt"
	"path/filepath"
	"time"

	"github.com/drafter-vm/drafter/pkg/expose"
	"github.com/drafter-vm/drafter/pkg/vmm"
)

// disksFolder is the folder in the VMPath that has the disks as files, for a hypervisor that opens paths.
const disksFolder = "disks"

// diskServer serves disks to the machine.
type diskServer interface {
	Abort() // see expose.Server
	Close() error
}

// diskMount is a diskServer of files.
type diskMount struct {
	*expose.Mount
	leave bool  // to the machine, which lives on, for its next owner
	kept  error // why it could not be left
}

// Abort does nothing to a mount that ends: what is in flight when the machine is gone is answered to nobody.
func (m *diskMount) Abort() {
	if m.leave {
		m.kept = m.Abandon()
	}
}

// Close never takes the disks away from a machine that lives on.
func (m *diskMount) Close() error {
	if m.kept != nil {
		return m.kept
	}
	return m.Mount.Close()
}

// serveDisks serves the disks where the machine looks for them.
func (i *Instance) serveDisks() ([]vmm.Attachment, error) {
	if len(i.desc.Disks) == 0 {
		return nil, nil
	}
	exports := make([]expose.Export, len(i.desc.Disks))
	for n, disk := range i.desc.Disks {
		exports[n] = i.export(disk)
	}
	if vmm.RequirementsOf(i.cfg.Backend).Paths {
		return i.mountDisks(exports)
	}
	attachments := make([]vmm.Attachment, len(exports))
	opts := expose.NBDOptions{Logger: i.log}
	if i.cfg.Host.IOEngineSync {
		opts.Workers = 1
	}
	for n, export := range exports {
		socket := filepath.Join(i.path, export.Name+".nbd")
		server, err := expose.ListenNBD(socket, []expose.Export{export}, opts)
		if err != nil {
			return nil, fmt.Errorf("expose disk %q: %w", export.Name, err)
		}
		i.log.Debug("disk served", "disk", export.Name, "workers", opts.Workers)
		i.disks = append(i.disks, server)
		attachments[n] = vmm.Attachment{Name: export.Name, Socket: socket}
	}
	return attachments, nil
}

// mountDisks serves the disks as files. The machine holds the mount's connection for its next owner.
func (i *Instance) mountDisks(exports []expose.Export) ([]vmm.Attachment, error) {
	dir := filepath.Join(i.path, disksFolder)
	opts := expose.FUSEOptions{UID: i.cfg.Host.UID, GID: i.cfg.Host.GID, Logger: i.log}
	var mount *expose.Mount
	var err error
	if o := i.orphan; o == nil {
		mount, err = expose.MountFUSE(dir, exports, opts)
	} else if o.disks == nil {
		err = fmt.Errorf("process %d, the machine, does not hold their connection: this kernel cannot repeat requests (Linux 6.9 can), so they have ended with the former owner", o.pid)
	} else {
		connection := o.disks
		o.disks = nil
		mount, err = expose.AdoptFUSE(dir, connection, exports, opts)
	}
	if err != nil {
		return nil, fmt.Errorf("expose disks: %w", err)
	}
	i.disks = append(i.disks, &diskMount{Mount: mount})
	if i.diskConnection, err = mount.Connection(); err != nil {
		i.log.Warn("the machine's disks end with this process: it could not be adopted", "error", err)
	}
	attachments := make([]vmm.Attachment, len(exports))
	for n, export := range exports {
		attachments[n] = vmm.Attachment{Name: export.Name, Path: mount.Path(export.Name)}
	}
	return attachments, nil
}

// unmountDisks takes away what a dead process has mounted in the folder root of a machine that has ended, or is to: as long as it
// waits for one of its disks it cannot.
func (i *Instance) unmountDisks(root string) {
	if err := expose.DetachFUSE(filepath.Join(root, "root", disksFolder)); err != nil {
		i.log.Debug("the disks of an ended machine are mounted still", "error", err)
	}
}

// export is a disk as it is served.
func (i *Instance) export(disk vmm.Disk) expose.Export {
	e := expose.Export{Name: disk.Name, Device: i.device(disk.Name).front(), ReadOnly: disk.ReadOnly}
	if flushed := i.cfg.Hooks.Flushed; flushed != nil {
		e.Device = timedFlush{e.Device, func(took time.Duration, err error) { flushed(disk.Name, took, err) }}
	}
	return e
}
