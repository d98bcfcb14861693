package oci

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// OpenOptions say how an image is found.
type OpenOptions struct {
	// Architecture is that of the image, as GOARCH names it, perhaps with a variant: "arm64/v8". Default: this machine's.
	Architecture string

	// PlainHTTP talks to registries without TLS. Those of this host are talked to so anyway, if they have none.
	PlainHTTP bool

	// Keychain has the credentials for registries. Default: docker's configuration, its helpers, and podman's.
	Keychain authn.Keychain

	// Transport carries what is asked of a registry. Default: one of Go's.
	Transport http.RoundTripper
}

// Image is an image that was found. Its layers have not been fetched.
type Image struct {
	Reference string // as it was asked for
	Digest    string // of its manifest

	image  v1.Image
	config []byte // verified
	tmp    string // folder to remove; empty: none
	arch   string // as GOARCH names it, perhaps with a variant
	blobs  *blobs // of the repository it is in; nil: it is in no registry
	want   string // digest of the manifest, by what refers to it; empty: nothing does
}

// Close lets go of the image.
func (i *Image) Close() error {
	if i.tmp == "" {
		return nil
	}
	return os.RemoveAll(i.tmp)
}

// Pinned is a reference of the image in its registry by its digest, which is another image's never.
func (i *Image) Pinned() (string, error) {
	if i.blobs == nil {
		return "", fmt.Errorf("image %q is in no registry", i.Reference)
	}
	return dockerScheme + i.blobs.name + "@" + i.Digest, nil
}

// Sources of images, as skopeo names them.
const (
	dockerScheme    = "docker://"
	layoutScheme    = "oci:"
	layoutTar       = "oci-archive:"
	dockerTar       = "docker-archive:"
	containerScheme = "containers-storage:"
	daemonScheme    = "docker-daemon:"
)

// Open finds an image:
//
//   - docker://NAME[:TAG|@DIGEST] in a registry;
//   - oci:FOLDER[:TAG] in a folder with the OCI image layout, oci-archive:FILE[:TAG] in a tar archive of one;
//   - docker-archive:FILE[:NAME:TAG] in what `docker save` has written;
//   - containers-storage:NAME in this host's podman, docker-daemon:NAME in its docker, by their commands;
//   - without any of these, a file or folder of that name if there is one, else a registry's.
//
// Of an image for several architectures it is that of opts. Digests of manifest and configuration are verified here, those of layers as they are read.
func Open(ctx context.Context, reference string, opts OpenOptions) (_ *Image, err error) {
	i := &Image{Reference: reference, arch: defaultArchitecture(opts.Architecture)}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("open image %q: %w", reference, err), i.Close())
		}
	}()
	platform, err := v1.ParsePlatform("linux/" + i.arch)
	if err != nil {
		return nil, fmt.Errorf("architecture %q: %w", opts.Architecture, err)
	}
	switch scheme, rest := splitReference(reference); scheme {
	case dockerScheme:
		err = i.openRemote(ctx, rest, platform, opts)
	case layoutScheme:
		dir, tag := splitTag(rest)
		err = i.openLayout(dir, tag, platform)
	case layoutTar:
		file, tag := splitTag(rest)
		if err = i.extractLayout(ctx, file); err == nil {
			err = i.openLayout(i.tmp, tag, platform)
		}
	case dockerTar:
		file, tag := splitTag(rest)
		err = i.openTarball(file, tag)
	case containerScheme:
		err = i.save(ctx, rest, platform, func(file string) [][]string {
			return [][]string{
				{"podman", "save", "--quiet", "--format", "oci-archive", "--output", file, rest},
				{"skopeo", "copy", "--quiet", containerScheme + rest, layoutTar + file},
			}
		})
	case daemonScheme:
		err = i.save(ctx, rest, platform, func(file string) [][]string {
			return [][]string{{"docker", "save", "--output", file, rest}}
		})
	}
	if err != nil {
		return nil, err
	}
	return i, i.verify(platform)
}

func defaultArchitecture(arch string) string {
	if arch == "" {
		return runtime.GOARCH
	}
	return arch
}

// splitReference tells where an image is. What it returns is never empty.
func splitReference(reference string) (scheme, rest string) {
	for _, scheme := range []string{dockerScheme, layoutScheme, layoutTar, dockerTar, containerScheme, daemonScheme} {
		if rest, ok := strings.CutPrefix(reference, scheme); ok {
			return scheme, rest
		}
	}
	file, _ := splitTag(reference)
	info, err := os.Stat(file)
	switch {
	case err != nil:
		return dockerScheme, reference
	case info.IsDir():
		return layoutScheme, reference
	case hasLayout(file):
		return layoutTar, reference
	default:
		return dockerTar, reference
	}
}

// splitTag cuts the tag from the name of a file, if there is one: what follows a colon, of a file that exists without that. Or else the colon is of its
// name.
func splitTag(s string) (file, tag string) {
	if _, err := os.Stat(s); err == nil {
		return s, ""
	}
	for i := strings.IndexByte(s, ':'); i >= 0; {
		if _, err := os.Stat(s[:i]); err == nil {
			return s[:i], s[i+1:]
		}
		next := strings.IndexByte(s[i+1:], ':')
		if next < 0 {
			break
		}
		i += 1 + next
	}
	return s, ""
}

func (i *Image) openRemote(ctx context.Context, reference string, platform *v1.Platform, opts OpenOptions) error {
	var nameOptions []name.Option
	if opts.PlainHTTP {
		nameOptions = append(nameOptions, name.Insecure)
	}
	ref, err := name.ParseReference(reference, nameOptions...)
	if err != nil {
		return fmt.Errorf("%w; an image is docker://NAME:TAG, oci:FOLDER, docker-archive:FILE or containers-storage:NAME", err)
	}
	keychain := opts.Keychain
	if keychain == nil {
		keychain = logins{}
	}
	options := []remote.Option{remote.WithContext(ctx), remote.WithAuthFromKeychain(keychain), remote.WithPlatform(*platform), remote.WithUserAgent("drafter")}
	rt := opts.Transport
	if rt == nil {
		rt = remote.DefaultTransport
	}
	if !opts.PlainHTTP {
		rt = secure{rt}
	}
	options = append(options, remote.WithTransport(rt))
	desc, err := remote.Get(ref, options...)
	if err != nil {
		return err
	}
	if i.blobs, err = openBlobs(ctx, ref.Context(), keychain, rt); err != nil {
		return err
	}
	if desc.MediaType.IsIndex() {
		index, err := desc.ImageIndex()
		if err != nil {
			return err
		}
		return i.choose(index, platform, "")
	}
	i.want = desc.Digest.String()
	i.image, err = desc.Image()
	return err
}

// choose finds the image for a platform in an index, of those with a tag if there is one.
func (i *Image) choose(index v1.ImageIndex, platform *v1.Platform, tag string) error {
	manifest, err := index.IndexManifest()
	if err != nil {
		return err
	}
	var tags, platforms []string
	var fits []v1.Descriptor
	for _, d := range manifest.Manifests {
		if tag != "" && d.Annotations["org.opencontainers.image.ref.name"] != tag {
			tags = append(tags, d.Annotations["org.opencontainers.image.ref.name"])
			continue
		}
		if d.Annotations["vnd.docker.reference.type"] != "" {
			continue // an attestation of another
		}
		if d.Platform != nil && !d.Platform.Satisfies(v1.Platform{OS: platform.OS, Architecture: platform.Architecture, Variant: platform.Variant}) {
			platforms = append(platforms, d.Platform.String())
			continue
		}
		fits = append(fits, d)
	}
	switch {
	case len(fits) == 0 && len(platforms) > 0:
		return fmt.Errorf("it is not for %v, but for %s: say which by the architecture", platform, strings.Join(platforms, ", "))
	case len(fits) == 0 && tag != "":
		return fmt.Errorf("there is no tag %q, but %q", tag, tags)
	case len(fits) == 0:
		return errors.New("it holds no image")
	case len(fits) > 1 && fits[0].Platform == nil:
		return fmt.Errorf("it holds %d images: say which by a tag", len(fits))
	}
	if fits[0].MediaType.IsIndex() {
		inner, err := index.ImageIndex(fits[0].Digest)
		if err != nil {
			return err
		}
		text, err := inner.RawManifest()
		if err != nil {
			return err
		}
		if have := digestOf(text); have != fits[0].Digest.String() {
			return fmt.Errorf("its index is %s, not %v as what refers to it says: it is corrupt", have, fits[0].Digest)
		}
		return i.choose(inner, platform, "")
	}
	i.want = fits[0].Digest.String()
	i.image, err = index.Image(fits[0].Digest)
	return err
}

func (i *Image) openLayout(dir, tag string, platform *v1.Platform) error {
	index, err := layout.ImageIndexFromPath(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %q has no index.json, as the folder of an OCI image layout has", err, dir)
	}
	if err != nil {
		return err
	}
	return i.choose(index, platform, tag)
}

func (i *Image) openTarball(file, tag string) error {
	var want *name.Tag
	if tag != "" {
		t, err := name.NewTag(tag)
		if err != nil {
			return err
		}
		want = &t
	}
	var err error
	i.image, err = tarball.ImageFromPath(file, want)
	return err
}

// hasLayout tells a tar archive of an OCI layout from one of docker's, which newer versions make both at once.
func hasLayout(file string) bool {
	f, err := os.Open(file)
	if err != nil {
		return false
	}
	defer f.Close()
	var has, docker bool
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if err != nil {
			return has && !docker
		}
		has = has || path.Clean(h.Name) == "oci-layout"
		docker = docker || path.Clean(h.Name) == "manifest.json"
	}
}

var blobName = regexp.MustCompile(`^(index\.json|oci-layout|blobs/[a-z0-9]+/[0-9a-f]{32,128})$`)

// extractLayout makes a folder of the archive of a layout. Only what a layout has is taken.
func (i *Image) extractLayout(ctx context.Context, file string) (err error) {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	if i.tmp == "" {
		if i.tmp, err = os.MkdirTemp("", "drafter-image-*"); err != nil {
			return err
		}
	}
	info, err := f.Stat()
	if err != nil {
		return err
	}
	left := info.Size()
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read archive %q: %w", file, err)
		}
		name := path.Clean(h.Name)
		if h.Typeflag != tar.TypeReg || !blobName.MatchString(name) {
			continue
		}
		if left -= h.Size; left < 0 { // files with holes, which no blob has
			return fmt.Errorf("read archive %q: its files have more bytes than it has: it is corrupt", file)
		}
		to := filepath.Join(i.tmp, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(to), 0o700); err != nil {
			return err
		}
		w, err := os.Create(to)
		if err != nil {
			return err
		}
		_, err = io.Copy(w, contextReader{ctx, r})
		if err := errors.Join(err, w.Close()); err != nil {
			return fmt.Errorf("read archive %q: %w", file, err)
		}
	}
}

// contextReader is a reader that ends with a context.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (c contextReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}

// save has a program of the host, the first of those that it has, write an image of its store to an archive, and opens that.
func (i *Image) save(ctx context.Context, reference string, platform *v1.Platform, commands func(file string) [][]string) (err error) {
	if strings.HasPrefix(reference, "-") {
		return fmt.Errorf("%q is no name of an image", reference)
	}
	if i.tmp, err = os.MkdirTemp("", "drafter-image-*"); err != nil {
		return err
	}
	file := filepath.Join(i.tmp, "image.tar")
	var names []string
	for _, argv := range commands(file) {
		names = append(names, argv[0])
		program, err := exec.LookPath(argv[0])
		if err != nil {
			continue
		}
		output, err := exec.CommandContext(ctx, program, argv[1:]...).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%s: %w: %s", argv[0], err, strings.TrimSpace(string(output)))
		}
		if hasLayout(file) {
			if err := i.extractLayout(ctx, file); err != nil {
				return err
			}
			return i.openLayout(i.tmp, "", platform)
		}
		return i.openTarball(file, "")
	}
	return fmt.Errorf("it takes %s to get an image from there: install it, or save the image to a file elsewhere (docker-archive:FILE)", strings.Join(names, " or "))
}

// verify checks digests of what was read, and that the image is what was asked for.
func (i *Image) verify(platform *v1.Platform) error {
	manifest, err := i.image.RawManifest()
	if err != nil {
		return err
	}
	if i.Digest = digestOf(manifest); i.want != "" && i.Digest != i.want {
		return fmt.Errorf("its manifest is %s, not %s as what refers to it says: it is corrupt", i.Digest, i.want)
	}
	m, err := i.image.Manifest()
	if err != nil {
		return err
	}
	if i.config, err = i.image.RawConfigFile(); err != nil {
		return err
	}
	if have := digestOf(i.config); have != m.Config.Digest.String() {
		return fmt.Errorf("its configuration is %s, not %v as its manifest says: it is corrupt", have, m.Config.Digest)
	}
	config, err := i.image.ConfigFile()
	if err != nil {
		return err
	}
	if config.OS != "" && config.OS != "linux" || config.Architecture != "" && config.Architecture != platform.Architecture {
		return fmt.Errorf("it is for %s/%s, not for %s: give that architecture, or another image", config.OS, config.Architecture, platform)
	}
	if len(config.RootFS.DiffIDs) != len(m.Layers) {
		return fmt.Errorf("its configuration has %d layers, its manifest %d: it is corrupt", len(config.RootFS.DiffIDs), len(m.Layers))
	}
	return nil
}
