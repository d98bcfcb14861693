// Package backends tests hypervisors together with what gives them their memory, which they may not know: package ram.
package backends
