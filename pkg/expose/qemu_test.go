package expose

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"

	"github.com/drafter-vm/drafter/pkg/block"
)

// qemu runs a tool of qemu-utils, or skips the test where it is missing.
func qemu(t testing.TB, tool string, args ...string) string {
	t.Helper()
	path, err := exec.LookPath(tool)
	if err != nil {
		t.Skipf("%s is not installed (Debian package qemu-utils)", tool)
	}
	out, err := exec.Command(path, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", tool, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func nbdURL(s *Server, export string) string {
	return fmt.Sprintf("nbd+unix:///%s?socket=%s", export, s.Path())
}

// TestQEMU lets the client of QEMU, which is the one that matters, do what it can.
func TestQEMU(t *testing.T) {
	const size = 8 << 20
	d := block.NewMemory(size)
	s := listen(t, NBDOptions{}, Export{Name: "disk", Device: d}, Export{Name: "rom", Device: d, ReadOnly: true})

	t.Run("info", func(t *testing.T) {
		out := qemu(t, "qemu-img", "info", nbdURL(s, "disk"))
		if !strings.Contains(out, "virtual size: 8 MiB (8388608 bytes)") {
			t.Errorf("qemu-img info says\n%s", out)
		}
	})
	t.Run("list", func(t *testing.T) {
		out := qemu(t, "qemu-nbd", "--list", "-k", s.Path())
		for _, want := range []string{"exports available: 2", "export: 'disk'", "export: 'rom'", "size:  8388608", "flags: 0x1ed ( flush fua trim zeroes df multi )", "flags: 0x18f ( readonly flush fua df multi )", "min block: 1", "opt block: 4096", "max block: 33554432"} {
			if !strings.Contains(out, want) {
				t.Errorf("qemu-nbd --list does not say %q:\n%s", want, out)
			}
		}
	})
	t.Run("io", func(t *testing.T) {
		args := []string{"-f", "raw", "--discard", "unmap", nbdURL(s, "disk")}
		for _, command := range []string{
			"write -P 0x11 0 1M", "write -P 0x22 -f 1M 4k", "write -z 2M 1M", "write -z -u 3M 1M", "discard 0 64k", "flush",
			"aio_write -P 0x33 4M 1M", "aio_write -P 0x44 5M 1M", "aio_flush",
			"read -P 0 0 64k", "read -P 0x11 64k 960k", "read -P 0x22 1M 4k", "read -P 0 2M 2M", "read -P 0x33 4M 1M", "read -P 0x44 5M 1M", "read -P 0x11 512k 512",
		} {
			args = append(args, "-c", command)
		}
		out := qemu(t, "qemu-io", args...)
		if strings.Contains(out, "failed") || strings.Contains(out, "error") {
			t.Errorf("qemu-io says\n%s", out)
		}
	})
	t.Run("read-only", func(t *testing.T) {
		if _, err := exec.LookPath("qemu-io"); err != nil {
			t.Skip("qemu-io is not installed (Debian package qemu-utils)")
		}
		out, _ := exec.Command("qemu-io", "-f", "raw", "-c", "write 0 4k", nbdURL(s, "rom")).CombinedOutput()
		if !regexp.MustCompile("(?i)read-only|not permitted|permission denied").Match(out) {
			t.Errorf("a write to a read-only export says\n%s", out)
		}
	})
	t.Run("convert", func(t *testing.T) {
		ctx := context.Background()
		data := make([]byte, 3<<20)
		rng := rand.New(rand.NewPCG(1, 2))
		for i := range data {
			data[i] = byte(rng.Uint32())
		}
		if err := d.Discard(0, size); err != nil {
			t.Fatal(err)
		}
		if _, err := d.WriteAt(data, 1<<20); err != nil {
			t.Fatal(err)
		}
		image := filepath.Join(t.TempDir(), "image")
		qemu(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", "-W", "-m", "8", nbdURL(s, "rom"), image)
		got, err := os.ReadFile(image)
		if err != nil {
			t.Fatal(err)
		}
		want := make([]byte, size)
		copy(want[1<<20:], data)
		if !bytes.Equal(got, want) {
			t.Error("the copy differs")
		}
		// And back, into an overlay.
		dir := t.TempDir()
		base := filepath.Join(dir, "base")
		file, err := block.CreateFile(base, size)
		if err != nil {
			t.Fatal(err)
		}
		overlay, err := block.OpenOverlay(block.OverlayOptions{Base: file, BasePath: base, Overlay: filepath.Join(dir, "overlay"), State: filepath.Join(dir, "state")})
		if err != nil {
			t.Fatal(err)
		}
		defer overlay.Close()
		back := listen(t, NBDOptions{}, Export{Name: "back", Device: overlay})
		qemu(t, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", "-W", "-m", "8", image, nbdURL(back, "back"))
		if equal, at, err := block.Equal(ctx, overlay, d); err != nil || !equal {
			t.Errorf("the overlay differs at %d, %v", at, err)
		}
	})
}

// TestQEMUReconnects restarts the server under a client: QEMU goes on without an error.
func TestQEMUReconnects(t *testing.T) {
	tool, err := exec.LookPath("qemu-io")
	if err != nil {
		t.Skip("qemu-io is not installed (Debian package qemu-utils)")
	}
	d := block.NewMemory(1 << 20)
	s := listen(t, NBDOptions{}, Export{Name: "disk", Device: d})
	cmd := exec.Command(tool, "--image-opts", "driver=nbd,server.type=unix,server.path="+s.Path()+",export=disk,reconnect-delay=60")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = in.Close() // qemu-io then ends
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	}()
	lines := bufio.NewScanner(out)
	do := func(command, want string) {
		t.Helper()
		if _, err := fmt.Fprintln(in, command); err != nil {
			t.Fatal(err)
		}
		for lines.Scan() {
			if strings.Contains(lines.Text(), want) {
				return
			}
			if strings.Contains(lines.Text(), "failed") {
				t.Fatalf("%s: %s", command, lines.Text())
			}
		}
		t.Fatalf("%s: qemu-io ended", command)
	}
	do("write -P 0x11 0 64k", "wrote 65536/65536")
	for range 3 {
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		s = listenAt(t, s.Path(), NBDOptions{}, Export{Name: "disk", Device: d})
		do("write -P 0x22 64k 64k", "wrote 65536/65536")
		do("read -P 0x11 0 64k", "read 65536/65536")
	}
}

// startQEMUNBD serves the file at path with qemu-nbd, and returns the socket.
func startQEMUNBD(t testing.TB, path string) string {
	t.Helper()
	tool, err := exec.LookPath("qemu-nbd")
	if err != nil {
		t.Skip("qemu-nbd is not installed (Debian package qemu-utils)")
	}
	socket := socketPath(t)
	cmd := exec.Command(tool, "-k", socket, "-f", "raw", "-e", "16", "-t", "--cache=writeback", path)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	for range 1 << 20 {
		if conn, err := net.Dial("unix", socket); err == nil {
			_ = conn.Close()
			return socket
		}
		runtime.Gosched()
	}
	t.Fatal("qemu-nbd does not listen")
	return ""
}
