package migrate

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/block"
)

var benchMiB = flag.Int64("migrate.mib", 256, "MiB of the device that BenchmarkMove moves")

// memfd is guest RAM as pkg/ram has it, seen through its descriptor.
type memfd struct {
	*os.File
	size int64
}

func newMemfd(tb testing.TB, size int64) memfd {
	fd, err := unix.MemfdCreate("drafter-bench", unix.MFD_CLOEXEC)
	if err != nil {
		tb.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "memfd")
	if err := f.Truncate(size); err != nil {
		tb.Fatal(err)
	}
	return memfd{f, size}
}

func (m memfd) Size() int64  { return m.size }
func (m memfd) Flush() error { return nil }
func (m memfd) Discard(off, n int64) error {
	return unix.Fallocate(int(m.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

func (m memfd) NextData(off int64) (block.Range, error) {
	from, err := unix.Seek(int(m.Fd()), off, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) {
		return block.Range{}, io.EOF
	}
	if err != nil {
		return block.Range{}, err
	}
	to, err := unix.Seek(int(m.Fd()), from, unix.SEEK_HOLE)
	return block.Range{Offset: from, Length: to - from}, err
}

// tcp returns n pairs of connections over loopback.
func tcp(tb testing.TB, n int) (a, b []io.ReadWriter) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	defer l.Close()
	for range n {
		x, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			tb.Fatal(err)
		}
		y, err := l.Accept()
		if err != nil {
			tb.Fatal(err)
		}
		a, b = append(a, x), append(b, y)
	}
	return a, b
}

// cpu is the processor time this process has used.
func cpu() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkMove moves a full memfd into an empty one over TCP loopback, next to io.Copy doing the same in the same run.
func BenchmarkMove(b *testing.B) {
	size := *benchMiB << 20
	full := newMemfd(b, size)
	defer full.Close()
	p := make([]byte, 1<<20)
	for off := int64(0); off < size; off += int64(len(p)) {
		fill(p, uint64(off))
		if _, err := full.WriteAt(p, off); err != nil {
			b.Fatal(err)
		}
	}
	measure := func(b *testing.B, f func(empty memfd)) {
		b.SetBytes(size)
		var spent time.Duration
		b.ResetTimer()
		for range b.N {
			b.StopTimer()
			empty := newMemfd(b, size)
			before := cpu()
			b.StartTimer()
			f(empty)
			b.StopTimer()
			spent += cpu() - before
			empty.Close()
			b.StartTimer()
		}
		b.ReportMetric(spent.Seconds()/float64(b.N)/float64(size)*(1<<30), "cpu-s/GiB")
	}
	b.Run("io.Copy", func(b *testing.B) {
		measure(b, func(empty memfd) {
			x, y := tcp(b, 1)
			var wg sync.WaitGroup
			wg.Go(func() {
				if _, err := io.Copy(x[0], io.NewSectionReader(full, 0, size)); err != nil {
					b.Error(err)
				}
				x[0].(net.Conn).Close()
			})
			if _, err := io.Copy(io.NewOffsetWriter(empty, 0), y[0]); err != nil {
				b.Error(err)
			}
			wg.Wait()
			y[0].(net.Conn).Close()
		})
	})
	for _, streams := range []int{1, 4} {
		b.Run(fmt.Sprintf("streams=%d", streams), func(b *testing.B) {
			b.ReportAllocs()
			measure(b, func(empty memfd) {
				r := newRig(nil)
				r.source.Devices = []SourceDevice{{Name: "memory", Device: full}}
				r.target.sizes["memory"] = size
				r.target.make = func(string, int64) block.Device { return empty }
				x, y := tcp(b, streams)
				if o := r.move(context.Background(), x, y); o.srcErr != nil || o.dstErr != nil {
					b.Fatal(o.srcErr, o.dstErr)
				}
			})
		})
	}
}

// BenchmarkDigest is what the check of contents costs on each side.
func BenchmarkDigest(b *testing.B) {
	p := make([]byte, 64<<10)
	fill(p, 1)
	d := newDigest(1 << 30)
	b.SetBytes(int64(len(p)))
	b.ReportAllocs()
	var off int64
	for b.Loop() {
		d.write(off, p)
		off = (off + int64(len(p))) % (1 << 30)
	}
}
