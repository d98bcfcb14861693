package supervise

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Config is how a guest's containers are run. Its zero value is what a guest wants.
type Config struct {
	// Runtime is the program that runs a container, as the command line of OCI runtimes has it. Empty: crun, or else runc.
	Runtime string

	// Output is what lines of containers are written to besides the console. Nil: standard output.
	Output io.Writer

	// Console is the terminal of the guest. Empty: /dev/console. Without one there is none.
	Console string

	// Logger receives events; nil means slog.Default().
	Logger *slog.Logger

	// What tests have elsewhere, or otherwise.
	run, state, etc string
	times           times
	cgroup          string
	find            func(context.Context) ([]found, error)
	started         func(pidFile string, runtime int) bool
	sysctl          func(name, value string) error
	mounted         bool // nothing is mounted, nor unmounted
}

// Where the supervisor keeps what it needs while it runs, and what outlasts that.
const (
	runFolder   = "/run/drafter"
	stateFolder = "/var/lib/drafter"
	socketName  = "containers.sock"
	keptName    = "containers.json"
)

// supervisor is one run of Run.
type supervisor struct {
	runtime runtime
	output  output
	volumes volumes
	log     *slog.Logger

	run, state, etc, cgroup string
	times                   times
	started                 func(pidFile string, runtime int) bool
	sysctl                  func(name, value string) error

	containers []*container // set before anything else runs

	mu      sync.Mutex    // guards what follows
	given   []variable    // to containers, besides what their images have
	changes chan struct{} // closed and replaced when a container enters another state

	setting sync.Mutex // one environment is set at a time
}

// path is a path below the supervisor's folder.
func (s *supervisor) path(elements ...string) string {
	return filepath.Join(append([]string{s.run}, elements...)...)
}

func (s *supervisor) changed() {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.changes)
	s.changes = make(chan struct{})
}

// await waits until cond holds. It is asked again whenever a container enters another state.
func (s *supervisor) await(ctx context.Context, cond func() bool) error {
	for {
		s.mu.Lock()
		changes := s.changes
		s.mu.Unlock()
		if cond() {
			return nil
		}
		select {
		case <-changes:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// environment is that of a container whose image has env.
func (s *supervisor) environment(env []string, name string) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return given(slices.Clone(env), name, s.given)
}

// findRuntime is the program to use.
func findRuntime(name string) (string, error) {
	if name != "" {
		return name, nil
	}
	for _, name := range []string{"crun", "runc"} {
		if path, err := exec.LookPath(name); err == nil {
			return path, nil
		}
	}
	return "", errors.New("there is neither crun nor runc in this guest: make its blueprint with --oci, or install one of them")
}

// Run runs the containers of this machine until ctx is done; then it ends them, and returns nil. Another Run on the same machine fails.
func Run(ctx context.Context, cfg Config) (err error) {
	s := &supervisor{
		run: cmp.Or(cfg.run, runFolder), state: cmp.Or(cfg.state, stateFolder), etc: cmp.Or(cfg.etc, "/etc"), times: cfg.times,
		started: cfg.started, sysctl: cfg.sysctl, changes: make(chan struct{}),
	}
	if s.times == (times{}) {
		s.times = defaultTimes
	}
	if s.started == nil {
		s.started = executed
	}
	if s.sysctl == nil {
		s.sysctl = setSysctl
	}
	if s.output.journal = cfg.Output; cfg.Output == nil {
		s.output.journal = os.Stdout
	}
	if s.output.console = openConsole(cmp.Or(cfg.Console, "/dev/console")); s.output.console != nil {
		defer s.output.console.close()
	}
	log := onConsole(cmp.Or(cfg.Logger, slog.Default()), s.output.console)
	s.log = log
	defer func() {
		if err != nil {
			log.Error("containers do not run", "error", err)
		}
	}()
	if s.runtime.program, err = findRuntime(cfg.Runtime); err != nil {
		return err
	}
	s.runtime.root = s.path("runtime")
	if err := os.MkdirAll(s.run, 0o755); err != nil {
		return fmt.Errorf("make folder: %w", err)
	}
	unlock, err := lockOnce(s.path("containers.lock"))
	if err != nil {
		return err
	}
	defer unlock()
	if s.cgroup = cfg.cgroup; s.cgroup == "" {
		s.cgroup = ownControlGroup(log)
	}
	devices := disks{"/sys", "/dev", "/etc/fstab", "/proc/self/mountinfo"}
	s.volumes = volumes{disks: devices, dir: s.path("volumes"), wait: volumeWait}
	unmount := func() error {
		if cfg.mounted {
			return nil
		}
		return unmountBelow(devices.mountinfo, s.path("root"), s.path("oci"), s.path("look"), s.path("volumes"))
	}

	// What an earlier run has left, which did not come to its end.
	if err := errors.Join(s.runtime.removeAll(), unmount()); err != nil {
		return fmt.Errorf("clean up after an earlier run: %w", err)
	}
	k, err := readKept(filepath.Join(s.state, keptName))
	if err == nil {
		s.given, err = parseEnvironment(k.Environment)
	}
	if err != nil {
		log.Error("the environment that containers were given is not known any more", "error", err)
	}
	find := cfg.find
	if find == nil {
		find = func(ctx context.Context) ([]found, error) { return devices.findBundles(ctx, s.run, log) }
	}
	defer func() { err = errors.Join(err, unmount()) }()
	all, err := find(ctx)
	if err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return fmt.Errorf("find containers: %w", err)
	}
	if len(all) == 0 {
		log.Warn("no disk of this machine holds a container: config.json and the folder rootfs at the root of a file system that is not mounted")
	}
	for _, f := range all {
		s.containers = append(s.containers, &container{found: f, s: s, log: log.With("container", f.name, "device", f.disk), again: make(chan struct{}, 1), state: starting, since: time.Now()})
	}
	listener, err := s.listen()
	if err != nil {
		return err
	}

	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	wg.Go(func() { s.serve(ctx, listener) })
	wg.Go(func() { s.follow(ctx) })
	for _, c := range s.containers {
		wg.Go(func() { c.run(ctx) })
	}
	for s.await(ctx, s.allSettled) == nil {
		select {
		case <-time.After(steady):
		case <-ctx.Done():
		}
		if s.allSettled() { // still: a server may listen, and end because of what it finds next
			notify("READY=1")
			log.Info("all containers are ready", "containers", len(s.containers))
			break
		}
	}
	<-ctx.Done()
	notify("STOPPING=1")
	return nil
}

// steady is for how long containers must be ready until the guest counts as up.
const steady = time.Second

func (s *supervisor) allSettled() bool {
	var waits []string
	for _, c := range s.containers {
		if !c.settled() {
			waits = append(waits, c.name)
		}
	}
	if len(waits) > 0 {
		notify("STATUS=waiting for " + strings.Join(waits, ", "))
		return false
	}
	notify("STATUS=all containers are ready")
	return true
}

// follow keeps what containers see of /etc like what is there.
func (s *supervisor) follow(ctx context.Context) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err == nil {
		_, err = unix.InotifyAddWatch(fd, s.etc, unix.IN_CLOSE_WRITE|unix.IN_MOVED_TO)
	}
	if err != nil {
		s.log.Warn("containers do not see changes of /etc until they start anew", "error", err)
		return
	}
	f := os.NewFile(uintptr(fd), "inotify")
	defer f.Close()
	defer context.AfterFunc(ctx, func() { f.SetReadDeadline(time.Now()) })()
	for b := make([]byte, 4096); ; {
		if _, err := f.Read(b); err != nil {
			return
		}
		for _, c := range s.containers { // whatever has changed: what is the same is not written
			if err := c.refresh(); err != nil {
				c.log.Warn("a container does not see a change of /etc", "error", err)
			}
		}
	}
}

// setEnvironment gives containers an environment, in place of what was given before, and waits until those are ready that it changes.
func (s *supervisor) setEnvironment(ctx context.Context, list []string) error {
	s.setting.Lock()
	defer s.setting.Unlock()
	variables, err := parseEnvironment(list)
	if err != nil {
		return err
	}
	var names []string
	for _, c := range s.containers {
		names = append(names, c.name)
	}
	if len(names) == 0 {
		return errors.New("this guest has no containers: no disk of it holds one")
	}
	for _, v := range variables {
		if v.container != "" && !slices.Contains(names, v.container) {
			return fmt.Errorf("variable %s is for the container %q, and there is %s", v.name, v.container, strings.Join(names, ", "))
		}
	}
	if err := (kept{list}).write(filepath.Join(s.state, keptName)); err != nil {
		return err
	}
	s.mu.Lock()
	s.given = variables
	s.mu.Unlock()
	var changed []*container
	for _, c := range s.containers {
		if c.changedEnvironment() {
			s.log.Info("a container is given another environment, and started again", "container", c.name)
			c.restart()
			changed = append(changed, c)
		}
	}
	return s.ready(ctx, changed)
}

// ready waits until containers are, after the starts that were asked for.
func (s *supervisor) ready(ctx context.Context, containers []*container) error {
	var hopeless error
	err := s.await(ctx, func() bool {
		for _, c := range containers {
			if st := c.status(); st.State == failed && !c.pending() {
				hopeless = fmt.Errorf("container %q has failed: %s", c.name, st.Detail)
				return true
			}
		}
		return !slices.ContainsFunc(containers, func(c *container) bool { return !c.settled() })
	})
	if err == nil || hopeless != nil {
		return hopeless
	}
	for _, c := range containers {
		if !c.settled() {
			st := c.status()
			return fmt.Errorf("container %q is not ready yet (%s; %s): %w", c.name, st.State, cmp.Or(st.Detail, "it has not ended so far"), err)
		}
	}
	return err
}

// pending reports whether a start was asked for that has not begun.
func (c *container) pending() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.served != c.asked
}

// lockOnce makes sure that one supervisor runs.
func lockOnce(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, errors.New("another drafter-agent containers runs here, as the service drafter-containers perhaps")
		}
		return nil, fmt.Errorf("lock %q: %w", path, err)
	}
	return func() { f.Close() }, nil
}

// ownControlGroup is the group below which containers have theirs. Where groups have controllers, one that has groups has no processes: so this process goes to one below its own.
func ownControlGroup(log *slog.Logger) string {
	text, err := os.ReadFile("/proc/self/cgroup")
	own, unified := strings.CutPrefix(strings.TrimSpace(string(text)), "0::")
	if err != nil || !unified || strings.Contains(own, "\n") || own == "/" {
		return "/drafter"
	}
	own = strings.TrimSuffix(own, "/"+ownLeaf)
	leaf := filepath.Join("/sys/fs/cgroup", own, ownLeaf)
	err = os.Mkdir(leaf, 0o755)
	if err == nil || errors.Is(err, os.ErrExist) {
		err = os.WriteFile(filepath.Join(leaf, "cgroup.procs"), []byte("0"), 0o644)
	}
	if err != nil {
		log.Warn("containers are not in the control group of this service", "error", err)
		return "/drafter"
	}
	return own
}

// ownLeaf is the control group of the supervisor; no container can be called that.
const ownLeaf = ".supervisor"

// notify tells the service manager (sd_notify(3)), if one asked to be told.
func notify(state string) {
	if path := os.Getenv("NOTIFY_SOCKET"); path != "" {
		if conn, err := net.Dial("unixgram", path); err == nil { // Go, too, writes abstract sockets with an @
			_, _ = conn.Write([]byte(state)) // a manager that does not listen has its own deadline
			conn.Close()
		}
	}
}
