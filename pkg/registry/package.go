package registry

import (
	"context"
	"fmt"
	"io"
	"log/slog"

	"github.com/drafter-vm/drafter/pkg/peer"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
)

// OpenOptions say which package is opened, and how the registry is spoken to.
type OpenOptions struct {
	Transport

	// Platform is what the package is to run on, as linux/amd64. Empty: what this host is. A reference to the package for one platform alone needs none.
	Platform string
}

// Package is a package in a registry. Its methods may be called by any number of goroutines at once, but for Load and Close.
type Package struct {
	// Reference has the digest of the package for its platform, when it is known.
	Reference Reference

	// Manifest is the package's own, when it is loaded; nil: it is not.
	Manifest *vmpackage.Manifest

	asked    Reference
	opts     OpenOptions
	log      *slog.Logger
	artifact *artifact
	origin   *peer.Origin
}

// Open finds a package. It fetches what describes it, and nothing of its content.
func Open(ctx context.Context, ref Reference, opts OpenOptions) (*Package, error) {
	p := At(Origin{ref, ref}, opts)
	if err := p.Load(ctx); err != nil {
		return nil, err
	}
	return p, nil
}

// At is Open that asks the registry nothing yet: for a VM that was received from that package before.
func At(o Origin, opts OpenOptions) *Package {
	p := &Package{Reference: o.Reference, asked: o.Asked, opts: opts, log: opts.Logger}
	if p.log == nil {
		p.log = slog.Default()
	}
	p.origin = peer.NewOrigin(p.images, p.log)
	return p
}

// Origin is where the package is, once that is known.
func (p *Package) Origin() Origin { return Origin{p.Reference, p.asked} }

// Load gets what describes the package.
func (p *Package) Load(ctx context.Context) error {
	platform, err := parsePlatform(p.opts.Platform)
	if err != nil {
		return err
	}
	c, err := newClient(ctx, p.Reference, p.opts.Transport)
	if err != nil {
		return err
	}
	defer c.close()
	a, err := c.open(ctx, platform)
	if err != nil {
		return fmt.Errorf("open package %s: %w", p.Reference, err)
	}
	p.artifact, p.Manifest, p.Reference = a, a.description, p.Reference.pinned(a.digest)
	return nil
}

// images opens the devices for a source in this process.
func (p *Package) images(ctx, reading context.Context) ([]peer.Image, error) {
	if p.artifact == nil {
		if err := p.Load(ctx); err != nil {
			return nil, err
		}
	}
	return p.open(ctx, reading)
}

// Images returns the devices of the package, which was loaded: each to be read until ctx ends, and to be closed. What is read is fetched, checked, and
// remembered for a while.
func (p *Package) Images(ctx context.Context) ([]peer.Image, error) { return p.open(ctx, ctx) }

func (p *Package) open(ctx, reading context.Context) ([]peer.Image, error) {
	c, err := newClient(ctx, p.Reference, p.opts.Transport)
	if err != nil {
		return nil, err
	}
	open := &openDevices{reader: newReader(reading, c), left: len(p.artifact.indexes)}
	var images []peer.Image
	for n, x := range p.artifact.indexes {
		name := p.artifact.description.Devices[n].Name
		// The digest of the device tells it from any other, and is the same wherever the package is served from.
		images = append(images, peer.Image{Name: name, Device: &device{name: name, index: x, reader: open.reader, open: open}, ID: fmt.Sprintf("%x", x.sum)})
	}
	return images, nil
}

// Dial returns streams to a source of the VM in this process, for [peer.Receive]: the VM runs as soon as it has the state of its machine, and the
// rest is fetched from the registry when the guest touches it, and behind it.
func (p *Package) Dial(ctx context.Context) ([]io.ReadWriter, error) {
	return p.dialled(p.origin.Dial(ctx))
}

// Redial is Dial for a VM that was received from here, has lost its source, and lacks something: see peer.Config.FindSource. A Package in another
// process will do, of the same digest.
func (p *Package) Redial(ctx context.Context) ([]io.ReadWriter, error) {
	return p.dialled(p.origin.Redial(ctx))
}

func (p *Package) dialled(streams []io.ReadWriter, err error) ([]io.ReadWriter, error) {
	if err != nil {
		return nil, fmt.Errorf("start from package %s: %w", p.Reference, err)
	}
	return streams, nil
}

// Close waits until whoever has dialled has everything, and lets go of the registry. When ctx ends it does not wait any more.
func (p *Package) Close(ctx context.Context) error { return p.origin.Close(ctx) }
