package supervise

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/pkg/oci/bundle"
)

// TestMain has the test program also be a runtime, and a supervisor that can be killed.
func TestMain(m *testing.M) {
	switch {
	case len(os.Args) > 3 && os.Args[1] == "--root":
		os.Exit(fakeRuntime(os.Args[2], os.Args[3], os.Args[4:]))
	case len(os.Args) > 2 && os.Args[1] == "--supervise":
		w := &world{dir: os.Args[2]}
		fmt.Fprintln(os.Stderr, Run(context.Background(), w.config(os.Stdout)))
		os.Exit(1)
	}
	os.Setenv("GORACE", "atexit_sleep_ms=0 "+os.Getenv("GORACE")) // of these, which are started often
	os.Exit(m.Run())
}

// fakeRuntime does what crun does, but for all that makes a container of a process: its program is one of this machine.
func fakeRuntime(root, verb string, args []string) int {
	name := args[len(args)-1]
	if verb == "kill" {
		name = args[0]
	}
	dir := filepath.Join(root, name)
	fail := func(err error) int {
		fmt.Fprintln(os.Stderr, "fake:", err)
		return 1
	}
	signal := func(s syscall.Signal) error {
		text, err := os.ReadFile(filepath.Join(dir, "pid"))
		if err != nil {
			return err
		}
		pid, _ := strconv.Atoi(string(text))
		return syscall.Kill(-pid, s)
	}
	switch verb {
	case "run":
		text, err := os.ReadFile(filepath.Join(args[1], bundle.ConfigFile))
		if err != nil {
			return fail(err)
		}
		var c config
		if err := json.Unmarshal(text, &c); err != nil {
			return fail(err)
		}
		if err := errors.Join(os.MkdirAll(root, 0o700), os.Mkdir(dir, 0o700)); err != nil {
			return fail(fmt.Errorf("container is there already: %w", err))
		}
		cmd := exec.Command(c.Process.Args[0], c.Process.Args[1:]...)
		cmd.Env, cmd.Stdout, cmd.Stderr, cmd.SysProcAttr = c.Process.Env, os.Stdout, os.Stderr, &syscall.SysProcAttr{Setsid: true}
		for n, v := range cmd.Env { // what a mount would have made of it
			if strings.HasPrefix(v, "NOTIFY_SOCKET=") {
				cmd.Env[n] = "NOTIFY_SOCKET=" + filepath.Join(args[1], "notify", notifyName)
			}
		}
		if err := cmd.Start(); err != nil {
			os.Remove(dir)
			return fail(err)
		}
		pid := []byte(strconv.Itoa(cmd.Process.Pid))
		if err := errors.Join(os.WriteFile(filepath.Join(dir, "pid"), pid, 0o600), replaceFile(args[3], pid)); err != nil {
			return fail(err)
		}
		status := exitStatus(cmd.Wait())
		os.RemoveAll(dir)
		return status
	case "kill":
		s := syscall.SIGTERM
		if args[1] == "KILL" {
			s = syscall.SIGKILL
		} else if args[1] == "SIGUSR1" {
			s = syscall.SIGUSR1
		}
		if err := signal(s); err != nil {
			return fail(err)
		}
	case "delete":
		_ = signal(syscall.SIGKILL)
		os.RemoveAll(dir)
	}
	return 0
}

// world is a machine: folders that stand for its disks, and what is in /etc, /run and /var.
type world struct {
	dir string
	out buffer
}

func newWorld(t *testing.T) *world {
	t.Helper()
	dir, err := os.MkdirTemp("", "sv") // short, for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	w := &world{dir: dir}
	for name, text := range map[string]string{"hostname": "guest\n", "hosts": "127.0.0.1 localhost\n", "resolv.conf": "nameserver 192.0.2.1\n"} {
		w.write(t, "etc/"+name, text)
	}
	w.write(t, "disks/.keep", "")
	return w
}

func (w *world) path(name string) string { return filepath.Join(w.dir, name) }

func (w *world) write(t *testing.T, name, text string) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(w.path(name)), 0o755), os.WriteFile(w.path(name), []byte(text), 0o644)); err != nil {
		t.Fatal(err)
	}
}

// container makes a disk with one, which runs a script of the shell.
func (w *world) container(t *testing.T, name, script string, annotations map[string]string, env ...string) {
	t.Helper()
	text, err := json.Marshal(map[string]any{
		"ociVersion": "1.0.2", "annotations": annotations, "root": map[string]any{"path": "rootfs"},
		"process": map[string]any{"cwd": "/", "args": []string{"/bin/sh", "-c", script}, "env": append([]string{"PATH=/usr/bin:/bin", "DIR=" + w.dir}, env...)},
	})
	if err == nil {
		err = os.MkdirAll(w.path("disks/"+name+"/rootfs"), 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	w.write(t, "disks/"+name+"/config.json", string(text))
}

// buffer is a writer that is read while it is written.
type buffer struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func (w *world) config(out io.Writer) Config {
	self, _ := os.Executable()
	return Config{
		Runtime: self, Output: out, Console: "/nonexistent", Logger: slog.New(slog.NewTextHandler(out, nil)),
		run: w.path("run"), state: w.path("var"), etc: w.path("etc"), cgroup: "/test", mounted: true,
		times:  times{5 * time.Millisecond, 40 * time.Millisecond, time.Second, 2 * time.Second, 5 * time.Millisecond},
		sysctl: func(name, value string) error { return nil },
		find: func(context.Context) (all []found, err error) {
			entries, err := os.ReadDir(w.path("disks"))
			for _, e := range entries {
				if dir := w.path("disks/" + e.Name()); e.IsDir() {
					all = append(all, found{disk: "vd" + e.Name(), name: e.Name(), dir: dir, root: filepath.Join(dir, "rootfs")})
				}
			}
			return all, err
		},
	}
}

// run runs a supervisor until stop is called, at the latest at the end of the test.
func (w *world) run(t *testing.T) (c Client, stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- Run(ctx, w.config(&w.out)) }()
	stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(30 * time.Second):
			panic("Run does not end")
		}
		if t.Failed() {
			t.Logf("it said:\n%s", w.out.String())
		}
		if left, _ := os.ReadDir(w.path("run/runtime")); len(left) > 0 {
			t.Errorf("%d containers are left", len(left))
		}
	})
	t.Cleanup(stop)
	c = Client{run: w.path("run")}
	if _, err := c.List(t.Context()); err != nil {
		t.Fatal(err)
	}
	return c, stop
}

// until waits until a container is as cond wants it.
func until(t *testing.T, c Client, name string, cond func(Container) bool) Container {
	t.Helper()
	var last Container
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		all, err := c.List(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, one := range all {
			if last = one; one.Name == name && cond(one) {
				return one
			}
		}
	}
	t.Fatalf("container %s does not come to that: %+v", name, last)
	return last
}

func is(s state) func(Container) bool { return func(c Container) bool { return c.State == string(s) } }

func TestRestart(t *testing.T) {
	for _, test := range []struct {
		policy, script string
		want           state
		starts         int // at least, where it goes on
	}{
		{"no", "exit 0", ended, 1},
		{"no", "exit 3", failed, 1},
		{"no", "kill -9 $$", failed, 1},
		{"", "exit 0", ended, 1},
		{"on-failure", "echo x >>$DIR/starts; test $(wc -l <$DIR/starts) -ge 4", ended, 4},
		{"on-failure:2", "exit 1", failed, 3},
		{"on-failure:2", "echo x >>$DIR/starts; case $(wc -l <$DIR/starts) in 3) exit 0;; *) exit 1;; esac", ended, 3},
		{"on-failure", "exit 1", waiting, 4},
		{"always", "exit 0", waiting, 4},
		{"unless-stopped", "exit 1", waiting, 4},
		{"sometimes", "exit 0", waiting, 3}, // it cannot be read: it is on the console again and again
	} {
		t.Run(test.policy+" "+test.script, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.container(t, "one", test.script, map[string]string{bundle.RestartAnnotation: test.policy})
			c, stop := w.run(t)
			got := until(t, c, "one", func(c Container) bool { return c.State == string(test.want) && c.Starts >= test.starts })
			if test.want != waiting {
				time.Sleep(100 * time.Millisecond)
				if got = until(t, c, "one", is(test.want)); got.Starts != test.starts {
					t.Errorf("it was started %d times, want %d", got.Starts, test.starts)
				}
			}
			stop()
		})
	}
}

func TestBackoff(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.container(t, "one", "exit 1", nil)
	c, stop := w.run(t)
	until(t, c, "one", func(c Container) bool { return c.Starts >= 6 })
	stop()
	var pauses []string
	for line := range strings.Lines(w.out.String()) {
		if _, after, ok := strings.Cut(line, " pause="); ok {
			pauses = append(pauses, strings.TrimSpace(after))
		}
	}
	if want := []string{"5ms", "10ms", "20ms", "40ms", "40ms"}; !slices.Equal(pauses[:min(5, len(pauses))], want) {
		t.Errorf("it paused for %v, want %v", pauses, want)
	}
}

// TestReady has containers become ready, by each sign, when they give it, and not before.
func TestReady(t *testing.T) {
	port := func() string {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		_, p, _ := net.SplitHostPort(l.Addr().String())
		return p
	}()
	python := func(code string) string {
		return fmt.Sprintf("until [ -e $DIR/go ]; do sleep 0.01; done; exec python3 -c '%s'", code)
	}
	for _, test := range []struct{ ready, script string }{
		{"port:" + port, python("import socket,time; s=socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); s.bind((\"127.0.0.1\"," + port + ")); s.listen(9); time.sleep(100)")},
		{"log:^is (up|ready)$", "echo warming up; until [ -e $DIR/go ]; do sleep 0.01; done; echo is ready >&2; exec sleep 100"},
		{"notify", python("import socket,os,time; s=socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); s.connect(os.environ[\"NOTIFY_SOCKET\"]); s.send(b\"STATUS=warm\\nREADY=1\"); time.sleep(100)")},
	} {
		t.Run(test.ready, func(t *testing.T) {
			t.Parallel()
			if _, err := exec.LookPath("python3"); err != nil && !strings.HasPrefix(test.ready, "log:") {
				t.Skip("needs python3")
			}
			w := newWorld(t)
			w.container(t, "one", test.script, map[string]string{bundle.ReadyAnnotation: test.ready})
			w.container(t, "other", "exec sleep 100", nil)
			c, _ := w.run(t)
			until(t, c, "one", is(running))
			until(t, c, "other", is(ready))
			time.Sleep(100 * time.Millisecond)
			until(t, c, "one", is(running))
			if strings.Contains(w.out.String(), "all containers are ready") {
				t.Error("it was said that all are ready")
			}
			w.write(t, "go", "")
			until(t, c, "one", is(ready))
			for deadline := time.Now().Add(10 * time.Second); !strings.Contains(w.out.String(), "all containers are ready"); time.Sleep(5 * time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatal("it is not said that all are ready")
				}
			}
		})
	}
}

// TestServiceManager has it told once all containers are ready or have ended well, and not while one has failed.
func TestServiceManager(t *testing.T) {
	w := newWorld(t)
	path := w.path("notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	heard := func(want string, within time.Duration) bool {
		t.Helper()
		b := make([]byte, 4096)
		for l.SetReadDeadline(time.Now().Add(within)); ; {
			n, err := l.Read(b)
			if err != nil {
				return false
			}
			if string(b[:n]) == want {
				return true
			}
		}
	}
	w.container(t, "job", "exit 0", map[string]string{bundle.RestartAnnotation: "no"})
	w.container(t, "bad", "test -e $DIR/go || exit 1; env | grep NOTIFY_SOCKET && exit 1; exec sleep 100", map[string]string{bundle.RestartAnnotation: "no"})
	c, stop := w.run(t)
	until(t, c, "bad", is(failed))
	if heard("READY=1", 200*time.Millisecond) {
		t.Error("it is ready, and a container has failed")
	}
	w.write(t, "go", "")
	if err := c.Restart(t.Context(), "bad"); err != nil {
		t.Fatal(err)
	}
	if !heard("READY=1", 10*time.Second) {
		t.Error("it is not ready")
	}
	if got := until(t, c, "job", is(ended)); got.Starts != 1 {
		t.Errorf("the job was started %d times", got.Starts)
	}
	stop()
}

func TestEnvironment(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	script := func(name string) string {
		return "echo $COLOUR/$SIZE >>$DIR/" + name + ".env; trap 'exit 0' TERM; while :; do sleep 0.02; done"
	}
	w.container(t, "web", script("web"), map[string]string{bundle.RestartAnnotation: "always"}, "COLOUR=image")
	w.container(t, "db", script("db"), map[string]string{bundle.RestartAnnotation: "always"}, "COLOUR=image")
	w.container(t, "job", "echo job $COLOUR >>$DIR/job.env", map[string]string{bundle.RestartAnnotation: "no"})
	c, stop := w.run(t)
	has := func(name string, want ...string) {
		t.Helper()
		var got []string
		for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			b, _ := os.ReadFile(w.path(name + ".env"))
			if got = strings.Split(strings.TrimSpace(string(b)), "\n"); slices.Equal(got, want) {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s was started with %q, want %q", name, got, want)
			}
		}
	}
	for _, name := range []string{"web", "db"} {
		until(t, c, name, is(ready))
	}
	until(t, c, "job", is(ended))
	set := func(env ...string) error {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		return c.SetEnvironment(ctx, env)
	}
	if err := set("web:SIZE=a=b c", "COLOUR=red", "web:COLOUR=green"); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"web", "db"} { // it has waited for them
		if got := until(t, c, name, is(ready)); got.Starts != 2 {
			t.Errorf("%s was started %d times", name, got.Starts)
		}
	}
	has("web", "image/", "green/a=b c")
	has("db", "image/", "red/")
	has("job", "job", "job red")
	// The same again, as of a second agent of the guest, changes nothing; another is in place of that, not besides.
	if err := set("web:SIZE=a=b c", "COLOUR=red", "web:COLOUR=green"); err != nil {
		t.Fatal(err)
	}
	has("web", "image/", "green/a=b c")
	if err := set("db:COLOUR=red"); err != nil {
		t.Fatal(err)
	}
	has("web", "image/", "green/a=b c", "image/")
	has("db", "image/", "red/")
	for _, bad := range [][]string{{"nobody:A=b"}, {"A"}, {"=b"}, {"a b=c"}, {":A=b"}, {"web:=b"}, {"A=" + strings.Repeat("x", maxEnvironment)}, slices.Repeat([]string{"A=b"}, maxVariables+1)} {
		if err := set(bad...); err == nil {
			t.Errorf("%.40q is taken", bad)
		}
	}
	has("db", "image/", "red/")
	// It outlasts the supervisor.
	stop()
	c, _ = w.run(t)
	until(t, c, "db", is(ready))
	has("db", "image/", "red/", "red/")
	// Who hangs up does not wait, and what does not become ready says so.
	w.container(t, "db", "exit 4", map[string]string{bundle.RestartAnnotation: "no"})
	if err := set("db:COLOUR=blue"); err == nil || !strings.Contains(err.Error(), `"db"`) || !strings.Contains(err.Error(), "exit status 4") {
		t.Errorf("of a container that fails with it: %v", err)
	}
	w.container(t, "db", "exit 5", map[string]string{bundle.RestartAnnotation: "always"})
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := c.SetEnvironment(ctx, []string{"db:COLOUR=brown"}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("after a deadline: %v", err)
	}
	ctx, cancel = context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if err := (Client{run: w.path("nowhere")}).SetEnvironment(ctx, []string{"A=b"}); err == nil || !strings.Contains(err.Error(), "--oci") {
		t.Errorf("in a guest without: %v", err)
	}
}

func TestStop(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.container(t, "polite", "trap 'echo goodbye; exit 0' TERM; while :; do sleep 0.02; done", nil)
	w.container(t, "own", "trap 'echo by its own signal; exit 0' USR1; trap '' TERM; while :; do sleep 0.02; done", map[string]string{stopSignalAnnotation: "SIGUSR1"})
	w.container(t, "deaf", "trap '' TERM; while :; do sleep 0.02; done", nil)
	c, stop := w.run(t)
	for _, name := range []string{"polite", "own", "deaf"} {
		until(t, c, name, is(ready))
	}
	began := time.Now()
	stop()
	if took := time.Since(began); took < 2*time.Second || took > 10*time.Second {
		t.Errorf("it took %v, of which 2 s are the grace of who does not hear", took)
	}
	for _, want := range []string{"polite: goodbye\n", "own: by its own signal\n"} {
		if !strings.Contains(w.out.String(), want) {
			t.Errorf("it does not say %q", want)
		}
	}
	if _, err := os.Stat(w.path("run/" + socketName)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("its socket is left: %v", err)
	}
}

// TestOne has a second supervisor refused, and not take away what the first runs.
func TestOne(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.container(t, "one", "exec sleep 100", nil)
	c, _ := w.run(t)
	until(t, c, "one", is(ready))
	if err := Run(t.Context(), w.config(io.Discard)); err == nil || !strings.Contains(err.Error(), "another") {
		t.Errorf("the second: %v", err)
	}
	if got := until(t, c, "one", is(ready)); got.Starts != 1 {
		t.Errorf("it was started %d times", got.Starts)
	}
}

// TestCrash kills a supervisor, and a runtime: there is one of each container afterwards, and it is another.
func TestCrash(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.container(t, "one", "echo $$ >>$DIR/pids; exec sleep 100", nil)
	self, _ := os.Executable()
	crash := exec.Command(self, "--supervise", w.dir)
	crash.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := crash.Start(); err != nil {
		t.Fatal(err)
	}
	c := Client{run: w.path("run")}
	until(t, c, "one", is(ready))
	crash.Process.Kill()
	crash.Wait()
	pids := func(n int) (all []int) {
		t.Helper()
		for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
			all = nil
			b, _ := os.ReadFile(w.path("pids"))
			for _, f := range strings.Fields(string(b)) {
				pid, _ := strconv.Atoi(f)
				all = append(all, pid)
			}
			if len(all) == n {
				return all
			}
			if time.Now().After(deadline) {
				t.Fatalf("it was started %d times, want %d", len(all), n)
			}
		}
	}
	first := pids(1)[0]
	if syscall.Kill(first, 0) != nil {
		t.Fatal("the container has ended with its supervisor: nothing is tested")
	}
	c, stop := w.run(t)
	until(t, c, "one", is(ready))
	all := pids(2)
	if living(all[0]) || !living(all[1]) {
		t.Errorf("of %v, the first was to be killed", all)
	}
	// A runtime that is killed leaves its container.
	cmdlines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range cmdlines {
		b, _ := os.ReadFile(path)
		if bytes.Contains(b, []byte(w.path("run/runtime")+"\x00run\x00")) {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	all = pids(3)
	until(t, c, "one", is(ready))
	if living(all[1]) || !living(all[2]) {
		t.Errorf("of %v, only the third was to be left", all)
	}
	stop()
	if living(all[2]) {
		t.Errorf("process %d is left", all[2])
	}
}

// living reports whether a process runs. One that was killed may be nobody's to wait for, here.
func living(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, rest, _ := strings.Cut(string(b), ") ")
	return err == nil && !strings.HasPrefix(rest, "Z")
}

// TestBroken has disks whose config.json is of no use: each says so, and those that are of use run.
func TestBroken(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.container(t, "good", "exec sleep 100", nil)
	for name, text := range map[string]string{"empty": "", "list": "[]", "old": `{"ociVersion":"0.5","process":{"args":["x"]}}`, "idle": `{"ociVersion":"1.0.0","process":{"args":[]}}`} {
		w.write(t, "disks/"+name+"/config.json", text)
		if err := os.Mkdir(w.path("disks/"+name+"/rootfs"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	c, _ := w.run(t)
	until(t, c, "good", is(ready))
	for name, want := range map[string]string{"empty": "config.json", "list": "config.json", "old": "ociVersion", "idle": "process.args"} {
		got := until(t, c, name, func(c Container) bool { return c.State == string(waiting) && c.Starts > 1 })
		if !strings.Contains(got.Detail, want) {
			t.Errorf("%s: it says %q, want %q", name, got.Detail, want)
		}
	}
	if !strings.Contains(w.out.String(), "container=old device=vdold") {
		t.Error("the disk is not named")
	}
	if err := c.Restart(t.Context(), "nobody"); err == nil {
		t.Error("a container that is not there is started again")
	}
	w.container(t, "old", "exec sleep 100", nil)
	if err := c.Restart(t.Context(), "old"); err != nil { // it reads config.json anew
		t.Error(err)
	}
}

// TestRequests has the socket take what nobody should send.
func TestRequests(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.container(t, "one", "exec sleep 100", nil)
	c, _ := w.run(t)
	for _, text := range []string{"\n", "{}\n", `{"do":"dance"}` + "\n", `{"do":1}` + "\n", strings.Repeat("x", maxRequest+1) + "\n"} {
		conn, err := net.Dial("unix", w.path("run/"+socketName))
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(conn, text)
		var a answer
		conn.SetReadDeadline(time.Now().Add(10 * time.Second))
		if err := json.NewDecoder(conn).Decode(&a); err == nil && a.Error == "" {
			t.Errorf("%.20q is answered by %+v", text, a)
		}
		conn.Close()
	}
	idle, err := net.Dial("unix", w.path("run/"+socketName)) // who says nothing holds up nobody, nor the end
	if err != nil {
		t.Fatal(err)
	}
	defer idle.Close()
	if info, err := os.Stat(w.path("run/" + socketName)); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode of the socket: %v, %v", info.Mode(), err)
	}
	until(t, c, "one", is(ready))
}

// TestFollow has a container see that a file of /etc was replaced, as the agent does with the host name of a clone.
func TestFollow(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.container(t, "one", "exec sleep 100", nil)
	c, _ := w.run(t)
	until(t, c, "one", is(ready))
	seen := w.path("run/containers/one/etc/hostname")
	before, err := os.Stat(seen)
	if err != nil {
		t.Fatal(err)
	}
	if err := replaceFile(w.path("etc/hostname"), []byte("clone\n")); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if b, _ := os.ReadFile(seen); string(b) == "clone\n" {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("it does not see it")
		}
	}
	if after, err := os.Stat(seen); err != nil || !os.SameFile(before, after) {
		t.Error("it is another file, which a bind mount does not show")
	}
}
