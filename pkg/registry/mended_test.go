package registry

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/drafter-vm/drafter/internal/testimage"
	"github.com/drafter-vm/drafter/internal/testregistry"
)

// A container's image, also one for several platforms, is not replaced by a package of the same name.
func TestForeign(t *testing.T) {
	server := testregistry.Start(t, testregistry.Options{})
	image, err := testimage.Assemble(v1.Config{Cmd: []string{"x"}})
	if err != nil {
		t.Fatal(err)
	}
	tag, err := name.ParseReference(server.Address + "/library/nginx:1")
	if err != nil {
		t.Fatal(err)
	}
	index := mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: image, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "amd64"}}})
	if err := remote.WriteIndex(tag, index); err != nil {
		t.Fatal(err)
	}
	before, err := remote.Head(tag)
	if err != nil {
		t.Fatal(err)
	}
	_, err = Push(t.Context(), makePackage(t, sample()), reference(t, server.Address+"/library/nginx:1"), PushOptions{packSize: 4 << 20, Transport: quiet, Platform: "linux/amd64"})
	if !errors.Is(err, ErrForeign) || !strings.Contains(err.Error(), "another tag") {
		t.Errorf("a package over an image: %v", err)
	}
	if after, err := remote.Head(tag); err != nil || after.Digest != before.Digest {
		t.Errorf("the image is %v now, and was %v: %v", after, before.Digest, err)
	}
}

// What a registry has lost is sent again by the next push, whatever the tag says that is there.
func TestLostPack(t *testing.T) {
	server := testregistry.Start(t, testregistry.Options{})
	ref := reference(t, server.Address+"/vms/web:1")
	dir := makePackage(t, sample())
	mustPush(t, dir, ref)
	p, err := Open(t.Context(), ref, onAMD64.OpenOptions)
	if err != nil {
		t.Fatal(err)
	}
	lost := p.artifact.indexes[0].packs[0].digest
	// The registry keeps a link of the repository beside the content.
	link := filepath.Join(server.Dir, "docker/registry/v2/repositories/vms/web/_layers/sha256", lost.Encoded(), "link")
	if err := errors.Join(os.Remove(link), os.Remove(server.Blob(lost.String()))); err != nil {
		t.Fatal(err)
	}
	server.Stop() // what it remembers goes, too
	server.Restart()
	if _, err := Pull(t.Context(), ref, filepath.Join(t.TempDir(), "x"), onAMD64); err == nil {
		t.Fatal("nothing is lost")
	}
	mustPush(t, dir, ref)
	mustPull(t, ref, dir)
}
