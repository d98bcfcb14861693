package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/drafter-vm/drafter/pkg/depot"
	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/objstore"
	"github.com/drafter-vm/drafter/pkg/peer"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
)

// peerDevice is an element of the peer's --devices. Durations are nanoseconds.
type peerDevice struct {
	Name    string `json:"name"`
	Base    string `json:"base"`
	Overlay string `json:"overlay"`
	State   string `json:"state"`

	// Overlays are instead of overlay and state, where there are several: the last is written.
	Overlays []peerLayer `json:"overlays"`

	BlockSize int64         `json:"blockSize"`
	Expiry    time.Duration `json:"expiry"`

	// Without all four, --max-downtime and --max-total-time decide; all four zero disable pre-copy.
	MaxDirtyBlocks *int64         `json:"maxDirtyBlocks"`
	MinCycles      *int           `json:"minCycles"`
	MaxCycles      *int           `json:"maxCycles"`
	CycleThrottle  *time.Duration `json:"cycleThrottle"`

	MakeMigratable *bool `json:"makeMigratable"`
	Shared         bool  `json:"shared"`
	SharedBase     bool  `json:"sharedbase"`

	// S3Sync has the device be kept in a store while it is used, and fetched from there. Without a bucket the store is that of --store, or the one that the
	// source names.
	S3Sync        bool   `json:"s3sync"`
	S3AccessKey   string `json:"s3accesskey"`
	S3SecretKey   string `json:"s3secretkey"`
	S3Endpoint    string `json:"s3endpoint"`
	S3Secure      bool   `json:"s3secure"`
	S3Bucket      string `json:"s3bucket"`
	S3Prefix      string `json:"s3prefix"`
	S3Region      string `json:"s3region"`
	S3Concurrency int    `json:"s3concurrency"`
}

// peerLayer is an element of a device's overlays.
type peerLayer struct {
	Overlay string `json:"overlay"`
	State   string `json:"state"`
}

// device checks what one element says, and returns what it means.
func (d peerDevice) device() (peer.Device, error) {
	policy := migrate.Policy{
		ByGoal:    d.MaxDirtyBlocks == nil && d.MinCycles == nil && d.MaxCycles == nil && d.CycleThrottle == nil,
		BlockSize: d.BlockSize, MaxDirtyBlocks: orZero(d.MaxDirtyBlocks), MinCycles: orZero(d.MinCycles), MaxCycles: orZero(d.MaxCycles),
		CycleThrottle: orZero(d.CycleThrottle), Expiry: d.Expiry,
	}
	for _, v := range []struct {
		key   string
		value int64
	}{
		{"expiry", int64(policy.Expiry)}, {"maxDirtyBlocks", policy.MaxDirtyBlocks}, {"minCycles", int64(policy.MinCycles)},
		{"maxCycles", int64(policy.MaxCycles)}, {"cycleThrottle", int64(policy.CycleThrottle)},
	} {
		if v.value < 0 {
			return peer.Device{}, usageErrorf("--devices: device %q: key %q is %d: it cannot be negative", d.Name, v.key, v.value)
		}
	}
	if policy.MaxCycles != 0 && policy.MinCycles > policy.MaxCycles {
		return peer.Device{}, usageErrorf("--devices: device %q: minCycles is %d and maxCycles %d: give a maximum that is not below the minimum", d.Name, policy.MinCycles, policy.MaxCycles)
	}
	device := peer.Device{
		DeviceConfig: runner.DeviceConfig{Name: d.Name, Base: d.Base, Overlay: d.Overlay, State: d.State, BlockSize: d.BlockSize},
		Policy:       policy,
		Stationary:   d.MakeMigratable != nil && !*d.MakeMigratable,
	}
	device.Shared, device.SharedBase = d.Shared, d.SharedBase
	for _, l := range append([]peerLayer{{d.Overlay, d.State}}, d.Overlays...) {
		if _, err := os.Stat(l.State); d.Shared && err == nil {
			return peer.Device{}, usageErrorf("--devices: device %q is shared, and there is an overlay of it (%q), which would not be looked at: remove that, or leave \"shared\" out", d.Name, l.Overlay)
		}
	}
	if d.Shared { // it is given as it is, and does not travel, but both hosts prove that they have the same
		device.Overlay, device.State, d.Overlays, device.Stationary = "", "", nil, false
	} else if d.SharedBase && d.Overlay == "" && len(d.Overlays) == 0 {
		return peer.Device{}, usageErrorf("--devices: device %q: \"sharedbase\" needs an overlay: without one the base is the device, and changes", d.Name)
	}
	if n := len(d.Overlays); n > 0 {
		if d.Overlay != "" || d.State != "" {
			return peer.Device{}, usageErrorf("--devices: device %q: key \"overlays\" excludes \"overlay\" and \"state\": put them at the end of the list", d.Name)
		}
		for _, l := range d.Overlays[:n-1] {
			device.Beneath = append(device.Beneath, runner.Layer(l))
		}
		device.Overlay, device.State = d.Overlays[n-1].Overlay, d.Overlays[n-1].State
		if device.Overlay == "" || device.State == "" {
			return peer.Device{}, usageErrorf("--devices: device %q: the last of \"overlays\" has overlay %q and state %q: give both", d.Name, device.Overlay, device.State)
		}
	}
	if err := device.Policy.Check(); err != nil {
		return peer.Device{}, usageErrorf("--devices: device %q: %w", d.Name, err)
	}
	return device, nil
}

// store is where a device with s3sync is kept.
func (d peerDevice) store(device peer.Device) (depot.DeviceConfig, error) {
	fail := func(format string, args ...any) (depot.DeviceConfig, error) {
		return depot.DeviceConfig{}, usageErrorf("--devices: device %q: %w", d.Name, fmt.Errorf(format, args...))
	}
	if device.Stationary || device.Shared || d.Name == runner.StateDevice {
		return fail("\"s3sync\" is for a device that travels while the instance runs: leave it out")
	}
	if d.S3Concurrency < 0 || d.S3Concurrency > 1024 {
		return fail("\"s3concurrency\" is %d: use 1 to 1024, or leave it out", d.S3Concurrency)
	}
	c := objstore.Config{AccessKey: d.S3AccessKey, SecretKey: d.S3SecretKey, Concurrency: d.S3Concurrency}
	c.Bucket, c.Prefix, c.Region = d.S3Bucket, d.S3Prefix, d.S3Region
	switch {
	case d.S3Endpoint == "":
	case strings.Contains(d.S3Endpoint, "://"):
		if d.S3Secure && !strings.HasPrefix(d.S3Endpoint, "https://") {
			return fail("\"s3secure\" is true, and \"s3endpoint\" is %s: make it https://, or leave \"s3secure\" out", objstore.Shown(d.S3Endpoint))
		}
		c.Endpoint = d.S3Endpoint
	case d.S3Secure:
		c.Endpoint = "https://" + d.S3Endpoint
	default:
		c.Endpoint = "http://" + d.S3Endpoint
	}
	if c.Bucket == "" {
		if c.AccessKey != "" || c.SecretKey != "" || c.Endpoint != "" || c.Prefix != "" {
			return fail("\"s3sync\" has an endpoint, prefix or credentials, and no \"s3bucket\": name it, or leave all of them out to use --store, or the store that the source names")
		}
		return depot.DeviceConfig{Store: c}, nil
	}
	fromEnvironment(&c.Location)
	if _, err := objstore.Open(c); err != nil {
		return fail("%w", err)
	}
	return depot.DeviceConfig{Store: c}, nil
}

// orZero is what p points to, if it does.
func orZero[T any](p *T) (v T) {
	if p != nil {
		v = *p
	}
	return v
}

// deviceSource is what the command line says of where the devices of an instance are.
type deviceSource struct {
	devices     string
	packagePath string
	instance    string
	parents     []string

	// stores are, once opened, the devices that are kept in a store by their own keys.
	stores map[string]depot.DeviceConfig
}

// open returns the devices of the instance, from --devices, or from --package and --instance, or the defaults.
func (s *deviceSource) open() ([]peer.Device, error) {
	switch {
	case s.devices != "" && (s.packagePath != "" || s.instance != "" || len(s.parents) > 0):
		return nil, usageErrorf("--devices excludes --package, --instance and --parent")
	case s.devices == "" && s.packagePath == "" && s.instance != "":
		return nil, usageErrorf("--instance %q needs --package: the package that it is an instance of", s.instance)
	case len(s.parents) > 0 && s.instance == "":
		return nil, usageErrorf("--parent %q needs --instance: the folder for what this instance changes", s.parents[0])
	case s.packagePath != "":
		return packageDevices(s.packagePath, s.instance, s.parents)
	case s.devices == "":
		s.devices = defaultPeerDevices()
	}
	decoded, err := decodeDevices[peerDevice](s.devices)
	if err != nil {
		return nil, err
	}
	var devices []peer.Device
	s.stores = make(map[string]depot.DeviceConfig)
	for _, d := range decoded {
		device, err := d.device()
		if err != nil {
			return nil, err
		}
		devices = append(devices, device)
		if d.S3Sync {
			if s.stores[d.Name], err = d.store(device); err != nil {
				return nil, err
			}
		}
	}
	if err := runner.CheckDevices(peer.DeviceConfigs(devices)); err != nil {
		return nil, usageErrorf("--devices: %w", err)
	}
	return devices, nil
}

// packageDevices is peer.PackageDevices for what --package and --instance say.
func packageDevices(path, instance string, parents []string) ([]peer.Device, error) {
	_, err := vmpackage.Open(path)
	if isFile(path) {
		return nil, fmt.Errorf("--package %q is a file, and a folder is needed: extract it (mkdir out/package && tar -xf %s -C out/package)", path, path)
	}
	if _, missing := os.Stat(filepath.Join(path, vmpackage.ManifestFile)); errors.Is(missing, os.ErrNotExist) {
		return nil, fmt.Errorf("--package: %w: make the package first (drafter snapshotter), or correct the path", err)
	} else if err != nil {
		return nil, fmt.Errorf("--package: %w", err)
	}
	if instance != "" && sameFile(path, instance) {
		return nil, usageErrorf("--instance %q is the folder of the package itself: give a folder of its own for what this instance changes, or leave --instance out to change the package", instance)
	}
	for _, parent := range parents {
		if _, err := os.Stat(filepath.Join(parent, "state")); err != nil {
			return nil, fmt.Errorf("--parent: %w: give the folder of an instance that was closed", err)
		}
		if sameFile(parent, instance) {
			return nil, usageErrorf("--parent %q is the folder of the instance itself: give it a folder of its own", parent)
		}
	}
	devices, err := peer.PackageDevices(path, instance, parents...)
	if err != nil {
		return nil, err
	}
	if err := runner.CheckDevices(peer.DeviceConfigs(devices)); err != nil { // a parent that is there twice
		return nil, usageErrorf("--package, --instance and --parent: %w", err)
	}
	return devices, nil
}

// sameFile reports whether two paths lead to the same file or folder, by whatever links.
func sameFile(a, b string) bool {
	x, err := os.Stat(a)
	if err != nil {
		return false
	}
	y, err := os.Stat(b)
	return err == nil && os.SameFile(x, y)
}

// defaultPeerDevices are the devices of out/package with overlays beside it, as documented for --devices.
func defaultPeerDevices() string {
	migratable, maxDirtyBlocks, minCycles, maxCycles, cycleThrottle := true, int64(200), 5, 20, 500*time.Millisecond
	devices := []peerDevice{}
	pkg, err := vmpackage.Open(filepath.Join("out", "package"))
	boots := err == nil && !slices.ContainsFunc(pkg.Devices, func(d vmpackage.PackageDevice) bool { return d.Name == vmpackage.Memory })
	for _, name := range vmpackage.KnownNames() {
		file := vmpackage.DefaultFile(name)
		base := filepath.Join("out", "package", file)
		if _, err := os.Stat(base); err != nil && (name == runner.InitrdDevice || name == "oci") || name == runner.MemoryDevice && boots {
			continue
		}
		devices = append(devices, peerDevice{
			Name: name, Base: base, Overlay: filepath.Join("out", "overlay", file), State: filepath.Join("out", "state", file),
			BlockSize: 64 << 10, Expiry: time.Second, MaxDirtyBlocks: &maxDirtyBlocks, MinCycles: &minCycles,
			MaxCycles: &maxCycles, CycleThrottle: &cycleThrottle, MakeMigratable: &migratable,
		})
	}
	b, _ := json.Marshal(devices) // strings and numbers only: cannot fail
	return string(b)
}
