package migrate

import (
	"encoding/binary"
	"fmt"
	"log/slog"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/drafter-vm/drafter/pkg/wire"
)

// compressor compresses content where that makes a migration faster, and finds out whether it does. One serves all
// workers and streams of a link, as all streams take from one queue.
//
// It is off until the link has been seen to be what everything waits for: writers spend most of their time in Write. Then
// it compresses a few payloads, learns what that gains and costs on this machine with these contents, and judge says
// whether to go on. While it is on, it goes on measuring; while it is off, it tries again, ever more rarely. A link that
// is faster than any core compresses is never even tried. So a fast link pays for a look at the clock per write, and a
// slow one carries what it can.
//
// It owns no goroutine: writers bring the clock forward by telling what they wrote.
type compressor struct {
	streams int
	workers int // that can compress at the same time
	now     func() time.Time
	log     *slog.Logger

	encode func(content, to []byte) []byte // appends the compressed content to to

	mode atomic.Int32 // a compressMode
	try  atomic.Int32 // payloads left to compress in compressTry

	// What was measured since the last step.
	wire, busy      atomic.Int64 // bytes written, nanoseconds spent on it, over all streams
	in, out, effort atomic.Int64 // bytes compressed, what became of them, nanoseconds spent on it, over all workers

	saved *atomic.Int64 // bytes that did not have to be sent

	next  atomic.Int64 // nanoseconds since epoch: when a writer takes the next step
	mu    sync.Mutex   // held during a step; guards what follows
	last  time.Time    // of the last step
	link  float64      // bytes per second when it last was what everything waited for; 0: never
	seen  time.Time    // when that was
	again time.Time    // off: when to try again
	wait  time.Duration
}

type compressMode int32

const (
	compressOff compressMode = iota
	compressTry              // a few payloads, for a sample
	compressOn
)

const (
	compressStep     = 200 * time.Millisecond // between two looks at what was measured
	compressPayloads = 8                      // make a sample
	compressPatience = 5 * time.Second        // on: how long to believe a link's speed that was not seen again
	compressFirst    = 250 * time.Millisecond // off: before the second try; doubled with each failure
	compressRarest   = 10 * time.Second       // off: between tries at last
	compressLeast    = 16 << 10               // bytes: an interval with less says nothing

	// compressCeiling is how many bytes a second the encoder never reaches on one core with anything that is worth it.
	compressCeiling = 1 << 30
	// compressBusy is the share of their time that writers spend in Write when the link is what everything waits for.
	// Streams that are kept free for urgent content count as idle writers.
	compressBusy = 0.4
)

// newCompressor returns a compressor for a link of some streams, fed by some workers. It adds what it saves to saved. now is
// time.Now but for tests.
func newCompressor(streams, workers int, saved *atomic.Int64, now func() time.Time, log *slog.Logger) *compressor {
	workers = max(1, min(workers, runtime.GOMAXPROCS(0)))
	c := &compressor{streams: streams, workers: workers, saved: saved, now: now, log: log, last: now(), wait: compressFirst}
	c.again = c.last
	c.next.Store(c.last.Add(compressStep).UnixNano())
	encoder := sync.OnceValue(func() *zstd.Encoder { // when first needed; it keeps a state for each worker
		e, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(workers),
			zstd.WithWindowSize(wire.MaxPayload), zstd.WithEncoderCRC(false), zstd.WithLowerEncoderMem(true))
		if err != nil {
			panic(err) // the options are constants
		}
		return e
	})
	c.encode = func(content, to []byte) []byte { return encoder().EncodeAll(content, to) }
	return c
}

// compressedHead is the length in bytes of what precedes the zstd frame in a compressed payload: the length of the content.
const compressedHead = 4

// wanted reports whether content is to be given to pack. A nil compressor wants none.
func (c *compressor) wanted() bool { return c != nil && compressMode(c.mode.Load()) != compressOff }

// pack compresses content, of at most wire.MaxPayload bytes, as the payload of a Data frame, if that is worth it now.
// The payload is put into scratch, which has room for wire.MaxPayload bytes and some; nil says that the content goes as
// it is.
func (c *compressor) pack(scratch, content []byte) []byte {
	switch compressMode(c.mode.Load()) {
	case compressOff:
		return nil
	case compressTry:
		if c.try.Add(-1) < 0 {
			return nil
		}
	}
	began := c.now()
	payload := binary.BigEndian.AppendUint32(scratch[:0], uint32(len(content)))
	payload = c.encode(content, payload)
	if len(payload) > len(content)-len(content)/16 {
		payload = nil // the other side's time is worth more
	}
	out := len(content)
	if payload != nil {
		out = len(payload)
		c.saved.Add(int64(len(content) - len(payload)))
	}
	c.effort.Add(int64(c.now().Sub(began)))
	c.out.Add(int64(out))
	c.in.Add(int64(len(content))) // last: a step that sees it sees the others
	return payload
}

// wrote notes that a stream took n bytes from began to ended.
func (c *compressor) wrote(n int, began, ended time.Time) {
	c.wire.Add(int64(n))
	c.busy.Add(int64(ended.Sub(began)))
	if ended.UnixNano() < c.next.Load() || !c.mu.TryLock() {
		return
	}
	defer c.mu.Unlock()
	c.step(ended)
}

// step looks at what was measured since the last one, and decides what workers do until the next.
func (c *compressor) step(now time.Time) {
	span := now.Sub(c.last)
	if span < compressStep {
		return // another writer was first
	}
	c.last = now
	c.next.Store(now.Add(compressStep).UnixNano())
	wire, busy := c.wire.Swap(0), c.busy.Swap(0)
	if wire >= compressLeast && float64(busy) >= compressBusy*float64(span)*float64(c.streams) {
		c.link, c.seen = float64(wire)/span.Seconds(), now
	}

	mode := compressMode(c.mode.Load())
	if mode == compressOff {
		if c.seen != now || now.Before(c.again) || c.link*compressGain > compressCeiling*float64(c.workers) {
			return
		}
		c.try.Store(compressPayloads)
		c.mode.Store(int32(compressTry))
		return
	}
	if mode == compressTry && c.try.Load() > 0 {
		return
	}
	in, out, effort := c.in.Swap(0), c.out.Swap(0), c.effort.Swap(0)
	if in < compressLeast {
		return
	}
	v := judge(mode == compressOn, gains{
		link: c.link, ratio: float64(out) / float64(in),
		speed: float64(c.workers) * float64(in) / time.Duration(max(effort, 1)).Seconds(),
	})
	if v.on && now.Sub(c.seen) > compressPatience {
		// The link no longer is what everything waits for. Perhaps it got faster: only without compression is that seen.
		v = verdict{false, "the link's speed is to be measured again"}
		c.again = now
	} else if v.on {
		c.wait = compressFirst
	} else {
		c.again, c.wait = now.Add(c.wait), min(2*c.wait, compressRarest)
	}
	to := compressOff
	if v.on {
		to = compressOn
	}
	if to != mode {
		c.log.Debug("compression", "on", v.on, "reason", v.reason)
	}
	c.mode.Store(int32(to))
}

// gains is what compression would do, or does.
type gains struct {
	link  float64 // bytes per second that the link carries
	ratio float64 // compressed by plain size
	speed float64 // bytes per second that all workers together compress
}

type verdict struct {
	on     bool
	reason string // for the log
}

const (
	compressGain = 1.2 // times as fast a migration must become to make it worth the processor's time
	compressKeep = 1.1 // times as fast as it must be to go on
)

// judge says whether to compress, given whether that is done already. It is a pure function.
//
// Compressed content travels as fast as the link carries what is left of it, and no faster than it is compressed.
func judge(on bool, g gains) verdict {
	if g.link <= 0 || g.ratio <= 0 {
		return verdict{false, "the link is not what the migration waits for"}
	}
	gain := min(g.link/g.ratio, g.speed) / g.link
	need := compressGain
	if on {
		need = compressKeep
	}
	return verdict{gain >= need, fmt.Sprintf("%.2f times as fast: %.0f MB/s link, %.0f MB/s compressed to %.0f %%",
		gain, g.link/1e6, g.speed/1e6, 100*g.ratio)}
}

// decompressor undoes what a compressor did. All methods may be called concurrently. It owns no goroutine.
type decompressor struct {
	decoder func() *zstd.Decoder
}

func newDecompressor(workers int) *decompressor {
	return &decompressor{decoder: sync.OnceValue(func() *zstd.Decoder {
		d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(max(1, workers)), zstd.WithDecoderLowmem(true),
			zstd.WithDecoderMaxWindow(wire.MaxPayload), zstd.WithDecoderMaxMemory(wire.MaxPayload), zstd.WithDecodeAllCapLimit(true))
		if err != nil {
			panic(err) // the options are constants
		}
		return d
	})}
}

// unpackedSize returns the length, in bytes, of the content that a compressed payload says it holds.
func unpackedSize(payload []byte) (int, error) {
	if len(payload) <= compressedHead {
		return 0, fmt.Errorf("%w: compressed data of %d bytes", wire.ErrMalformed, len(payload))
	}
	n := binary.BigEndian.Uint32(payload)
	if n == 0 || n > wire.MaxPayload {
		return 0, fmt.Errorf("%w: compressed data of %d bytes, allowed are 1 to %d", wire.ErrMalformed, n, wire.MaxPayload)
	}
	return int(n), nil
}

// unpack decompresses a payload into content, whose length is what unpackedSize says. Whatever the payload is, nothing
// beyond content is written, and no more memory is taken than for an honest one.
func (d *decompressor) unpack(content, payload []byte) error {
	out, err := d.decoder().DecodeAll(payload[compressedHead:], content[:0:len(content)])
	if err != nil {
		return fmt.Errorf("%w: compressed data: %w", wire.ErrMalformed, err)
	}
	if len(out) != len(content) {
		return fmt.Errorf("%w: compressed data has %d bytes and says %d", wire.ErrMalformed, len(out), len(content))
	}
	return nil
}
