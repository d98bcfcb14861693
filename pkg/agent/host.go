package agent

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/drafter-vm/drafter/pkg/agent/agentpb"
	"github.com/drafter-vm/drafter/pkg/agent/internal/serve"
	"github.com/drafter-vm/drafter/pkg/agent/socket"
)

const (
	// DefaultPort is the host port the agent dials.
	DefaultPort = 26
	// DefaultLivenessPort is the host port by which a guest says that it is up.
	DefaultLivenessPort = 25
)

// introduction is how long a guest that connects may take to answer the first call.
const introduction = 10 * time.Second

// Host is the host's side of the agent of one guest. BeforeSuspend and AfterResume are for one goroutine at a time; Wait
// and Close may be called at any time by anyone.
type Host struct {
	listener net.Listener
	logger   *slog.Logger
	ctx      context.Context // done once Close begins
	cancel   context.CancelFunc
	wg       sync.WaitGroup // accept and one goroutine for each connection

	mu      sync.Mutex // guards what follows
	peer    *peer      // the agent that connected last; nil: none
	changed chan struct{}
	hook    bool   // the agent that connected last has a hook for AfterResume
	suspend string // id of the BeforeSuspend whose outcome is unknown; empty: the next call is a new one
	resume  string // the same of AfterResume
}

// peer is a connected agent.
type peer struct {
	conn    net.Conn
	client  *ttrpc.Client
	agent   agentpb.AgentService
	version string

	environment bool // it knows of that of containers
}

// ErrNoEnvironment says that an agent did all it was asked for but to give containers an environment: it is older than that, or knows of no containers.
var ErrNoEnvironment = errors.New("the guest's agent does not give containers an environment: it is an older one, or none of a guest with containers")

// ListenAgent listens for the agent of the guest whose folder is vmPath. Port 0 means [DefaultPort], a nil logger
// slog.Default(). The caller must Close the host.
func ListenAgent(vmPath string, port uint32, logger *slog.Logger) (*Host, error) {
	if port == 0 {
		port = DefaultPort
	}
	if logger == nil {
		logger = slog.Default()
	}
	ln, err := socket.ListenHost(vmPath, port)
	if err != nil {
		return nil, fmt.Errorf("listen for the agent: %w", err)
	}
	h := &Host{listener: ln, logger: logger, changed: make(chan struct{})}
	h.ctx, h.cancel = context.WithCancel(context.Background())
	h.wg.Go(h.accept)
	return h, nil
}

// Close disconnects the agent, makes calls under way fail, and waits for every goroutine. It is idempotent.
func (h *Host) Close() error {
	h.cancel()
	h.listener.Close()
	h.wg.Wait()
	return nil
}

// Wait returns once an agent is connected, with its version.
func (h *Host) Wait(ctx context.Context) (version string, err error) {
	p, err := h.current(ctx)
	if err != nil {
		return "", err
	}
	return p.version, nil
}

// HasHook reports whether the agent that connected last has something of its own to do when it hears of a resume, besides
// what every agent does.
func (h *Host) HasHook() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.hook
}

// BeforeSuspend tells the guest that it is about to be paused, and returns when it is ready. An error says that the guest
// refused (its hook failed), or that there was no answer before ctx was done; then it may still be getting ready.
func (h *Host) BeforeSuspend(ctx context.Context) error {
	id := h.begin(&h.suspend, "")
	unknown, err := h.call(ctx, func(ctx context.Context, p *peer) error {
		_, err := p.agent.BeforeSuspend(ctx, &agentpb.BeforeSuspendRequest{Id: id})
		return err
	})
	if !unknown {
		h.end(&h.suspend)
	}
	if err != nil {
		return fmt.Errorf("agent before suspend: %w", err)
	}
	return nil
}

// RepeatSuspend gives the next BeforeSuspend the id of one whose outcome is unknown, as AfterResumeRequest.ID does for the
// other call: a caller that may die and be replaced writes an id down first, and gives it here before each call, so that a
// guest that was told already does nothing.
func (h *Host) RepeatSuspend(id string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.suspend = id
}

// AfterResumeRequest says what a guest that runs again needs to know.
type AfterResumeRequest struct {
	// ID names the resumption: a guest that was told of it already does nothing. Empty lets the host choose one, which
	// it keeps until the outcome is known. A caller that may die and be replaced writes its own down first.
	ID string

	// Time is what the guest's wall clock is set to. Zero means now, at each attempt.
	Time time.Time

	// Entropy, if any, is mixed into the guest's random number generator, which is then reseeded. NewEntropy makes it.
	// Nobody else may have seen it.
	Entropy []byte

	// Clone says that other machines run, or may run, from the same state: the guest should change what must be unique.
	Clone bool

	// Identity is what the guest is to be told apart by from now on.
	Identity Identity
}

// NewEntropy is 64 bytes from this host's random number generator.
func NewEntropy() []byte {
	b := make([]byte, 64)
	rand.Read(b) // never fails
	return b
}

// AfterResume tells the guest that it runs again. An error says that something of it failed in the guest, or that there
// was no answer before ctx was done.
func (h *Host) AfterResume(ctx context.Context, req AfterResumeRequest) error {
	id := h.begin(&h.resume, req.ID)
	h.end(&h.suspend)
	ignored := false
	unknown, err := h.call(ctx, func(ctx context.Context, p *peer) error {
		now := req.Time
		if now.IsZero() {
			now = time.Now()
		}
		environment := req.Identity.Environment
		if ignored = len(environment) > 0 && !p.environment; ignored {
			environment = nil // of several agents, one may know of containers
		}
		resp, err := p.agent.AfterResume(ctx, &agentpb.AfterResumeRequest{
			Id: id, Time: timestamppb.New(now), Entropy: req.Entropy, Clone: req.Clone, MachineId: req.Identity.MachineID, HostName: req.Identity.HostName, Network: req.Identity.Network.message(),
			Environment: environment,
		})
		if err == nil {
			h.logger.Debug("guest resumed", "clock_step", time.Duration(resp.ClockStepNanos))
		}
		return err
	})
	if !unknown {
		h.end(&h.resume)
	}
	if err == nil && ignored {
		err = ErrNoEnvironment
	}
	if err != nil {
		return fmt.Errorf("agent after resume: %w", err)
	}
	return nil
}

// ShutDown has the guest begin to shut down, or to reboot where its machine ends by that only. It may be called again: a guest that is on its way
// goes on. That it has ended shows elsewhere.
func (h *Host) ShutDown(ctx context.Context, reboot bool) error {
	_, err := h.call(ctx, func(ctx context.Context, p *peer) error {
		_, err := p.agent.ShutDown(ctx, &agentpb.ShutDownRequest{Reboot: reboot})
		return err
	})
	if err != nil {
		return fmt.Errorf("agent shut down: %w", err)
	}
	return nil
}

// begin returns the id of a call: the given one, else the one to be repeated, else a new one.
func (h *Host) begin(id *string, given string) string {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case given != "":
		*id = given
	case *id == "":
		var b [16]byte
		rand.Read(b[:]) // never fails
		*id = hex.EncodeToString(b[:])
	}
	return *id
}

func (h *Host) end(id *string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	*id = ""
}

// call makes a call, again on the next connection when one is cut, until the guest has answered or ctx is done: then
// whether the guest executes the call is unknown.
func (h *Host) call(ctx context.Context, f func(context.Context, *peer) error) (unknown bool, err error) {
	sent := false
	for {
		p, err := h.current(ctx)
		if err != nil {
			return sent, err
		}
		sent = true
		// A write to a guest that does not read ends with the connection only.
		stop := context.AfterFunc(ctx, func() { p.conn.Close() })
		err = f(ctx, p)
		stop()
		if err == nil {
			return false, nil
		}
		if ctx.Err() != nil {
			p.conn.Close()
			return true, fmt.Errorf("no answer from the guest: %w", context.Cause(ctx))
		}
		if st, ok := status.FromError(err); ok {
			return false, errors.New(st.Message())
		}
		h.logger.Debug("agent disconnected during a call", "error", err)
		p.conn.Close()
		h.drop(p)
	}
}

// current returns the connected agent once there is one.
func (h *Host) current(ctx context.Context) (*peer, error) {
	for {
		h.mu.Lock()
		p, changed := h.peer, h.changed
		h.mu.Unlock()
		if p != nil {
			return p, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, fmt.Errorf("no agent has connected: %w", context.Cause(ctx))
		case <-h.ctx.Done():
			return nil, net.ErrClosed
		}
	}
}

// drop forgets p if it is the present agent.
func (h *Host) drop(p *peer) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.peer == p {
		h.peer = nil
		close(h.changed)
		h.changed = make(chan struct{})
	}
}

// accept takes the agent's connections.
func (h *Host) accept() {
	serve.Accept(h.ctx, h.listener, h.wg.Go, func(err error) { h.logger.Warn("accept agent connection", "error", err) }, h.serve)
}

// serve makes conn the present agent, for as long as it lasts, once it has introduced itself.
func (h *Host) serve(conn net.Conn, introduced func()) {
	defer conn.Close()
	defer context.AfterFunc(h.ctx, func() { conn.Close() })()

	gone := make(chan struct{})
	client := ttrpc.NewClient(serve.Answers(conn), ttrpc.WithOnClose(func() { close(gone) }))
	defer client.Close()
	p := &peer{conn: conn, client: client, agent: agentpb.NewAgentClient(client)}

	ctx, cancel := context.WithTimeout(h.ctx, introduction)
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	info, err := p.agent.Info(ctx, &agentpb.InfoRequest{})
	alive := stop()
	cancel()
	introduced()
	if err != nil || !alive {
		h.logger.Debug("refuse a connection that is no agent's", "error", err)
		return
	}
	p.version, p.environment = info.Version, info.Environment

	h.mu.Lock()
	old := h.peer
	h.peer, h.hook = p, info.AfterResumeHook
	close(h.changed)
	h.changed = make(chan struct{})
	h.mu.Unlock()
	if old != nil {
		old.conn.Close() // the newest counts: the guest knows best which it still serves
	}
	h.logger.Debug("agent connected", "version", p.version)
	<-gone
	h.drop(p)
}
