package registry

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
)

// Progress is how far something is.
type Progress struct {
	Stage       string // what is being done
	Done, Total int64  // bytes; Total may grow
}

// The stages of a push and of a pull.
const (
	StageRead   = "Reading the package"
	StageSend   = "Sending"
	StageCheck  = "Looking what is here"
	StageFetch  = "Fetching"
	StageVerify = "Verifying"
)

// PushOptions say how a package is pushed.
type PushOptions struct {
	Transport

	// Platform is what the package runs on, as linux/amd64. Empty: what this host is.
	Platform string

	// Bases are packages of the same registry: what they hold is referred to, and not sent again. So is what the reference that is pushed to holds, and
	// where the package was pulled from.
	Bases []Reference

	// Progress is told how far the push is, by one goroutine at a time. Nil is allowed.
	Progress func(Progress)

	packSize int64 // bytes of content of a pack; 0: leastPackSize, or more
}

// Pushed is what came of a push.
type Pushed struct {
	Reference Reference // with the digest of what the tag leads to now
	Manifest  Reference // with the digest of the package for its platform alone

	Size    int64 // of all devices, bytes
	Data    int64 // of that, in chunks that are not all zeros and not the same as others
	Known   int64 // of Data, in chunks that the registry had
	Sent    int64 // bytes that were sent for the rest, compressed, and for what describes it
	Present int64 // bytes of packs that were to be sent, and were there: of an earlier push that was interrupted, say
}

const (
	leastPackSize = 32 << 20 // bytes of content
	manyPacks     = 4096     // beyond which packs are larger
	leastUse      = 8        // a pack that is there is referred to if at least one of so many bytes of it are needed
)

// Push puts a package, in a folder, where ref says, which has a tag and no digest. Whatever else the tag led to for other platforms stays.
//
// Nobody may write to the package meanwhile: its files are locked. A push that fails can be made again, and sends what was not there then.
func Push(ctx context.Context, dir string, ref Reference, opts PushOptions) (_ *Pushed, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("push package %q to %s: %w", dir, ref, err)
		}
	}()
	platform, err := parsePlatform(opts.Platform)
	if err != nil {
		return nil, err
	}
	if ref.Tag == "" || ref.Digest != "" {
		return nil, errors.New("a package is pushed to a tag, and its digest comes of that: give a name with a tag, and without a digest")
	}
	for _, b := range opts.Bases {
		if b.Host != ref.Host {
			return nil, fmt.Errorf("base %s is in another registry, which can lend nothing: push it to %s first", b, ref.Host)
		}
	}
	c, err := newClient(ctx, ref, opts.Transport)
	if err != nil {
		return nil, err
	}
	defer c.close()
	p := &push{client: c, dir: dir, opts: opts, platform: platform, unique: make(map[contentKey]*content), report: &Pushed{}}
	defer p.close()
	before, err := p.before(ctx)
	if err != nil {
		return nil, err
	}
	if err := p.dictionary(ctx, before); err != nil {
		return nil, err
	}
	if err := p.read(ctx); err != nil {
		return nil, err
	}
	p.borrow(ctx)
	layers, err := p.send(ctx)
	if err != nil {
		return nil, err
	}
	return p.name(ctx, layers)
}

// push is a push under way.
type push struct {
	*client
	dir      string
	opts     PushOptions
	platform ocispec.Platform
	known    map[contentKey]lent
	devices  []*pushDevice
	raw      []byte // the package's own manifest
	unique   map[contentKey]*content
	order    []*content // of unique, in the order of the devices
	report   *Pushed

	sent, toSend atomic.Int64
	mu           sync.Mutex // guards what follows, and serializes opts.Progress
}

// contentKey tells content from any other.
type contentKey struct {
	sum  [sha256.Size]byte
	size int64 // of the chunk, bytes
}

// lent is where the registry has content.
type lent struct {
	repository     string
	pack           packRef
	offset, length uint32
}

// content is that of a chunk.
type content struct {
	contentKey
	device *pushDevice // that has it
	place  int64       // there

	lent   *lent   // where it was; nil: it is new
	pack   packRef // where it is
	offset uint32
	length uint32
}

type pushDevice struct {
	vmpackage.PackageDevice
	file      *block.File
	lock      io.Closer
	chunkSize int64
	sum       [sha256.Size]byte
	chunks    []placed // ascending
}

// placed is a chunk of a device that is not all zeros.
type placed struct {
	place   int64
	content *content
}

func (p *push) close() {
	for _, d := range p.devices {
		_ = d.file.Close()
		_ = d.lock.Close()
	}
}

func (p *push) progress(stage string, done, total int64) {
	if p.opts.Progress == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.opts.Progress(Progress{stage, done, total})
}

// before is what the tag leads to now; nil: nothing.
func (p *push) before(ctx context.Context) (*target, error) {
	t, err := p.resolve(ctx, p.ref.Tag)
	switch {
	case errors.Is(err, ErrNotFound):
		return nil, nil
	case errors.Is(err, ErrForeign):
		return nil, fmt.Errorf("%w: it stays as it is: push to another tag", err)
	case err != nil:
		return nil, err
	}
	for _, m := range t.manifests { // as of a container's image for several platforms
		if m.ArtifactType == ArtifactType {
			continue
		}
		if _, err := p.resolve(ctx, m.Digest.String()); errors.Is(err, ErrForeign) {
			return nil, fmt.Errorf("index %s: %w: it stays as it is: push to another tag", t.top.Digest, err)
		} else if err != nil && !errors.Is(err, ErrNotFound) {
			return nil, err
		}
	}
	return t, nil
}

// dictionary finds out what the registry has.
func (p *push) dictionary(ctx context.Context, before *target) error {
	p.known = make(map[contentKey]lent)
	if before != nil {
		manifests := before.manifests
		if before.manifest != nil {
			manifests = []ocispec.Descriptor{before.top}
		}
		for _, m := range manifests {
			if m.ArtifactType != ArtifactType && before.manifest == nil {
				continue
			}
			// What cannot be read there lends nothing, and is replaced or stays.
			if err := p.learn(ctx, p.client, Reference{Host: p.ref.Host, Repository: p.ref.Repository, Digest: m.Digest.String()}); err != nil {
				if ctx.Err() != nil {
					return err
				}
				p.Logger.Warn("what the tag leads to now lends nothing to what replaces it", "image", p.ref.String(), "error", err)
			}
		}
	}
	for _, base := range p.opts.Bases {
		if err := p.learnFrom(ctx, base); err != nil {
			return fmt.Errorf("base %s: %w", base, err)
		}
	}
	if origin, err := ReadOrigin(p.dir); err == nil && origin.Reference.Host == p.ref.Host {
		if err := p.learnFrom(ctx, origin.Reference); err != nil {
			p.Logger.Debug("where the package was pulled from lends nothing", "image", origin.Reference.String(), "error", err)
		}
	}
	return ctx.Err()
}

func (p *push) learnFrom(ctx context.Context, base Reference) error {
	c, err := newClient(ctx, base, p.Transport)
	if err != nil {
		return err
	}
	defer c.close()
	return p.learn(ctx, c, base)
}

// learn adds what a package holds to the dictionary.
func (p *push) learn(ctx context.Context, c *client, ref Reference) error {
	t, err := c.resolve(ctx, ref.wanted())
	if err != nil {
		return err
	}
	d, m, err := c.choose(ctx, t, p.platform)
	if err != nil {
		return err
	}
	a, err := c.load(ctx, d, m)
	if err != nil {
		return err
	}
	for _, x := range a.indexes {
		for _, chunk := range x.chunks {
			key := contentKey{chunk.sum, x.chunkSize}
			// What this repository has need not be mounted.
			if have, ok := p.known[key]; !ok || have.repository != p.ref.Repository && ref.Repository == p.ref.Repository {
				p.known[key] = lent{ref.Repository, x.packs[chunk.pack], chunk.offset, chunk.length}
			}
		}
	}
	return nil
}

// read looks at all of the package.
func (p *push) read(ctx context.Context) error {
	pkg, err := vmpackage.Open(p.dir)
	if err != nil {
		return err
	}
	if p.raw, err = os.ReadFile(filepath.Join(p.dir, vmpackage.ManifestFile)); err != nil {
		return err
	}
	description, err := vmpackage.DecodeManifest(p.raw)
	if err != nil {
		return err
	}
	for _, d := range description.Devices {
		at, ok := pkg.Device(d.Name)
		if !ok {
			return fmt.Errorf("the package changes while it is read: device %q is not there any more", d.Name)
		}
		lock, err := runner.LockFile(at.Path, false)
		if err != nil {
			return fmt.Errorf("device %q: %w", d.Name, err)
		}
		var file *block.File
		if err = (runner.DeviceConfig{Name: d.Name, Base: at.Path}).CheckArrived(); err == nil {
			file, err = block.OpenFile(at.Path, block.FileOptions{ReadOnly: true})
		}
		if err != nil {
			lock.Close()
			return fmt.Errorf("device %q: %w", d.Name, err)
		}
		p.devices = append(p.devices, &pushDevice{PackageDevice: at, file: file, lock: lock, chunkSize: chunkSize(d.Size)})
		if file.Size() != d.Size {
			return fmt.Errorf("device %q has %d bytes, and the manifest of the package says %d: %w", d.Name, file.Size(), d.Size, vmpackage.ErrCorrupt)
		}
		p.report.Size += d.Size
	}
	done := int64(0)
	for n, d := range p.devices {
		if err := p.readDevice(ctx, d, &done); err != nil {
			return fmt.Errorf("device %q: %w", d.Name, err)
		}
		if want := description.Devices[n].SHA256; want != "" && want != fmt.Sprintf("%x", d.sum) {
			return fmt.Errorf("device %q has changed since the manifest of the package was written: its SHA-256 is %x, and was %s; if it is to be as it is now, make a package of it with drafter packager: %w", d.Name, d.sum, want, vmpackage.ErrCorrupt)
		}
	}
	return nil
}

// readDevice finds the chunks of a device.
func (p *push) readDevice(ctx context.Context, d *pushDevice, done *int64) error {
	whole := sha256.New()
	buffer := make([]byte, maxChunkSize) // of some chunks
	holes := make([]byte, maxChunkSize)  // zeros
	reached := int64(0)                  // by whole
	for off := int64(0); off < d.Size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		r, err := block.NextData(d.file, off)
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return err
		}
		off = max(off, r.Offset-r.Offset%maxChunkSize)
		for reached < off {
			n := min(off-reached, int64(len(holes)))
			whole.Write(holes[:n])
			reached += n
			if reached%(256<<20) == 0 && ctx.Err() != nil {
				return ctx.Err()
			}
		}
		n := min(d.Size-off, int64(len(buffer)))
		clear(buffer[n:])
		if _, err := d.file.ReadAt(buffer[:n], off); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		var hashing sync.WaitGroup
		hashing.Go(func() { whole.Write(buffer[:n]) })
		for at := int64(0); at < n; at += d.chunkSize {
			if chunk := buffer[at : at+d.chunkSize]; !block.IsZero(chunk) {
				d.chunks = append(d.chunks, placed{(off + at) / d.chunkSize, p.content(d, (off+at)/d.chunkSize, chunk)})
			}
		}
		hashing.Wait()
		off, reached = off+n, off+n
		p.progress(StageRead, *done+off, p.report.Size)
	}
	for reached < d.Size {
		n := min(d.Size-reached, int64(len(holes)))
		whole.Write(holes[:n])
		reached += n
		if reached%(256<<20) == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
	}
	copy(d.sum[:], whole.Sum(nil))
	*done += d.Size
	p.progress(StageRead, *done, p.report.Size)
	return nil
}

// content is what a chunk holds.
func (p *push) content(d *pushDevice, place int64, chunk []byte) *content {
	key := contentKey{sha256.Sum256(chunk), d.chunkSize}
	if c := p.unique[key]; c != nil {
		return c
	}
	c := &content{contentKey: key, device: d, place: place}
	if at, ok := p.known[key]; ok {
		c.lent = &at
	}
	p.unique[key] = c
	p.order = append(p.order, c)
	return c
}

// borrow decides which of the packs that are there are referred to: not those of which hardly anything is needed, or they would be kept for ever; nor those
// of other repositories that the registry does not lend.
func (p *push) borrow(ctx context.Context) {
	type use struct {
		lent
		bytes int64
		why   error
	}
	uses := make(map[digest.Digest]*use)
	for _, c := range p.order {
		if c.lent == nil {
			continue
		}
		u := uses[c.lent.pack.digest]
		if u == nil {
			u = &use{lent: *c.lent}
			uses[c.lent.pack.digest] = u
		}
		if u.repository != p.ref.Repository {
			u.repository = c.lent.repository
		}
		u.bytes += int64(c.lent.length)
	}
	group := errgroup.Group{}
	group.SetLimit(p.Concurrency)
	for _, u := range uses {
		if u.bytes < u.pack.size/leastUse {
			u.why = errors.New("hardly anything of it is needed")
		} else if u.repository != p.ref.Repository {
			group.Go(func() error {
				u.why = p.mount(ctx, ocispec.Descriptor{MediaType: mediaPack, Digest: u.pack.digest, Size: u.pack.size}, u.repository)
				return nil
			})
		} else {
			group.Go(func() error { // a registry may have lost what a tag still refers to
				u.why = p.has(ctx, ocispec.Descriptor{MediaType: mediaPack, Digest: u.pack.digest, Size: u.pack.size})
				return nil
			})
		}
	}
	_ = group.Wait()
	for _, c := range p.order {
		p.report.Data += c.size
		if c.lent == nil {
			continue
		}
		if u := uses[c.lent.pack.digest]; u.why != nil {
			p.Logger.Debug("a pack that is there is not referred to", "blob", u.pack.digest.String(), "error", u.why)
			c.lent = nil
			continue
		}
		p.report.Known += c.size
		c.pack, c.offset, c.length = c.lent.pack, c.lent.offset, c.lent.length
	}
}

// send puts packs of what is new, and then what describes the package, and returns its layers.
func (p *push) send(ctx context.Context) ([]ocispec.Descriptor, error) {
	most := cmp.Or(p.opts.packSize, leastPackSize)
	for (p.report.Data-p.report.Known)/most > manyPacks && most < maxPackSize/4 {
		most *= 2
	}
	p.toSend.Store(p.report.Data - p.report.Known)
	// A pack has content of one device, so that devices that others have, too, become the same packs there.
	var packs [][]*content
	size := int64(0)
	for n, c := range p.order {
		if c.lent != nil {
			continue
		}
		if len(packs) == 0 || size+c.size > most || n > 0 && packs[len(packs)-1][0].device != c.device {
			packs, size = append(packs, nil), 0
		}
		packs[len(packs)-1] = append(packs[len(packs)-1], c)
		size += c.size
	}
	group, sending := errgroup.WithContext(ctx)
	group.SetLimit(p.Concurrency)
	for _, pack := range packs {
		group.Go(func() error { return p.sendPack(sending, pack) })
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}

	layers := make([]ocispec.Descriptor, 1, 1+len(p.devices))
	describe := func(n int, mediaType, title string, blob []byte) error {
		layers[n] = ocispec.Descriptor{
			MediaType: mediaType, Digest: digest.FromBytes(blob), Size: int64(len(blob)), Annotations: map[string]string{ocispec.AnnotationTitle: title},
		}
		p.toSend.Add(layers[n].Size)
		return p.putBlob(ctx, layers[n], blob)
	}
	if err := describe(0, mediaDescription, vmpackage.ManifestFile, compressor().EncodeAll(p.raw, nil)); err != nil {
		return nil, err
	}
	there := make(map[digest.Digest]bool)
	var refs []ocispec.Descriptor
	for _, d := range p.devices {
		x := d.index()
		if err := x.seal(); err != nil {
			return nil, fmt.Errorf("device %q: %w", d.Name, err)
		}
		blob, err := x.encode()
		if err != nil {
			return nil, fmt.Errorf("device %q: %w", d.Name, err)
		}
		layers = append(layers, ocispec.Descriptor{})
		if err := describe(len(layers)-1, mediaIndex, filepath.Base(d.Path), blob); err != nil {
			return nil, fmt.Errorf("device %q: %w", d.Name, err)
		}
		for _, pack := range x.packs {
			if !there[pack.digest] {
				there[pack.digest] = true
				refs = append(refs, ocispec.Descriptor{MediaType: mediaPack, Digest: pack.digest, Size: pack.size})
			}
		}
	}
	return append(layers, refs...), nil
}

// index is that of a device whose content is all in packs.
func (d *pushDevice) index() *index {
	x := &index{chunkSize: d.chunkSize, size: d.Size, sum: d.sum}
	packs := make(map[digest.Digest]uint32)
	chunks := make(map[*content]uint32)
	next := int64(0)
	zeros := func(until int64) {
		for ; next < until; next++ {
			x.append(nil)
		}
	}
	for _, c := range d.chunks {
		zeros(c.place)
		n, ok := chunks[c.content]
		if !ok {
			pack, ok := packs[c.content.pack.digest]
			if !ok {
				pack = uint32(len(x.packs))
				packs[c.content.pack.digest] = pack
				x.packs = append(x.packs, c.content.pack)
			}
			n = uint32(len(x.chunks))
			chunks[c.content] = n
			x.chunks = append(x.chunks, chunkRef{pack: pack, offset: c.content.offset, length: c.content.length, sum: c.content.sum})
		}
		x.append(&n)
		next++
	}
	zeros(x.places())
	return x
}

// sendPack makes a pack of chunks, and puts it.
func (p *push) sendPack(ctx context.Context, chunks []*content) error {
	var blob []byte
	var lengths []uint32
	buffer := make([]byte, chunks[0].size)
	for _, c := range chunks {
		if err := ctx.Err(); err != nil {
			return err
		}
		off := c.place * c.size
		n := min(c.size, c.device.Size-off)
		clear(buffer[n:])
		if _, err := c.device.file.ReadAt(buffer[:n], off); err != nil && !errors.Is(err, io.EOF) {
			return fmt.Errorf("device %q: %w", c.device.Name, err)
		}
		if sha256.Sum256(buffer) != c.sum {
			return fmt.Errorf("device %q changes while it is pushed, at %d: nobody may write to it meanwhile", c.device.Name, off)
		}
		before := len(blob)
		blob = compressor().EncodeAll(buffer, blob)
		c.offset, c.length = uint32(before), uint32(len(blob)-before)
		lengths = append(lengths, c.length)
	}
	blob = appendSeekTable(blob, lengths, chunks[0].size)
	pack := packRef{digest.FromBytes(blob), int64(len(blob))}
	for _, c := range chunks {
		c.pack = pack
	}
	// What is to be sent was counted as it is before it is compressed.
	p.toSend.Add(pack.size - int64(len(chunks))*chunks[0].size)
	return p.putBlob(ctx, ocispec.Descriptor{MediaType: mediaPack, Digest: pack.digest, Size: pack.size}, blob)
}

// putBlob puts a blob, and counts what was sent, and which packs were there.
func (p *push) putBlob(ctx context.Context, desc ocispec.Descriptor, blob []byte) error {
	added, err := p.put(ctx, desc, blob, func(n int64) { p.progress(StageSend, p.sent.Add(n), p.toSend.Load()) })
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if added {
		p.report.Sent += desc.Size
		return nil
	}
	if desc.MediaType == mediaPack {
		p.report.Present += desc.Size
	}
	p.toSend.Add(-desc.Size)
	return nil
}

// name puts the manifest of a package of some layers, and has the tag lead to it.
func (p *push) name(ctx context.Context, layers []ocispec.Descriptor) (*Pushed, error) {
	var names []string
	for _, d := range p.devices {
		names = append(names, d.Name)
	}
	config, manifest, configContent, manifestContent, err := describe(p.platform, layers, map[string]string{"org.opencontainers.image.description": "a virtual machine of Drafter: " + strings.Join(names, ", ")})
	if err != nil {
		return nil, err
	}
	p.toSend.Add(config.Size)
	if err := p.putBlob(ctx, config, configContent); err != nil {
		return nil, err
	}
	if err := p.putManifest(ctx, manifest, manifestContent, ""); err != nil {
		return nil, err
	}
	for range attempts {
		before, err := p.before(ctx) // which others may have changed meanwhile
		if err != nil {
			return nil, err
		}
		top, content, err := p.topOf(ctx, before, manifest)
		if err != nil {
			return nil, err
		}
		if err := p.putManifest(ctx, top, content, p.ref.Tag); err != nil {
			return nil, err
		}
		after, err := p.resolve(ctx, p.ref.Tag)
		if err != nil {
			return nil, err
		}
		// Registries cannot be told to change a tag only if it is as it was: whoever is overtaken does it again.
		if slices.ContainsFunc(after.manifests, func(m ocispec.Descriptor) bool { return m.Digest == manifest.Digest }) {
			p.report.Reference, p.report.Manifest = p.ref.pinned(after.top.Digest), p.ref.pinned(manifest.Digest)
			return p.report, nil
		}
		if m := after.manifests; slices.ContainsFunc(m, func(m ocispec.Descriptor) bool {
			return m.Platform != nil && samePlatform(*m.Platform, p.platform) && m.ArtifactType == ArtifactType
		}) {
			return nil, fmt.Errorf("somebody else has pushed a package for %s there at the same time; this one is %s", platformString(p.platform), p.ref.pinned(manifest.Digest))
		}
	}
	return nil, errors.New("others change what the tag leads to all the time: push again when they have done")
}

// topOf is what the tag is to lead to: what it led to before, with manifest for its platform.
func (p *push) topOf(ctx context.Context, before *target, manifest ocispec.Descriptor) (ocispec.Descriptor, []byte, error) {
	var others []ocispec.Descriptor
	switch {
	case before == nil:
	case before.manifest != nil: // as tools leave it that copy one platform
		platform, err := p.platformOf(ctx, before.manifest)
		if err != nil {
			return ocispec.Descriptor{}, nil, err
		}
		before.top.Platform, before.top.ArtifactType = &platform, ArtifactType
		others = append(others, before.top)
	default:
		others = before.manifests
	}
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{}}
	put := false
	for _, m := range others {
		if m.Platform != nil && samePlatform(*m.Platform, p.platform) || m.Digest == manifest.Digest {
			if !put {
				index.Manifests, put = append(index.Manifests, manifest), true
			}
			continue
		}
		index.Manifests = append(index.Manifests, m)
	}
	if !put {
		index.Manifests = append(index.Manifests, manifest)
	}
	content, err := json.Marshal(index)
	if err != nil {
		return ocispec.Descriptor{}, nil, fmt.Errorf("encode index: %w", err)
	}
	return ocispec.Descriptor{MediaType: index.MediaType, Digest: digest.FromBytes(content), Size: int64(len(content))}, content, nil
}

// platformOf is what a manifest's configuration says that it is for.
func (c *client) platformOf(ctx context.Context, m *ocispec.Manifest) (ocispec.Platform, error) {
	var image ocispec.Image
	blob, err := c.blob(ctx, m.Config, maxManifest)
	if err == nil {
		err = json.Unmarshal(blob, &image)
	}
	if err != nil {
		return ocispec.Platform{}, fmt.Errorf("configuration %s: %w", m.Config.Digest, err)
	}
	return image.Platform, nil
}
