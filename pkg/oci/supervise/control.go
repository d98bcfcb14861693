package supervise

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

// One connection is one request and its answer, a line of JSON each:
//
//	{"do":"list"}                                   {"containers":[…]}
//	{"do":"restart","name":"web"}                   {}
//	{"do":"environment","environment":["K=V",…]}    {"error":"…"}
//
// The last two answer when containers are ready; who hangs up does not wait any more, and what was begun goes on.

// maxRequest bounds a line. JSON may write a byte as six.
const maxRequest = 8 * maxEnvironment

type request struct {
	Do          string   `json:"do"`
	Name        string   `json:"name,omitempty"`
	Environment []string `json:"environment,omitempty"`
}

type answer struct {
	Error      string   `json:"error,omitempty"`
	Containers []status `json:"containers,omitempty"`
}

// listen makes the socket. Of an earlier run there may be one.
func (s *supervisor) listen() (net.Listener, error) {
	path := s.path(socketName)
	next := path + ".new" // nobody else meets it before its mode is right, and nobody finds none meanwhile
	os.Remove(next)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: next, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen on %q: %w", path, err)
	}
	l.SetUnlinkOnClose(false)
	if err := errors.Join(os.Chmod(next, 0o600), os.Rename(next, path)); err != nil {
		l.Close()
		return nil, fmt.Errorf("listen on %q: %w", path, err)
	}
	return l, nil
}

// serve answers requests until ctx is done, and waits for those in flight.
func (s *supervisor) serve(ctx context.Context, l net.Listener) {
	var wg sync.WaitGroup
	defer wg.Wait()
	defer os.Remove(s.path(socketName))
	defer context.AfterFunc(ctx, func() { l.Close() })()
	for {
		conn, err := l.Accept()
		if ctx.Err() != nil {
			if err == nil {
				conn.Close()
			}
			return
		}
		if err != nil {
			s.log.Warn("accept a connection at the socket of containers", "error", err)
			time.Sleep(100 * time.Millisecond) // out of files, as a rule
			continue
		}
		wg.Go(func() { s.handle(ctx, conn) })
	}
}

func (s *supervisor) handle(ctx context.Context, conn net.Conn) {
	defer conn.Close()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(ctx, func() { conn.SetReadDeadline(time.Now()) })()
	var r request
	in := bufio.NewReader(io.LimitReader(conn, maxRequest))
	_ = conn.SetReadDeadline(time.Now().Add(10 * time.Second))
	line, err := in.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &r)
	}
	var a answer
	if err == nil {
		_ = conn.SetReadDeadline(time.Time{})
		if ctx.Err() != nil { // whose deadline that was
			return
		}
		gone := make(chan struct{})
		go func() { // until the connection is closed, below or by the other side
			defer close(gone)
			_, _ = in.ReadByte()
			cancel(errors.New("who asked has hung up"))
		}()
		defer func() { conn.Close(); <-gone }()
		a, err = s.answer(ctx, r)
	}
	if err != nil {
		a.Error = err.Error()
	}
	text, _ := json.Marshal(a) // of strings and numbers: cannot fail
	_ = conn.SetWriteDeadline(time.Now().Add(10 * time.Second))
	_, _ = conn.Write(append(text, '\n')) // who does not read has hung up
}

func (s *supervisor) answer(ctx context.Context, r request) (a answer, err error) {
	switch r.Do {
	case "list":
		for _, c := range s.containers {
			a.Containers = append(a.Containers, c.status())
		}
		return a, nil
	case "restart":
		for _, c := range s.containers {
			if c.name == r.Name {
				c.log.Info("a container is started again, as somebody asks for it")
				c.restart()
				return a, s.ready(ctx, []*container{c})
			}
		}
		return a, fmt.Errorf("there is no container %q: drafter-agent containers list shows those that there are", r.Name)
	case "environment":
		return a, s.setEnvironment(ctx, r.Environment)
	}
	return a, fmt.Errorf("request %.50q is not known here", r.Do)
}

// Client asks the supervisor of this guest. Its zero value is ready to be used.
type Client struct {
	run string // for tests
}

// Container is what the supervisor says of one.
type Container struct {
	Name, Disk, State string
	Ready             string        // what makes it ready, as config.json has it
	Starts            int           // how many times it was started
	For               time.Duration // how long it has been in its state
	Detail            string        // how it ended last
}

// absence is how long a supervisor may be away that was there, or is to come: systemd starts it again at once.
const absence = 3 * time.Second

func (c Client) ask(ctx context.Context, r request) (a answer, err error) {
	path := filepath.Join(cmp.Or(c.run, runFolder), socketName)
	var conn net.Conn
	var absent error // it was not there when it was asked last
	for began := time.Now(); ; {
		conn, err = (&net.Dialer{}).DialContext(ctx, "unix", path)
		if err == nil {
			break
		}
		if errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, os.ErrNotExist) {
			absent = err
		} else if ctx.Err() == nil {
			absent = nil
		}
		if absent == nil || time.Since(began) > absence || ctx.Err() != nil {
			if absent != nil {
				return a, fmt.Errorf("the service drafter-containers does not run in this guest, which needs a blueprint made with --oci: %w", absent)
			}
			return a, fmt.Errorf("ask the service drafter-containers: %w", err)
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
		}
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	text, err := json.Marshal(r)
	if err != nil {
		return a, fmt.Errorf("ask the service drafter-containers: %w", err)
	}
	if _, err = conn.Write(append(text, '\n')); err == nil {
		err = json.NewDecoder(io.LimitReader(conn, 1<<20)).Decode(&a)
	}
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return a, fmt.Errorf("ask the service drafter-containers: %w", err)
	}
	if a.Error != "" {
		return a, errors.New(a.Error)
	}
	return a, nil
}

// List is all containers.
func (c Client) List(ctx context.Context) ([]Container, error) {
	a, err := c.ask(ctx, request{Do: "list"})
	var all []Container
	for _, s := range a.Containers {
		all = append(all, Container{s.Name, s.Disk, string(s.State), s.Ready, s.Starts, s.For, s.Detail})
	}
	return all, err
}

// Restart ends a container, starts it again, and waits until it is ready.
func (c Client) Restart(ctx context.Context, name string) error {
	_, err := c.ask(ctx, request{Do: "restart", Name: name})
	return err
}

// SetEnvironment has containers run with variables besides those of their images, "K=V" for all or "NAME:K=V" for one, in place of those that were given before.
// Containers whose environment changes by that are started again, and waited for. It outlasts restarts and reboots.
func (c Client) SetEnvironment(ctx context.Context, environment []string) error {
	_, err := c.ask(ctx, request{Do: "environment", Environment: environment})
	return err
}
