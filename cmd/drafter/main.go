// Command drafter runs, packages and moves virtual machines. Each of its tools is a subcommand, and the same binary called
// by the name drafter-TOOL (drafter-peer, drafter-snapshotter, …) acts as that tool.
//
// Exit statuses: 0 success; 1 the work failed; 2 the command line cannot be used; 130 ended by a signal after cleaning up.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/drafter-vm/drafter/internal/completion"
	"github.com/drafter-vm/drafter/internal/version"
	"github.com/drafter-vm/drafter/pkg/transport"
)

func main() {
	// A second signal changes nothing: what is under way then is saving the VM, and that has its own time limit.
	signals := []os.Signal{os.Interrupt, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) { // nohup(1) asks to outlive the terminal
		signals = append(signals, syscall.SIGHUP)
	}
	// Until the process has ended: a signal that comes at the last moment must not end it otherwise.
	ctx, _ := signal.NotifyContext(context.Background(), signals...)
	// Whoever reads our output may leave (a pipe to head): that must not kill us and leave a VM without its peer. Taken as
	// a signal rather than ignored, so that programs we start have it as usual.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	err := run(ctx, os.Args, os.Stdin, os.Stdout, os.Stderr)
	os.Exit(exitStatus(err))
}

// run executes one command line, args[0] included, and prints its error. It leaves nothing behind when ctx is cancelled.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) error {
	root := newRootCommand()
	line := args[1:]
	if tool, ok := strings.CutPrefix(filepath.Base(args[0]), "drafter-"); ok {
		line = completion.CommandLine(tool, line)
	}
	root.SetArgs(line)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)

	ctx, err := withPSK(ctx)
	cmd := root
	if err == nil {
		cmd, err = root.ExecuteContextC(ctx)
	}
	if err != nil {
		fmt.Fprintf(stderr, "%s: %v\n", cmd.CommandPath(), err)
		if exitStatus(err) == 2 {
			fmt.Fprintf(stderr, "Run '%s --help' for usage.\n", cmd.CommandPath())
		}
	}
	return err
}

func newRootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "drafter",
		Short: "Snapshot, package, run and live-migrate virtual machines",
		Long: `Drafter snapshots virtual machines, packages them, starts them in tens of milliseconds and moves them,
running, to another host: with memory, disks and open connections.

Each tool also answers to the name drafter-TOOL.`,
		Version:       version.String(),
		SilenceErrors: true, // run prints them, once
		SilenceUsage:  true,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageErrorf("unknown tool %q; 'drafter --help' lists them", transport.Redacted(args[0]))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error { return cmd.Help() },
	}
	var level string
	root.PersistentFlags().StringVar(&level, "log-level", "info", "least severe events to log on stderr: debug, info, warn or error")
	offer(root, "log-level", "debug", "info", "warn", "error")
	root.PersistentPreRunE = func(cmd *cobra.Command, args []string) error {
		var l slog.Level
		if err := l.UnmarshalText([]byte(level)); err != nil {
			return usageErrorf("--log-level %q: use debug, info, warn or error", level)
		}
		cmd.SetContext(withLogger(cmd.Context(), slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: l}))))
		return nil
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error { return usageErrorf("%w", err) })
	root.AddCommand(
		newBlueprintCommand(),
		newSnapshotterCommand(),
		newPackagerCommand(),
		newPeerCommand(),
		newTerminatorCommand(),
		newMounterCommand(),
		newServeCommand(),
		newOCICommand(),
		newDeviceCommand(),
		newStoreCommand(),
		newPushCommand(),
		newPullCommand(),
		newRunCommand(),
		newCtlCommand(),
		newNATCommand(),
		newForwarderCommand(),
		newConnectionsCommand(),
		newManCommand(),
		newCompletionCommand(),
	)
	return root
}

// offer has shells complete the value of a flag.
func offer(cmd *cobra.Command, flag string, values ...string) {
	if err := cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp)); err != nil {
		panic(err) // the program names a flag that it does not have
	}
}

// noArgs refuses positional arguments with the exit status of a usage error.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usageErrorf("unexpected argument %q: every setting is a flag", transport.Redacted(args[0]))
	}
	return nil
}

type loggerKey struct{}

func withLogger(ctx context.Context, l *slog.Logger) context.Context {
	return context.WithValue(ctx, loggerKey{}, l)
}

// logger is the logger of the command line, set up by the root command.
func logger(ctx context.Context) *slog.Logger {
	if l, ok := ctx.Value(loggerKey{}).(*slog.Logger); ok {
		return l
	}
	return slog.Default()
}

// exitStatus is the process's exit status for an error that run returned.
func exitStatus(err error) int {
	var usage *usageError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &usage):
		return 2
	case errors.Is(err, errInterrupted):
		return 130
	default:
		return 1
	}
}

// errInterrupted is what a command returns when a signal ended it before its work was done.
var errInterrupted = errors.New("interrupted")
