package peer_test

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/drafter-vm/drafter/internal/testcert"
	"github.com/drafter-vm/drafter/internal/testpackage"
	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/peer"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/vmm/qemu"
)

// The examples run, on a package that is made for them. In a program of one's own these are out/package and a folder like out.
var packageDir, workDir string

// skipped is why the examples do not run: examples cannot say so themselves. ran counts the instances that they made.
var (
	skipped string
	ran     atomic.Int64
)

// TestExamples is where it is seen that the examples did not run, and why.
func TestExamples(t *testing.T) {
	if skipped != "" {
		t.Skip("the examples are skipped: " + skipped)
	}
}

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(run(m))
}

func run(m *testing.M) int {
	skipped = testpackage.WhyNot()
	if testing.Short() {
		skipped = "they boot real machines: left out with -short"
	}
	if skipped != "" {
		skip := flag.Lookup("test.skip").Value // may be given already
		skip.Set(strings.TrimPrefix(skip.String()+"|^Example", "|"))
		return m.Run()
	}
	var err error
	if workDir, err = os.MkdirTemp("", "dr"); err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(workDir)
	packageDir = filepath.Join(workDir, "package")
	if err := testpackage.Make(context.Background(), packageDir, testpackage.Config{}); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	status := m.Run()
	whole := flag.Lookup("test.run").Value.String() == "" && flag.Lookup("test.list").Value.String() == ""
	if status == 0 && whole && ran.Load() == 0 {
		fmt.Fprintln(os.Stderr, "the examples can run here, and did not")
		return 1
	}
	return status
}

// instance is the configuration of an instance of the package: everything but Backend and Devices has a default.
func instance(name string) (peer.Config, error) {
	ran.Add(1)
	devices, err := peer.PackageDevices(packageDir, filepath.Join(workDir, name))
	return peer.Config{
		Backend: qemu.New(qemu.Options{}),
		Devices: devices,
		Host:    runner.Host{Dir: filepath.Join(workDir, "vms")},
		Logger:  slog.New(slog.DiscardHandler),
	}, err
}

// An instance of a package runs where it was when the package was made. Closed, it is saved, and goes on from there the next time.
func ExampleResume() {
	ctx := context.Background()
	cfg, err := instance("resumed") // peer.PackageDevices("out/package", "out/resumed"), and qemu.New(qemu.Options{})
	if err != nil {
		log.Fatal(err)
	}
	p, err := peer.Resume(ctx, cfg)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("it runs:", p.Running())
	if err := p.Close(ctx); err != nil {
		log.Fatal(err)
	}
	// Output: it runs: true
}

// Any number of instances run from one package, which they share. Each has what it changes for itself.
func ExampleResume_ten() {
	ctx := context.Background()
	var clones []*peer.Peer
	for n := range 10 {
		cfg, err := instance(fmt.Sprintf("clone-%d", n))
		if err != nil {
			log.Fatal(err)
		}
		cfg.Clone = true // its agent is told that there are others
		p, err := peer.Resume(ctx, cfg)
		if err != nil {
			log.Fatal(err)
		}
		defer p.Kill() // nothing of these is kept
		clones = append(clones, p)
	}
	fmt.Println(len(clones), "run")
	// Output: 10 run
}

// A VM that runs can be cloned with all that it has become. It runs on.
func ExamplePeer_Clone() {
	ctx := context.Background()
	cfg, err := instance("original")
	if err != nil {
		log.Fatal(err)
	}
	p, err := peer.Resume(ctx, cfg)
	if err != nil {
		log.Fatal(err)
	}
	defer p.Kill()
	clone, err := p.Clone(ctx, filepath.Join(workDir, "clone"), peer.Config{Backend: cfg.Backend, Host: cfg.Host, Logger: cfg.Logger})
	if err != nil {
		log.Fatal(err)
	}
	defer clone.Kill()
	fmt.Println(p.Running(), clone.Running())
	// Output: true true
}

// Two peers in one process, and a pipe between them: whatever can be read and written carries a migration.
func ExamplePeer_Send() {
	ctx := context.Background()
	from, err := instance("source")
	if err != nil {
		log.Fatal(err)
	}
	to, err := instance("destination")
	if err != nil {
		log.Fatal(err)
	}
	source, err := peer.Resume(ctx, from)
	if err != nil {
		log.Fatal(err)
	}
	here, there := net.Pipe()
	var sending sync.WaitGroup
	sending.Go(func() {
		if _, err := source.Send(ctx, []io.ReadWriter{here}); err != nil {
			log.Fatal(err)
		}
	})
	destination, _, err := peer.Receive(ctx, to, []io.ReadWriter{there})
	if err != nil {
		log.Fatal(err)
	}
	defer destination.Kill()
	sending.Wait()
	fmt.Println("at the source:", source.Running())
	fmt.Println("at the destination:", destination.Running())
	if err := source.Close(ctx); err != nil {
		log.Fatal(err)
	}
	// Output:
	// at the source: false
	// at the destination: true
}

// Over mutual TLS each side knows who the other is, and decides what it may have.
func ExampleAuthorize() {
	ctx := context.Background()
	from, err := instance("secure-source")
	if err != nil {
		log.Fatal(err)
	}
	to, err := instance("secure-destination")
	if err != nil {
		log.Fatal(err)
	}
	// In a program of one's own: transport.Options{Certificate: "cert.pem", PrivateKey: "key.pem", Authorities: "ca.pem"}.
	ca := testcert.New(example{})
	server, _ := ca.Issue(example{}, nil, "localhost", "spiffe://example/source")
	client, _ := ca.Issue(example{}, nil, "spiffe://example/destination")
	from.Authorize = func(_ context.Context, r peer.Request) error {
		fmt.Println("asked over", r.Peer.Method)
		if !r.Peer.Is("spiffe://example/destination") {
			return fmt.Errorf("%s may not have this VM", r.Peer)
		}
		return nil
	}

	source, err := peer.Resume(ctx, from)
	if err != nil {
		log.Fatal(err)
	}
	l, err := server.Listen(ctx, "tls://localhost:0")
	if err != nil {
		log.Fatal(err)
	}
	lobby := peer.NewLobby(l, from.Logger) // which sorts out the connections of those that come
	defer lobby.Close()
	var sending sync.WaitGroup
	sending.Go(func() {
		a := <-lobby.New
		if _, err := source.Send(ctx, a.Streams); err != nil {
			log.Fatal(err)
		}
	})
	streams, err := peer.DialStreams(ctx, 2, func(ctx context.Context) (net.Conn, error) {
		return client.Dial(ctx, fmt.Sprintf("tls://localhost:%d", l.Addr().(*net.TCPAddr).Port))
	})
	if err != nil {
		log.Fatal(err)
	}
	destination, _, err := peer.Receive(ctx, to, streams)
	if err != nil {
		log.Fatal(err)
	}
	defer destination.Kill()
	sending.Wait()
	fmt.Println("it runs:", destination.Running())
	if err := source.Close(ctx); err != nil {
		log.Fatal(err)
	}
	// Output:
	// asked over tls
	// it runs: true
}

// example is what package testcert wants of a test.
type example struct{}

func (example) Helper()           {}
func (example) Fatal(args ...any) { log.Fatal(args...) }
func (example) TempDir() string {
	dir, err := os.MkdirTemp(workDir, "")
	if err != nil {
		log.Fatal(err)
	}
	return dir
}

// The progress of a migration, for whoever asks by HTTP.
func ExampleConfig_progress() {
	ctx := context.Background()
	from, err := instance("watched-source")
	if err != nil {
		log.Fatal(err)
	}
	to, err := instance("watched-destination")
	if err != nil {
		log.Fatal(err)
	}
	var mu sync.Mutex // guards latest
	var latest migrate.Progress
	from.Progress = func(p migrate.Progress) {
		mu.Lock()
		defer mu.Unlock()
		latest = p
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		json.NewEncoder(w).Encode(latest)
	}))
	defer server.Close()

	source, err := peer.Resume(ctx, from)
	if err != nil {
		log.Fatal(err)
	}
	here, there := net.Pipe()
	var sending sync.WaitGroup
	sending.Go(func() { source.Send(ctx, []io.ReadWriter{here}) })
	destination, _, err := peer.Receive(ctx, to, []io.ReadWriter{there})
	if err != nil {
		log.Fatal(err)
	}
	defer destination.Kill()
	sending.Wait()
	if err := source.Close(ctx); err != nil {
		log.Fatal(err)
	}

	answer, err := http.Get(server.URL)
	if err != nil {
		log.Fatal(err)
	}
	defer answer.Body.Close()
	var p migrate.Progress
	if err := json.NewDecoder(answer.Body).Decode(&p); err != nil {
		log.Fatal(err)
	}
	fmt.Println(p.Role, p.State, p.Data > 0)
	// Output: source moved true
}
