package runner

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// TestAwaitBalloon: it ends when the guest has given what it was asked for, or comes no nearer to that, whatever else it does.
func TestAwaitBalloon(t *testing.T) {
	const mib = 1 << 20
	for _, c := range []struct {
		name        string
		size        int64
		given       func(after time.Duration) int64
		want        int64
		least, most time.Duration
	}{
		{"at once", 16*mib + 5, func(time.Duration) int64 { return 16 * mib }, 16 * mib, 0, 0},
		{"slowly", 16 * mib, func(after time.Duration) int64 { return int64(after/(4*time.Second)) * mib }, 16 * mib, 64 * time.Second, 65 * time.Second},
		{"nothing", 16 * mib, func(time.Duration) int64 { return 0 }, 0, balloonQuiet, balloonQuiet + time.Second},
		{"a part", 16 * mib, func(after time.Duration) int64 { return min(3, int64(after/time.Second)) * mib }, 3 * mib, 3*time.Second + balloonQuiet, 10 * time.Second},
		{"to and fro", 16 * mib, func(after time.Duration) int64 { return int64(after/(2*time.Second)) % 2 * mib }, mib, 2*time.Second + balloonQuiet, 10 * time.Second},
		{"back", 0, func(after time.Duration) int64 { return max(0, 3-int64(after/time.Second)) * mib }, 0, 3 * time.Second, 4 * time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				began := time.Now()
				given, err := awaitBalloon(t.Context(), c.size, nil, func() (int64, error) { return c.given(time.Since(began)), nil })
				if took := time.Since(began); err != nil || given != c.want || took < c.least || took > c.most {
					t.Errorf("it has given %d after %s (%v), want %d after %s to %s", given, took, err, c.want, c.least, c.most)
				}
			})
		})
	}
	gone := errors.New("gone")
	if _, err := awaitBalloon(t.Context(), 0, nil, func() (int64, error) { return 0, gone }); !errors.Is(err, gone) {
		t.Errorf("got error %v", err)
	}
}
