package migrate

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"time"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/wire"
)

// Guest is the running VM at the source. Its methods are called one at a time, by the goroutine that called Send, except
// that State runs beside the last round.
type Guest interface {
	// BeforeSuspend tells the guest that it will be paused, and returns when it is ready for that. It runs on meanwhile.
	BeforeSuspend(ctx context.Context) error

	// Pause stops the guest. When it returns nil, the devices no longer change.
	Pause(ctx context.Context) error

	// State writes the device state of the paused VMM to w.
	State(ctx context.Context, w io.Writer) error

	// Resume undoes whatever BeforeSuspend, Pause and State have done, also if they failed: the guest runs again when it
	// returns nil. It is called at most once, only after a failed migration or when a copy was made, only if BeforeSuspend
	// was called, and with a context that the failure did not cancel.
	Resume(ctx context.Context) error
}

// Journal keeps, in a place that survives a crash of this process or host, who owns the guest. A record about a
// migration replaces the one before it. With no record, the guest belongs to the source.
//
// A nil Journal keeps nothing: then a crash of either side during the commit can lose track of the owner.
type Journal interface {
	// Commit records that the guest was given to the destination. At the source it is called before the commit frame
	// leaves; at the destination after it came and before the guest runs. It returns nil only if the record is durable.
	// When it fails, Abort follows.
	Commit(ctx context.Context, id string) error

	// Abort records that this migration will never be completed: at the source, that the guest belongs to it; at the
	// destination, that it will never run this guest from this migration. It returns nil only if the record is durable.
	Abort(ctx context.Context, id string) error

	// Done records that the migration is over and the guest runs at the destination: nothing is in doubt any more. It
	// need not be durable; an error is logged and changes nothing.
	Done(ctx context.Context, id string) error
}

// Confirmer is implemented by a source's Journal that can record what it hears before all is over.
type Confirmer interface {
	// Confirm records that the destination has said that it runs the guest, though it still needs content from the source. It is
	// not called where Done follows at once. An error is logged and changes nothing.
	Confirm(ctx context.Context, id string) error
}

// SourceDevice is a device to be sent.
type SourceDevice struct {
	Name   string       // unique in a migration: see wire.CheckName
	Device block.Device // only read; [block.Extents] is used if it has it
	// Tracker reports writes to Device during the migration. Nil declares that nobody writes to it: it is sent once.
	Tracker block.Tracker
	Policy  Policy

	// Base, if set, is the index of what Device was made from; it must be of Device's size. Where the destination's device
	// starts as the same, only what differs is sent.
	Base *BaseIndex
	// RequireBase has a destination that does not start as Base be refused, before anything is sent, unless it is one that writes a VM down
	// and has no bases. Needs Base.
	RequireBase bool
	// Changed, if set, returns the first range at or after off in which Device may differ from Base, and io.EOF when there
	// is none, as [block.Overlay.NextChange] does. What lies between is not even read.
	Changed func(off int64) (block.Range, error)

	// Stored, if set, is what a destination can fetch from a store. Only what was written since, and what the destination does not get
	// there, comes from here.
	Stored *Stored

	// Handle, if set, is by which a destination on this host can have the device itself, with all that is written to it until the guest
	// is paused: see [SharedTarget]. At most wire.MaxHandle bytes.
	Handle string

	// Lost, if set, is why Device does not hold what it held at the commit. A destination that misses some of that is refused
	// with these words, so they name no paths. Only for [RejoinSource].
	Lost error
}

// SourceConfig configures [Send]. Devices and Guest are required.
type SourceConfig struct {
	// ID names the migration in both journals, and in logs by its public part ([wire.PublicID]): what follows a dot is a secret by which
	// the two sides know each other again when the link was cut, and what precedes it has at most 31 bytes then. Empty: a random one.
	ID string

	// Devices are sent in one migration, under one authority. The destination must have each name.
	Devices []SourceDevice

	// Spec describes the machine to the destination, which may refuse it. It is JSON and opaque here; it must fit in one
	// frame with the names of the devices (64 KiB). Paths and secrets have no business in it.
	Spec json.RawMessage

	// Network is what the destination is told to keep the guest's connections, at most [wire.MaxNetwork] bytes of JSON, opaque here. Empty:
	// they are not kept. With it, the Guest is to be a [Networker].
	Network json.RawMessage

	Guest   Guest   // required
	Journal Journal // nil: nothing is put on record

	// Goal is what the migration is to achieve, for devices whose Policy leaves it to that.
	Goal Goal

	// Concurrency is how many goroutines read, hash and pack content. 0 means 4; more than 64 counts as 64.
	Concurrency int

	// OwnThreads is for a process whose purpose is the migration: while content is streamed that a running guest may wait
	// for, what streams it has threads of its own, with a nice value raised by 3, and GOMAXPROCS is raised for the whole
	// process where it is less than the goroutines that may be busy. Without it, what is demanded waits for milliseconds
	// behind the stream on hosts with few processors.
	OwnThreads bool

	// Window bounds the bytes of content on their way, not yet acknowledged: the product of bandwidth and round trip
	// time should fit. 0 means 16 MiB; the least is 128 KiB and some.
	Window int64

	// NoCompression sends content as it is. Otherwise it is compressed where that is measured to be faster.
	NoCompression bool

	// HandshakeTimeout is how long the peer may take to say that it is a Drafter. 0 means 10 s.
	HandshakeTimeout time.Duration
	// PrepareTimeout is how long the destination may take to look at the manifest and start a VMM. 0 means 1 min.
	PrepareTimeout time.Duration
	// HeartbeatTimeout is how long the peer may be silent before it counts as dead. 0 means 3 s; at least 1 s.
	HeartbeatTimeout time.Duration
	// SwitchTimeout bounds the time from Guest.Pause until the destination is prepared. When it ends, the guest is
	// resumed here. 0 means 30 s.
	SwitchTimeout time.Duration
	// CommitTimeout is how long the destination may take to say that the guest runs before the source gives up and is
	// in doubt. 0 means 30 s.
	CommitTimeout time.Duration
	// ResumeTimeout bounds the rollback after a failure. 0 means 1 min.
	ResumeTimeout time.Duration

	// Reconnect brings new streams to the same destination when the link died after the commit: it dials, or waits for the
	// destination to do so. It is called again and again until RescueTimeout is over since the link was lost, and should
	// return when its ctx ends. Nil: a link that dies then leaves the guest in doubt, or its content unsettled.
	//
	// If the first stream has a method Visits() bool that says true, somebody has come without having been asked, who may be anybody:
	// Reconnect is called again at once, and of all visitors the one counts that proves to be the destination. Streams with a method
	// ChannelBinding() []byte (RFC 5056) prove also that nobody is between the two sides. Those of a peer.Lobby visit; those of pkg/transport over
	// TLS, QUIC and psk have a binding.
	Reconnect func(ctx context.Context) ([]io.ReadWriter, error)
	// Admit, if set, is asked about streams of Reconnect before anything is said there; an error refuses them. It is called concurrently.
	Admit func(ctx context.Context, streams []io.ReadWriter) error
	// RescueTimeout is how long the destination is looked for. 0 means 5 min.
	RescueTimeout time.Duration
	// Interruptible has the end of ctx end a session of [RejoinSource], too, and not only the search for the destination: for a source that is
	// no more than files, and can be started again.
	Interruptible bool

	// Progress, if set, is called at each change of state and about five times a second, never twice at the same time.
	// It must return quickly.
	Progress func(Progress)
	// OnState, if set, is called at each change of state, before anything is done in it.
	OnState func(SourceState)

	// Logger receives events; nil means slog.Default().
	Logger *slog.Logger

	newest uint16 // version of the protocol; 0 means wire.Version
}

// DestinationConfig configures [Receive]. Target is required.
type DestinationConfig struct {
	Target  Target  // required
	Journal Journal // nil: nothing is put on record

	// Concurrency is how many goroutines write content to the devices. 0 means 4; more than 64 counts as 64.
	Concurrency int

	// OwnThreads is SourceConfig.OwnThreads, for what is stored.
	OwnThreads bool

	// MaxState is how many bytes of device state are accepted; they are held in memory. 0 means 64 MiB.
	MaxState int64

	// HandshakeTimeout is how long the peer may take to say that it is a Drafter, and then to send its manifest. 0 means
	// 10 s.
	HandshakeTimeout time.Duration
	// HeartbeatTimeout is how long the peer may be silent before it counts as dead. 0 means 3 s; at least 1 s.
	HeartbeatTimeout time.Duration
	// CommitTimeout is how long the source may take to commit once the guest is prepared here, before it is discarded.
	// 0 means 1 min.
	CommitTimeout time.Duration
	// CompleteTimeout is how long Postponer.Complete may take. When it ends, the guest runs here with all its content, but
	// the migration ends with [ErrUnsettled]: the source keeps its copy. 0 means 5 min.
	CompleteTimeout time.Duration

	// Copy asks the source for a copy instead of the guest: Target, which must be a [Keeper], gets all of a guest that was
	// paused for a moment and runs on at the source. Journal is not used.
	Copy bool

	// DisablePostCopy has everything arrive before the guest runs, also if Target is a [Postponer].
	DisablePostCopy bool

	// Reconnect brings new streams to the same source when the link died after the commit, or may have: it dials, or waits
	// for the source to do so. It is called again and again until RescueTimeout is over since the link was lost, and should
	// return when its ctx ends. Nil: a link that dies then leaves the source in doubt, or the guest without content. Of streams that have
	// methods, SourceConfig.Reconnect says more.
	Reconnect func(ctx context.Context) ([]io.ReadWriter, error)
	// Admit is that of SourceConfig.
	Admit func(ctx context.Context, streams []io.ReadWriter) error
	// RescueTimeout is how long the source is looked for. 0 means 5 min.
	RescueTimeout time.Duration

	// Progress, if set, is called at each change of state and about five times a second, never twice at the same time.
	// It must return quickly.
	Progress func(Progress)
	// OnState, if set, is called at each change of state, before anything is done in it.
	OnState func(DestinationState)

	// Logger receives events; nil means slog.Default().
	Logger *slog.Logger

	newest uint16 // version of the protocol; 0 means wire.Version
}

// Target is where a guest is received. Its methods are called one at a time, by the goroutine that called Receive.
type Target interface {
	// Prepare looks at what will come, matches every device by its name against what is configured here, checks sizes,
	// makes the devices, and starts a VMM that waits for its state. It returns the devices in the order of the manifest.
	// They stay the Target's: it closes them in its own time, after Discard or when the guest ends. An error made with
	// [Refuse] is told to the source. When Prepare fails it leaves nothing behind; Discard is not called.
	Prepare(ctx context.Context, m *wire.Manifest) ([]block.Device, error)

	// Load gives the VMM its device state. The devices hold what the source's held when it was paused.
	Load(ctx context.Context, state io.Reader) error

	// Run starts the guest. From its call on the guest belongs here. It is called after the commit is in the Journal,
	// with a context that is not canceled; but for a guest that lacks content, when that will not come any more. See
	// [ErrNeverRan] for the way back.
	Run(ctx context.Context) error

	// Discard ends the VMM and drops what was received, but for what Journal.Abort has put on record, if it was called: see
	// [Forgetter]. It is called once, unless the guest was started or may have been.
	Discard(ctx context.Context) error
}

// Forgetter is implemented by targets which keep, through Discard, the record that a guest never ran here and never will. While
// the source may be in doubt, it is all that can end the doubt: by [Disclaim], in a process that was started again too.
type Forgetter interface {
	// Forget drops the record. It is called after Discard, once the source has been told.
	Forget(ctx context.Context) error
}

// Lender is a [Guest] that wants to know whether the destination has devices of it itself: see SourceDevice.Handle.
type Lender interface {
	// Lend is called when the destination has said so, before the guest is paused, with the names of those devices.
	Lend(devices []string)
}

// Runner is a [Guest] that knows when its vCPUs ran again, where Resume goes on to tell an agent of it.
type Runner interface {
	// RunsSince is called after Resume.
	RunsSince() time.Time
}

// Postponer is a [Target] that can run its guest before all content is there.
type Postponer interface {
	Target

	// CanPostpone says, after Prepare, for each device of the manifest, whether it may be incomplete when the guest runs.
	CanPostpone() []bool

	// Postpone declares what has not arrived, per device in the manifest's order, as whole pages; nil: the device is complete.
	// It is called at most once, when everything else of the devices has arrived and is flushed, and before Load, which may
	// touch what is missing. From its return on the late content of a device comes through what it returns, nil for complete
	// devices, and no longer through the device.
	//
	// ask is to be called, by any goroutine, when somebody waits for content; it does not block, and asking twice is harmless.
	Postpone(ctx context.Context, missing [][]block.Range, ask func(device int, r block.Range)) ([]Late, error)

	// Complete is called when everything has arrived, after Run has returned: it makes that durable. The source drops its
	// copy after it. When ctx ends it has taken too long and is no longer waited for; what it does then has no effect on the
	// migration.
	Complete(ctx context.Context) error
}

// Late is a device whose rest arrives while it is in use. All methods may be called concurrently.
type Late interface {
	// Fill delivers whole pages at off. What is present already, or was overwritten since, is kept.
	Fill(off int64, data []byte) error
	// FillZero delivers n zeros at off, whole pages.
	FillZero(off, n int64) error
	// Wanted is what somebody waits for and has not arrived: it is asked for again after meeting the source again.
	Wanted() []block.Range
	// NextMissing returns the first range of missing pages at or after off, and io.EOF when there is none.
	NextMissing(off int64) (block.Range, error)
}

// Keeper is a [Target] that can keep a copy of a guest that runs on at the source; see DestinationConfig.Copy.
type Keeper interface {
	Target

	// Keep makes what was received and loaded durable. It is called instead of Run.
	Keep(ctx context.Context) error
}

// Networker is a Guest whose connections the destination may keep.
type Networker interface {
	Guest

	// Network is called once, when the guest still runs, with what the destination has answered to SourceConfig.Network: nil, if
	// it does not keep connections. It holds the migration up.
	Network(ctx context.Context, answer json.RawMessage)
}

// NetworkTarget is a Target that keeps the connections of its guest. It is not asked about copies.
type NetworkTarget interface {
	Target

	// Network is called once, after Prepare, with the source's SourceConfig.Network, or nil. What it answers is for the source. An error
	// refuses the guest.
	Network(ctx context.Context, offer json.RawMessage) (answer json.RawMessage, err error)
}

// ArrivalTarget is a Target that wants to know when the guest is paused at the source, while its device state and the rest
// of its memory are still to come. It is the time to have the network send the guest's packets here, where they can wait
// for it, rather than to where they are lost.
type ArrivalTarget interface {
	Target

	// Arriving is called once, between Prepare and Load, unless the migration fails before. It holds the migration up. The
	// guest may yet go on at the source.
	Arriving()
}

// SharedTarget is a Target that can have a device of the source's itself, as the memory of a guest on the same host.
type SharedTarget interface {
	Target

	// Shared says, after Prepare, for each device of the manifest, whether the target has what its handle names. Nothing of it comes, and
	// what Prepare returned for it is not used. What the guest writes until it is paused is in it; so nobody may write to it before
	// [Target.Run], and it must be the source's as it was until then. A copy has none.
	Shared() []bool
}

// BaseTarget is a Target whose devices may hold, when Prepare returns them, the contents of a base that the source's were
// made from.
type BaseTarget interface {
	Target

	// Bases is called after Prepare if the manifest names a base. It returns, in the order of the manifest, the index of
	// what each device holds, and nil where that is not known. If a device holds the base that the manifest names, only what
	// differs comes. Otherwise all comes, and what the device holds does not matter.
	Bases(ctx context.Context, m *wire.Manifest) ([]*BaseIndex, error)
}

func orDefault(d *time.Duration, v time.Duration) {
	if *d == 0 {
		*d = v
	}
}

func concurrency(n int) int {
	if n <= 0 {
		n = 4
	}
	return min(n, 64)
}

const rescueTimeout = 5 * time.Minute

const minHeartbeatTimeout = 4 * wire.HeartbeatInterval

func checkHeartbeat(d time.Duration) error {
	if d < minHeartbeatTimeout {
		return fmt.Errorf("heartbeat timeout %v: use at least %v, the peer may be silent for %v", d, minHeartbeatTimeout, wire.HeartbeatInterval)
	}
	return nil
}

// check fills in defaults and finds mistakes.
func (c *SourceConfig) check() error {
	if c.ID == "" {
		c.ID = wire.NewID()
	}
	if err := wire.CheckID(c.ID); err != nil {
		return fmt.Errorf("SourceConfig.ID: %w", err)
	}
	if c.Guest == nil {
		return fmt.Errorf("no guest: set SourceConfig.Guest")
	}
	if err := c.Goal.Check(); err != nil {
		return err
	}
	c.Devices = append([]SourceDevice(nil), c.Devices...)
	for i := range c.Devices {
		d := &c.Devices[i]
		if d.Device == nil {
			return fmt.Errorf("device %q: no block.Device", d.Name)
		}
		var err error
		if d.Base != nil && d.Base.Size() != d.Device.Size() {
			return fmt.Errorf("device %q has %d bytes and its base %d: it was not made from that", d.Name, d.Device.Size(), d.Base.Size())
		}
		if d.Stored != nil {
			if err := d.Stored.check(d.Device.Size()); err != nil {
				return fmt.Errorf("device %q: %w", d.Name, err)
			}
		}
		if d.RequireBase && d.Base == nil {
			return fmt.Errorf("device %q: its base is required, and not known: set SourceDevice.Base", d.Name)
		}
		if d.Policy, err = d.Policy.check(); err != nil {
			return fmt.Errorf("device %q: %w", d.Name, err)
		}
	}
	c.Concurrency = concurrency(c.Concurrency)
	if c.Window == 0 {
		c.Window = 16 << 20
	}
	orDefault(&c.HandshakeTimeout, 10*time.Second)
	orDefault(&c.PrepareTimeout, time.Minute)
	orDefault(&c.HeartbeatTimeout, 3*time.Second)
	orDefault(&c.SwitchTimeout, 30*time.Second)
	orDefault(&c.CommitTimeout, 30*time.Second)
	orDefault(&c.ResumeTimeout, time.Minute)
	orDefault(&c.RescueTimeout, rescueTimeout)
	if c.newest == 0 {
		c.newest = wire.Version
	}
	if c.Journal == nil {
		c.Journal = noJournal{}
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	return checkHeartbeat(c.HeartbeatTimeout)
}

func (c *DestinationConfig) check() error {
	if c.Target == nil {
		return fmt.Errorf("no target: set DestinationConfig.Target")
	}
	c.Concurrency = concurrency(c.Concurrency)
	if c.MaxState == 0 {
		c.MaxState = 64 << 20
	}
	orDefault(&c.HandshakeTimeout, 10*time.Second)
	orDefault(&c.HeartbeatTimeout, 3*time.Second)
	orDefault(&c.CommitTimeout, time.Minute)
	orDefault(&c.CompleteTimeout, 5*time.Minute)
	orDefault(&c.RescueTimeout, rescueTimeout)
	if c.newest == 0 {
		c.newest = wire.Version
	}
	if _, ok := c.Target.(Keeper); c.Copy && !ok {
		return fmt.Errorf("target cannot keep a copy: it has no Keep")
	}
	if c.Journal == nil {
		c.Journal = noJournal{}
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	return checkHeartbeat(c.HeartbeatTimeout)
}

// checkStreams refuses what cannot carry a migration.
func checkStreams(streams []io.ReadWriter) error {
	if n := len(streams); n < 1 || n > wire.MaxStreams {
		return fmt.Errorf("%d streams: use 1 to %d", n, wire.MaxStreams)
	}
	for i, s := range streams {
		conn, ok := s.(interface{ LocalAddr() net.Addr })
		if !ok || conn.LocalAddr() == nil {
			continue
		}
		switch network := conn.LocalAddr().Network(); network {
		case "udp", "udp4", "udp6", "ip", "ip4", "ip6", "unixgram", "unixpacket":
			return fmt.Errorf("stream %d carries %s datagrams, which can be lost and are cut to size: use a stream of bytes, as of QUIC (quic:// of package transport) where it is to be UDP", i, network)
		}
	}
	return nil
}

// noJournal stands in for a nil Journal.
type noJournal struct{}

func (noJournal) Commit(context.Context, string) error { return nil }
func (noJournal) Abort(context.Context, string) error  { return nil }
func (noJournal) Done(context.Context, string) error   { return nil }
