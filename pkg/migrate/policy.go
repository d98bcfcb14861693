package migrate

import (
	"fmt"
	"time"

	"github.com/drafter-vm/drafter/pkg/block"
)

// Policy says when a device has been copied often enough while the guest runs. The zero value copies once and switches:
// what the guest wrote during that one pass is sent while it is paused.
//
// A cycle is a round of copying after the first: collect what was written since the last, send it. All devices cycle
// together, and the switch happens when every device's policy asks for it.
type Policy struct {
	// BlockSize is the unit MaxDirtyBlocks counts in, in bytes: a power of two, at least 4096. 0 means 4096. It is a
	// unit of counting only; what is sent is what was written, whatever its size.
	BlockSize int64

	// MaxDirtyBlocks is how many dirty blocks are few enough to be sent while the guest is paused.
	MaxDirtyBlocks int64

	// MinCycles is how many cycles in a row must have had at most MaxDirtyBlocks before the switch; one with more
	// starts the count again. A device that nobody wrote to since its last cycle does not wait for it.
	MinCycles int

	// MaxCycles is how many cycles there are at most. It must not be below MinCycles. 0 means none, or 30 when
	// MaxDowntime or MinCycles is set.
	MaxCycles int

	// CycleThrottle is the pause before a cycle, during which the guest may write the same blocks again without costing
	// a transfer each. It is not kept when nothing is dirty. When devices differ, the longest counts.
	CycleThrottle time.Duration

	// Expiry is how long a block that was written counts as hot. Within a cycle, hot blocks are sent after cold ones, as
	// they are likely to be written again. 0 sends in order of offset.
	Expiry time.Duration

	// MaxDowntime, when set, is a goal that replaces MaxDirtyBlocks: switch when what is dirty can be sent in this time
	// at the measured speed of the rounds so far, or when cycles no longer make it less.
	MaxDowntime time.Duration
}

const defaultMaxCycles = 30 // with a MaxDowntime or MinCycles

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
	if p.MaxCycles == 0 && (p.MaxDowntime > 0 || p.MinCycles > 0) {
		p.MaxCycles = max(defaultMaxCycles, p.MinCycles)
	}
	switch {
	case p.MaxDirtyBlocks < 0 || p.MinCycles < 0 || p.MaxCycles < 0 || p.CycleThrottle < 0 || p.Expiry < 0 || p.MaxDowntime < 0:
		return p, fmt.Errorf("policy %+v: no value may be negative", p)
	case p.MaxCycles < p.MinCycles:
		return p, fmt.Errorf("maximum of %d cycles is below the minimum of %d: raise it", p.MaxCycles, p.MinCycles)
	}
	return p, nil
}

// Round is one round of one device that was sent.
type Round struct {
	Device   string `json:"device"`
	Index    int    `json:"round"`  // 0: the first, of everything
	Blocks   int64  `json:"blocks"` // of Policy.BlockSize that were dirty
	Bytes    int64  `json:"bytes"`  // that were dirty; for round 0, that might have been other than zero
	Duration Millis `json:"ms"`     // until the destination had acknowledged the last byte
}

// Dirty measures what was written to a device and not sent since.
type Dirty struct {
	Blocks int64 // of Policy.BlockSize
	Bytes  int64
}

// Decision is what a policy says after a look at a device.
type Decision struct {
	Switch bool   // false: do another cycle
	Reason string // for the log and the report
}

// Decide looks at the rounds a device has had, the first included, and at what is dirty now. It is a pure function.
func (p Policy) Decide(sent []Round, dirty Dirty) Decision {
	cycles := max(0, len(sent)-1)
	if dirty.Blocks == 0 {
		return Decision{true, "nothing is dirty"}
	}
	if cycles >= p.MaxCycles {
		return Decision{true, fmt.Sprintf("%d cycles are the maximum", p.MaxCycles)}
	}
	if p.MaxDowntime > 0 {
		return p.decideByGoal(sent, cycles, dirty)
	}
	if dirty.Blocks > p.MaxDirtyBlocks {
		return Decision{false, fmt.Sprintf("%d dirty blocks are more than %d", dirty.Blocks, p.MaxDirtyBlocks)}
	}
	quiet := 0
	for i := len(sent) - 1; i >= 1 && sent[i].Blocks <= p.MaxDirtyBlocks; i-- {
		quiet++
	}
	if quiet < p.MinCycles {
		return Decision{false, fmt.Sprintf("%d of %d quiet cycles done", quiet, p.MinCycles)}
	}
	return Decision{true, fmt.Sprintf("%d dirty blocks are at most %d", dirty.Blocks, p.MaxDirtyBlocks)}
}

// decideByGoal is Decide for a MaxDowntime.
func (p Policy) decideByGoal(sent []Round, cycles int, dirty Dirty) Decision {
	if cycles < p.MinCycles {
		return Decision{false, fmt.Sprintf("%d of %d cycles done", cycles, p.MinCycles)}
	}
	var bytes int64
	var spent time.Duration
	for _, r := range sent {
		bytes += r.Bytes
		spent += time.Duration(r.Duration)
	}
	// With nothing measured yet the speed is unknown: one cycle will tell.
	if bytes > 0 && spent > 0 {
		need := time.Duration(float64(dirty.Bytes) / float64(bytes) * float64(spent))
		if need <= p.MaxDowntime {
			return Decision{true, fmt.Sprintf("the rest needs %v of %v", need.Round(time.Microsecond), p.MaxDowntime)}
		}
	}
	// Two cycles in a row that did not shrink the rest by a tenth have reached what pre-copy can do.
	if cycles >= 2 && stuck(sent[cycles-1].Bytes, sent[cycles].Bytes) && stuck(sent[cycles].Bytes, dirty.Bytes) {
		return Decision{true, "cycles no longer make it less"}
	}
	return Decision{false, fmt.Sprintf("the rest does not fit in %v", p.MaxDowntime)}
}

func stuck(before, after int64) bool { return float64(after) > 0.9*float64(before) }
