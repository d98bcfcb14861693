package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/drafter-vm/drafter/pkg/agent/agentpb"
	"github.com/drafter-vm/drafter/pkg/agent/internal/serve"
	"github.com/drafter-vm/drafter/pkg/agent/socket"
)

// DialFunc connects to a port of the host.
type DialFunc func(ctx context.Context, port uint32) (net.Conn, error)

// maxEntropy bounds what a host may send, in bytes.
const maxEntropy = 512

// Guest is the agent in a guest. Its zero value serves [DefaultPort] without hooks. Fields must not be changed once Serve
// runs.
type Guest struct {
	// Port of the host to dial; 0 means [DefaultPort].
	Port uint32

	// BeforeSuspend, if set, is called before the machine is paused; an error tells the host that the guest is not ready.
	BeforeSuspend func(ctx context.Context) error

	// AfterResume, if set, is called after the machine runs again, with the clock set, the random number generator
	// reseeded, and the identity taken that the host gives it. clone says that other machines run from the same state.
	AfterResume func(ctx context.Context, clone bool) error

	// ShutDown, if set, has the guest begin to shut down, or to reboot where its machine ends by that only. It does not wait for the end.
	ShutDown func(ctx context.Context, reboot bool) error

	// SetEnvironment, if set, gives the guest's containers an environment, see [Identity.Environment], and waits until they are ready with it. It is called before
	// AfterResume. Nil: the guest has none, and refuses.
	SetEnvironment func(ctx context.Context, environment []string) error

	// HasHook tells the host, whenever it connects, whether AfterResume has something to do beside that: a guest that was
	// moved serves before it hears of the move if not. Nil means that it has if it is set.
	HasHook func() bool

	// Version is told to the host.
	Version string

	// Dial connects to the host; nil means [socket.Dial]. DialTimeout bounds one attempt; 0 means 1 minute.
	Dial        DialFunc
	DialTimeout time.Duration

	// Logger receives events; nil means slog.Default().
	Logger *slog.Logger

	// What a resumed machine needs of its kernel, and of its files. Tests replace them.
	setClock func(time.Time) (time.Duration, error)
	reseed   func(entropy []byte) error
	become   func(Identity) error
}

// Serve dials the host and serves its calls, again and again, until ctx is done, whose error it returns. Hooks that run
// are then cancelled, and waited for.
func (g *Guest) Serve(ctx context.Context) error {
	s := newService(ctx, g)
	defer s.finish()
	dial, port, timeout := g.Dial, g.Port, g.DialTimeout
	if dial == nil {
		dial = socket.Dial
	}
	if port == 0 {
		port = DefaultPort
	}
	if timeout == 0 {
		timeout = time.Minute
	}
	serve.Again(ctx, func() (called bool) {
		attempt, cancel := context.WithTimeout(ctx, timeout)
		conn, err := dial(attempt, port)
		cancel()
		if err != nil {
			return false
		}
		s.logger.Debug("connected to the host", "port", port)
		called = s.serve(ctx, conn)
		s.logger.Debug("disconnected from the host", "port", port)
		return called
	})
	return context.Cause(ctx)
}

// service executes the calls of one guest.
type service struct {
	*Guest
	logger *slog.Logger
	ctx    context.Context // of executions: it outlives connections
	wg     sync.WaitGroup  // executions
	turn   chan struct{}   // capacity 1: held by the execution that runs

	mu       sync.Mutex // guards finished, and that nothing is added to wg once it is
	finished bool

	suspends, resumes record
}

func newService(ctx context.Context, g *Guest) *service {
	guest := *g
	if guest.setClock == nil {
		guest.setClock = setClock
	}
	if guest.reseed == nil {
		guest.reseed = reseed
	}
	if guest.become == nil {
		guest.become = func(id Identity) error { return id.take("/") }
	}
	s := &service{Guest: &guest, logger: g.Logger, ctx: ctx, turn: make(chan struct{}, 1)}
	if s.logger == nil {
		s.logger = slog.Default()
	}
	return s
}

// serve serves one connection until it ends, and reports whether the host has called at all.
func (s *service) serve(ctx context.Context, conn net.Conn) (called bool) {
	defer conn.Close()
	server, err := ttrpc.NewServer()
	if err != nil {
		s.logger.Error("create ttrpc server", "error", err)
		return false
	}
	defer server.Close()
	calls := &calls{service: s}
	agentpb.RegisterAgentService(server, calls)
	if err := serve.Conn(ctx, server, conn, serve.Limits{}); err != nil {
		s.logger.Warn("the connection to the host was closed", "error", err)
	}
	return calls.any()
}

// calls are the calls that arrive by one connection.
type calls struct {
	*service
	mu   sync.Mutex // guards seen
	seen bool
}

func (c *calls) any() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.seen
}

func (c *calls) Info(context.Context, *agentpb.InfoRequest) (*agentpb.InfoResponse, error) {
	c.mu.Lock()
	c.seen = true
	c.mu.Unlock()
	hook := c.Guest.AfterResume != nil
	if c.Guest.HasHook != nil {
		hook = c.Guest.HasHook()
	}
	return &agentpb.InfoResponse{Version: c.Version, AfterResumeHook: hook, Environment: c.Guest.SetEnvironment != nil}, nil
}

func (c *calls) BeforeSuspend(ctx context.Context, req *agentpb.BeforeSuspendRequest) (*agentpb.BeforeSuspendResponse, error) {
	_, err := c.once(ctx, &c.suspends, req.Id, func(ctx context.Context) (time.Duration, error) {
		// No more than debug: what makes the guest's log service work now has it work when the guest resumes, with every
		// cache cold and clients waiting. The resume is logged.
		c.logger.Debug("before suspend", "call", req.Id)
		if c.Guest.BeforeSuspend == nil {
			return 0, nil
		}
		return 0, c.Guest.BeforeSuspend(ctx)
	})
	if err != nil {
		return nil, err
	}
	return &agentpb.BeforeSuspendResponse{}, nil
}

func (c *calls) AfterResume(ctx context.Context, req *agentpb.AfterResumeRequest) (*agentpb.AfterResumeResponse, error) {
	if len(req.Entropy) > maxEntropy {
		return nil, fmt.Errorf("%d bytes of entropy are more than %d", len(req.Entropy), maxEntropy)
	}
	step, err := c.once(ctx, &c.resumes, req.Id, func(ctx context.Context) (time.Duration, error) {
		return c.resume(ctx, req)
	})
	if err != nil {
		return nil, err
	}
	return &agentpb.AfterResumeResponse{ClockStepNanos: int64(step)}, nil
}

func (c *calls) ShutDown(ctx context.Context, req *agentpb.ShutDownRequest) (*agentpb.ShutDownResponse, error) {
	if c.Guest.ShutDown == nil {
		return nil, status.Error(codes.Unimplemented, "this guest's agent does not shut it down")
	}
	c.logger.Info("the host has this guest shut down")
	if err := c.Guest.ShutDown(ctx, req.Reboot); err != nil {
		return nil, err
	}
	return &agentpb.ShutDownResponse{}, nil
}

// resume does all it can and reports everything that failed.
func (s *service) resume(ctx context.Context, req *agentpb.AfterResumeRequest) (step time.Duration, err error) {
	var errs [5]error
	if req.Time != nil {
		step, errs[0] = s.setClock(req.Time.AsTime())
	}
	if len(req.Entropy) > 0 {
		errs[1] = s.reseed(req.Entropy)
	}
	if id := (Identity{MachineID: req.MachineId, HostName: req.HostName, Network: networkOf(req.Network)}); !id.isZero() {
		errs[2] = s.become(id)
	}
	s.logger.Info("after resume", "call", req.Id, "clock_step", step, "clone", req.Clone)
	if len(req.Environment) > 0 {
		errs[3] = s.giveEnvironment(ctx, req.Environment)
	}
	if s.Guest.AfterResume != nil {
		errs[4] = s.Guest.AfterResume(ctx, req.Clone)
	}
	return step, errors.Join(errs[:]...)
}

// giveEnvironment hands an environment to the containers of the guest, which by now is what it is to be.
func (s *service) giveEnvironment(ctx context.Context, environment []string) error {
	err := CheckEnvironment(environment)
	if err == nil && s.Guest.SetEnvironment == nil {
		err = errors.New("this guest's agent knows of no containers")
	}
	if err == nil {
		err = s.Guest.SetEnvironment(ctx, environment)
	}
	if err != nil {
		return fmt.Errorf("give containers an environment: %w", err)
	}
	return nil
}

// record is the last execution of a kind of call.
type record struct {
	mu   sync.Mutex // guards last
	last *execution
}

type execution struct {
	id   string
	done chan struct{} // closed when step and err are set
	step time.Duration
	err  error
}

func (r *record) get(id string) *execution {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.last != nil && id != "" && r.last.id == id {
		return r.last
	}
	return nil
}

// once executes f in its turn, unless the last call of the kind had the same id, and waits for the outcome. An execution
// that has begun goes on when ctx is done: the host may come back for it.
func (s *service) once(ctx context.Context, r *record, id string, f func(context.Context) (time.Duration, error)) (time.Duration, error) {
	e := r.get(id)
	if e == nil {
		select {
		case s.turn <- struct{}{}:
		case <-ctx.Done():
			return 0, ctx.Err()
		}
		e = r.get(id) // it may have been executed while this call waited
		// A call that waited until its connection was gone has been given up by the host.
		if err := ctx.Err(); e == nil && err != nil {
			<-s.turn
			return 0, err
		}
		if e != nil {
			<-s.turn
		} else {
			e = s.execute(ctx, r, id, f)
		}
	}
	select {
	case <-e.done:
		return e.step, e.err
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

// execute begins an execution, whose turn it is.
func (s *service) execute(ctx context.Context, r *record, id string, f func(context.Context) (time.Duration, error)) *execution {
	e := &execution{id: id, done: make(chan struct{})}
	r.mu.Lock()
	r.last = e
	r.mu.Unlock()
	run, cancel := context.WithCancel(s.ctx)
	if deadline, ok := ctx.Deadline(); ok {
		// A tenth of the time is left to report what happened.
		cancel()
		run, cancel = context.WithTimeout(s.ctx, time.Until(deadline)/10*9)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.finished { // a call that arrived with the last breath of its connection
		cancel()
		e.err = context.Cause(s.ctx)
		close(e.done)
		<-s.turn
		return e
	}
	s.wg.Go(func() {
		defer cancel()
		e.step, e.err = f(run)
		close(e.done)
		<-s.turn
	})
	return e
}

// finish waits for executions, after which there are none.
func (s *service) finish() {
	s.mu.Lock()
	s.finished = true
	s.mu.Unlock()
	s.wg.Wait()
}

var _ agentpb.AgentService = (*calls)(nil)
