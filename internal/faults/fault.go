package faults

import (
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/drafter-vm/drafter/pkg/wire"
)

// Direction is the way that bytes take.
type Direction uint8

const (
	ToDestination Direction = iota // what the source sends
	ToSource                       // what the destination sends
)

// Directions are both.
var Directions = []Direction{ToDestination, ToSource}

func (d Direction) String() string {
	if d == ToSource {
		return "to-source"
	}
	return "to-destination"
}

// Kind is what goes wrong.
type Kind uint8

const (
	Cut      Kind = iota // every stream ends, in both directions; what had passed arrives, what was on its way is lost
	Truncate             // this direction of this stream ends in good order, in the middle of what was said; the other goes on
	Stall                // nothing more passes in this direction of this stream, which stays open, until [Link.Release]
	Blackout             // nothing more passes at all, and all streams stay open
	Delay                // what follows arrives Fault.Wait later, in order
	Throttle             // what follows passes at Fault.Rate
	Flip                 // one bit of the next byte is changed
	numKinds
)

// Kinds are all of them: who adds one adds it to every sweep.
func Kinds() (all []Kind) {
	for k := range numKinds {
		all = append(all, k)
	}
	return all
}

func (k Kind) String() string {
	return [...]string{"cut", "truncate", "stall", "blackout", "delay", "throttle", "flip"}[k]
}

// Point is a place in one direction of a stream. One of its fields says where; without any it is the very beginning.
// Heartbeats are no part of the count of frames, as there are more of them on a slow machine.
type Point struct {
	Frames int       // after so many whole frames; the preface counts as the first
	Bytes  int64     // after so many bytes
	Before wire.Type // before the first frame of this type
}

func (p Point) String() string {
	switch {
	case p.Before != 0:
		return fmt.Sprintf("before %v", p.Before)
	case p.Bytes != 0:
		return fmt.Sprintf("after byte %d", p.Bytes)
	}
	return fmt.Sprintf("after frame %d", p.Frames)
}

// AnyStream as the Stream of a Fault is the one on which its point is reached first.
const AnyStream = -1

// Fault is one thing that goes wrong with a [Link], once.
type Fault struct {
	Kind      Kind
	Direction Direction
	Stream    int // in the order in which streams are made; those of a reconnect follow those before; or AnyStream
	At        Point

	Wait time.Duration // of a Delay
	Rate int           // of a Throttle, bytes per second

	// Reached, if set, is called when the point is reached, before the fault takes effect. Nothing passes meanwhile.
	Reached func()
}

func (f Fault) String() string {
	s := fmt.Sprintf("%v %v %v", f.Kind, f.Direction, f.At)
	if f.Stream > 0 {
		s += fmt.Sprintf(" of stream %d", f.Stream)
	}
	switch f.Kind {
	case Delay:
		s += fmt.Sprintf(" by %v", f.Wait)
	case Throttle:
		s += fmt.Sprintf(" to %d B/s", f.Rate)
	}
	return s
}

// Random chooses a fault on one of the streams, somewhere in the first bytes of a direction: passed says how many a
// migration without faults has there.
func Random(r *rand.Rand, streams int, passed map[Direction]int64) Fault {
	f := Fault{Kind: Kind(r.IntN(int(numKinds))), Direction: Directions[r.IntN(2)], Stream: r.IntN(streams)}
	f.At.Bytes = 1 + r.Int64N(max(1, passed[f.Direction]/int64(streams)))
	f.Wait = time.Duration(r.IntN(300)) * time.Millisecond
	f.Rate = 50_000 + r.IntN(1_000_000)
	return f
}
