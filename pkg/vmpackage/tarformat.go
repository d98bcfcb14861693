package vmpackage

import (
	"fmt"
	"io"
	"slices"
	"strconv"
)

// The tar format that archives are written in: pax (POSIX.1-2001), with sparse files in the format 1.0 of GNU tar
// (https://www.gnu.org/software/tar/manual/html_section/Sparse-Formats.html). archive/tar reads it but does not write
// it, therefore the writing is done here.

const (
	tarBlock = 512
	// maxSparseMap is how long the map of a sparse file may get, in bytes. archive/tar refuses maps above 1 MiB.
	maxSparseMap = 1 << 20
	// maxOctal is the largest size that fits the 11 octal digits of a header; larger ones go into a pax record.
	maxOctal = 1<<33 - 1
	// modTime is the time all entries have, 1980-01-01 00:00 UTC: GNU tar warns of an implausible time before 1970-01-02.
	modTime = 315532800
)

// tarWriter writes the entries of an archive. Its errors are those of w.
type tarWriter struct{ w io.Writer }

// file writes the header of a regular file of size bytes, whose content the caller writes next, followed by pad.
func (t tarWriter) file(name string, size int64) error {
	var records []string
	if size > maxOctal {
		records = append(records, paxRecord("size", strconv.FormatInt(size, 10)))
	}
	return t.header(name, name, size, records)
}

// sparseFile writes the header and the map of a sparse file. The caller writes the data of the extents next, followed by
// pad(of their total length).
func (t tarWriter) sparseFile(name string, size int64, extents []extent) error {
	table := sparseMap(size, extents)
	stored := int64(len(table))
	for _, e := range extents {
		stored += e.length
	}
	records := []string{
		paxRecord("GNU.sparse.major", "1"),
		paxRecord("GNU.sparse.minor", "0"),
		paxRecord("GNU.sparse.name", name),
		paxRecord("GNU.sparse.realsize", strconv.FormatInt(size, 10)),
	}
	if stored > maxOctal {
		records = append(records, paxRecord("size", strconv.FormatInt(stored, 10)))
	}
	// The name that programs without support for sparse files extract the raw entry to is GNU tar's.
	if err := t.header(name, "GNUSparseFile.0/"+name, stored, records); err != nil {
		return err
	}
	_, err := t.w.Write(table)
	return err
}

// pad fills the last block of an entry whose content was n bytes long.
func (t tarWriter) pad(n int64) error {
	_, err := t.w.Write(zeros[:(tarBlock-n%tarBlock)%tarBlock])
	return err
}

// end writes the end of the archive.
func (t tarWriter) end() error {
	_, err := t.w.Write(zeros[:2*tarBlock])
	return err
}

// header writes the header of an entry, preceded by the entry that holds its pax records.
func (t tarWriter) header(name, headerName string, size int64, records []string) error {
	if len(records) > 0 {
		var body []byte
		for _, r := range records {
			body = append(body, r...)
		}
		h := ustarHeader("PaxHeaders/"+name, int64(len(body)), 'x')
		if _, err := t.w.Write(h[:]); err != nil {
			return err
		}
		if _, err := t.w.Write(body); err != nil {
			return err
		}
		if err := t.pad(int64(len(body))); err != nil {
			return err
		}
	}
	h := ustarHeader(headerName, size, '0')
	_, err := t.w.Write(h[:])
	return err
}

// ustarHeader lays out a header block. A size above maxOctal is left 0, its pax record holds. Names are short here:
// checkFile bounds them.
func ustarHeader(name string, size int64, typeflag byte) [tarBlock]byte {
	var h [tarBlock]byte
	octal := func(field []byte, v int64) { copy(field, fmt.Sprintf("%0*o", len(field)-1, v)) }
	if size > maxOctal {
		size = 0
	}
	copy(h[0:100], name)
	octal(h[100:108], 0o600) // mode
	octal(h[108:116], 0)     // uid
	octal(h[116:124], 0)     // gid
	octal(h[124:136], size)
	octal(h[136:148], modTime)
	h[156] = typeflag
	copy(h[257:265], "ustar\x0000") // magic and version
	octal(h[329:337], 0)            // device numbers, as GNU tar writes them
	octal(h[337:345], 0)

	copy(h[148:156], "        ")
	var sum int64
	for _, b := range h {
		sum += int64(b)
	}
	copy(h[148:156], fmt.Sprintf("%06o\x00 ", sum))
	return h
}

// paxRecord is "LENGTH KEY=VALUE\n", where LENGTH counts itself.
func paxRecord(key, value string) string {
	rest := " " + key + "=" + value + "\n"
	n := len(rest) + len(strconv.Itoa(len(rest)))
	if len(strconv.Itoa(n)) > len(strconv.Itoa(len(rest))) {
		n++
	}
	return strconv.Itoa(n) + rest
}

// sparseMap is what precedes the data of a sparse file: the number of extents, then offset and length of each, one
// decimal number a line, padded with zeros to whole blocks. A file that ends with a hole has an empty extent at its end.
func sparseMap(size int64, extents []extent) []byte {
	n := len(extents)
	endsWithHole := n == 0 || extents[n-1].offset+extents[n-1].length < size
	if endsWithHole {
		n++
	}
	b := append(strconv.AppendInt(nil, int64(n), 10), '\n')
	for _, e := range extents {
		b = append(strconv.AppendInt(b, e.offset, 10), '\n')
		b = append(strconv.AppendInt(b, e.length, 10), '\n')
	}
	if endsWithHole {
		b = append(strconv.AppendInt(b, size, 10), "\n0\n"...)
	}
	return append(b, make([]byte, (tarBlock-len(b)%tarBlock)%tarBlock)...)
}

// fitExtents merges extents across their shortest holes until their map is short enough. The result depends on nothing
// but the extents.
func fitExtents(size int64, extents []extent) []extent {
	for shortest := int64(2 * blockSize); !mapFits(size, extents); shortest *= 2 {
		merged := slices.Clone(extents[:1])
		for _, e := range extents[1:] {
			last := &merged[len(merged)-1]
			if e.offset-(last.offset+last.length) < shortest {
				last.length = e.offset + e.length - last.offset
			} else {
				merged = append(merged, e)
			}
		}
		extents = merged
	}
	return extents
}

func mapFits(size int64, extents []extent) bool {
	const shortestEntry = 8 // bytes, on average: lengths and all offsets but the first have at least four digits
	return len(extents) <= maxSparseMap/shortestEntry && len(sparseMap(size, extents)) <= maxSparseMap
}
