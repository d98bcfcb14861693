package flow

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"sort"
	"sync"
	"time"

	"github.com/drafter-vm/drafter/pkg/nat"
)

// Config is a keeper of connections. The zero value of a field is its default, where one is given.
type Config struct {
	// Netns is the network namespace that the guest runs in, of package nat.
	Netns string
	// Interface, Guest and Guest6 are the tap in the namespace, and the guest's addresses. Default: what the namespace says of itself.
	Interface     string
	Guest, Guest6 netip.Addr

	// Listen accepts connections of other places, which reach it by Address. The keeper closes it. Nil: nobody can have the guest from here
	// with its connections, nor bring it.
	Listen  net.Listener
	Address string
	// Handshake is called for each connection that Listen accepts, before it is used; see transport.Handshake. Nil: none is needed.
	Handshake func(context.Context, net.Conn) error
	// Dial connects to another place, by the Address that it has told.
	Dial func(ctx context.Context, address string) (net.Conn, error)

	// VXLAN is an address of this host, in the network namespace of the goroutine that calls Open, and a UDP port, usually [VXLANPort], by
	// which the kernel carries packets to other places that have the like, once it has been shown to reach them: faster, and while no process
	// of ours is there, too, but neither authenticated nor encrypted. Zero value: all packets go by the connections of Dial and Listen.
	VXLAN netip.AddrPort

	// Limit ends the keeping of connections, alive or not, that long after the guest has left. 0: they are kept while they live.
	Limit time.Duration

	// Logger receives events; nil means slog.Default().
	Logger *slog.Logger
}

// State is where a keeper is: see the package's documentation.
type State string

// The states.
const (
	Vacant    State = "vacant"
	Home      State = "home"
	Leaving   State = "leaving"
	Diverted  State = "diverted"
	Away      State = "away"
	Expecting State = "expecting"
)

var (
	// ErrNotNAT is wrapped by the error of Open where the namespace is none of a NAT of package nat.
	ErrNotNAT = errors.New("it was not made by drafter nat: name one that was")
	// ErrOccupied is wrapped by errors which say that a namespace keeps connections of another VM.
	ErrOccupied = errors.New("the network namespace keeps connections of another VM")
	// ErrState is wrapped by errors of methods that are called in the wrong state.
	ErrState = errors.New("not in this state")
	// ErrClosed is returned by methods of a keeper that is closed.
	ErrClosed = errors.New("the keeper is closed")
)

// vm is what the places of a VM know of it.
type vm struct {
	ID   string `json:"vm"`
	Key  string `json:"key"`
	Next uint32 `json:"next"` // the number of the next place that it comes to
}

// where is how a place is reached.
type where struct {
	Place   uint32 `json:"place"`
	Address string `json:"address"`
}

// offer is what a source says to a destination; answer what that says.
type offer struct {
	vm
	From   where   `json:"from"`
	Owners []where `json:"owners,omitempty"` // other places that own connections
	MAC    string  `json:"mac,omitempty"`    // the guest's, if it is known
}

type answer struct {
	where
}

// maxPlaces is how many places of a VM own connections at a time.
const maxPlaces = 256

// Keeper keeps the connections of the guest of one namespace.
type Keeper struct {
	cfg    Config
	log    *slog.Logger
	kernel *kernel
	doors  doors
	lock   *os.File
	yield  net.Listener
	file   string    // of the state
	vxlan  *vxlanOwn // the interface that there is, since Open; nil: none
	prober *prober   // of vxlan

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	tasks  sync.WaitGroup

	step sync.Mutex // held by whatever changes the state

	mu      sync.Mutex // guards what follows
	saved   saved      // what outlives the process
	tunnels map[uint32]*tunnel
	dialing map[uint32]context.CancelFunc // of those that we dial
	done    chan struct{}                 // closed when there is nothing to keep
	taken   chan struct{}                 // closed, and replaced, when another process wants the namespace
	closed  bool
	moved   bool             // this place's address is not the one that others know
	mac     net.HardwareAddr // of a guest that is expected; nil: not known
}

// saved is what is written down.
type saved struct {
	State State `json:"state"`
	vm
	Self    uint32           `json:"self"`
	Guest   uint32           `json:"guest"`  // the place where the guest is, or goes to
	Source  uint32           `json:"source"` // of Expecting: the place that it comes from
	Places  map[uint32]known `json:"places"` // that there are tunnels to
	Since   time.Time        `json:"since"`  // of Away
	VXLAN   *vxlanOwn        `json:"vxlan,omitempty"`
	Address string           `json:"address,omitempty"` // that others were told last
	Was     *known           `json:"was,omitempty"`     // what was known of the place that the guest goes to, before that; nil: nothing
	Before  *saved           `json:"before,omitempty"`  // of a place that expects the guest back: what is again if it does not come
}

// known is what is known of another place.
type known struct {
	Address string    `json:"address"`
	Dial    bool      `json:"dial,omitempty"`    // we dial it
	Owner   bool      `json:"owner,omitempty"`   // it owns connections
	Coming  bool      `json:"coming,omitempty"`  // of an owner: the guest is about to go to it, it was told
	Relay   uint32    `json:"relay,omitempty"`   // reached through this place, while there is no tunnel to it
	VXLAN   *vxlanEnd `json:"vxlan,omitempty"`   // where it is reached by VXLAN
	Carried bool      `json:"carried,omitempty"` // packets go to it by VXLAN
}

// relays reports whether others need this place to reach the guest.
func (s saved) relays() bool {
	for _, p := range s.Places {
		if p.Owner {
			return true
		}
	}
	return false
}

func (s saved) clone() saved {
	places := make(map[uint32]known)
	for p, k := range s.Places {
		places[p] = k
	}
	s.Places = places
	return s
}

// Open takes a namespace. What it keeps already goes on, also when a living process has kept it till now.
func Open(ctx context.Context, cfg Config) (_ *Keeper, err error) {
	inside, ours, err := nat.Lookup(cfg.Netns)
	if err == nil && !ours {
		err = ErrNotNAT
	}
	if err != nil {
		return nil, fmt.Errorf("keep connections in network namespace %q: %w", cfg.Netns, err)
	}
	if cfg.Interface == "" {
		cfg.Interface = inside.Interface
	}
	if !cfg.Guest.IsValid() {
		cfg.Guest = inside.Guest
	}
	if !cfg.Guest6.IsValid() {
		cfg.Guest6 = inside.Guest6
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	k := &Keeper{cfg: cfg, log: cfg.Logger.With("netns", cfg.Netns), tunnels: make(map[uint32]*tunnel), dialing: make(map[uint32]context.CancelFunc), done: make(chan struct{}), taken: make(chan struct{})}
	k.ctx, k.cancel = context.WithCancel(context.WithoutCancel(ctx))
	defer func() {
		if err != nil {
			k.release()
			err = fmt.Errorf("keep connections in network namespace %q: %w", cfg.Netns, err)
		}
	}()
	if err := nat.CheckPrivileges(); err != nil {
		return nil, err
	}
	if k.kernel, err = openKernel(cfg); err != nil {
		return nil, err
	}
	if err := k.take(ctx); err != nil {
		return nil, err
	}
	if err := k.load(); err != nil {
		return nil, err
	}
	if k.prober != nil {
		k.tasks.Go(func() { k.prober.serve(k.ctx, k.self) })
		k.tasks.Go(k.carry)
	}
	if cfg.Listen != nil {
		k.tasks.Go(k.accept)
	}
	k.tasks.Go(k.watch)
	return k, nil
}

// load takes up what is written down.
func (k *Keeper) load() error {
	b, err := os.ReadFile(k.file)
	if errors.Is(err, os.ErrNotExist) {
		k.saved = saved{State: Vacant, Places: make(map[uint32]known)}
		close(k.done)
		return k.furnishVXLAN()
	} else if err != nil {
		return err
	}
	var s saved
	if err := json.Unmarshal(b, &s); err != nil {
		return fmt.Errorf("decode %q: %w", k.file, err)
	}
	k.step.Lock() // what is connected is at work before all is
	defer k.step.Unlock()
	k.mu.Lock()
	k.saved = s.clone()
	k.mu.Unlock()
	if err := k.furnishVXLAN(); err != nil {
		return err
	}
	if s.State == Expecting { // what was to come did not
		if err := k.discard(); err != nil || s.Before == nil {
			return err
		}
	}
	if err := k.resettle(); err != nil {
		return err
	}
	for _, p := range k.places() {
		if err := k.connect(p, false); err != nil {
			return err
		}
		if k.moved {
			k.dial(p)
		}
	}
	if err := k.redirected(); err != nil {
		return err
	}
	k.tasks.Go(k.tidy) // as the process may have died before it did
	k.log.Info("connections are kept on", "state", k.saved.State, "vm", k.saved.ID)
	return k.rules()
}

// redirected sees to it that what is for a guest that has left, or is about to, goes to where it is.
func (k *Keeper) redirected() error {
	if s, guest := k.State(), k.guestPlace(); (s == Away || s == Diverted) && k.tunnel(guest) != nil {
		return k.kernel.redirect(k.way(guest))
	}
	return nil
}

// resettle brings what is written down up to date with how things are now.
func (k *Keeper) resettle() error {
	return k.change(func(s *saved) {
		for p := range s.Places {
			if s.State == Away && !s.needs(p) { // it was to be left when the process ended
				delete(s.Places, p)
				_ = errors.Join(k.kernel.noBack(p), k.kernel.removeTun(p)) // as far as they are there
			}
		}
		if k.cfg.Listen == nil || s.Address == k.cfg.Address {
			return
		}
		// Others dial where they believe that this place is, if they do: so this one dials them, and tells them.
		k.moved, s.Address = true, k.cfg.Address
	})
}

// needs reports whether a place is needed by this one.
func (k *Keeper) needs(place uint32) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.saved.needs(place)
}

// needs reports whether a place has something to do with this one: it has the guest, or is about to, or owns connections, or is the way to one
// of these.
func (s saved) needs(place uint32) bool {
	if place == s.Guest || s.Places[place].Owner || s.Places[place].Coming {
		return true
	}
	for _, info := range s.Places {
		if info.Relay == place {
			return true
		}
	}
	return false
}

// save writes down what outlives the process. No sync: connections, too, are gone when the host is. It is called with mu held.
func (k *Keeper) save() error {
	if k.saved.State == Vacant {
		if err := os.Remove(k.file); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return nil
	}
	b, err := json.MarshalIndent(k.saved, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(k.file+".new", b, 0o600); err != nil {
		return err
	}
	return os.Rename(k.file+".new", k.file)
}

// change changes what outlives the process.
func (k *Keeper) change(f func(*saved)) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	f(&k.saved)
	k.noteGuest()
	return k.save()
}

// noteGuest tells the tunnels where the guest is. It is called with mu held.
func (k *Keeper) noteGuest() {
	for p, t := range k.tunnels {
		t.guestThere.Store(k.saved.State == Away && k.saved.Guest == p)
	}
}

// in checks that a keeper is in one of some states, and keeps others from changing it until end is called.
func (k *Keeper) in(what string, states ...State) (end func(), err error) {
	k.step.Lock()
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed {
		k.step.Unlock()
		return nil, ErrClosed
	}
	if !slices.Contains(states, k.saved.State) {
		k.step.Unlock()
		return nil, fmt.Errorf("%s: the guest's connections are %s: %w", what, k.saved.State, ErrState)
	}
	return k.step.Unlock, nil
}

// State is where the keeper is.
func (k *Keeper) State() State {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.saved.State
}

// Start notes that a guest begins to run here, without connections of other places: it was booted, or resumed from a package. In a namespace
// that keeps connections of another guest it fails with [ErrOccupied]; one that is here already, as after an adoption, goes on: with Undo,
// if it was on its way elsewhere and is not any more.
func (k *Keeper) Start() (fresh bool, err error) {
	end, err := k.in("start", Vacant, Home, Leaving, Diverted, Away)
	if err != nil {
		return false, err
	}
	defer end()
	switch k.State() {
	case Home, Leaving, Diverted:
		return false, nil
	case Away:
		return false, fmt.Errorf("start: %w (%s): wait until they have ended, give them up (drafter connections --netns %s --drop), or use another namespace", ErrOccupied, k.vmID(), k.cfg.Netns)
	}
	if err := k.change(func(s *saved) {
		*s = saved{State: Home, vm: vm{ID: rand.Text(), Key: rand.Text() + rand.Text(), Next: 2}, Self: 1, Guest: 1, Places: make(map[uint32]known), VXLAN: k.vxlan, Address: k.cfg.Address}
		k.done = make(chan struct{})
	}); err != nil {
		return false, err
	}
	if k.vxlan == nil {
		return true, nil
	}
	if err := errors.Join(k.kernel.nameVXLAN(1), k.rules()); err != nil {
		return false, errors.Join(fmt.Errorf("start: %w", err), k.vacate())
	}
	return true, nil
}

func (k *Keeper) vmID() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.saved.ID
}

// Offer is what a destination has to be given, of a guest that is here. Nil: connections cannot be kept, as nobody reaches this place.
func (k *Keeper) Offer() json.RawMessage {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.saved.State != Home || k.cfg.Dial == nil {
		return nil
	}
	o := offer{vm: k.saved.vm, From: where{k.saved.Self, k.cfg.Address}, MAC: k.kernel.guestMAC().String()}
	for p, known := range k.saved.Places {
		if known.Owner {
			o.Owners = append(o.Owners, where{p, known.Address})
		}
	}
	sort.Slice(o.Owners, func(i, j int) bool { return o.Owners[i].Place < o.Owners[j].Place })
	b, err := json.Marshal(o)
	if err != nil {
		return nil // numbers and strings only
	}
	return b
}

// Accept prepares for a guest that is to come, by what its source has offered, and returns the answer for that.
func (k *Keeper) Accept(offered json.RawMessage) (json.RawMessage, error) {
	var o offer
	if err := json.Unmarshal(offered, &o); err != nil {
		return nil, fmt.Errorf("accept connections: %w: %w", errMalformed, err)
	}
	if o.ID == "" || len(o.ID) > 64 || len(o.Key) < 26 || o.Next < 2 || o.Next > maxPlace || len(o.Owners) > maxPlaces || o.From.Place == 0 || o.From.Place >= o.Next {
		return nil, fmt.Errorf("accept connections: %w", errMalformed)
	}
	for _, w := range o.Owners {
		if w.Place == 0 || w.Place >= o.Next || w.Place == o.From.Place {
			return nil, fmt.Errorf("accept connections: %w: place %d", errMalformed, w.Place)
		}
	}
	if k.cfg.Listen == nil {
		return nil, errors.New("accept connections: nobody can connect to this place: give it an address to listen at")
	}
	end, err := k.in("accept connections", Vacant, Away, Diverted)
	if err != nil {
		return nil, err
	}
	defer end()
	k.mu.Lock()
	if k.saved.State == Diverted { // it went, and nobody was there to note that
		mine := k.saved.ID == o.ID && k.saved.Key == o.Key
		k.mu.Unlock()
		if !mine || k.kernel.used() {
			return nil, fmt.Errorf("accept connections: the guest's connections are %s: %w", Diverted, ErrState)
		}
		if err := k.left(); err != nil {
			return nil, err
		}
		k.mu.Lock()
	}
	back := k.saved.State == Away
	if back && (k.saved.ID != o.ID || k.saved.Key != o.Key) {
		id := k.saved.ID
		k.mu.Unlock()
		return nil, fmt.Errorf("accept connections: %w (%s)", ErrOccupied, id)
	}
	was := k.saved.clone()
	self := o.Next
	if back {
		self = k.saved.Self
	} else {
		o.Next++
	}
	k.mu.Unlock()

	if err := k.change(func(s *saved) {
		s.Before = nil
		if back {
			s.Before = &was
		} else {
			s.Places = make(map[uint32]known)
			s.VXLAN = k.vxlan
			k.done = make(chan struct{})
		}
		s.State, s.vm, s.Self, s.Guest, s.Source, s.Address = Expecting, o.vm, self, self, o.From.Place, k.cfg.Address
		for p, info := range s.Places { // what is not offered has ended, unheard by this place
			info.Owner = false
			s.Places[p] = info
		}
		for _, w := range append(o.Owners, o.From) {
			if w.Place != self { // how packets come meanwhile, of one that is known, stays
				s.Places[w.Place] = known{Address: w.Address, Owner: true, Dial: s.Places[w.Place].Dial, VXLAN: s.Places[w.Place].VXLAN, Relay: s.Places[w.Place].Relay}
			}
		}
	}); err != nil {
		return nil, err
	}
	err = nil
	if k.vxlan != nil {
		err = k.kernel.nameVXLAN(self)
	}
	if back && !was.relays() { // what is left of when the guest was here, and nobody needs
		err = errors.Join(err, k.kernel.unpinAll())
	}
	for _, p := range k.places() {
		err = errors.Join(err, k.connect(p, p == o.From.Place))
	}
	if mac, e := net.ParseMAC(o.MAC); e == nil && len(mac) == 6 {
		k.mu.Lock()
		k.mac = mac
		k.mu.Unlock()
	}
	if err != nil {
		return nil, errors.Join(err, k.discard())
	}
	if err := k.rules(); err != nil {
		return nil, errors.Join(err, k.discard())
	}
	return json.Marshal(answer{where{self, k.cfg.Address}})
}

// maxPlace is the highest number of a place. It is a part of an interface's name, and of the number of a routing table.
const maxPlace = 1 << 20

// places are those that there are tunnels to.
func (k *Keeper) places() []uint32 {
	k.mu.Lock()
	defer k.mu.Unlock()
	var all []uint32
	for p := range k.saved.Places {
		all = append(all, p)
	}
	slices.Sort(all)
	return all
}

// self is the number of this place; 0: it has none.
func (k *Keeper) self() uint32 {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.saved.Self
}

// way is how packets go to a place at the moment.
func (k *Keeper) way(place uint32) way {
	k.mu.Lock()
	defer k.mu.Unlock()
	return way{place, k.saved.Places[place].Carried}
}

// rules writes the rules for the tunnels that there are.
func (k *Keeper) rules() error {
	var places []way
	k.mu.Lock()
	vxlan, back := k.vxlan, k.saved.State == Expecting && k.saved.Before != nil
	if k.saved.State == Vacant {
		vxlan = nil
	}
	for p, info := range k.saved.Places {
		places = append(places, way{p, info.VXLAN != nil})
	}
	k.mu.Unlock()
	slices.SortFunc(places, func(a, b way) int { return cmp.Compare(a.place, b.place) })
	if len(places) == 0 && vxlan == nil {
		return k.kernel.noRules()
	}
	return k.kernel.rules(places, back, vxlan)
}

// connect makes the tunnel to a place, as far as it is not there, and the way back to it. What comes by it for the guest is kept, or not.
func (k *Keeper) connect(place uint32, hold bool) error {
	k.mu.Lock()
	t, info := k.tunnels[place], k.saved.Places[place]
	k.mu.Unlock()
	if t == nil {
		file, err := k.kernel.tun(place)
		if err != nil {
			return err
		}
		t = newTunnel(place, file, k.kernel.guests, k.log, k.hear, func() { k.tasks.Go(k.parted) })
		k.mu.Lock()
		k.tunnels[place] = t
		k.noteGuest()
		k.mu.Unlock()
	}
	if hold {
		t.hold()
	}
	if err := k.backTo(place); err != nil {
		return err
	}
	if info.Dial {
		k.dial(place)
	}
	return nil
}

// leave removes the tunnel to a place, and its connections.
func (k *Keeper) leave(place uint32) error {
	k.hangUp(place)
	k.mu.Lock()
	t, end := k.tunnels[place], k.saved.Places[place].VXLAN
	delete(k.tunnels, place)
	delete(k.saved.Places, place)
	k.mu.Unlock()
	var errs []error
	if end != nil {
		errs = append(errs, k.kernel.partByVXLAN(place, *end))
	}
	if t != nil {
		t.close()
		k.tasks.Go(t.wait)
	}
	errs = append(errs, k.kernel.noBack(place), k.kernel.removeTun(place), k.kernel.unpin(place), k.rules())
	// At last: while it is written down, the next process knows what may be left.
	return errors.Join(append(errs, k.change(func(*saved) {}))...)
}

// tunnel is that to a place, nil if there is none.
func (k *Keeper) tunnel(place uint32) *tunnel {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.tunnels[place]
}

// owners are the tunnels to the places that own connections, but for one place. It is called with mu held.
func (k *Keeper) owners(except uint32) (all []*tunnel) {
	for p, info := range k.saved.Places {
		if t := k.tunnels[p]; info.Owner && p != except && t != nil {
			all = append(all, t)
		}
	}
	return all
}

// Connect makes the tunnels to the destination, by what it has answered: ours, and those of the other places that own connections. The
// guest runs meanwhile. The others may come to the destination later, or never: this place relays for those that have not.
func (k *Keeper) Connect(ctx context.Context, answered json.RawMessage) error {
	var a answer
	if err := json.Unmarshal(answered, &a); err != nil || a.Place == 0 || a.Place > maxPlace {
		return fmt.Errorf("connect with the destination: %w", errMalformed)
	}
	end, err := k.in("connect with the destination", Home)
	if err != nil {
		return err
	}
	defer end()
	k.mu.Lock()
	self, owners := k.saved.Self, k.owners(a.Place)
	via := make(map[uint32]uint32)
	for _, o := range owners {
		if via[o.place] = k.hop(o.place); via[o.place] == o.place {
			via[o.place] = self
		}
	}
	k.mu.Unlock()
	if a.Place == self {
		return fmt.Errorf("connect with the destination: %w: it calls itself place %d, which is this one", errMalformed, a.Place)
	}
	if err := k.change(func(s *saved) {
		info, was := s.Places[a.Place]
		if s.Was = nil; was {
			before := info
			s.Was = &before
		}
		info.Address, info.Dial = a.Address, true
		s.State, s.Guest, s.Places[a.Place] = Leaving, a.Place, info
		s.Next = max(s.Next, a.Place+1)
	}); err != nil {
		return err
	}
	fail := func(err error) error {
		return errors.Join(fmt.Errorf("connect with the destination: %w", err), k.undo())
	}
	if err := k.connect(a.Place, false); err != nil {
		return fail(err)
	}
	if err := k.rules(); err != nil {
		return fail(err)
	}
	t := k.tunnel(a.Place)
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	if err := t.await(ctx); err != nil {
		return fail(err)
	}
	// The destination has a way to all owners from now on, and a straight one to those that come to it, which nobody waits for.
	var all sync.WaitGroup
	for _, o := range owners {
		k.pointTo(o, a.Place)
		if via[o.place] == a.Place { // it relays for that one itself
			continue
		}
		all.Go(func() {
			if _, err := t.ask(ctx, message{Say: sayRelay, Place: o.place, Via: via[o.place]}); err != nil {
				k.log.Error("the destination was not told how another place is reached", "place", o.place, "error", err)
			}
		})
	}
	all.Wait()
	return nil
}

// Divert sends what comes for the guest to the destination from now on, where it waits. It is called just before the guest is paused, and
// takes less than a millisecond.
func (k *Keeper) Divert() error {
	end, err := k.in("divert", Leaving)
	if err != nil {
		return err
	}
	defer end()
	// Not by VXLAN: packets wait for the guest at the other end of the tunnel.
	if err := k.kernel.redirect(way{place: k.guestPlace()}); err != nil {
		return err
	}
	return k.change(func(s *saved) { s.State = Diverted })
}

func (k *Keeper) guestPlace() uint32 {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.saved.Guest
}

// Hand tells the destination of all connections of the guest, which is paused. They are known there when it returns.
func (k *Keeper) Hand(ctx context.Context) (n int, err error) {
	end, err := k.in("hand over connections", Diverted)
	if err != nil {
		return 0, err
	}
	defer end()
	all, err := k.kernel.flows()
	if err != nil {
		return 0, err
	}
	k.mu.Lock()
	self, target := k.saved.Self, k.saved.Guest
	t := k.tunnels[target]
	k.mu.Unlock()
	var theirs []flow
	for _, f := range all {
		if f.Owner == 0 {
			f.Owner = self
		}
		if f.Owner != target && !f.over() {
			theirs = append(theirs, f)
		}
	}
	for part := range slices.Chunk(theirs, maxPerFrame) {
		if _, err := t.ask(ctx, message{Say: sayFlows, Flows: part}); err != nil {
			return n, fmt.Errorf("hand over connections: %w", err)
		}
		n += len(part)
	}
	return n, nil
}

// Undo has the guest's connections stay here: it goes on here after all.
func (k *Keeper) Undo() error {
	end, err := k.in("undo", Home, Leaving, Diverted)
	if err != nil {
		return err
	}
	defer end()
	return k.undo()
}

func (k *Keeper) undo() error {
	err := k.kernel.restore()
	k.mu.Lock()
	target, was, others := k.saved.Guest, k.saved.Was, k.owners(k.saved.Guest)
	self := k.saved.Self
	k.mu.Unlock()
	err = errors.Join(err, k.change(func(s *saved) {
		s.State, s.Guest, s.Was = Home, s.Self, nil
		if was != nil && target != self {
			s.Places[target] = *was
		}
	}))
	if target == self {
		return err
	}
	for _, t := range others {
		k.after(t, func() { _, _ = t.ask(k.ctx, message{Say: sayForget, Place: target}) })
	}
	if was == nil {
		return errors.Join(err, k.leave(target))
	}
	if !was.Dial { // one that owns connections is needed as before
		k.hangUp(target)
	}
	return errors.Join(err, k.backTo(target))
}

// Left notes that the guest runs at the destination. The connections that began here are kept until they end: see [Keeper.Done].
func (k *Keeper) Left() error {
	end, err := k.in("leave", Diverted)
	if err != nil {
		return err
	}
	defer end()
	return k.left()
}

func (k *Keeper) left() error {
	k.mu.Lock()
	target := k.saved.Guest
	others := k.owners(target)
	k.mu.Unlock()
	if err := k.change(func(s *saved) {
		s.State, s.Since, s.Was = Away, time.Now(), nil
		info := s.Places[target]
		info.Owner, info.Carried = false, false
		s.Places[target] = info
	}); err != nil {
		return err
	}
	for _, t := range others {
		k.followTo(t, target) // those that reach the guest without us need us no more; the others do until they have ended
	}
	// What belongs to the place where the guest is is translated there.
	return k.kernel.unpin(target)
}

// leaveIf leaves a place that is not needed any more, if the guest is still where it was when that was found out.
func (k *Keeper) leaveIf(place, guest uint32) {
	k.step.Lock()
	defer k.step.Unlock()
	k.mu.Lock()
	left := k.saved.State == Away && k.saved.Guest == guest && !k.saved.Places[place].Coming
	for _, info := range k.saved.Places {
		left = left && info.Relay != place // or another is reached through it
	}
	k.mu.Unlock()
	if !left {
		return
	}
	if err := k.leave(place); err != nil {
		k.log.Warn("something of a tunnel is left", "place", place, "error", err)
	}
}

// Arrive notes that the guest is about to run here: what waits for it is delivered.
func (k *Keeper) Arrive() error {
	end, err := k.in("arrive", Expecting)
	if err != nil {
		return err
	}
	defer end()
	k.mu.Lock()
	mac := k.mac
	k.mu.Unlock()
	if mac != nil {
		err = k.kernel.neighbours(mac)
	}
	err = errors.Join(err, k.kernel.restore(), k.change(func(s *saved) { s.State, s.Before = Home, nil }))
	k.mu.Lock()
	all := slices.Collect(maps.Values(k.tunnels))
	k.mu.Unlock()
	for _, t := range all {
		if lost := t.release(true); lost > 0 {
			k.log.Warn("packets were lost while the guest was on its way: more came than could wait", "packets", lost, "place", t.place)
		}
	}
	k.tasks.Go(k.tidy) // which nobody waits for
	return err
}

// tidy leaves the places that have nothing to do with a guest that is here.
func (k *Keeper) tidy() {
	select {
	case <-time.After(time.Second): // rules that are written anew have forgotten what may still be on its way back to here
	case <-k.ctx.Done():
		return
	}
	end, err := k.in("tidy", Home)
	if err != nil {
		return
	}
	defer end()
	err = k.onlyComing(k.self()) // what was to come to another place has come here
	for _, p := range k.places() {
		if !k.needs(p) {
			err = errors.Join(err, k.leave(p))
		}
	}
	if err != nil {
		k.log.Warn("something of a tunnel is left", "error", err)
	}
}

// Discard notes that the guest does not come.
func (k *Keeper) Discard() error {
	end, err := k.in("discard", Expecting)
	if err != nil {
		return err
	}
	defer end()
	return k.discard()
}

func (k *Keeper) discard() error {
	k.mu.Lock()
	before, all := k.saved.Before, slices.Collect(maps.Values(k.tunnels))
	k.mu.Unlock()
	if before == nil {
		return k.vacate() // and nothing waits any more
	}
	var errs []error
	for _, p := range k.places() {
		if _, had := before.Places[p]; !had {
			errs = append(errs, k.leave(p))
		}
	}
	errs = append(errs, k.change(func(s *saved) { *s = *before }))
	for _, t := range all { // not before: what still comes for the guest would go back
		t.release(false)
	}
	return errors.Join(append(errs, k.rules(), k.redirected())...)
}

// vacate removes all that is kept.
func (k *Keeper) vacate() error {
	errs := []error{k.kernel.restore()}
	for _, p := range k.places() {
		errs = append(errs, k.leave(p))
	}
	errs = append(errs, k.kernel.noRules(), k.change(func(s *saved) { *s = saved{State: Vacant, Places: make(map[uint32]known)} }))
	k.mu.Lock()
	defer k.mu.Unlock()
	select {
	case <-k.done:
	default:
		close(k.done)
	}
	return errors.Join(errs...)
}

// Taken is closed when another process wants, after the call, to keep what is kept here: Close, or it fails. It never is while the guest is
// here.
func (k *Keeper) Taken() <-chan struct{} {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.taken
}

// Done is closed when there is nothing to keep, or to expect.
func (k *Keeper) Done() <-chan struct{} {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.done
}
