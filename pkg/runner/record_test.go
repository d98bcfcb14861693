package runner

import (
	"bytes"
	"encoding/hex"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/pkg/block"
)

func TestRecordGolden(t *testing.T) {
	r := Record{Status: Moved, Migration: "ABC", Time: time.Unix(1, 2), Length: 0x0102, Sum: 0x1122334455667788}
	want := "44524654535441310400000000000000" + // magic, status, flags
		"02ca9a3b000000000201000000000000" + // time, length
		"8877665544332211414243" + strings.Repeat("00", 61) // sum, migration
	b := r.encode()
	if got := hex.EncodeToString(b[:recordSum]); got != want {
		t.Errorf("encoded as\n%s, want\n%s", got, want)
	}
	back, err := decodeRecord(b)
	for _, flag := range []func(*Record) *bool{func(r *Record) *bool { return &r.Kept }, func(r *Record) *bool { return &r.Layered }} {
		flagged := r
		*flag(&flagged) = true
		if got, err := decodeRecord(flagged.encode()); err != nil || !*flag(&got) || got.Settled || got.Kept == got.Layered || *flag(&back) {
			t.Errorf("a flag is lost: %+v, %v", got, err)
		}
	}
	confirmed := r
	confirmed.Confirmed, confirmed.Shared = true, true
	if got, err := decodeRecord(confirmed.encode()); err != nil || !got.Confirmed || !got.Shared || got.Settled || back.Confirmed {
		t.Errorf("what is confirmed is lost: %+v, %v", got, err)
	}
	r.Settled = true
	if settled, err := decodeRecord(r.encode()); err != nil || !settled.Settled || back.Settled {
		t.Errorf("what is settled is lost (%v)", err)
	}
	if err != nil || !back.Time.Equal(r.Time) || back.Status != r.Status || back.Migration != r.Migration || back.Length != r.Length || back.Sum != r.Sum {
		t.Errorf("decoded as %+v, %v; want %+v", back, err, r)
	}
}

func TestSavedState(t *testing.T) {
	dev := block.NewMemory(StateDeviceSize)
	state := bytes.Repeat([]byte("state"), 1000)
	if err := WriteSaved(dev, state); err != nil {
		t.Fatal(err)
	}
	got, err := ReadSaved(dev, false)
	if err != nil || !bytes.Equal(got, state) {
		t.Fatalf("read %d bytes, %v; want the %d written", len(got), err, len(state))
	}
	t.Run("too large", func(t *testing.T) {
		if err := WriteSaved(dev, make([]byte, StateDeviceSize)); err == nil || !strings.Contains(err.Error(), "does not fit") {
			t.Errorf("error %v, want one about the size", err)
		}
	})
	t.Run("corrupt", func(t *testing.T) {
		if _, err := dev.WriteAt([]byte{1}, recordSize+7); err != nil {
			t.Fatal(err)
		}
		if _, err := ReadSaved(dev, false); err == nil || !strings.Contains(err.Error(), "corrupt") {
			t.Errorf("error %v, want one about corruption", err)
		}
	})
	for status, remedy := range map[Status]string{Running: "--boot", Receiving: "receive it again", Discarded: "receive it again", Moved: "another peer", ShutDown: "--boot"} {
		t.Run(status.String(), func(t *testing.T) {
			if err := writeRecord(dev, Record{Status: status, Migration: "M1"}); err != nil {
				t.Fatal(err)
			}
			if _, err := ReadSaved(dev, false); !errors.Is(err, ErrNotSaved) || !strings.Contains(err.Error(), remedy) {
				t.Errorf("error %v, want ErrNotSaved with %q", err, remedy)
			}
		})
	}
}

func TestForceOwner(t *testing.T) {
	dev := block.NewMemory(StateDeviceSize)
	if err := writeState(dev, Record{Status: Moved, Migration: "M1"}, []byte("state")); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadSaved(dev, false); !errors.Is(err, ErrNotSaved) || !strings.Contains(err.Error(), "--force-owner") {
		t.Errorf("error %v, want ErrNotSaved with the way out", err)
	}
	if got, err := ReadSaved(dev, true); err != nil || string(got) != "state" {
		t.Errorf("forced: read %q, %v", got, err)
	}
	if err := writeState(dev, Record{Status: Moved, Migration: "M1", Confirmed: true}, []byte("state")); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadSaved(dev, true); !errors.Is(err, ErrNotSaved) || !strings.Contains(err.Error(), "runs it") {
		t.Errorf("forced after the other has confirmed: error %v, want ErrNotSaved", err)
	}
	// Memory that the other had itself is what the other has made of it.
	if err := writeState(dev, Record{Status: Moved, Migration: "M1", Shared: true}, []byte("state")); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadSaved(dev, true); !errors.Is(err, ErrNotSaved) || !errors.Is(err, ErrGiven) || !strings.Contains(err.Error(), "--boot --force-owner") {
		t.Errorf("forced with memory that is shared: error %v, want ErrNotSaved with the way out", err)
	}
	// An instance whose new owner has confirmed has nothing left to force.
	if err := writeRecord(dev, Record{Status: Moved, Migration: "M1"}); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadSaved(dev, true); !errors.Is(err, ErrNotSaved) {
		t.Errorf("forced after a confirmed move: error %v, want ErrNotSaved", err)
	}
}

func FuzzDecodeRecord(f *testing.F) {
	f.Add(Record{Status: Saved, Length: 5}.encode())
	f.Add([]byte(recordMagic))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := decodeRecord(b)
		if err == nil && (r.Length < 0 || r.Length > StateDeviceSize || r.Status < Saved || r.Status > ShutDown) {
			t.Errorf("accepted %+v", r)
		}
	})
}

func TestCheckDevices(t *testing.T) {
	ok := DeviceConfig{Name: "disk", Base: "a"}
	for _, tt := range []struct {
		name    string
		devices []DeviceConfig
		want    string // in the error; empty: none
	}{
		{"fine", []DeviceConfig{ok, {Name: "memory", Base: "b", Overlay: "c", State: "d", BlockSize: 4096}}, ""},
		{"no name", []DeviceConfig{{Base: "a"}}, "no name"},
		{"twice", []DeviceConfig{ok, {Name: "disk", Base: "b"}}, `"disk" is configured twice`},
		{"no base", []DeviceConfig{{Name: "disk"}}, `"disk" has no base`},
		{"overlay without state", []DeviceConfig{{Name: "disk", Base: "a", Overlay: "o"}}, "give both or neither"},
		{"state without overlay", []DeviceConfig{{Name: "disk", Base: "a", State: "s"}}, "give both or neither"},
		{"block size not a power of two", []DeviceConfig{{Name: "disk", Base: "a", BlockSize: 12288}}, "block size 12288"},
		{"block size too small", []DeviceConfig{{Name: "disk", Base: "a", BlockSize: 2048}}, "block size 2048"},
		{"negative block size", []DeviceConfig{{Name: "disk", Base: "a", BlockSize: -4096}}, "block size -4096"},
		{"same file twice", []DeviceConfig{ok, {Name: "data", Base: "./a"}}, "both use the file"},
		{"overlay over itself", []DeviceConfig{{Name: "disk", Base: "a", Overlay: "a", State: "s"}}, "both use the file"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := CheckDevices(tt.devices)
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("error %v, want %q", err, tt.want)
			}
		})
	}
}

func TestDescription(t *testing.T) {
	d := Description{AgentVSockPort: 26}
	d.Hypervisor, d.MemorySize, d.CPUCount = "qemu", 1<<20, 1
	b, err := d.Encode()
	if err != nil || len(b)%block.PageSize != 0 {
		t.Fatalf("encoded to %d bytes, %v; want whole pages", len(b), err)
	}
	back, err := ParseDescription(b)
	if err != nil || back.AgentVSockPort != 26 || back.Hypervisor != "qemu" {
		t.Errorf("decoded as %+v, %v", back, err)
	}
	for name, b := range map[string]string{"empty": "", "not JSON": "hello", "foreign": "{}", "no memory": `{"hypervisor":"qemu","cpuCount":1}`} {
		if _, err := ParseDescription([]byte(b)); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}
