package depot

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/objstore"
	"github.com/drafter-vm/drafter/pkg/peer"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
)

// images is the folder of the roots of images.
const images = "images"

// versionTime makes names of versions, which sort by time, and copyMark ends those of copies of a VM that runs.
const (
	versionTime = "20060102T150405.000Z"
	copyMark    = "-copy"
)

// ErrNoImage is wrapped by the error of opening an image, or a version of it, that is not there.
var ErrNoImage = errors.New("there is no such image")

// Image names an image and its versions.
type Image struct {
	Name     string
	Versions []string // the oldest first
}

// Images lists the images in a store.
func Images(ctx context.Context, store *objstore.Store) ([]Image, error) {
	roots, err := store.Roots(ctx, images)
	if err != nil {
		return nil, err
	}
	var list []Image
	for _, r := range roots {
		if len(r) != 2 {
			continue
		}
		if n := len(list); n == 0 || list[n-1].Name != r[0] {
			list = append(list, Image{Name: r[0]})
		}
		last := &list[len(list)-1]
		last.Versions = append(last.Versions, r[1])
	}
	return list, nil
}

// versions are those of one image, the oldest first.
func versions(ctx context.Context, store *objstore.Store, name string) ([]string, error) {
	roots, err := store.Roots(ctx, images, name)
	if err != nil {
		return nil, err
	}
	var list []string
	for _, r := range roots {
		list = append(list, r[0])
	}
	return list, nil
}

// Remove removes a version of an image, or all of them if version is empty, and says how many there were.
func Remove(ctx context.Context, store *objstore.Store, name, version string) (int, error) {
	list, err := versions(ctx, store, name)
	if err != nil {
		return 0, err
	}
	if version != "" {
		if !slices.Contains(list, version) {
			return 0, fmt.Errorf("remove version %q of image %q: %w", version, name, ErrNoImage)
		}
		list = []string{version}
	}
	if len(list) == 0 {
		return 0, fmt.Errorf("remove image %q: %w", name, ErrNoImage)
	}
	for _, v := range list {
		if err := store.RemoveRoot(ctx, images, name, v); err != nil {
			return 0, err
		}
	}
	return len(list), nil
}

// body is what a root says of an image beside its devices.
type body struct {
	Taken time.Time `json:"taken"`           // when the VM was as the image is
	Every string    `json:"every,omitempty"` // how often a newer version is to follow, of a VM that runs
}

// Version is a version of an image: a VM that was saved.
type Version struct {
	Name, ID string
	Taken    time.Time     // when the VM was as the image is
	Every    time.Duration // how often a newer version was to follow; 0: none
	Newest   time.Time     // when the newest copy of the VM was put, or this version if there is none; and Every is of that
	Devices  []objstore.RootDevice

	Loaded bool // what the store says of it is known

	store  *objstore.Store
	log    *slog.Logger
	put    time.Time       // when the version was put
	body   json.RawMessage // of its root
	origin *peer.Origin
}

// Open finds a version of an image; the newest if version is empty. It fetches nothing of its content.
func Open(ctx context.Context, store *objstore.Store, name, version string, log *slog.Logger) (*Version, error) {
	list, err := versions(ctx, store, name)
	if err != nil {
		return nil, fmt.Errorf("open image %q: %w", name, err)
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("open image %q: %w in %v: drafter store list says which there are", name, ErrNoImage, store.Location())
	}
	newest := list[len(list)-1]
	v := At(store, name, cmp.Or(version, newest), log)
	if err := v.Load(ctx); err != nil {
		return nil, err
	}
	v.Newest = v.put
	for _, other := range slices.Backward(list) {
		if strings.HasSuffix(other, copyMark) {
			n := At(store, name, other, log)
			if err := n.Load(ctx); err != nil {
				return nil, err
			}
			v.Newest, v.Every = n.put, n.Every
			break
		}
	}
	return v, nil
}

// At is Open that asks the store nothing yet: for a VM that was received from that version before. Of the Version only Name and ID are set.
func At(store *objstore.Store, name, version string, log *slog.Logger) *Version {
	if log == nil {
		log = slog.Default()
	}
	v := &Version{Name: name, ID: version, store: store, log: log}
	v.origin = peer.NewOrigin(v.open, log)
	return v
}

// Reopen is Open of the version, which uses its store.
func (v *Version) Reopen(ctx context.Context) (*Version, error) {
	other, err := Open(ctx, v.store, v.Name, v.ID, v.log)
	if errors.Is(err, ErrNoImage) { // it was removed, and may be on its way to somebody
		other = At(v.store, v.Name, v.ID, v.log)
		err = other.Load(ctx)
		other.Newest = other.put
	}
	return other, err
}

// Load gets what the store says of the version. Nobody else may use it meanwhile.
func (v *Version) Load(ctx context.Context) error {
	root, err := v.store.GetRoot(ctx, images, v.Name, v.ID)
	if errors.Is(err, objstore.ErrNotFound) { // it was removed, and may be on its way to somebody
		if fetched, e := v.store.GetRoot(ctx, fetches, v.Name, v.ID); e == nil {
			root, err = fetched, nil
		}
	}
	if errors.Is(err, objstore.ErrNotFound) {
		return fmt.Errorf("open version %q of image %q: %w in %v: drafter store list says which there are", v.ID, v.Name, ErrNoImage, v.store.Location())
	}
	var b body
	if err == nil {
		err = json.Unmarshal(root.Body, &b)
	}
	var every time.Duration
	if err == nil && b.Every != "" {
		every, err = time.ParseDuration(b.Every)
	}
	if err == nil {
		for _, d := range root.Devices {
			if err = vmpackage.CheckName(d.Name); err != nil {
				break
			}
		}
	}
	if err != nil {
		return fmt.Errorf("open version %q of image %q: %w", v.ID, v.Name, err)
	}
	v.Taken, v.Every, v.Devices, v.Loaded, v.put, v.body = b.Taken, every, root.Devices, true, root.Time, root.Body
	return nil
}

// OpenDevices returns the devices of the version, each to be read until ctx ends, and to be closed.
func (v *Version) OpenDevices(ctx context.Context) ([]peer.Image, error) {
	return v.openDevices(ctx, ctx)
}

// openDevices opens devices that can be read until the context for that ends.
func (v *Version) openDevices(ctx, reading context.Context) (_ []peer.Image, err error) {
	var list []peer.Image
	defer func() {
		if err != nil {
			for _, i := range list {
				_ = i.Device.Close()
			}
			err = fmt.Errorf("open devices of image %q: %w", v.Name, err)
		}
	}()
	for _, d := range v.Devices {
		id, err := objstore.ParseID(d.List)
		if err != nil {
			return nil, err
		}
		l, err := v.store.GetList(ctx, id, d.Size)
		if err != nil {
			return nil, fmt.Errorf("device %q: %w", d.Name, err)
		}
		image, err := v.store.OpenImage(reading, l)
		if err != nil {
			return nil, fmt.Errorf("device %q: %w", d.Name, err)
		}
		list = append(list, peer.Image{Name: d.Name, Device: image, ID: d.List})
	}
	return list, nil
}

// Dial returns streams to a source of the VM in this process, for [peer.Receive]: the VM runs as soon as it has the state of its machine, and the
// rest is fetched from the store when the guest touches it, and behind it.
func (v *Version) Dial(ctx context.Context) ([]io.ReadWriter, error) {
	return v.dialled(v.origin.Dial(ctx))
}

// Redial is Dial for a VM that was received from here, has lost its source, and lacks something: see peer.Config.FindSource. A Version in another process
// will do.
func (v *Version) Redial(ctx context.Context) ([]io.ReadWriter, error) {
	return v.dialled(v.origin.Redial(ctx))
}

func (v *Version) dialled(streams []io.ReadWriter, err error) ([]io.ReadWriter, error) {
	if err != nil {
		return nil, fmt.Errorf("open image %q: %w", v.Name, err)
	}
	return streams, nil
}

// open opens the devices for a source in this process.
func (v *Version) open(ctx, reading context.Context) ([]peer.Image, error) {
	if !v.Loaded {
		if err := v.Load(ctx); err != nil {
			return nil, err
		}
	}
	devices, err := v.openDevices(ctx, reading)
	if err != nil {
		return nil, err
	}
	// Whatever becomes of the version meanwhile, what it refers to stays for as long as it may be fetched.
	end := time.Now().Add(fetchLife).UTC()
	if err := v.store.PutRoot(ctx, &objstore.Root{Time: v.put, Expires: &end, Devices: v.Devices, Body: v.body}, fetches, v.Name, v.ID); err != nil {
		v.log.Warn("what is fetched may become garbage, if it takes for days and its version is removed", "image", v.Name, "error", err)
	}
	return devices, nil
}

// What is being fetched has roots in the folder fetches, which hold for fetchLife.
const (
	fetches   = "fetch"
	fetchLife = 48 * time.Hour
)

// Close waits until whoever has dialled has everything, and lets go of the store. When ctx ends it does not wait any more.
func (v *Version) Close(ctx context.Context) error { return v.origin.Close(ctx) }

// PushOptions say how a package is pushed.
type PushOptions struct {
	// Progress is told of each device how much of it was looked at, and how much of that was not in the store. Nil is allowed.
	Progress func(device string, done, put int64)
}

// Push puts a package, in a folder, as a version of an image, and returns that.
func Push(ctx context.Context, store *objstore.Store, dir, name string, opts PushOptions) (version string, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("push package %q: %w", dir, err)
		}
	}()
	if err := objstore.CheckName(name); err != nil {
		return "", err
	}
	pkg, err := vmpackage.Open(dir)
	if err != nil {
		return "", err
	}
	root := &objstore.Root{}
	for _, d := range pkg.Devices {
		list, size, err := pushFile(ctx, store, d.Path, func(done, put int64) {
			if opts.Progress != nil {
				opts.Progress(d.Name, done, put)
			}
		})
		if err != nil {
			return "", fmt.Errorf("device %q: %w", d.Name, err)
		}
		root.Devices = append(root.Devices, objstore.RootDevice{Name: d.Name, Size: size, List: list.String()})
	}
	if root.Device(runner.StateDevice) == nil || root.Device(runner.ConfigDevice) == nil || root.Device(runner.MemoryDevice) == nil {
		return "", fmt.Errorf("it has no device %q, %q or %q: only a VM that was saved can be started from a store", runner.StateDevice, runner.MemoryDevice, runner.ConfigDevice)
	}
	return putVersion(ctx, store, name, root, body{Taken: time.Now().UTC()})
}

// pushFile puts a file, which nobody may write to meanwhile.
func pushFile(ctx context.Context, store *objstore.Store, path string, progress func(done, put int64)) (_ objstore.ID, size int64, err error) {
	lock, err := runner.LockFile(path, false)
	if err != nil {
		return objstore.None, 0, err
	}
	defer lock.Close()
	f, err := block.OpenFile(path, block.FileOptions{ReadOnly: true})
	if err != nil {
		return objstore.None, 0, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	id, err := putDevice(ctx, store, f, objstore.PutOptions{Progress: progress})
	return id, f.Size(), err
}

// putDevice puts what a device holds, and the list of it.
func putDevice(ctx context.Context, store *objstore.Store, d block.Device, opts objstore.PutOptions) (objstore.ID, error) {
	l, err := store.PutDevice(ctx, d, opts)
	if err != nil {
		return objstore.None, err
	}
	return store.PutList(ctx, l)
}

// putVersion puts the root of a version, all of whose content is there.
func putVersion(ctx context.Context, store *objstore.Store, name string, root *objstore.Root, b body) (version string, err error) {
	root.Time = time.Now().UTC()
	if root.Body, err = json.Marshal(b); err != nil {
		return "", err
	}
	list, err := versions(ctx, store, name)
	if err != nil {
		return "", err
	}
	at := b.Taken.UTC()
	if n := len(list); n > 0 {
		// Whatever the clocks of those say that have put versions: the newest is the last.
		stamp, _, _ := strings.Cut(list[n-1], "-")
		if last, err := time.Parse(versionTime, stamp); err == nil && !at.Truncate(time.Millisecond).After(last) {
			at = last.Add(time.Millisecond)
		}
	}
	if version = at.Format(versionTime); b.Every != "" {
		version += copyMark
	}
	return version, store.PutRoot(ctx, root, images, name, version)
}
