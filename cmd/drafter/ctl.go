package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"path/filepath"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/drafter-vm/drafter/pkg/control"
	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/transport"
)

// newCtlCommand makes the command that controls a peer.
func newCtlCommand() *cobra.Command {
	const verbs = "status, pause, resume, migratable on|off, migrate ADDRESS, snapshot DIR, balloon SIZE, cancel or stop"
	var socket string
	cmd := &cobra.Command{
		Use:   "ctl",
		Short: "Control a peer that runs",
		Long: `Controls a peer that was started with --control FILE, by that file: a unix socket of the peer's user. Answers are JSON on stdout.

Exit statuses: 0 done; 1 it failed, or is not possible now; 2 the command line cannot be used. Ending ctl migrate and ctl snapshot
cancels what they began, as long as that can be; ending ctl balloon takes nothing back.`,
		Example: `  drafter peer --package out/package --instance out/instance-0 --control out/control.sock
  drafter ctl --control out/control.sock status
  drafter ctl --control out/control.sock migrate tls://b.example:1337`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageErrorf("unknown command %q: use %s", transport.Redacted(args[0]), verbs)
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			return usageErrorf("say what to do: %s", verbs)
		},
	}
	cmd.PersistentFlags().StringVar(&socket, "control", "", "the peer's control socket")
	add := func(use, short string, args int, do func(ctx context.Context, c *control.Client, args []string) (any, error)) {
		cmd.AddCommand(&cobra.Command{
			Use: use, Short: short,
			Args: func(cmd *cobra.Command, given []string) error {
				if len(given) != args {
					return usageErrorf("%d arguments were given: use %s", len(given), cmd.UseLine())
				}
				return nil
			},
			RunE: func(cmd *cobra.Command, given []string) error {
				if socket == "" {
					return usageErrorf("--control is missing: give the file that the peer was started with")
				}
				client := control.NewClient(func(ctx context.Context) (net.Conn, error) { return transport.Dial(ctx, controlAddress(socket)) })
				answer, err := do(cmd.Context(), client, given)
				if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
					return fmt.Errorf("--control: %w: no peer listens there: start it with --control %s, or correct the path", err, socket)
				} else if err != nil {
					return interrupted(cmd, fmt.Errorf("%s: %w", cmd.Name(), err))
				}
				if answer == nil {
					return nil
				}
				text, err := json.MarshalIndent(answer, "", "  ")
				if err != nil {
					return err
				}
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s\n", text)
				return err
			},
		})
	}
	plain := func(f func(*control.Client, context.Context) error) func(context.Context, *control.Client, []string) (any, error) {
		return func(ctx context.Context, c *control.Client, _ []string) (any, error) { return nil, f(c, ctx) }
	}
	add("status", "What the peer and its VM do", 0, func(ctx context.Context, c *control.Client, _ []string) (any, error) { return c.Status(ctx) })
	add("pause", "Stop the guest, after its agent was told", 0, plain((*control.Client).Pause))
	add("resume", "Let a guest run that pause has stopped", 0, plain((*control.Client).Resume))
	add("migratable on|off", "Whether the VM may be sent: to who asks for it at --laddr, and by migrate", 1, func(ctx context.Context, c *control.Client, args []string) (any, error) {
		on, ok := map[string]bool{"on": true, "off": false}[args[0]]
		if !ok {
			return nil, usageErrorf("%q: use on or off", args[0])
		}
		return nil, c.SetMigratable(ctx, on)
	})
	migratable, _, _ := cmd.Find([]string{"migratable"})
	migratable.ValidArgsFunction = cobra.FixedCompletions([]string{"on", "off"}, cobra.ShellCompDirectiveNoFileComp)
	report := func(r *migrate.Report, err error) (any, error) { return r, err }
	add("migrate ADDRESS", "Send the VM to a peer that waits for one (drafter peer --accept)", 1, func(ctx context.Context, c *control.Client, args []string) (any, error) {
		return report(c.Migrate(ctx, args[0]))
	})
	add("snapshot DIR", "Write the VM down as a package in a new folder, while it runs on", 1, func(ctx context.Context, c *control.Client, args []string) (any, error) {
		dir, err := filepath.Abs(args[0]) // the peer may have been started elsewhere
		if err != nil {
			return nil, err
		}
		return report(c.Snapshot(ctx, dir))
	})
	add("balloon SIZE", "Have the guest give SIZE of its memory to the host, such as 512M, or 0 for none", 1, func(ctx context.Context, c *control.Client, args []string) (any, error) {
		size := int64(0)
		if args[0] != "0" {
			var err error
			if size, err = parseDiskSize(args[0]); err != nil || args[0] == "" {
				return nil, usageErrorf("%q is not a size; give one such as 512M, or 0", args[0])
			}
		}
		return c.Balloon(ctx, size)
	})
	add("cancel", "Cancel the migration, snapshot or pause under way", 0, plain((*control.Client).Cancel))
	add("stop", "End the peer, as SIGTERM does: the VM is suspended and saved", 0, plain((*control.Client).Stop))
	return cmd
}
