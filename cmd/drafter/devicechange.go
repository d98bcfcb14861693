package main

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"slices"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/peer"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
	"github.com/spf13/cobra"
)

// mayChange refuses to change devices of an instance that somebody runs, or that is anything else than closed. Idle says that nobody uses them, which
// only the device of its state would tell.
func mayChange(devices []peer.Device, closed, idle bool) error {
	if err := peer.CheckAtRest(devices); err != nil || idle {
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
			devices, instance, err := source.chosen(names)
			if err == nil {
				err = mayChange(instance, true, idle)
			}
			if err == nil && !all && source.packagePath != "" {
				err = keepTogether(instance, devices)
			}
			if err != nil {
				return err
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
func keepTogether(devices, chosen []peer.Device) error {
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
	packages := make(map[string]bool) // those that are folded into, and whether anything is to be
	for _, d := range devices {
		dir := filepath.Dir(d.Base)
		if _, err := os.Stat(filepath.Join(dir, vmpackage.ManifestFile)); err == nil && d.Overlay != "" && len(d.Beneath) == 0 {
			packages[dir] = packages[dir] || slices.ContainsFunc(opened, func(c *committing) bool { return c.device.Name == d.Name })
		}
	}
	for dir, changes := range packages {
		err := peer.CheckCommit(dir, devices)
		if err == nil && changes {
			// Digests go before anything that they are of changes, as what is cut short is to have none, too.
			if err = markCommit(dir, opened); err == nil {
				err = refreshManifest(cmd.Context(), dir)
			}
		}
		if err != nil {
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
		if err := os.Remove(filepath.Join(dir, peer.CommitMark)); err != nil && !errors.Is(err, os.ErrNotExist) {
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

// openOverlay opens the newest overlay of a device that is whole.
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
			devices, instance, err := source.chosen(names)
			if err == nil {
				err = mayChange(instance, false, idle)
			}
			if err != nil {
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
