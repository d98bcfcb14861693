package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"sync"
	"time"
)

// monitor is a QMP connection of our own to a QEMU whose other monitor belongs to a backend: the backend has no words for
// QEMU's own migration. One goroutine at a time may use it. QEMU's docs/interop/qmp-spec.rst describes the protocol.
type monitor struct {
	conn    net.Conn
	answers chan qmpMessage
	ended   chan struct{} // closed when the connection has ended and err is set
	err     error

	mu    sync.Mutex // guards what follows
	seen  map[string]time.Time
	grown chan struct{} // closed and replaced when seen grows
}

type qmpMessage struct {
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Desc string `json:"desc"`
	} `json:"error"`
	Event string `json:"event"`
	Data  struct {
		Pass   int    `json:"pass"`
		Status string `json:"status"`
	} `json:"data"`
}

// dialMonitor connects to a QMP socket and negotiates.
func dialMonitor(ctx context.Context, socket string) (*monitor, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, fmt.Errorf("connect to QMP: %w", err)
	}
	m := &monitor{conn: conn, answers: make(chan qmpMessage, 1), ended: make(chan struct{}), seen: map[string]time.Time{}, grown: make(chan struct{})}
	go m.read()
	if err := m.execute(ctx, "qmp_capabilities", nil, nil); err != nil {
		m.close()
		return nil, err
	}
	return m, nil
}

func (m *monitor) close() {
	m.conn.Close()
	<-m.ended
}

func (m *monitor) read() {
	defer close(m.ended)
	lines := bufio.NewReader(m.conn)
	for {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			m.err = err
			return
		}
		var message qmpMessage
		if err := json.Unmarshal(line, &message); err != nil {
			m.err = err
			m.conn.Close()
			return
		}
		switch {
		case message.Event != "":
			m.note(message)
		case message.Return != nil || message.Error != nil:
			m.answers <- message
		} // else the greeting
	}
}

// note remembers when an event came first: by its name, and its status or number of the pass if it has one.
func (m *monitor) note(message qmpMessage) {
	now := time.Now()
	name := message.Event
	switch {
	case message.Data.Status != "":
		name += " " + message.Data.Status
	case message.Data.Pass > 0:
		name += fmt.Sprintf(" %d", message.Data.Pass)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, known := m.seen[name]; !known {
		m.seen[name] = now
		close(m.grown)
		m.grown = make(chan struct{})
	}
}

// forget forgets the events that were seen.
func (m *monitor) forget() {
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.seen)
}

// event waits for the first of some events and returns which it was.
func (m *monitor) event(ctx context.Context, names ...string) (string, error) {
	for {
		m.mu.Lock()
		grown := m.grown
		for _, name := range names {
			if _, ok := m.seen[name]; ok {
				m.mu.Unlock()
				return name, nil
			}
		}
		m.mu.Unlock()
		select {
		case <-grown:
		case <-m.ended:
			return "", fmt.Errorf("wait for QMP event %q: %w", names, m.err)
		case <-ctx.Done():
			return "", fmt.Errorf("wait for QMP event %q: %w", names, context.Cause(ctx))
		}
	}
}

// execute runs a command and decodes what it returns into result, if that is not nil.
func (m *monitor) execute(ctx context.Context, command string, arguments, result any) error {
	request, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
	}{command, arguments})
	if err != nil {
		return err
	}
	if _, err := m.conn.Write(append(request, '\n')); err != nil {
		return fmt.Errorf("QMP %s: %w", command, err)
	}
	select {
	case message := <-m.answers:
		if message.Error != nil {
			return fmt.Errorf("QMP %s: %s", command, message.Error.Desc)
		}
		if result == nil {
			return nil
		}
		return json.Unmarshal(message.Return, result)
	case <-m.ended:
		return fmt.Errorf("QMP %s: %w", command, m.err)
	case <-ctx.Done():
		m.conn.Close() // the answer would be taken for the next command's
		return fmt.Errorf("QMP %s: %w", command, context.Cause(ctx))
	}
}
