package supervise

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/drafter-vm/drafter/pkg/oci/bundle"
)

// Times of a container's life. Tests shorten them.
type times struct {
	backoff, maxBackoff time.Duration // between an end and the next start
	reset               time.Duration // a run that lasts so long begins backoff anew
	grace               time.Duration // between SIGTERM and SIGKILL
	poll                time.Duration // between two looks at whether it is ready
}

var defaultTimes = times{100 * time.Millisecond, 10 * time.Second, 10 * time.Second, 10 * time.Second, 50 * time.Millisecond}

// state is where in its life a container is.
type state string

const (
	starting state = "starting"
	running  state = "running" // and not ready
	ready    state = "ready"
	waiting  state = "waiting" // for its next start
	ended    state = "ended"   // with status 0
	failed   state = "failed"  // and is not started again
)

// container is one, and the goroutine that run is.
type container struct {
	found
	s   *supervisor
	log *slog.Logger

	again chan struct{} // capacity 1: it is to be started anew, whatever it does

	mu       sync.Mutex // guards what follows
	state    state
	ready    string // what makes it so, as the annotation has it
	env      []string
	starts   int       // how many times it was started
	asked    int       // how many times somebody asked for a start
	served   int       // of these, how many the newest start has served
	since    time.Time // when state was entered
	detail   string    // of its last end
	hostname string    // of its own
}

// status is what others are told of a container.
type status struct {
	Name   string        `json:"name"`
	Disk   string        `json:"disk"`
	State  state         `json:"state"`
	Ready  string        `json:"ready"`
	Starts int           `json:"starts"`
	For    time.Duration `json:"for"` // it has been in that state
	Detail string        `json:"detail,omitempty"`
}

func (c *container) status() status {
	c.mu.Lock()
	defer c.mu.Unlock()
	return status{c.name, c.disk, c.state, c.ready, c.starts, time.Since(c.since).Round(time.Millisecond), c.detail}
}

// settled reports whether nobody needs to wait for the container: for its newest start, that is, after all that were asked for.
func (c *container) settled() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.served == c.asked && (c.state == ready || c.state == ended)
}

// enter changes the state.
func (c *container) enter(s state, detail string) {
	c.mu.Lock()
	c.state, c.since = s, time.Now()
	if detail != "" {
		c.detail = detail
	}
	c.mu.Unlock()
	c.s.changed()
}

// restart has the container started anew. What is in flight is ended first.
func (c *container) restart() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.asked++
	select {
	case c.again <- struct{}{}:
	default: // a start that is yet to come serves both
	}
}

// begin is entered at each start.
func (c *container) begin() {
	c.mu.Lock()
	select {
	case <-c.again: // which this start serves
	default:
	}
	c.starts++
	c.served = c.asked
	c.mu.Unlock()
	c.enter(starting, "")
}

// run has the container run, again and again, until ctx is done. Then it does not run any more.
func (c *container) run(ctx context.Context) {
	t := c.s.times
	pause, failures := t.backoff, 0
	for ctx.Err() == nil {
		c.begin()
		began := time.Now()
		end := c.once(ctx)
		if ctx.Err() != nil {
			return
		}
		if end.asked {
			pause, failures = t.backoff, 0
			continue
		}
		if time.Since(began) >= t.reset {
			pause, failures = t.backoff, 0
		}
		if end.failed() {
			failures++
		} else {
			failures = 0
		}
		how := end.String()
		switch {
		case end.restart.Always, end.failed() && end.restart.OnFailure && (end.restart.Max == 0 || failures <= end.restart.Max):
			c.log.Warn("a container has ended, and is started again", "end", how, "pause", pause)
			c.enter(waiting, how)
			select {
			case <-ctx.Done():
				return
			case <-c.again:
				pause, failures = t.backoff, 0
				continue
			case <-time.After(pause):
			}
			pause = min(2*pause, t.maxBackoff)
			continue
		case end.failed():
			c.log.Error("a container has failed, and is not started again", "end", how)
			c.enter(failed, how)
		default:
			c.log.Info("a container has ended", "end", how)
			c.enter(ended, how)
		}
		select {
		case <-ctx.Done():
			return
		case <-c.again:
			pause, failures = t.backoff, 0
		}
	}
}

// end is how a run ended.
type end struct {
	err     error // it could not be started
	status  int
	asked   bool // somebody has asked for that
	restart bundle.Restart
}

func (e end) failed() bool { return e.err != nil || e.status != 0 }

func (e end) String() string {
	if e.err != nil {
		return e.err.Error()
	}
	return "exit status " + strconv.Itoa(e.status)
}

// prepare makes the folder that the runtime is given, and is how the container is to be treated.
func (c *container) prepare(ctx context.Context) (r bundle.Restart, k bundle.Ready, stop string, err error) {
	cfg, all, err := readConfig(filepath.Join(c.dir, bundle.ConfigFile))
	if err != nil {
		return bundle.Restart{OnFailure: true}, k, "", err
	}
	r, err = bundle.ParseRestart(cfg.Annotations[bundle.RestartAnnotation])
	if err != nil {
		r.OnFailure = true
	}
	k, failed := bundle.ParseReady(cfg.Annotations[bundle.ReadyAnnotation])
	if err = errors.Join(err, failed); err != nil {
		return r, k, "", fmt.Errorf("read annotations of config.json: %w", err)
	}
	if stop = cfg.Annotations[stopSignalAnnotation]; !signalName.MatchString(stop) {
		stop = "TERM"
	}
	env := c.s.environment(cfg.Process.Env, c.name)
	c.mu.Lock()
	c.env, c.ready, c.hostname = env, cfg.Annotations[bundle.ReadyAnnotation], cfg.Hostname
	log := c.log
	if c.starts > 1 { // what is left out of it was said at its first start
		log = slog.New(slog.DiscardHandler)
	}
	c.mu.Unlock()
	p := place{
		run: c.s.path("containers", c.name), etc: c.s.etc, cgroup: filepath.Join(c.s.cgroup, c.name), root: c.root, dir: c.dir, notify: k.Notify, env: env,
		volumes: &c.s.volumes, log: log, sysctl: c.s.sysctl,
	}
	if err := errors.Join(os.MkdirAll(filepath.Join(p.run, "notify"), 0o755), p.refresh(cfg.Hostname)); err != nil {
		return r, k, stop, err
	}
	text, err := p.adapt(ctx, cfg, all)
	if err == nil {
		err = p.makeDev()
	}
	if err == nil {
		err = replaceFile(filepath.Join(p.run, bundle.ConfigFile), text)
	}
	return r, k, stop, err
}

var signalName = regexp.MustCompile(`^(SIG)?[A-Z0-9+-]{1,16}$|^[0-9]{1,2}$`)

// changedEnvironment reports whether the container runs with another environment than it would be started with.
func (c *container) changedEnvironment() bool {
	cfg, _, err := readConfig(filepath.Join(c.dir, bundle.ConfigFile))
	if err != nil {
		return false // nor can it be started
	}
	next := c.s.environment(cfg.Process.Env, c.name)
	c.mu.Lock()
	defer c.mu.Unlock()
	return !slices.Equal(next, c.env)
}

// refresh writes anew what the container sees of /etc.
func (c *container) refresh() error {
	c.mu.Lock()
	hostname := c.hostname
	c.mu.Unlock()
	return place{run: c.s.path("containers", c.name), etc: c.s.etc}.refresh(hostname)
}

// once runs the container to its end. It is brought about when ctx is done, or when somebody asks for another start.
func (c *container) once(ctx context.Context) (e end) {
	rt := c.s.runtime
	preparing, cancel := context.WithCancel(ctx)
	watched := make(chan bool, 1)
	go func() { // a volume may be waited for
		select {
		case <-c.again:
			cancel()
			watched <- true
		case <-preparing.Done():
			watched <- false
		}
	}()
	var k bundle.Ready
	var stop string
	e.restart, k, stop, e.err = c.prepare(preparing)
	cancel()
	if <-watched {
		return end{asked: true}
	}
	if e.err != nil || ctx.Err() != nil {
		return e
	}
	if e.err = rt.remove(c.name); e.err != nil { // of a runtime that was killed
		return e
	}

	run := c.s.path("containers", c.name)
	pidFile := filepath.Join(run, "pid")
	os.Remove(pidFile)
	var socket *net.UnixConn
	if k.Notify {
		if socket, e.err = listenNotify(filepath.Join(run, "notify", notifyName)); e.err != nil {
			return e
		}
	}
	cmd := rt.command("run", "--bundle", run, "--pid-file", pidFile, c.name)
	var wg sync.WaitGroup
	readers, writers := [2]*os.File{}, [2]*os.File{}
	for n := range readers {
		if readers[n], writers[n], e.err = os.Pipe(); e.err != nil {
			e.err = fmt.Errorf("start: %w", e.err)
			break
		}
	}
	cmd.Stdout, cmd.Stderr = writers[0], writers[1]
	if e.err == nil {
		e.err = cmd.Start()
	}
	for _, w := range writers {
		w.Close()
	}
	if e.err != nil {
		for _, r := range readers {
			r.Close()
		}
		if socket != nil {
			socket.Close()
		}
		return e
	}

	// What says that it is ready. All of it ends with the run.
	living, over := context.WithCancel(context.WithoutCancel(ctx))
	var wroteIt, saidIt sync.Once
	told := make(chan struct{}) // by its output or the socket
	for n, r := range readers {
		wg.Go(func() {
			c.s.output.copy(c.name, r, func(line []byte) {
				if k.Log != nil && k.Log.Match(line) {
					wroteIt.Do(func() { close(told) })
				}
			})
			readers[n].Close() // a container that wrote on would wait for ever
		})
	}
	var watchers sync.WaitGroup
	if socket != nil {
		watchers.Go(func() {
			b := make([]byte, 4096)
			for {
				n, err := socket.Read(b)
				if err != nil {
					return
				}
				if slices.Contains(strings.Split(string(b[:n]), "\n"), "READY=1") {
					saidIt.Do(func() { close(told) })
				}
			}
		})
	}
	watchers.Go(func() { c.watch(living, pidFile, cmd.Process.Pid, k, told) })

	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }() // received below
	var err error
	select {
	case err = <-exited:
	case <-c.again:
		e.asked = true
		err = c.stop(stop, cmd, exited)
	case <-ctx.Done():
		err = c.stop(stop, cmd, exited)
	}
	over()
	if socket != nil {
		socket.Close()
	}
	watchers.Wait()
	if failure := rt.remove(c.name); failure != nil { // what a runtime leaves that was killed
		c.log.Error("what is left of a container cannot be removed", "error", failure)
	}
	drained := make(chan struct{})
	go func() { wg.Wait(); close(drained) }()
	select {
	case <-drained:
	case <-time.After(time.Second): // somebody else has its output, and lives
		for _, r := range readers {
			r.SetReadDeadline(time.Now())
		}
		<-drained
	}
	e.status = exitStatus(err)
	return e
}

// exitStatus is what a shell would have it be.
func exitStatus(err error) int {
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case !errors.As(err, &exit):
		return 1
	}
	if ws, ok := exit.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return exit.ExitCode()
}

// stop ends a run: the container's own way, then the kernel's, then without the runtime's help.
func (c *container) stop(signal string, cmd *exec.Cmd, exited <-chan error) error {
	rt := c.s.runtime
	deadline := time.After(c.s.times.grace)
	for told := false; ; {
		if !told { // it may not be there yet
			told = rt.command("kill", c.name, signal).Run() == nil
		}
		retry := time.After(100 * time.Millisecond)
		if told {
			retry = nil
		}
		select {
		case err := <-exited:
			return err
		case <-retry:
			continue
		case <-deadline:
		}
		break
	}
	c.log.Warn("a container does not end, and is killed", "signal", signal, "took", c.s.times.grace)
	_ = rt.command("kill", c.name, "KILL").Run() // what follows finds out
	select {
	case err := <-exited:
		return err
	case <-time.After(2 * time.Second):
	}
	_ = cmd.Process.Kill() // the container itself is removed by who called
	return <-exited
}

// watch finds out when the container runs, and when it is ready.
func (c *container) watch(ctx context.Context, pidFile string, runtime int, k bundle.Ready, told <-chan struct{}) {
	tick := time.NewTicker(c.s.times.poll)
	defer tick.Stop()
	wait := func() bool {
		select {
		case <-tick.C:
			return true
		case <-ctx.Done():
			return false
		}
	}
	for !c.s.started(pidFile, runtime) {
		if !wait() {
			return
		}
	}
	c.enter(running, "")
	switch {
	case k.Port != 0:
		for !answers(ctx, k.Port) {
			if !wait() {
				return
			}
		}
	case k.Log != nil || k.Notify:
		select {
		case <-told:
		case <-ctx.Done():
			return
		}
	}
	if ctx.Err() == nil {
		c.enter(ready, "")
		c.log.Info("a container is ready")
	}
}

// answers reports whether something accepts connections on a port, at any address of this machine.
func answers(ctx context.Context, port int) bool {
	hosts := []string{"127.0.0.1", "::1"}
	addrs, _ := net.InterfaceAddrs()
	for _, a := range addrs {
		if ip, ok := a.(*net.IPNet); ok && ip.IP.IsGlobalUnicast() {
			hosts = append(hosts, ip.IP.String())
		}
	}
	for _, host := range hosts {
		d := net.Dialer{Timeout: 2 * time.Second}
		if conn, err := d.DialContext(ctx, "tcp", net.JoinHostPort(host, strconv.Itoa(port))); err == nil {
			conn.Close()
			return true
		}
	}
	return false
}

// listenNotify makes the socket by which a container says that it is ready. Its user may be any.
func listenNotify(path string) (*net.UnixConn, error) {
	os.Remove(path)
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err == nil {
		err = os.Chmod(path, 0o666)
	}
	if err != nil {
		return nil, fmt.Errorf("make the socket of NOTIFY_SOCKET: %w", err)
	}
	return conn, nil
}

// executed reports whether a container's process has become its program: until then it is the runtime's.
func executed(pidFile string, runtime int) bool {
	text, err := os.ReadFile(pidFile)
	if err != nil {
		return false
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil || pid <= 0 {
		return false
	}
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	own, failed := os.Readlink(fmt.Sprintf("/proc/%d/exe", runtime))
	return err == nil && failed == nil && exe != own
}

// runtime is a program as the OCI's runtime command line has it: crun, runc.
type runtime struct {
	program, root string // root: where it keeps the state of containers
}

func (r runtime) command(verb string, args ...string) *exec.Cmd {
	cmd := exec.Command(r.program, append([]string{"--root", r.root, verb}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // what a terminal sends to this process is not for it
	cmd.Dir = "/"
	// NOTIFY_SOCKET is the supervisor's own: a runtime would hand it on.
	cmd.Env = slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "NOTIFY_SOCKET=") || strings.HasPrefix(v, "LISTEN_") })
	return cmd
}

// remove kills what runs of a container, and forgets it. That there is none is no error.
func (r runtime) remove(name string) error {
	if _, err := os.Stat(filepath.Join(r.root, name)); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if out, err := r.command("delete", "--force", name).CombinedOutput(); err != nil {
		if _, gone := os.Stat(filepath.Join(r.root, name)); errors.Is(gone, os.ErrNotExist) {
			return nil
		}
		return fmt.Errorf("remove container %q: %w: %s", name, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// removeAll removes all that a supervisor before this one has left.
func (r runtime) removeAll() error {
	entries, err := os.ReadDir(r.root)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look for containers that are left: %w", err)
	}
	var errs []error
	for _, e := range entries {
		if e.IsDir() {
			errs = append(errs, r.remove(e.Name()))
		}
	}
	return errors.Join(errs...)
}
