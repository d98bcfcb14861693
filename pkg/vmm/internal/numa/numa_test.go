package numa

import "testing"

func TestParseCPUList(t *testing.T) {
	for _, tc := range []struct {
		list string
		want int // CPUs; -1: an error
	}{
		{"0\n", 1}, {"0-3,8,10-11\n", 7}, {"", 0}, {"\n", 0}, {"3-1", -1}, {"a", -1}, {"1-", -1}, {"1,,2", -1},
	} {
		set, err := parseCPUList(tc.list)
		if (err != nil) != (tc.want < 0) || err == nil && set.Count() != tc.want {
			t.Errorf("%q: %v, %v", tc.list, set, err)
		}
	}
}

func FuzzParseCPUList(f *testing.F) {
	f.Add("0-3,8")
	f.Fuzz(func(t *testing.T, list string) {
		if set, err := parseCPUList(list); err == nil && set == nil {
			t.Error("neither a set nor an error")
		}
	})
}
