package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
)

// roleEnv names what this program is when it executes itself.
const roleEnv = "DRAFTER_BENCH_ROLE"

// roles are what it can be. Each gets its task as JSON, then commands, one a line, and answers each with one line.
var roles = map[string]func(*actor) error{
	"source":           engineSource,
	"destination":      engineDestination,
	"late destination": lateDestination,
	"guest":            guestMain,
	"device user":      deviceUser,
	"server":           serverMain,
}

// actor is this process in a role.
type actor struct {
	task     []byte
	commands <-chan string
}

// playRole is the main function of a role. It ends with its parent: what it waits for on stdin ends then.
func playRole(name string) {
	play := roles[name]
	if play == nil {
		fmt.Fprintf(os.Stderr, "bench: %s=%q is no role: unset it\n", roleEnv, name)
		os.Exit(2)
	}
	lines := bufio.NewReader(os.Stdin)
	task, err := lines.ReadBytes('\n')
	if err != nil {
		os.Exit(1)
	}
	commands := make(chan string)
	go func() {
		for {
			line, err := lines.ReadString('\n')
			if err != nil {
				os.Exit(0)
			}
			commands <- strings.TrimSpace(line)
		}
	}()
	if err := play(&actor{task: task, commands: commands}); err != nil {
		fmt.Printf("error %s\n", strings.ReplaceAll(err.Error(), "\n", "; "))
		os.Exit(1)
	}
}

// decode decodes the task.
func (a *actor) decode(into any) error { return json.Unmarshal(a.task, into) }

// say answers.
func (a *actor) say(format string, args ...any) { fmt.Printf(format+"\n", args...) }

// sayJSON answers with a value.
func (a *actor) sayJSON(v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	a.say("%s", b)
	return nil
}

// await waits for a command and returns what follows it.
func (a *actor) await(command string) (string, error) {
	got, rest, _ := strings.Cut(<-a.commands, " ")
	if got != command {
		return "", fmt.Errorf("told to %q, expected %q", got, command)
	}
	return rest, nil
}

// child is a process with a role, seen by its parent. One goroutine at a time may use it.
type child struct {
	role string
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  *bufio.Reader
}

// startChild starts this program in a role, which ends when ctx does. start is called instead of cmd.Start, if set.
func startChild(ctx context.Context, role string, task any, start func(*exec.Cmd) error, files ...*os.File) (_ *child, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("start the %s: %w", role, err)
		}
	}()
	encoded, err := json.Marshal(task)
	if err != nil {
		return nil, err
	}
	c := &child{role: role, cmd: exec.CommandContext(ctx, "/proc/self/exe")}
	c.cmd.Env = append(os.Environ(), roleEnv+"="+role)
	c.cmd.Stderr = os.Stderr
	c.cmd.ExtraFiles = files
	// A process group of its own: Ctrl-C comes to us, and we end it in order.
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if c.in, err = c.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	c.out = bufio.NewReader(out)
	if start == nil {
		start = (*exec.Cmd).Start
	}
	if err := start(c.cmd); err != nil {
		return nil, err
	}
	if err := c.send("%s", encoded); err != nil {
		c.end()
		return nil, err
	}
	return c, nil
}

func (c *child) send(format string, args ...any) error {
	if _, err := fmt.Fprintf(c.in, format+"\n", args...); err != nil {
		return fmt.Errorf("tell the %s: %w", c.role, err)
	}
	return nil
}

// receive waits for an answer.
func (c *child) receive() (string, error) {
	line, err := c.out.ReadString('\n')
	if err != nil {
		return "", fmt.Errorf("the %s has ended without an answer: %w", c.role, err)
	}
	line = strings.TrimSpace(line)
	if message, failed := strings.CutPrefix(line, "error "); failed {
		return "", fmt.Errorf("the %s: %s", c.role, message)
	}
	return line, nil
}

func (c *child) ask(format string, args ...any) (string, error) {
	if err := c.send(format, args...); err != nil {
		return "", err
	}
	return c.receive()
}

// receiveJSON waits for an answer that is a value.
func (c *child) receiveJSON(into any) error {
	line, err := c.receive()
	if err != nil {
		return err
	}
	if err := json.Unmarshal([]byte(line), into); err != nil {
		return fmt.Errorf("answer of the %s: %w: %.200q", c.role, err, line)
	}
	return nil
}

// expect waits for a certain word and returns what follows it.
func (c *child) expect(word string) (string, error) {
	line, err := c.receive()
	if err != nil {
		return "", err
	}
	got, rest, _ := strings.Cut(line, " ")
	if got != word {
		return "", fmt.Errorf("the %s said %q instead of %q", c.role, line, word)
	}
	return rest, nil
}

// end ends the process and waits for it.
func (c *child) end() {
	_ = c.in.Close()
	_ = c.cmd.Process.Kill()
	if err := c.cmd.Wait(); err != nil && !errors.As(err, new(*exec.ExitError)) {
		fmt.Fprintf(os.Stderr, "bench: wait for the %s: %v\n", c.role, err)
	}
}
