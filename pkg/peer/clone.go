package peer

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
)

// PackageDevices are the devices of the package in folder dir, for an instance of it: what that changes goes to overlays in the
// folder instance, which is made when it is needed. All devices have one, as a migration writes to each. With an empty instance
// there are no overlays, and the package itself changes. Parents are the folders of instances, the oldest first, that this one goes on
// from: they were closed, each is over those before it, and none may be started again as long as this one is wanted. Migration policies are
// left to Config.Goal.
func PackageDevices(dir, instance string, parents ...string) ([]Device, error) {
	pkg, err := vmpackage.Open(dir)
	if err != nil {
		return nil, err
	}
	var devices []Device
	for _, d := range pkg.Devices {
		device := Device{DeviceConfig: runner.DeviceConfig{Name: d.Name, Base: d.Path}, Policy: migrate.Policy{ByGoal: true}}
		if instance != "" {
			own := instanceLayer(instance, d.Path)
			device.Overlay, device.State = own.Overlay, own.State
		}
		for _, parent := range parents {
			device.Beneath = append(device.Beneath, instanceLayer(parent, d.Path))
		}
		devices = append(devices, device)
	}
	return devices, CheckCommit(dir, devices)
}

// CommitMark is the file of a package that lists the overlays which are being folded into it, while they are: then the package is of more moments than
// one, and of use to their instance alone.
const CommitMark = ".commit"

// CheckCommit refuses a package, in folder dir, into which the overlays of another instance than that of the devices were being folded when that was cut
// short.
func CheckCommit(dir string, devices []Device) error {
	mark, err := os.ReadFile(filepath.Join(dir, CommitMark))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	overlays := strings.Fields(string(mark))
	for _, d := range devices {
		if path, err := filepath.Abs(d.Overlay); err == nil && d.Overlay != "" && slices.Contains(overlays, url.PathEscape(path)) {
			return nil
		}
	}
	of := ""
	if len(overlays) > 0 {
		of, _ = url.PathUnescape(overlays[0])
	}
	return fmt.Errorf("package %q: a commit to it, of overlay %q and those beside it, was cut short, and until it is done again (drafter device commit) it is of use to that instance only", dir, of)
}

// instanceLayer is where the instance in a folder has the overlay of a package's file.
func instanceLayer(instance, file string) runner.Layer {
	return runner.Layer{Overlay: filepath.Join(instance, "overlay", filepath.Base(file)), State: filepath.Join(instance, "state", filepath.Base(file))}
}

// Clone makes a second VM of this one, which runs on: it is written down as a package in dir/package, as by [Peer.Snapshot], and
// resumed from there with overlays in dir/instance. dir must not exist (the error
// wraps fs.ErrExist), and belongs to the clone from then on. Of cfg, Devices is set
// here, and Clone, which tells the guest's agents of it; its Host must differ where the two would meet: in Netns, or Interface. When
// it fails nothing is left of it.
//
// For many clones of one state take one Snapshot, and Resume each from that.
func (p *Peer) Clone(ctx context.Context, dir string, cfg Config) (clone *Peer, err error) {
	made, err := runner.MakeFolders(dir, 0o700)
	if err == nil && len(made) == 0 {
		err = fmt.Errorf("%q: %w: nothing is overwritten: choose another folder", dir, fs.ErrExist)
	}
	defer func() {
		if err != nil {
			if len(made) > 0 {
				err = errors.Join(err, os.RemoveAll(dir))
			}
			runner.RemoveFolders(made)
			err = fmt.Errorf("clone VM: %w", err)
		}
	}()
	if err != nil {
		return nil, err
	}
	if _, _, err := p.Snapshot(ctx, filepath.Join(dir, "package")); err != nil {
		return nil, err
	}
	if cfg.Devices, err = PackageDevices(filepath.Join(dir, "package"), filepath.Join(dir, "instance")); err != nil {
		return nil, err
	}
	cfg.Clone = true
	return Resume(ctx, cfg)
}
