package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/peer"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
)

// newDeviceCommand makes the command that works on the devices of instances that do not run.
func newDeviceCommand() *cobra.Command {
	const verbs = "inspect, map, verify, commit or rebase"
	var source deviceSource
	cmd := &cobra.Command{
		Use:   "device",
		Short: "Look at the devices of an instance: base, overlays and what they hold; fold them, or put them over another base",
		Long: `Works on the devices of an instance, each of which is a base, and over it overlays, of which the newest is written.

The short way gives --package and --instance, as for drafter peer, and --parent where the instance goes on from others; the long way
--devices. Without any of them they are those of out/package, with overlays in out/overlay and out/state. Arguments name devices; without any,
inspect, map and verify take all.

Exit statuses: 0 done; 1 it failed, or something is wrong with a device; 2 the command line cannot be used; 130 ended by a signal.`,
		Example: `  drafter device inspect --package out/package --instance out/instance-0
  drafter device map --package out/package --instance out/instance-0 disk`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageErrorf("unknown command %q: use %s", args[0], verbs)
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return usageErrorf("say what to do: %s", verbs) },
	}
	flags := cmd.PersistentFlags()
	flags.StringVar(&source.devices, "devices", "", "devices of the instance, a JSON array as for drafter peer (default: out/package, with overlays in out/overlay and out/state)")
	flags.StringVar(&source.packagePath, "package", "", "folder of the package, instead of --devices")
	flags.StringVar(&source.instance, "instance", "", "with --package: folder of the instance's overlays")
	flags.StringSliceVar(&source.parents, "parent", nil, "with --instance: folder of an instance that this one goes on from; again for each, the oldest first")
	cmd.AddCommand(newInspectCommand(&source), newMapCommand(&source), newVerifyCommand(&source), newCommitCommand(&source), newRebaseCommand(&source))
	return cmd
}

// chosen are the devices that are named, in that order, or all.
func (s deviceSource) chosen(names []string) ([]peer.Device, error) {
	devices, err := s.open()
	if err != nil || len(names) == 0 {
		return devices, err
	}
	var known []string
	for _, d := range devices {
		known = append(known, d.Name)
	}
	var chosen []peer.Device
	for _, name := range names {
		i := slices.Index(known, name)
		if i < 0 {
			return nil, usageErrorf("there is no device %q: use %s", name, strings.Join(known, ", "))
		}
		if slices.Index(names, name) != len(chosen) {
			return nil, usageErrorf("device %q is named twice", name)
		}
		chosen = append(chosen, devices[i])
	}
	return chosen, nil
}

// isMade reports whether an overlay was made: both of its files are there, or none is.
func isMade(l runner.Layer) (bool, error) {
	_, err := os.Stat(l.State)
	if err == nil {
		return true, nil
	}
	if !errors.Is(err, os.ErrNotExist) {
		return false, err
	}
	if info, err := os.Stat(l.Overlay); err == nil && info.Size() > 0 {
		return false, fmt.Errorf("overlay %q exists without its state %q: restore the state, or delete the overlay to start afresh from the base", l.Overlay, l.State)
	}
	return false, nil
}

// top is the newest overlay of a device, which has one.
func top(d peer.Device) runner.Layer { return runner.Layer{Overlay: d.Overlay, State: d.State} }

// layers are the overlays of a device, the oldest first.
func layers(d peer.Device) []runner.Layer {
	all := slices.Clone(d.Beneath)
	if d.Overlay != "" {
		all = append(all, top(d))
	}
	return all
}

// deviceView is what inspect says of a device.
type deviceView struct {
	Name     string        `json:"name"`
	Size     int64         `json:"size"` // bytes
	Base     baseView      `json:"base"`
	Overlays []overlayView `json:"overlays,omitempty"` // the oldest first
}

type baseView struct {
	Path      string    `json:"path"`
	Allocated int64     `json:"allocated"` // bytes that it takes of its file system
	Modified  time.Time `json:"modified"`
}

type overlayView struct {
	Overlay   string     `json:"overlay"`
	State     string     `json:"state"`
	Missing   bool       `json:"missing,omitempty"` // it will be made when the instance is started
	BlockSize int64      `json:"blockSize,omitempty"`
	Blocks    int64      `json:"blocks,omitempty"`
	Held      int64      `json:"held"`
	Zero      int64      `json:"zero"`
	Allocated int64      `json:"allocated"`
	Modified  *time.Time `json:"modified,omitempty"` // when it was last written
	Flushed   *time.Time `json:"flushed,omitempty"`  // when blocks were last put on record
	Clean     bool       `json:"clean"`              // it was closed
	InUse     bool       `json:"inUse"`

	info *block.OverlayInfo
}

// view reads what there is to be said of a device.
func view(d peer.Device) (deviceView, error) {
	v := deviceView{Name: d.Name, Base: baseView{Path: d.Base}}
	base, err := block.OpenFile(d.Base, block.FileOptions{ReadOnly: true})
	if err != nil {
		return v, fmt.Errorf("device %q: %w", d.Name, err)
	}
	defer base.Close()
	info, err := os.Stat(d.Base)
	if err != nil {
		return v, fmt.Errorf("device %q: %w", d.Name, err)
	}
	v.Size, v.Base.Modified = base.Size(), info.ModTime()
	if info.Mode().IsRegular() {
		v.Base.Allocated = info.Sys().(*syscall.Stat_t).Blocks * 512
	}
	for _, l := range layers(d) {
		o := overlayView{Overlay: l.Overlay, State: l.State}
		if l.Overlay == d.Overlay {
			made, err := isMade(l)
			if err != nil {
				return v, fmt.Errorf("device %q: %w", d.Name, err)
			}
			if !made {
				o.Missing = true
				v.Overlays = append(v.Overlays, o)
				continue
			}
		}
		if o.info, err = block.InspectOverlay(l.Overlay, l.State); errors.Is(err, os.ErrNotExist) {
			return v, fmt.Errorf("device %q: %w: start its instance and close it, or correct the path", d.Name, err)
		} else if err != nil {
			return v, fmt.Errorf("device %q: %w", d.Name, err)
		}
		if o.info.Size != v.Size {
			return v, fmt.Errorf("device %q: overlay %q is of a device of %d bytes, the base %q has %d: they do not belong together", d.Name, l.Overlay, o.info.Size, d.Base, v.Size)
		}
		i := o.info
		o.BlockSize, o.Blocks, o.Held, o.Zero, o.Allocated, o.Clean, o.InUse = i.BlockSize, i.Blocks.Total, i.Blocks.Held, i.Blocks.Zero, i.Allocated, i.Clean, i.InUse
		o.Modified, o.Flushed = &i.Modified, &i.Flushed
		v.Overlays = append(v.Overlays, o)
	}
	return v, nil
}

// bytesText is a number of bytes for people.
func bytesText(n int64) string { return humanize.IBytes(uint64(n)) }

// text is what the overlay is, in a few words.
func (o overlayView) text() string {
	if o.Missing {
		return "not made yet"
	}
	s := fmt.Sprintf("%s blocks: %d held, %d zero, of %d; %s on disk; changed %s", bytesText(o.BlockSize), o.Held, o.Zero, o.Blocks, bytesText(o.Allocated), humanize.Time(*o.Modified))
	switch {
	case o.InUse:
		s += "; in use"
	case !o.Clean:
		s += "; not closed by its last user"
	}
	return s
}

func newInspectCommand(source *deviceSource) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "inspect [DEVICE…]",
		Short: "Say what devices consist of, how much their overlays hold, and since when",
		Long:  `Says what devices consist of: also while the instance runs; then it is what was flushed last.`,
		RunE: func(cmd *cobra.Command, names []string) error {
			devices, err := source.chosen(names)
			if err != nil {
				return err
			}
			views := []deviceView{}
			for _, d := range devices {
				v, err := view(d)
				if err != nil {
					return err
				}
				views = append(views, v)
			}
			out := cmd.OutOrStdout()
			if asJSON {
				text, err := json.MarshalIndent(views, "", "  ")
				if err == nil {
					_, err = fmt.Fprintf(out, "%s\n", text)
				}
				return err
			}
			w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
			for _, v := range views {
				fmt.Fprintf(w, "%s\t%s\n", v.Name, bytesText(v.Size))
				fmt.Fprintf(w, "  base\t%s\t%s on disk; changed %s\n", v.Base.Path, bytesText(v.Base.Allocated), humanize.Time(v.Base.Modified))
				for _, o := range v.Overlays {
					fmt.Fprintf(w, "  overlay\t%s\t%s\n", o.Overlay, o.text())
				}
			}
			return w.Flush()
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "say it in JSON")
	return cmd
}

// Cells of a map.
const (
	cellHole  = ' ' // nothing is there
	cellBelow = '·' // it is what is below
	cellZero  = '○' // all that is here of it was discarded
)

var cellLevels = []rune("▁▂▃▄▅▆▇█")

// drawing is a map of one layer of a device, cell by cell.
type drawing struct {
	size, cell int64
	held, zero []int64 // bytes, of each cell
	below      rune    // what a cell is in which there is nothing
}

func newDrawing(size, cell int64, below rune) *drawing {
	n := (size + cell - 1) / cell
	return &drawing{size: size, cell: cell, held: make([]int64, n), zero: make([]int64, n), below: below}
}

func (d *drawing) add(r block.Range, to []int64) {
	for off := r.Offset; off < r.End(); {
		i := off / d.cell
		end := min((i+1)*d.cell, r.End())
		to[i] += end - off
		off = end
	}
}

// rune is the picture of a cell.
func (d *drawing) rune(i int) rune {
	switch size := min(d.cell, d.size-int64(i)*d.cell); {
	case d.held[i] > 0:
		return cellLevels[min(int64(len(cellLevels))-1, d.held[i]*int64(len(cellLevels))/size)]
	case d.zero[i] > 0:
		return cellZero
	}
	return d.below
}

// write draws rows of cells, each with the offset that it begins at.
func (d *drawing) write(out io.Writer, width int) error {
	var b strings.Builder
	for start := 0; start < len(d.held); start += width {
		fmt.Fprintf(&b, "  %10s │", bytesText(int64(start)*d.cell))
		for i := start; i < start+width; i++ {
			if i < len(d.held) {
				b.WriteRune(d.rune(i))
			} else if len(d.held) > width {
				b.WriteByte(' ')
			}
		}
		b.WriteString("│\n")
	}
	_, err := io.WriteString(out, b.String())
	return err
}

// cellSize is how many bytes a cell of a map stands for, so that a device has no more than that many.
func cellSize(size, cells int64) int64 {
	cell := int64(block.PageSize)
	for cell*cells < size {
		cell *= 2
	}
	return cell
}

func newMapCommand(source *deviceSource) *cobra.Command {
	var width, rows int
	cmd := &cobra.Command{
		Use:   "map [DEVICE…]",
		Short: "Draw which parts of devices each of their overlays holds",
		Long: `Draws a map of each layer of a device: of the base, then of its overlays, the newest last. A cell stands for as many bytes as is said
above it; it is filled as far as the layer holds data there. · is what is below the overlay, ○ was discarded in it and reads as zero, and
where the base has nothing there is a blank.

What is drawn of an instance that runs is what was flushed last.`,
		RunE: func(cmd *cobra.Command, names []string) error {
			if width < 1 || width > 1000 || rows < 1 || rows > 1000 {
				return usageErrorf("--width %d and --rows %d: give 1 to 1000", width, rows)
			}
			devices, err := source.chosen(names)
			if err != nil {
				return err
			}
			for _, d := range devices {
				if err := drawDevice(cmd.Context(), cmd.OutOrStdout(), d, width, rows); err != nil {
					return err
				}
			}
			return nil
		},
	}
	cmd.Flags().IntVar(&width, "width", 64, "cells in a row")
	cmd.Flags().IntVar(&rows, "rows", 8, "most rows of a layer")
	return cmd
}

func drawDevice(ctx context.Context, out io.Writer, d peer.Device, width, rows int) error {
	v, err := view(d)
	if err != nil {
		return err
	}
	cell := cellSize(v.Size, int64(width)*int64(rows))
	fmt.Fprintf(out, "%s: %s, %s a cell\n", v.Name, bytesText(v.Size), bytesText(cell))
	base, err := block.OpenFile(d.Base, block.FileOptions{ReadOnly: true})
	if err != nil {
		return fmt.Errorf("device %q: %w", d.Name, err)
	}
	defer base.Close()
	picture := newDrawing(v.Size, cell, cellHole)
	for off := int64(0); ; {
		r, err := base.NextData(off)
		if err == io.EOF {
			break
		} else if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return fmt.Errorf("device %q: %w", d.Name, err)
		}
		picture.add(r, picture.held)
		off = r.End()
	}
	fmt.Fprintf(out, "base %s: %s on disk; changed %s\n", v.Base.Path, bytesText(v.Base.Allocated), humanize.Time(v.Base.Modified))
	if err := picture.write(out, width); err != nil {
		return err
	}
	for _, o := range v.Overlays {
		fmt.Fprintf(out, "overlay %s: %s\n", o.Overlay, o.text())
		if o.Missing {
			continue
		}
		picture := newDrawing(v.Size, cell, cellBelow)
		for r, held := range o.info.Changes() {
			if held {
				picture.add(r, picture.held)
			} else {
				picture.add(r, picture.zero)
			}
		}
		if err := picture.write(out, width); err != nil {
			return err
		}
	}
	return nil
}

// openAtRest opens a device that nothing uses, to be read alone.
func openAtRest(d peer.Device) (block.Device, *os.File, error) {
	lock, err := runner.LockFile(d.Base, false)
	if err != nil {
		return nil, nil, err
	}
	base, err := d.OpenBase()
	if err != nil {
		return nil, nil, errors.Join(err, lock.Close())
	}
	err = d.CheckWhole()
	made := false
	if err == nil && d.Overlay != "" {
		made, err = isMade(top(d))
	}
	if err != nil {
		return nil, nil, errors.Join(err, base.Close(), lock.Close())
	}
	if !made {
		return base, lock, nil // it will be
	}
	o, err := block.OpenOverlay(block.OverlayOptions{Base: base, BasePath: d.Base, Overlay: d.Overlay, State: d.State, ReadOnly: true})
	if err != nil {
		return nil, nil, errors.Join(err, base.Close(), lock.Close())
	}
	return o, lock, nil
}

func newVerifyCommand(source *deviceSource) *cobra.Command {
	return &cobra.Command{
		Use:   "verify [DEVICE…]",
		Short: "Check that the files of devices belong together, and read all of them",
		Long: `Checks that the files of each device are whole and belong together, and reads all that it consists of. Of a
--package whose manifest has digests it compares these, too. It says a digest of each device, which is the same for devices of the same
contents, on whatever host and in whatever layers; it finds accidents, not forgeries.

Something is wrong if the exit status is 1. The instance must not run.`,
		RunE: func(cmd *cobra.Command, names []string) error {
			devices, err := source.chosen(names)
			if err != nil {
				return err
			}
			if err := atRest(*source); err != nil {
				return err
			}
			var wrong []error
			bar := newStageBar(cmd.ErrOrStderr())
			defer bar.end()
			if source.packagePath != "" {
				if err := verifyManifest(cmd.Context(), source.packagePath, bar); err != nil {
					wrong = append(wrong, err)
				}
			}
			for _, d := range devices {
				digest, err := verifyDevice(cmd.Context(), d)
				if err != nil {
					wrong = append(wrong, fmt.Errorf("device %q: %w", d.Name, err))
					continue
				}
				fmt.Fprintf(cmd.OutOrStdout(), "%s: ok, digest %x\n", d.Name, digest)
			}
			return interrupted(cmd, errors.Join(wrong...))
		},
	}
}

// verifyManifest compares a package with the digests in its manifest, if it has any.
func verifyManifest(ctx context.Context, dir string, bar *stageBar) error {
	m, err := vmpackage.ReadManifest(ctx, dir)
	if err != nil || slices.ContainsFunc(m.Devices, func(d vmpackage.Device) bool { return d.SHA256 == "" }) {
		return err
	}
	_, err = vmpackage.Verify(ctx, dir, vmpackage.ExtractOptions{Progress: bar.show})
	bar.end()
	return err
}

func verifyDevice(ctx context.Context, d peer.Device) (_ [16]byte, err error) {
	device, lock, err := openAtRest(d)
	if err != nil {
		return [16]byte{}, err
	}
	defer func() { err = errors.Join(err, device.Close(), lock.Close()) }()
	return block.Digest(ctx, device)
}

// atRest refuses an instance that somebody runs.
func atRest(source deviceSource) error {
	devices, err := source.open()
	if err != nil {
		return err
	}
	var configs []runner.DeviceConfig
	for _, d := range devices {
		configs = append(configs, d.DeviceConfig)
	}
	if runner.Alive(configs) {
		return fmt.Errorf("%w: its peer, or the machine that a killed peer has left, runs it: end that first", runner.ErrAlive)
	}
	return nil
}

// mayChange refuses to change devices of an instance that somebody runs, or that is anything else than closed. Idle says that nobody uses them, which
// only the device of its state would tell.
func mayChange(source deviceSource, closed, idle bool) error {
	if err := atRest(source); err != nil {
		return err
	}
	devices, err := source.open()
	if err != nil || idle {
		return err
	}
	n := slices.IndexFunc(devices, func(d peer.Device) bool { return d.Name == runner.StateDevice })
	if n < 0 {
		return usageErrorf("--devices has no device %q, by which it is known whether a VM uses the others: name it, too, or give --idle if none does", runner.StateDevice)
	}
	if !closed {
		return nil
	}
	state, lock, err := openAtRest(devices[n])
	if err != nil {
		return fmt.Errorf("device %q: %w", runner.StateDevice, err)
	}
	defer lock.Close()
	defer state.Close()
	r, err := runner.ReadRecord(state)
	if err != nil {
		return fmt.Errorf("device %q: %w", runner.StateDevice, err)
	}
	if r.Status != runner.Saved && r.Status != runner.ShutDown {
		return fmt.Errorf("the instance is not closed: its record says %q; start it, and close it, first", r.Status)
	}
	return nil
}

func newCommitCommand(source *deviceSource) *cobra.Command {
	var all, idle bool
	cmd := &cobra.Command{
		Use:   "commit DEVICE… | --all",
		Short: "Write what the newest overlay of devices holds to what is below it, and empty it",
		Long: `Writes what the newest overlay of each device holds to what is below it: the base, or the overlay before it. The overlay is empty then,
and is kept. The device reads the same at every moment: what is cut short can be done again.

What else is over that base, or over that overlay, is worth nothing afterwards, and refuses to be started. To fold all of an instance into its
package, name all of its devices by --all: state, memory and disks belong together, and the instance has to be closed. A package that has been folded into has no digests
any more, as these would have to be worked out from all of it. One of which only a part could be folded is of use to this instance alone,
until that is done.`,
		Example: `  drafter device commit --package out/package --instance out/instance-0 --all`,
		RunE: func(cmd *cobra.Command, names []string) error {
			if all == (len(names) > 0) {
				return usageErrorf("name the devices to commit, or give --all")
			}
			devices, err := source.chosen(names)
			if err != nil {
				return err
			}
			if err := mayChange(*source, true, idle); err != nil {
				return err
			}
			if !all && source.packagePath != "" {
				if err := keepTogether(*source, devices); err != nil {
					return err
				}
			}
			bar := newStageBar(cmd.ErrOrStderr())
			defer bar.end()
			return interrupted(cmd, commitDevices(cmd, devices, all, bar))
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "commit all devices of the instance that have overlays")
	cmd.Flags().BoolVar(&idle, "idle", false, "believe that no VM uses these devices, and that what they hold is to be kept, whatever the instance's record says")
	return cmd
}

// below is the file that the newest overlay of a device is over.
func below(d peer.Device) string {
	if n := len(d.Beneath); n > 0 {
		return d.Beneath[n-1].Overlay
	}
	return d.Base
}

// keepTogether refuses to commit a part of what makes a VM: the package would be one of two moments.
func keepTogether(source deviceSource, chosen []peer.Device) error {
	devices, err := source.open()
	if err != nil {
		return err
	}
	for _, d := range devices {
		if slices.ContainsFunc(chosen, func(c peer.Device) bool { return c.Name == d.Name }) {
			continue
		}
		v, err := view(d)
		if err != nil {
			return err
		}
		for _, o := range v.Overlays {
			if o.Overlay == d.Overlay && o.Held+o.Zero > 0 {
				return usageErrorf("device %q has changes, too, and the package would be of two moments without them: give --all, or, if that is meant, name files by --devices", d.Name)
			}
		}
	}
	return nil
}

// commitDevices folds the newest overlays of devices into what is below them. All are opened before the first is changed, so that what is in the way of
// one keeps the others as they are.
func commitDevices(cmd *cobra.Command, devices []peer.Device, all bool, bar *stageBar) (err error) {
	var opened []*committing
	defer func() {
		for _, c := range opened {
			err = errors.Join(err, c.close())
		}
	}()
	for _, d := range devices {
		if d.Overlay == "" && all {
			continue // it has nothing to fold
		}
		c, err := openCommit(d)
		if err != nil {
			return fmt.Errorf("device %q: %w", d.Name, err)
		}
		if c != nil {
			opened = append(opened, c)
		} else if !all {
			fmt.Fprintf(cmd.OutOrStdout(), "%s: its overlay holds nothing\n", d.Name)
		}
	}
	packages := make(map[string]bool)
	for _, c := range opened {
		// Digests go before anything that they are of changes, as what is cut short is to have none, too.
		dir := filepath.Dir(c.device.Base)
		if _, err := os.Stat(filepath.Join(dir, vmpackage.ManifestFile)); err == nil && len(c.device.Beneath) == 0 && !packages[dir] {
			packages[dir] = true
			if err := peer.CheckCommit(dir, devices); err != nil {
				return err
			}
			if err := markCommit(dir, opened); err != nil {
				return err
			}
			if err := refreshManifest(cmd.Context(), dir); err != nil {
				return err
			}
		}
	}
	if len(opened) == 0 && len(devices) > 0 { // of one that was cut short at its very end
		dir := filepath.Dir(devices[0].Base)
		if err := peer.CheckCommit(dir, devices); err != nil {
			return err
		}
		if err := os.Remove(filepath.Join(dir, peer.CommitMark)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	for _, c := range opened {
		n := int64(0)
		err := c.overlay.Commit(cmd.Context(), func(done, total int64) {
			n = total
			bar.show(vmpackage.Progress{Stage: vmpackage.Stage("commit " + c.device.Name), Done: done, Total: total})
		})
		bar.end()
		if err != nil {
			return fmt.Errorf("device %q: %w: what was below it is changed in part, and of use to this instance only, until the same command is done again", c.device.Name, err)
		}
		fmt.Fprintf(cmd.OutOrStdout(), "%s: %s written to %s\n", c.device.Name, bytesText(n), below(c.device))
	}
	for dir := range packages {
		if err := os.Remove(filepath.Join(dir, peer.CommitMark)); err != nil {
			return err
		}
	}
	return nil
}

// markCommit marks a package as one into which overlays are being folded. Those of a commit that was cut short before are so still.
func markCommit(dir string, opened []*committing) error {
	f, err := os.OpenFile(filepath.Join(dir, peer.CommitMark), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	for _, c := range opened {
		path, err := filepath.Abs(c.device.Overlay)
		if err == nil {
			_, err = fmt.Fprintln(f, url.PathEscape(path))
		}
		if err != nil {
			return errors.Join(err, f.Close())
		}
	}
	return errors.Join(f.Sync(), f.Close())
}

// committing is a device whose newest overlay is about to be folded.
type committing struct {
	device  peer.Device
	overlay *block.Overlay
	lock    *os.File
}

func (c *committing) close() error { return errors.Join(c.overlay.Close(), c.lock.Close()) }

// openCommit opens a device to be folded; nil if there is nothing to fold.
func openCommit(d peer.Device) (_ *committing, err error) {
	if d.Overlay == "" {
		return nil, errors.New("it has no overlay to commit")
	}
	if made, err := isMade(top(d)); err != nil || !made {
		return nil, err
	}
	info, err := block.InspectOverlay(d.Overlay, d.State)
	if err != nil || info.Blocks.Held+info.Blocks.Zero == 0 {
		return nil, err
	}
	if err := d.CheckWhole(); err != nil {
		return nil, err
	}
	c := &committing{device: d}
	if c.lock, err = runner.LockFile(d.Base, len(d.Beneath) == 0); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.lock.Close())
		}
	}()
	var base block.Device
	if n := len(d.Beneath); n == 0 {
		base, err = block.OpenFile(d.Base, block.FileOptions{})
	} else {
		to := d.DeviceConfig
		to.Overlay, to.State, to.Beneath = d.Beneath[n-1].Overlay, d.Beneath[n-1].State, d.Beneath[:n-1]
		base, err = openOverlay(to, block.OverlayOptions{})
	}
	if err != nil {
		return nil, err
	}
	if c.overlay, err = block.OpenOverlay(block.OverlayOptions{Base: base, BasePath: d.Base, Overlay: d.Overlay, State: d.State}); err != nil {
		return nil, errors.Join(err, base.Close())
	}
	return c, nil
}

// openOverlay opens the newest overlay of a device to be written.
func openOverlay(c runner.DeviceConfig, opts block.OverlayOptions) (*block.Overlay, error) {
	if err := c.CheckWhole(); err != nil {
		return nil, err
	}
	base, err := c.OpenBase()
	if err != nil {
		return nil, err
	}
	opts.Base, opts.BasePath, opts.Overlay, opts.State = base, c.Base, c.Overlay, c.State
	o, err := block.OpenOverlay(opts)
	if err != nil {
		return nil, errors.Join(err, base.Close())
	}
	return o, nil
}

func newRebaseCommand(source *deviceSource) *cobra.Command {
	var all, same, idle bool
	var to, toPackage string
	cmd := &cobra.Command{
		Use:   "rebase DEVICE… | --all",
		Short: "Put the newest overlay of devices over another base, with the contents as they are",
		Long: `Puts the newest overlay of each device over another file, without overlays between: --to gives the file for one device, --to-package a
package for all that are named. The device reads the same before and after: where what it was over and the new base differ, the overlay
holds the former from then on. What is cut short leaves the overlay over what it was over.

With --same-contents nothing is compared, and the overlay believes that its base is what it was: for a base that was copied, or touched. If it
is not the same, the guest reads what never was. Without --to and --to-package that is about the base as it is given now.`,
		Example: `  drafter device rebase --package out/package --instance out/instance-0 --all --to-package out/package-2
  drafter device rebase --package out/copied --instance out/instance-0 --all --same-contents`,
		RunE: func(cmd *cobra.Command, names []string) error {
			switch {
			case all == (len(names) > 0):
				return usageErrorf("name the devices to rebase, or give --all")
			case to != "" && toPackage != "":
				return usageErrorf("--to and --to-package exclude each other: the one is a file, the other a folder")
			case to == "" && toPackage == "" && !same:
				return usageErrorf("say what to put the overlay over: --to FILE, or --to-package DIR")
			case to != "" && (all || len(names) != 1):
				return usageErrorf("--to %q is the base of one device: name one, or use --to-package", to)
			}
			devices, err := source.chosen(names)
			if err != nil {
				return err
			}
			if err := mayChange(*source, false, idle); err != nil {
				return err
			}
			if all {
				devices = slices.DeleteFunc(devices, func(d peer.Device) bool { return d.Overlay == "" })
			}
			bases := make(map[string]string)
			switch {
			case to != "":
				bases[devices[0].Name] = to
			case toPackage != "":
				others, err := packageDevices(toPackage, "", nil)
				if err != nil {
					return usageErrorf("--to-package: %w", err)
				}
				for _, d := range others {
					bases[d.Name] = d.Base
				}
			}
			for _, d := range devices {
				if err := checkRebase(d, bases[d.Name], to == "" && toPackage == ""); err != nil {
					return fmt.Errorf("device %q: %w", d.Name, err)
				}
			}
			bar := newStageBar(cmd.ErrOrStderr())
			defer bar.end()
			for _, d := range devices {
				base := bases[d.Name]
				done, err := rebaseDevice(cmd.Context(), d, base, same, bar)
				bar.end()
				if err != nil {
					return interrupted(cmd, fmt.Errorf("device %q: %w", d.Name, err))
				}
				if base == "" {
					base = below(d)
				}
				if done {
					fmt.Fprintf(cmd.OutOrStdout(), "%s: %s is over %s now\n", d.Name, d.Overlay, base)
				} else if !all {
					fmt.Fprintf(cmd.OutOrStdout(), "%s: its overlay is not made yet\n", d.Name)
				}
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "rebase all devices of the instance")
	cmd.Flags().StringVar(&to, "to", "", "file to put the overlay of one device over")
	cmd.Flags().StringVar(&toPackage, "to-package", "", "folder of a package to put the overlays over")
	cmd.Flags().BoolVar(&idle, "idle", false, "believe that no VM uses these devices, where the device of its state is not among them")
	cmd.Flags().BoolVar(&same, "same-contents", false, "believe that the new base holds what the old one did")
	return cmd
}

// checkRebase fails if a device could not be put over the file to, or, if asIs, over what it is said to be over.
func checkRebase(d peer.Device, to string, asIs bool) error {
	if d.Overlay == "" {
		return errors.New("it has no overlay to rebase")
	}
	if _, err := isMade(top(d)); err != nil || asIs {
		return err
	}
	if to == "" {
		return errors.New("--to-package has none of that name")
	}
	was, err := block.OpenFile(d.Base, block.FileOptions{ReadOnly: true})
	if err != nil {
		return err
	}
	defer was.Close()
	is, err := block.OpenFile(to, block.FileOptions{ReadOnly: true})
	if err != nil {
		return err
	}
	defer is.Close()
	if was.Size() != is.Size() {
		return fmt.Errorf("%q has %d bytes, the device has %d: give one of the same size", to, is.Size(), was.Size())
	}
	return nil
}

// rebaseDevice puts the newest overlay of a device over the file to, or, if that is empty, over what it is said to be over. It reports
// whether there was an overlay.
func rebaseDevice(ctx context.Context, d peer.Device, to string, same bool, bar *stageBar) (done bool, err error) {
	if made, err := isMade(top(d)); err != nil || !made {
		return false, err
	}
	onto := d.DeviceConfig
	if to != "" {
		onto.Base, onto.Beneath = to, nil
	}
	for _, path := range slices.Compact([]string{filepath.Clean(d.Base), filepath.Clean(onto.Base)}) {
		lock, err := runner.LockFile(path, false)
		if err != nil {
			return false, err
		}
		defer lock.Close()
	}
	// It may be over that already, by a command that came no further than this device.
	if o, err := openOverlay(onto, block.OverlayOptions{}); err == nil {
		return true, o.Close()
	}
	base, err := onto.OpenBase()
	if err != nil {
		return false, err
	}
	owned := false
	defer func() {
		if !owned {
			err = errors.Join(err, base.Close())
		}
	}()
	o, err := openOverlay(d.DeviceConfig, block.OverlayOptions{AnyBase: same})
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, o.Close()) }()
	err = o.Rebase(ctx, block.RebaseOptions{
		Base: base, BasePath: onto.Base, SameContents: same,
		Progress: func(done, total int64) {
			bar.show(vmpackage.Progress{Stage: vmpackage.Stage("rebase " + d.Name), Done: done, Total: total})
		},
	})
	owned = err == nil
	return err == nil, err
}
