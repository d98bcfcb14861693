// Package service connects an application's own services in a guest with those on its host: typed calls in both directions,
// over connections that come back after each suspend and move.
//
// The two sides agree on a name, a version, and a port of the host. On the host, a program listens before the guest runs:
//
//	hooks.Made = func(vmPath string) (err error) { // runner.Hooks
//		store, err = service.ListenHost(vmPath, service.Config{Port: 9000, Name: "example.store", Version: 2, Oldest: 1})
//		return err
//	}
//	…
//	err := store.Call(ctx, func(ctx context.Context, c *ttrpc.Client) (err error) {
//		answer, err = storepb.NewStoreClient(c).Get(ctx, &storepb.GetRequest{Key: "a"})
//		return err
//	})
//
// and in the guest another one answers, and calls the host in the same way:
//
//	host, err := service.StartGuest(service.Config{Port: 9000, Name: "example.store", Version: 2, Oldest: 1,
//		Register: func(s *ttrpc.Server) { storepb.RegisterStoreService(s, myStore{}) }})
//	defer host.Close()
//
// Calls are ttrpc's, their types protobuf's: methods are generated, and a method that the other side does not know is answered
// with UNIMPLEMENTED. Bytes without calls are package socket's.
//
// # What a suspend or a move does
//
// Connections end with it; the guest dials again at once, by itself, wherever it runs then. A call that was under way fails with
// [ErrUnknown], as nobody can say whether it was executed: [Endpoint.Call] leaves it to the caller, [Endpoint.Retry] repeats it,
// for methods that may be executed twice. Both wait for a connection if there is none. No migration waits for any of this.
//
// # Versions
//
// Each side says which versions it speaks, from Oldest to Version; the newest that both speak is agreed on, for each connection
// anew, as the host may be another after a move. [Endpoint.Wait] returns it. Sides without a common version, or with different
// names, get an error that says so, and try again: the other may be replaced.
//
// # Time
//
// The other side may be dead, slow or hostile. Every call ends with its context, or after Config.Timeout if that has no deadline; the
// one who executes it sees the deadline in its own context.
//
// # Memory
//
// No more than Config.Calls calls of the other side, 256, are executed at a time; one beyond that is answered with RESOURCE_EXHAUSTED.
// A call counts as unanswered until its answer is written, which needs a side that reads. When 64 more than Config.Calls are, or
// when the requests of those that are have 16 MiB, or while an answer is written, no further call is read: it waits with the other side,
// as that of a full socket does. If nothing of an answer can be written for a minute, the connection is closed.
//
// So a hostile side makes the memory of this one grow by no more than 20 MiB of requests, twice while they are decoded, and Config.Calls
// + 64 answers of up to 4 MiB. The latter is for methods that are slow and whose answers are large: of others, few are executed when the
// first answer cannot be written. Config.Calls makes it less. A method that goes on when its context has ended, because its connection did,
// keeps what it has, and its place among Config.Calls, until it returns.
//
// # What it does not do
//
// It serves no methods to which the caller streams: what ttrpc would let wait of such messages has no bound. A connection on which one
// arrives is closed. It authenticates nobody: every program in the guest that may connect to the host can speak on the guest's behalf. A host has one
// guest endpoint for each port; of several that connect, the last one counts.
package service
