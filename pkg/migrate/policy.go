package migrate

import (
	"fmt"
	"time"

	"github.com/drafter-vm/drafter/pkg/block"
)

// Policy says when one device has been copied often enough while the guest runs: by the migration's [Goal], or by fixed
// numbers, which override it for this device. The zero value disables pre-copy: with [Goal].PostCopy nothing of the
// device is sent before the switch, without it the device is copied once, and what the guest wrote meanwhile is sent
// while it is paused.
//
// A cycle is a round of copying after the first: collect what was written since the last, send it. The switch happens
// when every device asks for it; until then, those that do not cycle together. [Decide] asks them all.
type Policy struct {
	// ByGoal leaves it to the migration's Goal how often the device is copied. MinCycles and MaxCycles then count all
	// cycles, MaxDirtyBlocks means nothing, and CycleThrottle holds.
	ByGoal bool

	// BlockSize is the unit MaxDirtyBlocks counts in, in bytes: a power of two, at least 4096. 0 means 4096. It is a
	// unit of counting only; what is sent is what was written, whatever its size.
	BlockSize int64

	// MaxDirtyBlocks is how many dirty blocks are few enough to be sent while the guest is paused.
	MaxDirtyBlocks int64

	// MinCycles is how many cycles in a row must have had at most MaxDirtyBlocks before the switch; one with more
	// starts the count again. A device that nobody wrote to since its last cycle does not wait for it.
	MinCycles int

	// MaxCycles is how many cycles there are at most. It must not be below MinCycles. 0 means none, or 30 when
	// MinCycles is set; with ByGoal, as many as the goal needs.
	MaxCycles int

	// CycleThrottle is the pause before a cycle, during which the guest may write the same blocks again without costing
	// a transfer each. It is not kept when nothing is dirty. When devices differ, the longest counts.
	CycleThrottle time.Duration

	// Expiry is how long a block that was written counts as hot. Within a cycle, hot blocks are sent after cold ones, as
	// they are likely to be written again. 0 sends in order of offset.
	Expiry time.Duration
}

const defaultMaxCycles = 30 // with a MinCycles

// Check reports why the policy could not be used.
func (p Policy) Check() error {
	_, err := p.check()
	return err
}

// check is Check, and fills in defaults.
func (p Policy) check() (Policy, error) {
	switch {
	case p.BlockSize == 0:
		p.BlockSize = block.PageSize
	case p.BlockSize < block.PageSize || p.BlockSize&(p.BlockSize-1) != 0:
		return p, fmt.Errorf("block size %d: use a power of two, at least %d", p.BlockSize, block.PageSize)
	}
	if p.MaxCycles == 0 && p.MinCycles > 0 && !p.ByGoal {
		p.MaxCycles = max(defaultMaxCycles, p.MinCycles)
	}
	switch {
	case p.MaxDirtyBlocks < 0 || p.MinCycles < 0 || p.MaxCycles < 0 || p.CycleThrottle < 0 || p.Expiry < 0:
		return p, fmt.Errorf("policy %+v: no value may be negative", p)
	case p.MaxCycles < p.MinCycles && !(p.ByGoal && p.MaxCycles == 0):
		return p, fmt.Errorf("maximum of %d cycles is below the minimum of %d: raise it", p.MaxCycles, p.MinCycles)
	}
	return p, nil
}

// precopies reports whether the policy wants the device sent while the guest runs.
func (p Policy) precopies() bool {
	return p.ByGoal || p.MaxDirtyBlocks != 0 || p.MinCycles != 0 || p.MaxCycles != 0 || p.CycleThrottle != 0
}

// Round is one round of one device that was sent.
type Round struct {
	Device   string `json:"device"`   // name
	Index    int    `json:"round"`    // 0: the first, of everything
	Start    Millis `json:"start_ms"` // since the start of the migration; the same for all devices that cycle together
	Blocks   int64  `json:"blocks"`   // of Policy.BlockSize that were dirty
	Bytes    int64  `json:"bytes"`    // that were dirty; for round 0, that might have been other than zero
	Duration Millis `json:"ms"`       // until the destination had acknowledged the last byte

	Same int64   `json:"same,omitempty"` // bytes of these that were not sent, as the destination held them
	link float64 // the share of the time that writing to the streams took, 0 to 1

	Throttle float64 `json:"throttle,omitempty"` // the share of its time that the guest was held back, 0 to 1
}

// Dirty measures what was written to a device and not sent since.
type Dirty struct {
	Blocks int64 // of Policy.BlockSize
	Bytes  int64 // at that time
}

// Verdict is what a policy with fixed numbers says after a look at its device.
type Verdict struct {
	Switch bool   // false: do another cycle
	Reason string // for the log and the report
}

// Decide looks at the rounds a device has had, the first included, and at what is dirty now. It is a pure function. What
// a policy with ByGoal wants depends on the other devices too: see the function [Decide].
func (p Policy) Decide(sent []Round, dirty Dirty) Verdict {
	cycles := max(0, len(sent)-1)
	if dirty.Blocks == 0 {
		return Verdict{true, "nothing is dirty"}
	}
	if cycles >= p.MaxCycles {
		return Verdict{true, fmt.Sprintf("%d cycles are the maximum", p.MaxCycles)}
	}
	if dirty.Blocks > p.MaxDirtyBlocks {
		return Verdict{false, fmt.Sprintf("%d dirty blocks are more than %d", dirty.Blocks, p.MaxDirtyBlocks)}
	}
	quiet := 0
	for i := len(sent) - 1; i >= 1 && sent[i].Blocks <= p.MaxDirtyBlocks; i-- {
		quiet++
	}
	if quiet < p.MinCycles {
		return Verdict{false, fmt.Sprintf("%d of %d quiet cycles done", quiet, p.MinCycles)}
	}
	return Verdict{true, fmt.Sprintf("%d dirty blocks are at most %d", dirty.Blocks, p.MaxDirtyBlocks)}
}
