package config

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/drafter-vm/drafter/pkg/vmm"
)

// maxSocketPath is what fits into sockaddr_un (unix(7)), in bytes.
const maxSocketPath = 107

// CheckFolder checks a machine's folder, by its absolute path, and that there is room in a unix socket's address for those sockets in it.
func CheckFolder(dir string, sockets ...string) error {
	for _, name := range sockets {
		if path := filepath.Join(dir, name); len(path) > maxSocketPath {
			return fmt.Errorf("socket %q: the path has %d bytes, but a unix socket's may have %d: choose a shorter folder", path, len(path), maxSocketPath)
		}
	}
	if info, err := os.Stat(dir); err != nil {
		return fmt.Errorf("the machine's folder: %w", err)
	} else if !info.IsDir() {
		return fmt.Errorf("the machine's folder %q is no folder", dir)
	}
	return nil
}

// Check checks the guest's RAM, and the limit of its disks.
func Check(cfg vmm.Config) error {
	if cfg.Memory == nil {
		return errors.New("there is no memory: a memfd of the machine's size is needed")
	}
	info, err := cfg.Memory.Stat()
	if err != nil {
		return fmt.Errorf("the memory: %w", err)
	}
	if info.Size() != cfg.Spec.MemorySize {
		return fmt.Errorf("the memory has %d bytes, but the machine's is described with %d", info.Size(), cfg.Spec.MemorySize)
	}
	if l := cfg.DiskLimit; l.Bytes < 0 || l.Requests < 0 {
		return fmt.Errorf("limit of disks: %d bytes and %d requests per second: neither can be negative (0: no limit)", l.Bytes, l.Requests)
	}
	return nil
}

// Boot is what to boot, by absolute paths of files that are there; nil for nil.
func Boot(b *vmm.Boot) (*vmm.Boot, error) {
	if b == nil {
		return nil, nil
	}
	boot := *b
	for _, path := range []*string{&boot.Kernel, &boot.Initrd} {
		if *path == "" && path == &boot.Initrd {
			continue
		}
		var err error
		if *path, err = filepath.Abs(*path); err != nil {
			return nil, err
		}
		if _, err := os.Stat(*path); err != nil {
			return nil, fmt.Errorf("boot: %w", err)
		}
	}
	return &boot, nil
}
