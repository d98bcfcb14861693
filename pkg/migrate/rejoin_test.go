package migrate

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/wire"
)

var cutSeeds = flag.Int("migrate.cuts", 100, "histories of cut links that TestCutsAnywhere goes through, for each kind of switch")

// exchange is how two sides meet: the source dials.
type exchange struct {
	streams int
	calls   chan []io.ReadWriter
	wrap    func(session int, a, b []io.ReadWriter) // cuts links
	mu      sync.Mutex                              // guards session
	session int
}

func newExchange(streams int, wrap func(session int, a, b []io.ReadWriter)) *exchange {
	return &exchange{streams: streams, calls: make(chan []io.ReadWriter), wrap: wrap}
}

func (x *exchange) pair() (a, b []io.ReadWriter) {
	x.mu.Lock()
	defer x.mu.Unlock()
	a, b = pipes(x.streams)
	if x.wrap != nil {
		x.wrap(x.session, a, b)
	}
	x.session++
	return a, b
}

func (x *exchange) dial(ctx context.Context) ([]io.ReadWriter, error) {
	a, b := x.pair()
	select {
	case x.calls <- b:
		return a, nil
	case <-ctx.Done():
		interruptAll(a)
		interruptAll(b)
		return nil, ctx.Err()
	}
}

func (x *exchange) accept(ctx context.Context) ([]io.ReadWriter, error) {
	select {
	case b := <-x.calls:
		return b, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// connect gives both sides of a rig the exchange.
func (r *rig) connect(x *exchange) {
	r.source.Reconnect, r.dest.Reconnect = x.dial, x.accept
	r.source.RescueTimeout, r.dest.RescueTimeout = time.Minute, time.Minute
}

// cutAt makes stream i of one side end after some frames.
func cutAt(side []io.ReadWriter, i, frames int) {
	side[i] = &cutter{Conn: side[i].(net.Conn), bytes: -1, frames: frames}
}

// Links are cut again and again, at any frame of any session, and the guest and all its content arrive all the same: or it
// never left.
func TestCutsAnywhere(t *testing.T) {
	noLeak(t)
	ends := map[string]int{}
	run := func(t *testing.T, late bool, seed, streams int, wrap func(session int, a, b []io.ReadWriter)) (o outcome, owner string, sessions int) {
		r := newRig(smallShape[1:3])
		r.guest.busy, r.guest.pace = seed%4 == 0, 10*time.Microsecond
		if late {
			r.postCopy(uint64(seed))
		}
		x := newExchange(streams, wrap)
		r.connect(x)
		a, b := x.pair()
		o = r.move(t.Context(), a, b)
		return o, r.verify(t, o), x.session
	}
	for _, late := range []bool{false, true} {
		// How many frames there are, with one stream and with two, of the source and of the destination.
		var frames [3][2]int
		for streams := 1; streams <= 2; streams++ {
			synctest.Test(t, func(t *testing.T) {
				var x, y *cutter
				run(t, late, 1, streams, func(_ int, a, b []io.ReadWriter) {
					cutAt(a, 0, -1)
					cutAt(b, 0, -1)
					x, y = a[0].(*cutter), b[0].(*cutter)
				})
				frames[streams] = [2]int{len(x.sizes), len(y.sizes)}
			})
		}
		for seed := range *cutSeeds {
			ok := t.Run(fmt.Sprintf("late=%t/%d", late, seed), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					rnd := rand.New(rand.NewPCG(uint64(seed), 8))
					cuts, streams := 1+rnd.IntN(4), 1+rnd.IntN(2)
					o, owner, sessions := run(t, late, seed, streams, func(session int, a, b []io.ReadWriter) {
						if session >= cuts {
							return
						}
						side, most := a, frames[streams][0]
						if rnd.IntN(2) == 0 {
							side, most = b, frames[streams][1]
						}
						n := 1 + rnd.IntN(most)
						switch {
						case session > 0:
							n = 1 + rnd.IntN(12) // such sessions are short
						case rnd.IntN(4) > 0:
							n = most - rnd.IntN(most/2) // what comes late is what is special here
						}
						cutAt(side, rnd.IntN(streams), n)
					})
					ends[fmt.Sprintf("%s after %d sessions", owner, sessions)]++
					if owner == "nobody" || errors.Is(o.srcErr, ErrInDoubt) || errors.Is(o.srcErr, ErrUnsettled) || errors.Is(o.dstErr, ErrUnsettled) {
						t.Errorf("guest is at %s: %v; %v", owner, o.srcErr, o.dstErr)
					}
				})
			})
			if !ok {
				t.Fatalf("seed %d", seed)
			}
		}
	}
	t.Logf("ends: %v", ends)
}

// In each state of each side, what happens when the link dies there and the two sides meet again is what the state says.
func TestReunitedInEveryState(t *testing.T) {
	noLeak(t)
	for _, s := range states(numSourceStates) {
		if s == SourceSeeking || s == SourceRejoining || s == SourceInDoubt || s == SourceUnsettled || s == SourceRollingBack || s == SourceStuck {
			continue // there is no link to lose, or see TestLinkLostInEveryState
		}
		t.Run("source/"+s.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(smallShape)
				r.toSource(s)
				x := newExchange(2, nil)
				r.connect(x)
				a, b := x.pair()
				r.source.OnState = func(now SourceState) {
					if now == s {
						interruptAll(a)
						r.releaseSoon()
					}
				}
				if s == SourceCommitting {
					r.src.onCommit = func(ctx context.Context) { <-ctx.Done() }
				}
				want := s.Reunited()
				o := r.move(t.Context(), a, b)
				if s == SourceCommitted {
					want = SourceKept // the commit had not arrived, so the guest never ran there
				}
				r.verifyEnd(t, o, want.String(), "")
			})
		})
	}
	for _, s := range states(numDestinationStates) {
		if s == DestinationRejoining || s == DestinationIncomplete || s == DestinationFailed {
			continue
		}
		t.Run("destination/"+s.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(smallShape)
				r.toDestination(s)
				x := newExchange(2, nil)
				r.connect(x)
				a, b := x.pair()
				r.dest.OnState = func(now DestinationState) {
					if now == s {
						interruptAll(b)
						r.releaseSoon()
					}
				}
				o := r.move(t.Context(), a, b)
				r.verifyEnd(t, o, "", s.Reunited().String())
				if errors.Is(o.srcErr, ErrInDoubt) || errors.Is(o.srcErr, ErrUnsettled) {
					t.Errorf("source: %v", o.srcErr)
				}
			})
		})
	}
}

// A source process that dies while serving, and is started again. It first meets somebody else.
func TestRejoinSource(t *testing.T) {
	noLeak(t)
	synctest.Test(t, func(t *testing.T) {
		r := newRig(smallShape)
		r.postCopy(3).holdBack()
		x := newExchange(2, nil)
		r.connect(x)
		r.source.Reconnect = nil // it dies
		a, b := x.pair()
		again := make(chan error, 1)
		r.source.OnState = func(now SourceState) {
			if now == SourceServing {
				interruptAll(a)
				r.releaseSoon()
			}
			if now == SourceUnsettled {
				cfg := r.source
				cfg.OnState, cfg.Reconnect = nil, after(impostor(wire.RoleDestination), x.dial)
				go func() {
					rep, err := RejoinSource(context.Background(), cfg)
					if err == nil && rep.Outcome != "moved" {
						err = fmt.Errorf("outcome %q", rep.Outcome)
					}
					again <- err
				}()
			}
		}
		o := r.move(t.Context(), a, b)
		if !errors.Is(o.srcErr, ErrUnsettled) || o.src.Outcome != "unsettled" {
			t.Errorf("first source: %v", o.srcErr)
		}
		if err := <-again; err != nil {
			t.Errorf("second source: %v", err)
		}
		if o.dstErr != nil || o.dst.Outcome != "running" || o.dst.Reconnects != 1 || o.dst.Digests != nil {
			t.Errorf("destination: %v, %v", o.dstErr, o.dst)
		}
		r.verify(t, o)
	})
}

// A source process that dies with its machine: what was in memory is nowhere any more.
func TestRejoinSourceLost(t *testing.T) {
	noLeak(t)
	for _, needed := range []bool{true, false} {
		t.Run(fmt.Sprintf("needed=%t", needed), func(t *testing.T) {
			tested := false
			test := func(t *testing.T) {
				r := newRig(smallShape)
				late := r.postCopy(3)
				late.holdBack()
				late.uses, late.loads = 0, 0
				x := newExchange(2, nil)
				r.connect(x)
				r.source.Reconnect = nil // it dies
				a, b := x.pair()
				again := make(chan error, 1)
				r.source.OnState = func(now SourceState) {
					if now == SourceServing {
						interruptAll(a)
						r.releaseSoon()
					}
					if now == SourceUnsettled {
						// Whichever it is: this one stands for memory.
						lost := slices.IndexFunc(late.late, func(l *lateDevice) bool { return l != nil && l.missing.count.Load() > 0 })
						if lost < 0 {
							t.Error("nothing is missing: nothing is tested")
							again <- nil
							return
						}
						late.late[lost].forgone.Store(!needed) // as when the machine there has ended
						for page := range late.late[lost].missing.pages {
							if !needed {
								late.late[lost].missing.take(page)
							}
						}
						cfg := r.source
						cfg.OnState, cfg.Reconnect, cfg.RescueTimeout = nil, x.dial, 30*time.Second
						cfg.Devices = append([]SourceDevice(nil), cfg.Devices...)
						for n := range cfg.Devices {
							if cfg.Devices[n].Name == late.names[lost] {
								cfg.Devices[n].Lost = errors.New("gone with the wind")
							}
						}
						r.src.confirms = 0
						go func() {
							_, err := RejoinSource(context.Background(), cfg)
							again <- err
						}()
					}
				}
				o := r.move(t.Context(), a, b)
				err := <-again
				if needed && err == nil && o.dstErr == nil {
					return // all had been sent before the cut, and only waited to be taken
				}
				tested = true
				if r.src.confirms == 0 && needed {
					t.Error("it was heard that the guest runs there, and is not on record")
				}
				if !needed {
					if err != nil || o.dstErr != nil {
						t.Errorf("nobody lacks any memory: %v; %v", err, o.dstErr)
					}
					return
				}
				if !errors.Is(err, ErrInDoubt) {
					t.Errorf("source: %v", err)
				}
				var told *PeerError
				if !errors.Is(o.dstErr, ErrUnsettled) || !errors.As(o.dstErr, &told) || !strings.Contains(told.Reason, "gone with the wind") {
					t.Errorf("destination: %v", o.dstErr)
				}
			}
			for try := 0; try < 20 && !tested; try++ {
				synctest.Test(t, test)
			}
			if !tested {
				t.Error("nothing was ever missing")
			}
		})
	}
}

// A destination process that dies while pages are missing, and is started again. It first meets somebody else.
func TestRejoinDestination(t *testing.T) {
	noLeak(t)
	for _, cuts := range []int{0, 2} {
		t.Run(fmt.Sprintf("cuts=%d", cuts), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(smallShape)
				late := r.postCopy(3)
				late.holdBack()
				late.uses = 0 // the guest begins after the restart
				x := newExchange(2, func(session int, a, b []io.ReadWriter) {
					if session > 0 && session <= cuts {
						cutAt(a, session%2, 5)
					}
				})
				r.connect(x)
				r.dest.Reconnect = nil // it dies
				a, b := x.pair()
				again := make(chan error, 1)
				r.dest.OnState = func(now DestinationState) {
					if now == DestinationFilling {
						interruptAll(b)
						r.releaseSoon()
					}
					if now == DestinationIncomplete {
						cfg := r.dest
						cfg.OnState, cfg.Reconnect = nil, after(impostor(wire.RoleSource), x.accept)
						claim := Claim{ID: r.source.ID, Complete: late.Complete, Devices: func(_ context.Context, ask func(int, block.Range)) (out []ClaimDevice, _ error) {
							for i, name := range late.names {
								d := ClaimDevice{Name: name, Size: late.frozen[name].Size()}
								if l := late.late[i]; l != nil {
									l.mu.Lock()
									l.ask = ask
									l.mu.Unlock()
									d.Late = l
								}
								out = append(out, d)
							}
							late.guest.Wait() // it has no more to do than this
							late.uses = 100
							late.resume()
							return out, nil
						}}
						go func() {
							rep, err := RejoinDestination(context.Background(), claim, cfg)
							if err == nil && rep.Outcome != "running" {
								err = fmt.Errorf("outcome %q", rep.Outcome)
							}
							again <- err
						}()
					}
				}
				o := r.move(t.Context(), a, b)
				if !errors.Is(o.dstErr, ErrUnsettled) || o.dst.Outcome != "incomplete" {
					t.Errorf("first destination: %v", o.dstErr)
				}
				if err := <-again; err != nil {
					t.Errorf("second destination: %v", err)
				}
				if o.srcErr != nil || o.src.Outcome != "moved" || o.src.Reconnects < 1 {
					t.Errorf("source: %v, %v", o.srcErr, o.src)
				}
				late.verify(t)
				if late.completes != 1 {
					t.Errorf("completed %d times", late.completes)
				}
			})
		})
	}
}

// A destination that was started again and has no record of the migration says so, after recording that.
func TestDisclaim(t *testing.T) {
	noLeak(t)
	synctest.Test(t, func(t *testing.T) {
		r := newRig(smallShape)
		x := newExchange(1, nil)
		r.connect(x)
		r.dest.Reconnect = nil
		a, b := x.pair()
		r.source.OnState = func(s SourceState) {
			if s == SourceCommitted {
				interruptAll(a)
			}
		}
		var refused error
		done := make(chan struct{})
		fresh := &journal{}
		go func() {
			defer close(done)
			cfg := r.dest
			cfg.Journal = fresh
			cfg.Reconnect, cfg.RescueTimeout = after(impostor(wire.RoleSource), func(ctx context.Context) ([]io.ReadWriter, error) {
				if fresh.record != "" {
					t.Errorf("somebody else was told: record %q", fresh.record)
				}
				return x.accept(ctx)
			}), 10*time.Second
			if refused = Disclaim(context.Background(), cfg, "other"); fresh.record != "" {
				t.Errorf("for another migration there is a record: %q", fresh.record)
			}
			cfg.Reconnect, cfg.RescueTimeout = x.accept, time.Minute
			if err := Disclaim(context.Background(), cfg, r.source.ID); err != nil {
				t.Errorf("disclaim: %v", err)
			}
		}()
		o := r.move(t.Context(), a, b)
		<-done
		if refused == nil || !strings.Contains(refused.Error(), "not of \"other\"") {
			t.Errorf("the guest of another migration was disclaimed: %v", refused)
		}
		if fresh.record != "abort test.secret" {
			t.Errorf("record %q", fresh.record)
		}
		r.verifyEnd(t, o, "kept", "discarded")
	})
}

// When the destination is not found in time, the source says that its content is still needed.
func TestRescueTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(smallShape)
		r.postCopy(1).holdBack()
		x := newExchange(2, nil)
		r.connect(x)
		r.dest.Reconnect = func(ctx context.Context) ([]io.ReadWriter, error) { <-ctx.Done(); return nil, ctx.Err() }
		a, b := x.pair()
		began := time.Now()
		r.source.OnState = func(s SourceState) {
			if s == SourceServing {
				interruptAll(a)
				r.releaseSoon()
			}
		}
		o := r.move(t.Context(), a, b)
		r.verifyEnd(t, o, "unsettled", "incomplete")
		if spent := time.Since(began); spent < time.Minute || spent > 70*time.Second {
			t.Errorf("took %v", spent)
		}
		if !strings.Contains(o.srcErr.Error(), "not found again within 1m0s") {
			t.Errorf("source: %v", o.srcErr)
		}
	})
}

// The guest is to be had as soon as it runs.
func TestBegin(t *testing.T) {
	noLeak(t)
	r := newRig(smallShape)
	late := r.postCopy(1)
	late.holdBack()
	a, b := pipes(2)
	r.guest.run()
	sent := make(chan error, 1)
	go func() {
		_, err := Send(t.Context(), a, r.source)
		sent <- err
	}()
	got := Begin(t.Context(), b, r.dest)
	<-got.Running()
	select {
	case <-got.Done():
		t.Errorf("done before all arrived")
	default:
	}
	r.release()
	rep, err := got.Wait()
	if err != nil || rep.Outcome != "running" {
		t.Errorf("%v, %v", rep, err)
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
	late.verify(t)
	late.halt()
	r.stop()

	r = newRig(smallShape)
	r.target.failLoad = errNo
	a, b = pipes(1)
	go func() { _, err := Send(t.Context(), a, r.source); sent <- err }()
	got = Begin(t.Context(), b, r.dest)
	<-got.Done()
	select {
	case <-got.Running():
		t.Errorf("runs")
	default:
	}
	if _, err := got.Wait(); !errors.Is(err, errNo) {
		t.Errorf("error %v", err)
	}
	<-sent
}

// A copy leaves the guest where it is.
func TestCopy(t *testing.T) {
	noLeak(t)
	for _, busy := range []bool{false, true} {
		for _, fail := range []string{"", "keep", "load", "resume"} {
			t.Run(fmt.Sprintf("busy=%t,fail=%s", busy, fail), func(t *testing.T) {
				r := newRig(smallShape)
				r.guest.busy = busy
				r.copying()
				want := [2]string{"copied", "copied"}
				switch fail {
				case "keep":
					r.copy.failKeep = errNo
					want = [2]string{"kept", "discarded"}
				case "load":
					r.target.failLoad = errNo
					want = [2]string{"kept", "discarded"}
				case "resume":
					r.guest.failResume = errNo
					want = [2]string{"stuck", "discarded"}
				}
				a, b := pipes(2)
				var frozen []block.Device
				r.source.OnState = func(s SourceState) {
					if s == SourceResuming { // what the copy must hold
						for _, d := range r.source.Devices {
							m := block.NewMemory(d.Device.Size())
							if err := block.Copy(context.Background(), m, d.Device, block.CopyOptions{}); err != nil {
								t.Error(err)
							}
							frozen = append(frozen, m)
						}
					}
				}
				o := r.move(t.Context(), a, b)
				r.verifyEnd(t, o, want[0], want[1])
				if fail != "" {
					return
				}
				for i, d := range r.source.Devices {
					if equal, at, err := block.Equal(t.Context(), frozen[i], r.target.devices[d.Name]); err != nil || !equal {
						t.Errorf("device %q differs at %d (%v)", d.Name, at, err)
					}
				}
				if o.src.Downtime <= 0 {
					t.Errorf("downtime %v", o.src.Downtime)
				}
			})
		}
	}
	t.Run("version 1", func(t *testing.T) {
		r := newRig(smallShape)
		r.copying()
		r.source.newest = 1
		a, b := pipes(1)
		o := r.move(t.Context(), a, b)
		if r.verify(t, o); o.srcErr == nil || !strings.Contains(o.srcErr.Error(), "knows no copies") {
			t.Errorf("source: %v", o.srcErr)
		}
	})
}

// A source that does not hear in time that the guest runs, and has no way to meet again, is in doubt: the destination knows that it could not tell it.
func TestUntold(t *testing.T) {
	noLeak(t)
	synctest.Test(t, func(t *testing.T) {
		r := newRig(smallShape)
		r.source.CommitTimeout = time.Second
		r.dst.onCommit = func(context.Context) { time.Sleep(3 * time.Second) } // a slow disk
		a, b := pipes(1)
		o := r.move(t.Context(), a, b)
		if !errors.Is(o.srcErr, ErrInDoubt) || o.dstErr != nil || o.dst.Untold == nil {
			t.Errorf("source: %v; destination: %v, untold: %v", o.srcErr, o.dstErr, o.dst.Untold)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		r := newRig(smallShape)
		a, b := pipes(1)
		if o := r.move(t.Context(), a, b); o.srcErr != nil || o.dstErr != nil || o.dst.Untold != nil {
			t.Errorf("source: %v; destination: %v, untold: %v", o.srcErr, o.dstErr, o.dst.Untold)
		}
	})
}

// A source that takes the guest back before it has committed says so: the destination looks for it no more.
func TestAbortTells(t *testing.T) {
	noLeak(t)
	synctest.Test(t, func(t *testing.T) {
		r := newRig(smallShape)
		r.src.failCommit = errors.New("no space left")
		searches := 0
		r.dest.Reconnect = func(ctx context.Context) ([]io.ReadWriter, error) {
			searches++
			<-ctx.Done()
			return nil, context.Cause(ctx)
		}
		began := time.Now()
		a, b := pipes(1)
		o := r.move(t.Context(), a, b)
		r.verifyEnd(t, o, "kept", "discarded")
		if searches > 0 || time.Since(began) > 10*time.Second {
			t.Errorf("after %s and %d searches for a source that has said it all", time.Since(began), searches)
		}
	})
}

// An id that a Seek could not have beside its proof is refused before anything is begun.
func TestLongID(t *testing.T) {
	r := newRig(smallShape)
	for id, ok := range map[string]bool{
		strings.Repeat("p", 31) + ".secret": true, strings.Repeat("p", 32) + ".secret": false, strings.Repeat("p", 64): true, "../p": false, "": true,
	} {
		cfg := r.source
		cfg.ID = id
		if err := cfg.check(); (err == nil) != ok {
			t.Errorf("id %q: %v", id, err)
		}
	}
}
