package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/drafter-vm/drafter/pkg/migrate"
)

// reports is the file of --report. The zero value writes nothing.
type reports struct {
	file *os.File
	made bool                  // by us, and nothing was written to it
	tell func(*migrate.Report) // called for each; may be nil
}

func openReports(path string) (*reports, error) {
	if path == "" {
		return &reports{}, nil
	}
	_, err := os.Lstat(path)
	made := errors.Is(err, os.ErrNotExist)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, err
	}
	return &reports{file: f, made: made}, nil
}

func (r *reports) write(report *migrate.Report) error {
	if r.tell != nil {
		r.tell(report)
	}
	if r.file == nil {
		return nil
	}
	b, err := json.Marshal(report)
	if err != nil {
		return err
	}
	r.made = false
	if _, err = r.file.Write(append(b, '\n')); err != nil {
		return fmt.Errorf("%w; make room, or give another file with --report; the report is: %s", err, b)
	}
	return nil
}

func (r *reports) close() error {
	if r.file == nil {
		return nil
	}
	if r.made {
		return errors.Join(r.file.Close(), os.Remove(r.file.Name()))
	}
	return r.file.Close()
}

// summary is what a person wants to know of a migration that succeeded, in three lines; --report has it all.
func summary(r *migrate.Report) string {
	times := fmt.Sprintf("%v in all", round(r.Total))
	bytes := fmt.Sprintf("%.1f MiB received", float64(r.WireBytes)/(1<<20))
	switch {
	case len(r.Rounds) > 0: // at the source, which alone knows when the guest was paused
		last := 0
		for _, x := range r.Rounds {
			last = max(last, x.Index)
		}
		times = fmt.Sprintf("downtime %v, %s", round(r.Downtime), times)
		bytes = fmt.Sprintf("%.1f MiB sent in %s", float64(r.WireBytes)/(1<<20), count(last+1, "round"))
	case r.Role == "source":
		bytes = fmt.Sprintf("%.1f MiB sent since this peer was started again", float64(r.WireBytes)/(1<<20))
	}
	verified := "not verified"
	if len(r.Digests) > 0 {
		verified = fmt.Sprintf("verified: the digests of %s agree", count(len(r.Digests), "device"))
	}
	if len(r.Shared) > 0 {
		verified = strings.Join(r.Shared, ", ") + " handed over, " + verified
	}
	s := fmt.Sprintf("%s\n  %s over %s, %s", times, bytes, count(r.Streams, "stream"), verified)
	if len(r.Parts) > 0 {
		s += "\n  " + downtimeParts(r)
	}
	return s
}

// downtimeParts says what the downtime was spent on, one by one what took long enough to matter.
func downtimeParts(r *migrate.Report) string {
	const small = migrate.Millis(100 * time.Microsecond)
	var parts []string
	var rest migrate.Millis
	for _, p := range r.Parts {
		if p.Duration < small {
			rest += p.Duration
		} else {
			parts = append(parts, fmt.Sprintf("%s %v", p.Name, round(p.Duration)))
		}
	}
	if rest >= small || len(parts) == 0 {
		parts = append(parts, fmt.Sprintf("other %v", round(rest)))
	}
	s := "downtime: "
	if r.Role == "destination" { // which does not see the pause itself
		s = "downtime, since word of the pause came: "
	}
	s += strings.Join(parts, ", ")
	switch {
	case r.AgentBefore > 0:
		s += fmt.Sprintf("; before it, the guest's agent took %v", round(r.AgentBefore))
	case r.AgentAfter > 0:
		s += fmt.Sprintf("; after it, the guest's agent took %v", round(r.AgentAfter))
	}
	return s
}

// round cuts what a person does not read: microseconds of milliseconds, milliseconds of minutes.
func round(d migrate.Millis) time.Duration {
	unit := 100 * time.Microsecond
	if time.Duration(d) > time.Second {
		unit = 10 * time.Millisecond
	}
	return time.Duration(d).Round(unit)
}

// count is a number with its noun.
func count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}
