package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"

	"github.com/drafter-vm/drafter/internal/version"
	"github.com/drafter-vm/drafter/pkg/control"
	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/peer"
	"github.com/drafter-vm/drafter/pkg/transport"
	"github.com/drafter-vm/drafter/pkg/vmm"
)

// plainInterval is the time between lines about a migration where there is no terminal.
const plainInterval = 5 * time.Second

// watch shows how the migrations of a peer go: as a bar on a terminal, as a line now and then elsewhere, and as metrics. It
// is also what to write other things to meanwhile, and to log through, so that they do not end up in the middle of a bar.
//
// A terminal that is not read must not hold up a guest that is paused: bars are drawn by a goroutine of its own.
type watch struct {
	metrics *control.Metrics
	bars    bool
	wake    chan struct{}
	quit    context.CancelFunc
	drawn   sync.WaitGroup
	peer    atomic.Pointer[peer.Peer] // whose VM is here; nil before

	news struct {
		sync.Mutex // guards what follows; never held while something is written
		migrate.Progress
	}

	mu    sync.Mutex // guards what follows
	out   io.Writer
	bar   *progressbar.ProgressBar
	round int // that the bar is for
	lines int // that were written in place of a bar, of this migration
}

// newWatch starts a watch that shows on out. Close it.
func newWatch(out io.Writer) *watch {
	f, ok := out.(*os.File)
	ctx, quit := context.WithCancel(context.Background())
	w := &watch{
		metrics: control.NewMetrics(version.String()), bars: ok && term.IsTerminal(int(f.Fd())), out: out, wake: make(chan struct{}, 1), quit: quit,
	}
	w.drawn.Go(func() {
		for {
			select {
			case <-w.wake:
				w.draw()
			case <-ctx.Done():
				return
			}
		}
	})
	return w
}

func (w *watch) Close() error {
	w.quit()
	w.drawn.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.clear()
	return nil
}

// begun reports whether there is more to a migration than somebody who knocks.
func begun(state string) bool {
	return state != migrate.SourceConnecting.String() && state != migrate.DestinationWaiting.String()
}

// progress is told how a migration goes.
func (w *watch) progress(p migrate.Progress) {
	if of := w.peer.Load(); of != nil && p.Role == "source" && of.UnderWay() == "snapshot" {
		w.metrics.Snapshot(p)
	} else {
		w.metrics.Progress(p)
	}
	if s, ok := peerState(p); ok {
		w.metrics.State(s)
	}
	w.news.Lock()
	w.news.Progress = p
	w.news.Unlock()
	select {
	case w.wake <- struct{}{}:
	default: // it is awake
	}
}

// latest is the newest that it was told of a migration; its role is empty if there was none.
func (w *watch) latest() migrate.Progress {
	w.news.Lock()
	defer w.news.Unlock()
	return w.news.Progress
}

// peerState is what a migration means for the peer.
func peerState(p migrate.Progress) (control.State, bool) {
	if p.Role == "destination" {
		switch p.State {
		case migrate.DestinationFilling.String(), migrate.DestinationRejoining.String(), migrate.DestinationRunning.String():
			return control.Running, true
		case migrate.DestinationFailed.String(), migrate.DestinationIncomplete.String():
			return control.InDoubt, true
		}
		return control.Receiving, true
	}
	switch p.State {
	case migrate.SourceServing.String(), migrate.SourceRejoining.String(), migrate.SourceUnsettled.String():
		return control.Serving, true
	case migrate.SourceMoved.String():
		return control.Moved, true
	case migrate.SourceInDoubt.String(), migrate.SourceSeeking.String(), migrate.SourceStuck.String():
		return control.InDoubt, true
	case migrate.SourceKept.String(), migrate.SourceCopied.String():
		return control.Running, true
	}
	return control.Sending, begun(p.State)
}

// done is told how a migration ended.
func (w *watch) done(r *migrate.Report) { w.metrics.Done(r) }

// draw shows the latest news.
func (w *watch) draw() {
	w.mu.Lock() // first: what was older news when it was read must not be drawn after newer
	defer w.mu.Unlock()
	w.news.Lock()
	p := w.news.Progress
	w.news.Unlock()
	switch {
	case p.Over():
		w.clear()
		w.lines = 0
	case !begun(p.State):
	case !w.bars:
		// The first line only when there is something to wait for.
		if n := int(p.Elapsed / plainInterval); n > w.lines {
			w.lines = n
			fmt.Fprintln(w.out, describe(p))
		}
	default:
		if w.bar != nil && w.round != p.Round {
			w.clear()
		}
		if w.bar == nil {
			w.bar = progressbar.NewOptions64(1, progressbar.OptionSetWriter(w.out), progressbar.OptionSetPredictTime(false), progressbar.OptionSetElapsedTime(false),
				progressbar.OptionSetWidth(30), progressbar.OptionClearOnFinish())
			w.round = p.Round
		}
		size, done := extent(p)
		w.bar.ChangeMax64(max(size, 1) + 1) // one more, as a full bar goes away
		w.bar.Describe(describe(p))
		// A bar that cannot be drawn is no reason to stop.
		_ = w.bar.Set64(done)
	}
}

// extent is how much there is to do now, and how much of it is done, in bytes.
func extent(p migrate.Progress) (size, done int64) {
	if p.Role == "source" || p.Dirty > 0 {
		return p.Dirty, p.Dirty - p.Rest
	}
	return p.Size, min(p.Size, p.Data+p.Zero)
}

// describe is a migration in one line.
func describe(p migrate.Progress) string {
	s := "Receiving"
	if p.Role == "source" {
		s = fmt.Sprintf("Sending, round %d", p.Round+1)
	}
	moving := false
	switch p.State {
	case migrate.SourceCopying.String(), migrate.DestinationReceiving.String():
		moving = true
	case migrate.SourceServing.String():
		s, moving = "Sending, the VM runs there", true
	case migrate.DestinationFilling.String():
		s, moving = "Receiving, the VM runs here", true
	case migrate.SourceSeeking.String(), migrate.SourceRejoining.String(), migrate.DestinationRejoining.String():
		s = "Looking for the other peer"
	default:
		s += ", " + p.State
	}
	if size, done := extent(p); moving && size > 0 {
		s += fmt.Sprintf(": %d%% of %.1f MiB, %.1f MiB/s", 100*done/size, float64(size)/(1<<20), p.Bandwidth/(1<<20))
	}
	if p.DirtyRate > 0 && p.State != migrate.SourceServing.String() {
		s += fmt.Sprintf(", guest writes %.1f MiB/s", p.DirtyRate/(1<<20))
	}
	if p.Throttle > 0 {
		s += fmt.Sprintf(", held back %.0f%%", 100*p.Throttle)
	}
	if p.Remaining > 0 {
		s += fmt.Sprintf(", %v left", p.Remaining.Round(100*time.Millisecond))
	}
	return s
}

// clear takes the bar away, if there is one. w.mu is held.
func (w *watch) clear() {
	if w.bar != nil {
		_ = w.bar.Clear()
		w.bar = nil
	}
}

// Write writes to where the watch shows, on a line of its own.
func (w *watch) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.clear()
	return w.out.Write(p)
}

// logger is a logger whose lines do not get in the way of what is shown.
func (w *watch) logger(l *slog.Logger) *slog.Logger { return slog.New(&apart{l.Handler(), w}) }

type apart struct {
	slog.Handler
	w *watch
}

func (a *apart) Handle(ctx context.Context, r slog.Record) error {
	a.w.mu.Lock()
	defer a.w.mu.Unlock()
	a.w.clear()
	return a.Handler.Handle(ctx, r)
}

func (a *apart) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &apart{a.Handler.WithAttrs(attrs), a.w}
}
func (a *apart) WithGroup(name string) slog.Handler { return &apart{a.Handler.WithGroup(name), a.w} }

// started notes that the instance runs.
func (w *watch) started(p *peer.Peer) {
	w.peer.Store(p)
	w.metrics.State(control.Running)
	if _, ok := p.InDoubt(); ok {
		w.metrics.State(control.InDoubt)
	}
	w.metrics.Resumed(p.ResumeDuration())
	w.metrics.Memory(func() (control.Memory, bool) {
		s, ok := p.Instance().FillStats()
		return control.Memory{
			Faults: s.Faults, Failures: s.Failures, Demanded: s.DemandBytes, Background: s.FillBytes, Zero: s.ZeroBytes, Missing: s.Remaining,
			P50: s.P50, P99: s.P99, Max: s.Max,
		}, ok
	})
	if m, ok := p.Instance().Machine().(vmm.Measurer); ok {
		w.metrics.Hypervisor(m.Metrics)
	}
}

// serveMetrics serves the metrics, and profiles if they are wanted, at the address of --metrics until the returned function is called. With no address it
// does nothing.
func (w *watch) serveMetrics(ctx context.Context, address string, profiles bool, log *slog.Logger) (stop func(), err error) {
	if address == "" {
		return func() {}, nil
	}
	l, err := transport.Listen(ctx, address)
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, fmt.Errorf("--metrics: %w: %s", err, inUse(address))
	} else if err != nil {
		return nil, fmt.Errorf("--metrics: %w", err)
	}
	if transport.Insecure(address) {
		log.Warn("whoever reaches the metrics can read them", "metrics", transport.Redacted(address))
	}
	fmt.Fprintf(w, "Metrics on http://%s/metrics\n", listenAddress(l))
	handler := w.metrics.Handler()
	if profiles {
		handler = withProfiles(handler)
	}
	s := control.Serve(l, handler, log)
	return func() { s.Close() }, nil
}

// listenAddress is where to reach a listener, as part of a URL.
func listenAddress(l net.Listener) string {
	if a, ok := l.Addr().(*net.TCPAddr); ok && a.IP.IsUnspecified() {
		return net.JoinHostPort("localhost", fmt.Sprint(a.Port))
	}
	return l.Addr().String()
}
