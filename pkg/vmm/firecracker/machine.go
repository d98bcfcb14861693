package firecracker

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc64"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/vmm"
	"github.com/drafter-vm/drafter/pkg/vmm/internal/cgroup"
	"github.com/drafter-vm/drafter/pkg/vmm/internal/console"
	"github.com/drafter-vm/drafter/pkg/vmm/internal/lifecycle"
	"github.com/drafter-vm/drafter/pkg/vmm/internal/process"
)

const (
	// maxState bounds the device state, in bytes. It has some tens of KB.
	maxState = 64 << 20

	// settleTime is how long a cancelled operation may take to leave the machine in a known state.
	settleTime = 10 * time.Second

	// stillPause is how long to wait before device state is looked for again, which takes milliseconds to be written.
	stillPause = 200 * time.Microsecond
)

// machine is a Firecracker process with a virtual machine.
type machine struct {
	cfg  vmm.Config
	log  *slog.Logger
	life lifecycle.Lifecycle
	api  *client

	jail    *jail
	version string // of Firecracker; empty for one that was adopted
	process *process.Process
	console *console.Console // nil if nobody wants to know
	words   *console.Console // of Firecracker itself
	numbers *console.Console // that it counts
	counted measures
	cgroup  *cgroup.Group

	tap     *os.File // of a machine that waits for Load, so that nobody else takes it meanwhile: it can be open once; nil if there is no network
	saved   *os.File // a memfd that the process has, too: it writes device state into it
	loaded  *os.File // another, from which it reads device state
	in, out *os.File // the process's ends of its console
	said    *os.File // and of its log
	counts  *os.File // and of its metrics

	still *still // of a paused machine; of whoever changes the state

	asked    sync.WaitGroup     // requests that answer when a still machine is let go
	silenced context.Context    // is over when nobody speaks with the process any more
	silence  context.CancelFunc // ends it

	mu      sync.Mutex // guards what follows
	closing bool       // Close was called

	done     chan struct{}
	err      error // valid when done is closed
	closeErr error // valid when done is closed: what could not be removed
}

var (
	_ vmm.Machine  = (*machine)(nil)
	_ vmm.Stater   = (*machine)(nil)
	_ vmm.Measurer = (*machine)(nil)
)

func newMachine(cfg vmm.Config, jail *jail) *machine {
	log := cfg.Logger.With("vmm", hypervisor, "dir", cfg.Dir)
	m := &machine{cfg: cfg, jail: jail, log: log, api: newClient(filepath.Join(cfg.Dir, apiSocket), log), done: make(chan struct{})}
	m.silenced, m.silence = context.WithCancel(context.Background())
	return m
}

// identity is the file that says which process the machine is, where that cannot change it.
func (m *machine) identity() string {
	if m.jail != nil {
		return m.jail.outside(identityFile)
	}
	return filepath.Join(m.cfg.Dir, identityFile)
}

// linkDisks makes the links by which Firecracker finds disks. They are to paths in the folder where a disk is in it, as that may be all it sees.
func (m *machine) linkDisks() error {
	for i, at := range m.cfg.Disks {
		path, inside := strings.CutPrefix(at.Path, m.cfg.Dir+"/")
		if m.jail != nil && !inside {
			return fmt.Errorf("disk %q at %q: in its jail Firecracker sees what is in %q, and nothing else", m.cfg.Spec.Disks[i].Name, at.Path, m.cfg.Dir)
		}
		if err := os.Symlink(path, filepath.Join(m.cfg.Dir, diskLink(i))); err != nil {
			return err
		}
	}
	return nil
}

// makeFiles makes what the process is connected by, and returns what it is to inherit.
func (m *machine) makeFiles() (inherited []*os.File, err error) {
	for _, name := range []string{consoleInput, consoleOutput, stillFIFO, logFIFO, metricsFIFO} {
		path := filepath.Join(m.cfg.Dir, name)
		if err = unix.Mkfifo(path, 0o600); err == nil && m.jail != nil {
			err = m.jail.take(name)
		}
		if err != nil {
			return nil, fmt.Errorf("make FIFO %q: %w", path, err)
		}
	}
	if err := m.openFIFOs(); err != nil {
		return nil, err
	}
	if m.jail != nil {
		m.saved, m.loaded, err = m.jail.files(m.cfg.Spec.MemorySize)
		return nil, err
	}
	defer func() {
		if err != nil {
			closeAll(inherited)
		}
	}()
	for _, own := range []**os.File{&m.saved, &m.loaded} { // savedFD, loadedFD
		fd, err := unix.MemfdCreate("state", unix.MFD_CLOEXEC)
		if err != nil {
			return nil, fmt.Errorf("make a file for device state: %w", err)
		}
		*own = os.NewFile(uintptr(fd), "state")
	}
	for _, f := range []*os.File{m.saved, m.loaded, m.cfg.Memory} { // and memoryFD
		fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return inherited, fmt.Errorf("duplicate a descriptor: %w", err)
		}
		inherited = append(inherited, os.NewFile(uintptr(fd), f.Name()))
	}
	return inherited, nil
}

// openFiles opens what a former owner has made.
func (m *machine) openFiles() (err error) {
	if err := m.openFIFOs(); err != nil {
		return err
	}
	if m.jail != nil {
		m.saved, m.loaded, err = m.jail.open()
		return err
	}
	for fd, file := range map[int]**os.File{savedFD: &m.saved, loadedFD: &m.loaded} {
		if *file, err = os.OpenFile(fmt.Sprintf("/proc/%d/fd/%d", m.process.PID, fd), os.O_RDWR, 0); err != nil {
			return fmt.Errorf("open its file for device state: %w", err)
		}
	}
	return nil
}

// openFIFOs opens them for both directions, so that there is no end to them when others leave, and nobody waits: what is written
// when nobody reads is lost.
func (m *machine) openFIFOs() (err error) {
	for name, file := range map[string]**os.File{consoleInput: &m.in, consoleOutput: &m.out, logFIFO: &m.said, metricsFIFO: &m.counts} {
		if *file, err = os.OpenFile(filepath.Join(m.cfg.Dir, name), os.O_RDWR|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0); err != nil {
			return err
		}
	}
	return nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// Where Firecracker finds files.
func (m *machine) savedPath() string  { return m.path(savedFD, savedFile) }
func (m *machine) loadedPath() string { return m.path(loadedFD, loadedFile) }
func (m *machine) memoryPath() string { return m.path(memoryFD, memoryFile) }

func (m *machine) path(fd int, jailed string) string {
	if m.jail != nil {
		return jailed
	}
	return inherited(fd)
}

// startPumps pumps what Firecracker says, and the console if somebody wants that.
func (m *machine) startPumps() {
	m.words = console.Start(fifos{m.said, nil}, m.process.Stderr.Log(m.log), nil, nil, m.log)
	m.numbers = console.Start(fifos{m.counts, nil}, &m.counted, nil, nil, m.log)
	if m.cfg.SerialOutput != nil || m.cfg.SerialInput != nil {
		m.console = console.Start(fifos{m.out, m.in}, m.cfg.SerialOutput, m.cfg.SerialInput, nil, m.log)
	}
}

// fifos are the owner's side of a console.
type fifos struct{ out, in *os.File }

func (f fifos) Read(b []byte) (int, error)  { return f.out.Read(b) }
func (f fifos) Write(b []byte) (int, error) { return f.in.Write(b) }
func (f fifos) Close() error {
	if f.in != nil {
		_ = f.in.SetDeadline(time.Unix(1, 0))
	}
	return f.out.SetDeadline(time.Unix(1, 0))
}

// State implements [vmm.Stater].
func (m *machine) State() vmm.State { return m.life.VMM() }

// PID implements [vmm.Machine].
func (m *machine) PID() int { return m.process.PID }

// Done implements [vmm.Machine].
func (m *machine) Done() <-chan struct{} { return m.done }

// Err implements [vmm.Machine].
func (m *machine) Err() error {
	select {
	case <-m.done:
		return m.err
	default:
		return nil
	}
}

// PressPower implements [vmm.PowerButton]. Firecracker has no such button, and a keyboard whose only keys are those that have a guest reboot, which
// ends Firecracker.
func (m *machine) PressPower(ctx context.Context) error {
	before, err := m.life.Begin("press the power button", lifecycle.Running)
	if err != nil {
		return err
	}
	defer m.life.End(before)
	if err := m.api.put(ctx, "/actions", action{"SendCtrlAltDel"}); err != nil {
		return fmt.Errorf("press the power button: %w", err)
	}
	return nil
}

// SetBalloon implements [vmm.Ballooner].
func (m *machine) SetBalloon(ctx context.Context, size int64) error {
	before, err := m.life.Begin("set the balloon", lifecycle.Running)
	if err != nil {
		return err
	}
	defer m.life.End(before)
	if err := m.api.call(ctx, http.MethodPatch, "/balloon", balloonUpdate{size >> 20}, nil); err != nil {
		return fmt.Errorf("set the balloon: %w", noBalloon(err))
	}
	return nil
}

// noBalloon recognises that Firecracker refuses a request because of a balloon that is not there, of which it says no more than that in words.
func noBalloon(err error) error {
	var f *fault
	if errors.As(err, &f) && (strings.Contains(f.message, "not activated") || strings.Contains(strings.ToLower(f.message), "not found")) {
		return fmt.Errorf("%w: %w", vmm.ErrNoBalloon, err)
	}
	return err
}

// Balloon implements [vmm.Ballooner].
func (m *machine) Balloon(ctx context.Context) (int64, error) {
	before, err := m.life.Begin("look at the balloon", lifecycle.Running)
	if err != nil {
		return 0, err
	}
	defer m.life.End(before)
	var stats balloonStats
	if err := m.api.call(ctx, http.MethodGet, "/balloon/statistics", nil, &stats); err != nil {
		return 0, fmt.Errorf("look at the balloon: %w", noBalloon(err))
	}
	return stats.ActualMiB << 20, nil
}

// Close implements [vmm.Machine].
func (m *machine) Close() error {
	m.mu.Lock()
	m.closing = true
	m.mu.Unlock()
	m.process.Kill()
	<-m.done
	return m.closeErr
}

// watch waits for the process's end and cleans up after it.
func (m *machine) watch() {
	<-m.process.Ended
	m.life.Close()
	m.disconnect()
	m.err = m.verdict()
	m.closeErr = m.remove()
	m.process.Release()
	m.log.Debug("machine ended", "error", m.err)
	close(m.done)
}

// verdict says why the process has ended. A guest that reboots ends it in the same way as one that shuts down: Firecracker has no reset.
func (m *machine) verdict() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closing || m.process.Clean {
		return nil
	}
	status := m.process.Status
	if status == "" {
		status = "its exit status is unknown"
	}
	return m.process.Stderr.Explain(fmt.Errorf("firecracker (process %d) ended unexpectedly: %s", m.process.PID, status))
}

// disconnect ends what connects us with the process.
func (m *machine) disconnect() {
	m.silence()
	m.asked.Wait()
	m.api.close()
	for _, pump := range []struct {
		*console.Console
		of *os.File
	}{{m.console, m.out}, {m.words, m.said}, {m.numbers, m.counts}} {
		if pump.Console != nil {
			drain(pump.of)
			pump.Disconnect()
			pump.Close()
		}
	}
	for _, f := range []*os.File{m.tap, m.in, m.out, m.said, m.counts, m.saved, m.loaded} {
		if f != nil {
			f.Close()
		}
	}
}

// drain lets a FIFO's pump have what an ended process has written: a FIFO has no end that it could wait for.
func drain(fifo *os.File) {
	for end := time.Now().Add(time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		n := 0
		raw, err := fifo.SyscallConn()
		if err == nil {
			err = raw.Control(func(fd uintptr) { n, _ = unix.IoctlGetInt(int(fd), unix.TIOCINQ) })
		}
		if err != nil || n == 0 {
			return
		}
	}
}

// files are what a machine has in its folder.
func (m *machine) files() []string {
	names := []string{apiSocket, consoleInput, consoleOutput, stillFIFO, logFIFO, metricsFIFO, vmm.SocketFile}
	for i := range m.cfg.Spec.Disks {
		names = append(names, diskLink(i))
	}
	return names
}

func (m *machine) removeFiles() error {
	paths := []string{m.identity(), m.identity() + ".tmp"}
	for _, name := range m.files() {
		paths = append(paths, filepath.Join(m.cfg.Dir, name))
	}
	var errs []error
	for _, path := range paths {
		if err := os.RemoveAll(path); err != nil { // a jailed one may have put a folder there
			errs = append(errs, err)
		}
	}
	if m.jail != nil {
		errs = append(errs, m.jail.remove())
	}
	return errors.Join(errs...)
}

// remove removes what an ended process leaves.
func (m *machine) remove() error { return errors.Join(m.cgroup.Remove(), m.removeFiles()) }

// abandon ends a machine whose start failed with cause, and says more about that.
func (m *machine) abandon(cause error) error {
	if m.process != nil {
		select {
		case <-m.process.Ended:
		case <-time.After(100 * time.Millisecond):
			// A process that failed is ending, and its status says more than that of one we killed.
			m.process.Kill()
			<-m.process.Ended
		}
		cause = m.process.Stderr.Explain(cause)
		m.process.Release()
	}
	m.disconnect()
	return errors.Join(cause, m.remove())
}

// look asks Firecracker for the state of the machine.
func (m *machine) look(ctx context.Context) (lifecycle.State, error) {
	if m.still != nil { // and answers nothing
		return lifecycle.Paused, nil
	}
	info, err := m.api.info(ctx)
	if err != nil {
		return lifecycle.Broken, err
	}
	switch info.State {
	case "Not started":
		return lifecycle.Waiting, nil
	case "Running":
		return lifecycle.Running, nil
	case "Paused":
		return lifecycle.Paused, nil
	}
	return lifecycle.Broken, fmt.Errorf("firecracker says that the machine is %q", info.State)
}

// settle finds out, after an operation failed for whatever reason, in which state the machine is.
func (m *machine) settle(ctx context.Context) lifecycle.State {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), settleTime)
	defer cancel()
	now, err := m.look(ctx)
	if err != nil {
		m.log.Debug("machine is in no known state", "error", err)
	}
	return now
}

// find looks again in which state a machine is that was found in none that is known: its process may have been held up, and goes on.
func (m *machine) find(ctx context.Context) error {
	if m.life.State() != lifecycle.Broken {
		return nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, settleTime, fmt.Errorf("no answer within %s", settleTime))
	defer cancel()
	now, err := m.look(ctx)
	if err != nil {
		return fmt.Errorf("firecracker does not say in which state it is: %w", err)
	}
	if _, err := m.life.Begin("find", lifecycle.Broken); err != nil {
		return err
	}
	m.life.End(now)
	return nil
}

// failed adds to an operation's error what is known if the process has ended meanwhile.
func (m *machine) failed(op string, err error) error {
	select {
	case <-m.done:
		if m.err != nil {
			err = fmt.Errorf("%w (%w)", err, m.err)
		}
	default:
	}
	return fmt.Errorf("%s machine: %w", op, err)
}

// Pause implements [vmm.Machine]. When ctx ends meanwhile, the guest is let run again.
func (m *machine) Pause(ctx context.Context) error {
	if err := m.find(ctx); err != nil {
		return m.failed("pause", err)
	}
	if _, err := m.life.Begin("pause", lifecycle.Running); err != nil {
		return err
	}
	err := m.api.call(ctx, http.MethodPatch, "/vm", vmState{"Paused"}, nil)
	if err == nil {
		err = m.stop(ctx)
	}
	if err == nil {
		m.life.End(lifecycle.Paused)
		return nil
	}
	back, cancel := context.WithTimeout(context.WithoutCancel(ctx), settleTime)
	defer cancel()
	if now, e := m.look(back); e == nil && now == lifecycle.Paused {
		if e := m.api.call(back, http.MethodPatch, "/vm", vmState{"Resumed"}, nil); e != nil {
			m.log.Debug("cannot undo a failed pause", "error", e)
		}
	}
	m.life.End(m.settle(ctx))
	return m.failed("pause", err)
}

// Resume implements [vmm.Machine].
func (m *machine) Resume(ctx context.Context) error {
	if err := m.find(ctx); err != nil {
		return m.failed("resume", err)
	}
	if _, err := m.life.Begin("resume", lifecycle.Paused); err != nil {
		return err
	}
	began := time.Now()
	err := m.release(ctx)
	if err == nil {
		err = m.api.call(ctx, http.MethodPatch, "/vm", vmState{"Resumed"}, nil)
	}
	if err != nil {
		m.life.End(m.settle(ctx))
		return m.failed("resume", err)
	}
	m.life.End(lifecycle.Running)
	m.log.Debug("machine step", "step", "cont", "took", time.Since(began))
	return nil
}

// Save implements [vmm.Machine].
func (m *machine) Save(ctx context.Context, w io.Writer) error {
	if err := m.find(ctx); err != nil {
		return m.failed("save", err)
	}
	if _, err := m.life.Begin("save", lifecycle.Paused); err != nil {
		return err
	}
	var err error
	if m.still == nil { // one that was loaded, and has never run
		err = m.stop(ctx)
	}
	if err == nil && m.still.state == nil {
		err = errors.New("a snapshot was begun that could be neither finished nor ended")
	}
	m.life.End(m.settle(ctx))
	if err != nil {
		return m.failed("save", err)
	}
	if _, err := w.Write(m.still.state); err != nil {
		return fmt.Errorf("save machine: write its state: %w", err)
	}
	return nil
}

// still is a machine that stands still. Firecracker's pause is one of the vCPUs: its devices go on to finish requests, and to write
// packets that arrive into the guest's memory. So a snapshot is begun as well, of which the file of RAM is a FIFO that nobody reads: the
// thread that does all of the devices' work has settled them, has written their state, and waits for a reader.
type still struct {
	state  []byte     // nil if it did not come to that, and could not be let go
	answer chan error // to the snapshot; nil for a machine that a former owner has stopped
}

// stop makes a paused machine stand still. When it fails, it does not.
func (m *machine) stop(ctx context.Context) error {
	began := time.Now()
	if err := m.saved.Truncate(0); err != nil {
		return err
	}
	s := &still{answer: make(chan error, 1)}
	m.asked.Go(func() {
		s.answer <- m.api.put(m.silenced, "/snapshot/create", snapshotCreateParams{"Full", m.savedPath(), stillFIFO})
	})
	for {
		if state, err := readState(m.saved); err == nil {
			s.state, m.still = state, s
			m.log.Debug("machine saved", "bytes", len(state), "took", time.Since(began))
			return nil
		}
		select {
		case err := <-s.answer:
			if err == nil {
				err = fmt.Errorf("firecracker has written RAM to %q, which it was not to", stillFIFO)
			}
			return err
		case <-ctx.Done():
			m.still = s
			return errors.Join(context.Cause(ctx), m.release(ctx))
		case <-time.After(stillPause):
		}
	}
}

// release has a machine go on that stands still, paused as it was before. It does not end with ctx.
func (m *machine) release(ctx context.Context) error {
	if m.still == nil {
		return nil
	}
	ctx, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), settleTime, fmt.Errorf("no answer within %s", settleTime))
	defer cancel()
	reader, err := os.OpenFile(filepath.Join(m.cfg.Dir, stillFIFO), os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer reader.Close() // and not before it has come to the FIFO
	if m.still.answer == nil {
		_, err = m.api.info(ctx) // it answers one after the other
	} else {
		select {
		case err = <-m.still.answer:
			// A FIFO cannot be given the size of RAM.
			if refused := (*fault)(nil); errors.As(err, &refused) && strings.Contains(refused.message, "memory backing file") {
				err = nil
			}
		case <-ctx.Done():
			err = context.Cause(ctx)
		}
	}
	if err != nil {
		return fmt.Errorf("end its snapshot: %w", err)
	}
	m.still = nil
	return m.saved.Truncate(0)
}

// findStill finds out whether a former owner of the machine has made it stand still: then it does not answer.
func (m *machine) findStill(ctx context.Context) error {
	asked, cancel := context.WithCancel(ctx)
	answers := make(chan error, 1)
	m.asked.Go(func() {
		_, err := m.api.info(asked)
		answers <- err
	})
	defer m.asked.Wait()
	defer cancel()
	for {
		if state, err := readState(m.saved); err == nil {
			m.still = &still{state: state}
			return nil
		}
		select {
		case err := <-answers:
			return err
		case <-time.After(stillPause):
		}
	}
}

// readState reads device state that is whole.
func readState(f *os.File) ([]byte, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	state := make([]byte, min(info.Size(), maxState+1))
	if _, err := f.ReadAt(state, 0); err != nil {
		return nil, fmt.Errorf("read Firecracker's device state: %w", err)
	}
	return state, checkState(state)
}

// stateSum is the polynomial of the checksum that ends device state (CRC-64 of Jones, reflected; docs/snapshotting/versioning.md of
// Firecracker), which begins with 0 and is not inverted.
var stateSum = crc64.MakeTable(0x95ac9329ac4bc9b5)

// checkState checks what can be seen of device state: its format is Firecracker's own affair, but it is whole.
func checkState(state []byte) error {
	const sum = 8 // bytes
	if len(state) > maxState {
		return fmt.Errorf("the state has more than %d bytes", maxState)
	}
	if whole := len(state) - sum; whole > sum {
		want := binary.LittleEndian.Uint64(state[whole:])
		for _, from := range []int{0, sum} { // some builds write the length of the rest before it
			if ^crc64.Update(^uint64(0), stateSum, state[from:whole]) == want {
				return nil
			}
		}
	}
	return fmt.Errorf("this is no device state of Firecracker, or not all of it: it has %d bytes, and no checksum at its end", len(state))
}

// Load implements [vmm.Machine].
func (m *machine) Load(ctx context.Context, r io.Reader) error {
	if _, err := m.life.Begin("load", lifecycle.Waiting); err != nil {
		return err
	}
	began := time.Now()
	state, err := io.ReadAll(io.LimitReader(r, maxState+1))
	if err != nil {
		err = fmt.Errorf("read its state: %w", err)
	} else {
		err = checkState(state)
	}
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		m.life.End(lifecycle.Waiting) // Firecracker has seen nothing of it
		return m.failed("load", err)
	}
	if err := m.load(ctx, state); err != nil {
		m.life.End(lifecycle.Broken)
		return m.failed("load", err)
	}
	m.life.End(lifecycle.Paused)
	m.log.Debug("machine loaded", "bytes", len(state), "took", time.Since(began))
	return nil
}

func (m *machine) load(ctx context.Context, state []byte) error {
	if m.cfg.Graft == nil { // it was adopted
		return errNoHooks
	}
	defer func() { _ = m.loaded.Truncate(0) }() // it takes up memory
	if _, err := m.loaded.WriteAt(state, 0); err != nil {
		return fmt.Errorf("write its state: %w", err)
	}
	params := snapshotLoadParams{SnapshotPath: m.loadedPath(), MemBackend: memoryBackend{"File", m.memoryPath()}}
	if m.cfg.Spec.MAC != "" && m.isFrom(renames) {
		params.NetworkOverrides = []networkOverride{{interfaceID, m.cfg.Interface}}
	}
	if err := m.cfg.Graft(func() error {
		if m.tap != nil {
			m.tap.Close()
		}
		return m.api.put(ctx, "/snapshot/load", params)
	}); err != nil {
		return err
	}
	if m.cfg.IOEngineSync && len(m.cfg.Spec.Disks) > 0 {
		m.log.Warn("the machine's disks have the engine that it was made with, whatever is asked for here")
	}
	limit := limiter(m.cfg.DiskLimit)
	if limit == nil {
		return nil // and it has those that it was saved with
	}
	for i := range m.cfg.Spec.Disks {
		if err := m.api.call(ctx, http.MethodPatch, "/drives/"+diskID(i), partialDrive{diskID(i), limit}, nil); err != nil {
			return err
		}
	}
	return nil
}
