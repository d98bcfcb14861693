package faults

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"

	"github.com/drafter-vm/drafter/pkg/block"
)

// TestDevices has a device of either side answer wrongly, once or from some call on: with errors, such as of a full disk, with less
// than it was asked for, with nonsense. The guest runs on at the source, with what it had, or at the destination with all of it; and
// where post-copy has begun it is not lost.
func TestDevices(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("takes half a minute: left out with -short")
	}
	full, broken := syscall.ENOSPC, syscall.EIO
	type answer struct {
		name string
		wrap func(d block.Device, from int64) *Device
	}
	answers := map[Direction][]answer{
		ToDestination: { // what a source is told
			{"reads fail", func(d block.Device, from int64) *Device {
				return &Device{Device: d, Read: func(n int64, p []byte, off int64) (int, error) {
					if n >= from {
						return 0, broken
					}
					return d.ReadAt(p, off)
				}}
			}},
			{"a read is short, without an error", func(d block.Device, from int64) *Device {
				return &Device{Device: d, Read: func(n int64, p []byte, off int64) (int, error) {
					if n == from && len(p) > 1 {
						clear(p)
						return d.ReadAt(p[:len(p)/2], off)
					}
					return d.ReadAt(p, off)
				}}
			}},
			{"a read ends early", func(d block.Device, from int64) *Device {
				return &Device{Device: d, Read: func(n int64, p []byte, off int64) (int, error) {
					if n == from {
						return 0, io.EOF
					}
					return d.ReadAt(p, off)
				}}
			}},
			{"the search for data fails", func(d block.Device, from int64) *Device {
				return &Device{Device: d, Next: func(n, off int64) (block.Range, error) {
					if n >= from {
						return block.Range{}, broken
					}
					return block.NextData(d, off)
				}}
			}},
			{"the search for data goes back", func(d block.Device, from int64) *Device {
				return &Device{Device: d, Next: func(n, off int64) (block.Range, error) {
					if n >= from && off > 0 {
						return block.Range{Offset: 0, Length: block.PageSize}, nil
					}
					return block.NextData(d, off)
				}}
			}},
			{"data is found outside of the device", func(d block.Device, from int64) *Device {
				return &Device{Device: d, Next: func(n, off int64) (block.Range, error) {
					if n >= from {
						return block.Range{Offset: d.Size() + block.PageSize, Length: 1 << 40}, nil
					}
					return block.NextData(d, off)
				}}
			}},
			{"data has no length", func(d block.Device, from int64) *Device {
				return &Device{Device: d, Next: func(n, off int64) (block.Range, error) {
					if n >= from {
						return block.Range{Offset: off}, nil
					}
					return block.NextData(d, off)
				}}
			}},
		},
		ToSource: { // what a destination is told
			{"it is full", func(d block.Device, from int64) *Device {
				return &Device{Device: d, Write: func(n int64, p []byte, off int64) (int, error) {
					if n >= from {
						return 0, full
					}
					return d.WriteAt(p, off)
				}, Forget: func(n, off, length int64) error { return d.Discard(off, length) }}
			}},
			{"a write fails half-way", func(d block.Device, from int64) *Device {
				return &Device{Device: d, Write: func(n int64, p []byte, off int64) (int, error) {
					if n == from {
						n, _ := d.WriteAt(p[:len(p)/2], off)
						return n, broken
					}
					return d.WriteAt(p, off)
				}}
			}},
			{"discards fail", func(d block.Device, from int64) *Device {
				return &Device{Device: d, Forget: func(n, off, length int64) error {
					if n >= from {
						return broken
					}
					return d.Discard(off, length)
				}}
			}},
			{"flushes fail", func(d block.Device, from int64) *Device {
				return &Device{Device: d, Sync: func(n int64) error {
					if n >= from {
						return broken
					}
					return d.Flush()
				}}
			}},
			{"it is smaller", func(d block.Device, _ int64) *Device { return &Device{Device: d, Length: d.Size() - block.PageSize} }},
			{"it is larger", func(d block.Device, _ int64) *Device { return &Device{Device: d, Length: d.Size() + 1} }},
		},
	}
	calls, devices := []int64{1, 3}, []string{"memory", "disk"}
	if *long {
		devices = append(devices, "kernel")
		calls = []int64{1, 2, 3, 4, 5, 7, 9, 12, 16, 24, 40}
	}
	for side, list := range answers {
		for _, a := range list {
			t.Run(fmt.Sprintf("%v/%s", side, a.name), func(t *testing.T) {
				owners := map[string]int{}
				for _, mode := range Modes() {
					for _, name := range devices {
						for _, from := range calls {
							synctest.Test(t, func(t *testing.T) {
								w, source, destination := begin(t, 1)
								m := Migration{ID: "m", Mode: mode}
								wrap := func(device string, d block.Device) block.Device {
									if device == name {
										return a.wrap(d, from)
									}
									return d
								}
								if side == ToDestination {
									m.Source.Wrap = wrap
								} else {
									m.Destination.Wrap = wrap
								}
								r := w.Move(source, destination, m)
								owners[fmt.Sprint(w.settle(t, r, source, destination))]++
							})
							if t.Failed() {
								t.Fatalf("%v, %s, from call %d", mode, name, from)
							}
						}
					}
				}
				t.Logf("the guest ended on %v", owners)
			})
		}
	}
}

// TestTracker has the trackers of the source answer wrongly.
func TestTracker(t *testing.T) {
	for _, tt := range []struct {
		name string
		list func(n int64, list []block.Range) ([]block.Range, error)
	}{
		{"it fails at once", func(int64, []block.Range) ([]block.Range, error) { return nil, errNo }},
		{"it fails later", func(n int64, list []block.Range) ([]block.Range, error) {
			if n > 1 {
				return nil, errNo
			}
			return list, nil
		}},
		{"ranges are outside of the device", func(_ int64, list []block.Range) ([]block.Range, error) {
			return append(list, block.Range{Offset: memorySize + 3*block.PageSize, Length: 1 << 41}), nil
		}},
		{"ranges are negative", func(_ int64, list []block.Range) ([]block.Range, error) {
			return append([]block.Range{{Offset: -8192, Length: 4096}, {Offset: 0, Length: -1}}, list...), nil
		}},
		{"ranges overlap, in any order", func(_ int64, list []block.Range) ([]block.Range, error) {
			return append(append([]block.Range{{Offset: 5 * block.PageSize, Length: 10 * block.PageSize}, {Offset: 0, Length: 7 * block.PageSize}}, list...), list...), nil
		}},
		{"ranges are no whole pages", func(_ int64, list []block.Range) ([]block.Range, error) {
			return append(list, block.Range{Offset: 4097, Length: 3}), nil
		}},
	} {
		for _, mode := range Modes() {
			t.Run(fmt.Sprintf("%s/%v", tt.name, mode), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w, from, to := begin(t, 1)
					var n atomic.Int64
					m := Migration{ID: "m", Mode: mode, Track: func(list []block.Range, err error) ([]block.Range, error) {
						if err != nil {
							return nil, err
						}
						return tt.list(n.Add(1), list)
					}}
					owner := w.settle(t, w.Move(from, to, m), from, to)
					t.Logf("the guest ended on %v", owner)
				})
			})
		}
	}
}

// TestDisk checks the disk with which power is cut.
func TestDisk(t *testing.T) {
	w := NewWorld(1, newDir(t), "a")
	defer w.Close()
	d := NewDisk(10*block.PageSize + 7)
	flushed, lost := bytes.Repeat([]byte{1}, int(d.Size())), bytes.Repeat([]byte{2}, int(d.Size()))
	_, err := d.WriteAt(flushed, 0)
	if err := errors.Join(err, d.Flush()); err != nil {
		t.Fatal(err)
	}
	if _, err := d.WriteAt(lost, 0); err != nil {
		t.Fatal(err)
	}
	d.PowerCut(w.rand)
	got := make([]byte, d.Size())
	if _, err := d.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(got, flushed[:block.PageSize]) || !bytes.Contains(got, lost[:block.PageSize]) {
		t.Errorf("a power cut left all or nothing of what was not flushed")
	}
}
