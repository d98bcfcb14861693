package block

import (
	"bytes"
	"encoding/hex"
	"strings"
	"testing"
)

// TestStateFormat compares the state file byte by byte: files of earlier versions must stay readable.
func TestStateFormat(t *testing.T) {
	header := stateHeader{blockSize: 65536, deviceSize: 0x0102030405, base: baseIdentity{size: 0x0102030405, modTime: 0x1122334455667788, states: 0x99}}
	got := header.encode()
	got = appendBatch(got, 1, 0, []stateRun{{first: 3, count: 1, state: blockHeld}, {first: 0x100, count: 0x20, state: blockZero}})
	got = appendBatch(got, 2, batchSeal, nil)
	want := unhex(t, `
		6472616674 6572206f 7665726c 6179 0a        drafter overlay\n
		01000000 00000100                           version, block size
		0504030201000000 0504030201000000           device, base
		8877665544332211                            time of modification
		9900000000000000                            digest of the states of a base that is an overlay
		00000000 0d0a2c1e                           checksum
		4f564c42 02000000 0100000000000000 00000000 batch 1
		0000000000000000 00000000
		0300000000000000 01000000 01000000          block 3 is held
		0001000000000000 20000000 02000000          blocks 0x100 to 0x11f are zero
		4f564c42 00000000 0200000000000000 01000000 a seal
		0000000000000000 00000000`)
	// Checksums are checked by decoding; they are copied for the comparison.
	for _, at := range []int{60, 64 + 28, 64 + 64 + 28} {
		copy(want[at:], got[at:at+4])
	}
	if !bytes.Equal(got, want) {
		t.Errorf("encoded\n%s, want\n%s", hex.Dump(got), hex.Dump(want))
	}
	if h, err := decodeStateHeader(got); err != nil || h != header {
		t.Errorf("decoded %+v, %v", h, err)
	}
	var runs []stateRun
	log, err := decodeStateLog(got[stateHeaderSize:], 1000, func(r stateRun) { runs = append(runs, r) })
	if err != nil || log != (stateLog{end: int64(len(got)), sequence: 2, sealed: true}) {
		t.Errorf("the log is %+v, %v", log, err)
	}
	if len(runs) != 2 || runs[0] != (stateRun{3, 1, blockHeld}) || runs[1] != (stateRun{0x100, 0x20, blockZero}) {
		t.Errorf("the runs are %v", runs)
	}
}

// unhex decodes the hexadecimal words each line begins with.
func unhex(t *testing.T, s string) []byte {
	t.Helper()
	var b []byte
	for line := range strings.Lines(s) {
		for _, word := range strings.Fields(line) {
			p, err := hex.DecodeString(word)
			if err != nil || len(word) < 2 {
				break
			}
			b = append(b, p...)
		}
	}
	return b
}

// FuzzState checks that no state file makes an overlay panic, or take memory out of proportion, and that what is read is
// read the same again after it was written.
func FuzzState(f *testing.F) {
	header := stateHeader{blockSize: 65536, deviceSize: 64 << 20, base: baseIdentity{size: 64 << 20, modTime: 1}}.encode()
	one := appendBatch(bytes.Clone(header), 1, 0, []stateRun{{0, 1, blockHeld}, {10, 1000, blockZero}})
	two := appendBatch(bytes.Clone(one), 2, batchSeal, nil)
	f.Add(header)
	f.Add(one)
	f.Add(two)
	f.Add(two[:len(two)-1])
	f.Add(append(bytes.Clone(one), two[len(header):]...))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := decodeStateHeader(b)
		if err != nil {
			return
		}
		if !bytes.Equal(h.encode()[:48], b[:48]) {
			t.Errorf("the header %x is written as %x", b[:stateHeaderSize], h.encode())
		}
		const blocks = 1024
		states := newBlockStates(blocks)
		log, err := decodeStateLog(b[stateHeaderSize:], blocks, func(r stateRun) { states.set(r.first, r.first+r.count-1, r.state) })
		if err != nil {
			return
		}
		if log.end > int64(len(b)) || !log.torn && log.end != int64(len(b)) {
			t.Errorf("the log of %d bytes ends at %d, torn %v", len(b), log.end, log.torn)
		}
		again := newBlockStates(blocks)
		if _, err := decodeStateLog(appendBatch(nil, 1, 0, states.runs(blocks)), blocks, func(r stateRun) { again.set(r.first, r.first+r.count-1, r.state) }); err != nil {
			t.Fatal(err)
		}
		for i := range int64(blocks) {
			if states.get(i) != again.get(i) {
				t.Fatalf("block %d is %d, and %d after it was written and read", i, states.get(i), again.get(i))
			}
		}
	})
}

func TestBitmap(t *testing.T) {
	const n = 200
	b := newBitmap(n)
	model := make([]bool, n)
	set := func(first, last int64) {
		b.set(first, last)
		for i := first; i <= last; i++ {
			model[i] = true
		}
	}
	check := func() {
		t.Helper()
		for i := range int64(n) {
			for _, want := range []bool{true, false} {
				next := i
				for next < n && model[next] != want {
					next++
				}
				if got := b.next(i, n, want); got != next {
					t.Fatalf("next(%d, %v) is %d, want %d", i, want, got, next)
				}
			}
			if b.get(i) != model[i] {
				t.Fatalf("get(%d) is %v", i, b.get(i))
			}
		}
	}
	for _, r := range [][2]int64{{0, 0}, {63, 64}, {70, 70}, {100, 190}, {199, 199}} {
		set(r[0], r[1])
		check()
	}
	var got [][2]int64
	b.take(func(first, last int64) { got = append(got, [2]int64{first, last}) })
	want := [][2]int64{{0, 0}, {63, 64}, {70, 70}, {100, 190}, {199, 199}}
	if len(got) != len(want) {
		t.Fatalf("take gives %v", got)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("take gives %v, want %v", got, want)
		}
	}
	clear(model)
	check()
}

func TestStripes(t *testing.T) {
	var s stripes
	for _, r := range [][2]int64{{0, 0}, {63, 64}, {10, 20}, {60, 70}, {1, 64}, {0, 63}, {5, 1000}, {127, 128}} {
		s.lock(r[0], r[1])
		for i := range int64(stripeCount) {
			inside := r[1]-r[0] >= stripeCount-1
			for b := r[0]; b <= r[1] && !inside; b++ {
				inside = b%stripeCount == i
			}
			if free := s[i].TryLock(); free == inside {
				t.Errorf("with %v locked, stripe %d is free: %v", r, i, free)
			} else if free {
				s[i].Unlock()
			}
		}
		s.unlock(r[0], r[1])
	}
}
