package serve

import (
	"context"
	"errors"
	"net"
	"time"
)

// MaxIntroductions bounds how many connections of a host may be in the phase of their introduction at a time; more are closed.
const MaxIntroductions = 8

// Accept passes on the connections of a listener until that is closed. Each call of handle is in the background's; it calls introduced
// when the other side has said who it is. What keeps a connection from being accepted is told to failed, and waited out.
func Accept(ctx context.Context, l net.Listener, background func(func()), failed func(error), handle func(conn net.Conn, introduced func())) {
	places := make(chan struct{}, MaxIntroductions)
	pause := time.Millisecond
	for {
		conn, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // too many open files
			failed(err)
			select {
			case <-time.After(pause):
			case <-ctx.Done():
				return
			}
			pause = min(2*pause, time.Second)
			continue
		}
		pause = time.Millisecond
		select {
		case places <- struct{}{}:
			background(func() { handle(conn, func() { <-places }) })
		default:
			conn.Close()
		}
	}
}

// How long a guest waits before it dials again: from FirstPause to shortPause for as long as quickly, since after a
// resume the host waits for it; then up to LongPause, since a host may never listen.
const (
	FirstPause = time.Millisecond
	shortPause = 25 * time.Millisecond
	LongPause  = 250 * time.Millisecond
	quickly    = 10 * time.Second
)

// Again calls connect, which returns when a connection has ended or could not be made, again and again until ctx is done. It reports
// whether the connection was of use: then the next is tried at once.
func Again(ctx context.Context, connect func() (useful bool)) {
	pause, lost := FirstPause, time.Now()
	for {
		if connect() {
			pause, lost = FirstPause, time.Now()
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		limit := shortPause
		if time.Since(lost) > quickly {
			limit = LongPause
		}
		pause = min(2*pause, limit)
	}
}
