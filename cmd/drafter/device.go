package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
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

// chosen are the devices that are named, in that order, or all, and all.
func (s deviceSource) chosen(names []string) (chosen, all []peer.Device, err error) {
	all, err = s.open()
	if err != nil || len(names) == 0 {
		return all, all, err
	}
	var known []string
	for _, d := range all {
		known = append(known, d.Name)
	}
	for _, name := range names {
		i := slices.Index(known, name)
		if i < 0 {
			return nil, nil, usageErrorf("there is no device %q: use %s", name, strings.Join(known, ", "))
		}
		if slices.Index(names, name) != len(chosen) {
			return nil, nil, usageErrorf("device %q is named twice", name)
		}
		chosen = append(chosen, all[i])
	}
	return chosen, all, nil
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
			devices, _, err := source.chosen(names)
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

// openAtRest opens a device that nothing uses, to be read alone.
func openAtRest(d peer.Device) (device block.Device, lock *os.File, err error) {
	if lock, err = runner.LockFile(d.Base, false); err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, lock.Close())
		}
	}()
	made := false
	if d.Overlay != "" {
		if made, err = isMade(top(d)); err != nil {
			return nil, nil, err
		}
	}
	if made {
		device, err = openOverlay(d.DeviceConfig, block.OverlayOptions{ReadOnly: true})
	} else if err = d.CheckWhole(); err == nil {
		device, err = d.OpenBase()
	}
	return device, lock, err
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
			devices, all, err := source.chosen(names)
			if err == nil {
				err = peer.CheckAtRest(all)
			}
			if err != nil {
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
