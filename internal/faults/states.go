package faults

// States are all states that can follow from first, in the order in which they are found: for the tables of package migrate, all
// of them, and so one that is added tomorrow, too.
func States[S comparable](first S, next func(S) []S) []S {
	all, seen := []S{first}, map[S]bool{first: true}
	for i := 0; i < len(all); i++ {
		for _, s := range next(all[i]) {
			if !seen[s] {
				seen[s] = true
				all = append(all, s)
			}
		}
	}
	return all
}
