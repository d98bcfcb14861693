package migrate

import (
	"context"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/drafter-vm/drafter/pkg/wire"
)

// pretend plays a side of a session that goes on after a cut, over one stream, without the migration's secret. It answers with what say
// returns for each frame, and returns the types of those that it got. first is written in one go with the preface.
func pretend(rw io.ReadWriter, role wire.Role, first []byte, say func(wire.Header, []byte) []byte) (heard []wire.Type) {
	defer interrupt(rw)
	preface := wire.Preface{Newest: wire.Version, Oldest: wire.OldestVersion, Role: role, Purpose: wire.PurposeRejoin, Streams: 1, Session: 7}
	go rw.Write(append(preface.Append(nil), first...))
	if _, err := wire.ReadPreface(rw); err != nil {
		return nil
	}
	for frames := wire.NewReader(rw); ; {
		h, err := frames.Next()
		if err != nil {
			return heard
		}
		payload := make([]byte, h.Length)
		if err := frames.Payload(payload); err != nil {
			return heard
		}
		if h.Type != wire.TypeHeartbeat {
			heard = append(heard, h.Type)
		}
		if answer := say(h, payload); answer != nil {
			go rw.Write(answer)
		}
	}
}

// Who comes when the link was cut, and is not the other side, changes nothing, whatever he says: the two still find each other.
func TestImpostor(t *testing.T) {
	noLeak(t)
	rejoin := func(standing, more string) []byte {
		text := fmt.Sprintf(`0123456789abcdef{"id":"test","standing":%q%s}`, standing, more)
		return wire.Append(nil, wire.Header{Type: wire.TypeRejoin}, []byte(text))
	}
	abort := wire.Append(nil, wire.Header{Type: wire.TypeAbort, Flags: wire.FlagNeverRan}, wire.Abort{Code: wire.CodeInternal}.Encode())
	destinations := map[string][]byte{
		"settled":             rejoin("settled", ""),
		"never ran":           rejoin("never-ran", ""),
		"without a proof":     wire.Append(nil, wire.Header{Type: wire.TypeRejoin}, []byte(`{"id":"test","standing":"never-ran"}`)),
		"runs":                rejoin("runs", `,"devices":[{"name":"memory","size":1052672,"missing":true}]`),
		"owned":               rejoin("owned", ""),
		"never ran, an abort": abort,
	}
	// move moves a guest, cuts the link while content is missing, and brings both sides to an impostor as many times as is said, before
	// all others, over as many streams.
	move := func(t *testing.T, times int32, streams int, source, destination func([]io.ReadWriter)) {
		r := newRig(smallShape)
		late := r.postCopy(1)
		late.holdBack()
		x := newExchange(1, nil)
		r.connect(x)
		met := make(chan struct{})
		meet := func(with func([]io.ReadWriter), then func(context.Context) ([]io.ReadWriter, error)) func(context.Context) ([]io.ReadWriter, error) {
			var calls atomic.Int32
			return func(ctx context.Context) ([]io.ReadWriter, error) {
				if call := calls.Add(1); with != nil && call <= times {
					a, b := pipes(streams)
					go func() {
						with(b)
						if call == times {
							close(met)
						}
					}()
					return a, nil
				}
				select {
				case <-met:
				case <-ctx.Done():
					return nil, context.Cause(ctx)
				}
				return then(ctx)
			}
		}
		r.source.Reconnect, r.dest.Reconnect = meet(source, x.dial), meet(destination, x.accept)
		a, b := x.pair()
		r.source.OnState = func(s SourceState) {
			if s == SourceServing {
				interruptAll(a)
				r.releaseSoon()
			}
		}
		o := r.move(t.Context(), a, b)
		r.verifyEnd(t, o, "moved", "running")
		late.verify(t)
	}
	for name, answer := range destinations {
		t.Run("destination: "+name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				move(t, 1, 1, func(rws []io.ReadWriter) {
					heard := pretend(rws[0], wire.RoleDestination, nil, func(h wire.Header, b []byte) []byte {
						if h.Type != wire.TypeSeek {
							return nil
						}
						if strings.Contains(string(b), "secret") {
							t.Errorf("the source says %q", b)
						}
						return answer
					})
					if !slices.Contains(heard, wire.TypeSeek) {
						t.Errorf("it was not asked anything, but got %v", heard)
					}
					for _, h := range heard {
						if h != wire.TypeSeek && h != wire.TypeAbort && h != wire.TypeBye {
							t.Errorf("it got a frame %v", h)
						}
					}
				}, nil)
			})
		})
	}
	t.Run("destination: never ran, an abort before it is asked", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			// Whether the source is still about to ask when it reads this is up to its scheduler: many streams, and often enough, make it sure.
			move(t, 6, wire.MaxStreams, func(rws []io.ReadWriter) {
				defer interruptAll(rws)
				var heard sync.WaitGroup
				for i, rw := range rws {
					preface := wire.Preface{Newest: wire.Version, Oldest: wire.OldestVersion, Role: wire.RoleDestination, Purpose: wire.PurposeRejoin, Stream: uint8(i), Streams: uint8(len(rws)), Session: 7}
					go rw.Write(append(preface.Append(nil), abort...))
					heard.Go(func() { io.Copy(io.Discard, rw) })
				}
				heard.Wait()
			}, nil)
		})
	})
	for name, proof := range map[string]string{"none": "", "guessed": "." + strings.Repeat("0", 32)} {
		t.Run("source: "+name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				move(t, 1, 1, nil, func(rws []io.ReadWriter) {
					seek := wire.Append(nil, wire.Header{Type: wire.TypeSeek}, []byte("test"+proof))
					heard := pretend(rws[0], wire.RoleSource, seek, func(wire.Header, []byte) []byte { return nil })
					if !slices.Contains(heard, wire.TypeAbort) {
						t.Errorf("it was not refused, but got %v", heard)
					}
					for _, h := range heard {
						if h != wire.TypeAbort && h != wire.TypeBye {
							t.Errorf("it got a frame %v", h)
						}
					}
				})
			})
		})
	}
}

// impostor is somebody who plays a role that is not his, and says what he has to say.
func impostor(role wire.Role) []io.ReadWriter {
	a, b := net.Pipe()
	says := wire.Append(nil, wire.Header{Type: wire.TypeSeek}, []byte("test."+strings.Repeat("0", 32)))
	if role == wire.RoleDestination {
		says = wire.Append(nil, wire.Header{Type: wire.TypeRejoin}, []byte(`0123456789abcdef{"id":"test","standing":"never-ran"}`))
	}
	go pretend(b, role, says, func(wire.Header, []byte) []byte { return nil })
	return []io.ReadWriter{a}
}

// after is a Reconnect that brings other streams the first time.
func after(first []io.ReadWriter, then func(context.Context) ([]io.ReadWriter, error)) func(context.Context) ([]io.ReadWriter, error) {
	return func(ctx context.Context) ([]io.ReadWriter, error) {
		if streams := first; streams != nil {
			first = nil
			return streams, nil
		}
		return then(ctx)
	}
}

// channel is a stream that says what channel it is.
type channel struct {
	net.Conn
	is string
}

func (c channel) ChannelBinding() []byte { return []byte(c.is) }

// Somebody whom each side takes for the other, and who passes on what the other says, is of no use to himself where both know their
// channels, and goes unnoticed where one of them does not.
func TestRelay(t *testing.T) {
	noLeak(t)
	// within has all streams of a side be channels.
	within := func(rws []io.ReadWriter, is string) {
		for i, rw := range rws {
			if is != "" {
				rws[i] = channel{rw.(net.Conn), fmt.Sprint(is, i)}
			}
		}
	}
	// unbound takes the capability to bind proofs out of a preface.
	unbound := func(preface []byte) { preface[27] &^= wire.CapBound }
	second := func(preface []byte) { // of a side's two
		if preface[14] == 1 {
			unbound(preface)
		}
	}
	for name, tc := range map[string]struct {
		source, destination string // channels
		change              func(preface []byte)
		passes              bool
	}{
		"channels of their own":      {source: "a", destination: "b"},
		"capabilities taken away":    {source: "a", destination: "b", change: unbound},
		"taken away in part":         {source: "a", destination: "b", change: second},
		"the same channel":           {source: "a", destination: "a", passes: true},
		"a channel at the source":    {source: "a", passes: true},
		"at the destination":         {destination: "b", passes: true},
		"one whose capability fades": {source: "a", change: unbound},
		"no channels":                {passes: true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const streams = 2
				r := newRig(smallShape)
				late := r.postCopy(1)
				late.holdBack()
				x := newExchange(streams, nil)
				r.connect(x)
				a, sourceEnd := pipes(streams)
				destinationEnd, b := pipes(streams)
				for i := range streams {
					for from, to := range map[io.ReadWriter]io.ReadWriter{sourceEnd[i]: destinationEnd[i], destinationEnd[i]: sourceEnd[i]} {
						go func() {
							defer interrupt(to)
							defer interrupt(from)
							preface := make([]byte, wire.PrefaceSize)
							if _, err := io.ReadFull(from, preface); err != nil {
								return
							}
							if tc.change != nil {
								tc.change(preface)
							}
							to.Write(preface)
							io.Copy(to, from)
						}()
					}
				}
				within(a, tc.source)
				within(b, tc.destination)
				r.source.Reconnect, r.dest.Reconnect = after(a, x.dial), after(b, x.accept)
				c, d := x.pair()
				r.source.OnState = func(s SourceState) {
					if s == SourceServing {
						interruptAll(c)
						r.releaseSoon()
					}
				}
				o := r.move(t.Context(), c, d)
				r.verifyEnd(t, o, "moved", "running")
				late.verify(t)
				if passed := x.session == 1; passed != tc.passes {
					t.Errorf("it has passed: %v, want %v", passed, tc.passes)
				}
			})
		})
	}
}

// visitor is a stream of somebody who came without having been asked.
type visitor struct{ net.Conn }

func (visitor) Visits() bool { return true }

// Many who come and prove nothing keep nobody waiting.
func TestVisitors(t *testing.T) {
	noLeak(t)
	for _, role := range []wire.Role{wire.RoleSource, wire.RoleDestination} {
		t.Run("at the "+role.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(smallShape)
				late := r.postCopy(1)
				late.holdBack()
				x := newExchange(1, nil)
				r.connect(x)
				mine, theirs := &r.source.Reconnect, &r.dest.Reconnect
				if role == wire.RoleDestination {
					mine, theirs = theirs, mine
				}
				// The other side is far away, and visitors are many: one each millisecond, of whom every second says nothing.
				const comes, roundTrip = 5 * time.Second, 20 * time.Millisecond
				began := time.Now()
				var took time.Duration
				*theirs = func(ctx context.Context) ([]io.ReadWriter, error) {
					sleep(ctx, comes-time.Since(began))
					return x.dial(ctx)
				}
				calls := 0
				*mine = func(ctx context.Context) ([]io.ReadWriter, error) {
					ctx, cancel := context.WithTimeout(ctx, time.Millisecond)
					defer cancel()
					if streams, err := x.accept(ctx); err == nil {
						took = time.Since(began)
						return []io.ReadWriter{visitor{distant{streams[0].(net.Conn), roundTrip}}}, nil
					}
					if calls++; calls%2 == 0 {
						return []io.ReadWriter{visitor{impostor(role.Opposite())[0].(net.Conn)}}, nil
					}
					mute, _ := net.Pipe()
					return []io.ReadWriter{visitor{mute}}, nil
				}
				c, d := x.pair()
				var served []time.Duration
				r.source.OnState = func(s SourceState) {
					if s == SourceServing {
						if served = append(served, time.Since(began)); len(served) == 1 {
							interruptAll(c)
							r.releaseSoon()
						}
					}
				}
				o := r.move(t.Context(), c, d)
				r.verifyEnd(t, o, "moved", "running")
				late.verify(t)
				if calls < 1000 || len(served) != 2 || served[1]-comes > 10*roundTrip {
					t.Errorf("after %d visitors, the other side came at %s and was served at %s", calls, took, served)
				}
			})
		})
	}
}

// distant is a stream of which each read takes a while.
type distant struct {
	net.Conn
	by time.Duration
}

func (s distant) Read(b []byte) (int, error) {
	time.Sleep(s.by)
	return s.Conn.Read(b)
}
