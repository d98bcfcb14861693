package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"

	"github.com/drafter-vm/drafter/internal/agentcmd"
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
			for _, root := range []*cobra.Command{cmd.Root(), agentcmd.New()} {
				if err := writeManuals(root, args[0]); err != nil {
					return fmt.Errorf("write manual pages into %q: %w", args[0], err)
				}
			}
			if err := link(args[0], "drafter-agent-liveness.1", "drafter-liveness.1"); err != nil {
				return fmt.Errorf("write manual pages into %q: %w", args[0], err)
			}
			return nil
		},
	}
}

// writeManuals writes a page for each command of a program, and for each other name of a command.
func writeManuals(root *cobra.Command, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	root.DisableAutoGenTag = true // it would say the day
	prepare(root)
	// Their date is that of $SOURCE_DATE_EPOCH, as packagers set it, else today's.
	if err := doc.GenManTree(root, &doc.GenManHeader{Section: "1", Source: "Drafter " + version.String(), Manual: "Drafter"}, dir); err != nil {
		return err
	}
	for _, c := range root.Commands() {
		for _, alias := range c.Aliases {
			if err := link(dir, root.Name()+"-"+c.Name()+".1", root.Name()+"-"+alias+".1"); err != nil {
				return err
			}
		}
	}
	return nil
}

// link has a page be found by another name, too.
func link(dir, page, name string) error {
	path := filepath.Join(dir, name)
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return os.Symlink(page, path)
}

// prepare makes what the commands say of themselves the Markdown that pages are made of: a table, whose lines are indented, is literal text
// there with four blanks and an empty line before it, and what is in angle brackets is no HTML.
func prepare(cmd *cobra.Command) {
	var lines []string
	literal := false
	for line := range strings.SplitSeq(cmd.Long, "\n") {
		indented := strings.HasPrefix(line, "  ")
		switch {
		case indented && !literal:
			lines = append(lines, "", "  "+line)
		case indented:
			lines = append(lines, "  "+line)
		default:
			lines = append(lines, strings.ReplaceAll(line, "<", `\<`))
		}
		literal = indented
	}
	cmd.Long = strings.Join(lines, "\n")
	for _, c := range cmd.Commands() {
		prepare(c)
	}
}
