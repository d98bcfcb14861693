package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"github.com/drafter-vm/drafter/pkg/block"
)

// Requests to devices: random ones of a page, sequential ones of what a guest reads ahead at most.
const (
	randomRequest     = pageSize
	sequentialRequest = 64 << 10
)

func overlayCases() []benchCase {
	layer := func(name, about string, ops []deviceOp, held bool) benchCase {
		return benchCase{name: name, about: about, cheap: true, run: func(ctx context.Context, b *bench) ([]Row, error) {
			size := int64(512 * mib)
			if b.quick {
				size = 4 * mib
			}
			return benchOverlay(ctx, b, name, size, ops, held)
		}}
	}
	randomRead := deviceOp{Name: "4 KiB random read", Request: randomRequest, Random: true, Passes: 4}
	read := deviceOp{Name: "64 KiB sequential read", Request: sequentialRequest, Passes: 4}
	return []benchCase{
		// Each random write copies a block up, as one to each block is all there is: nothing is worse for an overlay.
		layer("overlay/base", "requests of a process to an overlay that holds nothing yet, over a file in the page cache, beside such a file", []deviceOp{
			randomRead, read,
			{Name: "4 KiB random write, 1 a block", Request: randomRequest, Random: true, Stride: block.DefaultOverlayBlockSize, Write: true, Passes: 1},
			{Name: "4 KiB random write, 1 a block, blocks of 4 KiB", Request: randomRequest, Random: true, Stride: block.DefaultOverlayBlockSize, Write: true, Passes: 1, BlockSize: pageSize},
			{Name: "64 KiB sequential write", Request: sequentialRequest, Write: true, Passes: 1},
			{Name: "64 KiB sequential write, beside a new file", Request: sequentialRequest, Write: true, Passes: 1, Anew: true},
		}, false),
		layer("overlay/held", "requests of a process to an overlay that holds everything, beside a file", []deviceOp{
			randomRead, read,
			{Name: "4 KiB random write", Request: randomRequest, Random: true, Write: true, Passes: 1},
			{Name: "64 KiB sequential write", Request: sequentialRequest, Write: true, Passes: 1},
		}, true),
	}
}

// deviceOp is one kind of requests, one after the other. Writes end with a flush.
type deviceOp struct {
	Name      string `json:"name"`
	Request   int64  `json:"request"` // bytes
	Stride    int64  `json:"stride"`  // one request in so many bytes; 0: request after request
	Random    bool   `json:"random"`
	Write     bool   `json:"write"`
	Passes    int    `json:"passes"`     // over the whole device
	BlockSize int64  `json:"block_size"` // of a new overlay; 0: the default
	Anew      bool   `json:"-"`          // the reference is a file that has no blocks yet, as a new overlay
}

// deviceTask is what a process does to a device.
type deviceTask struct {
	deviceOp
	File    string `json:"file"`
	Overlay string `json:"overlay"` // over the file; empty: the file itself
}

// deviceResult is what that took.
type deviceResult struct {
	Requests   int64   `json:"requests"`
	Seconds    float64 `json:"seconds"`
	CPUSeconds float64 `json:"cpu_seconds"`
}

func benchOverlay(ctx context.Context, b *bench, name string, size int64, ops []deviceOp, held bool) (_ []Row, err error) {
	folder, err := os.MkdirTemp(b.out, "overlay-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(folder)) }()
	base, plain, overlay := filepath.Join(folder, "base"), filepath.Join(folder, "plain"), filepath.Join(folder, "overlay")
	for _, path := range []string{base, plain} {
		if err := makeFull(path, size); err != nil {
			return nil, err
		}
	}
	prepare := func(op deviceOp) error {
		if err := errors.Join(os.RemoveAll(overlay), os.RemoveAll(overlay+".state")); err != nil {
			return err
		}
		dev, err := openLayer(base, overlay, op.BlockSize)
		if err != nil {
			return err
		}
		if held {
			err = fillDevice(dev)
		}
		return errors.Join(err, dev.Close())
	}

	turns := 2 * b.samples // they are short
	if b.quick {
		turns = 1
	}
	var rows []Row
	for _, op := range ops {
		var speed, cpu [2][]float64
		tasks, reference := []deviceTask{{op, base, overlay}, {op, plain, ""}}, "file"
		if op.Anew {
			reference = "new file"
		}
		for i := range turns {
			if i == 0 || op.Write && !held {
				if err := prepare(op); err != nil {
					return nil, err
				}
			}
			if op.Anew {
				if err := makeBlank(plain, size); err != nil {
					return nil, err
				}
			}
			for n := range tasks {
				side := (n + i) % 2 // who is first changes
				r, err := useDevice(ctx, tasks[side])
				if err != nil {
					return nil, fmt.Errorf("%s: %w", op.Name, err)
				}
				speed[side] = append(speed[side], op.speed(r.Requests, r.Seconds))
				cpu[side] = append(cpu[side], r.CPUSeconds*1e6/float64(r.Requests))
			}
			b.say("%s: %s %d/%d: %.0f %s, file %.0f; CPU time of a request %.1f µs, file %.1f µs", name, op.Name, i+1, turns,
				speed[0][i], op.unit(), speed[1][i], cpu[0][i], cpu[1][i])
		}
		want := ratioAtLeast(0.9)
		if op.Write && !held {
			want = goal{} // it does more than its reference
		}
		rows = append(rows,
			newRow(name, op.Name, op.unit(), more, speed[0], speed[1], reference, want),
			newRow(name, op.Name+", CPU", "µs", less, cpu[0], cpu[1], reference, goal{}))
	}
	return rows, nil
}

func (op deviceOp) unit() string {
	if op.Random {
		return "k req/s"
	}
	return "MB/s"
}

// speed is that of so many requests, in its unit.
func (op deviceOp) speed(requests int64, seconds float64) float64 {
	if op.Random {
		return float64(requests) / seconds / 1e3
	}
	return float64(requests*op.Request) / seconds / mb
}

// makeFull makes a file without holes, that is on the disk: nothing of it is left to be written while something is measured.
func makeFull(path string, size int64) error {
	if err := makeBlank(path, size); err != nil {
		return err
	}
	dev, err := openWritable(path)
	if err != nil {
		return err
	}
	return errors.Join(fillDevice(dev), dev.Close())
}

// fillDevice writes all of a device.
func fillDevice(dev block.Device) error {
	buf := make([]byte, mib)
	for off := int64(0); off < dev.Size(); off += mib {
		part := buf[:min(mib, dev.Size()-off)]
		randomPage(part, uint64(off+1)*0x9e3779b97f4a7c15)
		if _, err := dev.WriteAt(part, off); err != nil {
			return err
		}
	}
	return nil
}

// openLayer opens a file, with an overlay if it has a path.
func openLayer(file, overlay string, blockSize int64) (block.Device, error) {
	if overlay == "" {
		return openWritable(file)
	}
	base, err := block.OpenFile(file, block.FileOptions{ReadOnly: true})
	if err != nil {
		return nil, err
	}
	dev, err := block.OpenOverlay(block.OverlayOptions{Base: base, BasePath: file, Overlay: overlay, State: overlay + ".state", BlockSize: blockSize, Logger: quiet})
	if err != nil {
		return nil, errors.Join(err, base.Close())
	}
	return dev, nil
}

// useDevice has a process do its task.
func useDevice(ctx context.Context, task deviceTask) (r deviceResult, err error) {
	c, err := startChild(ctx, "device user", task, nil)
	if err != nil {
		return r, err
	}
	defer c.end()
	if _, err := c.expect("ready"); err != nil {
		return r, err
	}
	if err := c.send("go"); err != nil {
		return r, err
	}
	return r, c.receiveJSON(&r)
}

// deviceUser is that process.
func deviceUser(a *actor) (err error) {
	var task deviceTask
	if err := a.decode(&task); err != nil {
		return err
	}
	dev, err := openLayer(task.File, task.Overlay, task.BlockSize)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	offsets, buf := task.offsets(dev.Size()), make([]byte, task.Request)
	randomPage(buf, uint64(time.Now().UnixNano()))
	a.say("ready")
	if _, err := a.await("go"); err != nil {
		return err
	}
	began, spent := time.Now(), processCPU()
	for range task.Passes {
		for _, off := range offsets {
			if task.Write {
				_, err = dev.WriteAt(buf, off)
			} else {
				_, err = dev.ReadAt(buf, off)
			}
			if err != nil {
				return err
			}
		}
	}
	if task.Write {
		if err := dev.Flush(); err != nil {
			return err
		}
	}
	return a.sayJSON(deviceResult{
		Requests: int64(task.Passes * len(offsets)), Seconds: time.Since(began).Seconds(), CPUSeconds: (processCPU() - spent).Seconds(),
	})
}

// offsets are where the requests of a pass go. Random ones are the same each time.
func (op deviceOp) offsets(size int64) (all []int64) {
	rnd := rand.New(rand.NewPCG(5, 6))
	stride := max(op.Stride, op.Request)
	for off := int64(0); off+stride <= size; off += stride {
		at := off
		if stride > op.Request {
			at += rnd.Int64N(stride/op.Request) * op.Request
		}
		all = append(all, at)
	}
	if op.Random {
		rnd.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	}
	return all
}
