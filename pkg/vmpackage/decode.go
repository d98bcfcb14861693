package vmpackage

import "fmt"

// DecodeManifest decodes and checks the content of a manifest file, for packages that are kept in another form than these two.
func DecodeManifest(b []byte) (*Manifest, error) {
	if len(b) > maxManifestSize {
		return nil, fmt.Errorf("%s has %d bytes, more than %d: %w", ManifestFile, len(b), maxManifestSize, ErrCorrupt)
	}
	return decodeManifest(b)
}
