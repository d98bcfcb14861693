// Package democlient puts a key-value server under load and finds out whether it lost anything while its VM moved.
//
// It speaks RESP, the protocol of Valkey and Redis, over two connections:
//
//   - the writer sets numbered keys, one after the other: PREFIX0, PREFIX1, … Key n+1 is not sent before key n was
//     acknowledged, and a key whose fate is unknown, because the connection broke, is sent again. So the acknowledged
//     keys are exactly those below a number.
//   - the pinger sends a PING at every tick, whether the earlier ones were answered or not, and notes when answers come.
//     The longest time between two answers is how long a client was without its server. It does not wait for answers
//     because TCP would then make a gap longer than it is: a lone lost segment is sent again after 200 ms at the
//     earliest, one with others behind it as soon as those are acknowledged.
//
// Afterwards [Client.Verify] reads every acknowledged key back and compares it with what was written. Values can be
// computed from the number of the key and a token of the run, so that neither memory nor keys of an earlier run matter.
//
//	client, err := democlient.Start(ctx, democlient.Config{Address: "172.16.0.2:6379", Namespace: "demo-client"})
//	if err != nil { … }
//	before := time.Now()
//	… the VM moves …
//	gap := client.GapBetween(before, time.Now())
//	client.Stop()
//	lost, err := client.Verify(ctx)
//
// A connection that breaks, or gives no answer for Config.Timeout, is made anew and counted. Reconnecting is done here
// rather than by a client library so that no retry goes uncounted.
//
// All methods of a Client may be called concurrently. It needs 8 bytes of memory per ping and per write.
package democlient
