package peer

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"sync"

	"github.com/drafter-vm/drafter/pkg/migrate"
)

// Origin gives a package that is elsewhere, in images that are fetched as they are read, to a peer of this process: it is a Server here, and the streams
// to it. The peer runs its VM as soon as it has the state of the machine, and gets the rest when its guest touches it, and behind it.
//
// Its methods may be called by any number of goroutines at once. Close is called once.
type Origin struct {
	open func(ctx, reading context.Context) ([]Image, error)
	log  *slog.Logger

	mu     sync.Mutex // guards what follows
	server *Server
	stop   context.CancelFunc // ends the reading of images
	work   sync.WaitGroup     // sessions
}

// NewOrigin makes an Origin. Open is called when somebody dials, once unless it fails, and opens the images, which can be read until reading ends.
// Nil is for slog.Default().
func NewOrigin(open func(ctx, reading context.Context) ([]Image, error), log *slog.Logger) *Origin {
	if log == nil {
		log = slog.Default()
	}
	return &Origin{open: open, log: log}
}

// Dial returns streams for [Receive].
func (o *Origin) Dial(ctx context.Context) ([]io.ReadWriter, error) {
	return o.dial(ctx, (*Server).Serve)
}

// Redial is Dial for a VM that was received from the same images before, has lost its source, and lacks something: see Config.FindSource. An Origin in
// another process will do.
func (o *Origin) Redial(ctx context.Context) ([]io.ReadWriter, error) {
	return o.dial(ctx, (*Server).Rejoin)
}

// originStreams is how many streams Dial makes: one for what somebody waits for.
const originStreams = 2

func (o *Origin) dial(ctx context.Context, have func(*Server, context.Context, []io.ReadWriter) (*migrate.Report, error)) ([]io.ReadWriter, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.server == nil {
		reading, stop := context.WithCancel(context.WithoutCancel(ctx))
		images, err := o.open(ctx, reading)
		if err != nil {
			stop()
			return nil, err
		}
		server, err := OpenServer(ServerConfig{Images: images, Logger: o.log})
		if err != nil {
			stop()
			return nil, err
		}
		o.server, o.stop = server, stop
	}
	here, there, err := StreamPair(originStreams)
	if err != nil {
		return nil, fmt.Errorf("make streams: %w", err)
	}
	server := o.server
	o.work.Go(func() {
		// The other side has the same error, and says it.
		if _, err := have(server, context.WithoutCancel(ctx), here); err != nil {
			o.log.Debug("a session with a VM that is fetched as it runs has ended", "error", err)
		}
	})
	return there, nil
}

// Close waits until whoever has dialled has everything, and closes the images. When ctx ends it does not wait any more.
func (o *Origin) Close(ctx context.Context) error {
	o.mu.Lock()
	server, stop := o.server, o.stop
	o.server = nil
	o.mu.Unlock()
	if server == nil {
		return nil
	}
	defer stop()
	defer context.AfterFunc(ctx, stop)() // what hangs holds nobody up then
	err := server.Close(ctx)
	o.work.Wait()
	return err
}
