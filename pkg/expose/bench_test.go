package expose

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/expose/nbdtest"
)

// benchFile is a device of 256 MiB full of data, on tmpfs where there is one, so that the disk is not what is measured.
func benchFile(b *testing.B) *block.File {
	b.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "nbd")
	if err != nil {
		dir = b.TempDir()
	}
	b.Cleanup(func() { _ = os.RemoveAll(dir) })
	f, err := block.CreateFile(filepath.Join(dir, "disk"), 256<<20)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = f.Close() })
	p := make([]byte, 1<<20)
	for i := range p {
		p[i] = byte(i * 7)
	}
	for off := int64(0); off < f.Size(); off += int64(len(p)) {
		if _, err := f.WriteAt(p, off); err != nil {
			b.Fatal(err)
		}
	}
	return f
}

type benchCase struct {
	size, depth int
	write       bool
}

func (c benchCase) String() string {
	kind := "read"
	if c.write {
		kind = "write"
	}
	return fmt.Sprintf("%s/%dk/QD%d", kind, c.size>>10, c.depth)
}

var benchCases = []benchCase{{4096, 1, false}, {4096, 32, false}, {1 << 20, 8, false}, {4096, 1, true}, {4096, 32, true}, {1 << 20, 8, true}}

// BenchmarkNBD measures the server with the client of nbdtest in the same process, which costs about as much as the server.
func BenchmarkNBD(b *testing.B) {
	f := benchFile(b)
	for _, c := range benchCases {
		b.Run(c.String(), func(b *testing.B) {
			client := dial(b, listen(b, NBDOptions{}, Export{Device: f}), "", nbdtest.Options{})
			b.SetBytes(int64(c.size))
			b.ReportAllocs()
			b.ResetTimer()
			var next atomic.Int64
			var wg sync.WaitGroup
			for range c.depth {
				wg.Go(func() {
					p := make([]byte, c.size)
					for i := next.Add(1); i <= int64(b.N); i = next.Add(1) {
						off := i * 7919 % (f.Size() / int64(c.size)) * int64(c.size)
						var err error
						if c.write {
							_, err = client.WriteAt(p, off)
						} else {
							_, err = client.ReadAt(p, off)
						}
						if err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "req/s")
		})
	}
}

// BenchmarkQEMU measures the server, and qemu-nbd beside it, with the client of QEMU, which has at most 16 requests in
// flight on a connection.
func BenchmarkQEMU(b *testing.B) {
	f := benchFile(b)
	reference := startQEMUNBD(b, f.Path())
	for _, c := range benchCases {
		for _, server := range []string{"drafter", "qemu-nbd"} {
			b.Run(c.String()+"/"+server, func(b *testing.B) {
				url := fmt.Sprintf("nbd+unix:///?socket=%s", reference)
				if server == "drafter" {
					url = nbdURL(listen(b, NBDOptions{}, Export{Name: "disk", Device: f}), "disk")
				}
				n := max(b.N, 16)
				args := []string{"bench", "-f", "raw", "-c", strconv.Itoa(n), "-d", strconv.Itoa(c.depth), "-s", strconv.Itoa(c.size), "-S", strconv.Itoa(c.size)}
				if c.write {
					args = append(args, "-w")
				}
				out := qemu(b, "qemu-img", append(args, url)...)
				m := regexp.MustCompile(`completed in ([0-9.]+) seconds`).FindStringSubmatch(out)
				if m == nil {
					b.Fatalf("qemu-img bench says\n%s", out)
				}
				seconds, err := strconv.ParseFloat(m[1], 64)
				if err != nil {
					b.Fatal(err)
				}
				b.ReportMetric(float64(n)/max(seconds, 0.001), "req/s")
				b.ReportMetric(float64(n)*float64(c.size)/max(seconds, 0.001)/1e9, "GB/s")
			})
		}
	}
}
