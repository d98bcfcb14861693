// Package completion writes the scripts by which shells complete the command lines of a program that has several names.
package completion

import (
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"

	"github.com/spf13/cobra"
)

// Shells are those that there are scripts for.
func Shells() []string { return []string{"bash", "zsh", "fish"} }

// Write writes the script of a shell, which completes each of the names: that of the program, and those it is also called by.
func Write(w io.Writer, root *cobra.Command, shell string, names []string) error {
	var script strings.Builder
	var err error
	switch shell {
	case "bash":
		err = writeBash(root, &script)
	case "zsh":
		err = root.GenZshCompletion(&script)
	case "fish":
		err = root.GenFishCompletion(&script, true)
	default:
		err = fmt.Errorf("there is no script for %q", shell)
	}
	if err != nil {
		return fmt.Errorf("write completion script: %w", err)
	}
	_, err = io.WriteString(w, forAll(script.String(), root.Name(), names))
	return err
}

// CommandLine is the command line of a program that was called by the name of one of its commands: that stands for the first argument, also when
// a shell asks what could come next.
func CommandLine(command string, args []string) []string {
	at := 0
	if len(args) > 0 && slices.Contains([]string{cobra.ShellCompRequestCmd, cobra.ShellCompNoDescRequestCmd}, args[0]) {
		at = 1
	}
	return slices.Insert(slices.Clone(args), at, command)
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

// forAll makes a script that is for one name one for all. It looks for the places where the script says which commands it is for.
func forAll(script, name string, names []string) string {
	registration := regexp.MustCompile(`(?m)^(#compdef|compdef _\S+|.*-F __start_\S+) ` + regexp.QuoteMeta(name) + `$|^complete .*-c ` + regexp.QuoteMeta(name) + ` -.*$`)
	return registration.ReplaceAllStringFunc(script, func(line string) string {
		rest, each := strings.CutSuffix(line, " "+name)
		if each {
			return rest + " " + strings.Join(names, " ")
		}
		var lines []string // fish takes one name each
		for _, other := range names {
			lines = append(lines, strings.Replace(line, "-c "+name+" ", "-c "+other+" ", 1))
		}
		return strings.Join(lines, "\n")
	})
}
