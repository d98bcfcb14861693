package main

import (
	"bytes"
	"fmt"
	"html"
	"math"
	"strings"
)

// The picture's measures, in pixels.
const (
	chartWidth  = 1240
	labelWidth  = 270
	barsWidth   = 360
	rowHeight   = 22
	headHeight  = 104
	groupHeight = 34
	footHeight  = 30
)

// The axis is logarithmic: twice as much and half as much are equally far from the line.
const (
	axisMin = 1.0 / 16
	axisMax = 16.0
)

// Colours that keep their meaning in grey and for eyes that see no red.
const (
	metColour     = "#2a9d6f"
	missedColour  = "#d1495b"
	noGoalColour  = "#6c8ebf"
	textColour    = "#222222"
	subtleColour  = "#777777"
	gridColour    = "#dddddd"
	referenceLine = "#444444"
)

// drawChart draws a bar for each row with a reference or a goal: ours as a multiple of the reference or, where there is
// none, of the goal.
func drawChart(f file) []byte {
	var rows []Row
	groups := 0
	for _, r := range f.Rows {
		if len(r.Reference) == 0 && r.Bound == 0 {
			continue // nothing to be a multiple of: it is in the table
		}
		if len(rows) == 0 || r.Case != rows[len(rows)-1].Case {
			groups++
		}
		rows = append(rows, r)
	}
	height := headHeight + len(rows)*rowHeight + groups*groupHeight + footHeight
	var b bytes.Buffer
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" font-family="Helvetica, Arial, sans-serif" font-size="12">`+"\n",
		chartWidth, height, chartWidth, height)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="#ffffff"/>`+"\n", chartWidth, height)
	text := func(x, y float64, anchor, colour, style, s string) {
		fmt.Fprintf(&b, `<text x="%.1f" y="%.1f" text-anchor="%s" fill="%s"%s>%s</text>`+"\n", x, y, anchor, colour, style, html.EscapeString(s))
	}
	text(16, 26, "start", textColour, ` font-size="17" font-weight="bold"`, "Ours, as a multiple of the reference")
	qemu, _, _ := strings.Cut(f.Machine.QEMU, " ")
	text(16, 46, "start", subtleColour, "", "Medians; where there is no reference, of the goal. A tick is the goal. ↑ more is better, ↓ less is better.")
	text(16, 63, "start", subtleColour, "", fmt.Sprintf("%s, %d cores, %d GiB, Linux %s, QEMU %s, %s; %s, commit %s",
		f.Machine.CPU, f.Machine.Cores, f.Machine.MemoryGiB, f.Machine.Kernel, qemu, f.Machine.Go, f.Date.Format("2006-01-02"), f.Machine.Commit))

	bottom := float64(height - footHeight)
	for v := axisMin; v <= axisMax; v *= 2 {
		x := place(v)
		colour, width := gridColour, 1.0
		if v == 1 {
			colour, width = referenceLine, 1.5
		}
		fmt.Fprintf(&b, `<line x1="%.1f" y1="%d" x2="%.1f" y2="%.1f" stroke="%s" stroke-width="%.1f"/>`+"\n", x, headHeight-8, x, bottom, colour, width)
		label := fmt.Sprintf("%g", v)
		if v < 1 {
			label = fmt.Sprintf("1/%g", 1/v)
		}
		text(x, headHeight-14, "middle", subtleColour, "", label)
	}

	y := float64(headHeight)
	for i, r := range rows {
		if i == 0 || r.Case != rows[i-1].Case {
			y += groupHeight
			text(16, y-8, "start", textColour, ` font-size="14" font-weight="bold"`, r.Case)
		}
		drawRow(&b, text, r, y)
		y += rowHeight
	}
	legend := []struct{ colour, name string }{{metColour, "goal met"}, {missedColour, "goal missed"}, {noGoalColour, "no goal"}}
	for i, l := range legend {
		x := float64(labelWidth + i*130)
		fmt.Fprintf(&b, `<rect x="%.1f" y="%.1f" width="12" height="12" fill="%s"/>`+"\n", x, bottom+8, l.colour)
		text(x+18, bottom+18, "start", textColour, "", l.name)
	}
	b.WriteString("</svg>\n")
	return b.Bytes()
}

// drawRow draws label, bar, goal and numbers of a row.
func drawRow(b *bytes.Buffer, text func(x, y float64, anchor, colour, style, s string), r Row, y float64) {
	base := y + 15
	direction := "↓"
	if r.Better == more {
		direction = "↑"
	}
	text(28, base, "start", textColour, "", r.Name+" "+direction)
	value, goalAt := r.Ratio, 0.0
	numbers := number(r.OursMedian) + " " + r.Unit
	if len(r.Reference) > 0 {
		numbers += fmt.Sprintf("; %s %s %s", r.ReferenceName, number(r.ReferenceMedian), r.Unit)
		if r.Of == "ratio" {
			goalAt = r.Bound
		} else if r.Met != nil && r.ReferenceMedian > 0 {
			goalAt = r.Bound / r.ReferenceMedian
		}
	} else if r.Bound > 0 {
		value, goalAt = r.OursMedian/r.Bound, 1
	}
	colour := noGoalColour
	if r.Met != nil {
		colour = missedColour
		if *r.Met {
			colour = metColour
		}
		numbers += fmt.Sprintf("; goal %s: %s", r.Goal, verdict(r))
	}
	if value > 0 {
		from, to := place(1), place(value)
		left, width := math.Min(from, to), math.Max(2, math.Abs(to-from))
		fmt.Fprintf(b, `<rect x="%.1f" y="%.1f" width="%.1f" height="%d" fill="%s"><title>%s</title></rect>`+"\n",
			left, y+4, width, rowHeight-8, colour, html.EscapeString(fmt.Sprintf("%s, %s: %s", r.Case, r.Name, numbers)))
	}
	if goalAt > 0 {
		x := place(goalAt)
		fmt.Fprintf(b, `<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="%s" stroke-width="2"/>`+"\n", x, y+1, x, y+rowHeight-1, textColour)
	}
	if value > 0 {
		numbers = number(value) + " ×   " + numbers
	}
	text(labelWidth+barsWidth+16, base, "start", textColour, ` xml:space="preserve"`, numbers)
}

// place is where a multiple lies on the axis; what is off it, at its end.
func place(v float64) float64 {
	v = math.Min(axisMax, math.Max(axisMin, v))
	return labelWidth + barsWidth*math.Log(v/axisMin)/math.Log(axisMax/axisMin)
}
