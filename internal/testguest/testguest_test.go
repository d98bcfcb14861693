package testguest

import (
	"os"
	"testing"
)

func TestBuild(t *testing.T) {
	for range 2 { // the second finds everything in the cache
		vmlinux, initrd := Build(t)
		for _, path := range []string{vmlinux, initrd} {
			if info, err := os.Stat(path); err != nil || info.Size() < 1<<20 {
				t.Fatalf("%s: %v, %v", path, info, err)
			}
		}
	}
	_, plain := Build(t)
	if _, more := BuildWith(t, map[string]string{"/etc/hosts": "/etc/hosts"}); more == plain {
		t.Fatalf("an initramfs with more files has the same name, %s", more)
	}
}
