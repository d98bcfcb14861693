// Package nbdtest has a small NBD client for tests and benchmarks of NBD servers. It is a [block.Device], so that the suite
// of package blocktest runs over the wire. It trusts the server, and keeps no request within bounds of memory.
package nbdtest
