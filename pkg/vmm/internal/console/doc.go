// Package console pumps between a VMM's console and its owner, so that the guest never waits for either.
package console
