package blueprint

import (
	"path/filepath"
	"strings"
	"testing"
)

const digestA = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"

func TestLockRoundTrip(t *testing.T) {
	l := &lockFile{
		request: "bookworm amd64 base-1 linux-image-cloud-amd64 valkey-server",
		system:  []Package{{"libc6", "2.36-9", "amd64", digestA, 42, "bookworm", "pool/main/g/glibc/libc6.deb"}},
		kernel:  []Package{{"linux-image-x", "1:6.1~bpo", "amd64", digestA, 43, "bookworm-security", "pool/k.deb"}},
		tools:   []Package{{"kmod", "30+20221128-1", "all", digestA, 44, "bookworm", "pool/t.deb"}},
	}
	const golden = "# Written by `drafter blueprint`: the exact packages of a blueprint. --update-lock brings it up to date.\n" +
		"drafter-blueprint-lock 1\nrequest bookworm amd64 base-1 linux-image-cloud-amd64 valkey-server\n" +
		"system libc6 2.36-9 amd64 42 " + digestA + " bookworm pool/main/g/glibc/libc6.deb\n" +
		"kernel linux-image-x 1:6.1~bpo amd64 43 " + digestA + " bookworm-security pool/k.deb\n" +
		"tool kmod 30+20221128-1 all 44 " + digestA + " bookworm pool/t.deb\n"
	if got := string(l.text()); got != golden {
		t.Errorf("got\n%swant\n%s", got, golden)
	}
	path := filepath.Join(t.TempDir(), "sub", "x.lock")
	if err := l.write(path); err != nil {
		t.Fatal(err)
	}
	again, inFile, err := readLock(path)
	if err != nil || !inFile || string(again.text()) != golden {
		t.Errorf("read back %q, in file %v, error %v", again.text(), inFile, err)
	}
}

func TestLockErrors(t *testing.T) {
	for _, test := range []struct{ text, want string }{
		{"", "it is empty"}, {"something else\n", "not a lock file"}, {lockHeader + "\nrole x\n", "unknown role"}, {lockHeader + "\nsystem a b\n", "fields"},
		{lockHeader + "\nsystem ab 1 amd64 x " + digestA + " s p\n", "size"}, {lockHeader + "\nsystem ab 1 amd64 1 abc s p\n", "sha256"},
		{lockHeader + "\nsystem ../x 1 amd64 1 " + digestA + " s p\n", "package name"},
	} {
		if _, err := parseLock([]byte(test.text)); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%q: got error %v, want one with %q", test.text, err, test.want)
		}
	}
}

// The lock that the program carries must be one, for the request the command makes by default.
func TestDefaultLock(t *testing.T) {
	l, err := parseLock(defaultLock)
	if err != nil {
		t.Fatal(err)
	}
	want := Config{Suite: "bookworm", Arch: "amd64", KernelPackage: "linux-image-cloud-amd64", Packages: []string{"valkey-server"}}.request()
	if l.request != want {
		t.Errorf("the default lock is for %q, the default request is %q: run `drafter blueprint --update-lock --lock pkg/blueprint/blueprint.lock`", l.request, want)
	}
	if len(l.kernel) != 1 || len(l.system) < 50 || len(l.tools) < 10 {
		t.Errorf("it has %d kernels, %d packages and %d tools", len(l.kernel), len(l.system), len(l.tools))
	}
}
