// Package agent lets a host tell its guest what happens to it: that it is about to be suspended, and that it runs again.
//
// The guest dials. A [Guest] (program drafter-agent) connects to port 26 of the host, serves the calls of agentpb on that
// connection, and connects again, for ever, when it ends; connections end with every snapshot and every move. On the
// host, an [Host] listens and calls:
//
//	h, err := agent.ListenAgent(vmPath, 0, nil)   // before the guest runs, so that it need not wait to dial again
//	…
//	err = h.BeforeSuspend(ctx)                    // waits for the agent if it is not connected; then pause, save, move
//	…
//	err = h.AfterResume(ctx, agent.AfterResumeRequest{Entropy: agent.NewEntropy()})
//
// [Liveness] is simpler still: the guest connects to port 25 once, when it is up.
//
// # Exactly once
//
// Each call has an id. The guest remembers, in its memory, the id and the outcome of the last call of each kind; its
// memory travels with it. A call that is repeated because a connection was cut, or because the host's process was
// replaced and its journal holds the id, is therefore not executed again: it waits for the execution that runs, or gets
// the outcome of the one that ended. An execution, once begun, does not end with the connection it came by. Calls are
// executed one after the other.
//
// Who suspends must resume: if BeforeSuspend succeeded, or its outcome is unknown, and the guest then runs on after all
// (a move was given up), AfterResume is called too.
//
// # Time
//
// A guest may be dead, slow, or hostile. Every method of the host returns when its context is done, whatever the guest
// does; a context that never ends waits for ever. A hook is killed, with all processes it started, shortly before the
// context of the call ends, so that its output can still be reported.
//
// # Compatibility
//
// The protocol is ttrpc, and the schema agentpb/agent.proto, versioned by its package name (drafter.agent.v1). Further
// services are added beside the agent's; those the guest calls on the host have a port of their own.
//
// # What it does not do
//
// It carries no bytes by itself (package socket says who does), authenticates nobody (every program in the guest that may
// connect to the host can claim to be the agent), and does not pause or resume machines.
package agent
