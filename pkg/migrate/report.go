package migrate

import (
	"encoding/hex"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/drafter-vm/drafter/pkg/wire"
)

// Millis is a duration that JSON shows as a number of milliseconds.
type Millis time.Duration

// MarshalJSON implements json.Marshaler: milliseconds, with microseconds as decimals.
func (m Millis) MarshalJSON() ([]byte, error) {
	return strconv.AppendFloat(nil, float64(time.Duration(m).Microseconds())/1000, 'f', -1, 64), nil
}

// UnmarshalJSON implements json.Unmarshaler.
func (m *Millis) UnmarshalJSON(b []byte) error {
	f, err := strconv.ParseFloat(string(b), 64)
	*m = Millis(f * float64(time.Millisecond))
	return err
}

func (m Millis) String() string { return time.Duration(m).Round(10 * time.Microsecond).String() }

// Phase is the time spent in one state, in the order the states were passed.
type Phase struct {
	Name     string `json:"name"` // of the state
	Duration Millis `json:"ms"`   // in milliseconds in JSON
}

// Report tells how a migration went, as one side saw it. Send and Receive return one whether they fail or not.
type Report struct {
	ID      string `json:"id"`              // public part of the migration's id
	Role    string `json:"role"`            // "source" or "destination"
	Outcome string `json:"outcome"`         // the last state
	Error   string `json:"error,omitempty"` // why, when it failed
	Streams int    `json:"streams"`         // how many the first session had

	Total  Millis  `json:"total_ms"` // from the call to its end
	Phases []Phase `json:"phases"`   // in the order in which they were passed

	// Downtime is how long the guest did not run. At the source: from the call of Guest.Pause until the destination
	// said that it runs (or until it was resumed here), which is at most one network trip more than the truth. At the
	// destination: from the first device state, which is sent as soon as the guest is paused, until it ran.
	Downtime Millis `json:"downtime_ms"`
	// Parts are what the downtime was spent on: PartPause and so on. They add up to it.
	Parts []Part `json:"parts,omitempty"`

	// How long the guest's agent took to hear of the pause before it, at the source, and of the resume after it, at the
	// destination. The guest runs meanwhile, but its hooks may have stopped what it serves.
	AgentBefore Millis `json:"agent_before_ms,omitempty"`
	AgentAfter  Millis `json:"agent_after_ms,omitempty"`

	Rounds  []Round           `json:"rounds,omitempty"`  // at the source; the last of each device is the one while paused
	Reasons map[string]string `json:"reasons,omitempty"` // at the source: per device, why it was ready for the switch

	Decisions []Decision `json:"decisions,omitempty"` // at the source: all of them, the last is the one for the switch

	Digests map[string]string `json:"digests,omitempty"` // per device, in hexadecimal, once compared

	Shared []string `json:"shared,omitempty"` // devices that the destination, on the same host, has taken as they are

	LateBytes  int64 `json:"late_bytes,omitempty"` // missing at the destination when the guest was given to it
	Demands    int64 `json:"demands,omitempty"`    // how often the destination asked for content that somebody waited for
	Reconnects int   `json:"reconnects,omitempty"` // how often the two sides met again after the link had died

	// Untold is why the source could not be told how the migration ended, at a destination that has everything: it may be in doubt.
	Untold error `json:"-"`

	DataBytes  int64 `json:"data_bytes"`  // content that was sent or received as such
	ZeroBytes  int64 `json:"zero_bytes"`  // content that was sent or received as runs of zeros
	StateBytes int64 `json:"state_bytes"` // device state

	SameBytes int64 `json:"same_bytes,omitempty"` // at the source: content that was not sent, as the destination held it
	// StoredBytes is, at the destination, content that came from a store; AbsentBytes, at the source, what could have and did not.
	StoredBytes int64 `json:"stored_bytes,omitempty"`
	AbsentBytes int64 `json:"absent_bytes,omitempty"`

	SavedBytes int64 `json:"saved_bytes,omitempty"` // at the source: of the data, what compression saved

	WireBytes  int64   `json:"wire_bytes"` // everything this side wrote to (source) or read from (destination) the streams
	Throughput float64 `json:"throughput"` // data bytes per second while the guest was running, at the source
}

// String is the report in one line.
func (r *Report) String() string {
	s := fmt.Sprintf("migration %s (%s): %s in %v", r.ID, r.Role, r.Outcome, r.Total)
	if r.Role == wire.RoleSource.String() {
		cycles := 0
		for _, x := range r.Rounds {
			cycles = max(cycles, x.Index)
		}
		s += fmt.Sprintf(", downtime %v, %d rounds", r.Downtime, cycles+1)
	}
	s += fmt.Sprintf(", %s data, %s zeros, %s state, %s on %d streams", size(r.DataBytes), size(r.ZeroBytes), size(r.StateBytes), size(r.WireBytes), r.Streams)
	if r.Throughput > 0 {
		s += fmt.Sprintf(", %s/s", size(int64(r.Throughput)))
	}
	for i, p := range r.Phases {
		sep := ", "
		if i == 0 {
			sep = " ("
		}
		s += sep + p.Name + " " + p.Duration.String()
	}
	if len(r.Phases) > 0 {
		s += ")"
	}
	if r.Error != "" {
		s += ": " + r.Error
	}
	return s
}

func size(n int64) string {
	switch {
	case n >= 1<<30:
		return fmt.Sprintf("%.2f GiB", float64(n)/(1<<30))
	case n >= 1<<20:
		return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
	case n >= 1<<10:
		return fmt.Sprintf("%.1f KiB", float64(n)/(1<<10))
	}
	return fmt.Sprintf("%d B", n)
}

// digestsOf are the digests of all devices but those that were shared, of which nothing was sent.
func digestsOf(devices []wire.Device, s *wire.Summary, shared []string) map[string]string {
	out := make(map[string]string, len(devices))
	for i, d := range devices {
		if slices.Contains(shared, d.Name) {
			continue
		}
		out[d.Name] = hex.EncodeToString(s.Devices[i].Digest[:])
	}
	return out
}
