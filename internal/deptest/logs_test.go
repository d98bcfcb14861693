package deptest

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// logged is a key of a log event, and where it is.
type logged struct {
	key, message string
	value        ast.Expr
	at           token.Position
}

// severities are the methods of slog.Logger by which something is logged, each with the place of its first key.
var severities = map[string]int{
	"Debug": 1, "Info": 1, "Warn": 1, "Error": 1, "With": 0, "DebugContext": 2, "InfoContext": 2, "WarnContext": 2, "ErrorContext": 2, "Log": 3, "LogAttrs": 3,
}

var (
	// aLogger is what an expression that is a logger looks like. That keeps the test from having to load the types of everything.
	aLogger = regexp.MustCompile(`(?i)\b(log|logger|slog)(\(.*\))?$`)
	// noLogger is what else has methods of such names.
	noLogger = regexp.MustCompile(`^(t|b|s\.T|http|status|errors|p\.agent)$`)
	snake    = regexp.MustCompile(`^[a-z][a-z0-9]*(_[a-z0-9]+)*$`)
)

// keysOf returns the keys of everything that a file logs. A key that cannot be read off is reported by fail.
func keysOf(files *token.FileSet, f *ast.File, fail func(at token.Position, why string)) (all []logged) {
	ast.Inspect(f, func(n ast.Node) bool {
		call, ok := n.(*ast.CallExpr)
		if !ok {
			return true
		}
		method, ok := call.Fun.(*ast.SelectorExpr)
		if !ok {
			return true
		}
		first, ok := severities[method.Sel.Name]
		if !ok || len(call.Args) <= first {
			return true
		}
		at := files.Position(call.Pos())
		receiver := types.ExprString(method.X)
		switch {
		case aLogger.MatchString(receiver):
		case noLogger.MatchString(receiver):
			return true
		default:
			fail(at, fmt.Sprintf("is %s a logger? say so in this test", receiver))
			return true
		}
		if call.Ellipsis != token.NoPos {
			fail(at, "keys that are passed on cannot be seen here")
			return true
		}
		message := ""
		if first > 0 {
			message = types.ExprString(call.Args[first-1])
		}
		for i := first; i < len(call.Args); i++ {
			of, step := call.Args[i], 1
			if attr, ok := of.(*ast.CallExpr); ok && strings.HasPrefix(types.ExprString(attr.Fun), "slog.") && len(attr.Args) == 2 {
				of, step = attr.Args[0], 0 // slog.String("key", value) is both
			}
			literal, ok := of.(*ast.BasicLit)
			if !ok || literal.Kind != token.STRING {
				fail(at, fmt.Sprintf("the key %s is not written out", types.ExprString(of)))
				i += step
				continue
			}
			key, _ := strconv.Unquote(literal.Value)
			l := logged{key: key, message: message, at: at}
			if i+step < len(call.Args) {
				l.value = call.Args[i+step]
			}
			all = append(all, l)
			i += step
		}
		return true
	})
	return all
}

// row is a line of the table of docs/logs.md.
var row = regexp.MustCompile("(?m)^\\| `([^`]+)` \\| (.+) \\|$")

// TestLogKeys holds all that is logged to the keys of docs/logs.md, whose readers search and count by them, and that page to what is logged.
func TestLogKeys(t *testing.T) {
	page, err := os.ReadFile("../../docs/logs.md")
	if err != nil {
		t.Fatal(err)
	}
	documented := map[string]bool{} // and whether it is in use
	for _, m := range row.FindAllStringSubmatch(string(page), -1) {
		if _, twice := documented[m[1]]; twice {
			t.Errorf("docs/logs.md has %q twice", m[1])
		}
		documented[m[1]] = false
	}
	for _, root := range []string{"pkg", "cmd", "internal/agentcmd"} {
		err := filepath.WalkDir(filepath.Join("../..", root), func(path string, d fs.DirEntry, err error) error {
			if err != nil || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") || strings.HasSuffix(path, ".pb.go") {
				return err
			}
			files := token.NewFileSet()
			f, err := parser.ParseFile(files, path, nil, 0)
			if err != nil {
				return err
			}
			name := filepath.ToSlash(strings.TrimPrefix(path, filepath.Join("../..")+string(filepath.Separator)))
			complain := func(at token.Position, why string) { t.Errorf("%s:%d: %s", name, at.Line, why) }
			for _, l := range keysOf(files, f, complain) {
				_, known := documented[l.key]
				if known {
					documented[l.key] = true
				}
				switch {
				case !snake.MatchString(l.key):
					complain(l.at, fmt.Sprintf("the key %q is not in snake_case", l.key))
				case !known:
					complain(l.at, fmt.Sprintf("the key %q is not in docs/logs.md", l.key))
				case l.key == "reason" && isError(l.value) && !strings.Contains(l.message, "refuse"):
					complain(l.at, fmt.Sprintf("%s: an error is logged as \"error\"; \"reason\" is why somebody was refused", l.message))
				case l.key != "error" && l.key != "reason" && isError(l.value):
					complain(l.at, fmt.Sprintf("%s: an error is logged as \"error\", not %q", l.message, l.key))
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for key, used := range documented {
		if !used {
			t.Errorf("docs/logs.md has %q, which nothing logs", key)
		}
	}
}

// isError reports whether an expression is an error, by its name.
func isError(e ast.Expr) bool {
	if e == nil {
		return false
	}
	s := types.ExprString(e)
	s = s[strings.LastIndex(s, ".")+1:]
	return s == "err" || s == "Err" || s == "failure" || s == "why"
}

// TestLogKeysAreSeen has the test find what it is for.
func TestLogKeysAreSeen(t *testing.T) {
	files := token.NewFileSet()
	f, err := parser.ParseFile(files, "f.go", `package p
		func f() {
			m.log.Warn("a", "one", 1, slog.Int("two", 2), "three", err)
			logger(ctx).With("four", 4).Info("b")
			o.log().ErrorContext(ctx, "c", "five", 5)
			slog.Debug("d", key, 6)
			other.Info("e", "six", 6)
			t.Error("f", "seven")
		}`, 0)
	if err != nil {
		t.Fatal(err)
	}
	var keys, failures []string
	for _, l := range keysOf(files, f, func(_ token.Position, why string) { failures = append(failures, why) }) {
		keys = append(keys, l.key)
	}
	if want := []string{"one", "two", "three", "four", "five"}; !slices.Equal(slices.Sorted(slices.Values(keys)), slices.Sorted(slices.Values(want))) {
		t.Errorf("it sees %q, want %q", keys, want)
	}
	if len(failures) != 2 || !strings.Contains(failures[0]+failures[1], "other") || !strings.Contains(failures[0]+failures[1], "the key key") {
		t.Errorf("it says %q", failures)
	}
}
