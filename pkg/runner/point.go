package runner

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/zeebo/xxh3"
	"golang.org/x/sync/errgroup"

	"github.com/drafter-vm/drafter/pkg/block"
)

// The commit point of an instance is what it was when it was last saved here, or received: device state, memory and disks of
// one moment. The device state stays in the state device, and the memory in its device, until the instance is saved anew. What
// would be lost are the disks of that moment, so with Config.KeepCommitPoint the guest's writes go to a layer: an overlay
// over the disk, in two files beside those of the disk. It is folded into the disk when the instance is saved, and dropped
// when it is rolled back.
//
// The record alone says what the layer is, so that each step is as atomic as a record:
//
//   - with Kept, the disk under the layer, the memory and the device state are the commit point;
//   - with Layered alone, the layer is a part of the disk, and under it lies nothing of use;
//   - with neither, the layer is void. It was folded in before, or is to be dropped.

// ErrNoCommitPoint is wrapped by the error of a Resume that was to return to a commit point, when there is none. The message
// says what is missing and what can be done.
var ErrNoCommitPoint = errors.New("there is no commit point to return to")

// RolledBack is what became of an instance that was returned to its commit point.
type RolledBack struct {
	Saved     bool      // it did not have to be: it was saved, by a Close or by a rollback that was cut short, and is resumed as it was
	Since     time.Time // when the guest had begun to run from there
	Discarded int64     // bytes of the disks, in pages, that it wrote since then
}

// point is what an instance knows of its commit point while it runs.
type point struct {
	record  Record       // Length above zero: says where the device state is. With Kept, that all of it is durable
	arrived bool         // it was received by this process, which has seen all of it
	broken  atomic.Bool  // a part of what was received could not be kept
	front   atomic.Bool  // the instance is ours: what is written is the guest's, and goes to the layers
	back    *RolledBack  // where the instance came from
	memory  block.Device // with arrived: memory as it was when it was received
}

// layer is what a guest wrote to a disk since the commit point.
type layer struct {
	*block.Tracked
	writes  *block.Tracked // the same for somebody else
	overlay *block.Overlay
	created []string // its files, if opening it made them
	void    bool     // it is not needed when it is closed
}

// layerSuffix ends the names of a layer's files. Its blocks are small, so that hardly anything is copied to it from below.
const (
	layerSuffix    = ".since"
	layerBlockSize = block.PageSize
)

// layerFiles are where the layer of a disk is.
func (d DeviceConfig) layerFiles() (overlay, state string) {
	if d.Overlay == "" {
		return d.Base + layerSuffix, d.Base + layerSuffix + ".state"
	}
	return d.Overlay + layerSuffix, d.State + layerSuffix
}

// hasLayer reports whether there are the files of a layer. One without its state was being made, or removed.
func (d *device) hasLayer() bool {
	_, state := d.layerFiles()
	_, err := os.Lstat(state)
	return d.served != nil && err == nil
}

// openLayer opens the disk's layer, or makes one. See liveFiles for live; nil where no guest runs on it.
func (d *device) openLayer(live *os.File) error {
	l := &layer{}
	overlay, state := d.layerFiles()
	for _, path := range []string{overlay, state} {
		if _, err := os.Lstat(path); errors.Is(err, os.ErrNotExist) {
			l.created = append(l.created, path)
		}
	}
	var err error
	l.overlay, err = block.OpenOverlay(block.OverlayOptions{Base: d.served, Overlay: overlay, State: state, BlockSize: layerBlockSize, Live: live})
	if err != nil {
		return fmt.Errorf("device %q: open what was written since the commit point: %w", d.Name, err)
	}
	l.writes = block.NewTracked(l.overlay)
	l.Tracked = block.NewTracked(l.writes)
	d.layer = l
	return nil
}

// dropLayer removes the files of a disk's layer, which is not open.
func (d *device) dropLayer() error {
	overlay, state := d.layerFiles()
	var errs []error
	for _, path := range []string{state, overlay} { // without its state it is none
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// closeLayer closes the layer, and removes it if it is not needed.
func (d *device) closeLayer() error {
	if d.layer == nil {
		return nil
	}
	err := d.layer.Close()
	if d.layer.void {
		err = errors.Join(err, d.dropLayer())
	}
	return err
}

// front is the disk as the guest has it.
func (d *device) front() block.Device {
	if d.layer != nil {
		return d.layer
	}
	return d.served
}

// NextChange returns the first range at or after off in which the disk, with its layer, may differ from its base.
func (d *device) NextChange(off int64) (block.Range, error) {
	below, err := d.overlay.NextChange(off)
	if err != nil && err != io.EOF {
		return below, err
	}
	above, aboveErr := d.layer.overlay.NextChange(off)
	if err == io.EOF || aboveErr == nil && above.Offset < below.Offset {
		return above, aboveErr
	}
	return below, nil
}

// fold makes the disk durable, with what is in its layer, which is void from then on if the record says so.
func (d *device) fold(ctx context.Context) error {
	if d.layer == nil {
		return d.Flush()
	}
	from := d.layer.overlay
	if err := from.Flush(); err != nil {
		return err
	}
	if err := block.CopyRanges(ctx, d, from, from.NextChange, nil); err != nil {
		return err
	}
	return d.Flush()
}

// dropLayers removes what void layers have left.
func (i *Instance) dropLayers() error {
	for _, d := range i.devices {
		if d.served == nil {
			continue
		}
		if err := d.dropLayer(); err != nil {
			return fmt.Errorf("remove what was written since a commit point: %w", err)
		}
	}
	return nil
}

// keepPoint prepares to keep the commit point, from which the instance is about to run.
func (i *Instance) keepPoint() error {
	if !i.cfg.KeepCommitPoint {
		return nil
	}
	for _, d := range i.devices {
		if d.served == nil || d.Shared { // nothing is written to it
			continue
		}
		if info, err := os.Stat(d.Base); d.Overlay == "" && err == nil && !info.Mode().IsRegular() {
			return fmt.Errorf("device %q: its base %q is no regular file, beside which its commit point could be kept: give it an overlay", d.Name, d.Base)
		}
		if err := d.openLayer(d.since); err != nil {
			return err
		}
	}
	return nil
}

// forgetPoint gives the commit point up, durably if it is on record, for a disk or the memory is about to change.
func (i *Instance) forgetPoint(status Status) error {
	if i.point.record.Kept && status == Running {
		if err := writeRecord(i.device(StateDevice), Record{Status: Running, Migration: i.late.migration, Layered: true}); err != nil {
			return err
		}
	}
	i.point.record = Record{}
	return nil
}

// fold makes all disks durable, with what is in their layers.
func (i *Instance) fold(ctx context.Context) error {
	var work errgroup.Group
	for _, d := range i.devices {
		if d.served != nil {
			work.Go(func() error { return d.fold(ctx) })
		}
	}
	return work.Wait()
}

// voidLayers says that the record has come to speak of disks without their layers.
func (i *Instance) voidLayers() {
	for _, d := range i.devices {
		if d.layer != nil {
			d.layer.void = true
		}
	}
}

// layered reports whether the disks have layers.
func (i *Instance) layered() bool {
	for _, d := range i.devices {
		if d.layer != nil {
			return true
		}
	}
	return false
}

// foldLayers makes one disk again of each disk and the layer that a power loss has left of it. The record that is written
// next says that there are none.
func (i *Instance) foldLayers(ctx context.Context) error {
	state := i.device(StateDevice)
	if state == nil {
		return nil
	}
	r, err := ReadRecord(state)
	if errors.Is(err, errNoRecord) {
		return nil
	}
	if err == nil && !r.Layered {
		return i.dropLayers()
	}
	if err == nil && r.Kept { // no longer
		err = writeRecord(state, Record{Status: r.Status, Migration: r.Migration, Layered: true})
	}
	if err != nil {
		return err
	}
	for _, d := range i.devices {
		if !d.hasLayer() {
			continue
		}
		if err := d.openLayer(nil); err != nil {
			return err
		}
		err = d.fold(ctx)
		d.layer.void = err == nil
		err = errors.Join(err, d.closeLayer())
		d.layer = nil
		if err != nil {
			return fmt.Errorf("device %q: put back what was written since the commit point: %w", d.Name, err)
		}
	}
	return nil
}

// runningRecord is the record of the instance while it runs here.
func (i *Instance) runningRecord(migration string) Record {
	r := i.point.record
	r.Status, r.Migration, r.Layered = Running, migration, i.layered()
	return r
}

// rollBack returns an instance that died to its commit point: nothing but the record has to change for that, and it changes
// at once. What is left behind goes when the instance is started.
func (i *Instance) rollBack(ctx context.Context) error {
	state := i.device(StateDevice)
	r, err := ReadRecord(state)
	if err != nil {
		return err
	}
	switch {
	case r.Status == Saved: // it is there, perhaps because a rollback before this one was cut short
		i.point.back = &RolledBack{Since: r.Time, Saved: true}
		return nil
	case r.Status != Running || !r.Kept:
		return r.mark(fmt.Errorf("%w: %s", ErrNoCommitPoint, r.noPoint()))
	}
	saved := r
	saved.Status, saved.Kept, saved.Layered, saved.Time = Saved, false, false, time.Time{}
	if _, err := readState(state, saved); err != nil {
		return fmt.Errorf("%w: %w: boot it from its disks with --boot", ErrNoCommitPoint, err)
	}
	if err := i.cfg.Backend.Compatible(ctx, i.desc.Spec); err != nil {
		return err
	}
	back := &RolledBack{Since: r.Time}
	for _, d := range i.devices {
		if d.hasLayer() {
			back.Discarded += d.layerBytes()
		}
	}
	if err := writeRecord(state, saved); err != nil {
		return err
	}
	i.log.Warn("the instance returns to its commit point: what was written to its disks since then is discarded", "since", back.Since, "bytes", back.Discarded)
	i.point.back = back
	return nil
}

// layerBytes is how much a layer holds, in bytes. It is told, and nothing depends on it.
func (d *device) layerBytes() int64 {
	err := d.openLayer(nil)
	if err == nil {
		blocks := d.layer.overlay.Blocks()
		err = d.closeLayer()
		d.layer = nil
		if err == nil {
			return (blocks.Held + blocks.Zero) * layerBlockSize
		}
	}
	overlay, _ := d.layerFiles()
	if info, err := os.Stat(overlay); err == nil {
		if stat, ok := info.Sys().(*syscall.Stat_t); ok {
			return stat.Blocks * 512 // the unit of stat(2)
		}
	}
	return 0
}

// noPoint says why there is no commit point, and what its owner can do.
func (r Record) noPoint() string {
	at := r.Time.UTC().Format(time.RFC3339)
	switch {
	case r.Status == Running && r.Migration != "":
		return fmt.Sprintf("it was received by migration %s at %s, and when it died not all of its memory had arrived, or was durable: "+
			"boot it from its disks with --boot; with --raddr, what they lack is fetched from the peer that it came from", shown(r.Migration), at)
	case r.Status == Running:
		return "it was running at " + at + ", and its commit point was not kept (it was started without --keep-commit-point, was booted, or was just being saved): " +
			"boot it from its disks with --boot, or delete its overlays to start from the package"
	}
	return r.remedy()
}

// RolledBack says what became of an instance that Resume returned to its commit point; nil if it did not.
func (i *Instance) RolledBack() *RolledBack { return i.point.back }

// Kept reports whether the instance's commit point is kept, so that Config.Rollback can return to it.
func (i *Instance) Kept() bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.point.record.Kept
}

// keepState keeps the device state of an instance that is received, which is on record with Own.
func (i *Instance) keepState(state io.Reader) (io.Reader, error) {
	if !i.cfg.KeepCommitPoint {
		return state, nil
	}
	var buf limitedBuffer
	if _, err := io.Copy(&buf, state); err != nil {
		return nil, err
	}
	if _, err := i.device(StateDevice).WriteAt(buf.b, recordSize); err != nil {
		return nil, fmt.Errorf("keep device state: %w", err)
	}
	i.point.record.Length, i.point.record.Sum, i.point.arrived = int64(len(buf.b)), xxh3.Hash(buf.b), true
	return bytes.NewReader(buf.b), nil
}

// sealPoint makes the commit point of an instance that has arrived durable, and reports whether it has done so.
func (i *Instance) sealPoint() bool {
	if !i.point.arrived || i.point.broken.Load() {
		return false
	}
	var work errgroup.Group
	for _, d := range i.devices {
		if d.Name == MemoryDevice || d.served != nil {
			work.Go(d.Flush)
		}
	}
	if err := work.Wait(); err != nil {
		i.log.Error("the commit point is not kept: --rollback cannot return to it", "error", err)
		return false
	}
	return true
}

// keptMemory is the memory of an instance while it is received: what arrives is kept, too, as the guest will change it.
type keptMemory struct {
	block.Device              // of the guest
	kept         block.Device // what is kept
}

func (m *keptMemory) WriteAt(p []byte, off int64) (int, error) {
	if n, err := m.kept.WriteAt(p, off); err != nil {
		return n, fmt.Errorf("keep memory for --rollback: %w", err)
	}
	return m.Device.WriteAt(p, off)
}

func (m *keptMemory) Discard(off, n int64) error {
	if err := m.kept.Discard(off, n); err != nil {
		return fmt.Errorf("keep memory for --rollback: %w", err)
	}
	return m.Device.Discard(off, n)
}

// NextData implements block.Extents: data is where either has some, so that zeros which come over what was kept before
// are not left out.
func (m *keptMemory) NextData(off int64) (block.Range, error) {
	a, err := block.NextData(m.Device, off)
	b, keptErr := block.NextData(m.kept, off)
	if err == io.EOF || err == nil && keptErr == nil && b.Offset < a.Offset {
		return b, keptErr
	}
	return a, err
}

// keptLate is memory that arrives while the guest runs, and is kept as it arrives.
type keptLate struct {
	lateMemory
	i *Instance
}

func (m keptLate) Fill(off int64, data []byte) error {
	if _, err := m.i.point.memory.WriteAt(data, off); err != nil {
		m.spoil(err)
	}
	return m.lateMemory.Fill(off, data)
}

func (m keptLate) FillZero(off, n int64) error {
	if err := m.i.point.memory.Discard(off, n); err != nil {
		m.spoil(err)
	}
	return m.lateMemory.FillZero(off, n)
}

// spoil gives the commit point up: the guest runs already, and comes first.
func (m keptLate) spoil(err error) {
	if !m.i.point.broken.Swap(true) {
		m.i.log.Error("the commit point is not kept: --rollback cannot return to it", "error", err)
	}
}
