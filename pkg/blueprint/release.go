package blueprint

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/clearsign"
)

// archiveKeyring is where Debian's package debian-archive-keyring puts the keys its archive signs with.
const archiveKeyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

// release is a suite's signed table of contents.
type release struct {
	source Source
	byHash bool
	files  map[string]releaseFile // by path relative to the suite
}

type releaseFile struct {
	sum  string
	size int64
}

// fetchRelease downloads a suite's InRelease file and verifies its signature. Everything else of the archive is
// verified by digests that begin here.
func (c *cache) fetchRelease(ctx context.Context, s Source) (*release, error) {
	url := s.URI + "/dists/" + s.Suite + "/InRelease"
	data, err := c.get(ctx, url, 4<<20)
	if err != nil {
		return nil, err
	}
	keys, err := readKeyring(s.SignedBy)
	if err != nil {
		return nil, err
	}
	text, err := verifyClearsigned(data, keys)
	if err != nil {
		return nil, fmt.Errorf("verify %s: %w", url, err)
	}
	r, err := parseRelease(text)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", url, err)
	}
	r.source = s
	return r, nil
}

// readKeyring reads the keys of signedBy: a path, an armored key, or empty for the archive keyring.
func readKeyring(signedBy string) (openpgp.EntityList, error) {
	if strings.Contains(signedBy, "\n") {
		keys, err := openpgp.ReadArmoredKeyRing(strings.NewReader(signedBy))
		if err != nil {
			return nil, fmt.Errorf("read the key given in an apt source: %w", err)
		}
		return keys, nil
	}
	if signedBy == "" {
		signedBy = archiveKeyring
	}
	var all openpgp.EntityList
	for path := range strings.FieldsFuncSeq(signedBy, func(r rune) bool { return r == ' ' || r == ',' }) {
		data, err := os.ReadFile(path)
		if err != nil {
			return nil, fmt.Errorf("read archive keyring: %w; install the package debian-archive-keyring", err)
		}
		read := openpgp.ReadKeyRing
		if bytes.Contains(data, []byte("-----BEGIN PGP")) {
			read = openpgp.ReadArmoredKeyRing
		}
		keys, err := read(bytes.NewReader(data))
		if err != nil {
			return nil, fmt.Errorf("read archive keyring %q: %w", path, err)
		}
		all = append(all, keys...)
	}
	return all, nil
}

// verifyClearsigned returns the signed text. A suite is signed by several keys (old and new release); one that we know
// suffices, as for apt.
func verifyClearsigned(data []byte, keys openpgp.EntityList) ([]byte, error) {
	block, _ := clearsign.Decode(data)
	if block == nil {
		return nil, errors.New("not a signed file: a proxy or login page may answer for the mirror")
	}
	if _, err := block.VerifySignature(keys, nil); err != nil {
		return nil, fmt.Errorf("bad signature: %w; the keyring may be too old (package debian-archive-keyring)", err)
	}
	return block.Bytes, nil
}

func parseRelease(text []byte) (*release, error) {
	r := &release{files: map[string]releaseFile{}}
	for st := range stanzas(text) {
		r.byHash = st.get("Acquire-By-Hash") == "yes"
		if until := st.get("Valid-Until"); until != "" {
			t, err := time.Parse("Mon, 2 Jan 2006 15:04:05 MST", until)
			if err == nil && time.Now().After(t) {
				return nil, fmt.Errorf("expired on %s: the mirror is stale or this machine's clock is wrong", until)
			}
		}
		for line := range strings.Lines(st.get("SHA256")) {
			f := strings.Fields(line)
			if len(f) != 3 {
				continue
			}
			size, err := strconv.ParseInt(f[1], 10, 64)
			if _, hexErr := hex.DecodeString(f[0]); err != nil || hexErr != nil || len(f[0]) != 64 || size < 0 {
				return nil, fmt.Errorf("bad digest line %q", strings.TrimSpace(line))
			}
			r.files[f[2]] = releaseFile{f[0], size}
		}
	}
	if len(r.files) == 0 {
		return nil, errors.New("lists no files by SHA256")
	}
	return r, nil
}

// fetchPackages downloads the index of one component, in the smallest form served, and returns it as text.
func (c *cache) fetchPackages(ctx context.Context, r *release, component, arch string, count func(int64)) ([]byte, error) {
	base := component + "/binary-" + arch + "/Packages"
	for _, suffix := range []string{".xz", ".gz", ""} {
		f, ok := r.files[base+suffix]
		if !ok {
			continue
		}
		dir := r.source.URI + "/dists/" + r.source.Suite + "/"
		url := dir + base + suffix
		if r.byHash {
			url = dir + component + "/binary-" + arch + "/by-hash/SHA256/" + f.sum
		}
		if err := c.fetch(ctx, url, f.sum, f.size, count); err != nil {
			return nil, err
		}
		data, err := readCompressed(c.path(f.sum), suffix)
		if err != nil {
			return nil, fmt.Errorf("unpack package index %s: %w", url, err)
		}
		return data, nil
	}
	return nil, fmt.Errorf("%s has no packages of component %q for architecture %q", r.source, component, arch)
}
