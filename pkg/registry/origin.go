package registry

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// originFile is a file in the folder of a package, beside its devices, that says where it came from.
const originFile = ".origin"

// Origin is where a package came from.
type Origin struct {
	Reference Reference // with the digest of the package for its platform
	Asked     Reference // what was asked for: by a tag, say, or by the digest of an index of several platforms
}

// ParseOrigin reads what String returns.
func ParseOrigin(s string) (o Origin, err error) {
	reference, asked, _ := strings.Cut(s, ",")
	if o.Reference, err = ParseReference(reference); err == nil {
		o.Asked, err = ParseReference(asked)
	}
	return o, err
}

// String is a word, without spaces.
func (o Origin) String() string { return o.Reference.String() + "," + o.Asked.String() }

// Is reports whether somebody who asks for ref may mean this one: it is what was asked for, or the same with less said of it.
func (o Origin) Is(ref Reference) bool { return ref == o.Asked || ref.Names(o.Reference) }

// WriteOrigin notes in the folder of a package where it came from.
func WriteOrigin(dir string, o Origin) error {
	path := filepath.Join(dir, originFile)
	err := os.WriteFile(path+".new", []byte(o.String()+"\n"), 0o600)
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		return fmt.Errorf("note where package %q came from: %w", dir, errors.Join(err, os.RemoveAll(path+".new")))
	}
	return nil
}

// ReadOrigin reads what WriteOrigin has noted. The error wraps os.ErrNotExist if it has noted nothing.
func ReadOrigin(dir string) (Origin, error) {
	path := filepath.Join(dir, originFile)
	info, err := os.Stat(path)
	if err == nil && info.Size() > 4096 {
		err = errors.New("it is too long")
	}
	var b []byte
	if err == nil {
		b, err = os.ReadFile(path)
	}
	var o Origin
	if err == nil {
		o, err = ParseOrigin(strings.TrimSpace(string(b)))
	}
	if err != nil {
		return Origin{}, fmt.Errorf("read where package %q came from: %w", dir, err)
	}
	return o, nil
}
