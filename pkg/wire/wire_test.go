package wire

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"reflect"
	"strings"
	"testing"
	"testing/iotest"
)

// golden are the bytes of the specification's examples (docs/protocol.md). They change with the version, never else.
var golden = []struct {
	name  string
	bytes []byte
	hex   string
}{
	{"preface", Preface{Newest: 1, Oldest: 1, Role: RoleSource, Stream: 2, Streams: 4, Session: 0x0102030405060708}.Append(nil),
		"44524146544552 00 0001 0001 01 00 02 04 0102030405060708 00000000 00000000"},
	{"heartbeat", Append(nil, Header{Type: TypeHeartbeat}, nil), "01 00 0000 00000000 0000000000000000"},
	{"bye", Append(nil, Header{Type: TypeBye}, nil), "02 00 0000 00000000 0000000000000000"},
	{"abort", Append(nil, Header{Type: TypeAbort, Flags: FlagNeverRan}, Abort{CodeCanceled, "stop"}.Encode()),
		"03 01 0000 00000006 0000000000000000 0003 73746f70"},
	{"manifest", Append(nil, Header{Type: TypeManifest}, must((&Manifest{ID: "m1", Window: 1 << 20, Devices: []Device{{Name: "memory", Size: 4096}}, Spec: []byte(`{}`)}).Encode())),
		"10 00 0000 00000050 0000000000000000 " + hex.EncodeToString([]byte(`{"id":"m1","window":1048576,"devices":[{"name":"memory","size":4096}],"spec":{}}`))},
	{"accept", Append(nil, Header{Type: TypeAccept}, nil), "11 00 0000 00000000 0000000000000000"},
	{"data", Append(nil, Header{Type: TypeData, Device: 3, Offset: 0x1000}, []byte{1, 2, 3}), "20 00 0003 00000003 0000000000001000 010203"},
	{"data", Append(nil, Header{Type: TypeData, Flags: FlagZstd, Device: 3, Offset: 0x1000}, []byte{0, 0, 16, 0, 4}), "20 10 0003 00000005 0000000000001000 00001000 04"},
	{"zero", func() []byte { b := make([]byte, ZeroFrameSize); PutZero(b, 3, 0x2000, 0x3000); return b }(),
		"21 00 0003 00000008 0000000000002000 0000000000003000"},
	{"round-end", Append(nil, Header{Type: TypeRoundEnd, Device: 3, Offset: 0x1234}, []byte{0, 0, 0, 7}), "22 00 0003 00000004 0000000000001234 00000007"},
	{"ack", Append(nil, Header{Type: TypeAck, Device: 3, Offset: 0x1234}, nil), "23 00 0003 00000000 0000000000001234"},
	{"check", func() []byte {
		b := make([]byte, CheckFrameSize)
		PutCheck(b, Append(nil, Header{Type: TypeData, Device: 3, Offset: 0x1000}, []byte{1, 2, 3}))
		return b
	}(), "24 00 0000 00000008 0000000000000000 6c90a3d938cd04c0"},
	{"state", Append(nil, Header{Type: TypeState, Flags: FlagLast, Offset: 5}, []byte{9}), "30 01 0000 00000001 0000000000000005 09"},
	{"final", Append(nil, Header{Type: TypeFinal}, (&Summary{State: Part{5, Digest{15: 1}}, Devices: []Part{{6, Digest{0: 2}}}}).Encode()),
		"31 00 0000 00000030 0000000000000000 0000000000000005 00000000000000000000000000000001 0000000000000006 02000000000000000000000000000000"},
	{"prepared", Append(nil, Header{Type: TypePrepared}, (&Summary{State: Part{5, Digest{15: 1}}}).Encode()),
		"32 00 0000 00000018 0000000000000000 0000000000000005 00000000000000000000000000000001"},
	{"commit", Append(nil, Header{Type: TypeCommit}, nil), "33 00 0000 00000000 0000000000000000"},
	{"running", Append(nil, Header{Type: TypeRunning}, nil), "34 00 0000 00000000 0000000000000000"},
	{"missing", missing(3, Run{5, 2}, Run{300, 1}), "40 01 0003 00000004 0000000000005000 02 a502 01"},
	{"demand", AppendDemand(nil, 3, 0x2000, 0x1000), "41 00 0003 00000008 0000000000002000 0000000000001000"},
	{"served", Append(nil, Header{Type: TypeServed}, (&Summary{Devices: []Part{{6, Digest{0: 2}}}}).Encode()),
		"42 00 0000 00000030 0000000000000000 0000000000000000 00000000000000000000000000000000 0000000000000006 02000000000000000000000000000000"},
	{"settled", Append(nil, Header{Type: TypeSettled}, (&Summary{}).Encode()),
		"43 00 0000 00000018 0000000000000000 0000000000000000 00000000000000000000000000000000"},
	{"copied", Append(nil, Header{Type: TypeCopied}, nil), "44 00 0000 00000000 0000000000000000"},
	{"absent", absent(3, true, Run{5, 2}, Run{300, 1}), "50 01 0003 00000004 0000000000005000 02 a502 01"},
	{"absent", absent(3, false), "50 00 0003 00000000 0000000000000000"},
	{"idle", Append(nil, Header{Type: TypeIdle, Flags: FlagNow}, nil), "51 01 0000 00000000 0000000000000000"},
	{"seek", Append(nil, Header{Type: TypeSeek}, []byte("m1")), "60 00 0000 00000002 0000000000000000 6d31"},
	{"rejoin", Append(nil, Header{Type: TypeRejoin}, must((&Rejoin{Standing: Runs, Devices: []RejoinDevice{{Device{Name: "memory", Size: 4096}, true}}}).Encode("m1", Meeting{}))),
		"61 00 0000 00000066 0000000000000000 00000000000000000000000000000000 " + hex.EncodeToString([]byte(`{"id":"m1","standing":"runs","devices":[{"name":"memory","size":4096,"missing":true}]}`))},
	{"serve", Append(nil, Header{Type: TypeServe, Flags: FlagFresh}, nil), "62 01 0000 00000000 0000000000000000"},
}

// missing is one Missing frame.
func missing(device uint16, runs ...Run) (b []byte) {
	_ = EncodeMissing(device, runs, func(h Header, p []byte) error {
		b = Append(b, h, p)
		return nil
	})
	return b
}

// absent is one Absent frame.
func absent(device uint16, last bool, runs ...Run) (b []byte) {
	_ = EncodeAbsent(device, runs, last, func(h Header, p []byte) error {
		b = Append(b, h, p)
		return nil
	})
	return b
}

func must(b []byte, err error) []byte {
	if err != nil {
		panic(err)
	}
	return b
}

func TestGolden(t *testing.T) {
	seen := map[Type]bool{}
	for _, g := range golden {
		t.Run(g.name, func(t *testing.T) {
			want, err := hex.DecodeString(strings.ReplaceAll(g.hex, " ", ""))
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(g.bytes, want) {
				t.Errorf("encoded\n%s\nwant\n%s", hex.Dump(g.bytes), hex.Dump(want))
			}
			if g.name == "preface" {
				p, err := ReadPreface(iotest.OneByteReader(bytes.NewReader(g.bytes)))
				if err != nil || !bytes.Equal(p.Append(nil), g.bytes) {
					t.Errorf("decoded %+v, %v", p, err)
				}
				return
			}
			r := NewReader(iotest.OneByteReader(bytes.NewReader(g.bytes)))
			h, err := r.Next()
			if err != nil {
				t.Fatal(err)
			}
			if h.Type.String() != g.name {
				t.Errorf("type %v", h.Type)
			}
			seen[h.Type] = true
			p := make([]byte, h.Length)
			if err := r.Payload(p); err != nil {
				t.Fatal(err)
			}
			if got := Append(nil, h, p); !bytes.Equal(got, g.bytes) {
				t.Errorf("encoded again\n%s", hex.Dump(got))
			}
			if _, err := r.Next(); err != io.EOF {
				t.Errorf("after the frame: %v", err)
			}
		})
	}
	for i, r := range rules {
		if r.name != "" && !seen[Type(i)] {
			t.Errorf("%s has no golden bytes", r.name)
		}
	}
}

func TestHeaderLimits(t *testing.T) {
	for want, h := range map[string]Header{
		"unknown type 0x7f":                        {Type: 0x7f},
		"unknown type 0x0":                         {},
		"data frame with flags 0x01":               {Type: TypeData, Flags: 1, Length: 1},
		"data frame of 65537 bytes":                {Type: TypeData, Length: MaxPayload + 1},
		"data frame of 4294967295 bytes":           {Type: TypeData, Length: 1<<32 - 1},
		"data frame of 0 bytes":                    {Type: TypeData},
		"zero frame of 9 bytes":                    {Type: TypeZero, Length: 9},
		"commit frame of 1 bytes":                  {Type: TypeCommit, Length: 1},
		"commit frame names device 1":              {Type: TypeCommit, Device: 1},
		"commit frame with offset 5":               {Type: TypeCommit, Offset: 5},
		"ack frame for device 256":                 {Type: TypeAck, Device: MaxDevices},
		"ack frame with offset 0x8000000000000000": {Type: TypeAck, Offset: 1 << 63},
		"abort frame of 1 bytes":                   {Type: TypeAbort, Length: 1},
	} {
		var b [HeaderSize]byte
		h.Put(b[:])
		if _, err := ParseHeader(b[:]); !errors.Is(err, ErrMalformed) || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: error %v, want %q", h, err, want)
		}
	}
}

func TestManifestLimits(t *testing.T) {
	for want, doc := range map[string]string{
		"unexpected end":      `{"id":"a"`,
		"migration id: name":  `{"id":"../a","window":1048576}`,
		"window of 1 bytes":   `{"id":"a","window":1}`,
		`name "/etc/passwd"`:  `{"id":"a","window":1048576,"devices":[{"name":"/etc/passwd","size":1}]}`,
		`name ".."`:           `{"id":"a","window":1048576,"devices":[{"name":"..","size":1}]}`,
		"named twice":         `{"id":"a","window":1048576,"devices":[{"name":"x","size":1},{"name":"x","size":1}]}`,
		"size -1":             `{"id":"a","window":1048576,"devices":[{"name":"x","size":-1}]}`,
		"size 70368744177665": fmt.Sprintf(`{"id":"a","window":1048576,"devices":[{"name":"x","size":%d}]}`, MaxDeviceSize+1),
		"300 devices":         `{"id":"a","window":1048576,"devices":[{}` + strings.Repeat(",{}", 299) + `]}`,
	} {
		if _, err := DecodeManifest([]byte(doc)); !errors.Is(err, ErrMalformed) || !strings.Contains(err.Error(), want) {
			t.Errorf("%.80s: error %v, want %q", doc, err, want)
		}
	}
	// A field of a later version is no reason to refuse this one.
	m, err := DecodeManifest([]byte(`{"id":"a","window":1048576,"devices":[{"name":"x","size":5,"new":1}],"newer":{}}`))
	if err != nil || len(m.Devices) != 1 || m.Devices[0].Size != 5 {
		t.Errorf("%+v, %v", m, err)
	}
}

func TestPrefaceForeign(t *testing.T) {
	for say, want := range map[string]string{
		"GET / HTTP/1.1\r\n\r\n":     `got "GET / HTTP/1.1\r\n\r\n" (HTTP)`,
		"DELETE /x HTTP/1.1\r\n\r\n": "(HTTP)",
		"HTTP/1.1 200 OK\r\n\r\n":    "(HTTP)",
		"\x16\x03\x01\x00\xfe\x01":   "(TLS",
		"SSH-2.0-x\r\n":              "(SSH)",
		"NBDMAGICIHAVEOPT":           "(NBD)",
		"DRAFTEE":                    `got "DRAFTEE"`,
		"?":                          `got "?"`,
	} {
		a, b := net.Pipe() // it says this and waits: no end of file
		go a.Write([]byte(say))
		if _, err := ReadPreface(b); !errors.Is(err, ErrNotDrafter) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: error %v, want %q", say, err, want)
		}
		b.Close()
		a.Close()
	}
	whole := Preface{Newest: 1, Oldest: 1, Role: RoleSource}.Append(nil)
	for n := range whole {
		if _, err := ReadPreface(bytes.NewReader(whole[:n])); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
}

func TestNegotiate(t *testing.T) {
	src := func(oldest, newest uint16) Preface {
		return Preface{Newest: newest, Oldest: oldest, Role: RoleSource, Streams: 1}
	}
	dst := func(oldest, newest uint16) Preface {
		return Preface{Newest: newest, Oldest: oldest, Role: RoleDestination}
	}
	for _, tc := range []struct {
		ours, theirs Preface
		want         uint16
		err          string
	}{
		{dst(1, 1), src(1, 1), 1, ""},
		{dst(1, 2), src(2, 3), 2, ""},
		{src(4, 5), dst(3, 4), 4, ""},
		{src(4, 5), dst(2, 3), 0, "peer speaks 2 to 3, we speak 4 to 5"},
		{src(1, 1), dst(2, 3), 0, "peer speaks 2 to 3, we speak 1 to 1"},
		{dst(1, 1), dst(1, 1), 0, "both ends are the destination"},
		{dst(1, 1), Preface{Newest: 1, Oldest: 1, Role: 9}, 0, "unknown role 9"},
		{dst(1, 1), Preface{Newest: 1, Oldest: 1, Role: RoleSource, Stream: 2, Streams: 2}, 0, "stream 2 of 2"},
	} {
		v, err := Negotiate(tc.ours, tc.theirs)
		if v != tc.want || (err == nil) != (tc.err == "") || err != nil && !strings.Contains(err.Error(), tc.err) {
			t.Errorf("%+v with %+v: %d, %v", tc.ours, tc.theirs, v, err)
		}
	}
}

func TestReason(t *testing.T) {
	for in, want := range map[string]string{
		"full":                    "full",
		"a\x1b[31m\nb\xff":        "a?[31m?b?",
		strings.Repeat("é", 1000): strings.Repeat("é", 512),
		"no space left on device": "no space left on device",
	} {
		a, err := DecodeAbort(Abort{CodeInternal, in}.Encode())
		if err != nil || a.Reason != want {
			t.Errorf("%.20q became %.40q, %v", in, a.Reason, err)
		}
	}
}

// A payload that is not read is skipped.
func TestReaderSkips(t *testing.T) {
	b := Append(nil, Header{Type: TypeData}, make([]byte, 50_000))
	b = Append(b, Header{Type: TypeBye}, nil)
	r := NewReader(bytes.NewReader(b))
	if h, err := r.Next(); err != nil || h.Type != TypeData {
		t.Fatal(h, err)
	}
	if err := r.Payload(make([]byte, 10)); err != nil {
		t.Fatal(err)
	}
	if err := r.Payload(make([]byte, 49_991)); err == nil {
		t.Errorf("read more than there is")
	}
	if h, err := r.Next(); err != nil || h.Type != TypeBye {
		t.Fatal(h, err)
	}
	r = NewReader(bytes.NewReader(b[:1000]))
	r.Next()
	if _, err := r.Next(); err != io.ErrUnexpectedEOF {
		t.Errorf("cut payload: %v", err)
	}
}

func TestDataPathAllocatesNothing(t *testing.T) {
	page := make([]byte, MaxPayload)
	var stream bytes.Buffer
	r := NewReader(&stream)
	b := NewBuffer()
	defer b.Release()
	stream.Grow(1 << 20)
	n := testing.AllocsPerRun(1000, func() {
		b.N = 0
		b.Append(Header{Type: TypeData, Offset: 4096}, page)
		stream.Write(b.Bytes())
		h, err := r.Next()
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Payload(page[:h.Length]); err != nil {
			t.Fatal(err)
		}
	})
	if n != 0 {
		t.Errorf("%v allocations per frame", n)
	}
}

func FuzzHeader(f *testing.F) {
	for _, g := range golden[1:] {
		f.Add(g.bytes[:HeaderSize])
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < HeaderSize {
			return
		}
		h, err := ParseHeader(b)
		if err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Errorf("error %v", err)
			}
			return
		}
		var again [HeaderSize]byte
		h.Put(again[:])
		if !bytes.Equal(again[:], b[:HeaderSize]) {
			t.Errorf("%x became %x", b[:HeaderSize], again)
		}
	})
}

func FuzzPreface(f *testing.F) {
	f.Add(golden[0].bytes)
	f.Add([]byte("GET / HTTP/1.1\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := ReadPreface(bytes.NewReader(b))
		if err != nil {
			return
		}
		if again, err := ReadPreface(bytes.NewReader(p.Append(nil))); err != nil || again != p {
			t.Errorf("%+v became %+v, %v", p, again, err)
		}
		_, _ = Negotiate(Preface{Newest: Version, Oldest: OldestVersion, Role: RoleDestination}, p)
	})
}

func FuzzManifest(f *testing.F) {
	f.Add([]byte(`{"id":"a","window":1048576,"devices":[{"name":"x","size":5}],"spec":{"a":[1]}}`))
	f.Add([]byte(`{"id":"a","window":1048576,"devices":[{"name":"x","size":5,"stored":{"list": "x<"}}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := DecodeManifest(b)
		if err != nil {
			return
		}
		opaque := len(m.Spec) > 0
		for _, d := range m.Devices {
			opaque = opaque || len(d.Stored) > 0
		}
		e, err := m.Encode()
		if err != nil {
			if opaque { // JSON may grow when it is escaped
				return
			}
			t.Fatalf("cannot encode what was decoded: %v", err)
		}
		again, err := DecodeManifest(e)
		for i := range m.Devices { // it is encoded without spaces, and escaped
			if err != nil || len(m.Devices[i].Stored) == 0 {
				continue
			}
			var was, is any
			if json.Unmarshal(m.Devices[i].Stored, &was) == nil && json.Unmarshal(again.Devices[i].Stored, &is) == nil && reflect.DeepEqual(was, is) {
				again.Devices[i].Stored = m.Devices[i].Stored
			}
		}
		if err != nil || again.ID != m.ID || !reflect.DeepEqual(again.Devices, m.Devices) && len(m.Devices) > 0 {
			t.Errorf("%+v became %+v, %v", m, again, err)
		}
	})
}

func FuzzMessages(f *testing.F) {
	f.Add((&Summary{Devices: make([]Part, 2)}).Encode(), 2)
	f.Add(Abort{CodeRefused, "full"}.Encode(), 0)
	f.Fuzz(func(t *testing.T, b []byte, n int) {
		if n >= 0 && n <= MaxDevices {
			if s, err := DecodeSummary(b, n); err == nil && !bytes.Equal(s.Encode(), b) {
				t.Errorf("%x became %x", b, s.Encode())
			}
		}
		if a, err := DecodeAbort(b); err == nil {
			if again, err := DecodeAbort(a.Encode()); err != nil || again != a {
				t.Errorf("%+v became %+v, %v", a, again, err)
			}
			_ = a.Code.String()
		}
		if v, err := ParseZero(b); err == nil && (v <= 0 || v > MaxDeviceSize) {
			t.Errorf("run of %d", v)
		}
		_, _ = ParseRoundEnd(b)
		if c, err := ParseCheck(b); err == nil && c.Verify(Header{Type: TypeCommit}, nil) == nil {
			t.Errorf("%x is the check of an empty commit", b) // 1 in 2^64
		}
	})
}

// FuzzReader feeds a stream in odd pieces: what is decoded does not depend on them.
func FuzzReader(f *testing.F) {
	var all []byte
	for _, g := range golden[1:] {
		all = append(all, g.bytes...)
	}
	f.Add(all)
	f.Fuzz(func(t *testing.T, b []byte) {
		read := func(r *Reader) (out []byte, err error) {
			p := make([]byte, MaxPayload)
			for {
				h, err := r.Next()
				if err != nil {
					return out, err
				}
				if err := r.Payload(p[:h.Length]); err != nil {
					return out, err
				}
				out = Append(out, h, p[:h.Length])
			}
		}
		x, xerr := read(NewReader(bytes.NewReader(b)))
		y, yerr := read(NewReader(iotest.OneByteReader(bytes.NewReader(b))))
		if !bytes.Equal(x, y) || fmt.Sprint(xerr) != fmt.Sprint(yerr) {
			t.Errorf("whole: %d bytes, %v; in pieces: %d bytes, %v", len(x), xerr, len(y), yerr)
		}
		if !bytes.HasPrefix(b, x) {
			t.Errorf("decoded frames are not what was sent")
		}
	})
}

func BenchmarkFrames(b *testing.B) {
	for _, size := range []int{PageSize, MaxPayload} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			page := make([]byte, size)
			frame := Append(nil, Header{Type: TypeData}, page)
			src := &loop{b: frame}
			r := NewReader(src)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for b.Loop() {
				h, err := r.Next()
				if err != nil {
					b.Fatal(err)
				}
				if err := r.Payload(page[:h.Length]); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// loop reads the same bytes for ever.
type loop struct {
	b  []byte
	at int
}

func (l *loop) Read(p []byte) (int, error) {
	n := copy(p, l.b[l.at:])
	l.at = (l.at + n) % len(l.b)
	return n, nil
}

// TestCheck changes each bit of a frame that has a check, and the check.
func TestCheck(t *testing.T) {
	h := Header{Type: TypeData, Device: 3, Length: 5, Offset: 0x1000}
	frame := Append(nil, h, []byte("hello"))
	var b [CheckFrameSize]byte
	PutCheck(b[:], frame)
	c, err := ParseCheck(b[HeaderSize:])
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Verify(h, frame[HeaderSize:]); err != nil {
		t.Fatal(err)
	}
	for bit := range 8 * len(frame) {
		damaged := bytes.Clone(frame)
		damaged[bit/8] ^= 1 << (bit % 8)
		if h, err := ParseHeader(damaged); err == nil && c.Verify(h, damaged[HeaderSize:]) == nil {
			t.Errorf("bit %d was changed, and nobody sees it", bit)
		}
	}
	for bit := range 64 {
		damaged := bytes.Clone(b[HeaderSize:])
		damaged[bit/8] ^= 1 << (bit % 8)
		if c, err := ParseCheck(damaged); err != nil || !errors.Is(c.Verify(h, frame[HeaderSize:]), ErrMalformed) {
			t.Errorf("bit %d of the check was changed, and nobody sees it: %v", bit, err)
		}
	}
	if err := (Check{}).Verify(h, frame[HeaderSize:]); !errors.Is(err, ErrMalformed) {
		t.Errorf("a frame without a check passes: %v", err)
	}
	if c.Size() != CheckFrameSize || (Check{}).Size() != 0 {
		t.Error("sizes are wrong")
	}
}
