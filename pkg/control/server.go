package control

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"
)

// Server serves HTTP until it is closed.
type Server struct {
	http http.Server
	done sync.WaitGroup
}

// Serve serves h to whoever connects to l, which it takes over. Events go to log; nil means slog.Default().
func Serve(l net.Listener, h http.Handler, log *slog.Logger) *Server {
	if log == nil {
		log = slog.Default()
	}
	s := &Server{http: http.Server{
		Handler: h, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug), // who sends no HTTP is not our trouble
		ReadHeaderTimeout: 5 * time.Second, WriteTimeout: 30 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 16 << 10,
	}}
	s.done.Go(func() {
		if err := s.http.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			log.Error("cannot serve any more", "address", l.Addr(), "error", err)
		}
	})
	return s
}

// closing is how long answers that are being given may take.
const closing = time.Second

// Close closes the listener, waits a moment for answers that are being given, closes all connections, and returns when no more are
// accepted. A handler that is at work for longer ends by itself.
func (s *Server) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), closing)
	defer cancel()
	err := s.http.Shutdown(ctx)
	if err != nil { // somebody does not read his answer
		err = s.http.Close()
	}
	s.done.Wait()
	return err
}
