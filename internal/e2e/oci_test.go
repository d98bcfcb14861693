package e2e

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/internal/testimage"
	"github.com/drafter-vm/drafter/internal/testnet"
	"github.com/drafter-vm/drafter/internal/testregistry"
)

// pushByOthers has skopeo put an image into a registry, in the format whose files can be fetched one by one.
func pushByOthers(t *testing.T, spec testimage.Spec, name string) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "layout")
	testimage.WriteLayout(t, dir, "latest", testimage.Make(t, spec))
	out, err := exec.Command("skopeo", "--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false", "--dest-compress-format", "zstd:chunked", "oci:"+dir+":latest", "docker://"+name).CombinedOutput()
	if err != nil {
		t.Fatalf("skopeo copy: %v: %s", err, out)
	}
}

// dialPort connects to a port of the guest that a namespace leads to.
func dialPort(t *testing.T, netns string, port int) net.Conn {
	t.Helper()
	ctx := newContext(t)
	for {
		var conn net.Conn
		err := testnet.Do(netns, func() (err error) {
			conn, err = (&net.Dialer{}).DialContext(ctx, "tcp", fmt.Sprintf("172.16.0.2:%d", port))
			return err
		})
		if err == nil {
			conn.SetDeadline(time.Now().Add(guestWait))
			t.Cleanup(func() { conn.Close() })
			return conn
		}
		if ctx.Err() != nil {
			t.Fatal(err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// valkey asks the server of a guest something, and is its answer's last line.
func valkey(t *testing.T, netns, command string) string {
	t.Helper()
	conn := dialPort(t, netns, 6379)
	defer conn.Close()
	if _, err := fmt.Fprintf(conn, "%s\r\n", command); err != nil {
		t.Fatal(err)
	}
	in := bufio.NewReader(conn)
	line, err := in.ReadString('\n')
	if err == nil && strings.HasPrefix(line, "$") && !strings.HasPrefix(line, "$-1") {
		line, err = in.ReadString('\n')
	}
	if err != nil {
		t.Fatalf("%s: %v", command, err)
	}
	return strings.TrimSpace(line)
}

// get asks a web server of a guest.
func get(t *testing.T, netns string, port int) string {
	t.Helper()
	conn := dialPort(t, netns, port)
	defer conn.Close()
	if _, err := io.WriteString(conn, "GET / HTTP/1.0\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(body))
}

// TestOCI: an image of Valkey becomes a package in one step, which resumes with the server answering, and moves. One of a web application becomes, by hand, a
// bundle and a disk of the same machine. And that image, run from the registry, answers before it was fetched; is closed, and goes on; is killed, and adopted; and moves.
func TestOCI(t *testing.T) {
	t.Parallel()
	w := newWorkshop(t)
	h := testnet.NewTestHosts(t, "a", "b")
	netns, _ := networks(t, h, "a", "b")
	server := testregistry.Start(t, testregistry.Options{})
	front := server.Front(t)
	pushByOthers(t, testimage.Valkey(), server.Address+"/valkey:1")
	pushByOthers(t, testimage.Python(), server.Address+"/web:1")
	w.blueprint(t, "--oci")
	var cache []string
	if c := os.Getenv("DRAFTER_TEST_CACHE"); c != "" {
		cache = []string{"--cache", c}
	}
	machine := append([]string{"--blueprint", w.path("blueprint"), "--memory", "512M", "--chroot-base-dir", w.vms()}, cache...)
	console := newConsole(t)

	// By hand: unpack, edit, pack.
	w.start(t, nil, "oci", "unpack", "--output", w.path("bundle"), front.Address+"/web:1").wait(t, 0)
	app := w.path("bundle/rootfs/srv/app/app.py")
	text, err := os.ReadFile(app)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(app, []byte(strings.Replace(string(text), "{os.environ['GREETING']}", "edited {os.environ['GREETING']}", 1)), 0o640); err != nil {
		t.Fatal(err)
	}
	said := w.start(t, nil, "oci", "unpack", "--output", w.path("bundle"), front.Address+"/web:1").wait(t, 1)
	if !strings.Contains(said, "--overwrite") {
		t.Errorf("a bundle that is there: %s", said)
	}
	w.start(t, nil, append([]string{"oci", "pack", "--env", "GREETING=packed", "--output", w.path("web.ext4"), w.path("bundle")}, cache...)...).wait(t, 0)

	// In one step, with the other beside, and a volume.
	build := append([]string{"oci", "build", "--netns", netns["a"], "--mount", "type=volume,source=data,target=/data,size=64M", "--disk", "web=" + w.path("web.ext4")}, machine...)
	w.start(t, console, append(build, "docker://"+front.Address+"/valkey:1", w.path("package"))...).wait(t, 0)
	for _, line := range []string{"oci: ", "Ready to accept connections", "web: listening"} {
		if !strings.Contains(console.Log(), line) {
			t.Errorf("the console does not say %q:\n%s", line, console.Log())
		}
	}
	a := w.start(t, w.console, w.peer("package", "at-a", "--netns", netns["a"], "--laddr", "localhost:0")...)
	a.waitFor(t, "Resumed VM")
	if got := valkey(t, netns["a"], "SET name first"); got != "+OK" {
		t.Errorf("SET: %q", got)
	}
	if got := valkey(t, netns["a"], "SAVE"); got != "+OK" { // to its volume
		t.Errorf("SAVE: %q", got)
	}
	if got := get(t, netns["a"], 8000); got != "edited packed 1 drafter" {
		t.Errorf("the other container says %q", got)
	}
	b := w.start(t, w.console, w.peer("package", "at-b", "--netns", netns["b"], "--raddr", strings.TrimSpace(a.waitFor(t, "Serving on ")))...)
	b.waitFor(t, "Received VM")
	a.wait(t, 0)
	if got := valkey(t, netns["b"], "GET name"); got != "first" {
		t.Errorf("after a move, GET: %q", got)
	}
	if got := get(t, netns["b"], 8000); got != "edited packed 2 drafter" {
		t.Errorf("after a move, the other container says %q", got)
	}
	b.Process.Signal(os.Interrupt)
	b.wait(t, 0)

	// A clone from a registry, with another name and environment.
	name := "oci://" + front.Address + "/vms/valkey:1"
	w.start(t, nil, "push", w.path("package"), name).wait(t, 0)
	clone := w.start(t, w.console, "run", name, "--netns", netns["a"], "--chroot-base-dir", w.vms(), "--instance", w.path("clone"), "--clone", "--host-name", "clone", "--env", "web:GREETING=cloned")
	clone.waitFor(t, "Received VM")
	if got := get(t, netns["a"], 8000); got != "edited cloned 1 clone" {
		t.Errorf("a clone says %q", got)
	}
	if got := valkey(t, netns["a"], "GET name"); got != "$-1" {
		t.Errorf("a clone has %q of another", got)
	}
	clone.Process.Signal(os.Interrupt)
	clone.wait(t, 0)

	// From the registry: without what nobody asks for, it is to be seen what is needed.
	run := append(append([]string{"oci", "run", "--netns", netns["a"], "--laddr", "localhost:0", "--resume-timeout", "3m", "--instance", w.path("run"), "--enable-input", "--background", "-1"}, machine...), "--env", "GREETING=lazy", front.Address+"/web:1")
	image := testimage.Make(t, testimage.Python())
	manifest, err := image.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	var whole int64
	for _, l := range manifest.Layers {
		whole += l.Size
	}
	before := front.BytesGot.Load()
	c := w.start(t, w.console, run...)
	first := get(t, netns["a"], 8000)
	answered := front.BytesGot.Load() - before
	if first != "lazy 1 drafter" {
		t.Errorf("the image says %q", first)
	}
	t.Logf("the guest answered after %d bytes of %d", answered, whole)
	if answered > whole/2 {
		t.Errorf("the guest answered after %d bytes of %d", answered, whole)
	}
	c.waitFor(t, "Serving on ")
	said = w.start(t, nil, run...).wait(t, 1)
	if !strings.Contains(said, "is in use by another command") {
		t.Errorf("twice: %s", said)
	}
	c.Process.Signal(os.Interrupt)
	c.wait(t, 0)
	said = w.start(t, nil, append(run[:len(run)-1:len(run)-1], "--env", "MORE=1", run[len(run)-1])...).wait(t, 1)
	if !strings.Contains(said, "give the same") {
		t.Errorf("with other flags: %s", said)
	}
	c = w.start(t, w.console, run...)
	c.waitFor(t, "Resumed VM")
	if got := get(t, netns["a"], 8000); got != "lazy 2 drafter" {
		t.Errorf("closed and run again, it says %q", got)
	}
	c.Process.Signal(syscall.SIGKILL)
	c.wait(t, -1)
	c = w.start(t, w.console, run...)
	c.waitFor(t, "Adopted VM")
	if got := get(t, netns["a"], 8000); got != "lazy 3 drafter" {
		t.Errorf("killed and run again, it says %q", got)
	}
	// What serves the image dies: one is told, and goes on after closing it.
	c.Process.Signal(os.Interrupt)
	c.wait(t, 0)
	c = w.start(t, w.console, run...)
	c.waitFor(t, "Resumed VM")
	text, err = os.ReadFile(w.path("run/image.data/lock"))
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	syscall.Kill(pid, syscall.SIGKILL)
	c.waitFor(t, "the guest cannot read what it has not read before")
	c.Process.Signal(os.Interrupt)
	c.wait(t, 0)
	c = w.start(t, w.console, run...)
	c.waitFor(t, "Resumed VM")
	if got := get(t, netns["a"], 8000); got != "lazy 4 drafter" {
		t.Errorf("after what serves the image had died, it says %q", got)
	}
	var devices []string
	for _, name := range []string{"state", "memory", "kernel", "initrd", "disk", "oci", "config"} {
		devices = append(devices, fmt.Sprintf(`{"name":%q,"base":%q}`, name, w.path("moved/"+name)))
	}
	d := w.start(t, w.console, "peer", "--netns", netns["b"], "--chroot-base-dir", w.vms(), "--devices", "["+strings.Join(devices, ",")+"]", "--raddr", strings.TrimSpace(c.waitFor(t, "Serving on ")))
	d.waitFor(t, "Received VM")
	c.wait(t, 0)
	if got := get(t, netns["b"], 8000); got != "lazy 5 drafter" {
		t.Errorf("after a move, it says %q", got)
	}
	d.Process.Signal(os.Interrupt)
	d.wait(t, 0)
	w.checkClean(t)
	if mounts, err := os.ReadFile("/proc/self/mounts"); err != nil || strings.Contains(string(mounts), w.path("")) {
		t.Errorf("an image is still mounted, %v:\n%s", err, mounts)
	}
}
