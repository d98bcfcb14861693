package faults

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/drafter-vm/drafter/internal/testguest/journal"
	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/migrate"
)

const (
	memoryPages = 80
	memorySize  = memoryPages * block.PageSize
	diskSlots   = 24
	diskSize    = (1+diskSlots)*block.PageSize + 100 // a register, a journal, and an odd end
	stateSize   = 70_000                             // more than one frame

	// tick is the time between two steps of a guest that nothing else drives.
	tick = time.Millisecond
	// idleTick is that of one that has run for eagerSteps: minutes in fake time shall not be minutes.
	idleTick   = 50 * time.Millisecond
	eagerSteps = 200
)

// Program is what the guest does, and where it stands: its CPU's registers, so to say, which travel as device state. It
// writes over its memory, page after page and pass after pass, each page with what follows from pass and place, and looks
// before at what the last pass left there: a page that was lost, is old or is misplaced is found when its turn comes, or by
// verify. Now and then it appends to the journal on its disk, with a flush. Page 0 of memory and of disk are registers for
// clients.
type Program struct {
	Boot uint64 // how often the guest was booted: a boot loses the memory
	Pass uint64
	Next uint64 // page of memory to be written next, from 1
	Seq  uint64 // newest flushed record of the journal
	Seed uint64
}

// position grows with each page that is written.
func (p Program) position() uint64 { return p.Boot<<48 | (p.Pass*memoryPages + p.Next) }

// content is what a page of memory holds that a pass has written. Some are empty, some compress well.
func (p Program) content(pass, page uint64) []byte {
	b := make([]byte, block.PageSize)
	h := (pass*31+page+p.Seed)*0x9e3779b97f4a7c15 ^ p.Boot
	if pass == 0 || h>>61 == 0 {
		return b
	}
	binary.LittleEndian.PutUint64(b, pass)
	binary.LittleEndian.PutUint64(b[8:], page)
	n := len(b)
	if h>>61 == 1 {
		n = 200
	}
	for i := 16; i+8 <= n; i += 8 {
		h ^= h << 13
		h ^= h >> 7
		h ^= h << 17
		binary.LittleEndian.PutUint64(b[i:], h)
	}
	return b
}

// encode is the device state: the program, and enough to fill several frames.
func (p Program) encode() []byte {
	var b bytes.Buffer
	_ = binary.Write(&b, binary.LittleEndian, p)
	r := rand.New(rand.NewPCG(p.position(), p.Seed))
	for b.Len() < stateSize {
		_ = binary.Write(&b, binary.LittleEndian, r.Uint64())
	}
	return b.Bytes()
}

func decodeProgram(b []byte) (Program, error) {
	var p Program
	if err := binary.Read(bytes.NewReader(b), binary.LittleEndian, &p); err != nil {
		return p, fmt.Errorf("device state of %d bytes: %w", len(b), err)
	}
	if !bytes.Equal(p.encode(), b) {
		return p, errors.New("device state is damaged")
	}
	return p, nil
}

// VM is a machine with the one guest that there is. It outlives the process that drives it.
type VM struct {
	host *Host

	ask    atomic.Pointer[func(string, block.Range)] // where missing content of a device is asked for; nil: nowhere
	ready  atomic.Bool                               // it is not booting
	eager  atomic.Int32                              // steps to make before it slows down
	alive  atomic.Bool                               // running, for who cannot wait
	urgent atomic.Int32                              // somebody wants mu, and the guest shall not wait for content

	mu           sync.Mutex // guards what follows; held while the guest executes
	program      Program
	ram, store   block.Device // its memory and disk themselves
	kernel       block.Device // which it does not look at
	memory, disk block.Device // as the guest sees them, through whoever serves them
	served       bool         // somebody does
	running      bool
	dead         bool
	ended        chan struct{} // closed with dead

	lazyMu sync.Mutex // guards lazies
	lazies map[string]*block.Lazy
}

func newVM(h *Host, p Program, memory, disk block.Device) *VM {
	m := &VM{host: h, program: p, ram: memory, store: disk, memory: memory, disk: disk, ended: make(chan struct{}), lazies: map[string]*block.Lazy{}}
	m.ready.Store(true)
	h.world.wg.Go(func() {
		t := time.NewTimer(tick)
		defer t.Stop()
		for {
			select {
			case <-t.C:
				m.step()
				if m.eager.Add(-1) > 0 {
					t.Reset(tick)
				} else {
					t.Reset(idleTick)
				}
			case <-m.ended:
				return
			}
		}
	})
	return m
}

// run starts the guest or lets it go on.
func (m *VM) run() error {
	defer m.lock()()
	if m.dead {
		return errors.New("the machine is dead")
	}
	if !m.ready.Load() {
		return nil // it will run when it has booted
	}
	if !m.running {
		m.running = true
		m.alive.Store(true)
		m.eager.Store(eagerSteps)
		m.host.world.started(m.host.name, m.program)
	}
	return nil
}

// interrupt has a guest that waits for content stop waiting: it will come back to it.
func (m *VM) interrupt() {
	m.lazyMu.Lock()
	defer m.lazyMu.Unlock()
	for _, l := range m.lazies {
		l.Fail(errInterrupted)
	}
}

var errInterrupted = errors.New("the wait for content was interrupted")

// lock takes mu, also from a guest that waits for content. Nobody waits for mu in any other way, nor sleeps with another lock that
// somebody waits for: in the fake time of package synctest that would stop the clock.
func (m *VM) lock() (unlock func()) {
	m.urgent.Add(1)
	for !m.mu.TryLock() {
		m.interrupt()
		time.Sleep(tick / 10) // until what executes has ended
	}
	m.urgent.Add(-1)
	return m.mu.Unlock
}

// postpone makes a device one of which something is missing: what is listed, or what the file list says.
func (m *VM) postpone(name string, missing []block.Range, list string) error {
	defer m.lock()()
	base := map[string]*block.Device{"memory": &m.ram, "disk": &m.store, "kernel": &m.kernel}[name]
	l, err := block.NewLazy(*base, block.LazyOptions{Missing: missing, List: list, Fetch: func(_ context.Context, r block.Range) error {
		if ask := m.ask.Load(); ask != nil {
			(*ask)(name, r)
		}
		return nil
	}})
	if err == nil {
		err = l.Flush() // makes the list
	}
	if err != nil {
		return err
	}
	*base = l
	m.memory, m.disk = m.ram, m.store
	m.lazyMu.Lock()
	m.lazies[name] = l
	m.lazyMu.Unlock()
	m.host.world.atEnd(l)
	return nil
}

// late is the device of that name as one of which something arrives late; nil: it is complete.
func (m *VM) late(name string) migrate.Late {
	m.lazyMu.Lock()
	defer m.lazyMu.Unlock()
	if l := m.lazies[name]; l != nil {
		return late{l}
	}
	return nil
}

// late is a device of which something arrives late.
type late struct{ *block.Lazy }

func (l late) Wanted() []block.Range { return l.InFlight() }

// boot lets the guest begin anew with what is on its disk.
func (m *VM) boot() error {
	if m.ready.Load() {
		return nil
	}
	w := m.host.world
	w.mu.Lock()
	acked := w.acked
	w.mu.Unlock()
	last, err := journal.Verify(section{m.store, block.PageSize}, diskSlots)
	if errors.Is(err, errInterrupted) || m.isDead() {
		return err
	}
	if err == nil && last < acked {
		err = fmt.Errorf("newest record is %d, and %d was flushed", last, acked)
	}
	if err != nil {
		w.wrong("disk of %s after a power loss: %v", m.host.name, err)
	}
	w.flushed(last)
	unlock := m.lock()
	m.program = Program{Boot: w.boots(m.host.name), Pass: 1, Next: 1, Seq: last}
	m.ready.Store(true)
	unlock()
	return m.run()
}

// asks says where to ask for what is missing; devices are known there by their positions in a list of names.
func (m *VM) asks(names []string, ask func(int, block.Range)) {
	f := func(name string, r block.Range) { ask(slices.Index(names, name), r) }
	m.ask.Store(&f)
}

// lacks reports whether content is still to come.
func (m *VM) lacks() bool {
	m.lazyMu.Lock()
	defer m.lazyMu.Unlock()
	for _, l := range m.lazies {
		if l.Missing() > 0 {
			return true
		}
	}
	return false
}

// complete makes durable that nothing is missing any more.
func (m *VM) complete() error {
	m.lazyMu.Lock()
	defer m.lazyMu.Unlock()
	var err error
	for _, l := range m.lazies {
		err = errors.Join(err, l.Complete())
	}
	return err
}

// load gives the machine its state. Everything that is there must be right, and loading touches some of what is not.
func (m *VM) load(p Program) error {
	unlock := m.lock()
	m.program = p
	unlock()
	if m.lacks() {
		for _, off := range []int64{0, memorySize / 2} {
			if _, err := m.ram.ReadAt(make([]byte, 8), off); err != nil {
				return err
			}
		}
		return nil
	}
	if err := m.verify(); err != nil {
		m.host.world.wrong("when the state is loaded: %v", err)
	}
	return nil
}

func (m *VM) pause() error {
	defer m.lock()()
	if m.dead {
		return errors.New("the machine is dead")
	}
	m.halt()
	return nil
}

// halt is called with mu held.
func (m *VM) halt() {
	if m.running {
		m.running = false
		m.alive.Store(false)
		m.host.world.stopped(m.host.name)
	}
}

// kill is SIGKILL to the VMM.
func (m *VM) kill() {
	defer m.lock()()
	m.halt()
	if !m.dead {
		m.dead = true
		close(m.ended)
	}
}

func (m *VM) isRunning() bool { return m.alive.Load() }

func (m *VM) isDead() bool {
	select {
	case <-m.ended:
		return true
	default:
		return false
	}
}

// serve makes devices those of the guest.
func (m *VM) serve(memory, disk block.Device) {
	defer m.lock()()
	m.memory, m.disk, m.served = memory, disk, true
}

// abandon is what the guest sees of the death of whoever serves its devices: RAM stays, disks do not answer.
func (m *VM) abandon() {
	m.ask.Store(nil)
	defer m.lock()()
	m.memory, m.served = m.ram, false
}

// step executes a little, if the guest runs. It may wait for content.
func (m *VM) step() {
	if m.mu.TryLock() {
		defer m.mu.Unlock()
		m.execute()
	}
}

// tryStep is step for those who may not wait for content.
func (m *VM) tryStep() {
	if m.mu.TryLock() {
		defer m.mu.Unlock()
		if !m.lacks() {
			m.execute()
		}
	}
}

// execute is called with mu held.
func (m *VM) execute() {
	if !m.running {
		return
	}
	p := &m.program
	for range 3 {
		if m.urgent.Load() > 0 {
			return
		}
		if err := m.checkPage(p.Next, p.Pass-1); errors.Is(err, errInterrupted) {
			return
		} else if err != nil {
			m.host.world.wrong("%v", err)
		}
		if _, err := m.memory.WriteAt(p.content(p.Pass, p.Next), int64(p.Next)*block.PageSize); err != nil {
			m.host.world.wrong("guest on %s: write memory: %v", m.host.name, err)
		}
		if p.Next++; p.Next == memoryPages {
			p.Next, p.Pass = 1, p.Pass+1
		}
	}
	m.host.world.progress(m.host.name, *p)
	if !m.served || p.Next%4 != 0 || m.urgent.Load() > 0 {
		return
	}
	err := journal.Append(section{m.disk, block.PageSize}, diskSlots, p.Seq+1)
	if err == nil {
		err = m.disk.Flush()
	}
	if err != nil {
		m.host.world.wrong("guest on %s: append to the journal: %v", m.host.name, err)
		return
	}
	p.Seq++
	m.host.world.flushed(p.Seq)
}

func (m *VM) checkPage(page, pass uint64) error {
	got := make([]byte, block.PageSize)
	if _, err := m.memory.ReadAt(got, int64(page)*block.PageSize); err != nil {
		return fmt.Errorf("guest on %s: read memory page %d: %w", m.host.name, page, err)
	}
	if want := m.program.content(pass, page); !bytes.Equal(got, want) {
		return fmt.Errorf("guest on %s: memory page %d holds pass %d, page %d instead of pass %d (an empty page is pass 0)", m.host.name, page,
			binary.LittleEndian.Uint64(got), binary.LittleEndian.Uint64(got[8:]), pass)
	}
	return nil
}

// verify checks everything the guest has, running or not.
func (m *VM) verify() error {
	if m.lacks() {
		return fmt.Errorf("the guest on %s lacks content", m.host.name)
	}
	defer m.lock()()
	p := m.program
	for page := uint64(1); page < memoryPages; page++ {
		pass := p.Pass
		if page >= p.Next {
			pass--
		}
		if err := m.checkPage(page, pass); err != nil {
			return err
		}
	}
	last, err := journal.Verify(section{m.disk, block.PageSize}, diskSlots)
	if err == nil && last < p.Seq {
		err = fmt.Errorf("newest record is %d, and %d was flushed", last, p.Seq)
	}
	if err != nil {
		return fmt.Errorf("disk on %s: %w", m.host.name, err)
	}
	return nil
}

// register is one of the guest's two.
type register string

const (
	inMemory register = "memory" // lost by a boot
	onDisk   register = "disk"   // flushed before it is acknowledged
)

var errNotHere = errors.New("no guest runs here")

// access reads a register, or writes it first, as the guest's program does for a client. Without an answer nothing was done.
func (m *VM) access(r register, write bool, value uint64) (uint64, error) {
	if !m.mu.TryLock() { // it waits for content
		return 0, errNotHere
	}
	defer m.mu.Unlock()
	if !m.running || r == onDisk && !m.served {
		return 0, errNotHere
	}
	dev := m.memory
	if r == onDisk {
		dev = m.disk
	}
	var b [8]byte
	if write {
		binary.LittleEndian.PutUint64(b[:], value)
		if _, err := dev.WriteAt(b[:], 0); err != nil {
			return 0, err
		}
		if r == onDisk {
			if err := dev.Flush(); err != nil {
				return 0, err
			}
		}
	}
	_, err := dev.ReadAt(b[:], 0)
	return binary.LittleEndian.Uint64(b[:]), err
}
