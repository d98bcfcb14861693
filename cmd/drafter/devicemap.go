package main

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/peer"
	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"
)

// Cells of a map.
const (
	cellHole  = ' ' // nothing is there
	cellBelow = '·' // it is what is below
	cellZero  = '○' // all that is here of it was discarded
)

var cellLevels = []rune("▁▂▃▄▅▆▇█")

// drawing is a map of one layer of a device, cell by cell.
type drawing struct {
	size, cell int64
	held, zero []int64 // bytes, of each cell
	below      rune    // what a cell is in which there is nothing
}

func newDrawing(size, cell int64, below rune) *drawing {
	n := (size + cell - 1) / cell
	return &drawing{size: size, cell: cell, held: make([]int64, n), zero: make([]int64, n), below: below}
}

func (d *drawing) add(r block.Range, to []int64) {
	for off := r.Offset; off < r.End(); {
		i := off / d.cell
		end := min((i+1)*d.cell, r.End())
		to[i] += end - off
		off = end
	}
}

// rune is the picture of a cell.
func (d *drawing) rune(i int) rune {
	switch size := min(d.cell, d.size-int64(i)*d.cell); {
	case d.held[i] > 0:
		return cellLevels[min(int64(len(cellLevels))-1, d.held[i]*int64(len(cellLevels))/size)]
	case d.zero[i] > 0:
		return cellZero
	}
	return d.below
}

// write draws rows of cells, each with the offset that it begins at.
func (d *drawing) write(out io.Writer, width int) error {
	var b strings.Builder
	for start := 0; start < len(d.held); start += width {
		fmt.Fprintf(&b, "  %10s │", bytesText(int64(start)*d.cell))
		for i := start; i < start+width; i++ {
			if i < len(d.held) {
				b.WriteRune(d.rune(i))
			} else if len(d.held) > width {
				b.WriteByte(' ')
			}
		}
		b.WriteString("│\n")
	}
	_, err := io.WriteString(out, b.String())
	return err
}

// cellSize is how many bytes a cell of a map stands for, so that a device has no more than that many.
func cellSize(size, cells int64) int64 {
	cell := int64(block.PageSize)
	for cell*cells < size {
		cell *= 2
	}
	return cell
}

func newMapCommand(source *deviceSource) *cobra.Command {
	var width, rows int
	cmd := &cobra.Command{
		Use:   "map [DEVICE…]",
		Short: "Draw which parts of devices each of their overlays holds",
		Long: `Draws a map of each layer of a device: of the base, then of its overlays, the newest last. A cell stands for as many bytes as is said
above it; it is filled as far as the layer holds data there. · is what is below the overlay, ○ was discarded in it and reads as zero, and
where the base has nothing there is a blank.

What is drawn of an instance that runs is what was flushed last.`,
		RunE: func(cmd *cobra.Command, names []string) error {
			if width < 1 || width > 1000 || rows < 1 || rows > 1000 {
				return usageErrorf("--width %d and --rows %d: give 1 to 1000", width, rows)
			}
			devices, _, err := source.chosen(names)
			if err != nil {
				return err
			}
			for _, d := range devices {
				if err := drawDevice(cmd.Context(), cmd.OutOrStdout(), d, width, rows); err != nil {
					return err
				}
			}
			return nil
		},
	}
	cmd.Flags().IntVar(&width, "width", 64, "cells in a row")
	cmd.Flags().IntVar(&rows, "rows", 8, "most rows of a layer")
	return cmd
}

func drawDevice(ctx context.Context, out io.Writer, d peer.Device, width, rows int) error {
	v, err := view(d)
	if err != nil {
		return err
	}
	cell := cellSize(v.Size, int64(width)*int64(rows))
	fmt.Fprintf(out, "%s: %s, %s a cell\n", v.Name, bytesText(v.Size), bytesText(cell))
	base, err := block.OpenFile(d.Base, block.FileOptions{ReadOnly: true})
	if err != nil {
		return fmt.Errorf("device %q: %w", d.Name, err)
	}
	defer base.Close()
	picture := newDrawing(v.Size, cell, cellHole)
	for off := int64(0); ; {
		r, err := base.NextData(off)
		if err == io.EOF {
			break
		} else if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return fmt.Errorf("device %q: %w", d.Name, err)
		}
		picture.add(r, picture.held)
		off = r.End()
	}
	fmt.Fprintf(out, "base %s: %s on disk; changed %s\n", v.Base.Path, bytesText(v.Base.Allocated), humanize.Time(v.Base.Modified))
	if err := picture.write(out, width); err != nil {
		return err
	}
	for _, o := range v.Overlays {
		fmt.Fprintf(out, "overlay %s: %s\n", o.Overlay, o.text())
		if o.Missing {
			continue
		}
		picture := newDrawing(v.Size, cell, cellBelow)
		for r, held := range o.info.Changes() {
			if held {
				picture.add(r, picture.held)
			} else {
				picture.add(r, picture.zero)
			}
		}
		if err := picture.write(out, width); err != nil {
			return err
		}
	}
	return nil
}
