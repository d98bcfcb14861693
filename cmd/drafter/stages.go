package main

import (
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"

	"github.com/drafter-vm/drafter/pkg/blueprint"
	"github.com/drafter-vm/drafter/pkg/oci"
	"github.com/drafter-vm/drafter/pkg/registry"
)

// stages shows the stages of a long task: as a bar on a terminal, as a line each elsewhere. Several goroutines may tell it.
type stages struct {
	w    io.Writer
	bars bool

	mu   sync.Mutex // guards what follows
	seen []string
	bar  *progressbar.ProgressBar
}

func newStages(w io.Writer) *stages {
	f, ok := w.(*os.File)
	return &stages{w: w, bars: ok && term.IsTerminal(int(f.Fd()))}
}

func (s *stages) oci(p oci.Progress)             { s.show(p.Stage, p.Done, p.Total) }
func (s *stages) blueprint(p blueprint.Progress) { s.show(p.Stage, p.Done, p.Total) }
func (s *stages) registry(p registry.Progress)   { s.show(p.Stage, p.Done, p.Total) }

func (s *stages) show(stage string, done, total int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !slices.Contains(s.seen, stage) {
		s.finish()
		s.seen = append(s.seen, stage)
		if !s.bars {
			fmt.Fprintf(s.w, "%s…\n", stage)
			return
		}
		s.bar = progressbar.NewOptions64(total, progressbar.OptionSetWriter(s.w), progressbar.OptionSetDescription(fmt.Sprintf("%-20s", stage)),
			progressbar.OptionShowBytes(true), progressbar.OptionThrottle(50*time.Millisecond), progressbar.OptionClearOnFinish(), progressbar.OptionUseIECUnits(true))
	}
	if s.bar != nil && s.seen[len(s.seen)-1] == stage {
		_ = s.bar.Set64(done) // a bar that cannot be drawn is no reason to stop
	}
}

func (s *stages) finish() {
	if s.bar != nil {
		_ = s.bar.Finish()
		s.bar = nil
	}
}

// end ends the bar that is shown, if there is one.
func (s *stages) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.finish()
}
