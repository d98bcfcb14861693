package peer

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
)

// ServerConfig is a package to serve.
type ServerConfig struct {
	// Dir is the folder of the package. Devices, instead of it, say where each device is.
	Dir     string
	Devices []vmpackage.File

	// Images, instead of both, are the devices themselves. They are only read, and closed with the server.
	Images []Image

	// Concurrency bounds the workers of each session. 0 means migrate's default.
	Concurrency int

	// Authorize decides who may have a VM from here. Nil: whoever the transport lets in.
	Authorize Authorize

	// RescueTimeout is how long Close waits for a peer that lost its link before it had everything. Default: one minute.
	RescueTimeout time.Duration

	// Logger receives events; nil means slog.Default().
	Logger *slog.Logger
}

// Image is a device of a package that is no file.
type Image struct {
	Name   string // of the device
	Device block.Device
	ID     string // tells its content from any other
}

// Server serves a package to any number of peers, each of which gets a VM of its own that starts where the package was saved.
// A peer that can be given what it lacks later runs its guest as soon as it has the device state: the memory and the disks
// come when the guest touches them, and behind it as fast as they can.
//
// The package is only read, and nobody may change it meanwhile: its files are locked. It stays what it is, the source of
// clones; nothing is handed over, so nothing can be in doubt.
//
// The server remembers nothing of the peers it has served. A migration of it is known by the package: so a peer that lost its link
// finds what it lacks at any server of the same package ([Server.Rejoin]), also one that was started anew.
//
// Serve and Rejoin may be called by any number of goroutines at once.
type Server struct {
	cfg     ServerConfig
	still   *still
	devices []migrate.SourceDevice
	spec    json.RawMessage
	state   []byte        // of the machine
	id      string        // of all its migrations
	found   chan struct{} // receives when a peer that had lost its link has everything, if somebody waits for that

	mu       sync.Mutex // guards what follows
	closed   bool       // no session is begun, but for those who come back while others are there
	cut      bool       // nor for them
	sessions map[*session]struct{}
	idle     chan struct{} // closed when the last session has ended after closed was set; nil: nobody waits
}

// session is one call of Serve. Its fields are guarded by Server.mu.
type session struct {
	cancel  context.CancelFunc
	streams []io.ReadWriter // the newest
	needed  bool            // the guest may run there, and lack something
	over    chan struct{}   // closed when nobody waits for the peer any more
}

// OpenServer opens a package to be served. It must hold a saved VM.
func OpenServer(cfg ServerConfig) (_ *Server, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("serve package: %w", err)
		}
	}()
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	if cfg.RescueTimeout == 0 {
		cfg.RescueTimeout = time.Minute
	}
	if given := []bool{cfg.Dir != "", len(cfg.Devices) > 0, len(cfg.Images) > 0}; slices.Index(given, true) < 0 || slices.Contains(given[slices.Index(given, true)+1:], true) {
		return nil, errors.New("give either the folder of a package, or its devices, or images of them")
	}
	files := cfg.Devices
	if cfg.Dir != "" {
		pkg, err := vmpackage.Open(cfg.Dir)
		if err != nil {
			return nil, err
		}
		for _, d := range pkg.Devices {
			files = append(files, vmpackage.File{Name: d.Name, Path: d.Path})
		}
	}
	var devices []Device
	for _, f := range files {
		// Stationary: only read, and locked against those who would write.
		devices = append(devices, Device{DeviceConfig: runner.DeviceConfig{Name: f.Name, Base: f.Path}, Stationary: true})
	}
	if err := runner.CheckDevices(DeviceConfigs(devices)); err != nil {
		return nil, err
	}
	s := &Server{cfg: cfg, sessions: make(map[*session]struct{}), found: make(chan struct{})}
	if len(cfg.Images) > 0 {
		s.still = new(still)
		for _, image := range cfg.Images {
			s.still.devices = append(s.still.devices, &stillDevice{Device: image.Device, name: image.Name, id: image.ID})
		}
	} else if s.still, err = openStill(devices, nil); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.still.close())
		}
	}()
	for _, name := range []string{runner.StateDevice, runner.MemoryDevice, runner.ConfigDevice} {
		if s.still.device(name) == nil {
			return nil, fmt.Errorf("there is no device %q", name)
		}
	}
	desc, err := runner.ReadDescription(s.still.device(runner.ConfigDevice))
	if err != nil {
		return nil, err
	}
	for _, disk := range desc.Disks {
		if s.still.device(disk.Name) == nil {
			return nil, fmt.Errorf("there is no device %q, which the machine has as a disk", disk.Name)
		}
	}
	if have := s.still.device(runner.MemoryDevice).Size(); have != desc.MemorySize {
		return nil, fmt.Errorf("device %q has %d bytes, the machine's memory %d: they belong to different packages", runner.MemoryDevice, have, desc.MemorySize)
	}
	if s.spec, err = json.Marshal(desc); err != nil {
		return nil, err
	}
	if s.state, err = runner.ReadSaved(s.still.device(runner.StateDevice), false); err != nil {
		return nil, err
	}
	identity := sha256.New()
	fmt.Fprintf(identity, "%s\n%x\n", s.spec, sha256.Sum256(s.state))
	for _, d := range s.still.devices {
		content, err := contentOf(cfg.Dir, d)
		if err != nil {
			return nil, err
		}
		fmt.Fprintf(identity, "%s %d %s\n", d.name, d.Size(), content)
	}
	s.id = fmt.Sprintf("package-%x", identity.Sum(nil)[:16])
	for _, d := range s.still.devices {
		if d.name != runner.StateDevice {
			// Without a policy nothing is copied before the switch that can come after it.
			s.devices = append(s.devices, migrate.SourceDevice{Name: d.name, Device: d.Device})
		}
	}
	slices.SortStableFunc(s.devices, func(a, b migrate.SourceDevice) int { return runner.ByNeed(a.Name, b.Name) })
	return s, nil
}

// contentOf tells the content of a device from another: by the digest in the package's manifest, which is the same wherever the package is;
// where there is none, or the file was written to since, by when that was.
func contentOf(dir string, d *stillDevice) (string, error) {
	if d.id != "" {
		return d.id, nil
	}
	info, err := os.Stat(d.path)
	if err != nil {
		return "", err
	}
	if dir != "" {
		pkg, err := vmpackage.Open(dir)
		if err != nil {
			return "", err
		}
		manifest, err := os.Stat(filepath.Join(dir, vmpackage.ManifestFile))
		if in, ok := pkg.Manifest.Device(d.name); err == nil && ok && in.SHA256 != "" && !info.ModTime().After(manifest.ModTime()) {
			return in.SHA256, nil
		}
	}
	return info.ModTime().UTC().Format(time.RFC3339Nano), nil
}

// switchTimeout is how long a peer may take that gets everything before it runs its guest: nobody stands still for it here.
const switchTimeout = time.Hour

// Serve gives a VM to the peer at the other end of streams, and returns when it has all of it; its guest may have run for long by
// then. Cancelling ctx ends it until the guest may run there, and has no effect from then on. An error that wraps
// ErrStranger says that nothing was begun; one that wraps migrate.ErrUnsettled or migrate.ErrInDoubt, that the guest may run
// there and lack something: Rejoin goes on. The streams are closed when it returns. The report is there in any case.
func (s *Server) Serve(ctx context.Context, streams []io.ReadWriter) (*migrate.Report, error) {
	if err := s.cfg.Authorize.give(ctx, streams); err != nil {
		return &migrate.Report{}, err
	}
	return s.session(ctx, streams, false, func(ctx context.Context, me *session, cfg migrate.SourceConfig) (*migrate.Report, error) {
		cfg.OnState = func(state migrate.SourceState) {
			s.mu.Lock()
			defer s.mu.Unlock()
			me.needed = me.needed || state == migrate.SourceCommitting
		}
		report, err := send(ctx, streams, cfg)
		if errors.Is(err, migrate.ErrUnsettled) || errors.Is(err, migrate.ErrInDoubt) {
			s.wait(me)
		}
		return report, err
	})
}

// wait waits until a peer that has lost its link is back, if it comes.
func (s *Server) wait(me *session) {
	timeout := time.NewTimer(s.cfg.RescueTimeout)
	defer timeout.Stop()
	select {
	case <-s.found: // this one or another: as many are back as have left
	case <-timeout.C:
	case <-me.over:
	}
}

// Rejoin gives the peer at the other end of streams, which lost its link to this or another server of the package, what it lacks
// (Lobby.Rejoin says who comes for that). It returns as Serve does.
func (s *Server) Rejoin(ctx context.Context, streams []io.ReadWriter) (*migrate.Report, error) {
	if err := s.cfg.Authorize.meet(ctx, streams, Request{Give: true, Migration: s.id, Rejoin: true}); err != nil {
		return &migrate.Report{}, err
	}
	defer closeAll(streams)
	return s.session(ctx, streams, true, func(ctx context.Context, me *session, cfg migrate.SourceConfig) (*migrate.Report, error) {
		ctx, cancel := context.WithCancelCause(ctx)
		defer cancel(nil)
		for _, stream := range streams {
			if s, ok := stream.(*spoken); ok {
				s.asked = true
			}
		}
		used := false
		cfg.Reconnect = func(context.Context) ([]io.ReadWriter, error) {
			if used { // the next time, it will be another call
				cancel(errors.New("the peer left again"))
				return nil, context.Cause(ctx)
			}
			used = true
			return streams, nil
		}
		report, err := migrate.RejoinSource(ctx, cfg)
		if err == nil {
			select {
			case s.found <- struct{}{}:
			default:
			}
		}
		return report, err
	})
}

// session has a session with a peer, which may need it already.
func (s *Server) session(ctx context.Context, streams []io.ReadWriter, needed bool, have func(context.Context, *session, migrate.SourceConfig) (*migrate.Report, error)) (*migrate.Report, error) {
	// Cancelling ends what was begun, but leaves no guest without what it lacks: see stop.
	ongoing, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	me := &session{cancel: cancel, streams: streams, needed: needed, over: make(chan struct{})}
	s.mu.Lock()
	if s.cut || s.closed && len(s.sessions) == 0 {
		s.mu.Unlock()
		closeAll(streams)
		return &migrate.Report{}, errors.New("the server is closed")
	}
	s.sessions[me] = struct{}{}
	s.mu.Unlock()
	defer s.leave(me)
	defer context.AfterFunc(ctx, func() { s.stop(me, false) })()
	return have(ongoing, me, migrate.SourceConfig{
		ID: s.id, Devices: s.devices, Spec: s.spec, Guest: saved{s.state}, Goal: migrate.Goal{PostCopy: true}, Concurrency: s.cfg.Concurrency,
		SwitchTimeout: switchTimeout, RescueTimeout: s.cfg.RescueTimeout, Logger: s.cfg.Logger,
	})
}

// stop ends a session. Without force it does so only if nobody is left without what is missing.
func (s *Server) stop(me *session, force bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !me.needed || force {
		me.cancel()
	}
	if force {
		closeAll(me.streams)
		close(me.over)
	}
}

// leave ends a session.
func (s *Server) leave(me *session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.sessions, me)
	if s.idle != nil && len(s.sessions) == 0 {
		close(s.idle)
		s.idle = nil
	}
}

// Sessions is how many peers are being served.
func (s *Server) Sessions() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.sessions)
}

// Close ends what has not come so far that a guest runs, waits until all others have everything, those who lost their link, too,
// and closes the package. When ctx ends before, they are left without the rest: their guests stand still as soon as they need it.
// Close is called once; Serve is not called any more.
func (s *Server) Close(ctx context.Context) error {
	idle := make(chan struct{})
	s.mu.Lock()
	s.closed = true
	if len(s.sessions) == 0 {
		close(idle)
	} else {
		s.idle = idle
	}
	begun := slices.Collect(maps.Keys(s.sessions))
	s.mu.Unlock()
	for _, me := range begun {
		s.stop(me, false)
	}
	select {
	case <-idle:
	case <-ctx.Done():
		s.mu.Lock()
		s.cut = true
		begun = slices.Collect(maps.Keys(s.sessions))
		s.mu.Unlock()
		for _, me := range begun {
			s.stop(me, true)
		}
		<-idle
	}
	return s.still.close()
}

// saved is a guest that was saved, as migrate.Send sees it: it stands still already, and has its state.
type saved struct{ state []byte }

func (saved) BeforeSuspend(context.Context) error { return nil }
func (saved) Pause(context.Context) error         { return nil }
func (saved) Resume(context.Context) error        { return nil }

func (s saved) State(_ context.Context, w io.Writer) error {
	_, err := w.Write(s.state)
	return err
}
