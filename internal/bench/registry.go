package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/drafter-vm/drafter/internal/testguest"
	"github.com/drafter-vm/drafter/internal/testregistry"
	"github.com/drafter-vm/drafter/pkg/registry"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
)

func registryCase() benchCase {
	return benchCase{
		name: "registry", about: "from a package in a registry, over 100 Mbit/s, to the guest's first answer: run lazily, beside pulled and then started; and what a second package of the same base sends",
		run: func(ctx context.Context, b *bench) ([]Row, error) {
			if err := needRoot(); err != nil {
				return nil, err
			}
			pkg, err := tinyPackage(ctx, b, 128*mib)
			if err != nil {
				return nil, err
			}
			return benchRegistry(ctx, b, "registry", pkg)
		},
	}
}

const registryRate = 100e6 // bits per second to the registry

func benchRegistry(ctx context.Context, b *bench, name, pkg string) (rows []Row, err error) {
	ends := &serverEnds{}
	defer func() {
		if failed, ok := recover().(serverFailure); ok {
			err = errors.New(string(failed))
		}
		err = errors.Join(err, ends.close())
	}()
	if ends.folder, err = os.MkdirTemp(b.path("bench"), "registry-"); err != nil {
		return nil, err
	}
	server := testregistry.Start(ends, testregistry.Options{})
	way, err := newLink(server.Address, registryRate)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, way.close()) }()

	// The package has a disk with something on it, which a guest does not read at once; so has a second one, with a little that is other.
	size := 64 * mib
	if b.quick {
		size = 8 * mib
	}
	folders := []string{filepath.Join(ends.folder, "first"), filepath.Join(ends.folder, "second")}
	for n, folder := range folders {
		if out, err := exec.CommandContext(ctx, "cp", "-aT", "--sparse=always", pkg, folder).CombinedOutput(); err != nil {
			return nil, fmt.Errorf("copy package: %w: %s", err, out)
		}
		if err := fillDisk(ctx, folder, size, n); err != nil {
			return nil, err
		}
	}
	ref := func(address, tag string) registry.Reference {
		return registry.Reference{Host: address, Repository: "bench/vm", Tag: tag}
	}
	first, err := registry.Push(ctx, folders[0], ref(server.Address, "1"), registry.PushOptions{Transport: registry.Transport{Logger: quiet}})
	if err != nil {
		return nil, err
	}
	second, err := registry.Push(ctx, folders[1], ref(server.Address, "2"), registry.PushOptions{
		Transport: registry.Transport{Logger: quiet}, Bases: []registry.Reference{ref(server.Address, "1")},
	})
	if err != nil {
		return nil, err
	}

	var lazily, lazyBytes, wholly, whole []float64
	for i := range b.samples {
		took, passed, err := runFromRegistry(ctx, b, way, ref(way.address(), "1").String(), filepath.Join(ends.folder, "lazy"), true)
		if err != nil {
			return nil, fmt.Errorf("run: %w", err)
		}
		lazily, lazyBytes = append(lazily, milliseconds(took)), append(lazyBytes, passed)
		if took, passed, err = runFromRegistry(ctx, b, way, ref(way.address(), "1").String(), filepath.Join(ends.folder, "whole"), false); err != nil {
			return nil, fmt.Errorf("pull, then start: %w", err)
		}
		wholly, whole = append(wholly, milliseconds(took)), append(whole, passed)
		b.say("%s: %d/%d run: answers after %.0f ms and %.1f MiB; pulled, then started: after %.0f ms and %.1f MiB", name, i+1, b.samples, lazily[i], lazyBytes[i], wholly[i], whole[i])
	}
	const reference = "pulled, then started"
	return []Row{
		newRow(name, "run, to the guest's answer", "ms", less, lazily, wholly, reference, goal{}),
		newRow(name, "run, fetched until then", "MiB", less, lazyBytes, whole, reference, goal{}),
		newRow(name, "a second package of the same base, sent", "MiB", less, []float64{float64(second.Sent) / mib}, []float64{float64(first.Sent) / mib}, "the first", goal{}),
	}, nil
}

// fillDisk writes what nothing makes smaller to the beginning of a package's disk, of which 1 MiB depends on seed, and describes it anew.
func fillDisk(ctx context.Context, folder string, size, seed int) error {
	p, err := vmpackage.Open(folder)
	if err != nil {
		return err
	}
	var files []vmpackage.File
	for _, d := range p.Devices {
		files = append(files, vmpackage.File{Name: d.Name, Path: d.Path})
		if d.Name != "disk" {
			continue
		}
		content := make([]byte, min(int64(size), d.Size))
		_, _ = rand.NewChaCha8([32]byte{1}).Read(content)
		_, _ = rand.NewChaCha8([32]byte{2, byte(seed)}).Read(content[len(content)/2 : len(content)/2+mib])
		f, err := os.OpenFile(d.Path, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		_, err = f.WriteAt(content, 0)
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
	_, err = vmpackage.WriteManifest(ctx, folder, files, vmpackage.ManifestOptions{})
	return err
}

// runFromRegistry starts a VM from a package in a registry, before it has been fetched or after, and returns how long it took until its guest answered, and
// how many MiB were fetched for that.
func runFromRegistry(ctx context.Context, b *bench, way *link, ref, folder string, lazily bool) (took time.Duration, passed float64, err error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute) // none takes so long unless something hangs
	defer cancel()
	defer func() { err = errors.Join(err, os.RemoveAll(folder)) }()
	console, err := testguest.NewConsole()
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, console.Close()) }()
	drafter := filepath.Join(b.bin, "drafter")
	args := []string{"--netns", "", "--chroot-base-dir", b.path("bench", "vms"), "--enable-input", "--resume-timeout", "3m"}
	before, began := way.passed(), time.Now()
	if lazily {
		args = append([]string{"run", ref, "--instance", folder}, args...)
	} else {
		if out, err := exec.CommandContext(ctx, drafter, "pull", ref, folder).CombinedOutput(); err != nil {
			return 0, 0, fmt.Errorf("%w: %s", err, out)
		}
		args = append([]string{"peer", "--package", folder}, args...)
	}
	cmd := exec.CommandContext(ctx, drafter, args...)
	cmd.Stdin, cmd.Stdout = console.Input(), console
	p, err := startPeerProcess(cmd, strings.Join(args[:2], " "), "")
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, p.stop()) }()
	if _, err := guestDo(ctx, console, "echo hello"); err != nil {
		return 0, 0, err
	}
	return time.Since(began), float64(way.passed()-before) / mib, nil
}

// serverEnds is what a server of tests asks of a test.
type serverEnds struct {
	folder string
	ends   []func()
}

func (s *serverEnds) Helper()            {}
func (s *serverEnds) Fatal(words ...any) { panic(serverFailure(fmt.Sprint(words...))) }
func (s *serverEnds) TempDir() string    { return s.folder }
func (s *serverEnds) Cleanup(end func()) { s.ends = append(s.ends, end) }

func (s *serverEnds) close() error {
	for n := len(s.ends) - 1; n >= 0; n-- {
		s.ends[n]()
	}
	if s.folder == "" {
		return nil
	}
	return os.RemoveAll(s.folder)
}
