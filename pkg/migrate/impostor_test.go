package migrate

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

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
		text := fmt.Sprintf(`{"id":"test","standing":%q%s}`, standing, more)
		return wire.Append(nil, wire.Header{Type: wire.TypeRejoin}, []byte(text))
	}
	zeros := `,"proof":"` + strings.Repeat("0", 32) + `"`
	abort := wire.Append(nil, wire.Header{Type: wire.TypeAbort, Flags: wire.FlagNeverRan}, wire.Abort{Code: wire.CodeInternal}.Encode())
	destinations := map[string][]byte{
		"settled":             rejoin("settled", ""),
		"settled, guessed":    rejoin("settled", zeros),
		"never ran":           rejoin("never-ran", ""),
		"never ran, guessed":  rejoin("never-ran", zeros),
		"runs":                rejoin("runs", `,"devices":[{"name":"memory","size":1052672,"missing":true}]`),
		"owned":               rejoin("owned", ""),
		"never ran, an abort": abort,
	}
	// move moves a guest, cuts the link while content is missing, and brings both sides to an impostor as many times as is said, before
	// all others, over as many streams.
	move := func(t *testing.T, times int32, streams int, source, destination func([]io.ReadWriter)) {
		r := newRig(smallShape)
		r.source.ID = "test.secret"
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
