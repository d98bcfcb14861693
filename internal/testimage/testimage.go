// Package testimage makes OCI images of Debian packages, for tests: real programs in several layers, with whiteouts, owners, capabilities and devices.
//
// An image is made once a machine and kept, below the user's cache folder, under a name that is a digest of what it is made of.
package testimage

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// T is what the package needs of a test or a benchmark.
type T interface {
	Helper()
	Fatalf(format string, args ...any)
}

// File is a file of a layer. Its name is without a leading slash.
type File struct {
	tar.Header
	Data string
}

// Spec says what an image is made of. Its layers, from below: a base of Base, the Packages, the Files, the Last.
type Spec struct {
	Base, Packages []string // of Debian
	Files, Last    []File
	Config         v1.Config
}

// debian are packages that all images have: a shell, and what programs are linked with.
var debian = []string{"libc6", "libgcc-s1", "dash", "coreutils", "libacl1", "libattr1", "libgmp10", "libselinux1", "libpcre2-8-0", "libssl3", "zlib1g", "libcrypt1"}

// Valkey is a Valkey server as images have it: a user of its own, an entrypoint that becomes that user, a volume with its data, a port.
func Valkey() Spec {
	return Spec{
		Base:     debian,
		Packages: []string{"valkey-server", "valkey-tools", "libatomic1", "libstdc++6", "libjemalloc2", "liblzf1", "libsystemd0", "libcap2", "libgcrypt20", "libgpg-error0", "liblz4-1", "liblzma5", "libzstd1", "util-linux", "libcap-ng0"},
		Files: append(accounts("valkey:x:999:999::/data:/bin/sh", "valkey:x:999:"),
			File{tar.Header{Name: "data/", Typeflag: tar.TypeDir, Mode: 0o755, Uid: 999, Gid: 999}, ""},
			File{tar.Header{Name: "data/readme", Mode: 0o644, Uid: 999, Gid: 999}, "of the image\n"},
			File{tar.Header{Name: "usr/local/bin/docker-entrypoint.sh", Mode: 0o755}, `#!/bin/sh
set -e
if [ "$(id -u)" = 0 ]; then
	chown valkey /data
	exec setpriv --reuid=valkey --regid=valkey --clear-groups -- "$0" "$@"
fi
exec "$@"
`},
		),
		Last: append(rubbish(), File{tar.Header{Name: "etc/valkey/.wh.valkey.conf"}, ""}),
		Config: v1.Config{
			Entrypoint: []string{"docker-entrypoint.sh"}, Cmd: []string{"valkey-server", "--protected-mode", "no", "--bind", "*", "-::*"}, WorkingDir: "/data",
			Env:          []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "VALKEY_VERSION=8"},
			ExposedPorts: map[string]struct{}{"6379/tcp": {}}, Volumes: map[string]struct{}{"/data": {}}, StopSignal: "SIGTERM",
		},
	}
}

// Nginx is a web server that answers "hello from nginx", as a user that is none of its base.
func Nginx() Spec {
	return Spec{
		Base:     debian,
		Packages: []string{"nginx", "nginx-common", "libcrypt1"},
		Files: append(accounts("www-data:x:33:33::/var/www:/usr/sbin/nologin", "www-data:x:33:"),
			File{tar.Header{Name: "var/www/html/index.html", Mode: 0o644}, "hello from nginx\n"},
			File{tar.Header{Name: "var/log/nginx/", Typeflag: tar.TypeDir, Mode: 0o755, Uid: 33, Gid: 33}, ""},
			File{tar.Header{Name: "var/log/nginx/access.log", Typeflag: tar.TypeSymlink, Linkname: "/dev/stdout", Mode: 0o777}, ""},
			File{tar.Header{Name: "var/log/nginx/error.log", Typeflag: tar.TypeSymlink, Linkname: "/dev/stderr", Mode: 0o777}, ""},
			File{tar.Header{Name: "etc/nginx/nginx.conf", Mode: 0o644}, "worker_processes 1;\nerror_log stderr;\npid /tmp/nginx.pid;\nevents {}\nhttp { access_log off; server { listen 8080; root /var/www/html; } }\n"},
		),
		Last: rubbish(),
		Config: v1.Config{
			Cmd: []string{"nginx", "-g", "daemon off;"}, User: "www-data", ExposedPorts: map[string]struct{}{"8080/tcp": {}},
			Env: []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"},
		},
	}
}

// Python is a small web application: it counts its requests, and says its count, its environment variable GREETING and its host name.
func Python() Spec {
	return Spec{
		Base:     debian,
		Packages: []string{"python3-minimal", "python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib", "libexpat1", "libffi8", "libbz2-1.0", "liblzma5", "libuuid1"},
		Files: append(accounts("app:x:1000:1000:An application:/srv/app:/bin/sh", "app:x:1000:\nextra:x:2000:app"),
			File{tar.Header{Name: "srv/app/", Typeflag: tar.TypeDir, Mode: 0o750, Uid: 1000, Gid: 1000}, ""},
			File{tar.Header{Name: "srv/app/app.py", Mode: 0o640, Uid: 1000, Gid: 1000}, Application},
			File{tar.Header{Name: "usr/bin/python3", Typeflag: tar.TypeSymlink, Linkname: "python3.11", Mode: 0o777}, ""},
		),
		Last: rubbish(),
		Config: v1.Config{
			Entrypoint: []string{"python3", "-u"}, Cmd: []string{"app.py"}, User: "app", WorkingDir: "/srv/app", ExposedPorts: map[string]struct{}{"8000/tcp": {}},
			Env: []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "GREETING=hello"},
		},
	}
}

// Application is the program of Python's image.
const Application = `import http.server, os, socket

class Handler(http.server.BaseHTTPRequestHandler):
    count = 0

    def do_GET(self):
        Handler.count += 1
        body = f"{os.environ['GREETING']} {Handler.count} {socket.gethostname()}\n".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    protocol_version = "HTTP/1.1"

class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6

print("listening", flush=True)
Server(("::", 8000), Handler).serve_forever()
`

// accounts are the files of users and groups.
func accounts(user, group string) []File {
	return []File{
		{tar.Header{Name: "etc/passwd", Mode: 0o644}, "root:x:0:0:root:/root:/bin/sh\n" + user + "\n"},
		{tar.Header{Name: "etc/group", Mode: 0o644}, "root:x:0:\n" + group + "\n"},
		{tar.Header{Name: "etc/shadow", Mode: 0o640, Gid: 42}, "root:*:19000:0:99999:7:::\n"},
	}
}

// rubbish takes away what nobody needs, by each kind of whiteout, and has files of each kind.
func rubbish() []File {
	return []File{
		{tar.Header{Name: "usr/share/doc/.wh..wh..opq"}, ""},
		{tar.Header{Name: "usr/share/doc/README", Mode: 0o644}, "only this\n"},
		{tar.Header{Name: "usr/share/.wh.man"}, ""},
		{tar.Header{Name: "usr/share/.wh.locale"}, ""},
		{tar.Header{Name: "opt/links/", Typeflag: tar.TypeDir, Mode: 0o1777}, ""},
		{tar.Header{Name: "opt/links/first", Mode: 0o4755, Uid: 1, Gid: 2}, "one inode\n"},
		{tar.Header{Name: "opt/links/second", Typeflag: tar.TypeLink, Linkname: "opt/links/first"}, ""},
		{tar.Header{Name: "opt/capable", Mode: 0o755, PAXRecords: map[string]string{"SCHILY.xattr.security.capability": "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00", "SCHILY.xattr.user.note": "kept"}}, "#!/bin/sh\n"},
		{tar.Header{Name: "opt/null", Typeflag: tar.TypeChar, Mode: 0o666, Devmajor: 1, Devminor: 3}, ""},
		{tar.Header{Name: "opt/pipe", Typeflag: tar.TypeFifo, Mode: 0o600, Uid: 7, Gid: 7}, ""},
		{tar.Header{Name: "opt/secret", Mode: 0o000, Uid: 4242, Gid: 4242}, "unreadable\n"},
	}
}

// Make makes an image, or finds it.
func Make(t T, spec Spec) v1.Image {
	t.Helper()
	image, err := assembled(spec)
	if err != nil {
		t.Fatalf("make image: %v", err)
	}
	return image
}

// version is raised when the same spec makes another image.
const version = 2

func assembled(spec Spec) (v1.Image, error) {
	base, err := os.UserCacheDir()
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(base, "drafter", "testimage", fmt.Sprintf("%x", sha256.Sum256(fmt.Appendf(nil, "%d %+v", version, spec)))[:32])
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		if err := build(spec, dir); err != nil {
			return nil, err
		}
	}
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return nil, err
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		return nil, err
	}
	return index.Image(manifest.Manifests[0].Digest)
}

func build(spec Spec, dir string) (err error) {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dir), ".new-*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	var layers []v1.Layer
	for n, packages := range [][]string{spec.Base, spec.Packages} {
		if len(packages) == 0 {
			continue
		}
		debs := filepath.Join(tmp, fmt.Sprint("debs", n))
		if err := os.Mkdir(debs, 0o777); err != nil {
			return err
		}
		if err := download(debs, packages); err != nil {
			return err
		}
		l, err := packageLayer(debs, n == 0)
		if err != nil {
			return err
		}
		layers = append(layers, l)
	}
	for _, files := range [][]File{spec.Files, spec.Last} {
		if len(files) > 0 {
			l, err := Layer(files)
			if err != nil {
				return err
			}
			layers = append(layers, l)
		}
	}
	image, err := Assemble(spec.Config, layers...)
	if err != nil {
		return err
	}
	out := filepath.Join(tmp, "layout")
	path, err := layout.Write(out, empty.Index)
	if err != nil {
		return err
	}
	if err := path.AppendImage(image); err != nil {
		return err
	}
	if err := os.Rename(out, dir); err != nil {
		if _, statErr := os.Stat(dir); statErr == nil {
			return nil // somebody else was faster
		}
		return err
	}
	return nil
}

// download gets packages. Where the lists of this machine are too old for that, or not there, it gets those, too.
func download(dir string, packages []string) error {
	get := func() ([]byte, error) {
		cmd := exec.Command("apt-get", append([]string{"download", "-q", "-o", "APT::Sandbox::User=root"}, packages...)...)
		cmd.Dir = dir
		return cmd.CombinedOutput()
	}
	out, err := get()
	if err != nil {
		if out, err := exec.Command("apt-get", "update", "-q").CombinedOutput(); err != nil {
			return fmt.Errorf("apt-get update: %w: %s", err, out)
		}
		out, err = get()
	}
	if err != nil {
		return fmt.Errorf("apt-get download %s: %w: %s", strings.Join(packages, " "), err, out)
	}
	return nil
}

// Assemble makes an OCI image of layers.
func Assemble(config v1.Config, layers ...v1.Layer) (v1.Image, error) {
	image := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	image, err := mutate.AppendLayers(image, layers...)
	if err != nil {
		return nil, err
	}
	file, err := image.ConfigFile()
	if err != nil {
		return nil, err
	}
	file = file.DeepCopy()
	file.Architecture, file.OS, file.Config, file.Created = "amd64", "linux", config, v1.Time{Time: time.Unix(1_700_000_000, 0).UTC()}
	return mutate.ConfigFile(image, file)
}

// Layer makes a layer of files.
func Layer(files []File) (v1.Layer, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		h := f.Header
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		h.Size, h.Format = int64(len(f.Data)), tar.FormatPAX
		if h.ModTime.IsZero() {
			h.ModTime = time.Unix(1_600_000_000, 0)
		}
		if err := w.WriteHeader(&h); err != nil {
			return nil, err
		}
		if _, err := io.WriteString(w, f.Data); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return layerOf(b.Bytes())
}

func layerOf(data []byte) (v1.Layer, error) {
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil }, tarball.WithMediaType(types.OCILayer))
}

// packageLayer makes a layer of what is in packages, on a system whose /bin, /lib, /lib64 and /sbin are links.
func packageLayer(debs string, links bool) (v1.Layer, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	seen := map[string]bool{} // a layer has each path once
	merged := []string{"bin", "lib", "lib64", "sbin"}
	if links {
		for _, name := range merged {
			for _, h := range []*tar.Header{
				{Name: "usr/" + name + "/", Typeflag: tar.TypeDir, Mode: 0o755, ModTime: time.Unix(1_600_000_000, 0)},
				{Name: name, Typeflag: tar.TypeSymlink, Linkname: "usr/" + name, Mode: 0o777, ModTime: time.Unix(1_600_000_000, 0)},
			} {
				seen[strings.TrimSuffix(h.Name, "/")] = true
				if err := w.WriteHeader(h); err != nil {
					return nil, err
				}
			}
		}
	}
	files, err := filepath.Glob(filepath.Join(debs, "*.deb"))
	if err != nil {
		return nil, err
	}
	slices.Sort(files)
	for _, file := range files {
		data, err := exec.Command("dpkg-deb", "--fsys-tarfile", file).Output()
		if err != nil {
			return nil, fmt.Errorf("unpack %s: %w", file, err)
		}
		for r := tar.NewReader(bytes.NewReader(data)); ; {
			h, err := r.Next()
			if err == io.EOF {
				break
			}
			if err != nil {
				return nil, fmt.Errorf("unpack %s: %w", file, err)
			}
			name := path.Clean(h.Name)
			if first, _, _ := strings.Cut(name, "/"); slices.Contains(merged, first) {
				name = "usr/" + name
			}
			if name == "." || seen[name] {
				continue
			}
			seen[name] = true
			h.Name = name
			if h.Typeflag == tar.TypeDir {
				h.Name += "/"
			}
			if h.Typeflag == tar.TypeLink {
				h.Linkname = path.Clean(h.Linkname)
			}
			h.Format = tar.FormatPAX
			if err := w.WriteHeader(h); err != nil {
				return nil, err
			}
			if _, err := io.Copy(w, r); err != nil {
				return nil, err
			}
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return layerOf(b.Bytes())
}

// WriteLayout writes an image as a folder with the OCI layout, under a tag.
func WriteLayout(t T, dir, tag string, images ...v1.Image) {
	t.Helper()
	p, err := layout.Write(dir, empty.Index)
	for _, image := range images {
		if err == nil {
			err = p.AppendImage(image, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": tag}))
		}
	}
	if err != nil {
		t.Fatalf("write layout: %v", err)
	}
}
