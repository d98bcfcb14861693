package agentcmd

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/drafter-vm/drafter/pkg/oci/supervise"
)

// client asks the supervisor of containers. Tests replace it.
var client interface {
	List(context.Context) ([]supervise.Container, error)
	Restart(ctx context.Context, name string) error
	SetEnvironment(ctx context.Context, environment []string) error
} = supervise.Client{}

func newContainersCommand(o *options) *cobra.Command {
	var cfg supervise.Config
	cmd := &cobra.Command{
		Use:   "containers",
		Short: "Run the containers of the machine's disks",
		Long: `Runs what is on disks that hold an OCI runtime bundle each (config.json and the folder rootfs, at the root of a file
system that is neither mounted nor in fstab), with crun or runc, and starts again what ends as the annotation
org.drafter.restart has it. The service manager is told when all of them are ready, by the annotation org.drafter.ready.
Their output goes to standard output and to the console, with their names in front.

It ends them when it is ended itself (SIGTERM), after 10 seconds by SIGKILL. One of it runs at a time.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			logger, err := o.logger(cmd)
			if err != nil {
				return err
			}
			cfg.Logger, cfg.Output = logger, cmd.OutOrStdout()
			// A journal that is gone is no reason to end. (Ignored, the signal would be for the containers, too.)
			gone := make(chan os.Signal, 1)
			signal.Notify(gone, syscall.SIGPIPE)
			defer signal.Stop(gone)
			return supervise.Run(cmd.Context(), cfg)
		},
	}
	cmd.Flags().StringVar(&cfg.Runtime, "runtime", "", "program that runs a container (default crun, or else runc)")
	cmd.Flags().StringVar(&cfg.Console, "console", "/dev/console", "terminal to show the output of containers on, too")
	cmd.AddCommand(&cobra.Command{
		Use: "list", Short: "List containers, and how they are", Args: noArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			all, err := client.List(cmd.Context())
			if err != nil {
				return err
			}
			w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 8, 2, ' ', 0)
			fmt.Fprintln(w, "NAME\tDISK\tSTATE\tFOR\tSTARTS\tREADY\tENDED LAST")
			for _, c := range all {
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d\t%s\t%s\n", c.Name, c.Disk, c.State, c.For.Round(time.Second), c.Starts, cmp.Or(c.Ready, "started"), cmp.Or(c.Detail, "-"))
			}
			return w.Flush()
		},
	}, &cobra.Command{
		Use: "restart NAME", Short: "End a container, start it again, and wait until it is ready",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 1 {
				return &usageError{fmt.Errorf("%q: give the name of one container; '%s list' shows them", args, cmd.Parent().CommandPath())}
			}
			return nil
		},
		ValidArgsFunction: func(cmd *cobra.Command, args []string, _ string) (names []string, _ cobra.ShellCompDirective) {
			if all, err := client.List(cmd.Context()); err == nil && len(args) == 0 {
				for _, c := range all {
					names = append(names, c.Name)
				}
			}
			return names, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error { return client.Restart(cmd.Context(), args[0]) },
	})
	return cmd
}
