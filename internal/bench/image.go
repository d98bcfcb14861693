package main

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"

	"github.com/drafter-vm/drafter/internal/testimage"
	"github.com/drafter-vm/drafter/internal/testregistry"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
)

func imageCase() benchCase {
	return benchCase{
		name: "image", about: "from an image in a registry, over 20 Mbit/s, to its application's port: run before it has been fetched, beside fetched, made a disk, and booted",
		run: func(ctx context.Context, b *bench) ([]Row, error) {
			if err := needRoot(); err != nil {
				return nil, err
			}
			if _, err := exec.LookPath("skopeo"); err != nil {
				return nil, fmt.Errorf("%w: run make depend", err)
			}
			return benchImage(ctx, b, "image")
		},
	}
}

const imageRate = 20e6 // bits per second to the registry

func benchImage(ctx context.Context, b *bench, name string) (rows []Row, err error) {
	ends := &serverEnds{}
	defer func() {
		if failed, ok := recover().(serverFailure); ok {
			err = errors.New(string(failed))
		}
		err = errors.Join(err, ends.close())
	}()
	if err := os.MkdirAll(b.path("bench"), 0o755); err != nil {
		return nil, err
	}
	if ends.folder, err = os.MkdirTemp(b.path("bench"), "image-"); err != nil {
		return nil, err
	}
	server := testregistry.Start(ends, testregistry.Options{})
	way, err := newLink(server.Address, imageRate)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, way.close()) }()
	size := 48 * mib
	if b.quick {
		size = 4 * mib
	}
	if err := pushBenchImage(ctx, ends, size, server.Address+"/web:1"); err != nil {
		return nil, err
	}
	drafter := filepath.Join(b.bin, "drafter")
	blueprint := b.path("bench", "blueprint-oci")
	if err := command(ctx, drafter, "blueprint", "--oci", "--output", blueprint); err != nil {
		return nil, err
	}

	image := way.address() + "/web:1"
	var lazily, lazyBytes, wholly, whole []float64
	for i := range b.samples {
		took, passed, err := answerOf(ctx, way, nil, func(ctx context.Context, console io.Writer) (*peerProcess, error) {
			cmd := exec.CommandContext(ctx, drafter, "oci", "run", "--blueprint", blueprint, "--netns", "", "--interface", "", "--memory", "512M", "--resume-timeout", "5m",
				"--chroot-base-dir", b.path("bench", "vms"), "--instance", filepath.Join(ends.folder, "lazy"), image)
			cmd.Stdout = console
			return startPeerProcess(cmd, "oci run", "")
		})
		if err := errors.Join(err, os.RemoveAll(filepath.Join(ends.folder, "lazy"))); err != nil {
			return nil, fmt.Errorf("run: %w", err)
		}
		lazily, lazyBytes = append(lazily, milliseconds(took)), append(lazyBytes, passed)
		disk := filepath.Join(ends.folder, "whole", "oci.ext4")
		took, passed, err = answerOf(ctx, way, func() error {
			return command(ctx, drafter, "oci", "build", "--disk-output", disk, image)
		}, func(ctx context.Context, console io.Writer) (*peerProcess, error) {
			cmd := exec.CommandContext(ctx, drafter, "snapshotter", "--netns", "", "--interface", "", "--memory-size", "512", "--resume-timeout", "5m",
				"--chroot-base-dir", b.path("bench", "vms"), "--devices", bootDevices(blueprint, filepath.Dir(disk)))
			cmd.Stdout = console
			return startPeerProcess(cmd, "snapshotter", "")
		})
		if err := errors.Join(err, os.RemoveAll(filepath.Join(ends.folder, "whole"))); err != nil {
			return nil, fmt.Errorf("fetch, then boot: %w", err)
		}
		wholly, whole = append(wholly, milliseconds(took)), append(whole, passed)
		b.say("%s: %d/%d run: ready after %.0f ms and %.1f MiB; fetched, then booted: after %.0f ms and %.1f MiB", name, i+1, b.samples, lazily[i], lazyBytes[i], wholly[i], whole[i])
	}
	const reference = "fetched, then booted"
	return []Row{
		newRow(name, "run, to the application's port", "ms", less, lazily, wholly, reference, goal{}),
		newRow(name, "run, fetched until then", "MiB", less, lazyBytes, whole, reference, goal{}),
	}, nil
}

// pushBenchImage puts a web application into a registry, with a layer of what it does not read, in the format whose files can be fetched one by one.
func pushBenchImage(ctx context.Context, ends *serverEnds, size int, name string) error {
	data := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(data)
	layer, err := testimage.Layer([]testimage.File{{Header: tar.Header{Name: "srv/model.bin", Mode: 0o644}, Data: string(data)}})
	if err != nil {
		return err
	}
	image, err := mutate.AppendLayers(testimage.Make(testimageT{ends}, testimage.Python()), layer)
	if err != nil {
		return err
	}
	dir := filepath.Join(ends.folder, "layout")
	testimage.WriteLayout(testimageT{ends}, dir, "latest", v1.Image(image))
	return command(ctx, "skopeo", "--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false", "--dest-compress-format", "zstd:chunked", "oci:"+dir+":latest", "docker://"+name)
}

// testimageT is what testimage asks of a test.
type testimageT struct{ *serverEnds }

func (t testimageT) Fatalf(format string, args ...any) { t.Fatal(fmt.Sprintf(format, args...)) }

// bootDevices are the devices of a snapshot of the blueprint and a disk that is in the folder.
func bootDevices(blueprint, folder string) string {
	var devices []map[string]string
	for _, name := range vmpackage.KnownNames() {
		d := map[string]string{"name": name, "output": filepath.Join(folder, vmpackage.DefaultFile(name))}
		switch name {
		case "kernel", "initrd", "disk":
			d["input"] = filepath.Join(blueprint, vmpackage.DefaultFile(name))
		}
		devices = append(devices, d)
	}
	text, _ := json.Marshal(devices) // strings only: cannot fail
	return string(text)
}

// answerOf measures from the beginning of before until the guest that start boots has an application that listens, and how many MiB pass for that.
func answerOf(ctx context.Context, way *link, before func() error, start func(ctx context.Context, console io.Writer) (*peerProcess, error)) (took time.Duration, passed float64, err error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute) // none takes so long unless something hangs
	defer cancel()
	had, began := way.passed(), time.Now()
	if before != nil {
		if err := before(); err != nil {
			return 0, 0, err
		}
	}
	console := &readyConsole{ready: make(chan struct{})}
	p, err := start(ctx, console)
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, p.stop()) }()
	select {
	case <-console.ready:
		return time.Since(began), float64(way.passed()-had) / mib, nil
	case <-p.ended:
		return 0, 0, fmt.Errorf("%s ended before its guest was ready: %w", p.name, p.err)
	case <-ctx.Done():
		return 0, 0, fmt.Errorf("%s: its guest is not ready: %w", p.name, ctx.Err())
	}
}

// readyConsole is a guest's console, which waits for what the application says when it begins to listen.
type readyConsole struct {
	ready chan struct{}

	mu   sync.Mutex // guards what follows
	said strings.Builder
	once sync.Once
}

func (c *readyConsole) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.said.Write(p)
	if strings.Contains(c.said.String(), "oci: listening") {
		c.once.Do(func() { close(c.ready) })
	}
	return len(p), nil
}
