package qemu

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
	"path/filepath"
	"sync"
	"time"

	"github.com/drafter-vm/drafter/pkg/vmm"
	"github.com/drafter-vm/drafter/pkg/vmm/internal/cgroup"
	"github.com/drafter-vm/drafter/pkg/vmm/internal/console"
	"github.com/drafter-vm/drafter/pkg/vmm/internal/lifecycle"
	"github.com/drafter-vm/drafter/pkg/vmm/internal/process"
)

// identityFile is the file in Config.Dir that says which process the machine is.
const identityFile = "qemu.json"

const (
	// maxState bounds the device state, in bytes. It has some 300 KB; far more would be RAM that ought not to be in it.
	maxState = 64 << 20

	// stateMagic begins a QEMU migration stream.
	stateMagic = "QEVM"

	// settleTime is how long a cancelled operation may take to leave the machine in a known state.
	settleTime = 10 * time.Second
)

// machine is a QEMU process with a virtual machine.
type machine struct {
	cfg  vmm.Config
	caps *capabilities
	log  *slog.Logger
	life lifecycle.Lifecycle

	process *process.Process
	qmp     *client
	console *console.Console
	cgroup  *cgroup.Group

	announcer *announcer  // nil if there is no network, and if the machine was booted or adopted
	arrived   *time.Timer // fires at each of announceTimes after a guest that was loaded began to run

	migration chan string   // receives the status in each MIGRATION event
	stopped   chan struct{} // receives when the guest was stopped, by us or by QEMU

	// device state of the last Save, while the state is saved; nil after an adoption. Loaded says that the guest came
	// by Load and has not run here yet. Both belong to the operation under way.
	lastState []byte
	loaded    bool

	mu       sync.Mutex // guards what follows
	closing  bool       // Close was called
	shutdown string     // reason in the SHUTDOWN event
	failure  error      // why we ended QEMU ourselves

	runs     chan struct{} // closed when a machine that waits for its state runs; nil where it does not wait
	done     chan struct{}
	err      error // valid when done is closed
	closeErr error // valid when done is closed: what could not be removed
}

var (
	_ vmm.Machine = (*machine)(nil)
	_ vmm.Stater  = (*machine)(nil)

	_ vmm.PowerButton = (*machine)(nil)
	_ vmm.Ballooner   = (*machine)(nil)
)

func newMachine(cfg vmm.Config, caps *capabilities) *machine {
	arrived := time.NewTimer(time.Hour)
	arrived.Stop()
	return &machine{
		cfg: cfg, caps: caps, log: cfg.Logger.With("vmm", hypervisor, "dir", cfg.Dir), arrived: arrived,
		migration: make(chan string, 64), stopped: make(chan struct{}, 1), done: make(chan struct{}),
	}
}

// connect connects to the process's sockets and, in a new one, prepares it for Save and Load.
func (m *machine) connect(ctx context.Context) error {
	// A device state says what the console has taken: input that came before it would be lost in it.
	if m.process.Child() && m.cfg.Boot == nil {
		m.runs = make(chan struct{})
	}
	// The console first: by the time QEMU answers QMP commands it has taken this connection too.
	if m.cfg.SerialOutput != nil || m.cfg.SerialInput != nil {
		conn, err := new(net.Dialer).DialContext(ctx, "unix", filepath.Join(m.cfg.Dir, serialSocket))
		if err != nil {
			return fmt.Errorf("connect to the console: %w", err)
		}
		m.console = console.Start(conn, m.cfg.SerialOutput, m.cfg.SerialInput, m.runs, m.log)
	}
	var err error
	if m.qmp, err = dialQMP(ctx, filepath.Join(m.cfg.Dir, qmpSocket), m.onEvent); err != nil {
		return err
	}
	if !m.process.Child() {
		return nil // the one who started it did the rest
	}
	type capability struct {
		Capability string `json:"capability"`
		State      bool   `json:"state"`
	}
	if err := m.qmp.execute(ctx, "migrate-set-capabilities", map[string]any{"capabilities": []capability{
		{"events", true}, {"x-ignore-shared", true},
	}}, nil); err != nil {
		return err
	}
	// A machine that was loaded must not tell the network where it is before it runs: Resume does.
	return m.qmp.execute(ctx, "migrate-set-parameters", map[string]any{"announce-rounds": 0}, nil)
}

// onEvent is called by the reader of QMP.
func (m *machine) onEvent(name string, data json.RawMessage) {
	var d struct{ Reason, Status string }
	if err := json.Unmarshal(data, &d); err != nil && len(data) > 0 {
		m.log.Debug("QMP event that we cannot read", "event", name, "error", err)
		return
	}
	switch name {
	case "SHUTDOWN":
		m.mu.Lock()
		m.shutdown = d.Reason
		m.mu.Unlock()
	case "STOP":
		select {
		case m.stopped <- struct{}{}:
		default:
		}
	case "MIGRATION":
		select {
		case m.migration <- d.Status:
		default: // more than an operation sends: none is waiting
		}
	}
}

// State implements [vmm.Stater].
func (m *machine) State() vmm.State {
	return m.life.VMM()
}

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
	again := announceTimes[1:]
	for waiting := true; waiting; {
		select {
		case <-m.process.Ended:
			waiting = false
		case <-m.stopped:
			m.checkStop()
		case <-m.arrived.C:
			if m.life.State() != lifecycle.Running { // it may have been announced elsewhere
				again = nil
			} else if err := m.announcer.announce(); err != nil {
				m.log.Warn("cannot announce the guest on its network", "error", err)
			}
			if len(again) == 0 {
				m.announcer.close()
				break
			}
			m.arrived.Reset(again[0])
			again = again[1:]
		}
	}
	m.arrived.Stop()
	m.announcer.close()
	m.life.Close()
	m.disconnect() // events that came before the end are read by now
	m.err = m.verdict()
	m.closeErr = m.remove()
	m.process.Release()
	m.log.Debug("machine ended", "error", m.err)
	close(m.done)
}

// checkStop looks why the guest was stopped. That we did it is no news; that QEMU did it means that the virtual CPU
// cannot go on, and a machine that pretends to be alive helps nobody.
func (m *machine) checkStop() {
	var status struct{ Status string }
	ctx, cancel := context.WithTimeout(context.Background(), settleTime)
	defer cancel()
	if m.qmp.execute(ctx, "query-status", nil, &status) != nil || status.Status != "internal-error" {
		return
	}
	m.mu.Lock()
	m.failure = errors.New("the virtual CPU cannot go on (QEMU's status is internal-error)")
	m.mu.Unlock()
	m.process.Kill()
}

// verdict says why the process has ended.
func (m *machine) verdict() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.failure != nil:
		return m.process.Stderr.Explain(m.failure)
	case m.closing || m.shutdown == "guest-shutdown":
		return nil
	case m.shutdown == "guest-reset":
		return vmm.ErrReboot
	}
	status := m.process.Status
	if status == "" {
		status = "its exit status is unknown"
	}
	if m.shutdown != "" {
		status += ", reason " + m.shutdown
	}
	return m.process.Stderr.Explain(fmt.Errorf("QEMU (process %d) ended unexpectedly: %s", m.process.PID, status))
}

// disconnect ends our connections and their goroutines.
func (m *machine) disconnect() {
	if m.qmp != nil {
		select {
		case <-m.process.Ended:
			<-m.qmp.done // by itself, after the last event
		default:
			m.qmp.close()
		}
	}
	if m.console != nil {
		select {
		case <-m.process.Ended:
		default:
			m.console.Disconnect()
		}
		m.console.Close()
	}
}

// remove removes what an ended process leaves.
func (m *machine) remove() error {
	errs := []error{m.cgroup.Remove()}
	for _, name := range []string{qmpSocket, serialSocket, vmm.GuestChannel, identityFile, identityFile + ".tmp"} {
		if err := os.Remove(filepath.Join(m.cfg.Dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// abandon ends a machine whose start failed with cause, and says more about that.
func (m *machine) abandon(cause error) error {
	m.announcer.close()
	if m.process != nil {
		select {
		case <-m.process.Ended:
		case <-time.After(100 * time.Millisecond):
			// A process that failed is ending, and its status says more than that of one we killed.
			m.process.Kill()
			<-m.process.Ended
		}
		m.disconnect()
		m.process.Release()
		cause = m.process.Stderr.Explain(cause)
	}
	return errors.Join(cause, m.remove())
}

// look asks QEMU for the state of the machine, and waits for the end of a migration that an owner left.
func (m *machine) look(ctx context.Context) (lifecycle.State, error) {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		var status struct{ Status string }
		if err := m.qmp.execute(ctx, "query-status", nil, &status); err != nil {
			return lifecycle.Broken, err
		}
		switch status.Status {
		case "running":
			return lifecycle.Running, nil
		case "paused", "prelaunch":
			return lifecycle.Paused, nil
		case "postmigrate":
			return lifecycle.Saved, nil
		case "inmigrate":
			// Either nobody called Load yet, or it failed, or its owner died in the middle.
			if status, _, err := m.migrationStatus(ctx); err != nil {
				return lifecycle.Broken, err
			} else if status != "" && status != "none" {
				return lifecycle.Broken, nil
			}
			return lifecycle.Waiting, nil
		case "finish-migrate":
			select {
			case <-tick.C:
				continue
			case <-ctx.Done():
				return lifecycle.Broken, fmt.Errorf("wait for the end of a Save: %w", context.Cause(ctx))
			}
		default:
			return lifecycle.Broken, fmt.Errorf("QEMU's status is %q", status.Status)
		}
	}
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

// step logs how long a part of an operation took.
func (m *machine) step(name string, began time.Time) {
	m.log.Debug("machine step", "step", name, "took", time.Since(began))
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
	if _, err := m.life.Begin("pause", lifecycle.Running); err != nil {
		return err
	}
	began := time.Now()
	// QEMU stops the vCPUs, waits for the devices' I/O and flushes the disks before it answers.
	err := m.qmp.execute(ctx, "stop", nil, nil)
	if err == nil {
		var now lifecycle.State
		if now, err = m.look(ctx); err == nil && now != lifecycle.Paused {
			err = fmt.Errorf("QEMU says it is %s", now)
		}
	}
	m.step("stop", began)
	if err == nil {
		m.life.End(lifecycle.Paused)
		return nil
	}
	back, cancel := context.WithTimeout(context.WithoutCancel(ctx), settleTime)
	defer cancel()
	if e := m.qmp.execute(back, "cont", nil, nil); e != nil {
		m.log.Debug("cannot undo a failed pause", "error", e)
	}
	m.life.End(m.settle(ctx))
	return m.failed("pause", err)
}

// PressPower implements [vmm.PowerButton].
func (m *machine) PressPower(ctx context.Context) error {
	before, err := m.life.Begin("press the power button", lifecycle.Running)
	if err != nil {
		return err
	}
	defer m.life.End(before)
	if err := m.qmp.execute(ctx, "system_powerdown", nil, nil); err != nil {
		return m.failed("press the power button", err)
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
	// QEMU is told what is left to the guest.
	left := m.cfg.Spec.MemorySize - size>>20<<20
	if err := m.qmp.execute(ctx, "balloon", map[string]int64{"value": left}, nil); err != nil {
		return m.failed("set the balloon", err)
	}
	return nil
}

// Balloon implements [vmm.Ballooner].
func (m *machine) Balloon(ctx context.Context) (int64, error) {
	before, err := m.life.Begin("look at the balloon", lifecycle.Running)
	if err != nil {
		return 0, err
	}
	defer m.life.End(before)
	var left struct{ Actual int64 }
	if err := m.qmp.execute(ctx, "query-balloon", nil, &left); err != nil {
		return 0, m.failed("look at the balloon", err)
	}
	return m.cfg.Spec.MemorySize - left.Actual, nil
}

// Resume implements [vmm.Machine].
func (m *machine) Resume(ctx context.Context) error {
	if _, err := m.life.Begin("resume", lifecycle.Paused, lifecycle.Saved); err != nil {
		return err
	}
	began := time.Now()
	network := m.cfg.Spec.MAC != ""
	arrives := network && m.loaded && m.announcer != nil
	if arrives {
		if err := m.announcer.announce(); err != nil {
			m.log.Warn("cannot announce the guest on its network", "error", err)
		}
	}
	err := m.qmp.execute(ctx, "cont", nil, nil)
	m.step("cont", began)
	if err != nil {
		m.life.End(m.settle(ctx))
		return m.failed("resume", err)
	}
	if m.runs != nil {
		close(m.runs)
		m.runs = nil
	}
	if network && !arrives {
		// It goes on where it was, but may have been announced elsewhere meanwhile.
		m.announceSelf(ctx)
	}
	m.loaded, m.lastState = false, nil
	m.life.End(lifecycle.Running)
	if arrives {
		m.arrived.Reset(announceTimes[0])
	}
	return nil
}

// Save implements [vmm.Machine]. The state is complete before the first byte is written to w; when w fails, it can be
// saved again.
func (m *machine) Save(ctx context.Context, w io.Writer) error {
	from, err := m.life.Begin("save", lifecycle.Paused, lifecycle.Saved)
	if err != nil {
		return err
	}
	began := time.Now()
	if from == lifecycle.Paused {
		m.lastState, err = m.migrateOut(ctx)
		m.step("migrate", began)
		if err != nil {
			// A migration that was complete before it could be cancelled has left the machine saved, its state unread.
			m.life.End(m.settle(ctx))
			return m.failed("save", err)
		}
	}
	defer m.life.End(lifecycle.Saved)
	if m.lastState == nil {
		return fmt.Errorf("save machine: a former owner saved it, and QEMU does so once between two runs: %w", vmm.ErrState)
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("save machine: %w", context.Cause(ctx))
	}
	if _, err := io.Copy(w, bytes.NewReader(m.lastState)); err != nil {
		return fmt.Errorf("save machine: write its state: %w", err)
	}
	m.log.Debug("machine saved", "bytes", len(m.lastState), "took", time.Since(began))
	return nil
}

// migrateOut has QEMU write the device state into a pipe.
func (m *machine) migrateOut(ctx context.Context) ([]byte, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	type result struct {
		state []byte
		err   error
	}
	read := make(chan result, 1)
	go func() {
		state, err := io.ReadAll(io.LimitReader(r, maxState+1))
		if len(state) > maxState {
			err = fmt.Errorf("the state has more than %d bytes: RAM is in it", maxState)
		}
		r.Close() // what comes after an error fails in QEMU
		read <- result{state, err}
	}()
	m.drainMigration()
	err = m.qmp.execute(ctx, "getfd", map[string]any{"fdname": "state"}, nil, w)
	w.Close() // QEMU has its own, and our reader must see its end
	if err == nil {
		if err = m.qmp.execute(ctx, "migrate", map[string]any{"uri": "fd:state"}, nil); err == nil {
			err = m.awaitMigration(ctx)
		}
		if err != nil {
			m.cancelMigration(ctx)
		}
	}
	if err != nil {
		m.dropState(ctx)
		r.Close()
		<-read
		return nil, err
	}
	got := <-read
	if got.err != nil {
		return nil, fmt.Errorf("read QEMU's device state: %w", got.err)
	}
	return got.state, nil
}

// dropState has QEMU close the pipe for the state if it has not come to use it. It would keep it until it is given the next.
func (m *machine) dropState(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), settleTime)
	defer cancel()
	if err := m.qmp.execute(ctx, "closefd", map[string]any{"fdname": "state"}, nil); err != nil {
		m.log.Debug("the pipe for the state was used, or is not to be closed", "error", err)
	}
}

func (m *machine) drainMigration() {
	for {
		select {
		case <-m.migration:
		default:
			return
		}
	}
}

// awaitMigration waits for the end of a migration, in or out.
func (m *machine) awaitMigration(ctx context.Context) error {
	for {
		select {
		case status := <-m.migration:
			switch status {
			case "completed":
				return nil
			case "failed", "cancelled":
				_, desc, err := m.migrationStatus(ctx)
				if err == nil && desc != "" {
					return errors.New(desc)
				}
				return fmt.Errorf("QEMU says no more than %q", status)
			}
		case <-m.qmp.done:
			// The process is ending; its words are worth waiting for.
			select {
			case <-m.process.Ended:
			case <-ctx.Done():
			}
			return m.process.Stderr.Explain(errors.New("QEMU has ended"))
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// migrationStatus returns the status of the last migration ("" or "none": there was none) and what made it fail.
func (m *machine) migrationStatus(ctx context.Context) (status, desc string, err error) {
	var info struct {
		Status string
		Desc   string `json:"error-desc"`
	}
	err = m.qmp.execute(ctx, "query-migrate", nil, &info)
	return info.Status, info.Desc, err
}

// cancelMigration ends a migration that may still be running and waits for its end.
func (m *machine) cancelMigration(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), settleTime)
	defer cancel()
	if err := m.qmp.execute(ctx, "migrate_cancel", nil, nil); err != nil {
		m.log.Debug("cannot cancel", "error", err)
		return
	}
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		switch status, _, err := m.migrationStatus(ctx); {
		case err != nil:
			return
		case status == "" || status == "none" || status == "completed" || status == "failed" || status == "cancelled":
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// Load implements [vmm.Machine]. It reads r to its end.
func (m *machine) Load(ctx context.Context, r io.Reader) error {
	if _, err := m.life.Begin("load", lifecycle.Waiting); err != nil {
		return err
	}
	began := time.Now()
	text, err := io.ReadAll(io.LimitReader(r, maxState+1))
	switch {
	case err != nil:
		err = fmt.Errorf("read its state: %w", err)
	case len(text) > maxState:
		err = fmt.Errorf("the state has more than %d bytes", maxState)
	case !bytes.HasPrefix(text, []byte(stateMagic)):
		err = fmt.Errorf("this is no device state of QEMU: it begins with %.8q", text)
	default:
		err = ctx.Err()
	}
	if err != nil {
		m.life.End(lifecycle.Waiting) // QEMU has seen nothing of it
		return m.failed("load", err)
	}
	err = m.migrateIn(ctx, text)
	m.step("migrate-incoming", began)
	if err != nil {
		m.life.End(lifecycle.Broken)
		return m.failed("load", err)
	}
	now, err := m.look(ctx)
	if err == nil && now != lifecycle.Paused {
		err = fmt.Errorf("QEMU says it is %s", now)
	}
	if err != nil {
		m.life.End(lifecycle.Broken)
		return m.failed("load", err)
	}
	m.loaded = true
	m.life.End(lifecycle.Paused)
	return nil
}

// migrateIn has QEMU read the device state from a pipe.
func (m *machine) migrateIn(ctx context.Context, text []byte) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	m.drainMigration()
	err = m.qmp.execute(ctx, "getfd", map[string]any{"fdname": "state"}, nil, r)
	r.Close()
	if err != nil {
		w.Close()
		return err
	}
	written := make(chan error, 1)
	go func() {
		_, err := w.Write(text)
		written <- errors.Join(err, w.Close())
	}()
	arguments := map[string]any{"uri": "fd:state"}
	if m.caps.atLeast(9, 1) {
		arguments["exit-on-error"] = false // an older one tells its stderr and exits
	}
	if err = m.qmp.execute(ctx, "migrate-incoming", arguments, nil); err == nil {
		err = m.awaitMigration(ctx)
	}
	if err != nil {
		w.SetWriteDeadline(time.Unix(1, 0)) // QEMU may have stopped to read
		<-written
		return err
	}
	// QEMU may stop reading at its end mark, but then it has read all there is.
	<-written
	return nil
}
