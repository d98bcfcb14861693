// Package counter is what the two halves of the example agree on: a service in the guest that counts.
package counter

const (
	// Port of the host, which the guest dials.
	Port = 9100
	// Name and Version of the service.
	Name    = "example.counter"
	Version = 1

	// Service has one method, Next, which takes nothing and returns an Int64Value. With more than that, write a proto file, and have
	// protoc-gen-go-ttrpc generate what is written by hand here.
	Service = "example.counter.v1.Counter"
	Method  = "Next"
)
