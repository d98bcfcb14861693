package journal

import (
	"bytes"
	"strings"
	"testing"
)

// disk is a slice as io.ReaderAt and io.WriterAt.
type disk []byte

func (d disk) ReadAt(p []byte, off int64) (int, error)  { return copy(p, d[off:]), nil }
func (d disk) WriteAt(p []byte, off int64) (int, error) { return copy(d[off:], p), nil }

func TestVerify(t *testing.T) {
	const slots = 8
	for _, tc := range []struct {
		name   string
		append uint64
		spoil  func(d disk)
		last   uint64
		err    string
	}{
		{name: "empty"},
		{name: "first", append: 1, last: 1},
		{name: "not yet round", append: 7, last: 7},
		{name: "exactly round", append: 8, last: 8},
		{name: "many rounds", append: 77, last: 77},
		{name: "lost write", append: 77, last: 77, err: "lost",
			spoil: func(d disk) { d.WriteAt(Record(76-slots), 76%slots*RecordSize) }},
		{name: "lost first write", append: 3, last: 3, err: "lost", spoil: func(d disk) { clear(d[RecordSize : 2*RecordSize]) }},
		{name: "flipped bit", append: 77, last: 77, err: "checksum", spoil: func(d disk) { d[75%slots*RecordSize+100] ^= 1 }},
		{name: "torn in flight", append: 77, last: 77, spoil: func(d disk) { d[78%slots*RecordSize+100] ^= 1 }},
		{name: "wrong slot", append: 3, err: "slot 4 holds", spoil: func(d disk) { d.WriteAt(Record(3), 4*RecordSize) }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := make(disk, slots*RecordSize)
			for seq := uint64(1); seq <= tc.append; seq++ {
				if err := Append(d, slots, seq); err != nil {
					t.Fatal(err)
				}
			}
			if tc.spoil != nil {
				tc.spoil(d)
			}
			last, err := Verify(d, slots)
			if (err != nil) != (tc.err != "") || err != nil && !strings.Contains(err.Error(), tc.err) {
				t.Fatalf("Verify: error %v, want %q", err, tc.err)
			}
			if err == nil && last != tc.last {
				t.Fatalf("Verify: newest record %d, want %d", last, tc.last)
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	f.Add(Record(1))
	f.Add(make([]byte, RecordSize))
	f.Fuzz(func(t *testing.T, p []byte) {
		if seq, err := Parse(p); err == nil && seq != 0 && !bytes.Equal(p, Record(seq)) && len(p) != RecordSize {
			t.Fatalf("accepted %d bytes as record %d", len(p), seq)
		}
	})
}
