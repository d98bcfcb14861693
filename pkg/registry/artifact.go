package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/drafter-vm/drafter/pkg/vmpackage"
)

// What a package is called in a registry, and its parts.
const (
	ArtifactType     = "application/vnd.drafter.package.v1"
	mediaDescription = "application/vnd.drafter.package.manifest.v1+json+zstd" // the package's own manifest
	mediaIndex       = "application/vnd.drafter.package.index.v1+zstd"
	mediaPack        = "application/vnd.drafter.package.pack.v1+zstd"
)

const (
	maxDescription = 1 << 20 // bytes, of the package's own manifest
	maxLayers      = 16384   // of a package
)

// ErrPlatform is wrapped by the error of asking for a package for another platform than there is one for.
var ErrPlatform = errors.New("there is no package for this platform")

// parsePlatform reads OS/ARCHITECTURE[/VARIANT]; empty is what this host is.
func parsePlatform(s string) (ocispec.Platform, error) {
	if s == "" {
		return ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}, nil
	}
	words := strings.Split(s, "/")
	if len(words) < 2 || len(words) > 3 || slices.Contains(words, "") || strings.ContainsAny(s, " \t\n\"") || len(s) > 64 {
		return ocispec.Platform{}, fmt.Errorf("platform %q: give it as linux/amd64, linux/arm64 or the like", s)
	}
	p := ocispec.Platform{OS: words[0], Architecture: words[1]}
	if len(words) == 3 {
		p.Variant = words[2]
	}
	return p, nil
}

// CheckPlatform reports whether s names a platform, as linux/amd64. Empty does: what this host is.
func CheckPlatform(s string) error {
	_, err := parsePlatform(s)
	return err
}

func platformString(p ocispec.Platform) string {
	s := p.OS + "/" + p.Architecture
	if p.Variant != "" {
		s += "/" + p.Variant
	}
	return s
}

func samePlatform(a, b ocispec.Platform) bool {
	return a.OS == b.OS && a.Architecture == b.Architecture && a.Variant == b.Variant
}

// serves reports whether a package for one platform is what is wanted for another.
func serves(have, want ocispec.Platform) bool {
	return have.OS == want.OS && have.Architecture == want.Architecture && (want.Variant == "" || have.Variant == want.Variant)
}

// target is what a reference leads to.
type target struct {
	top       ocispec.Descriptor   // of the index of manifests, or of the only one
	manifests []ocispec.Descriptor // with their platforms, if top is an index
	manifest  *ocispec.Manifest    // if it is not
}

// resolve finds what a reference leads to.
func (c *client) resolve(ctx context.Context, reference string) (*target, error) {
	desc, content, err := c.manifest(ctx, reference)
	if err != nil {
		return nil, err
	}
	var kind struct {
		MediaType string            `json:"mediaType"`
		Manifests []json.RawMessage `json:"manifests"`
	}
	if err := json.Unmarshal(content, &kind); err != nil {
		return nil, fmt.Errorf("manifest %s: %w: %w", desc.Digest, err, ErrCorrupt)
	}
	t := &target{top: desc}
	if kind.Manifests != nil {
		var index ocispec.Index
		if err := json.Unmarshal(content, &index); err != nil {
			return nil, fmt.Errorf("index %s: %w: %w", desc.Digest, err, ErrCorrupt)
		}
		for _, m := range index.Manifests {
			if m.Digest.Validate() != nil {
				return nil, fmt.Errorf("index %s names a manifest with the digest %q: %w", desc.Digest, m.Digest, ErrCorrupt)
			}
		}
		t.manifests = index.Manifests
		return t, nil
	}
	if t.manifest, err = decodeArtifact(desc.Digest, content); err != nil {
		return nil, err
	}
	return t, nil
}

// ErrForeign is wrapped by the error of asking for a package where there is something else.
var ErrForeign = errors.New("this is no package of Drafter")

// decodeArtifact reads and checks the manifest of a package.
func decodeArtifact(d digest.Digest, content []byte) (*ocispec.Manifest, error) {
	var m ocispec.Manifest
	if err := json.Unmarshal(content, &m); err != nil {
		return nil, fmt.Errorf("manifest %s: %w: %w", d, err, ErrCorrupt)
	}
	if m.ArtifactType != ArtifactType {
		return nil, fmt.Errorf("manifest %s: %w: its artifact type is %q, and not %q", d, ErrForeign, m.ArtifactType, ArtifactType)
	}
	if len(m.Layers) > maxLayers {
		return nil, fmt.Errorf("manifest %s has %d layers, more than %d: %w", d, len(m.Layers), maxLayers, ErrCorrupt)
	}
	for _, l := range m.Layers {
		if l.Digest.Validate() != nil || l.Digest.Algorithm() != digest.SHA256 || l.Size < 0 {
			return nil, fmt.Errorf("manifest %s names a layer with the digest %q and the size %d: %w", d, l.Digest, l.Size, ErrCorrupt)
		}
	}
	return &m, nil
}

// choose finds the manifest for a platform. A manifest alone is taken as it is: whoever names it knows what it is for.
func (c *client) choose(ctx context.Context, t *target, platform ocispec.Platform) (digest.Digest, *ocispec.Manifest, error) {
	if t.manifest != nil {
		return t.top.Digest, t.manifest, nil
	}
	var there []string
	exact := slices.ContainsFunc(t.manifests, func(m ocispec.Descriptor) bool {
		return m.Platform != nil && (m.ArtifactType == "" || m.ArtifactType == ArtifactType) && samePlatform(*m.Platform, platform)
	})
	for _, m := range t.manifests {
		if m.Platform == nil || m.ArtifactType != "" && m.ArtifactType != ArtifactType || exact && !samePlatform(*m.Platform, platform) {
			continue
		}
		if serves(*m.Platform, platform) {
			got, err := c.resolve(ctx, m.Digest.String())
			if err != nil {
				return "", nil, err
			}
			if got.manifest == nil {
				return "", nil, fmt.Errorf("index %s names another index, %s: %w", t.top.Digest, m.Digest, ErrCorrupt)
			}
			return m.Digest, got.manifest, nil
		}
		there = append(there, platformString(*m.Platform))
	}
	if len(there) == 0 {
		return "", nil, fmt.Errorf("index %s: %w", t.top.Digest, ErrForeign)
	}
	return "", nil, fmt.Errorf("%w, %s: there is one for %s (--platform)", ErrPlatform, platformString(platform), strings.Join(there, ", "))
}

// artifact is a package, as far as it is known before any of its content is.
type artifact struct {
	digest      digest.Digest
	manifest    *ocispec.Manifest
	raw         []byte // the package's own manifest
	description *vmpackage.Manifest
	indexes     []*index // of the devices, in the order of the description
}

// load gets what a manifest refers to, but for packs, and checks that it is whole.
func (c *client) load(ctx context.Context, d digest.Digest, m *ocispec.Manifest) (*artifact, error) {
	fail := func(format string, args ...any) (*artifact, error) {
		return nil, fmt.Errorf("manifest %s: %w: %w", d, fmt.Errorf(format, args...), ErrCorrupt)
	}
	if len(m.Layers) == 0 || m.Layers[0].MediaType != mediaDescription {
		return fail("its first layer is no manifest of a package")
	}
	a := &artifact{digest: d, manifest: m}
	blob, err := c.blob(ctx, m.Layers[0], maxDescription)
	if err != nil {
		return nil, err
	}
	if a.raw, err = decompress(blob, maxDescription); err != nil {
		return fail("the manifest of the package: %w", err)
	}
	if a.description, err = vmpackage.DecodeManifest(a.raw); err != nil {
		return nil, err
	}
	packs := make(map[digest.Digest]int64)
	for n, l := range m.Layers[1:] {
		if n < len(a.description.Devices) {
			if l.MediaType != mediaIndex {
				return fail("layer %d is of the type %q, and not the index of device %q", n+1, l.MediaType, a.description.Devices[n].Name)
			}
			continue
		}
		if l.MediaType != mediaPack {
			return fail("layer %d is of the type %q, and not a pack", n+1, l.MediaType)
		}
		packs[l.Digest] = l.Size
	}
	if len(m.Layers)-1 < len(a.description.Devices) {
		return fail("there are %d layers, and %d devices", len(m.Layers), len(a.description.Devices))
	}
	a.indexes = make([]*index, len(a.description.Devices))
	var total atomic.Int64
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(c.Concurrency)
	for n, device := range a.description.Devices {
		group.Go(func() error {
			blob, err := c.blob(ctx, m.Layers[n+1], maxIndex)
			if err != nil {
				return fmt.Errorf("device %q: %w", device.Name, err)
			}
			x, err := decodeIndex(blob)
			if err != nil {
				return fmt.Errorf("device %q: %w", device.Name, err)
			}
			if total.Add(x.bytes()) > maxIndexes {
				return fmt.Errorf("device %q: the indexes of all devices have more than %d bytes: %w", device.Name, maxIndexes, ErrCorrupt)
			}
			if x.size != device.Size || device.SHA256 != "" && device.SHA256 != fmt.Sprintf("%x", x.sum) {
				return fmt.Errorf("device %q: its index is of %d bytes with the SHA-256 %x, and the manifest of the package says %d, %s: %w", device.Name, x.size, x.sum, device.Size, device.SHA256, ErrCorrupt)
			}
			for _, p := range x.packs {
				if size, ok := packs[p.digest]; !ok || size != p.size {
					return fmt.Errorf("device %q: its index names pack %s, of %d bytes, which is no layer: %w", device.Name, p.digest, p.size, ErrCorrupt)
				}
			}
			a.indexes[n] = x
			return nil
		})
	}
	return a, group.Wait()
}

// open resolves and loads what the client's reference names.
func (c *client) open(ctx context.Context, platform ocispec.Platform) (*artifact, error) {
	t, err := c.resolve(ctx, c.ref.wanted())
	if err != nil {
		return nil, err
	}
	d, m, err := c.choose(ctx, t, platform)
	if err != nil {
		return nil, err
	}
	return c.load(ctx, d, m)
}

// describe makes the configuration and the manifest of a package of some layers. Its configuration is that of a container image, as far as tools need
// to copy and inspect it.
func describe(platform ocispec.Platform, layers []ocispec.Descriptor, labels map[string]string) (config, manifest ocispec.Descriptor, configContent, manifestContent []byte, err error) {
	image := ocispec.Image{Platform: platform, RootFS: ocispec.RootFS{Type: "layers"}}
	image.Config.Labels = maps.Clone(labels)
	for _, l := range layers {
		image.RootFS.DiffIDs = append(image.RootFS.DiffIDs, l.Digest)
	}
	if configContent, err = json.Marshal(image); err != nil {
		return config, manifest, nil, nil, fmt.Errorf("encode configuration: %w", err)
	}
	config = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: digest.FromBytes(configContent), Size: int64(len(configContent))}
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, ArtifactType: ArtifactType, Config: config, Layers: layers,
	}
	if manifestContent, err = json.Marshal(m); err != nil {
		return config, manifest, nil, nil, fmt.Errorf("encode manifest: %w", err)
	}
	manifest = ocispec.Descriptor{
		MediaType: m.MediaType, Digest: digest.FromBytes(manifestContent), Size: int64(len(manifestContent)), ArtifactType: ArtifactType, Platform: &platform,
	}
	if len(manifestContent) > maxManifest || len(layers) > maxLayers {
		return config, manifest, nil, nil, fmt.Errorf("its manifest would have %d layers and %d bytes, and may have %d and %d", len(layers), len(manifestContent), maxLayers, maxManifest)
	}
	return config, manifest, configContent, manifestContent, nil
}
