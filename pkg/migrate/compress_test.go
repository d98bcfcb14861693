package migrate

import (
	"bytes"
	"encoding/binary"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/wire"
)

// text is content that compresses to about a fifth, like much of a guest's memory.
func text(n int, seed uint64) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	words := strings.Fields("page frame inode vma slab kernel drafter migration buffer cache dentry 0x7f 0x00 root usr lib")
	var b bytes.Buffer
	for b.Len() < n {
		b.WriteString(words[r.IntN(len(words))])
		b.WriteByte(' ')
	}
	return b.Bytes()[:n]
}

func TestJudge(t *testing.T) {
	const mb = 1e6
	for _, c := range []struct {
		name string
		on   bool
		g    gains
		want bool
	}{
		{"100 Mbit/s, compressible", false, gains{12.5 * mb, 0.3, 400 * mb}, true},
		{"100 Mbit/s, random", false, gains{12.5 * mb, 1, 2000 * mb}, false},
		{"10 Gbit/s, one slow core", false, gains{1250 * mb, 0.3, 400 * mb}, false},
		{"10 Gbit/s, many cores", false, gains{1250 * mb, 0.3, 6400 * mb}, true},
		{"loopback", false, gains{2000 * mb, 0.3, 900 * mb}, false},
		{"gain is bound by the cores", false, gains{350 * mb, 0.1, 400 * mb}, false},
		{"gain is bound by the cores, on", true, gains{350 * mb, 0.1, 400 * mb}, true},
		{"little gain", false, gains{12.5 * mb, 0.87, 400 * mb}, false},
		{"little gain, on", true, gains{12.5 * mb, 0.87, 400 * mb}, true},
		{"no gain, on", true, gains{12.5 * mb, 0.95, 400 * mb}, false},
		{"link never seen", true, gains{0, 0.3, 400 * mb}, false},
		{"nothing compressed", true, gains{12.5 * mb, 0, 0}, false},
	} {
		if v := judge(c.on, c.g); v.on != c.want || v.reason == "" {
			t.Errorf("%s: got %+v, want %v", c.name, v, c.want)
		}
	}
}

// simulation runs a compressor in a time of its own: a worker that packs, and a writer that writes what it packed while
// the worker packs the next.
type simulation struct {
	*compressor
	clock   time.Time
	link    float64 // bytes per second it carries
	speed   float64 // bytes per second the worker compresses
	content func() []byte

	packed, plain int   // payloads
	bytes         int64 // of content that was sent
}

func newSimulation(link, speed float64, content []byte) *simulation {
	s := &simulation{clock: time.Unix(1e9, 0), link: link, speed: speed, content: func() []byte { return content }}
	var inPack bool
	s.compressor = newCompressor(1, 1, new(atomic.Int64), func() time.Time {
		// pack asks for the time before and after.
		t := s.clock
		if inPack {
			t = t.Add(time.Duration(float64(wire.MaxPayload) / s.speed * 1e9))
		}
		inPack = !inPack
		return t
	}, slog.New(slog.DiscardHandler))
	inPack = false
	s.encode = func(content, to []byte) []byte { // text to a fifth, and nothing else
		if content[0] == 'x' {
			return append(to, content...)
		}
		return append(to, content[:len(content)/5]...)
	}
	return s
}

func (s *simulation) run(d time.Duration) {
	s.packed, s.plain, s.bytes = 0, 0, 0
	scratch := make([]byte, 0, 2*wire.MaxPayload)
	for end := s.clock.Add(d); s.clock.Before(end); {
		content := s.content()
		n, worked := len(content), time.Duration(0)
		before := s.in.Load()
		payload := s.pack(scratch, content)
		if s.in.Load() != before {
			worked = time.Duration(float64(len(content)) / s.speed * 1e9)
			s.packed++
		} else {
			s.plain++
		}
		if payload != nil {
			n = len(payload)
		}
		wrote := time.Duration(float64(n) / s.link * 1e9)
		ended := s.clock.Add(wrote)
		s.clock = s.clock.Add(max(worked, wrote))
		s.wrote(n, ended.Add(-wrote), ended)
		s.bytes += int64(len(content))
	}
}

func (s *simulation) share() float64 { return float64(s.packed) / float64(s.packed+s.plain) }

func TestCompressorAdapts(t *testing.T) {
	compressible := make([]byte, wire.MaxPayload)
	random := bytes.Repeat([]byte{'x'}, wire.MaxPayload)

	t.Run("loopback is left alone", func(t *testing.T) {
		s := newSimulation(1.6e9, 400e6, compressible)
		s.run(10 * time.Second)
		if s.packed > 0 {
			t.Errorf("%d payloads compressed on a link no core can feed", s.packed)
		}
	})
	t.Run("fast link, where trying does not pay", func(t *testing.T) {
		s := newSimulation(700e6, 400e6, compressible)
		s.run(10 * time.Second)
		if cost := float64(s.packed) * wire.MaxPayload / s.speed / 10; s.packed == 0 || cost > 0.005 {
			t.Errorf("%d payloads compressed: %.2f %% of a core", s.packed, 100*cost)
		}
	})
	t.Run("slow link, compressible", func(t *testing.T) {
		s := newSimulation(12.5e6, 400e6, compressible)
		s.run(500 * time.Millisecond) // to find out
		s.run(30 * time.Second)
		if rate := float64(s.bytes) / 30; s.share() < 0.95 || rate < 2*s.link {
			t.Errorf("%.0f %% compressed, %.1f MB/s over a link of %.1f", 100*s.share(), rate/1e6, s.link/1e6)
		}
	})
	t.Run("slow link, random", func(t *testing.T) {
		s := newSimulation(12.5e6, 400e6, random)
		s.run(30 * time.Second)
		if s.packed == 0 || s.packed > 100 {
			t.Errorf("%d of %d payloads compressed", s.packed, s.packed+s.plain)
		}
	})
	t.Run("very slow link", func(t *testing.T) {
		s := newSimulation(125e3, 400e6, compressible)
		s.run(10 * time.Second)
		s.run(time.Minute)
		if s.share() < 0.95 {
			t.Errorf("%.0f %% compressed", 100*s.share())
		}
	})
	t.Run("contents change", func(t *testing.T) {
		s := newSimulation(12.5e6, 400e6, random)
		s.run(30 * time.Second)
		s.content = func() []byte { return compressible }
		s.run(compressRarest + time.Second)
		s.run(10 * time.Second)
		if s.share() < 0.95 {
			t.Errorf("compressible: %.0f %% compressed", 100*s.share())
		}
		s.content = func() []byte { return random }
		s.run(time.Second)
		s.run(20 * time.Second)
		if s.share() > 0.05 {
			t.Errorf("random again: %.0f %% compressed", 100*s.share())
		}
	})
	t.Run("link gets faster", func(t *testing.T) {
		s := newSimulation(12.5e6, 400e6, compressible)
		s.run(10 * time.Second)
		if compressMode(s.mode.Load()) != compressOn {
			t.Fatal("not on")
		}
		s.link = 2e9 // now the worker holds things up
		s.run(compressPatience + time.Second)
		s.run(10 * time.Second)
		if s.packed > 0 {
			t.Errorf("%.0f %% compressed", 100*s.share())
		}
	})
	t.Run("device holds things up", func(t *testing.T) {
		s := newSimulation(2e9, 400e6, compressible)
		scratch := make([]byte, 0, 2*wire.MaxPayload)
		for range 1000 { // the link takes each payload at once, and then there is nothing for a while
			s.pack(scratch, compressible)
			s.wrote(wire.MaxPayload, s.clock, s.clock.Add(50*time.Microsecond))
			s.clock = s.clock.Add(20 * time.Millisecond)
		}
		if s.in.Load() != 0 {
			t.Error("compressed, though the link was idle")
		}
	})
}

// always returns a compressor that compresses everything.
func always(workers int) *compressor {
	c := newCompressor(1, workers, new(atomic.Int64), time.Now, slog.New(slog.DiscardHandler))
	c.mode.Store(int32(compressOn))
	return c
}

func TestPackUnpack(t *testing.T) {
	c, d := always(2), newDecompressor(2)
	random := make([]byte, wire.MaxPayload)
	fill(random, 7)
	for _, content := range [][]byte{
		text(wire.MaxPayload, 2), text(wire.PageSize, 3), text(3*wire.PageSize, 4), text(100, 5), make([]byte, wire.MaxPayload),
		append(text(32<<10, 6), random[:32<<10]...),
	} {
		scratch := make([]byte, 0, 2*wire.MaxPayload)
		payload := c.pack(scratch, content)
		if payload == nil {
			t.Fatalf("%d bytes of text were not compressed", len(content))
		}
		if &payload[0] != &scratch[:1][0] {
			t.Error("payload is not in scratch")
		}
		n, err := unpackedSize(payload)
		if err != nil || n != len(content) {
			t.Fatalf("size: got %d, %v, want %d", n, err, len(content))
		}
		got := make([]byte, n)
		if err := d.unpack(got, payload); err != nil || !bytes.Equal(got, content) {
			t.Errorf("%d bytes do not come back: %v", len(content), err)
		}
	}
	if c.pack(make([]byte, 0, 2*wire.MaxPayload), random) != nil {
		t.Error("random content is sent compressed")
	}
	if c.saved.Load() <= 0 {
		t.Error("saved is not counted")
	}
}

// payloadOf is a compressed payload that says it has n bytes.
func payloadOf(n int, frame []byte) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(n)), frame...)
}

func frameOf(tb testing.TB, content []byte, opts ...zstd.EOption) []byte {
	e, err := zstd.NewWriter(nil, append([]zstd.EOption{zstd.WithEncoderConcurrency(1)}, opts...)...)
	if err != nil {
		tb.Fatal(err)
	}
	return e.EncodeAll(content, nil)
}

func TestUnpackRefuses(t *testing.T) {
	page := text(wire.PageSize, 1)
	var streamed bytes.Buffer // a bomb that does not say its size
	w, err := zstd.NewWriter(&streamed, zstd.WithWindowSize(64<<10))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(make([]byte, 64<<20)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	d := newDecompressor(1)
	honest := payloadOf(wire.MaxPayload, frameOf(t, make([]byte, wire.MaxPayload)))
	if err := d.unpack(make([]byte, wire.MaxPayload), honest); err != nil {
		t.Fatal(err)
	}
	for name, payload := range map[string][]byte{
		"empty":             {},
		"size alone":        payloadOf(4096, nil),
		"size 0":            payloadOf(0, frameOf(t, page)),
		"size too large":    payloadOf(wire.MaxPayload+1, frameOf(t, make([]byte, wire.MaxPayload+1))),
		"less than it says": payloadOf(8192, frameOf(t, page)),
		"more than it says": payloadOf(2048, frameOf(t, page)),
		"bomb":              payloadOf(wire.MaxPayload, frameOf(t, make([]byte, 64<<20))),
		"streamed bomb":     payloadOf(wire.MaxPayload, streamed.Bytes()),
		"large window":      payloadOf(wire.MaxPayload, frameOf(t, text(wire.MaxPayload, 1), zstd.WithWindowSize(8<<20), zstd.WithSingleSegment(false), zstd.WithEncoderConcurrency(1))[:20]),
		"truncated":         payloadOf(4096, frameOf(t, page)[:40]),
		"no zstd":           payloadOf(4096, page),
	} {
		n, err := unpackedSize(payload)
		if err == nil {
			content := make([]byte, n, n+16)
			copy(content[n:n+16], "0123456789abcdef")
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			err = d.unpack(content, payload)
			runtime.ReadMemStats(&after)
			if string(content[n:n+16]) != "0123456789abcdef" {
				t.Errorf("%s: wrote beyond the content", name)
			}
			if got := after.TotalAlloc - before.TotalAlloc; got > 1<<20 {
				t.Errorf("%s: took %d bytes of memory", name, got)
			}
		}
		if !errors.Is(err, wire.ErrMalformed) {
			t.Errorf("%s: got error %v", name, err)
		}
	}
}

func FuzzUnpack(f *testing.F) {
	f.Add(payloadOf(wire.PageSize, frameOf(f, text(wire.PageSize, 1))))
	f.Add(payloadOf(wire.MaxPayload, frameOf(f, make([]byte, wire.MaxPayload))))
	f.Add(payloadOf(wire.MaxPayload, frameOf(f, make([]byte, 1<<20))))
	f.Add(payloadOf(100, frameOf(f, make([]byte, 10))))
	f.Add([]byte{0, 0, 16, 0, 0x50, 0x2a, 0x4d, 0x18, 0, 0, 0, 0}) // a frame to skip
	d := newDecompressor(2)
	f.Fuzz(func(t *testing.T, payload []byte) {
		if len(payload) > wire.MaxPayload {
			return
		}
		n, err := unpackedSize(payload)
		if err != nil {
			return
		}
		content := bytes.Repeat([]byte{0xa5}, n+64)
		if d.unpack(content[:n], payload) != nil {
			n = 0
		}
		for _, b := range content[max(n, len(content)-64):] {
			if n > 0 && b != 0xa5 {
				t.Fatal("wrote beyond the content")
			}
		}
	})
}

// A whole migration over a slow link is faster, over a fast one untouched.
func TestMoveCompressed(t *testing.T) {
	for name, c := range map[string]struct {
		rate float64
		off  bool
		want time.Duration // at most, or, when it is off, at least
	}{
		"100 Mbit/s":      {12.5e6, false, 2 * time.Second},
		"100 Mbit/s, off": {12.5e6, true, 4900 * time.Millisecond},
		"10 Mbit/s":       {1.25e6, false, 25 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			size := int64(60 << 20)
			if c.rate < 5e6 {
				size /= 2
			}
			content := text(1<<20, 1)
			mem := block.NewMemory(size)
			for off := int64(0); off < size; off += int64(len(content)) {
				if _, err := mem.WriteAt(content, off); err != nil {
					t.Fatal(err)
				}
			}
			synctest.Test(t, func(t *testing.T) {
				r := newRig(nil)
				r.source.NoCompression = c.off
				r.source.Devices = []SourceDevice{{Name: "memory", Device: mem}}
				r.target.sizes["memory"] = size
				a, b := pipes(1)
				a[0] = &paced{a[0].(net.Conn), c.rate}
				o := r.move(t.Context(), a, b)
				if r.verify(t, o) != "destination" {
					t.Fatal(o.srcErr, o.dstErr)
				}
				if took := time.Duration(o.src.Total); took > c.want != c.off {
					t.Errorf("took %v", took)
				}
				if (o.src.SavedBytes > 0) == c.off || o.src.DataBytes != size {
					t.Errorf("%d bytes saved of %d", o.src.SavedBytes, o.src.DataBytes)
				}
			})
		})
	}
}

// Content that arrives late may be compressed too.
func TestPostCopyCompressed(t *testing.T) {
	const size = 20 << 20
	mem := block.NewMemory(size)
	for off := int64(0); off < size; off += 1 << 20 {
		if _, err := mem.WriteAt(text(1<<20, uint64(off)), off); err != nil {
			t.Fatal(err)
		}
	}
	synctest.Test(t, func(t *testing.T) {
		r := newRig(nil)
		r.source.NoCompression = false
		r.source.Devices = []SourceDevice{{Name: "memory", Device: mem, Tracker: &scripted{}}}
		r.target.sizes["memory"] = size
		late := r.postCopy(1)
		late.uses = 20
		a, b := pipes(2)
		for i := range a {
			a[i] = &paced{a[i].(net.Conn), 2e6}
		}
		o := r.move(t.Context(), a, b)
		if r.verify(t, o) != "destination" {
			t.Fatal(o.srcErr, o.dstErr)
		}
		if o.src.LateBytes < size || o.src.SavedBytes < size/2 {
			t.Errorf("%d bytes late, %d saved", o.src.LateBytes, o.src.SavedBytes)
		}
	})
}

// BenchmarkPack is what compression costs and gains. "off" is what a fast link pays for being able to.
func BenchmarkPack(b *testing.B) {
	random := make([]byte, wire.MaxPayload)
	fill(random, 1)
	scratch := make([]byte, 0, 2*wire.MaxPayload)
	for name, content := range map[string][]byte{"text": text(wire.MaxPayload, 1), "random": random, "page": text(wire.PageSize, 1)} {
		b.Run(name, func(b *testing.B) {
			c := always(1)
			b.SetBytes(int64(len(content)))
			b.ReportAllocs()
			for b.Loop() {
				c.pack(scratch, content)
			}
			b.ReportMetric(float64(c.out.Load())/float64(c.in.Load()), "ratio")
		})
	}
	b.Run("off", func(b *testing.B) {
		c := newCompressor(1, 1, new(atomic.Int64), time.Now, slog.New(slog.DiscardHandler))
		b.SetBytes(int64(len(random)))
		for b.Loop() {
			began := time.Now()
			c.pack(scratch, random)
			c.wrote(0, began, time.Now())
		}
	})
	b.Run("unpack", func(b *testing.B) {
		content := text(wire.MaxPayload, 1)
		payload := always(1).pack(scratch, content)
		d := newDecompressor(1)
		b.SetBytes(int64(len(content)))
		b.ReportAllocs()
		for b.Loop() {
			if err := d.unpack(content, payload); err != nil {
				b.Fatal(err)
			}
		}
	})
}
