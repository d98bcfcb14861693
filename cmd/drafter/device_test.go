package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/peer"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
)

// rest is a package of two disks and a saved state, and instances of it, none of which runs.
type rest struct {
	t        *testing.T
	dir, pkg string
}

const restSize = 8 << 20

func newRest(t *testing.T) *rest {
	t.Helper()
	r := &rest{t: t, dir: t.TempDir()}
	r.pkg = filepath.Join(r.dir, "package")
	r.newPackage(r.pkg, nil)
	return r
}

// newPackage makes one whose disk has, in its second MiB, what is given.
func (r *rest) newPackage(dir string, disk []byte) {
	r.t.Helper()
	if err := os.Mkdir(dir, 0o700); err != nil {
		r.t.Fatal(err)
	}
	state := filepath.Join(dir, vmpackage.DefaultFile(runner.StateDevice))
	f, err := block.CreateFile(state, runner.StateDeviceSize)
	if err == nil {
		err = errors.Join(runner.WriteSaved(f, []byte("no machine's")), f.Close())
	}
	if err != nil {
		r.t.Fatal(err)
	}
	files := []vmpackage.File{{Name: runner.StateDevice, Path: state}}
	for _, name := range []string{"disk", "data"} {
		path := filepath.Join(dir, vmpackage.DefaultFile(name))
		f, err := block.CreateFile(path, restSize)
		if err != nil {
			r.t.Fatal(err)
		}
		if _, err := f.WriteAt(bytes.Repeat([]byte(name), 1<<18), 0); err != nil {
			r.t.Fatal(err)
		}
		if _, err := f.WriteAt(disk, 1<<20); err != nil {
			r.t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			r.t.Fatal(err)
		}
		files = append(files, vmpackage.File{Name: name, Path: path})
	}
	if _, err := vmpackage.WriteManifest(r.t.Context(), dir, files, vmpackage.ManifestOptions{}); err != nil {
		r.t.Fatal(err)
	}
}

// source is the instance of that name, over its parents.
func (r *rest) source(instance string, parents ...string) deviceSource {
	s := deviceSource{packagePath: r.pkg, instance: filepath.Join(r.dir, instance)}
	for _, p := range parents {
		s.parents = append(s.parents, filepath.Join(r.dir, p))
	}
	return s
}

func (r *rest) device(name, instance string, parents ...string) runner.DeviceConfig {
	r.t.Helper()
	devices, _, err := r.source(instance, parents...).chosen([]string{name})
	if err != nil {
		r.t.Fatal(err)
	}
	return devices[0].DeviceConfig
}

// write writes to a device of an instance as a guest of it would.
func (r *rest) write(text string, off int64, name, instance string, parents ...string) {
	r.t.Helper()
	for _, dir := range []string{"overlay", "state"} {
		if err := os.MkdirAll(filepath.Join(r.dir, instance, dir), 0o700); err != nil {
			r.t.Fatal(err)
		}
	}
	for _, n := range []string{name, runner.StateDevice} {
		o, err := openOverlay(r.device(n, instance, parents...), block.OverlayOptions{})
		if err != nil {
			r.t.Fatal(err)
		}
		if n == name {
			_, err = o.WriteAt([]byte(text), off)
		}
		if err := errors.Join(err, o.Close()); err != nil {
			r.t.Fatal(err)
		}
	}
}

// record has an instance's record say something.
func (r *rest) record(status runner.Status, instance string, parents ...string) {
	r.t.Helper()
	o, err := openOverlay(r.device(runner.StateDevice, instance, parents...), block.OverlayOptions{})
	if err == nil {
		err = errors.Join(runner.WriteRecord(o, runner.Record{Status: status}), o.Close())
	}
	if err != nil {
		r.t.Fatal(err)
	}
}

func (r *rest) content(name, instance string, parents ...string) []byte {
	r.t.Helper()
	devices, _, err := r.source(instance, parents...).chosen([]string{name})
	if err != nil {
		r.t.Fatal(err)
	}
	d, lock, err := openAtRest(devices[0])
	if err != nil {
		r.t.Fatal(err)
	}
	defer lock.Close()
	defer d.Close()
	p := make([]byte, d.Size())
	if _, err := d.ReadAt(p, 0); err != nil && err != io.EOF {
		r.t.Fatal(err)
	}
	return p
}

// do runs a command of drafter device on an instance, which must succeed.
func (r *rest) do(command string, s deviceSource, args ...string) (stdout string) {
	r.t.Helper()
	status, out, errs := r.try(command, s, args...)
	if status != 0 {
		r.t.Fatalf("device %s %q: status %d, %s", command, args, status, errs)
	}
	return out
}

func (r *rest) try(command string, s deviceSource, args ...string) (status int, stdout, stderr string) {
	line := append([]string{"device", command, "--package", s.packagePath, "--instance", s.instance}, args...)
	for _, p := range s.parents {
		line = append(line, "--parent", p)
	}
	return drafter(r.t.Context(), line...)
}

func TestDeviceInspect(t *testing.T) {
	r := newRest(t)
	r.write("first", 5<<20, "disk", "a")
	r.write("second", 6<<20, "disk", "b", "a")
	s := r.source("b", "a")
	if status, _, errs := r.try("inspect", s); status != 1 || !strings.Contains(errs, "data.img") || !strings.Contains(errs, "start its instance and close it") {
		t.Errorf("a parent that lacks a device: status %d, %s", status, errs)
	}
	text := r.do("inspect", s, "disk")
	for _, want := range []string{"disk ", "8.0 MiB", "base", s.packagePath, "1.0 MiB on disk", "64 KiB blocks: 1 held, 0 zero, of 128; ", filepath.Join(s.parents[0], "overlay"), filepath.Join(s.instance, "overlay"), "changed "} {
		if !strings.Contains(text, want) {
			t.Errorf("inspect does not say %q:\n%s", want, text)
		}
	}
	if strings.Contains(text, "in use") || strings.Contains(text, "not closed") {
		t.Errorf("inspect says of overlays at rest:\n%s", text)
	}
	written, err := os.Stat(r.device("disk", "a").Overlay)
	if err != nil {
		t.Fatal(err)
	}
	var views []deviceView
	if err := json.Unmarshal([]byte(r.do("inspect", r.source("a"), "--json")), &views); err != nil {
		t.Fatal(err)
	}
	if len(views) != 3 || views[1].Name != "disk" || views[1].Size != restSize || len(views[1].Overlays) != 1 || views[1].Overlays[0].Held != 1 || !views[1].Overlays[0].Clean ||
		views[1].Overlays[0].Modified == nil || !views[1].Overlays[0].Modified.Equal(written.ModTime()) || !views[2].Overlays[0].Missing {
		t.Errorf("inspect says %+v", views)
	}
	o, err := openOverlay(r.device("disk", "b", "a"), block.OverlayOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close()
	if text := r.do("inspect", s, "disk"); strings.Count(text, "in use") != 2 {
		t.Errorf("inspect says of overlays in use:\n%s", text)
	}
	if status, _, errs := r.try("verify", s, "disk"); status != 1 || !strings.Contains(errs, "another process holds it") {
		t.Errorf("verify of overlays in use: status %d, %s", status, errs)
	}
}

func TestDeviceMap(t *testing.T) {
	r := newRest(t)
	r.write(strings.Repeat("x", 3<<20), 4<<20, "disk", "a")
	o, err := openOverlay(r.device("disk", "a"), block.OverlayOptions{})
	if err == nil {
		err = o.Discard(0, 1<<20)
	}
	if err == nil {
		_, err = o.WriteAt([]byte("x"), 3<<20)
	}
	if err == nil {
		err = o.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	text := r.do("map", r.source("a"), "disk", "--width", "4", "--rows", "2")
	for _, want := range []string{
		"disk: 8.0 MiB, 1.0 MiB a cell\n", "         0 B │█   │\n     4.0 MiB │    │\n", "         0 B │○··▁│\n     4.0 MiB │███·│\n",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("the map does not have\n%sbut is\n%s", want, text)
		}
	}
	for _, test := range []struct{ size, cells, want int64 }{{1, 10, 4096}, {40960, 10, 4096}, {40961, 10, 8192}, {1 << 40, 512, 2 << 30}} {
		if got := cellSize(test.size, test.cells); got != test.want {
			t.Errorf("cellSize(%d, %d) = %d, want %d", test.size, test.cells, got, test.want)
		}
	}
}

func TestDeviceVerify(t *testing.T) {
	r := newRest(t)
	r.write("first", 5<<20, "disk", "a")
	r.write("second", 6<<20, "disk", "b", "a")
	digest := func(text string) string {
		t.Helper()
		_, d, ok := strings.Cut(text, "disk: ok, digest ")
		if !ok {
			t.Fatalf("verify says %q", text)
		}
		return d
	}
	stacked := digest(r.do("verify", r.source("b", "a"), "disk"))
	r.write("first", 5<<20, "disk", "c")
	r.write("second", 6<<20, "disk", "c")
	if flat := digest(r.do("verify", r.source("c"), "disk")); flat != stacked {
		t.Errorf("the same contents have the digests %s and %s", flat, stacked)
	}
	if text := r.do("verify", r.source("c")); !strings.Contains(text, "data: ok") {
		t.Errorf("verify of all says %q", text)
	}
	for _, suffix := range []string{".missing", ".since"} {
		path := r.device("disk", "c").State + suffix
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if status, _, errs := r.try("verify", r.source("c"), "disk"); status != 1 || !strings.Contains(errs, path) {
			t.Errorf("verify of what is not whole: status %d, %s", status, errs)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	lost := r.device("disk", "a").State
	if err := os.Rename(lost, lost+".lost"); err != nil {
		t.Fatal(err)
	}
	for _, line := range [][]string{{"inspect"}, {"map"}, {"verify"}, {"commit", "--all"}, {"rebase", "--all", "--same-contents"}} {
		if status, _, errs := r.try(line[0], r.source("a"), line[1:]...); status != 1 || !strings.Contains(errs, "exists without its state") {
			t.Errorf("%q of an overlay that has lost its state: status %d, %s", line, status, errs)
		}
	}
	if err := os.Rename(lost+".lost", lost); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(filepath.Join(r.pkg, vmpackage.DefaultFile("disk")), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("damage"), 0); err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
	status, _, errs := r.try("verify", r.source("c"), "disk")
	if status != 1 || !strings.Contains(errs, "sha256 is") || !strings.Contains(errs, "changed since the overlay was made") {
		t.Errorf("verify of what has changed: status %d, %s", status, errs)
	}
}

func TestDeviceCommit(t *testing.T) {
	r := newRest(t)
	r.write("first", 5<<20, "disk", "a")
	r.write("second", 6<<20, "disk", "b", "a")
	r.write("more", 100, "data", "a")
	want := r.content("disk", "b", "a")

	// Into the parent, then into the package.
	if out := r.do("commit", r.source("b", "a"), "disk"); !strings.Contains(out, "disk: 64 KiB written to "+filepath.Join(r.dir, "a", "overlay")) {
		t.Errorf("commit says %q", out)
	}
	if got := r.content("disk", "a"); !bytes.Equal(got, want) {
		t.Error("the parent is not what was committed to it")
	}
	if status, _, errs := r.try("commit", r.source("a"), "disk"); status != 2 || !strings.Contains(errs, `device "data" has changes`) {
		t.Errorf("a commit of one of two that have changed: status %d, %s", status, errs)
	}
	if err := os.WriteFile(r.device("disk", "a").State+".missing", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if status, _, errs := r.try("commit", r.source("a"), "--all"); status != 1 || !strings.Contains(errs, "some of it has not arrived") {
		t.Errorf("a commit of what is not whole: status %d, %s", status, errs)
	}
	if err := os.Remove(r.device("disk", "a").State + ".missing"); err != nil {
		t.Fatal(err)
	}
	for _, status := range []runner.Status{runner.Running, runner.Moved, runner.Receiving} {
		r.record(status, "a")
		if rc, _, errs := r.try("commit", r.source("a"), "--all"); rc != 1 || !strings.Contains(errs, fmt.Sprintf("its record says %q", status)) {
			t.Errorf("a commit of an instance that is %s: status %d, %s", status, rc, errs)
		}
	}
	r.record(runner.Saved, "a")
	// What is in the way of one device keeps all as they are.
	r.write("in use", 0, "data", "other")
	used, err := openOverlay(r.device("data", "other"), block.OverlayOptions{})
	if err != nil {
		t.Fatal(err)
	}
	lock, err := runner.LockFile(r.device("data", "other").Base, false)
	if err != nil {
		t.Fatal(err)
	}
	if rc, _, errs := r.try("commit", r.source("a"), "--all"); rc != 1 || !strings.Contains(errs, "in use by another instance") {
		t.Errorf("a commit to a base in use: status %d, %s", rc, errs)
	}
	if err := errors.Join(used.Close(), lock.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := vmpackage.Verify(t.Context(), r.pkg, vmpackage.ExtractOptions{}); err != nil {
		t.Errorf("after a commit that was refused, the package is not what it was: %v", err)
	}
	// One that was cut short keeps everybody but its instance from the package, until it is done again.
	mark := filepath.Join(r.pkg, peer.CommitMark)
	if err := os.WriteFile(mark, []byte(url.PathEscape(r.device("data", "a").Overlay)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, instance := range []string{"other", "new"} {
		if rc, _, errs := r.try("inspect", r.source(instance)); rc != 1 || !strings.Contains(errs, "was cut short") || !strings.Contains(errs, filepath.Join(r.dir, "a", "overlay")) {
			t.Errorf("an instance of a package that is of two moments: status %d, %s", rc, errs)
		}
	}
	r.do("inspect", r.source("a"))
	r.do("commit", r.source("a"), "--all")
	if _, err := os.Stat(mark); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the package is marked still (%v)", err)
	}
	disk, err := os.ReadFile(filepath.Join(r.pkg, vmpackage.DefaultFile("disk")))
	if err != nil || !bytes.Equal(disk, want) {
		t.Errorf("the package is not what was committed to it, %v", err)
	}
	if got := r.content("disk", "a"); !bytes.Equal(got, want) {
		t.Error("the instance reads as something else after its commit")
	}
	m, err := vmpackage.ReadManifest(t.Context(), r.pkg)
	if d, _ := m.Device("disk"); err != nil || d.SHA256 != "" {
		t.Errorf("the manifest has digests still: %+v, %v", d, err)
	}
	if out := r.do("commit", r.source("a"), "disk"); !strings.Contains(out, "holds nothing") {
		t.Errorf("another commit says %q", out)
	}
	for _, test := range []struct {
		args []string
		want string
	}{{nil, "--all"}, {[]string{"disk", "--all"}, "--all"}, {[]string{"disk", "disk"}, "named twice"}, {[]string{"other"}, `no device "other": use state, disk, data`}} {
		if status, _, errs := r.try("commit", r.source("a"), test.args...); status != 2 || !strings.Contains(errs, test.want) {
			t.Errorf("commit %q: status %d, %s", test.args, status, errs)
		}
	}
}

func TestDeviceRebase(t *testing.T) {
	r := newRest(t)
	r.write("first", 5<<20, "disk", "a")
	r.write("second", 6<<20, "disk", "b", "a")
	want := r.content("disk", "b", "a")

	// Without its parent, over another package, and over a copy of that.
	disk := filepath.Join(r.pkg, vmpackage.DefaultFile("disk"))
	if out := r.do("rebase", r.source("b", "a"), "--all", "--to-package", r.pkg); !strings.Contains(out, "is over "+disk+" now") {
		t.Errorf("rebase says %q", out)
	}
	if got := r.content("disk", "b"); !bytes.Equal(got, want) {
		t.Error("without its parent it reads as something else")
	}
	other := filepath.Join(r.dir, "other")
	r.newPackage(other, bytes.Repeat([]byte("other"), 10_000))
	lacking := filepath.Join(r.dir, "lacking")
	r.newPackage(lacking, nil)
	if err := os.Truncate(filepath.Join(lacking, vmpackage.DefaultFile("data")), restSize/2); err != nil {
		t.Fatal(err)
	}
	r.write("more", 100, "data", "b")
	if rc, _, errs := r.try("rebase", r.source("b"), "--all", "--to-package", lacking); rc == 0 {
		t.Errorf("a rebase to a package that is broken: status %d, %s", rc, errs)
	}
	r.do("rebase", r.source("b"), "disk", "--to-package", other) // as one that was cut short leaves it
	r.do("rebase", r.source("b"), "--all", "--to-package", other)
	if status, _, errs := r.try("verify", r.source("b"), "disk"); status != 1 || !strings.Contains(errs, "changed since the overlay was made") {
		t.Errorf("over what it was before: status %d, %s", status, errs)
	}
	r.pkg = other
	if got := r.content("disk", "b"); !bytes.Equal(got, want) {
		t.Error("over another package it reads as something else")
	}
	touched := time.Date(2033, 3, 3, 3, 3, 3, 0, time.UTC)
	if err := os.Chtimes(filepath.Join(other, vmpackage.DefaultFile("disk")), touched, touched); err != nil {
		t.Fatal(err)
	}
	if status, _, errs := r.try("verify", r.source("b"), "disk"); status != 1 || !strings.Contains(errs, "rebase --same-contents") {
		t.Errorf("over what was touched: status %d, %s", status, errs)
	}
	r.do("rebase", r.source("b"), "disk", "--same-contents")
	if got := r.content("disk", "b"); !bytes.Equal(got, want) {
		t.Error("over what was touched it reads as something else")
	}
	for _, test := range []struct {
		args   []string
		status int
		want   string
	}{
		{[]string{"disk"}, 2, "--to FILE"}, {[]string{"--all", "--to", "x"}, 2, "one device"}, {[]string{"disk", "--to", "x", "--to-package", "y"}, 2, "exclude"},
		{[]string{"--to", "x"}, 2, "--all"}, {[]string{"disk", "--to", filepath.Join(r.dir, "none")}, 1, "no such file"}, {[]string{"disk", "--to-package", r.dir}, 2, "--to-package"},
		{[]string{"disk", "--to", filepath.Join(other, "manifest.json")}, 1, "give one of the same size"}, {[]string{"data", "--to", disk}, 0, "is over"},
	} {
		status, out, errs := r.try("rebase", r.source("b"), test.args...)
		if status != test.status || !strings.Contains(out+errs, test.want) {
			t.Errorf("rebase %q: status %d, %s%s", test.args, status, out, errs)
		}
	}
}

// TestPeerDevicesOverlays: the keys of --devices, and --parent, for overlays over each other.
func TestPeerDevicesOverlays(t *testing.T) {
	source := deviceSource{devices: `[{"name":"disk","base":"b","overlays":[{"overlay":"1","state":"1s"},{"overlay":"2","state":"2s"}]}]`}
	devices, err := source.open()
	if err != nil {
		t.Fatal(err)
	}
	if got, want := fmt.Sprintln(devices[0].Beneath, devices[0].Overlay, devices[0].State), "[{1 1s}] 2 2s\n"; got != want {
		t.Errorf("the overlays are %s, want %s", got, want)
	}
	for in, want := range map[string]string{
		`[{"name":"disk","base":"b","overlay":"0","state":"0s","overlays":[{"overlay":"1","state":"1s"}]}]`:                                           `"overlays" excludes`,
		`[{"name":"disk","base":"b","overlays":[{"overlay":"1","state":"1s"},{"overlay":"2"}]}]`:                                                      "give both",
		`[{"name":"disk","base":"b","overlays":[{"overlay":"1"},{"overlay":"2","state":"2s"}]}]`:                                                      "give both",
		`[{"name":"disk","base":"b","overlays":[{"overlay":"1","state":"1s"},{"overlay":"1","state":"2s"}]}]`:                                         `both use the file "1"`,
		`[{"name":"disk","base":"b","overlays":[{"overlay":"1","state":"1s"}]},{"name":"data","base":"c","overlays":[{"overlay":"3","state":"1s"}]}]`: `both use the file "1s"`,
		`[{"name":"disk","base":"b","overlays":[{"path":"1","state":"1s"}]}]`:                                                                         "path",
	} {
		if _, err := (&deviceSource{devices: in}).open(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want an error that says %q", in, err, want)
		}
	}
	r := newRest(t)
	r.write("first", 0, "disk", "a")
	for _, test := range []struct {
		source deviceSource
		want   string
	}{
		{deviceSource{packagePath: r.pkg, parents: []string{"a"}}, "needs --instance"},
		{deviceSource{devices: "[]", parents: []string{"a"}}, "excludes"},
		{r.source("b", "none"), "give the folder of an instance that was closed"},
		{r.source("a", "a"), "the folder of the instance itself"},
		{r.source("b", "a", "a"), "both use the file"},
	} {
		if _, err := test.source.open(); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%+v: %v, want an error that says %q", test.source, err, test.want)
		}
	}
}

// TestDeviceIdle: where nothing tells whether a VM uses devices, that has to be said. What has no overlay is passed over by --all.
func TestDeviceIdle(t *testing.T) {
	r := newRest(t)
	r.write("first", 5<<20, "disk", "a")
	d, data := r.device("disk", "a"), r.device("data", "a")
	devices := fmt.Sprintf(`[{"name":"disk","base":%q,"overlay":%q,"state":%q},{"name":"data","base":%q,"shared":true}]`, d.Base, d.Overlay, d.State, data.Base)
	for _, command := range []string{"commit", "rebase"} {
		line := []string{"device", command, "--devices", devices, "--all"}
		if command == "rebase" {
			line = append(line, "--same-contents")
		}
		if status, _, errs := drafter(t.Context(), line...); status != 2 || !strings.Contains(errs, "--idle") {
			t.Errorf("%s: status %d, %s", command, status, errs)
		}
		if status, out, errs := drafter(t.Context(), append(line, "--idle")...); status != 0 || !strings.Contains(out, "disk: ") || strings.Contains(out, "data") {
			t.Errorf("%s --idle: status %d, %s%s", command, status, out, errs)
		}
	}
	// Its digests went with what they were of.
	m, err := vmpackage.ReadManifest(t.Context(), r.pkg)
	if in, _ := m.Device("disk"); err != nil || in.SHA256 != "" {
		t.Errorf("the manifest has digests still: %+v, %v", in, err)
	}
}
