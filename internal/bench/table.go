package main

import (
	"fmt"
	"io"
	"math"
	"strconv"
	"text/tabwriter"
)

// writeTable writes what a person wants to see of a run: medians, ratio, goal.
func writeTable(w io.Writer, rows []Row) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "case\twhat\tours\treference\t\tratio\tgoal\t")
	for _, r := range rows {
		reference, ratio := "", ""
		if len(r.Reference) > 0 {
			reference, ratio = number(r.ReferenceMedian)+" "+r.Unit, number(r.Ratio)+" ×"
		}
		fmt.Fprintf(t, "%s\t%s\t%s %s\t%s\t%s\t%s\t%s\t%s\n",
			r.Case, r.Name, number(r.OursMedian), r.Unit, reference, r.ReferenceName, ratio, r.Goal, verdict(r))
	}
	_ = t.Flush() // the writer is the terminal: whoever closed it does not read on
}

// verdict is whether the goal was met, and how far off it is if not.
func verdict(r Row) string {
	switch {
	case r.Met == nil:
		return ""
	case *r.Met:
		return "met"
	default:
		return fmt.Sprintf("missed by %.0f %%", math.Max(1, 100*r.off()))
	}
}

// number is v with three digits that count.
func number(v float64) string {
	switch a := math.Abs(v); {
	case a == 0:
		return "0"
	case a >= 100:
		return strconv.FormatFloat(v, 'f', 0, 64)
	case a >= 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	case a >= 1:
		return strconv.FormatFloat(v, 'f', 2, 64)
	default:
		return strconv.FormatFloat(v, 'g', 2, 64)
	}
}
