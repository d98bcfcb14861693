// Package agentpb is the guest RPC on the wire: generated from agent.proto by protoc 3.21.12 and the plugins of
// the versions that go.mod pins, as generate.go says. Package agent is what programs use.
package agentpb
