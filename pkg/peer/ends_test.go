package peer

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/vmm"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
	"github.com/drafter-vm/drafter/pkg/wire"
)

var quiet = slog.New(slog.DiscardHandler)

// newPackage makes a package of a VM that no machine could run, which nobody here wants to.
func newPackage(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "package")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	desc := runner.Description{Spec: vmm.Spec{
		Hypervisor: "qemu", Version: "10.0.0", Accel: "tcg", CPUCount: 1, MemorySize: 2 << 20, Disks: []vmm.Disk{{Name: "disk", Size: 3 << 20}},
	}}
	config, err := desc.Encode()
	if err != nil {
		t.Fatal(err)
	}
	var files []vmpackage.File
	for _, d := range []struct {
		name string
		size int64
	}{{"state", runner.StateDeviceSize}, {"memory", 2 << 20}, {"kernel", 5 << 12}, {"disk", 3 << 20}, {"config", int64(len(config))}} {
		path := filepath.Join(dir, vmpackage.DefaultFile(d.name))
		files = append(files, vmpackage.File{Name: d.name, Path: path})
		f, err := block.CreateFile(path, d.size)
		if err != nil {
			t.Fatal(err)
		}
		switch d.name {
		case "state":
			err = runner.WriteSaved(f, []byte("the state of the machine"))
		case "config":
			_, err = f.WriteAt(config, 0)
		default:
			_, err = f.WriteAt(random(d.size/2, d.name), d.size/4/4096*4096)
		}
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := vmpackage.WriteManifest(t.Context(), dir, files, vmpackage.ManifestOptions{SkipDigests: true}); err != nil {
		t.Fatal(err)
	}
	return dir
}

func random(n int64, seed string) []byte {
	rng := rand.New(rand.NewPCG(uint64(len(seed)), uint64(seed[0])))
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(rng.Uint32())
	}
	return p
}

// sameVM compares two packages, without their records.
func sameVM(t *testing.T, got, want string) {
	t.Helper()
	for _, name := range []string{"memory", "kernel", "disk", "config", "state"} {
		a, err := os.ReadFile(filepath.Join(got, vmpackage.DefaultFile(name)))
		if err != nil {
			t.Error(err)
			continue
		}
		b, err := os.ReadFile(filepath.Join(want, vmpackage.DefaultFile(name)))
		if err != nil {
			t.Fatal(err)
		}
		if name == "state" {
			a, b = a[block.PageSize:], b[block.PageSize:]
		}
		if !bytes.Equal(a, b) {
			t.Errorf("device %q differs", name)
		}
	}
	f, err := block.OpenFile(filepath.Join(got, "state.bin"), block.FileOptions{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if state, err := runner.ReadSaved(f, false); err != nil || string(state) != "the state of the machine" {
		t.Errorf("the package holds the device state %q, %v", state, err)
	}
}

// pairs makes connected streams.
func pairs(t *testing.T, n int) (a, b []io.ReadWriter) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for range n {
		x, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		y, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { x.Close(); y.Close() })
		a, b = append(a, x), append(b, y)
	}
	return a, b
}

// newServer opens a server that the test closes.
func newServer(t *testing.T, dir string) *Server {
	t.Helper()
	s, err := OpenServer(ServerConfig{Dir: dir, Logger: quiet})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestServeTerminate has a terminator download from a server: several at once, as a copy and as a migration.
func TestServeTerminate(t *testing.T) {
	pkg := newPackage(t)
	s := newServer(t, pkg)
	var wg sync.WaitGroup
	for n, as := range []bool{false, true, false} {
		a, b := pairs(t, 1+n)
		wg.Go(func() {
			if report, err := s.Serve(t.Context(), a); err != nil {
				t.Errorf("serve: %v (%v)", err, report)
			}
		})
		wg.Go(func() {
			dir := filepath.Join(t.TempDir(), "a", "b")
			m, report, err := Terminator{Dir: dir, Copy: as, Logger: quiet}.Receive(t.Context(), b)
			if err != nil {
				t.Errorf("terminate: %v (%v)", err, report)
				return
			}
			sameVM(t, dir, pkg)
			if state, err := os.ReadFile(filepath.Join(dir, "state.bin")); err != nil || bytes.Contains(state[:block.PageSize], []byte(s.id)) {
				t.Errorf("the package names the migration that it came by (%v)", err)
			}
			for _, d := range m.Devices {
				if d.SHA256 == "" {
					t.Errorf("device %q has no digest in the manifest", d.Name)
				}
			}
			if _, err := vmpackage.Verify(t.Context(), dir, vmpackage.ExtractOptions{}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if err := s.Close(t.Context()); err != nil {
		t.Error(err)
	}
	a, _ := pairs(t, 1)
	if _, err := s.Serve(t.Context(), a); err == nil {
		t.Error("a server that is closed serves")
	}
	if _, err := OpenServer(ServerConfig{Dir: pkg, Logger: quiet}); err != nil {
		t.Errorf("the package cannot be served again: %v", err)
	}
}

// TestTerminatorFails breaks what a terminator receives from: nothing is left.
func TestTerminatorFails(t *testing.T) {
	pkg := newPackage(t)
	for name, hurt := range map[string]func(cancel func(), conn io.Closer){
		"cut":      func(_ func(), conn io.Closer) { conn.Close() },
		"canceled": func(cancel func(), _ io.Closer) { cancel() },
	} {
		for _, at := range []string{"waiting", "receiving"} {
			t.Run(name+" "+at, func(t *testing.T) {
				s := newServer(t, pkg)
				a, b := pairs(t, 1)
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				var once sync.Once
				term := Terminator{Dir: filepath.Join(t.TempDir(), "new", "package"), Logger: quiet, Progress: func(p migrate.Progress) {
					if p.State == at {
						once.Do(func() { hurt(cancel, b[0].(io.Closer)) })
					}
				}}
				var wg sync.WaitGroup
				wg.Go(func() {
					if _, err := s.Serve(t.Context(), a); err == nil {
						t.Error("the server does not notice")
					}
				})
				if _, _, err := term.Receive(ctx, b); err == nil {
					t.Error("the terminator does not notice")
				}
				wg.Wait()
				if _, err := os.Lstat(filepath.Dir(term.Dir)); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("something is left: %v", err)
				}
				if err := s.Close(t.Context()); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

func TestTerminatorCheck(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	both := []vmpackage.File{{Name: "state", Path: dir + "/s"}, {Name: "memory", Path: dir + "/m"}}
	with := func(f ...vmpackage.File) []vmpackage.File { return append(slices.Clone(both), f...) }
	for _, tt := range []struct {
		name string
		t    Terminator
		want string // empty: no error
	}{
		{"nothing", Terminator{}, "give either"},
		{"both", Terminator{Dir: dir + "/x", Devices: both}, "give either"},
		{"folder", Terminator{Dir: dir + "/x"}, ""},
		{"folder that exists", Terminator{Dir: dir}, "nothing is overwritten"},
		{"folder below a file", Terminator{Dir: file + "/x"}, "not a directory"},
		{"devices", Terminator{Devices: both}, ""},
		{"a file that exists", Terminator{Devices: with(vmpackage.File{Name: "disk", Path: file})}, `"disk": `},
		{"no memory", Terminator{Devices: both[:1]}, `no device "memory"`},
		{"no state", Terminator{Devices: both[1:]}, `no device "state"`},
		{"a bad name", Terminator{Devices: with(vmpackage.File{Name: "../x", Path: dir + "/x"})}, "../x"},
		{"no path", Terminator{Devices: with(vmpackage.File{Name: "disk"})}, `"disk" has no base`},
		{"a file twice", Terminator{Devices: with(vmpackage.File{Name: "disk", Path: dir + "/s"})}, "both use the file"},
		{"a device twice", Terminator{Devices: with(vmpackage.File{Name: "state", Path: dir + "/t"})}, "configured twice"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := tt.t.Check()
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("error %v, want %q", err, tt.want)
			}
		})
	}
}

// TestServerClose closes a server while a peer is connected that says nothing, and one that has begun.
func TestServerClose(t *testing.T) {
	s := newServer(t, newPackage(t))
	a, b := pairs(t, 1)
	served := make(chan error, 1)
	go func() {
		_, err := s.Serve(t.Context(), a)
		served <- err
	}()
	if _, err := io.ReadFull(b[0], make([]byte, wire.PrefaceSize)); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if err := <-served; err == nil {
		t.Error("a session that was ended says that it served")
	}
}

func TestOpenServer(t *testing.T) {
	for _, tt := range []struct {
		name string
		cfg  func(dir string) ServerConfig
		hurt func(dir string) error
		want string
	}{
		{"nothing", func(string) ServerConfig { return ServerConfig{} }, nil, "give either"},
		{"no package", func(dir string) ServerConfig { return ServerConfig{Dir: dir + "/no"} }, nil, "manifest.json is missing"},
		{"no disk", func(dir string) ServerConfig {
			return ServerConfig{Devices: []vmpackage.File{{Name: "state", Path: dir + "/state.bin"}, {Name: "memory", Path: dir + "/memory.bin"}, {Name: "config", Path: dir + "/config.json"}}}
		}, nil, `no device "disk"`},
		{"no memory", func(dir string) ServerConfig {
			return ServerConfig{Devices: []vmpackage.File{{Name: "state", Path: dir + "/state.bin"}, {Name: "config", Path: dir + "/config.json"}}}
		}, nil, `no device "memory"`},
		{"not a state", nil, func(dir string) error {
			return os.WriteFile(dir+"/state.bin", make([]byte, runner.StateDeviceSize), 0o600)
		}, "not a drafter state device"},
		{"moved", nil, func(dir string) error {
			f, err := block.OpenFile(dir+"/state.bin", block.FileOptions{})
			if err != nil {
				return err
			}
			return errors.Join(runner.WriteRecord(f, runner.Record{Status: runner.Moved, Migration: "M"}), f.Close())
		}, "given to another peer"},
		{"not a config", nil, func(dir string) error { return os.WriteFile(dir+"/config.json", make([]byte, 4096), 0o600) }, "config"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := newPackage(t)
			if tt.hurt != nil {
				if err := tt.hurt(dir); err != nil {
					t.Fatal(err)
				}
			}
			cfg := ServerConfig{Dir: dir}
			if tt.cfg != nil {
				cfg = tt.cfg(dir)
			}
			cfg.Logger = quiet
			if _, err := OpenServer(cfg); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want %q", err, tt.want)
			}
			if f, err := runner.LockFile(dir+"/memory.bin", true); err != nil {
				t.Errorf("it still holds the package: %v", err)
			} else {
				f.Close()
			}
		})
	}
}

// needFUSE skips a test where file systems cannot be mounted.
func needFUSE(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skipf("there is no FUSE here: %v", err)
	}
}

// TestMounter opens a package, hands it to another mounter, and that to a terminator.
func TestMounter(t *testing.T) {
	needFUSE(t)
	pkg := newPackage(t)
	want := newPackage(t) // the same
	dir := t.TempDir()
	first, err := OpenMounter(t.Context(), MounterConfig{Dir: pkg, Mount: filepath.Join(dir, "mnt"), Logger: quiet})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := OpenMounter(t.Context(), MounterConfig{Dir: pkg, Mount: filepath.Join(dir, "other"), Logger: quiet}); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("a package that is mounted is mounted again: error %v", err)
	}
	if err := first.gated("disk").write(0, "changed"); err != nil {
		t.Fatal(err)
	}
	changed, err := os.OpenFile(filepath.Join(want, "rootfs.ext4"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := changed.WriteAt([]byte("changed"), 0); err != nil {
		t.Fatal(err)
	}
	changed.Close()

	// Overlays over another copy of the package.
	base := newPackage(t)
	var devices []Device
	for _, name := range []string{"state", "memory", "kernel", "disk", "config"} {
		devices = append(devices, Device{DeviceConfig: runner.DeviceConfig{
			Name: name, Base: filepath.Join(base, vmpackage.DefaultFile(name)), Overlay: filepath.Join(dir, "overlay", name), State: filepath.Join(dir, "state", name),
		}, Policy: migrate.Policy{ByGoal: true}})
	}
	cfg := MounterConfig{Devices: devices, Mount: filepath.Join(dir, "mnt2"), Logger: quiet}
	a, b := pairs(t, 2)
	var wg sync.WaitGroup
	wg.Go(func() {
		if report, err := first.Send(t.Context(), a); err != nil {
			t.Errorf("send: %v (%v)", err, report)
		}
	})
	second, _, err := ReceiveMounter(t.Context(), cfg, b)
	wg.Wait()
	if err != nil {
		t.Fatal(err)
	}
	if !first.Sent() {
		t.Error("the first mounter does not know that the VM is another's")
	}
	if err := first.gated("disk").write(0, "late"); !errors.Is(err, syscall.EROFS) {
		t.Errorf("a write to a VM that is another's: error %v, want EROFS", err)
	}
	if err := first.Close(); err != nil {
		t.Error(err)
	}
	if _, err := OpenMounter(t.Context(), MounterConfig{Dir: pkg, Mount: filepath.Join(dir, "mnt"), Logger: quiet}); !errors.Is(err, runner.ErrNotSaved) || !strings.Contains(err.Error(), "moved") {
		t.Errorf("a VM that moved away is mounted again: error %v", err)
	}
	if info, err := os.Stat(filepath.Join(dir, "overlay", "kernel")); err != nil || info.Sys().(*syscall.Stat_t).Blocks > 0 {
		t.Errorf("what the base holds already was stored again (%v)", err)
	}

	// Closed and opened again, it has what it had.
	if err := second.gated("memory").write(4096, "also changed"); err != nil {
		t.Fatal(err)
	}
	if err := second.Close(); err != nil {
		t.Error(err)
	}
	if second, err = OpenMounter(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 12)
	if _, err := second.still.device("memory").ReadAt(p, 4096); err != nil || string(p) != "also changed" {
		t.Errorf("the memory holds %q, %v", p, err)
	}
	if err := second.gated("memory").write(4096, string(make([]byte, 12))); err != nil {
		t.Fatal(err)
	}
	// A migration into it is refused, as it has one.
	a, b = pairs(t, 1)
	wg.Go(func() { _, _ = newServer(t, base).Serve(t.Context(), a) })
	if _, _, err := ReceiveMounter(t.Context(), cfg, b); err == nil {
		t.Error("a VM was received over another")
	}
	wg.Wait()

	a, b = pairs(t, 1)
	wg.Go(func() {
		if _, err := second.Send(t.Context(), a); err != nil {
			t.Errorf("send: %v", err)
		}
	})
	out := filepath.Join(dir, "out")
	if _, _, err := (Terminator{Dir: out, Logger: quiet}).Receive(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	if err := second.Close(); err != nil {
		t.Error(err)
	}
	sameVM(t, out, want)
}

// gated is a device as the mount writes to it. The test must not open its own mount.
func (m *Mounter) gated(name string) gatedFile {
	return gatedFile{gated{m.still.device(name).Device, m.gate}}
}

type gatedFile struct{ d gated }

func (f gatedFile) write(off int64, s string) error {
	_, err := f.d.WriteAt([]byte(s), off)
	return err
}

// TestMounterStays breaks a Send: the VM stays, and writes that waited go on.
func TestMounterStays(t *testing.T) {
	needFUSE(t)
	m, err := OpenMounter(t.Context(), MounterConfig{Dir: newPackage(t), Mount: filepath.Join(t.TempDir(), "mnt"), Logger: quiet})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	for _, state := range []migrate.SourceState{migrate.SourceCopying, migrate.SourceSwitching, migrate.SourceConfirming} {
		a, b := pairs(t, 1)
		wrote := make(chan error, 1)
		m.cfg.OnState = func(s migrate.SourceState) {
			if s != state {
				return
			}
			go func() { wrote <- m.gated("disk").write(8192, "written meanwhile") }()
			b[0].(io.Closer).Close()
		}
		var wg sync.WaitGroup
		wg.Go(func() {
			_, _, _ = Terminator{Dir: filepath.Join(t.TempDir(), "x"), Logger: quiet}.Receive(t.Context(), b)
		})
		if _, err := m.Send(t.Context(), a); err == nil {
			t.Errorf("%v: the mounter does not notice that the link is gone", state)
		}
		wg.Wait()
		if err := <-wrote; err != nil {
			t.Errorf("%v: a write failed: %v", state, err)
		}
		if m.Sent() {
			t.Errorf("%v: the VM counts as another's", state)
		}
	}
	f, err := block.OpenFile(m.still.device("state").path, block.FileOptions{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if r, err := runner.ReadRecord(f); err != nil || r.Status != runner.Saved {
		t.Errorf("the record says %v, %v", r.Status, err)
	}
}

// TestTerminatorSettle loses the link when the VM is written down, and before the source knows. The source learns it later.
func TestTerminatorSettle(t *testing.T) {
	needFUSE(t)
	pkg := newPackage(t)
	found := make(chan []io.ReadWriter, 1)
	m, err := OpenMounter(t.Context(), MounterConfig{Dir: pkg, Mount: filepath.Join(t.TempDir(), "mnt"), Logger: quiet, FindDestination: func(ctx context.Context) ([]io.ReadWriter, error) {
		select {
		case streams := <-found:
			return streams, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	a, b := pairs(t, 1)
	term := Terminator{Dir: filepath.Join(t.TempDir(), "out"), Logger: quiet}
	term.Progress = func(p migrate.Progress) {
		if p.State == migrate.DestinationStarting.String() {
			b[0].(io.Closer).Close()
		}
	}
	sent := make(chan error, 1)
	go func() {
		_, err := m.Send(t.Context(), a)
		sent <- err
	}()
	if _, _, err := term.Receive(t.Context(), b); err != nil {
		t.Fatalf("the VM is here, and the terminator says %v", err)
	}
	sameVM(t, term.Dir, newPackage(t))
	select {
	case err := <-sent:
		t.Fatalf("the source does not wait to be told: %v", err)
	default:
	}

	other := Terminator{Dir: newPackage(t), Logger: quiet, FindSource: func(context.Context) ([]io.ReadWriter, error) { return nil, errors.New("not to be asked") }}
	if _, err := other.Settle(t.Context()); err == nil || !strings.Contains(err.Error(), "nobody needs to be told") {
		t.Errorf("settle a VM that came from nobody: %v", err)
	}
	term.Progress = nil
	term.FindSource = func(context.Context) ([]io.ReadWriter, error) {
		a, b := pairs(t, 1)
		found <- a
		return b, nil
	}
	if here, err := term.Settle(t.Context()); err != nil || !here {
		t.Errorf("settle: %t, %v", here, err)
	}
	if err := <-sent; err != nil {
		t.Errorf("the source was told, and says %v", err)
	}
}

// TestTerminatorDisclaim gives a VM to a terminator that dies before its own commit, or does not get it.
func TestTerminatorDisclaim(t *testing.T) {
	needFUSE(t)
	t.Run("killed", func(t *testing.T) { testDisclaim(t, true) })
	t.Run("has given up", func(t *testing.T) { testDisclaim(t, false) })
}

// testDisclaim settles from what a terminator has left that was killed, or that could not tell the source what it has put on record.
func testDisclaim(t *testing.T, killed bool) {
	found := make(chan []io.ReadWriter, 1)
	find := func(ctx context.Context) ([]io.ReadWriter, error) {
		select {
		case streams := <-found:
			return streams, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	m, err := OpenMounter(t.Context(), MounterConfig{Dir: newPackage(t), Mount: filepath.Join(t.TempDir(), "mnt"), Logger: quiet, FindDestination: find})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	a, b := pairs(t, 1)
	// What is left of the terminator is a copy of its files from before the commit.
	term := Terminator{Dir: filepath.Join(t.TempDir(), "out"), Logger: quiet}
	left := filepath.Join(t.TempDir(), "left")
	term.Progress = func(p migrate.Progress) {
		if _, err := os.Stat(left); err != nil && p.State == migrate.DestinationPrepared.String() {
			if err := os.CopyFS(left, os.DirFS(term.Dir)); err != nil {
				t.Error(err)
			}
		}
	}
	m.cfg.OnState = func(s migrate.SourceState) {
		if s == migrate.SourceCommitted {
			a[0].(io.Closer).Close() // commit never arrives
		}
	}
	sent := make(chan error, 1)
	go func() {
		_, err := m.Send(t.Context(), a)
		sent <- err
	}()
	if _, _, err := term.Receive(t.Context(), b); err == nil {
		t.Fatal("the terminator has a VM that was never committed")
	}
	ask := func(context.Context) ([]io.ReadWriter, error) {
		a, b := pairs(t, 1)
		found <- a
		return b, nil
	}
	stranger := Terminator{Dir: newPackage(t), Logger: quiet, FindSource: ask, RescueTimeout: 100 * time.Millisecond}
	state, err := block.OpenFile(filepath.Join(stranger.Dir, "state.bin"), block.FileOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(runner.WriteRecord(state, runner.Record{Status: runner.Receiving, Migration: "another"}), state.Close()); err != nil {
		t.Fatal(err)
	}
	if here, err := stranger.Settle(t.Context()); err == nil {
		t.Errorf("what is left of another migration settles this one: %t", here)
	}
	if files, err := os.ReadDir(term.Dir); err != nil || len(files) != 1 || files[0].Name() != "state.bin" {
		t.Errorf("the terminator has left %v, %v: want its record, and nothing else", files, err)
	}
	if !killed {
		left = term.Dir
	}
	// It is one of many who come, and who for the rest say nothing.
	strangers := 0
	among := func(ctx context.Context) ([]io.ReadWriter, error) {
		if strangers++; strangers <= 50 {
			a, b := pairs(t, 1)
			t.Cleanup(func() { a[0].(io.Closer).Close() })
			return []io.ReadWriter{&spoken{Conn: b[0].(net.Conn), first: strings.NewReader("")}}, nil
		}
		return ask(ctx)
	}
	began := time.Now()
	if here, err := (Terminator{Dir: left, Logger: quiet, FindSource: among}).Settle(t.Context()); err != nil || here || strangers < 50 {
		t.Errorf("settle: %t, %v, after %d strangers and %s", here, err, strangers, time.Since(began))
	}
	if err := <-sent; err == nil || errors.Is(err, migrate.ErrInDoubt) {
		t.Errorf("the source was told that the VM is its own, and says %v", err)
	}
	if m.Sent() {
		t.Error("the VM counts as another's")
	}
	if err := m.gated("disk").write(0, "goes on"); err != nil {
		t.Error(err)
	}
}

// TestServerIdentity: a package is known by what is in it, wherever it lies, and not any more when a file of it was changed.
func TestServerIdentity(t *testing.T) {
	id := func(dir string) string {
		t.Helper()
		s := newServer(t, dir)
		defer s.Close(t.Context())
		return s.id
	}
	plain := newPackage(t)
	first := id(plain)
	if id(plain) != first {
		t.Error("the same package has another id when it is served again")
	}
	var files []vmpackage.File
	pkg, err := vmpackage.Open(plain)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range pkg.Devices {
		files = append(files, vmpackage.File{Name: d.Name, Path: d.Path})
	}
	if _, err := vmpackage.WriteManifest(t.Context(), plain, files, vmpackage.ManifestOptions{}); err != nil {
		t.Fatal(err)
	}
	digested := id(plain)
	if digested == first {
		t.Error("digests do not count")
	}
	elsewhere := filepath.Join(t.TempDir(), "elsewhere")
	if err := os.CopyFS(elsewhere, os.DirFS(plain)); err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	if err := os.Chtimes(filepath.Join(elsewhere, vmpackage.ManifestFile), now, now); err != nil { // as whoever extracts it writes it last
		t.Fatal(err)
	}
	if id(elsewhere) != digested {
		t.Error("a copy of the package has another id")
	}
	disk := filepath.Join(elsewhere, vmpackage.DefaultFile("disk"))
	w, err := os.OpenFile(disk, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.WriteAt([]byte("x"), 5000); err != nil {
		t.Fatal(err)
	}
	w.Close()
	later := now.Add(time.Second)
	if err := os.Chtimes(disk, later, later); err != nil {
		t.Fatal(err)
	}
	if id(elsewhere) == digested {
		t.Error("a package that was changed has the same id")
	}
}
