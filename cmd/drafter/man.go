package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"

	"github.com/drafter-vm/drafter/internal/version"
)

// newManCommand makes the command that writes the manual pages, for packagers and make install.
func newManCommand() *cobra.Command {
	return &cobra.Command{
		Use: "man DIR", Short: "Write the manual pages of all tools into a folder, which is made if it does not exist", Hidden: true,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usageErrorf("%d arguments were given: use drafter man DIR", len(args))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := os.MkdirAll(args[0], 0o755); err != nil {
				return err
			}
			root := cmd.Root()
			root.DisableAutoGenTag = true // it would say the day
			// Their date is that of $SOURCE_DATE_EPOCH, as packagers set it, else today's.
			if err := doc.GenManTree(root, &doc.GenManHeader{Section: "1", Source: "Drafter " + version.String(), Manual: "Drafter"}, args[0]); err != nil {
				return fmt.Errorf("write manual pages into %q: %w", args[0], err)
			}
			return nil
		},
	}
}
