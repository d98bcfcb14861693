package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/migrate"
)

// peerProcess is a `drafter peer` that runs.
type peerProcess struct {
	name    string
	cmd     *exec.Cmd
	reports string        // file
	ended   chan struct{} // closed when the process has ended and err is set
	err     error
	once    sync.Once
	stopErr error

	mu    sync.Mutex // guards what follows
	lines []string
	grown chan struct{} // closed and replaced when lines grows
}

// startPeerProcess starts a prepared command. When the command's context ends it is asked to close, as by stop.
func startPeerProcess(cmd *exec.Cmd, name, reports string) (*peerProcess, error) {
	p := &peerProcess{name: name, cmd: cmd, reports: reports, ended: make(chan struct{}), grown: make(chan struct{})}
	p.cmd.Cancel = func() error { return p.cmd.Process.Signal(os.Interrupt) }
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C comes to us
	stderr, err := p.cmd.StderrPipe()
	if err != nil {
		return nil, err
	}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		defer close(p.ended)
		for scanner := bufio.NewScanner(stderr); scanner.Scan(); {
			p.mu.Lock()
			p.lines = append(p.lines, scanner.Text())
			close(p.grown)
			p.grown = make(chan struct{})
			p.mu.Unlock()
		}
		p.err = p.cmd.Wait()
	}()
	return p, nil
}

// await waits until the peer has printed a line with that beginning, and returns it.
func (p *peerProcess) await(ctx context.Context, beginning string) (string, error) {
	seen := 0
	for {
		p.mu.Lock()
		lines, grown := p.lines, p.grown
		p.mu.Unlock()
		for ; seen < len(lines); seen++ {
			if strings.HasPrefix(lines[seen], beginning) {
				return lines[seen], nil
			}
		}
		select {
		case <-grown:
		case <-p.ended:
			p.mu.Lock()
			more := len(p.lines) > seen
			p.mu.Unlock()
			if !more {
				return "", fmt.Errorf("%s ended before it said %q: %w; it said:\n%s", p.name, beginning, p.err, p.said())
			}
		case <-ctx.Done():
			return "", fmt.Errorf("wait for %q of %s: %w", beginning, p.name, context.Cause(ctx))
		}
	}
}

func (p *peerProcess) said() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return strings.Join(p.lines, "\n")
}

// report is what the peer says of its last migration. It ends with it, so that the report is whole.
func (p *peerProcess) report(ctx context.Context) (*migrate.Report, error) {
	select {
	case <-p.ended:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	return p.latest()
}

// latest is the report that the peer wrote last.
func (p *peerProcess) latest() (*migrate.Report, error) {
	content, err := os.ReadFile(p.reports)
	if err != nil {
		return nil, err
	}
	return lastReport(content)
}

// stop asks the peer to close its instance, if it has not ended yet, and waits for it.
func (p *peerProcess) stop() error {
	p.once.Do(func() {
		select {
		case <-p.ended:
		default:
			p.cmd.Process.Signal(os.Interrupt)
			<-p.ended
		}
		var exit *exec.ExitError
		if p.err != nil && !errors.Is(p.err, context.Canceled) && (!errors.As(p.err, &exit) || exit.ExitCode() != 130) {
			p.stopErr = fmt.Errorf("%s: %w; it said:\n%s", p.name, p.err, p.said())
		}
	})
	return p.stopErr
}

// openWritable opens a file as a device.
func openWritable(path string) (block.Device, error) {
	return block.OpenFile(path, block.FileOptions{})
}
