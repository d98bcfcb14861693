package main

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/internal/testguest/journal"
)

// do obeys one command. Package testguest says what each one does.
func (g *guest) do(args []string) (string, error) {
	arg := func(i int) string {
		if i < len(args) {
			return args[i]
		}
		return ""
	}
	num := func(i int) int64 { n, _ := strconv.ParseInt(arg(i), 0, 64); return n }
	switch args[0] {
	case "echo":
		return strings.Join(args[1:], " "), nil
	case "say":
		tty, err := os.OpenFile("/dev/ttyS0", os.O_WRONLY|unix.O_NOCTTY, 0)
		if err != nil {
			return "", err
		}
		defer tty.Close()
		_, err = fmt.Fprintln(tty, strings.Join(args[1:], " "))
		return "", err
	case "clock":
		return strconv.FormatInt(time.Now().UnixNano(), 10), nil
	case "cpus":
		return strconv.Itoa(runtime.NumCPU()), nil
	case "mem":
		return g.memory.do(arg(1), num(2), arg(3))
	case "disk":
		return g.disk(arg(1), arg(2), num(3), num(4), num(5))
	case "mount":
		os.MkdirAll(arg(2), 0o755)
		return "", unix.Mount(device(arg(1)), arg(2), arg(3), 0, "")
	case "umount":
		return "", unix.Unmount(arg(1), 0)
	case "cat":
		b, err := os.ReadFile(arg(1))
		return strconv.Quote(string(b)), err
	case "put":
		f, err := os.Create(arg(1))
		if err != nil {
			return "", err
		}
		_, err = f.WriteString(strings.Join(args[2:], " "))
		if e := f.Sync(); !errors.Is(e, unix.EINVAL) { // a device that has nothing to sync
			err = errors.Join(err, e)
		}
		return "", errors.Join(err, f.Close())
	case "net":
		return "", network(arg(1), arg(2), arg(3))
	case "listen":
		return "", listenEcho(arg(1))
	case "call":
		return "", callEcho(arg(1), arg(2))
	case "run":
		out, err := exec.Command(arg(1), args[2:]...).CombinedOutput()
		return strconv.Quote(string(out)), err
	case "spawn":
		cmd := exec.Command(arg(1), args[2:]...)
		if console, err := os.OpenFile("/dev/console", os.O_WRONLY, 0); err == nil {
			defer console.Close()
			cmd.Stdout, cmd.Stderr = console, console
		}
		if err := cmd.Start(); err != nil {
			return "", err
		}
		go cmd.Wait()
		return strconv.Itoa(cmd.Process.Pid), nil
	case "reboot":
		return "", unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	case "poweroff":
		return "", unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	case "touch":
		return "", touch(args[1:])
	case "button":
		return "", heedButton()
	case "panic":
		return "", os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0)
	}
	return "", fmt.Errorf("unknown command %q", args[0])
}

// touch writes to as many pages as it is told, and frees them.
func touch(args []string) error {
	mib, err := strconv.Atoi(strings.Join(args, " "))
	if err != nil {
		return err
	}
	pages, err := unix.Mmap(-1, 0, mib<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	for i := 0; i < len(pages); i += pageSize {
		pages[i] = 1
	}
	return unix.Munmap(pages)
}

// device accepts the name of a disk (its serial number) where a path is wanted.
func device(name string) string {
	if !strings.Contains(name, "/") && name != "tmpfs" {
		return "/dev/disk/" + name
	}
	return name
}

// memory is the RAM load: every page holds the number of the pass that wrote it last, so at any instant the pages up to
// the writer hold this pass's number, those behind it the previous one's, and a page that was lost holds an older one.
// The rest of a page is zero, or what nothing makes smaller.
type memory struct {
	mu    sync.Mutex // guards everything below; taken for a few pages at a time
	pages []byte
	pass  uint64 // of the page written next
	next  int    // page written next
	stop  chan struct{}
	done  chan struct{}
}

const pageSize = 4096

func (m *memory) do(verb string, mib int64, kind string) (string, error) {
	switch verb {
	case "start":
		m.halt()
		pages, err := unix.Mmap(-1, 0, int(mib)<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err != nil {
			return "", err
		}
		m.mu.Lock()
		if m.pages != nil {
			unix.Munmap(m.pages)
		}
		m.pages, m.pass, m.next = pages, 1, 0
		if kind == "random" {
			random := rand.NewChaCha8([32]byte{})
			for at := 0; at < len(pages); at += pageSize {
				random.Read(pages[at+8 : at+pageSize])
			}
		}
		m.mu.Unlock()
		m.start()
		return "", nil
	case "stop":
		m.halt()
		return m.status(), nil
	case "go":
		m.start()
		return "", nil
	case "status":
		return m.status(), nil
	case "verify":
		return m.verify()
	}
	return "", fmt.Errorf("mem start MIB [random]|stop|go|status|verify, not %q", verb)
}

func (m *memory) start() {
	m.halt()
	stop, done := make(chan struct{}), make(chan struct{})
	m.stop, m.done = stop, done
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
			}
			m.step(64)
			runtime.Gosched()
		}
	}()
}

func (m *memory) halt() {
	if m.stop != nil {
		close(m.stop)
		<-m.done
		m.stop = nil
	}
}

func (m *memory) step(pages int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for range pages {
		binary.LittleEndian.PutUint64(m.pages[m.next*pageSize:], m.pass)
		if m.next++; m.next*pageSize == len(m.pages) {
			m.next, m.pass = 0, m.pass+1
		}
	}
}

func (m *memory) status() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return fmt.Sprintf("%d %d", m.pass, m.next)
}

func (m *memory) verify() (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := 0; i*pageSize < len(m.pages); i++ {
		want := m.pass
		if i >= m.next {
			want--
		}
		if got := binary.LittleEndian.Uint64(m.pages[i*pageSize:]); got != want {
			return "", fmt.Errorf("page %d holds %d instead of %d (pass %d, next page %d)", i, got, want, m.pass, m.next)
		}
	}
	return fmt.Sprintf("%d %d", m.pass, m.next), nil
}

// diskWriter is the disk load: journal records, each flushed before the next.
type diskWriter struct {
	slots int
	stop  chan struct{}
	done  chan struct{}

	mu   sync.Mutex // guards what follows
	last uint64     // newest flushed record
	err  error
}

func (g *guest) disk(name, verb string, a, b, c int64) (string, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	w := g.disks[name]
	// Uncached, so that what is read is what the host would see.
	flags := os.O_RDWR
	if verb == "info" || verb == "sum" || verb == "verify" {
		flags = os.O_RDONLY
	}
	open := func() (*os.File, error) { return os.OpenFile(device(name), flags|unix.O_DIRECT, 0) }
	switch verb {
	case "info": // size in bytes
		f, err := open()
		if err != nil {
			return "", err
		}
		defer f.Close()
		size, err := f.Seek(0, io.SeekEnd)
		return strconv.FormatInt(size, 10), err
	case "write": // OFFSET LENGTH SEED
		f, err := open()
		if err != nil {
			return "", err
		}
		defer f.Close()
		p := aligned(b)
		for i := 0; i+8 <= len(p); i += 8 {
			binary.LittleEndian.PutUint64(p[i:], uint64(a+int64(i))*0x9e3779b97f4a7c15^uint64(c))
		}
		_, err = f.WriteAt(p, a)
		return fmt.Sprintf("%x", sha256.Sum256(p)), errors.Join(err, f.Sync())
	case "sum": // OFFSET LENGTH
		f, err := open()
		if err != nil {
			return "", err
		}
		defer f.Close()
		p := aligned(b)
		_, err = f.ReadAt(p, a)
		return fmt.Sprintf("%x", sha256.Sum256(p)), err
	case "start": // SLOTS [NEWEST RECORD SO FAR]
		if w != nil {
			w.halt()
		}
		f, err := open()
		if err != nil {
			return "", err
		}
		w = &diskWriter{slots: int(a), last: uint64(b), stop: make(chan struct{}), done: make(chan struct{})}
		g.disks[name] = w
		go w.run(f)
		return "", nil
	}
	if w == nil {
		return "", fmt.Errorf("disk %q: nothing was started", name)
	}
	switch verb {
	case "stop":
		w.halt()
		return w.status()
	case "status":
		return w.status()
	case "verify":
		w.halt()
		f, err := open()
		if err != nil {
			return "", err
		}
		defer f.Close()
		last, err := journal.Verify(directReader{f}, w.slots)
		if err == nil && last < w.last {
			err = fmt.Errorf("newest record %d, but %d was flushed", last, w.last)
		}
		return strconv.FormatUint(last, 10), errors.Join(err, w.err)
	}
	return "", fmt.Errorf("disk NAME info|write|sum|start|stop|status|verify, not %q", verb)
}

func (w *diskWriter) run(f *os.File) {
	defer close(w.done)
	defer f.Close()
	for seq := w.last + 1; ; seq++ {
		select {
		case <-w.stop:
			return
		default:
		}
		err := journal.Append(directWriter{f}, w.slots, seq)
		if err == nil {
			err = f.Sync()
		}
		w.mu.Lock()
		if w.err = err; err == nil {
			w.last = seq
		}
		w.mu.Unlock()
		if err != nil {
			return
		}
	}
}

func (w *diskWriter) halt() {
	select {
	case <-w.stop:
	default:
		close(w.stop)
	}
	<-w.done
}

func (w *diskWriter) status() (string, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return strconv.FormatUint(w.last, 10), w.err
}

// aligned returns memory that O_DIRECT accepts: Go's collector does not move it.
func aligned(n int64) []byte {
	p := make([]byte, n+pageSize)
	skip := -uintptr(unsafe.Pointer(&p[0])) & (pageSize - 1)
	return p[skip : skip+uintptr(n)]
}

// isAligned reports whether memory is as aligned makes it, as what is large mostly is.
func isAligned(p []byte) bool {
	return len(p) > 0 && uintptr(unsafe.Pointer(&p[0]))&(pageSize-1) == 0
}

// directReader and directWriter give callers with ordinary memory a file opened with O_DIRECT.
type (
	directReader struct{ f *os.File }
	directWriter struct{ f *os.File }
)

func (d directReader) ReadAt(p []byte, off int64) (int, error) {
	if isAligned(p) {
		return d.f.ReadAt(p, off)
	}
	q := aligned(int64(len(p)))
	n, err := d.f.ReadAt(q, off)
	return copy(p, q[:n]), err
}

func (d directWriter) WriteAt(p []byte, off int64) (int, error) {
	if isAligned(p) {
		return d.f.WriteAt(p, off)
	}
	q := aligned(int64(len(p)))
	copy(q, p)
	return d.f.WriteAt(q, off)
}

// network brings an interface up with an address (CIDR) and, unless gateway is empty, a default route.
func network(name, addr, gateway string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return err
	}
	a, err := netlink.ParseAddr(addr)
	if err != nil {
		return err
	}
	a.Flags |= unix.IFA_F_NODAD
	if err := netlink.AddrReplace(link, a); err != nil {
		return err
	}
	if gateway == "" {
		return nil
	}
	return netlink.RouteReplace(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: net.ParseIP(gateway)})
}

// listenEcho answers on a port with what comes there, over TCP and UDP.
func listenEcho(port string) error {
	l, err := net.Listen("tcp", ":"+port)
	if err != nil {
		return err
	}
	p, err := net.ListenPacket("udp", ":"+port)
	if err != nil {
		l.Close()
		return err
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go echo(c)
		}
	}()
	go func() {
		b := make([]byte, 2000)
		for {
			n, from, err := p.ReadFrom(b)
			if err != nil {
				return
			}
			p.WriteTo(b[:n], from)
		}
	}()
	return nil
}

// callEcho connects to an address, and answers there with what comes. Over UDP it says something first.
func callEcho(network, address string) error {
	c, err := net.DialTimeout(network, address, 20*time.Second)
	if err != nil {
		return err
	}
	if network == "udp" {
		if _, err := c.Write([]byte("hello")); err != nil {
			return err
		}
	}
	go echo(c)
	return nil
}

func echo(c net.Conn) {
	defer c.Close()
	b := make([]byte, 32<<10)
	for {
		n, err := c.Read(b)
		if err == nil {
			_, err = c.Write(b[:n])
		}
		if err != nil {
			return
		}
	}
}
