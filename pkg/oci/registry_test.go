package oci

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/drafter-vm/drafter/internal/testregistry"
)

// TestRegistryLogin runs itself with the certificates and the credentials that a user has in files, by which a registry with TLS and a password lets it in.
func TestRegistryLogin(t *testing.T) {
	if reference := os.Getenv("DRAFTER_TEST_LOGIN"); reference != "" {
		b := unpack(t, reference, BundleOptions{})
		fmt.Println("digest:", digest(t, b))
		image, err := Open(t.Context(), reference, OpenOptions{Architecture: "amd64"})
		must(t, err)
		defer image.Close()
		d, err := image.LazyDisk(t.Context(), t.TempDir(), LazyOptions{Background: -1, Disk: tools(t)})
		must(t, err)
		buf := make([]byte, diskBlock)
		_, err = d.ReadAt(buf, d.pieces[0].physical*diskBlock)
		must(t, err)
		must(t, d.Close())
		return
	}
	server := testregistry.Start(t, testregistry.Options{TLS: true, User: "joe", Password: "secret"})
	image := imageOf(t, runs, []entry{file("a"), {Data: "some content", Header: file("b").Header}})
	reference := server.Address + "/private:1"
	skopeo := exec.Command(program(t, "skopeo"), "--insecure-policy", "copy", "--quiet", "--dest-creds", "joe:secret", "--dest-cert-dir", certDir(t, server.CA), "--dest-compress-format", "zstd:chunked", layoutOf(t, image), "docker://"+reference)
	if out, err := skopeo.CombinedOutput(); err != nil {
		t.Fatalf("skopeo: %v: %s", err, out)
	}
	helper := t.TempDir()
	must(t, os.WriteFile(filepath.Join(helper, "docker-credential-tests"), []byte("#!/bin/sh\ncat >/dev/null\necho '{\"Username\":\"joe\",\"Secret\":\"secret\"}'\n"), 0o755))
	config := func(what any) string {
		dir := t.TempDir()
		text, err := json.Marshal(what)
		must(t, err)
		must(t, os.WriteFile(filepath.Join(dir, "config.json"), text, 0o600))
		return dir
	}
	auth := func(password string) any {
		return map[string]any{"auths": map[string]any{server.Address: map[string]string{"auth": base64.StdEncoding.EncodeToString([]byte("joe:" + password))}}}
	}
	podman := filepath.Join(config(auth("secret")), "config.json") // of the same form
	for what, c := range map[string]struct {
		env  []string
		fine bool
	}{
		"podman, beside docker":       {[]string{"DOCKER_CONFIG=" + config(map[string]any{"auths": map[string]any{"other.example": map[string]string{"auth": "YTpi"}}}), "REGISTRY_AUTH_FILE=" + podman, "SSL_CERT_FILE=" + server.CA}, true},
		"podman, and a broken helper": {[]string{"DOCKER_CONFIG=" + config(map[string]any{"credHelpers": map[string]string{server.Address: "absent"}}), "REGISTRY_AUTH_FILE=" + podman, "SSL_CERT_FILE=" + server.CA}, true},
		"a broken helper":             {[]string{"DOCKER_CONFIG=" + config(map[string]any{"credHelpers": map[string]string{server.Address: "absent"}}), "SSL_CERT_FILE=" + server.CA}, false},
		"config":                      {[]string{"DOCKER_CONFIG=" + config(auth("secret")), "SSL_CERT_FILE=" + server.CA}, true},
		"helper":                      {[]string{"DOCKER_CONFIG=" + config(map[string]any{"credHelpers": map[string]string{server.Address: "tests"}}), "SSL_CERT_FILE=" + server.CA}, true},
		"wrong password":              {[]string{"DOCKER_CONFIG=" + config(auth("other")), "SSL_CERT_FILE=" + server.CA}, false},
		"no password":                 {[]string{"DOCKER_CONFIG=" + config(map[string]any{}), "SSL_CERT_FILE=" + server.CA}, false},
		"no certificate":              {[]string{"DOCKER_CONFIG=" + config(auth("secret")), "SSL_CERT_FILE=/dev/null", "SSL_CERT_DIR=/nowhere"}, false},
	} {
		t.Run(what, func(t *testing.T) {
			self, err := os.Executable()
			must(t, err)
			cmd := exec.Command(self, "-test.run", "^TestRegistryLogin$")
			cmd.Env = append(os.Environ(), append(c.env, "DRAFTER_TEST_LOGIN=docker://"+reference, "PATH="+helper+":"+os.Getenv("PATH"))...)
			out, err := cmd.CombinedOutput()
			if (err == nil) != c.fine {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
}

// certDir is a folder with an authority's certificate, as skopeo wants it.
func certDir(t *testing.T, ca string) string {
	t.Helper()
	text, err := os.ReadFile(ca)
	must(t, err)
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "ca.crt"), text, 0o600))
	return dir
}

// Of an image for several architectures it is that which was asked for, whatever else is in the index; and a digest pins it.
func TestPlatforms(t *testing.T) {
	server := testregistry.Start(t, testregistry.Options{})
	var adds []mutate.IndexAddendum
	digests := map[string]string{}
	for _, platform := range []v1.Platform{{OS: "linux", Architecture: "amd64"}, {OS: "linux", Architecture: "arm64", Variant: "v8"}, {OS: "windows", Architecture: "amd64"}} {
		image := imageOf(t, v1.Config{Cmd: []string{platform.Architecture}}, []entry{file(platform.String())})
		config, err := image.ConfigFile()
		must(t, err)
		config = config.DeepCopy()
		config.OS, config.Architecture, config.Variant = platform.OS, platform.Architecture, platform.Variant
		image, err = mutate.ConfigFile(image, config)
		must(t, err)
		d, err := image.Digest()
		must(t, err)
		digests[platform.Architecture+platform.OS] = d.String()
		adds = append(adds, mutate.IndexAddendum{Add: image, Descriptor: v1.Descriptor{Platform: &platform}})
	}
	attestation := imageOf(t, runs, []entry{file("provenance")})
	adds = append(adds, mutate.IndexAddendum{Add: attestation, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "unknown", Architecture: "unknown"}, Annotations: map[string]string{"vnd.docker.reference.type": "attestation-manifest"}}})
	ref, err := name.ParseReference(server.Address + "/multi:1")
	must(t, err)
	must(t, remote.WriteIndex(ref, mutate.AppendManifests(empty.Index, adds...), remote.WithAuthFromKeychain(authn.DefaultKeychain), remote.WithTransport(http.DefaultTransport)))
	for arch, want := range map[string]string{"amd64": "amd64linux", "arm64": "arm64linux", "arm64/v8": "arm64linux"} {
		image, err := Open(t.Context(), server.Address+"/multi:1", OpenOptions{Architecture: arch})
		must(t, err)
		if image.Digest != digests[want] {
			t.Errorf("%s: %s, want %s", arch, image.Digest, digests[want])
		}
		pinned, err := image.Pinned()
		must(t, err)
		again, err := Open(t.Context(), pinned, OpenOptions{Architecture: arch})
		must(t, err)
		if again.Digest != image.Digest {
			t.Errorf("%s: pinned as %s it is %s", arch, pinned, again.Digest)
		}
		must(t, image.Close())
		must(t, again.Close())
	}
	_, err = Open(t.Context(), server.Address+"/multi:1", OpenOptions{Architecture: "s390x"})
	wantError(t, err, "s390x", "linux/amd64", "linux/arm64/v8")
}
