package backends

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/pkg/vmm"
	"github.com/drafter-vm/drafter/pkg/vmm/vmmtest"
)

// BenchmarkRound compares what a round of pre-copy, and its last, cost the guest by Firecracker's own means and by ours. Each time the guest has
// written 12 MiB of its 64.
//
//	go test -bench Round -benchtime 20x ./internal/backends
func BenchmarkRound(b *testing.B) {
	// Firecracker's: a pause, and a Diff snapshot from KVM's dirty log into a file in memory, each round and at the end.
	b.Run("diff", func(b *testing.B) {
		fc := startPlain(b)
		var paused time.Duration
		for n := range b.N {
			b.StopTimer()
			time.Sleep(100 * time.Millisecond) // the guest comes through its memory twice
			b.StartTimer()
			began := time.Now()
			fc.call(b, "PATCH", "/vm", `{"state":"Paused"}`)
			fc.call(b, "PUT", "/snapshot/create", fmt.Sprintf(`{"snapshot_type":"Diff","snapshot_path":"state","mem_file_path":"memory%d"}`, n))
			fc.call(b, "PATCH", "/vm", `{"state":"Resumed"}`)
			paused += time.Since(began)
			b.StopTimer()
			if err := os.Remove(filepath.Join(fc.dir, fmt.Sprintf("memory%d", n))); err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
		}
		b.ReportMetric(float64(paused.Microseconds())/1000/float64(b.N), "ms-paused/round")
	})
	// Ours: a scan while the guest runs, and at the end a pause, its state and the list of what is still dirty.
	b.Run("ours", func(b *testing.B) {
		v := start(b, backend(b), &vmm.Boot{Kernel: kernel(b)})
		v.goesOn(b, 0)
		ctx := b.Context()
		tracker := v.memory.Tracker()
		if err := tracker.Start(ctx); err != nil {
			b.Fatal(err)
		}
		var paused, scanned time.Duration
		for range b.N {
			b.StopTimer()
			time.Sleep(100 * time.Millisecond)
			b.StartTimer()
			began := time.Now()
			if _, err := tracker.Collect(ctx); err != nil {
				b.Fatal(err)
			}
			scanned += time.Since(began)
			began = time.Now()
			if err := v.Pause(ctx); err != nil {
				b.Fatal(err)
			}
			if err := v.Save(ctx, io.Discard); err != nil {
				b.Fatal(err)
			}
			if _, err := tracker.Collect(ctx); err != nil {
				b.Fatal(err)
			}
			if err := v.Resume(ctx); err != nil {
				b.Fatal(err)
			}
			paused += time.Since(began)
		}
		b.ReportMetric(float64(scanned.Microseconds())/1000/float64(b.N), "ms-scanned/round")
		b.ReportMetric(float64(paused.Microseconds())/1000/float64(b.N), "ms-paused/end")
	})
}

// plain is a Firecracker as anybody starts it.
type plain struct {
	dir  string
	http http.Client
}

func startPlain(b *testing.B) *plain {
	b.Helper()
	binary := vmmtest.Program(b, "firecracker", "FIRECRACKER_BIN")
	dir, err := os.MkdirTemp("/dev/shm", "fc")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { os.RemoveAll(dir) })
	cmd := exec.Command(binary, "--api-sock", "api.sock", "--id", "plain", "--level", "Error")
	cmd.Dir = dir
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	fc := &plain{dir: dir, http: http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(dir, "api.sock"))
	}}}}
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		if _, err := os.Stat(filepath.Join(dir, "api.sock")); err == nil {
			break
		} else if time.Now().After(end) {
			b.Fatal(err)
		}
	}
	fc.call(b, "PUT", "/machine-config", fmt.Sprintf(`{"vcpu_count":1,"mem_size_mib":%d,"track_dirty_pages":true}`, memorySize>>20))
	boot, err := json.Marshal(map[string]string{"kernel_image_path": kernel(b)})
	if err != nil {
		b.Fatal(err)
	}
	fc.call(b, "PUT", "/boot-source", string(boot))
	fc.call(b, "PUT", "/actions", `{"action_type":"InstanceStart"}`)
	return fc
}

func (fc *plain) call(b *testing.B, method, path, body string) {
	b.Helper()
	request, err := http.NewRequestWithContext(b.Context(), method, "http://localhost"+path, bytes.NewReader([]byte(body)))
	if err != nil {
		b.Fatal(err)
	}
	response, err := fc.http.Do(request)
	if err != nil {
		b.Fatal(err)
	}
	defer response.Body.Close()
	if answer, _ := io.ReadAll(response.Body); response.StatusCode >= 300 {
		b.Fatalf("%s %s: %s", method, path, answer)
	}
}
