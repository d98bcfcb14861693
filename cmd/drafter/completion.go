package main

import (
	"bytes"
	"errors"
	"io"
	"regexp"
	"slices"
	"strings"

	"github.com/spf13/cobra"
)

// newCompletionCommand makes the command that writes the script for a shell, which completes each tool by its own name as well.
func newCompletionCommand() *cobra.Command {
	shells := map[string]func(root *cobra.Command, w io.Writer) error{
		"bash": writeBash,
		"zsh":  func(root *cobra.Command, w io.Writer) error { return root.GenZshCompletion(w) },
		"fish": func(root *cobra.Command, w io.Writer) error { return root.GenFishCompletion(w, true) },
	}
	return &cobra.Command{
		Use: "completion bash|zsh|fish", Short: "Write the completion script of a shell",
		Long: "Writes the script by which a shell completes commands, flags and their values, for drafter and each drafter-TOOL. make install puts it where\n" +
			"the shells look for it: in bash that is done by the package bash-completion, without which the script is to be read by ~/.bashrc, as below.",
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

// splitting is the line of cobra's script for bash that splits the command line, by a function of the package bash-completion. Many hosts and
// containers have bash without that package, where the function would be missed at each TAB.
const splitting = "    _get_comp_words_by_ref \"$@\" cur prev words cword\n"

// ownSplitting does the same without that package: bash breaks words at = and :, also within an address or --flag=value, and what it broke is
// put together again.
const ownSplitting = `    if declare -F _get_comp_words_by_ref >/dev/null 2>&1; then
        _get_comp_words_by_ref "$@" cur prev words cword
        return
    fi
    local i word before left=$COMP_LINE begin=0 last="" n=-1
    words=()
    for ((i = 0; i < ${#COMP_WORDS[@]}; i++)); do
        word=${COMP_WORDS[i]}
        before=${left%%"$word"*}
        [[ -n $word ]] || before=$left
        left=${left:${#before}+${#word}}
        if [[ $i -gt 0 && -z $before && ( $word =~ ^[=:]+$ || $last =~ ^[=:]+$ ) ]]; then
            words[n]+=$word
        else
            words[++n]=$word
            begin=$((${#COMP_LINE} - ${#left} - ${#word}))
        fi
        if ((i == COMP_CWORD)); then
            cword=$n
            cur=${COMP_LINE:begin:COMP_POINT > begin ? COMP_POINT - begin : 0}
        fi
        last=$word
    done
    words[cword]=$cur
    prev=${words[cword > 0 ? cword - 1 : 0]}
`

// writeBash writes the script for bash.
func writeBash(root *cobra.Command, w io.Writer) error {
	var script strings.Builder
	if err := root.GenBashCompletionV2(&script, true); err != nil {
		return err
	}
	if !strings.Contains(script.String(), splitting) {
		return errors.New("cobra's script for bash is another one now: see whether it still needs the package bash-completion")
	}
	_, err := io.WriteString(w, strings.Replace(script.String(), splitting, ownSplitting, 1))
	return err
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
