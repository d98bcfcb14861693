package ram

import (
	"bytes"
	"fmt"
	"io"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/pkg/block"
)

const benchSize = 1 << 30

// BenchmarkCollect is one round of tracking of 1 GiB, for different shares of pages written since the last.
func BenchmarkCollect(b *testing.B) {
	needFull(b)
	for _, rung := range []Rung{Full, Eager} {
		mem := create(b, benchSize)
		v := startVMM(b, mem, Options{Limit: rung})
		v.attach(mem)
		v.do("dirty 100")
		tr := mem.Tracker()
		if err := tr.Start(b.Context()); err != nil {
			b.Fatal(err)
		}
		collect(b, tr)
		buf := make([]byte, 1<<20)
		dev := mem.Device()
		read := func() { // hashing wants everything to have been read
			for off := int64(0); rung != Full && off < benchSize; off += int64(len(buf)) {
				if _, err := dev.ReadAt(buf, off); err != nil {
					b.Fatal(err)
				}
			}
		}
		for _, percent := range []int{0, 5, 100} {
			b.Run(fmt.Sprintf("%s/dirty=%d%%", mem.Capabilities().Tracking, percent), func(b *testing.B) {
				for b.Loop() {
					b.StopTimer()
					read()
					v.do("dirty %d", percent)
					b.StartTimer()
					ranges, err := tr.Collect(b.Context())
					if err != nil {
						b.Fatal(err)
					}
					b.StopTimer()
					if got, want := len(pagesOf(ranges)), benchSize/pageSize*percent/100; got < want {
						b.Fatalf("%d pages reported, want %d", got, want)
					}
					b.StartTimer()
				}
				b.ReportMetric(b.Elapsed().Seconds()*1e3/float64(b.N), "ms/GiB")
			})
		}
		if err := tr.Stop(); err != nil {
			b.Error(err)
		}
		v.kill()
		if err := mem.Close(); err != nil {
			b.Error(err)
		}
	}
}

// BenchmarkTrackerStart arms and disarms tracking of 1 GiB that is all populated.
func BenchmarkTrackerStart(b *testing.B) {
	needFull(b)
	mem := create(b, benchSize)
	v := startVMM(b, mem, Options{})
	v.attach(mem)
	v.do("dirty 100")
	tr := mem.Tracker()
	var start time.Duration
	for b.Loop() {
		began := time.Now()
		if err := tr.Start(b.Context()); err != nil {
			b.Fatal(err)
		}
		start += time.Since(began)
		if err := tr.Stop(); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(start.Seconds()*1e3/float64(b.N), "start-ms/GiB")
}

// BenchmarkFault is the time a thread of the VMM waits for one page, as measured there.
func BenchmarkFault(b *testing.B) {
	needFull(b)
	const size, faults = 512 << 20, 5000
	data := contents(size, 1)
	for _, test := range []struct {
		name string
		opts FillOptions
	}{
		{"quiet", FillOptions{OnDemand: true, ReadAround: -1}},
		{"read around", FillOptions{OnDemand: true}},
		{"full background", FillOptions{}},
		{"full background, no read around", FillOptions{ReadAround: -1}},
		{"full background, chunk=64K", FillOptions{Chunk: 64 << 10}},
		{"full background, no read around, chunk=64K", FillOptions{ReadAround: -1, Chunk: 64 << 10}},
	} {
		b.Run(test.name, func(b *testing.B) {
			var sum [3]float64
			for b.Loop() {
				mem := create(b, size)
				v := startVMM(b, mem, Options{})
				v.attach(mem)
				f := startFill(b, mem, newSource(data), test.opts)
				var p [3]float64
				fmt.Sscan(v.ask("faults %d 1", faults), &p[0], &p[1], &p[2])
				for i := range p {
					sum[i] += p[i]
				}
				if b.N == 1 {
					b.Logf("%+v", f.Stats())
				}
				v.kill()
				_ = f.Wait(testContext(b))
				if err := mem.Close(); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(sum[0]/float64(b.N), "p50-ns")
			b.ReportMetric(sum[1]/float64(b.N), "p99-ns")
			b.ReportMetric(sum[2]/float64(b.N), "mean-ns")
		})
	}
}

// BenchmarkFill is filling 512 MiB in the background, from memory and from another memfd.
func BenchmarkFill(b *testing.B) {
	const size = 512 << 20
	data := make([]byte, size)
	for i := range data {
		data[i] = byte(i>>12) | 1
	}
	memfd := create(b, size)
	if _, err := memfd.Device().WriteAt(data, 0); err != nil {
		b.Fatal(err)
	}
	for _, test := range []struct {
		name string
		src  io.ReaderAt
		opts FillOptions
	}{
		{"memory", newSource(data), FillOptions{}},
		{"memfd", memfd.Device(), FillOptions{}},
		{"memfd/streams=2", memfd.Device(), FillOptions{Streams: 2}},
		{"memfd/chunk=1M", memfd.Device(), FillOptions{Chunk: 1 << 20}},
		{"memfd/chunk=64K", memfd.Device(), FillOptions{Chunk: 64 << 10}},
	} {
		b.Run(test.name, func(b *testing.B) {
			b.SetBytes(size)
			for b.Loop() {
				mem := create(b, size)
				wait(b, startFill(b, mem, test.src, test.opts))
				if err := mem.Close(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkSpawn is what planting a userfaultfd adds to starting a process.
func BenchmarkSpawn(b *testing.B) {
	for _, limit := range []Rung{Full, Eager} {
		b.Run(limit.String(), func(b *testing.B) {
			for b.Loop() {
				cmd := vmmCommand(nil)
				h, err := Spawn(cmd, Options{Limit: limit})
				if err != nil {
					b.Fatal(err)
				}
				_ = cmd.Process.Kill()
				_ = cmd.Wait()
				h.Close()
			}
		})
	}
}

// BenchmarkPostpone measures what it takes to begin to receive scattered pages of a full memory: it is a part of the downtime
// of a migration. "anticipated" is for pages that were discarded before.
func BenchmarkPostpone(b *testing.B) {
	const size, pages = 256 << 20, 10_000
	for _, anticipated := range []bool{false, true} {
		b.Run(map[bool]string{false: "at once", true: "anticipated"}[anticipated], func(b *testing.B) {
			var ranges []block.Range
			for n := range int64(pages) {
				ranges = append(ranges, block.Range{Offset: n * (size / pages) / pageSize * pageSize, Length: pageSize})
			}
			content := bytes.Repeat([]byte{1}, size)
			for b.Loop() {
				b.StopTimer()
				m, err := Create("postpone", size)
				if err != nil {
					b.Fatal(err)
				}
				if _, err := m.Device().WriteAt(content, 0); err != nil {
					b.Fatal(err)
				}
				if anticipated {
					for _, r := range ranges {
						if err := m.Device().Discard(r.Offset, r.Length); err != nil {
							b.Fatal(err)
						}
					}
				}
				b.StartTimer()
				if _, err := m.Receive(b.Context(), func(int64) {}, FillOptions{Ranges: ranges}); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				m.Close()
				b.StartTimer()
			}
			b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N)/pages, "µs/page")
		})
	}
}
