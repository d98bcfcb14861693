package main

import (
	"slices"

	"github.com/spf13/cobra"

	"github.com/drafter-vm/drafter/internal/completion"
)

// newCompletionCommand makes the command that writes the script for a shell, which completes each tool by its own name as well.
func newCompletionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "completion bash|zsh|fish", Short: "Write the completion script of a shell",
		Long: "Writes the script by which a shell completes commands, flags and their values, for drafter and each drafter-TOOL. make install puts it where\n" +
			"the shells look for it: in bash that is done by the package bash-completion, without which the script is to be read by ~/.bashrc, as below.",
		Example:           "  source <(drafter completion bash)\n  drafter completion fish >~/.config/fish/completions/drafter.fish",
		ValidArgsFunction: cobra.FixedCompletions(completion.Shells(), cobra.ShellCompDirectiveNoFileComp),
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 1 || !slices.Contains(completion.Shells(), args[0]) {
				return usageErrorf("%q: use drafter completion bash, zsh or fish", args)
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return completion.Write(cmd.OutOrStdout(), cmd.Root(), args[0], names(cmd.Root()))
		},
	}
}

// names are the names of the program: drafter, and that of each tool.
func names(root *cobra.Command) []string {
	all := []string{root.Name()}
	for _, c := range root.Commands() {
		if c.Hidden || c.Name() == "help" || c.Name() == "completion" {
			continue
		}
		for _, name := range append([]string{c.Name()}, c.Aliases...) {
			all = append(all, root.Name()+"-"+name)
		}
	}
	return all
}
