package main

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"time"
)

// Row is one number of a case: what out/bench.json holds of it.
type Row struct {
	Case   string    `json:"case"`   // "engine/random/idle"
	Name   string    `json:"name"`   // what is measured, unique in its case
	Unit   string    `json:"unit"`   // "MB/s", "ms", …
	Better string    `json:"better"` // "more" or "less"
	Date   time.Time `json:"date"`   // when it was measured
	Load   float64   `json:"load"`   // of the machine, just before: the average of a minute. What ran before is part of it

	Ours          []float64 `json:"ours"`
	Reference     []float64 `json:"reference,omitempty"`
	ReferenceName string    `json:"reference_name,omitempty"`

	OursMedian      float64 `json:"ours_median"`
	ReferenceMedian float64 `json:"reference_median,omitempty"`
	Ratio           float64 `json:"ratio,omitempty"` // ours to the reference; see doc.go

	Goal  string  `json:"goal,omitempty"` // in words
	Bound float64 `json:"bound,omitempty"`
	Of    string  `json:"bound_of,omitempty"` // what Bound is a bound of: "ratio" or "ours"
	Met   *bool   `json:"met,omitempty"`      // nil: there is no goal
}

// less and more say which direction is good.
const (
	less = "less"
	more = "more"
)

// goal is what a row has to reach. The zero value asks for nothing.
type goal struct {
	text  string
	bound float64
	of    string
}

func atMost(bound float64, unit string) goal {
	return goal{text: fmt.Sprintf("≤ %v %s", bound, unit), bound: bound, of: "ours"}
}

func ratioAtMost(bound float64) goal {
	return goal{text: fmt.Sprintf("≤ %v ×", bound), bound: bound, of: "ratio"}
}

func ratioAtLeast(bound float64) goal {
	return goal{text: fmt.Sprintf("≥ %v ×", bound), bound: bound, of: "ratio"}
}

func ratioWithin(percent float64) goal {
	return goal{text: fmt.Sprintf("within %v %%", percent), bound: 1 - percent/100, of: "ratio"}
}

// newRow computes medians and ratio, and judges.
func newRow(caseName, name, unit, better string, ours, reference []float64, referenceName string, g goal) Row {
	r := Row{
		Case: caseName, Name: name, Unit: unit, Better: better, Date: time.Now().UTC().Truncate(time.Second),
		Ours: ours, Reference: reference, ReferenceName: referenceName, OursMedian: median(ours), Goal: g.text, Bound: g.bound, Of: g.of,
	}
	if len(reference) > 0 {
		r.ReferenceMedian = median(reference)
		r.Ratio = ratio(ours, reference)
	}
	if g.text == "" || len(ours) == 0 || g.of == "ratio" && len(reference) == 0 {
		return r
	}
	value := r.OursMedian
	if g.of == "ratio" {
		value = r.Ratio
	}
	met := value <= g.bound
	if better == more {
		met = value >= g.bound
	}
	r.Met = &met
	return r
}

// off says by how much a missed goal was missed, as a share of the bound; 0 when it was met.
func (r Row) off() float64 {
	if r.Met == nil || *r.Met || r.Bound == 0 {
		return 0
	}
	value := r.OursMedian
	if r.Of == "ratio" {
		value = r.Ratio
	}
	return math.Abs(value/r.Bound - 1)
}

// median of values; 0 of none.
func median(values []float64) float64 { return quantile(values, 0.5) }

// quantile interpolates between the two values next to the place.
func quantile(values []float64, q float64) float64 {
	if len(values) == 0 {
		return 0
	}
	sorted := slices.Clone(values)
	slices.Sort(sorted)
	place := q * float64(len(sorted)-1)
	low := int(place)
	high := min(low+1, len(sorted)-1)
	return sorted[low] + (place-float64(low))*(sorted[high]-sorted[low])
}

// ratio is the median of the ratios of the turns: what disturbs the machine for a while disturbs both of a turn.
func ratio(ours, reference []float64) float64 {
	if len(ours) != len(reference) {
		if m := median(reference); m != 0 {
			return median(ours) / m
		}
		return 0
	}
	var ratios []float64
	for i := range ours {
		if reference[i] != 0 {
			ratios = append(ratios, ours[i]/reference[i])
		}
	}
	return median(ratios)
}

// merge puts new rows in the place of old ones: rows of a case that was measured again replace all of that case.
func merge(old, now []Row, order []string) []Row {
	measured := map[string]bool{}
	for _, r := range now {
		measured[r.Case] = true
	}
	all := slices.Clone(now)
	for _, r := range old {
		if !measured[r.Case] && slices.Contains(order, r.Case) {
			all = append(all, r)
		}
	}
	slices.SortStableFunc(all, func(a, b Row) int {
		return cmp.Compare(slices.Index(order, a.Case), slices.Index(order, b.Case))
	})
	return all
}
