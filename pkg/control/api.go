package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"time"

	"github.com/drafter-vm/drafter/pkg/migrate"
)

// Controlled is a peer as its control socket sees it. Its methods may be called concurrently; what cannot be done now, because of
// something else, fails with an error that wraps [ErrConflict], and what nobody could do with [ErrInvalid].
type Controlled interface {
	// Status says what the peer does. It answers at once, whatever is under way.
	Status(ctx context.Context) (Status, error)

	// Pause tells the guest's agent and stops the guest; it returns when that is done, within the agent's time limit. Resume lets the
	// guest run again, and does nothing where there is no pause. When ctx ends they give up, and the guest is as it was.
	Pause(ctx context.Context) error
	Resume(ctx context.Context) error

	// SetMigratable says whether the VM may be sent from now on, to those who ask for it and by Migrate alike. It may be until that is
	// called. What is under way goes on.
	SetMigratable(ctx context.Context, may bool) error

	// Migrate sends the VM to the peer that waits at an address, and Snapshot writes it down as a package in a new folder while it runs
	// on. When ctx ends they are cancelled, as long as they can be.
	Migrate(ctx context.Context, address string) (*migrate.Report, error)
	Snapshot(ctx context.Context, dir string) (*migrate.Report, error)

	// Balloon asks the guest to give so many bytes of its memory to the host in all, 0 for none, and waits until it has, or gives no more.
	Balloon(ctx context.Context, size int64) (Balloon, error)

	// Cancel cancels the migration, snapshot or pause under way, as long as that can be, and does not wait for its end. Stop begins to
	// close the peer, as SIGTERM does, and does not wait either.
	Cancel(ctx context.Context) error
	Stop(ctx context.Context) error
}

// Errors of Controlled, which a client tells apart too.
var (
	ErrConflict = errors.New("not possible now")
	ErrInvalid  = errors.New("not possible")
)

// Status is what is known of a peer.
type Status struct {
	// State is "starting" or "receiving" before the guest runs here, and "running", "paused", "suspended" (for a migration), "in_doubt" or
	// "ended" from then on.
	State string `json:"state"`

	VMPath     string     `json:"vm_path"`             // folder of the machine's sockets; empty before the guest runs here
	PID        int        `json:"pid"`                 // of the hypervisor; 0 before the guest runs here
	Migratable bool       `json:"migratable"`          // the VM may be sent, as far as SetMigratable and its devices are concerned
	Serving    string     `json:"serving,omitempty"`   // address at which it can be had; empty: nobody can ask for it
	Missing    int64      `json:"missing,omitempty"`   // bytes that are still to come from the peer that had it
	InDoubt    string     `json:"in_doubt,omitempty"`  // migration by which it was given away and which nobody has confirmed
	Busy       bool       `json:"busy"`                // something is under way
	UnderWay   string     `json:"under_way,omitempty"` // what, in words: "migration", which begins with dialling the other peer, "snapshot", "pause" and so on
	Migration  *Migration `json:"migration,omitempty"` // the newest migration or snapshot of which anything is known, under way or over
}

// Balloon is what a guest has given of its memory.
type Balloon struct {
	Given int64 `json:"given"` // bytes
}

// Migration is a migrate.Progress, as JSON. What is not known is 0.
type Migration struct {
	Role  string `json:"role"`  // what this peer is in it: "source", also of a snapshot, or "destination"
	State string `json:"state"` // of that role, as docs/protocol.md has them: "copying", "receiving", "moved", …
	Round int    `json:"round"` // at the source: of going over all that is dirty, from 0; the first is over everything
	Size  int64  `json:"size"`  // of all devices, in bytes

	// Bytes of content so far, over all rounds: that were sent or received as such, that went as runs of zeros, and, at the source,
	// that did not have to be sent, as the destination holds them.
	Data int64 `json:"data"`
	Zero int64 `json:"zero"`
	Same int64 `json:"same"`

	// Bytes that were dirty when the round began (source), or missing when the guest was started at the destination (both), and those of
	// them that are not sent, or not there, yet.
	Dirty int64 `json:"dirty"`
	Rest  int64 `json:"rest"`

	Elapsed   migrate.Millis `json:"elapsed_ms"`   // since it began
	Remaining migrate.Millis `json:"remaining_ms"` // at the source: estimate of the time until everything is there
	Bandwidth float64        `json:"bandwidth"`    // bytes of data a second, over the last two seconds at most
	DirtyRate float64        `json:"dirty_rate"`   // at the source: bytes a second that the guest writes
	Throttle  float64        `json:"throttle"`     // at the source: share of its time that the guest is held back, from 0 to 0.99
	Over      bool           `json:"over"`         // State is the last one: nothing follows
}

// MigrationOf is a progress as it is shown.
func MigrationOf(p migrate.Progress) *Migration {
	return &Migration{
		Role: p.Role, State: p.State, Round: p.Round, Size: p.Size, Data: p.Data, Zero: p.Zero, Same: p.Same, Dirty: p.Dirty, Rest: p.Rest,
		Elapsed: migrate.Millis(p.Elapsed), Remaining: migrate.Millis(p.Remaining), Bandwidth: p.Bandwidth, DirtyRate: p.DirtyRate, Throttle: p.Throttle,
		Over: p.Over(),
	}
}

// Paths of the API. Bodies are JSON; an error is {"error": TEXT} with a status of 400, 409 or 500.
const (
	pathStatus     = "/v1/status" // GET: Status
	pathPause      = "/v1/pause"  // POST, all that follow
	pathResume     = "/v1/resume"
	pathMigratable = "/v1/migratable" // {"on": true}
	pathMigrate    = "/v1/migrate"    // {"address": ADDRESS}: a migrate.Report
	pathSnapshot   = "/v1/snapshot"   // {"dir": FOLDER}: a migrate.Report
	pathBalloon    = "/v1/balloon"    // {"size": BYTES}: Balloon
	pathCancel     = "/v1/cancel"
	pathStop       = "/v1/stop"
)

type (
	migratableRequest struct {
		On *bool `json:"on"`
	}
	migrateRequest struct {
		Address string `json:"address"`
	}
	snapshotRequest struct {
		Dir string `json:"dir"`
	}
	balloonRequest struct {
		Size *int64 `json:"size"`
	}
	failure struct {
		Error string `json:"error"`
	}
)

// maxBody bounds what is read of a request, in bytes.
const maxBody = 64 << 10

// NewHandler serves the API of c. Whoever can call it owns the VM: it belongs on a unix socket.
func NewHandler(c Controlled) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+pathStatus, answer(func(ctx context.Context, _ struct{}) (Status, error) { return c.Status(ctx) }))
	for path, f := range map[string]func(context.Context) error{pathPause: c.Pause, pathResume: c.Resume, pathCancel: c.Cancel, pathStop: c.Stop} {
		mux.HandleFunc("POST "+path, answer(func(ctx context.Context, _ struct{}) (struct{}, error) { return struct{}{}, f(ctx) }))
	}
	mux.HandleFunc("POST "+pathMigratable, answer(func(ctx context.Context, r migratableRequest) (struct{}, error) {
		if r.On == nil {
			return struct{}{}, fmt.Errorf(`%w: "on" is missing: use true or false`, ErrInvalid)
		}
		return struct{}{}, c.SetMigratable(ctx, *r.On)
	}))
	mux.HandleFunc("POST "+pathMigrate, answer(func(ctx context.Context, r migrateRequest) (*migrate.Report, error) {
		if r.Address == "" {
			return nil, fmt.Errorf(`%w: "address" is missing`, ErrInvalid)
		}
		return c.Migrate(ctx, r.Address)
	}))
	mux.HandleFunc("POST "+pathSnapshot, answer(func(ctx context.Context, r snapshotRequest) (*migrate.Report, error) {
		if r.Dir == "" {
			return nil, fmt.Errorf(`%w: "dir" is missing`, ErrInvalid)
		}
		return c.Snapshot(ctx, r.Dir)
	}))
	mux.HandleFunc("POST "+pathBalloon, answer(func(ctx context.Context, r balloonRequest) (Balloon, error) {
		if r.Size == nil {
			return Balloon{}, fmt.Errorf(`%w: "size" is missing: use a number of bytes`, ErrInvalid)
		}
		return c.Balloon(ctx, *r.Size)
	}))
	return mux
}

// answer makes a handler of a call.
func answer[Request, Response any](call func(context.Context, Request) (Response, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		// A migration takes as long as it takes; one who does not read his answer is a process of the same user.
		_ = http.NewResponseController(w).SetWriteDeadline(time.Time{})
		var request Request
		status, response := http.StatusOK, any(nil)
		err := decode(r.Body, &request)
		if err == nil {
			response, err = call(r.Context(), request)
		}
		if err != nil {
			response = failure{err.Error()}
			switch {
			case errors.Is(err, ErrInvalid):
				status = http.StatusBadRequest
			case errors.Is(err, ErrConflict):
				status = http.StatusConflict
			default:
				status = http.StatusInternalServerError
			}
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		_ = json.NewEncoder(w).Encode(response) // who has left needs no answer
	}
}

// decode reads a request: one JSON object with no keys that we do not know, or nothing.
func decode(body io.Reader, request any) error {
	text, err := io.ReadAll(io.LimitReader(body, maxBody+1))
	switch {
	case err != nil:
		return fmt.Errorf("%w: read the request: %w", ErrInvalid, err)
	case len(text) > maxBody:
		return fmt.Errorf("%w: the request has more than %d bytes", ErrInvalid, maxBody)
	case len(bytes.TrimSpace(text)) == 0:
		return nil
	}
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(request); err != nil {
		return fmt.Errorf("%w: the request is not understood: %w", ErrInvalid, err)
	}
	if d.More() {
		return fmt.Errorf("%w: something follows the request", ErrInvalid)
	}
	return nil
}

// Client calls the API of a peer in another process. Its methods are those of [Controlled], and may be called concurrently.
type Client struct {
	http http.Client
}

var _ Controlled = (*Client)(nil)

// NewClient makes a client; dial connects to the peer's control socket.
func NewClient(dial func(context.Context) (net.Conn, error)) *Client {
	return &Client{http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) }, DisableKeepAlives: true,
	}}}
}

// call sends a request; nil has none.
func (c *Client) call(ctx context.Context, method, path string, request, response any) error {
	var body io.Reader
	if request != nil {
		text, err := json.Marshal(request)
		if err != nil {
			return err
		}
		body = bytes.NewReader(text)
	}
	r, err := http.NewRequestWithContext(ctx, method, "http://peer"+path, body)
	if err != nil {
		return err
	}
	answer, err := c.http.Do(r)
	if err != nil {
		var u *url.Error
		if errors.As(err, &u) {
			err = u.Err // the address in it is ours alone
		}
		return err
	}
	defer answer.Body.Close()
	if answer.StatusCode == http.StatusOK {
		if err := json.NewDecoder(answer.Body).Decode(response); err != nil {
			return fmt.Errorf("read the peer's answer: %w", err)
		}
		return nil
	}
	var f failure
	if err := json.NewDecoder(io.LimitReader(answer.Body, maxBody)).Decode(&f); err != nil || f.Error == "" {
		return fmt.Errorf("the peer answers %s: it is of another version, or no peer", answer.Status)
	}
	e := &remoteError{text: f.Error}
	switch answer.StatusCode {
	case http.StatusConflict:
		e.is = ErrConflict
	case http.StatusBadRequest:
		e.is = ErrInvalid
	}
	return e
}

// remoteError is an error of the peer, in its words.
type remoteError struct {
	text string
	is   error
}

func (e *remoteError) Error() string { return e.text }
func (e *remoteError) Unwrap() error { return e.is }

func (c *Client) post(ctx context.Context, path string, request any) error {
	return c.call(ctx, http.MethodPost, path, request, &struct{}{})
}

// Status implements [Controlled].
func (c *Client) Status(ctx context.Context) (s Status, err error) {
	err = c.call(ctx, http.MethodGet, pathStatus, nil, &s)
	return s, err
}

// Pause implements [Controlled].
func (c *Client) Pause(ctx context.Context) error { return c.post(ctx, pathPause, nil) }

// Resume implements [Controlled].
func (c *Client) Resume(ctx context.Context) error { return c.post(ctx, pathResume, nil) }

// SetMigratable implements [Controlled].
func (c *Client) SetMigratable(ctx context.Context, may bool) error {
	return c.post(ctx, pathMigratable, migratableRequest{&may})
}

// Migrate implements [Controlled].
func (c *Client) Migrate(ctx context.Context, address string) (*migrate.Report, error) {
	r := new(migrate.Report)
	return r, c.call(ctx, http.MethodPost, pathMigrate, migrateRequest{address}, r)
}

// Snapshot implements [Controlled].
func (c *Client) Snapshot(ctx context.Context, dir string) (*migrate.Report, error) {
	r := new(migrate.Report)
	return r, c.call(ctx, http.MethodPost, pathSnapshot, snapshotRequest{dir}, r)
}

// Balloon implements [Controlled].
func (c *Client) Balloon(ctx context.Context, size int64) (b Balloon, err error) {
	err = c.call(ctx, http.MethodPost, pathBalloon, balloonRequest{&size}, &b)
	return b, err
}

// Cancel implements [Controlled].
func (c *Client) Cancel(ctx context.Context) error { return c.post(ctx, pathCancel, nil) }

// Stop implements [Controlled].
func (c *Client) Stop(ctx context.Context) error { return c.post(ctx, pathStop, nil) }
