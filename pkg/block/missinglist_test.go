package block

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
)

// FuzzMissingList checks that no file makes a list of what is missing panic, or name a block that there is not, and that what
// is read is read the same again after it was written.
func FuzzMissingList(f *testing.F) {
	const size, blockSize = 1<<20 + 512, 4096
	const blocks = (size + blockSize - 1) / blockSize
	header := encodeMissingHeader(blockSize, size)
	one := appendBatch(bytes.Clone(header), 1, 0, []stateRun{{3, 7, listedMissing}, {200, 57, listedMissing}})
	two := appendBatch(bytes.Clone(one), 2, 0, []stateRun{{5, 1, listedPresent}})
	f.Add(header)
	f.Add(one)
	f.Add(two)
	f.Add(two[:len(two)-1])
	f.Add(appendBatch(bytes.Clone(header), 1, 0, []stateRun{{blocks, 1, listedMissing}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		read := func(b []byte) (*missingList, []Range, error) {
			path := filepath.Join(t.TempDir(), "list")
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
			m, err := openMissingList(hostStorage{}, path, size)
			if err != nil {
				return nil, nil, err
			}
			t.Cleanup(func() { m.close() })
			return m, m.missing((size + m.blockSize - 1) / m.blockSize), nil
		}
		m, missing, err := read(b)
		if err != nil {
			return
		}
		runs := []stateRun{}
		n := (int64(size) + m.blockSize - 1) / m.blockSize
		for i, r := range missing {
			if r.Length <= 0 || r.Offset < 0 || r.Offset+r.Length > n || i > 0 && missing[i-1].Offset+missing[i-1].Length >= r.Offset {
				t.Fatalf("of %d blocks, missing are %v", n, missing)
			}
			runs = append(runs, stateRun{r.Offset, r.Length, listedMissing})
		}
		_, again, err := read(appendBatch(encodeMissingHeader(m.blockSize, size), 1, 0, runs))
		if err != nil {
			t.Fatal(err)
		}
		if len(again) != len(missing) {
			t.Fatalf("missing are %v, and %v after it was written and read", missing, again)
		}
		for i := range again {
			if again[i] != missing[i] {
				t.Fatalf("missing are %v, and %v after it was written and read", missing, again)
			}
		}
	})
}
