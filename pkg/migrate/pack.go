package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/wire"
)

const (
	// A job is what one worker packs at a time: many small ranges, or a long one. It is large enough that runs of zeros
	// join, small enough that all workers have something to do.
	jobRanges = wire.MaxPayload / wire.PageSize
	jobBytes  = 256 << 10
)

// job is a piece of one round of one device.
type job struct {
	device *sourceDevice
	round  *roundWork
	n      int // ranges in use
	ranges [jobRanges]block.Range
}

// roundWork counts the jobs of a round that are not finished. It starts with one for the planner.
type roundWork struct {
	left atomic.Int64
	same atomic.Int64  // bytes that were not sent, as the destination holds them
	done chan struct{} // closed when none is left
}

func newRoundWork() *roundWork {
	r := &roundWork{done: make(chan struct{})}
	r.left.Store(1)
	return r
}

func (r *roundWork) finish() {
	if r.left.Add(-1) == 0 {
		close(r.done)
	}
}

// planner cuts a round into jobs.
type planner struct {
	s     *source
	job   job
	bytes int64
}

func (p *planner) add(r block.Range) error {
	for r.Length > 0 {
		n := min(r.Length, jobBytes-p.bytes)
		p.job.ranges[p.job.n] = block.Range{Offset: r.Offset, Length: n}
		p.job.n++
		p.bytes += n
		r = block.Range{Offset: r.Offset + n, Length: r.Length - n}
		if p.job.n == jobRanges || p.bytes == jobBytes {
			if err := p.flush(); err != nil {
				return err
			}
		}
	}
	return nil
}

func (p *planner) flush() error {
	if p.job.n == 0 {
		return nil
	}
	p.job.round.left.Add(1)
	select {
	case p.s.jobs <- p.job:
	case <-p.s.link.ctx.Done():
		return context.Cause(p.s.link.ctx)
	}
	p.job.n, p.bytes = 0, 0
	return nil
}

// work packs jobs until the link ends.
func (s *source) work() {
	var b background
	for {
		select {
		case j := <-s.jobs:
			if s.link.aside.Load() {
				b.stepBack()
			}
			if err := s.pack(&j); err != nil {
				s.link.fail(err)
			}
			j.round.finish()
		case <-s.link.ctx.Done():
			return
		}
	}
}

func (s *source) pack(j *job) error {
	p := packer{s: s, device: j.device, late: s.checking.Load()}
	defer p.drop()
	for _, r := range j.ranges[:j.n] {
		if err := p.add(r); err != nil {
			return err
		}
	}
	if p.same > 0 {
		j.round.same.Add(p.same)
	}
	return p.flush()
}

// packer turns ranges of a device into frames, in the very buffer they are read into: the bytes that a zero page leaves
// free are room for the headers of what comes after it. So nothing is copied but what follows a run of zeros.
type packer struct {
	s      *source
	device *sourceDevice
	urgent bool // somebody waits for it: it goes before all else
	late   bool // the guest runs on it as soon as it is there: each frame has a check before it
	buf    *wire.Buffer
	spare  *wire.Buffer // what is compressed is put together in it
	zero   block.Range  // a run of zeros that is noted and not yet in the buffer
	same   int64        // bytes that need not be sent
}

// add reads, digests and packs a range, which begins on a page's start.
func (p *packer) add(r block.Range) error {
	for r.Length > 0 {
		if p.buf == nil {
			p.buf = wire.NewBuffer()
		}
		// Frames end at w; pages are read to where they belong if they turn out to be data. There is always room for
		// one more Zero frame than is noted, which flush may need.
		w, check := p.buf.N, 0
		if p.late {
			check = wire.CheckFrameSize
		}
		at := w + check + wire.HeaderSize
		if p.zero.Length > 0 {
			at += check + wire.ZeroFrameSize
		}
		room := (wire.BufferSize - at - check - wire.ZeroFrameSize) &^ (block.PageSize - 1)
		n := int(min(r.Length, wire.MaxPayload, int64(max(room, 0))))
		if n == 0 {
			if err := p.flush(); err != nil {
				return err
			}
			continue
		}
		b := p.buf.B[at : at+n]
		if m, err := p.device.Device.ReadAt(b, r.Offset); m < n {
			if err == nil || errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return tell(wire.CodeDevice, fmt.Errorf("read device %q at %d: %w", p.device.Name, r.Offset, err), "device %q cannot be read", p.device.Name)
		}
		p.encode(b, at, r.Offset)
		r = block.Range{Offset: r.Offset + int64(n), Length: r.Length - int64(n)}
	}
	return nil
}

// encode packs the pages in b, which lie at position at of the buffer and are the device's content at off.
func (p *packer) encode(b []byte, at int, off int64) {
	d := p.device
	var sum termSum
	note := func(i int) pageKind { return d.digest.note(off+int64(i), b[i:min(len(b), i+block.PageSize)], &sum) }
	kind := note(0)
	for len(b) > 0 {
		// The next n bytes are pages of one kind.
		n, next := min(len(b), block.PageSize), kind
		for n < len(b) {
			if next = note(n); next != kind {
				break
			}
			n = min(len(b), n+block.PageSize)
		}
		switch kind {
		case pageSame:
			p.same += int64(n)
		case pageZero:
			if p.zero.Length > 0 && p.zero.End() == off {
				p.zero.Length += int64(n)
			} else {
				p.putZero()
				p.zero = block.Range{Offset: off, Length: int64(n)}
			}
			p.s.zeroBytes.Add(int64(n))
		case pageData:
			p.putZero()
			p.putData(b[:n], at, off)
			p.s.dataBytes.Add(int64(n))
		}
		b, at, off, kind = b[n:], at+n, off+int64(n), next
	}
	d.digest.add(sum)
}

// putData puts content, which lies at position at of the buffer, into it as a Data frame, compressed if that pays.
func (p *packer) putData(content []byte, at int, off int64) {
	h := wire.Header{Type: wire.TypeData, Device: uint16(p.device.index), Length: uint32(len(content)), Offset: uint64(off)}
	if c := p.s.link.compressor; c.wanted() && !p.urgent {
		if p.spare == nil {
			p.spare = wire.NewBuffer()
		}
		if packed := c.pack(p.spare.B[:], content); packed != nil {
			h.Flags, h.Length = wire.FlagZstd, uint32(len(packed))
			content, at = packed, -1 // elsewhere
		}
	}
	frame := p.begin()
	p.buf.N += wire.HeaderSize
	if p.buf.N != at {
		copy(p.buf.B[p.buf.N:], content)
	}
	h.Put(p.buf.B[frame:]) // last: what is copied may have lain where it goes
	p.buf.N += len(content)
	p.end(frame)
}

// begin leaves room for the check of a frame, if it has one, and returns where the frame begins.
func (p *packer) begin() int {
	if p.late {
		p.buf.N += wire.CheckFrameSize
	}
	return p.buf.N
}

// end puts the check before the frame that is whole now.
func (p *packer) end(frame int) {
	if p.late {
		wire.PutCheck(p.buf.B[frame-wire.CheckFrameSize:], p.buf.B[frame:p.buf.N])
	}
}

// putZero puts the noted run of zeros, if any, into the buffer.
func (p *packer) putZero() {
	if p.zero.Length == 0 {
		return
	}
	frame := p.begin()
	wire.PutZero(p.buf.B[frame:], uint16(p.device.index), p.zero.Offset, p.zero.Length)
	p.buf.N += wire.ZeroFrameSize
	p.end(frame)
	p.zero = block.Range{}
}

// flush sends what is in the buffer.
func (p *packer) flush() error {
	if p.buf == nil {
		return nil
	}
	p.putZero()
	if p.buf.N == 0 {
		return nil
	}
	b := p.buf
	p.buf = nil
	if p.urgent {
		if err := p.s.window.force(p.device.index, int64(b.N)); err != nil {
			b.Release()
			return err
		}
		return p.s.link.sendUrgent(b)
	}
	if err := p.s.window.acquire(p.device.index, int64(b.N)); err != nil {
		b.Release()
		return err
	}
	return p.s.link.sendBulk(b)
}

func (p *packer) drop() {
	if p.buf != nil {
		p.buf.Release()
		p.buf = nil
	}
	if p.spare != nil {
		p.spare.Release()
		p.spare = nil
	}
}
