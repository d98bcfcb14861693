//go:build race

package blueprint

const raceEnabled = true
