package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/wire"
)

func TestMove(t *testing.T) {
	for _, streams := range []int{1, 4} {
		for _, busy := range []bool{false, true} {
			for _, bare := range []bool{false, true} {
				t.Run(fmt.Sprintf("streams=%d,busy=%t,plain=%t", streams, busy, bare), func(t *testing.T) {
					noLeak(t)
					r := newRig(smallShape)
					r.guest.busy = busy
					a, b := pipes(streams)
					if bare {
						a, b = hide(a), hide(b)
					}
					slices.Reverse(b) // any order will do
					o := r.move(t.Context(), a, b)
					if got := r.verify(t, o); got != "destination" {
						t.Fatalf("guest is at the %s: %v; %v", got, o.srcErr, o.dstErr)
					}
					if o.src.Outcome != "moved" || o.dst.Outcome != "running" {
						t.Errorf("outcomes %q, %q", o.src.Outcome, o.dst.Outcome)
					}
					for _, d := range r.source.Devices {
						want, err := block.Digest(t.Context(), d.Device)
						if err != nil {
							t.Fatal(err)
						}
						if got := o.src.Digests[d.Name]; got != fmt.Sprintf("%x", want) || got != o.dst.Digests[d.Name] {
							t.Errorf("digest of %q: source %s, destination %s, content %x", d.Name, got, o.dst.Digests[d.Name], want)
						}
					}
					if o.src.DataBytes != o.dst.DataBytes || o.src.ZeroBytes != o.dst.ZeroBytes || o.src.WireBytes != o.dst.WireBytes || o.src.StateBytes != 150_000 {
						t.Errorf("accounts differ:\n%v\n%v", o.src, o.dst)
					}
					if s := o.src.String(); !strings.Contains(s, "downtime") || strings.Contains(s, "\n") {
						t.Errorf("report: %s", s)
					}
				})
			}
		}
	}
}

// A destination whose devices held something else before.
func TestMoveOverOldContent(t *testing.T) {
	r := newRig(smallShape)
	r.target.make = func(_ string, size int64) block.Device {
		d := block.NewMemory(size)
		p := make([]byte, size)
		fill(p, 99)
		d.WriteAt(p, 0)
		return d
	}
	a, b := pipes(2)
	if got := r.verify(t, r.move(t.Context(), a, b)); got != "destination" {
		t.Errorf("guest is at the %s", got)
	}
}

// Devices that cannot say where their zeros are.
func TestMoveWithoutExtents(t *testing.T) {
	r := newRig(smallShape)
	for i := range r.source.Devices {
		r.source.Devices[i].Device = struct{ block.Device }{r.source.Devices[i].Device}
	}
	r.target.make = func(_ string, size int64) block.Device { return struct{ block.Device }{block.NewMemory(size)} }
	a, b := pipes(1)
	o := r.move(t.Context(), a, b)
	if got := r.verify(t, o); got != "destination" {
		t.Errorf("guest is at the %s", got)
	}
	if o.src.DataBytes > 1<<20 {
		t.Errorf("sent %d bytes as data, more than there are", o.src.DataBytes)
	}
}

// The link is cut after each frame, and at random bytes, of each side.
func TestCut(t *testing.T) {
	noLeak(t)
	run := func(t *testing.T, side string, frames, bytes int) (cut *cutter, owner string) {
		r := newRig(smallShape[1:3])
		r.guest.busy = frames%3 == 0
		a, b := pipes(1)
		c := &cutter{bytes: bytes, frames: frames}
		if side == "source" {
			c.Conn = a[0].(net.Conn)
			a[0] = c
		} else {
			c.Conn = b[0].(net.Conn)
			b[0] = c
		}
		o := r.move(t.Context(), a, b)
		return c, r.verify(t, o)
	}
	for _, side := range []string{"source", "destination"} {
		t.Run(side, func(t *testing.T) {
			whole, owner := run(t, side, -1, -1)
			if owner != "destination" {
				t.Fatalf("without a cut, guest is at the %s", owner)
			}
			owners := map[string]int{}
			for n := 1; n <= len(whole.sizes); n++ {
				_, owner := run(t, side, n, -1)
				owners[owner]++
				if t.Failed() {
					t.Fatalf("cut after frame %d of %d", n, len(whole.sizes))
				}
			}
			r := rand.New(rand.NewPCG(1, 2))
			for range 60 {
				n := 1 + r.IntN(whole.written)
				_, owner := run(t, side, -1, n)
				owners[owner]++
				if t.Failed() {
					t.Fatalf("cut after byte %d of %d", n, whole.written)
				}
			}
			t.Logf("owners: %v", owners)
		})
	}
}

// to makes a rig that comes by state s of the source. cut says in which state the link must die for that; none if it need not.
func (r *rig) toSource(s SourceState) (cut SourceState, must bool) {
	nobody := func(ctx context.Context) ([]io.ReadWriter, error) { return nil, errors.New("nobody is there") }
	switch s {
	case SourceRollingBack, SourceKept:
		r.guest.failPause = errors.New("no")
	case SourceStuck:
		r.guest.failPause, r.guest.failResume = errors.New("no"), errors.New("never")
	case SourceInDoubt:
		r.target.failRun = errors.New("no")
	case SourceResuming, SourceChecking, SourceCopied:
		r.copying()
	case SourceSeeking:
		r.source.Reconnect, r.source.RescueTimeout = nobody, 100*time.Millisecond
		return SourceCommitted, true
	case SourceServing:
		r.postCopy(1).holdBack()
	case SourceRejoining:
		r.source.Reconnect, r.source.RescueTimeout = nobody, 100*time.Millisecond
		r.postCopy(1).holdBack()
		return SourceServing, true
	case SourceUnsettled:
		r.postCopy(1).holdBack()
		return SourceServing, true
	}
	return 0, false
}

func (r *rig) toDestination(s DestinationState) (cut DestinationState, must bool) {
	switch s {
	case DestinationDiscarding, DestinationDiscarded:
		r.target.failLoad = errors.New("no")
	case DestinationFailed:
		r.target.failRun = errors.New("no")
	case DestinationKeeping, DestinationCopied:
		r.copying()
	case DestinationFilling:
		r.postCopy(1).holdBack()
	case DestinationRejoining:
		r.dest.Reconnect = func(ctx context.Context) ([]io.ReadWriter, error) { return nil, errors.New("nobody is there") }
		r.dest.RescueTimeout = 100 * time.Millisecond
		r.postCopy(1).holdBack()
		return DestinationFilling, true
	case DestinationIncomplete:
		r.postCopy(1).holdBack()
		return DestinationFilling, true
	}
	return 0, false
}

// In each state of each side, what happens when the link dies there is what the state says.
func TestLinkLostInEveryState(t *testing.T) {
	noLeak(t)
	for _, s := range states(numSourceStates) {
		t.Run("source/"+s.String(), func(t *testing.T) {
			r := newRig(smallShape)
			a, b := pipes(2)
			cut, must := r.toSource(s)
			seen := false
			r.source.OnState = func(now SourceState) {
				if now == s || must && now == cut {
					interruptAll(a)
					r.releaseSoon()
				}
				seen = seen || now == s
			}
			if s == SourceCommitting { // else the loss may be noticed a moment later, which is another state
				r.src.onCommit = func(ctx context.Context) { <-ctx.Done() }
			}
			o := r.move(t.Context(), a, b)
			r.verifyEnd(t, o, s.LinkLost().String(), "")
			if !seen {
				t.Errorf("state was not reached")
			}
		})
	}
	for _, s := range states(numDestinationStates) {
		t.Run("destination/"+s.String(), func(t *testing.T) {
			r := newRig(smallShape)
			a, b := pipes(2)
			cut, must := r.toDestination(s)
			seen := false
			r.dest.OnState = func(now DestinationState) {
				if now == s || must && now == cut {
					interruptAll(b)
					r.releaseSoon()
				}
				seen = seen || now == s
			}
			o := r.move(t.Context(), a, b)
			r.verifyEnd(t, o, "", s.LinkLost().String())
			if !seen {
				t.Errorf("state was not reached")
			}
		})
	}
	for _, s := range []DestinationState{DestinationCommitting, DestinationStarting, DestinationFilling, DestinationPrepared} {
		t.Run("stranded/"+s.String(), func(t *testing.T) {
			r := newRig(smallShape)
			a, b := pipes(2)
			r.postCopy(1).holdBack()
			r.dest.OnState = func(now DestinationState) {
				if now == s {
					interruptAll(b)
					r.releaseSoon()
				}
			}
			r.verifyEnd(t, r.move(t.Context(), a, b), "", s.Stranded().String())
		})
	}
}

func (r *rig) verifyEnd(t *testing.T, o outcome, src, dst string) {
	t.Helper()
	if src != "" && o.src.Outcome != src {
		t.Errorf("source ended %s, want %s: %v", o.src.Outcome, src, o.srcErr)
	}
	if dst != "" && o.dst.Outcome != dst {
		t.Errorf("destination ended %s, want %s: %v", o.dst.Outcome, dst, o.dstErr)
	}
	if o.src.Outcome == "stuck" {
		return // by the guest's fault
	}
	r.verify(t, o)
}

// In each state of each side, what happens when its context is canceled there is what the state says, and the other side
// hears of it.
func TestCancelInEveryState(t *testing.T) {
	noLeak(t)
	told := func(t *testing.T, err error) {
		t.Helper()
		var p *PeerError
		if !errors.As(err, &p) || p.Code != wire.CodeCanceled {
			t.Errorf("other side was not told: %v", err)
		}
	}
	for _, s := range states(numSourceStates) {
		t.Run("source/"+s.String(), func(t *testing.T) {
			r := newRig(smallShape)
			a, b := pipes(2)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			cut, must := r.toSource(s)
			r.source.RescueTimeout = time.Hour
			r.source.OnState = func(now SourceState) {
				if must && now == cut {
					interruptAll(a)
				}
				if now == s {
					cancel()
				}
				if now == s || must && now == cut {
					r.releaseSoon()
				}
			}
			o := r.moveWith(ctx, t.Context(), a, b)
			r.verifyEnd(t, o, s.Canceled().String(), "")
			if s > SourceConnecting && s < SourceCommitting {
				told(t, o.dstErr)
				if !errors.Is(o.srcErr, context.Canceled) {
					t.Errorf("source: %v", o.srcErr)
				}
			}
		})
	}
	for _, s := range states(numDestinationStates) {
		t.Run("destination/"+s.String(), func(t *testing.T) {
			r := newRig(smallShape)
			a, b := pipes(2)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			cut, must := r.toDestination(s)
			r.dest.RescueTimeout = time.Hour
			r.dest.OnState = func(now DestinationState) {
				if must && now == cut {
					interruptAll(b)
				}
				if now == s {
					cancel()
				}
				if now == s || must && now == cut {
					r.releaseSoon()
				}
			}
			o := r.moveWith(t.Context(), ctx, a, b)
			r.verifyEnd(t, o, "", s.Canceled().String())
			if s > DestinationConnecting && s <= DestinationPrepared {
				told(t, o.srcErr)
				if !errors.Is(o.dstErr, context.Canceled) {
					t.Errorf("destination: %v", o.dstErr)
				}
			}
		})
	}
}

// Every path a migration takes is one the tables allow, and the tables have no state without a name.
func TestTransitions(t *testing.T) {
	for _, s := range states(numSourceStates) {
		if s.String() == "" {
			t.Errorf("source state %d has no name", s)
		}
	}
	for _, s := range states(numDestinationStates) {
		if s.String() == "" {
			t.Errorf("destination state %d has no name", s)
		}
	}
	no := errors.New("no")
	faults := map[string]func(*rig){
		"none":       func(*rig) {},
		"prepare":    func(r *rig) { r.target.failPrepare = Refuse("full") },
		"suspend":    func(r *rig) { r.guest.failSuspend = no },
		"pause":      func(r *rig) { r.guest.failPause = no },
		"state":      func(r *rig) { r.guest.failState = no },
		"load":       func(r *rig) { r.target.failLoad = no },
		"commit":     func(r *rig) { r.src.failCommit = no },
		"dst commit": func(r *rig) { r.dst.failCommit = no },
		"dst both":   func(r *rig) { r.dst.failCommit, r.dst.failAbort = no, no },
		"run":        func(r *rig) { r.target.failRun = no },
		"never ran":  func(r *rig) { r.target.failRun = fmt.Errorf("no: %w", ErrNeverRan) },
		"stuck":      func(r *rig) { r.guest.failPause, r.guest.failResume = no, no },
	}
	want := map[string][2]string{
		"none": {"moved", "running"}, "prepare": {"kept", "discarded"}, "suspend": {"kept", "discarded"}, "pause": {"kept", "discarded"},
		"state": {"kept", "discarded"}, "load": {"kept", "discarded"}, "commit": {"kept", "discarded"}, "dst commit": {"kept", "discarded"},
		"dst both": {"in-doubt", "failed"}, "run": {"in-doubt", "failed"}, "never ran": {"kept", "discarded"}, "stuck": {"stuck", "discarded"},
	}
	for name, fault := range faults {
		t.Run(name, func(t *testing.T) {
			noLeak(t)
			r := newRig(smallShape)
			r.guest.busy = true
			fault(r)
			a, b := pipes(1)
			var src []SourceState
			var dst []DestinationState
			r.source.OnState = func(s SourceState) { src = append(src, s) }
			r.dest.OnState = func(s DestinationState) { dst = append(dst, s) }
			o := r.move(t.Context(), a, b)
			r.verifyEnd(t, o, want[name][0], want[name][1])
			for i := range src[1:] {
				if !slices.Contains(src[i].Next(), src[i+1]) {
					t.Errorf("source went from %v to %v", src[i], src[i+1])
				}
			}
			for i := range dst[1:] {
				if !slices.Contains(dst[i].Next(), dst[i+1]) {
					t.Errorf("destination went from %v to %v", dst[i], dst[i+1])
				}
			}
			if len(src[len(src)-1].Next()) != 0 || len(dst[len(dst)-1].Next()) != 0 {
				t.Errorf("ended in %v and %v", src[len(src)-1], dst[len(dst)-1])
			}
			if name == "dst both" || name == "run" {
				if !errors.Is(o.srcErr, ErrInDoubt) || !errors.Is(o.dstErr, ErrInDoubt) {
					t.Errorf("errors: %v; %v", o.srcErr, o.dstErr)
				}
			}
		})
	}
}

func TestRefused(t *testing.T) {
	noLeak(t)
	for name, tc := range map[string]struct {
		change func(*rig)
		want   string
	}{
		"unknown device": {func(r *rig) { delete(r.target.sizes, "disk") }, `refused: device "disk" is not configured here`},
		"size":           {func(r *rig) { r.target.sizes["disk"]++ }, `refused: device "disk" has 524389 bytes here and 524388 at the source`},
		"secret":         {func(r *rig) { r.target.failPrepare = errors.New("open /secret/path") }, "internal error: the log of the destination says more"},
		"state too long": {func(r *rig) { r.dest.MaxState = 1000 }, "refused: device state is larger than 1000 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(smallShape)
			tc.change(r)
			a, b := pipes(1)
			o := r.move(t.Context(), a, b)
			if o.srcErr == nil || !strings.Contains(o.srcErr.Error(), tc.want) {
				t.Errorf("source: %v, want %q", o.srcErr, tc.want)
			}
			if got := r.verify(t, o); got != "source" {
				t.Errorf("guest is at the %s", got)
			}
		})
	}
}

// failing is a device whose disk is full from some offset on.
type failing struct {
	block.Device
	from int64
}

func (f failing) WriteAt(p []byte, off int64) (int, error) {
	if off+int64(len(p)) > f.from {
		return 0, &os.PathError{Op: "write", Path: "/secret/disk", Err: syscall.ENOSPC}
	}
	return f.Device.WriteAt(p, off)
}

func TestDiskFull(t *testing.T) {
	noLeak(t)
	r := newRig(smallShape)
	r.target.make = func(_ string, size int64) block.Device { return failing{block.NewMemory(size), 300_000} }
	a, b := pipes(2)
	o := r.move(t.Context(), a, b)
	if got := r.verify(t, o); got != "source" {
		t.Errorf("guest is at the %s", got)
	}
	if !errors.Is(o.dstErr, syscall.ENOSPC) {
		t.Errorf("destination: %v", o.dstErr)
	}
	if s := o.srcErr.Error(); !strings.Contains(s, "no space left on device") || strings.Contains(s, "secret") {
		t.Errorf("source: %v", o.srcErr)
	}
}

// corrupting flips a bit in large writes.
type corrupting struct{ net.Conn }

func (c corrupting) Write(p []byte) (int, error) {
	if len(p) > 5000 {
		p = slices.Clone(p)
		p[4500] ^= 1 // within the payload of the first frame, which is a page or more of data
	}
	return c.Conn.Write(p)
}

func TestDamagedOnTheWay(t *testing.T) {
	noLeak(t)
	r := newRig([]shape{{"memory", 1 << 20, 1, true, Policy{}}})
	a, b := pipes(1)
	a[0] = corrupting{a[0].(net.Conn)}
	o := r.move(t.Context(), a, b)
	if got := r.verify(t, o); got != "source" {
		t.Errorf("guest is at the %s", got)
	}
	var p *PeerError
	if !errors.As(o.srcErr, &p) || p.Code != wire.CodeDigest {
		t.Errorf("source: %v", o.srcErr)
	}
}

// foreign plays a peer that is no Drafter: it says something and waits.
func TestForeignPeer(t *testing.T) {
	noLeak(t)
	random := make([]byte, 100)
	fill(random, 1)
	other := wire.Preface{Newest: 9, Oldest: 7, Role: wire.RoleSource, Streams: 1}.Append(nil)
	same := wire.Preface{Newest: 1, Oldest: 1, Role: wire.RoleDestination}.Append(nil)
	for name, tc := range map[string]struct {
		say  []byte
		is   error
		want string
	}{
		"http request":  {[]byte("GET / HTTP/1.0\r\n\r\n"), wire.ErrNotDrafter, "(HTTP)"},
		"http response": {[]byte("HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\n\r\n"), wire.ErrNotDrafter, "(HTTP)"},
		"tls":           {append([]byte{0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3}, random...), wire.ErrNotDrafter, "(TLS"},
		"ssh":           {[]byte("SSH-2.0-OpenSSH_9.2\r\n"), wire.ErrNotDrafter, "(SSH)"},
		"random":        {random, wire.ErrNotDrafter, "expected"},
		"one byte":      {[]byte("x"), wire.ErrNotDrafter, `got "x"`},
		"version":       {other, wire.ErrVersion, "peer speaks 7 to 9, we speak 1 to 2"},
		"same role":     {same, nil, "both ends are the destination"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(smallShape)
			a, b := net.Pipe()
			go func() { _, _ = io.Copy(io.Discard, a) }()
			go func() { _, _ = a.Write(tc.say) }()
			_, err := Receive(t.Context(), []io.ReadWriter{b}, r.dest)
			a.Close()
			if err == nil || tc.is != nil && !errors.Is(err, tc.is) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want %q", err, tc.want)
			}
			if r.target.prepares != 0 {
				t.Errorf("target was bothered")
			}
		})
	}
}

// stallable is a link whose halves can be made to swallow everything, as a broken path does.
type stallable struct {
	io.ReadWriter
	stall chan struct{}
}

func (s *stallable) Write(p []byte) (int, error) {
	select {
	case <-s.stall:
		return len(p), nil
	default:
		return s.ReadWriter.Write(p)
	}
}

// A peer that falls silent, without a word or a reset, is given up after the heartbeat timeout, in every state, also on
// streams that have neither deadline nor Close.
func TestStall(t *testing.T) {
	for _, s := range states(numSourceStates) {
		if len(s.Next()) == 0 || s == SourceConnecting || s == SourceRollingBack {
			continue
		}
		t.Run(s.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(smallShape)
				a, b := pipes(1)
				switch s {
				case SourceSeeking, SourceRejoining:
					t.Skip("there is no link")
				case SourceResuming, SourceChecking:
					r.copying()
				case SourceConfirming: // else the answer may be on its way already
					r.dest.Target = slowLoad{r.target}
				case SourceServing:
					r.postCopy(1).holdBack()
				}
				stall := make(chan struct{})
				x, y := &stallable{ReadWriter: a[0], stall: stall}, &stallable{ReadWriter: b[0], stall: stall}
				var began time.Time
				r.source.OnState = func(now SourceState) {
					if now == s {
						began = time.Now()
						close(stall)
						r.releaseSoon()
					}
				}
				if s == SourceCommitting { // as a sync that takes longer than the link lives
					r.src.onCommit = func(ctx context.Context) { <-ctx.Done() }
				}
				o := r.move(t.Context(), []io.ReadWriter{plain{x}}, []io.ReadWriter{plain{y}})
				spent := time.Since(began)
				r.verify(t, o)
				if want := s.LinkLost().String(); o.src.Outcome != want {
					t.Errorf("source ended %s, want %s: %v", o.src.Outcome, want, o.srcErr)
				}
				if !errors.Is(o.srcErr, os.ErrDeadlineExceeded) {
					t.Errorf("source: %v", o.srcErr)
				}
				if spent > 3*time.Second+2*linger+time.Second {
					t.Errorf("took %v", spent)
				}
				a[0].(net.Conn).Close() // the caller's part: the readers end
				b[0].(net.Conn).Close()
			})
		})
	}
}

// Waiting costs heartbeats, no more: a slow destination is not a dead one.
func TestSlowPeerIsNotDead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(smallShape)
		r.target.make = func(_ string, size int64) block.Device { return &slow{block.NewMemory(size)} }
		r.dst.onCommit = func(context.Context) { time.Sleep(20 * time.Second) }
		a, b := pipes(2)
		o := r.move(t.Context(), a, b)
		if got := r.verify(t, o); got != "destination" {
			t.Errorf("guest is at the %s: %v; %v", got, o.srcErr, o.dstErr)
		}
	})
}

// slow takes 5 seconds, in a bubble's time, for a write.
type slow struct{ block.Device }

func (s *slow) WriteAt(p []byte, off int64) (int, error) {
	time.Sleep(5 * time.Second)
	return s.Device.WriteAt(p, off)
}

// Each step that waits for the other side has its own limit, heartbeats or not.
func TestTimeouts(t *testing.T) {
	hang := func(ctx context.Context) { <-ctx.Done() }
	for name, tc := range map[string]struct {
		change   func(*rig)
		src, dst string
		want     string
	}{
		"prepare": {func(r *rig) {
			r.target.make = func(_ string, n int64) block.Device { time.Sleep(2 * time.Minute); return block.NewMemory(n) }
		},
			"kept", "discarded", "preparing the destination took longer than 1m0s"},
		"commit": {func(r *rig) { r.src.onCommit = hang }, "kept", "discarded", "the commit took longer than 1m0s"},
		"start": {func(r *rig) { r.target.onRun = func() { time.Sleep(time.Hour) } },
			"in-doubt", "running", "starting the guest at the destination took longer than 30s"},
		"switch": {func(r *rig) { r.guest.failState = nil; r.target.failLoad = nil; r.dest.Target = slowLoad{r.target} },
			"kept", "discarded", "the switch took longer than 30s"},
		"switch, by the goal": {func(r *rig) { r.source.Goal.MaxDowntime = time.Second; r.dest.Target = slowLoad{r.target} },
			"kept", "discarded", "the switch, with a downtime of at most 1s as the goal, took longer than 10s"},
		"taking content": {func(r *rig) {
			r.target.make = func(_ string, n int64) block.Device { return &stuck{block.NewMemory(n)} }
		},
			"kept", "discarded", "took nothing of"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(smallShape[2:])
				tc.change(r)
				a, b := pipes(1)
				o := r.move(t.Context(), a, b)
				if o.src.Outcome != tc.src || o.dst.Outcome != tc.dst {
					t.Errorf("ended %s and %s, want %s and %s (%v; %v)", o.src.Outcome, o.dst.Outcome, tc.src, tc.dst, o.srcErr, o.dstErr)
				}
				if !strings.Contains(o.srcErr.Error(), tc.want) {
					t.Errorf("source: %v, want %q", o.srcErr, tc.want)
				}
			})
		})
	}
	t.Run("silent peer", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r := newRig(nil)
			a, b := net.Pipe()
			go func() { _, _ = io.Copy(io.Discard, b) }()
			_, err := Send(t.Context(), []io.ReadWriter{a}, r.source)
			if !errors.Is(err, os.ErrDeadlineExceeded) || !strings.Contains(err.Error(), "introduce itself within 10s") {
				t.Errorf("error %v", err)
			}
			b.Close()
		})
	})
}

// stuck takes an hour for a write.
type stuck struct{ block.Device }

func (s *stuck) WriteAt(p []byte, off int64) (int, error) {
	time.Sleep(time.Hour)
	return s.Device.WriteAt(p, off)
}

type slowLoad struct{ *target }

func (s slowLoad) Load(ctx context.Context, r io.Reader) error {
	<-ctx.Done()
	return ctx.Err()
}

// With nothing dirty, no policy makes a migration wait.
func TestIdleDoesNotWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(smallShape)
		for i := range r.source.Devices {
			r.source.Devices[i].Policy = Policy{MinCycles: 5, MaxCycles: 20, CycleThrottle: time.Hour, MaxDirtyBlocks: 200}
		}
		a, b := pipes(1)
		began := time.Now()
		o := r.move(t.Context(), a, b)
		if spent := time.Since(began); spent > time.Second {
			t.Errorf("took %v", spent)
		}
		r.verify(t, o)
	})
}

func TestConfigMistakes(t *testing.T) {
	mem := block.NewMemory(4096)
	for want, change := range map[string]func(*rig){
		"no guest": func(r *rig) { r.source.Guest = nil },
		`device "a/b": block size 5000`: func(r *rig) {
			r.source.Devices = []SourceDevice{{Name: "a/b", Device: mem, Policy: Policy{BlockSize: 5000}}}
		},
		`name "a/b": use`:                  func(r *rig) { r.source.Devices = []SourceDevice{{Name: "a/b", Device: mem}} },
		`device "a" is named twice`:        func(r *rig) { r.source.Devices = []SourceDevice{{Name: "a", Device: mem}, {Name: "a", Device: mem}} },
		"maximum of 1 cycles is below":     func(r *rig) { r.source.Devices[0].Policy = Policy{MinCycles: 2, MaxCycles: 1} },
		"with its machine description, at": func(r *rig) { r.source.Spec = []byte(`"` + strings.Repeat("x", 70_000) + `"`) },
		"window of 5 bytes":                func(r *rig) { r.source.Window = 5 },
		"heartbeat timeout 1ms":            func(r *rig) { r.source.HeartbeatTimeout = time.Millisecond },
	} {
		t.Run(want, func(t *testing.T) {
			noLeak(t)
			r := newRig(smallShape)
			change(r)
			a, b := net.Pipe()
			rep, err := Send(t.Context(), []io.ReadWriter{a}, r.source)
			if err == nil || !strings.Contains(err.Error(), want) || rep.Outcome != "kept" {
				t.Errorf("error %v, outcome %q", err, rep.Outcome)
			}
			if _, err := b.Write([]byte("x")); err == nil {
				t.Errorf("stream is open")
			}
		})
	}
}

func TestProgress(t *testing.T) {
	r := newRig(smallShape)
	var seen []Progress
	r.source.Progress = func(p Progress) { seen = append(seen, p) }
	a, b := pipes(1)
	r.verify(t, r.move(t.Context(), a, b))
	last := seen[len(seen)-1]
	if last.State != "moved" || last.Size != 1<<20+4096+512<<10+100+100_000 || last.Data == 0 || last.StateBytes != 150_000 {
		t.Errorf("last progress: %+v", last)
	}
}
