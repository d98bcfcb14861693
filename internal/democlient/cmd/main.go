// Command cmd puts a key-value server under load for a while, reads back what was acknowledged, and prints what happened
// as one JSON object.
//
//	go run ./internal/democlient/cmd --addr 172.16.0.2:6379 --netns demo-client --duration 10s
//
// It ends early, and verifies, on Ctrl-C. Exit status 1: a write was lost, or the server could not be reached.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/drafter-vm/drafter/internal/democlient"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the program at once
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if err == nil || err == flag.ErrHelp {
		return
	}
	fmt.Fprintln(os.Stderr, "democlient:", err)
	os.Exit(1)
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	var cfg democlient.Config
	flags := flag.NewFlagSet("democlient", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.StringVar(&cfg.Address, "addr", "172.16.0.2:6379", "address of the server")
	flags.StringVar(&cfg.Namespace, "netns", "", "network namespace to connect from (below /run/netns)")
	flags.StringVar(&cfg.Prefix, "prefix", "", `what keys start with (default "k:")`)
	flags.IntVar(&cfg.PayloadSize, "payload-size", 0, "bytes of a value (default 64)")
	flags.DurationVar(&cfg.PingInterval, "ping", time.Millisecond, "time between pings (negative: none)")
	flags.DurationVar(&cfg.Timeout, "timeout", 0, "how long to wait for an answer before connecting again (default 10s)")
	duration := flags.Duration("duration", 0, "how long to write (0: until interrupted)")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}

	client, err := democlient.Start(ctx, cfg)
	if err != nil {
		return err
	}
	defer client.Stop()
	started := time.Now()
	if *duration > 0 {
		select {
		case <-ctx.Done():
		case <-time.After(*duration):
		}
	} else {
		<-ctx.Done()
	}
	client.Stop()
	lasted := time.Since(started)

	// The signal ended the writing only.
	lost, err := client.Verify(context.WithoutCancel(ctx))
	result := struct {
		democlient.Stats
		Duration float64 `json:"duration_ms"`
		Lost     int     `json:"lost_writes"`
		Verified bool    `json:"verified"`
	}{client.Stats(), democlient.Milliseconds(lasted), lost, err == nil && lost == 0}
	if e := json.NewEncoder(stdout).Encode(result); e != nil {
		return e
	}
	if err != nil {
		return err
	}
	if lost > 0 {
		return fmt.Errorf("%d of %d acknowledged writes are lost", lost, result.AckedWrites)
	}
	return nil
}
