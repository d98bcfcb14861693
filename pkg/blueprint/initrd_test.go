package blueprint

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"strings"
	"testing"

	"github.com/cavaliergopher/cpio"
)

func TestInitrdGolden(t *testing.T) {
	var first, second bytes.Buffer
	modules := []*module{{name: "virtio", data: []byte("one")}, {name: "virtio_blk", data: []byte("two!")}}
	for _, b := range []*bytes.Buffer{&first, &second} {
		must(t, writeInitrd(b, []byte("busybox"), modules))
	}
	if !bytes.Equal(first.Bytes(), second.Bytes()) {
		t.Error("two writings differ")
	}
	// The first header, byte for byte (Linux, Documentation/driver-api/early-userspace/buffer-format.rst): magic, inode,
	// mode, uid, gid, links, mtime, size, device and its own device numbers, length of the name, checksum.
	const want = "070701" + "00000001" + "000041ed" + "00000000" + "00000000" + "00000002" + "00000000" + "00000000" + "00000000" + "00000000" + "00000000" + "00000000" + "00000004" + "00000000" + "bin\x00"
	if got := first.String()[:len(want)]; !strings.EqualFold(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
	var names []string
	r := cpio.NewReader(&first)
	for {
		h, err := r.Next()
		if err != nil {
			break
		}
		names = append(names, h.Name)
		if h.Name == "bin/sh" && (h.Linkname != "busybox" || h.Mode&cpio.ModeType != cpio.TypeSymlink) {
			t.Errorf("bin/sh is %+v", h)
		}
	}
	all := strings.Join(names, " ")
	for _, name := range []string{"init", "bin/busybox", "modules/00-virtio.ko", "modules/01-virtio_blk.ko", "newroot", "bin/mkdir"} {
		if !strings.Contains(" "+all+" ", " "+name+" ") {
			t.Errorf("%s is missing among %s", name, all)
		}
	}
	sum := sha256.Sum256(second.Bytes())
	t.Logf("sha256 %s", hex.EncodeToString(sum[:]))
}
