package runner

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"github.com/drafter-vm/drafter/pkg/block"
)

// TestCheckVacant looks at devices as owners leave them that were killed at some time.
func TestCheckVacant(t *testing.T) {
	for _, tt := range []struct {
		name   string
		record *Record // in the overlay; nil: nothing was written there
		want   string  // part of the error; empty: they are vacant
	}{
		{"the overlay was made, and nothing else", nil, ""},
		{"receiving", &Record{Status: Receiving, Migration: "m"}, ""},
		{"discarded", &Record{Status: Discarded, Migration: "m"}, ""},
		{"moved and settled", &Record{Status: Moved, Settled: true}, ""},
		{"moved and saved", &Record{Status: Moved, Length: 1}, "--force-owner"},
		{"moved, and nobody has confirmed it", &Record{Status: Moved, Migration: "m"}, "--boot --force-owner"},
		{"moved, confirmed, and not settled", &Record{Status: Moved, Migration: "m", Confirmed: true}, "so that the other finds these files"},
		{"running", &Record{Status: Running}, "--boot"},
		{"running, with a commit point", &Record{Status: Running, Length: 1, Kept: true}, "--rollback"},
		{"shut down", &Record{Status: ShutDown}, "--boot"},
		{"saved", &Record{Status: Saved, Length: 1}, "resume that"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			c := DeviceConfig{Name: StateDevice, Base: filepath.Join(dir, "base"), Overlay: filepath.Join(dir, "overlay"), State: filepath.Join(dir, "state")}
			base, err := block.CreateFile(c.Base, StateDeviceSize)
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(WriteSaved(base, []byte("the package's")), base.Close()); err != nil {
				t.Fatal(err)
			}
			cfg := Config{Devices: []DeviceConfig{c}}
			if err := CheckVacant(cfg); err != nil {
				t.Fatalf("nothing was made yet: %v", err)
			}
			d, err := openDevice(c, openExisting, 0, liveFiles{})
			if err != nil {
				t.Fatal(err)
			}
			if tt.record != nil {
				err = writeRecord(d, *tt.record)
			}
			if err := errors.Join(err, d.close()); err != nil {
				t.Fatal(err)
			}
			err = CheckVacant(cfg)
			if tt.want == "" && err != nil || tt.want != "" && (!errors.Is(err, ErrMismatch) || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("error %v, want %q", err, tt.want)
			}
		})
	}
}

// TestCheckBootable: an operator can take back what nobody has confirmed, and nothing else.
func TestCheckBootable(t *testing.T) {
	for _, tt := range []struct {
		record Record
		force  bool
		want   bool
	}{
		{Record{Status: Running}, false, true},
		{Record{Status: Saved}, false, true},
		{Record{Status: Moved, Migration: "m"}, false, false},
		{Record{Status: Moved, Migration: "m"}, true, true},
		{Record{Status: Moved, Migration: "m", Settled: true}, true, false},
		{Record{Status: Moved, Migration: "m", Confirmed: true}, true, false},
		{Record{Status: Receiving, Migration: "m"}, true, false},
	} {
		dev := block.NewMemory(StateDeviceSize)
		if err := writeRecord(dev, tt.record); err != nil {
			t.Fatal(err)
		}
		for _, memory := range []bool{true, false} { // without, nothing that is saved is given up
			i := &Instance{cfg: Config{ForceOwner: tt.force}}
			if memory {
				i.devices = append(i.devices, &device{DeviceConfig: DeviceConfig{Name: MemoryDevice}})
			}
			want := tt.want && (memory || tt.record.Status != Saved)
			if err := i.checkBootable(&device{Device: dev}); (err == nil) != want {
				t.Errorf("%v, settled %t, force %t, memory %t: %v", tt.record.Status, tt.record.Settled, tt.force, memory, err)
			}
		}
	}
}
