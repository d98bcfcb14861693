package migrate

import (
	"context"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/drafter-vm/drafter/pkg/wire"
)

// pretend plays a side of a session that goes on after a cut, over one stream, without the migration's secret. It answers with what say
// returns for each frame, and returns the types of those that it got.
func pretend(rw io.ReadWriter, role wire.Role, first []byte, say func(wire.Header, []byte) []byte) (heard []wire.Type) {
	defer interrupt(rw)
	go rw.Write(wire.Preface{Newest: wire.Version, Oldest: wire.OldestVersion, Role: role, Purpose: wire.PurposeRejoin, Streams: 1, Session: 7}.Append(nil))
	if _, err := wire.ReadPreface(rw); err != nil {
		return nil
	}
	if first != nil {
		go rw.Write(first)
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
	destinations := map[string][]byte{
		"settled":             rejoin("settled", ""),
		"settled, guessed":    rejoin("settled", zeros),
		"never ran":           rejoin("never-ran", ""),
		"never ran, guessed":  rejoin("never-ran", zeros),
		"runs":                rejoin("runs", `,"devices":[{"name":"memory","size":1052672,"missing":true}]`),
		"owned":               rejoin("owned", ""),
		"never ran, an abort": wire.Append(nil, wire.Header{Type: wire.TypeAbort, Flags: wire.FlagNeverRan}, wire.Abort{Code: wire.CodeInternal}.Encode()),
	}
	// move moves a guest, cuts the link while content is missing, and brings both sides, first of all, to an impostor.
	move := func(t *testing.T, source, destination func(io.ReadWriter)) {
		r := newRig(smallShape)
		r.source.ID = "test.secret"
		late := r.postCopy(1)
		late.holdBack()
		x := newExchange(1, nil)
		r.connect(x)
		met := make(chan struct{})
		meet := func(with func(io.ReadWriter), then func(context.Context) ([]io.ReadWriter, error)) func(context.Context) ([]io.ReadWriter, error) {
			var calls atomic.Int32
			return func(ctx context.Context) ([]io.ReadWriter, error) {
				if calls.Add(1) == 1 && with != nil {
					a, b := pipes(1)
					go func() { with(b[0]); close(met) }()
					return a, nil
				}
				<-met
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
				move(t, func(rw io.ReadWriter) {
					heard := pretend(rw, wire.RoleDestination, nil, func(h wire.Header, b []byte) []byte {
						if h.Type != wire.TypeSeek {
							return nil
						}
						if strings.Contains(string(b), "secret") {
							t.Errorf("the source says %q", b)
						}
						return answer
					})
					for _, h := range heard {
						if h != wire.TypeSeek && h != wire.TypeAbort && h != wire.TypeBye {
							t.Errorf("it got a frame %v", h)
						}
					}
				}, nil)
			})
		})
	}
	for name, proof := range map[string]string{"none": "", "guessed": "." + strings.Repeat("0", 32)} {
		t.Run("source: "+name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				move(t, nil, func(rw io.ReadWriter) {
					seek := wire.Append(nil, wire.Header{Type: wire.TypeSeek}, []byte("test"+proof))
					heard := pretend(rw, wire.RoleSource, seek, func(wire.Header, []byte) []byte { return nil })
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
