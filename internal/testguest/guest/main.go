// Command guest is the whole user space of the test guest: it is /init, and obeys commands that arrive line by line on
// the serial console and on the virtio-serial port org.drafter.vsock. Package testguest documents the protocol.
package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/agent/socket"
)

func main() {
	debug.SetGCPercent(20) // the guests are small, and what they write over is most of their memory
	os.Setenv("PATH", "/bin:/sbin:/usr/bin:/usr/sbin")
	for _, m := range [][3]string{{"devtmpfs", "/dev", "devtmpfs"}, {"proc", "/proc", "proc"}, {"sysfs", "/sys", "sysfs"}, {"tmpfs", "/run", "tmpfs"}, {"tmpfs", "/tmp", "tmpfs"}} {
		if err := os.MkdirAll(m[1], 0o755); err != nil {
			fmt.Println("mkdir", m[1], err)
		}
		if err := unix.Mount(m[0], m[1], m[2], 0, ""); err != nil && err != unix.EBUSY {
			fmt.Println("mount", m[1], err)
		}
	}
	loadModules()
	nameDevices("/sys/block/*/serial", "/dev/disk")

	g := newGuest()
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		fmt.Println(err)
	}
	channel := true
	for field := range strings.FieldsSeq(string(cmdline)) {
		switch name, value, _ := strings.Cut(field, "="); name {
		case "testguest.channel":
			channel = value != "off"
		case "testguest.disks":
			nameDisks(strings.Split(value, ","))
		case "testguest.socket":
			go serveSocket(g, value)
		}
	}
	if channel {
		go serveChannel(g)
	}
	serveConsole(g)
}

// loadModules loads what the initramfs brings, in the order of the file names.
func loadModules() {
	files, _ := filepath.Glob("/modules/*.ko")
	slices.Sort(files)
	for _, name := range files {
		f, err := os.Open(name)
		if err != nil {
			fmt.Println(err)
			continue
		}
		if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && err != unix.EEXIST {
			fmt.Println("load", name, err)
		}
		f.Close()
	}
}

// nameDevices makes the links in dir that udev would make, by what the files that match pattern say: disks by serial
// number, virtio-serial ports by name.
func nameDevices(pattern, dir string) {
	os.MkdirAll(dir, 0o755)
	files, _ := filepath.Glob(pattern)
	for _, file := range files {
		if name, err := os.ReadFile(file); err == nil {
			os.Symlink("/dev/"+filepath.Base(filepath.Dir(file)), filepath.Join(dir, strings.TrimSpace(string(name))))
		}
	}
}

// nameDisks makes the links of disks that the machine has given other serial numbers, by their order.
func nameDisks(names []string) {
	for n, name := range names {
		os.Symlink(fmt.Sprintf("/dev/vd%c", 'a'+n), filepath.Join("/dev/disk", name)) // but where it has that of the name
	}
}

func serveConsole(g *guest) {
	tty, err := os.OpenFile("/dev/ttyS0", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		fmt.Println(err)
		tty = os.Stdin
	}
	// Raw, so that neither an echo nor a changed line ending gets into the protocol.
	if t, err := unix.IoctlGetTermios(int(tty.Fd()), unix.TCGETS); err == nil {
		t.Iflag, t.Oflag, t.Lflag = 0, 0, 0
		t.Cc[unix.VMIN], t.Cc[unix.VTIME] = 1, 0
		unix.IoctlSetTermios(int(tty.Fd()), unix.TCSETS, t)
	}
	fmt.Fprintf(tty, "= ready\n")
	for {
		g.serve(tty)
		time.Sleep(50 * time.Millisecond)
	}
}

// serveChannel serves the virtio-serial port. It opens it once: closing it throws away what the host has sent
// meanwhile. A read of zero bytes means that nobody listens on the host: look again.
func serveChannel(g *guest) {
	port := openChannel()
	for {
		g.serve(port)
		time.Sleep(20 * time.Millisecond)
	}
}

// serveSocket serves whoever connects to a port of the guest's.
func serveSocket(g *guest, number string) {
	port, err := strconv.ParseUint(number, 10, 32)
	if err != nil {
		fmt.Println(err)
		return
	}
	listener, err := socket.Listen(uint32(port))
	if err != nil {
		fmt.Println(err)
		return
	}
	for {
		conn, err := listener.Accept()
		if err != nil {
			fmt.Println(err)
			return
		}
		go func() {
			defer conn.Close()
			g.serve(conn)
		}()
	}
}

// openChannel waits for the port: the host tells its name some time after the driver was loaded.
func openChannel() *os.File {
	const dir = "/dev/virtio-ports"
	for {
		nameDevices("/sys/class/virtio-ports/*/name", dir)
		if port, err := os.OpenFile(dir+"/org.drafter.vsock", os.O_RDWR, 0); err == nil {
			return port
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// guest is what the commands share.
type guest struct {
	memory memory

	mu    sync.Mutex // guards disks
	disks map[string]*diskWriter
}

func newGuest() *guest { return &guest{disks: make(map[string]*diskWriter)} }

// serve obeys commands from rw until it ends.
func (g *guest) serve(rw io.ReadWriter) {
	lines := bufio.NewScanner(rw)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		args := strings.Fields(lines.Text())
		if len(args) == 0 {
			continue
		}
		answer, err := g.do(args)
		if err != nil {
			answer = "error " + strings.ReplaceAll(err.Error(), "\n", " ")
		} else {
			answer = strings.TrimSpace("ok " + answer)
		}
		if _, err := fmt.Fprintf(rw, "= %s %s\n", args[0], answer); err != nil {
			return
		}
	}
}
