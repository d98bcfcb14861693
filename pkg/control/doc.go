// Package control lets others look at a peer and control it: it serves numbers about it and its migrations to Prometheus, and an
// API on a unix socket, with a client.
//
//	server := control.Serve(listener, control.NewHandler(controlled), nil) // JSON over HTTP: docs/control.md
//	client := control.NewClient(dial)
//	report, err := client.Migrate(ctx, "tls://host.example:1337")
//
//	metrics := control.NewMetrics(version)
//	server := control.Serve(listener, metrics.Handler(), nil) // at /metrics
//	defer server.Close()
//
//	cfg.Progress = metrics.Progress              // of the peer: it counts what every migration does
//	report, err := p.Send(ctx, streams)
//	metrics.Done(report)                         // of a snapshot: Snapshot in place of Progress, and SnapshotDone
//
// # Numbers
//
// All names begin with drafter_, and end with their unit. Those of a single migration are of the one that is under way, or
// the last; those with _total, and histograms, are of all since the peer began. The label role says which side of a
// migration this peer is: source or destination. [Metrics] lists them.
//
// # Concurrency
//
// All methods may be called by any goroutine. Those of [Metrics] take no longer than a scrape takes to copy the numbers. Those of [Client]
// wait for their answers: Migrate and Snapshot as long as the whole migration or snapshot takes, Pause and Resume for the guest's agent.
// [Server.Close] waits for answers that are being given, a second at most.
//
// # What it does not do
//
// It knows neither peers nor instances, but takes what it is told, and calls a [Controlled]. It does not listen by itself, and neither
// authenticates nor encrypts: give it a listener that only those reach who may read, or, for the API, who may do anything with the
// VM. The numbers name no path, no guest and no other host.
package control
