package migrate

import (
	"fmt"
	"sync"
	"time"
)

// SourceState is where the side that has the guest stands. One goroutine, the caller of [Send], changes it.
//
//	Connecting ─► Offering ─► Copying ─► Suspending ─► Pausing ─► Switching ─► Confirming ─► Committing ─► Committed
//	    │             │           │           │            │         │ │           │             │           │ │ │
//	    └─────────────┴───────────┴───────────┴────────────┴─────────┼─┴───────────┴─────┬───────┘           │ │ │
//	                                                                 │                   ▼                   │ │ │
//	             Copied ◄─ Checking ◄─ Resuming ◄──── for a copy ────┘              RollingBack ◄────────────┼─┘ │
//	                           │          │                                          │   ▲   │ never ran    │   │
//	                           └──────────┴──────────────────────────────────────────┼───┘   │              │   │
//	                                                                            Kept ◄       ► Stuck        │   │
//	                                                                                                        ▼   ▼
//	       Unsettled ◄─ Rejoining ◄──── the link dies, and they meet again ────► Serving ─────────────────► Moved
//	       InDoubt ◄─ Seeking ◄──────── the link dies, and they meet again ────► Committed
//
// "The link dies now" and "someone cancels now" have an answer in each state: [SourceState.LinkLost],
// [SourceState.Reunited] and [SourceState.Canceled]. The turning point is the commit frame: until it is handed to the stream
// the guest belongs to the source, which resumes it without asking anybody.
type SourceState uint8

const (
	SourceConnecting  SourceState = iota // prefaces are exchanged; the guest knows nothing
	SourceOffering                       // the destination looks at the manifest and starts its VMM
	SourceCopying                        // rounds; the guest runs and its writes are tracked
	SourceSuspending                     // the guest's agent prepares for the pause; the guest runs
	SourcePausing                        // the guest is being paused: downtime begins
	SourceSwitching                      // paused: last round or lists of what will be missing, device state
	SourceResuming                       // for a copy: the guest is being resumed here; what was put aside for that is sent
	SourceChecking                       // for a copy: the guest runs here, the destination checks and keeps the copy
	SourceConfirming                     // paused: all is sent, the destination checks and loads it
	SourceCommitting                     // paused: the decision is being made durable; canceling is too late
	SourceCommitted                      // paused: the commit frame is out, only the destination may run the guest
	SourceServing                        // paused: the guest runs at the destination, which gets what it lacks
	SourceSeeking                        // Committed, and the link is gone: the destination is looked for
	SourceRejoining                      // Serving, and the link is gone: the destination is looked for
	SourceRollingBack                    // the migration failed; the guest is being resumed here
	SourceMoved                          // end: the guest runs at the destination and lacks nothing
	SourceCopied                         // end: the guest runs here, the destination has a copy
	SourceKept                           // end: the guest runs here
	SourceInDoubt                        // end: paused here, may run there; see ErrInDoubt
	SourceUnsettled                      // end: the guest runs there, content of it is only here; see ErrUnsettled
	SourceStuck                          // end: it belongs here, but could not be resumed
	numSourceStates
)

// transition is one line of a state machine's table.
type transition[S ~uint8] struct {
	name     string
	next     []S
	linkLost S // where the side ends when the link dies in this state, and none follows
	canceled S // where it ends when its context is canceled in this state, with a peer in good health
}

var sourceStates = [numSourceStates]transition[SourceState]{
	SourceConnecting: {"connecting", []SourceState{SourceOffering, SourceRollingBack}, SourceKept, SourceKept},
	SourceOffering:   {"offering", []SourceState{SourceCopying, SourceRollingBack}, SourceKept, SourceKept},
	SourceCopying:    {"copying", []SourceState{SourceSuspending, SourceRollingBack}, SourceKept, SourceKept},
	SourceSuspending: {"suspending", []SourceState{SourcePausing, SourceRollingBack}, SourceKept, SourceKept},
	SourcePausing:    {"pausing", []SourceState{SourceSwitching, SourceRollingBack}, SourceKept, SourceKept},
	SourceSwitching:  {"switching", []SourceState{SourceConfirming, SourceResuming, SourceRollingBack}, SourceKept, SourceKept},
	SourceResuming:   {"resuming", []SourceState{SourceChecking, SourceRollingBack}, SourceKept, SourceKept},
	SourceChecking:   {"checking", []SourceState{SourceCopied, SourceRollingBack}, SourceKept, SourceKept},
	SourceConfirming: {"confirming", []SourceState{SourceCommitting, SourceRollingBack}, SourceKept, SourceKept},
	SourceCommitting: {"committing", []SourceState{SourceCommitted, SourceRollingBack}, SourceKept, SourceMoved},
	SourceCommitted: {"committed", []SourceState{SourceMoved, SourceServing, SourceSeeking, SourceInDoubt, SourceRollingBack},
		SourceInDoubt, SourceMoved},
	SourceServing: {"serving", []SourceState{SourceMoved, SourceRejoining, SourceUnsettled}, SourceUnsettled, SourceMoved},
	SourceSeeking: {"seeking", []SourceState{SourceCommitted, SourceServing, SourceMoved, SourceInDoubt, SourceRollingBack},
		SourceInDoubt, SourceInDoubt},
	SourceRejoining:   {"rejoining", []SourceState{SourceServing, SourceMoved, SourceUnsettled}, SourceUnsettled, SourceUnsettled},
	SourceRollingBack: {"rolling-back", []SourceState{SourceKept, SourceStuck}, SourceKept, SourceKept},
	SourceMoved:       {"moved", nil, SourceMoved, SourceMoved},
	SourceCopied:      {"copied", nil, SourceCopied, SourceCopied},
	SourceKept:        {"kept", nil, SourceKept, SourceKept},
	SourceInDoubt:     {"in-doubt", nil, SourceInDoubt, SourceInDoubt},
	SourceUnsettled:   {"unsettled", nil, SourceUnsettled, SourceUnsettled},
	SourceStuck:       {"stuck", nil, SourceStuck, SourceStuck},
}

// sourceReunited is where meeting the destination again makes a difference.
var sourceReunited = map[SourceState]SourceState{
	SourceCommitted: SourceMoved, SourceServing: SourceMoved, SourceSeeking: SourceMoved, SourceRejoining: SourceMoved,
}

func (s SourceState) String() string { return stateName(sourceStates[:], s) }

// Next returns the states that may follow s; none for an end.
func (s SourceState) Next() []SourceState { return sourceStates[s].next }

// LinkLost returns how a migration ends for the source whose link dies in state s, and which does not meet the
// destination again.
func (s SourceState) LinkLost() SourceState { return sourceStates[s].linkLost }

// Reunited returns how a migration ends for the source whose link dies in state s, and which meets the destination again, where
// the guest runs.
func (s SourceState) Reunited() SourceState {
	if end, ok := sourceReunited[s]; ok {
		return end
	}
	return s.LinkLost()
}

// Canceled returns how a migration ends for the source whose context is canceled in state s.
func (s SourceState) Canceled() SourceState { return sourceStates[s].canceled }

// DestinationState is where the side that will have the guest stands. One goroutine, the caller of [Receive], changes
// it.
//
//	Connecting ─► Waiting ─► Preparing ─► Receiving ─► Loading ─► Prepared ─► Committing ─► Starting ─► Running
//	    │            │           │            │           │         │  │         │ │          │ │ │       ▲
//	    │            │           │            │           │         │  │         │ └─► Failed ◄─┘ │ │       │
//	    └────────────┴───────────┴────────────┴───────────┴────┬────┘  │         │              │ │       │
//	                                                           ▼       │         │              │ ▼       │
//	                                  Discarded ◄─ Discarding ◄─┼──────┼─────────┴──────────────┘ Filling ┤
//	                                                            │      ▼       durable promise       ▲    │
//	                                                            └─── Keeping ─► Copied               ▼    │
//	                                                                            Incomplete ◄──── Rejoining┘
//
// The turning point is the destination's own record of the commit: before it, everything that was received is worthless
// and is discarded; after it, the guest belongs here whatever becomes of the link.
type DestinationState uint8

const (
	DestinationConnecting DestinationState = iota // prefaces are exchanged
	DestinationWaiting                            // for the manifest
	DestinationPreparing                          // devices are made and a VMM is started, waiting for its state
	DestinationReceiving                          // content arrives
	DestinationLoading                            // all of it did, or is listed: digests are compared, the VMM loads the device state
	DestinationPrepared                           // the guest could run; whether it may is up to the source
	DestinationCommitting                         // commit arrived and is being made durable; canceling is too late
	DestinationStarting                           // the guest belongs here and is being started
	DestinationFilling                            // the guest runs here, and what it lacks arrives
	DestinationRejoining                          // the guest runs here and lacks content, and the link is gone: the source is looked for
	DestinationKeeping                            // a copy is being made durable
	DestinationDiscarding                         // what was received is thrown away
	DestinationRunning                            // end: the guest runs here and lacks nothing; the source may still have to be told
	DestinationCopied                             // end: the copy is here
	DestinationDiscarded                          // end: nothing is left here; the source may still have to be told
	DestinationIncomplete                         // end: the guest runs here, or may, and lacks content; see ErrUnsettled
	DestinationFailed                             // end: the guest belongs here, or may, and does not run
	numDestinationStates
)

var destinationStates = [numDestinationStates]transition[DestinationState]{
	DestinationConnecting: {"connecting", []DestinationState{DestinationWaiting, DestinationDiscarding}, DestinationDiscarded, DestinationDiscarded},
	DestinationWaiting:    {"waiting", []DestinationState{DestinationPreparing, DestinationDiscarding}, DestinationDiscarded, DestinationDiscarded},
	DestinationPreparing:  {"preparing", []DestinationState{DestinationReceiving, DestinationDiscarding}, DestinationDiscarded, DestinationDiscarded},
	DestinationReceiving:  {"receiving", []DestinationState{DestinationLoading, DestinationDiscarding}, DestinationDiscarded, DestinationDiscarded},
	DestinationLoading:    {"loading", []DestinationState{DestinationPrepared, DestinationDiscarding}, DestinationDiscarded, DestinationDiscarded},
	DestinationPrepared: {"prepared", []DestinationState{DestinationCommitting, DestinationKeeping, DestinationDiscarding},
		DestinationDiscarded, DestinationDiscarded},
	DestinationCommitting: {"committing", []DestinationState{DestinationStarting, DestinationDiscarding, DestinationFailed}, DestinationRunning, DestinationRunning},
	DestinationStarting: {"starting", []DestinationState{DestinationRunning, DestinationFilling, DestinationDiscarding, DestinationIncomplete, DestinationFailed},
		DestinationRunning, DestinationRunning},
	DestinationFilling:    {"filling", []DestinationState{DestinationRunning, DestinationRejoining, DestinationIncomplete}, DestinationIncomplete, DestinationRunning},
	DestinationRejoining:  {"rejoining", []DestinationState{DestinationFilling, DestinationRunning, DestinationIncomplete}, DestinationIncomplete, DestinationIncomplete},
	DestinationKeeping:    {"keeping", []DestinationState{DestinationCopied, DestinationDiscarding}, DestinationCopied, DestinationCopied},
	DestinationDiscarding: {"discarding", []DestinationState{DestinationDiscarded}, DestinationDiscarded, DestinationDiscarded},
	DestinationRunning:    {"running", nil, DestinationRunning, DestinationRunning},
	DestinationCopied:     {"copied", nil, DestinationCopied, DestinationCopied},
	DestinationDiscarded:  {"discarded", nil, DestinationDiscarded, DestinationDiscarded},
	DestinationIncomplete: {"incomplete", nil, DestinationIncomplete, DestinationIncomplete},
	DestinationFailed:     {"failed", nil, DestinationFailed, DestinationFailed},
}

// destinationStranded is where content that is missing makes a difference, destinationReunited where meeting the source
// again does.
var (
	destinationStranded = map[DestinationState]DestinationState{
		DestinationCommitting: DestinationIncomplete, DestinationStarting: DestinationIncomplete,
	}
	destinationReunited = map[DestinationState]DestinationState{
		DestinationFilling: DestinationRunning, DestinationRejoining: DestinationRunning,
	}
)

func (s DestinationState) String() string { return stateName(destinationStates[:], s) }

// Next returns the states that may follow s; none for an end.
func (s DestinationState) Next() []DestinationState { return destinationStates[s].next }

// LinkLost returns how a migration ends for the destination whose link dies in state s, and which does not meet the source
// again. Up to Starting it supposes that nothing is missing; see Stranded.
func (s DestinationState) LinkLost() DestinationState { return destinationStates[s].linkLost }

// Stranded is LinkLost where content is missing.
func (s DestinationState) Stranded() DestinationState {
	if end, ok := destinationStranded[s]; ok {
		return end
	}
	return s.LinkLost()
}

// Reunited returns how a migration ends for the destination whose link dies in state s, and which meets the source again.
func (s DestinationState) Reunited() DestinationState {
	if end, ok := destinationReunited[s]; ok {
		return end
	}
	return s.LinkLost()
}

// Canceled returns how a migration ends for the destination whose context is canceled in state s.
func (s DestinationState) Canceled() DestinationState { return destinationStates[s].canceled }

func stateName[S ~uint8](table []transition[S], s S) string {
	if int(s) < len(table) {
		return table[s].name
	}
	return fmt.Sprintf("state %d", uint8(s))
}

// machine holds the state of one side and the time spent in each. Its set method is called by one goroutine only, the
// caller of Send or Receive; get by anybody.
type machine[S interface {
	~uint8
	String() string
}] struct {
	notify func(S) // may be nil; called on the goroutine of set

	mu      sync.Mutex // guards what follows
	state   S
	since   time.Time
	history []Phase
	spent   map[S]time.Duration
}

func newMachine[S interface {
	~uint8
	String() string
}](first S, notify func(S)) *machine[S] {
	return &machine[S]{notify: notify, state: first, since: time.Now(), spent: make(map[S]time.Duration)}
}

// begin announces the first state.
func (m *machine[S]) begin() {
	if m.notify != nil {
		m.notify(m.get())
	}
}

func (m *machine[S]) get() S {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.state
}

func (m *machine[S]) set(s S) {
	m.mu.Lock()
	now := time.Now()
	d := now.Sub(m.since)
	m.history = append(m.history, Phase{Name: m.state.String(), Duration: Millis(d)})
	m.spent[m.state] += d
	m.state, m.since = s, now
	m.mu.Unlock()
	if m.notify != nil {
		m.notify(s)
	}
}
