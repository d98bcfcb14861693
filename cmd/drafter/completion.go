package main

import (
	"bytes"
	"io"
	"regexp"
	"slices"
	"strings"

	"github.com/spf13/cobra"
)

// newCompletionCommand makes the command that writes the script for a shell, which completes each tool by its own name as well.
func newCompletionCommand() *cobra.Command {
	shells := map[string]func(root *cobra.Command, w io.Writer) error{
		"bash": func(root *cobra.Command, w io.Writer) error { return root.GenBashCompletionV2(w, true) },
		"zsh":  func(root *cobra.Command, w io.Writer) error { return root.GenZshCompletion(w) },
		"fish": func(root *cobra.Command, w io.Writer) error { return root.GenFishCompletion(w, true) },
	}
	return &cobra.Command{
		Use: "completion bash|zsh|fish", Short: "Write the completion script of a shell",
		Long: "Writes the script by which a shell completes commands, flags and their values, for drafter and each drafter-TOOL. make install puts it where\n" +
			"the shells look for it.",
		Example:           "  source <(drafter completion bash)\n  drafter completion fish >~/.config/fish/completions/drafter.fish",
		ValidArgsFunction: cobra.FixedCompletions([]string{"bash", "zsh", "fish"}, cobra.ShellCompDirectiveNoFileComp),
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 1 || shells[args[0]] == nil {
				return usageErrorf("%q: use drafter completion bash, zsh or fish", args)
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			var script bytes.Buffer
			if err := shells[args[0]](cmd.Root(), &script); err != nil {
				return err
			}
			_, err := io.WriteString(cmd.OutOrStdout(), forAll(script.String(), names(cmd.Root())))
			return err
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

// registration is the place of a completion script where it says which commands it is for.
var registration = regexp.MustCompile(`(?m)^(#compdef|compdef _drafter|.*-F __start_drafter) drafter$|^complete .*-c drafter -.*$`)

// forAll makes a script that is for drafter one for all names.
func forAll(script string, names []string) string {
	return registration.ReplaceAllStringFunc(script, func(line string) string {
		rest, each := strings.CutSuffix(line, " drafter")
		if each {
			return rest + " " + strings.Join(names, " ")
		}
		var lines []string // fish takes one name each
		for _, name := range names {
			lines = append(lines, strings.Replace(line, "-c drafter ", "-c "+name+" ", 1))
		}
		return strings.Join(lines, "\n")
	})
}

// commandLine is the command line of drafter that the program was called with by a name: that of a tool stands for its first argument, also
// when a shell asks what could come next.
func commandLine(name string, args []string) []string {
	tool, ok := strings.CutPrefix(name, "drafter-")
	if !ok {
		return args
	}
	at := 0
	if len(args) > 0 && slices.Contains([]string{cobra.ShellCompRequestCmd, cobra.ShellCompNoDescRequestCmd}, args[0]) {
		at = 1
	}
	return slices.Insert(slices.Clone(args), at, tool)
}
