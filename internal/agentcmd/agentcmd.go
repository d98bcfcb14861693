// Package agentcmd is the command line of drafter-agent. It is a package, rather than a part of that program, so that drafter writes the manual
// pages of both: what writes them has no place in a small static program for guests.
package agentcmd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/drafter-vm/drafter/internal/completion"
	"github.com/drafter-vm/drafter/internal/version"
	"github.com/drafter-vm/drafter/pkg/agent"
	"github.com/drafter-vm/drafter/pkg/agent/channel"
	"github.com/drafter-vm/drafter/pkg/agent/socket"
)

// dialHost connects to the host. Tests replace it: the machine they run on may itself be somebody's guest.
var dialHost agent.DialFunc = socket.Dial

// Run executes one command line, args[0] included, and prints its error.
func Run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) error {
	root := New()
	line := args[1:]
	if filepath.Base(args[0]) == livenessName {
		line = completion.CommandLine("liveness", line)
	}
	root.SetArgs(line)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	cmd, err := root.ExecuteContextC(ctx)
	if err != nil {
		fmt.Fprintf(stderr, "%s: %v\n", cmd.CommandPath(), err)
		if ExitStatus(err) == 2 {
			fmt.Fprintf(stderr, "Run '%s --help' for usage.\n", cmd.CommandPath())
		}
	}
	return err
}

// livenessName is the name by which the program is its command liveness.
const livenessName = "drafter-liveness"

// usageError is an error of the command line.
type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

// ExitStatus is the process's exit status for an error that Run returned.
func ExitStatus(err error) int {
	var usage *usageError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &usage):
		return 2
	default:
		return 1
	}
}

// options are the flags of all commands.
type options struct {
	logLevel string
}

// New is the command line: drafter-agent with its subcommands.
func New() *cobra.Command {
	var o options
	root := newAgentCommand(&o)
	root.Use = "drafter-agent"
	root.Short = "Tell a guest what happens to its machine"
	root.Long = `Runs inside a guest of Drafter. Without a subcommand it is the agent: it waits for the host's word, and runs
a command before the machine is suspended and after it resumes. The machine is not suspended before the command has
ended; a command that fails makes the host give up, with its output.

After a resume the agent first sets the wall clock and reseeds the random number generator.`
	root.Version = version.String()
	root.SilenceErrors = true // Run prints them, once
	root.SilenceUsage = true
	root.CompletionOptions.DisableDefaultCmd = true
	root.PersistentFlags().StringVar(&o.logLevel, "log-level", "info", "least severe events to log on stderr: debug, info, warn or error")
	// The one error is of a flag that there is not, which TestCompletion would see.
	_ = root.RegisterFlagCompletionFunc("log-level", cobra.FixedCompletions([]string{"debug", "info", "warn", "error"}, cobra.ShellCompDirectiveNoFileComp))
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error { return &usageError{err} })
	alias := newAgentCommand(&o)
	alias.Use = "agent"
	alias.Short = "The same as no subcommand"
	root.AddCommand(alias, newLivenessCommand(&o), newVsockCommand(&o), newContainersCommand(&o), newCompletionCommand())
	return root
}

// noArgs refuses positional arguments with the exit status of a usage error.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return &usageError{fmt.Errorf("unexpected argument %q: '%s --help' lists what there is", args[0], cmd.CommandPath())}
	}
	return nil
}

func (o *options) logger(cmd *cobra.Command) (*slog.Logger, error) {
	var l slog.Level
	if err := l.UnmarshalText([]byte(o.logLevel)); err != nil {
		return nil, &usageError{fmt.Errorf("--log-level %q: use debug, info, warn or error", o.logLevel)}
	}
	return slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: l})), nil
}

// dialOptions are the flags that say how the host is reached.
type dialOptions struct {
	port    uint32
	timeout time.Duration
}

func (d *dialOptions) add(cmd *cobra.Command, port uint32, timeoutHelp string) {
	cmd.Flags().Uint32Var(&d.port, "vsock-port", port, "port of the host to connect to")
	cmd.Flags().DurationVar(&d.timeout, "vsock-timeout", time.Minute, timeoutHelp)
}

func (d *dialOptions) check() error {
	if d.port == 0 {
		return &usageError{errors.New("--vsock-port 0: the host listens on ports from 1 up")}
	}
	if d.timeout <= 0 {
		return &usageError{fmt.Errorf("--vsock-timeout %v: must be more than 0, for example 1m", d.timeout)}
	}
	return nil
}

// agentOptions are the flags of the agent.
type agentOptions struct {
	dialOptions
	beforeSuspend, afterResume, shell string
	beforeSuspendDir, afterResumeDir  string
}

func newAgentCommand(o *options) *cobra.Command {
	var a agentOptions
	cmd := &cobra.Command{
		Args: noArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			logger, err := o.logger(cmd)
			if err != nil {
				return err
			}
			if err := a.check(); err != nil {
				return err
			}
			return serveAgent(cmd.Context(), a, logger)
		},
	}
	a.add(cmd, agent.DefaultPort, "how long one attempt to connect may take; there is always another")
	cmd.Flags().StringVar(&a.beforeSuspend, "before-suspend-cmd", "", "command to run before the machine is suspended")
	cmd.Flags().StringVar(&a.afterResume, "after-resume-cmd", "", "command to run after the machine has resumed")
	cmd.Flags().StringVar(&a.beforeSuspendDir, "before-suspend-dir", "", "folder of programs to run then, before the command, in the order of their names")
	cmd.Flags().StringVar(&a.afterResumeDir, "after-resume-dir", "", "folder of programs to run then, before the command, in the order of their names")
	cmd.Flags().StringVar(&a.shell, "shell-cmd", "sh", "shell that runs the commands, as SHELL -c COMMAND")
	return cmd
}

func serveAgent(ctx context.Context, o agentOptions, logger *slog.Logger) error {
	guest := agent.Guest{
		Port:        o.port,
		Dial:        dialHost,
		DialTimeout: o.timeout,
		Version:     version.String(),
		Logger:      logger,
	}
	guest.BeforeSuspend = func(ctx context.Context) error {
		return o.runHooks(ctx, o.beforeSuspendDir, o.beforeSuspend, "DRAFTER_EVENT=before-suspend")
	}
	guest.AfterResume = func(ctx context.Context, clone bool) error {
		return o.runHooks(ctx, o.afterResumeDir, o.afterResume, "DRAFTER_EVENT=after-resume", "DRAFTER_CLONE="+strconv.FormatBool(clone))
	}
	guest.ShutDown = o.shutDown
	guest.SetEnvironment = client.SetEnvironment
	guest.HasHook = func() bool {
		return o.afterResume != "" || o.afterResumeDir != "" && agent.HasHooks(o.afterResumeDir)
	}
	notifyReady()
	err := guest.Serve(ctx)
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// shutDown has the guest's init shut it down. A guest that takes longer than its host waits for an answer goes on all the same.
func (o *agentOptions) shutDown(ctx context.Context, reboot bool) error {
	what := "poweroff"
	if reboot {
		what = "reboot"
	}
	if _, err := exec.LookPath("systemctl"); err == nil {
		what = "systemctl --no-block " + what // or it waits for what ends this service, too
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	return agent.RunHook(ctx, o.shell, what)
}

// runHooks runs the programs of a folder, and a command; either may be empty.
func (o *agentOptions) runHooks(ctx context.Context, dir, command string, env ...string) error {
	if dir != "" {
		if err := agent.RunHooks(ctx, dir, env...); err != nil {
			return err
		}
	}
	if command != "" {
		return agent.RunHook(ctx, o.shell, command, env...)
	}
	return nil
}

func newLivenessCommand(o *options) *cobra.Command {
	var d dialOptions
	cmd := &cobra.Command{
		Use:   "liveness",
		Short: "Tell the host, once, that the guest is up",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if _, err := o.logger(cmd); err != nil {
				return err
			}
			if err := d.check(); err != nil {
				return err
			}
			ctx, cancel := context.WithTimeoutCause(cmd.Context(), d.timeout,
				fmt.Errorf("host port %d took no connection within %v", d.port, d.timeout))
			defer cancel()
			return agent.SayAlive(ctx, d.port, dialHost)
		},
	}
	d.add(cmd, agent.DefaultLivenessPort, "how long to try")
	return cmd
}

func newVsockCommand(o *options) *cobra.Command {
	var path, mode string
	cmd := &cobra.Command{
		Use:   "vsock",
		Short: "Offer the host's sockets where the machine has no AF_VSOCK device",
		Long: `Offers the ports of the host at ` + socket.GuestPath + ` (connect, send "CONNECT <port>\n", receive "OK <n>\n"),
and connects programs of the host that ask for port P of the guest to the unix socket ` + socket.GuestPath + `_P. The
bytes travel by the virtio-serial port ` + channel.PortName + `.

Where the machine has an AF_VSOCK device the command only says so and waits: programs use that.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			logger, err := o.logger(cmd)
			if err != nil {
				return err
			}
			bits, err := strconv.ParseUint(mode, 8, 9)
			if err != nil {
				return &usageError{fmt.Errorf("--mode %q: use octal permissions, for example 0660", mode)}
			}
			return serveVsock(cmd.Context(), channel.GuestConfig{Path: path, Mode: os.FileMode(bits), Logger: logger}, logger)
		},
	}
	cmd.Flags().StringVar(&path, "path", socket.GuestPath, "socket to offer; programs look for it at the default only")
	cmd.Flags().StringVar(&mode, "mode", "0600", "permissions of the socket: who may connect may talk to every port of the host")
	return cmd
}

func serveVsock(ctx context.Context, cfg channel.GuestConfig, logger *slog.Logger) error {
	if socket.HasVsock() {
		logger.Info("the machine has an AF_VSOCK device, nothing to do")
	} else {
		guest, err := channel.StartGuest(cfg)
		if err != nil {
			return err
		}
		defer guest.Close()
	}
	notifyReady()
	<-ctx.Done()
	return nil
}

// notifyReady tells the service manager that the service is up, if one asked to be told (sd_notify(3)).
func notifyReady() {
	if path := os.Getenv("NOTIFY_SOCKET"); path != "" {
		if conn, err := net.Dial("unixgram", path); err == nil { // Go, too, writes abstract sockets with an @
			conn.Write([]byte("READY=1"))
			conn.Close()
		}
	}
}

// newCompletionCommand makes the command that writes the script for a shell. It is for those who have the program on their host.
func newCompletionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "completion bash|zsh|fish", Short: "Write the completion script of a shell", Hidden: true,
		ValidArgsFunction: cobra.FixedCompletions(completion.Shells(), cobra.ShellCompDirectiveNoFileComp),
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 1 || !slices.Contains(completion.Shells(), args[0]) {
				return &usageError{fmt.Errorf("%q: use drafter-agent completion bash, zsh or fish", args)}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return completion.Write(cmd.OutOrStdout(), cmd.Root(), args[0], []string{cmd.Root().Name(), livenessName})
		},
	}
}
