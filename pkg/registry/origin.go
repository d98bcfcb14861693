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

// WriteOrigin notes in the folder of a package where it came from, by digest.
func WriteOrigin(dir string, ref Reference) error {
	path := filepath.Join(dir, originFile)
	err := os.WriteFile(path+".new", []byte(ref.String()+"\n"), 0o600)
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		return fmt.Errorf("note where package %q came from: %w", dir, errors.Join(err, os.RemoveAll(path+".new")))
	}
	return nil
}

// ReadOrigin reads what WriteOrigin has noted. The error wraps os.ErrNotExist if it has noted nothing.
func ReadOrigin(dir string) (Reference, error) {
	path := filepath.Join(dir, originFile)
	info, err := os.Stat(path)
	if err == nil && info.Size() > 4096 {
		err = errors.New("it is too long")
	}
	var b []byte
	if err == nil {
		b, err = os.ReadFile(path)
	}
	if err != nil {
		return Reference{}, fmt.Errorf("read where package %q came from: %w", dir, err)
	}
	return ParseReference(strings.TrimSpace(string(b)))
}
