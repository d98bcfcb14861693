package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"

	"github.com/drafter-vm/drafter/internal/testnet"
	"github.com/drafter-vm/drafter/pkg/migrate"
)

// process is a drafter command that runs on a host.
type process struct {
	name    string
	cmd     *exec.Cmd
	reports string        // of a peer
	ended   chan struct{} // closed when the process has ended and err is set
	err     error
	once    sync.Once
	stopErr error

	mu    sync.Mutex // guards lines and grown
	lines []string   // what it has said
	grown chan struct{}
}

// start starts a drafter command on a host. name is for people.
func (d *demo) start(host, name string, args ...string) (*process, error) {
	if d.verbose {
		args = append(args, "--log-level", "debug")
	}
	p := &process{name: name, ended: make(chan struct{}), grown: make(chan struct{})}
	p.cmd = exec.Command(filepath.Join(d.bin, "drafter"), args...)
	stderr, err := p.cmd.StderrPipe()
	if err != nil {
		return nil, err
	}
	if err := testnet.Do(d.hosts.Host(host), p.cmd.Start); err != nil {
		return nil, err
	}
	go func() {
		defer close(p.ended)
		for scanner := bufio.NewScanner(stderr); scanner.Scan(); {
			if d.verbose {
				d.say("%s: %s", name, scanner.Text())
			}
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

// await waits until the command has printed a line that matches, and returns its first group.
func (p *process) await(ctx context.Context, pattern string) (string, error) {
	return p.awaitAfter(ctx, 0, pattern)
}

// said is how many lines the command has printed.
func (p *process) said() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.lines)
}

// awaitAfter is await for the lines behind the first ones.
func (p *process) awaitAfter(ctx context.Context, seen int, pattern string) (string, error) {
	re := regexp.MustCompile(pattern)
	for {
		p.mu.Lock()
		lines, grown := p.lines, p.grown
		p.mu.Unlock()
		for ; seen < len(lines); seen++ {
			if m := re.FindStringSubmatch(lines[seen]); m != nil {
				return m[1], nil
			}
		}
		select {
		case <-grown:
		case <-p.ended:
			p.mu.Lock()
			said := strings.Join(p.lines, "\n")
			more := len(p.lines) > seen
			p.mu.Unlock()
			if more {
				continue
			}
			return "", fmt.Errorf("%s ended (%v) and said:\n%s", p.name, p.err, said)
		case <-ctx.Done():
			return "", context.Cause(ctx)
		}
	}
}

// lastReport is what a peer said of its last migration.
func (p *process) lastReport() (*migrate.Report, error) {
	b, err := os.ReadFile(p.reports)
	if err != nil {
		return nil, err
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	report := new(migrate.Report)
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), report); err != nil {
		return nil, fmt.Errorf("report of %s: %w", p.name, err)
	}
	return report, nil
}

// stop asks the command to close its instance, if it has not ended yet, and waits for it.
func (p *process) stop() error {
	p.once.Do(func() {
		select {
		case <-p.ended:
		default:
			p.cmd.Process.Signal(os.Interrupt)
			<-p.ended
		}
		if p.err != nil {
			p.mu.Lock()
			defer p.mu.Unlock()
			p.stopErr = fmt.Errorf("%s: %w; it said:\n%s", p.name, p.err, strings.Join(p.lines, "\n"))
		}
	})
	return p.stopErr
}
