// Package blocktest is the contract of [block.Device] and [block.Tracker] as a test suite. A package that implements one of
// them calls [Run] or [RunTracker] with a constructor, and gains all the tests:
//
//	func TestDevice(t *testing.T) {
//		blocktest.Run(t, func(t *testing.T) block.Device { return mydisk.New(1 << 20) })
//	}
//
// Run it with -race: half of what the suite looks for is only found then.
package blocktest
