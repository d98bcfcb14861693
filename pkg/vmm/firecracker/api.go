package firecracker

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/drafter-vm/drafter/pkg/vmm"
	"golang.org/x/sys/unix"
)

// What follows is the part of Firecracker's API (its file firecracker.yaml) that is used, by the names that it has there. All of it is in 1.10;
// fields of later versions say so.

type bootSource struct {
	KernelImagePath string `json:"kernel_image_path"`
	InitrdPath      string `json:"initrd_path,omitempty"`
	BootArgs        string `json:"boot_args,omitempty"`
}

type machineConfiguration struct {
	VCPUCount   int    `json:"vcpu_count"`
	MemSizeMiB  int64  `json:"mem_size_mib"`
	CPUTemplate string `json:"cpu_template,omitempty"`
}

type drive struct {
	DriveID      string `json:"drive_id"`
	PathOnHost   string `json:"path_on_host"`
	IsRootDevice bool   `json:"is_root_device"`
	IsReadOnly   bool   `json:"is_read_only"`
	CacheType    string `json:"cache_type"` // "Writeback": the guest's flushes reach the disk
	IOEngine     string `json:"io_engine"`  // "Sync" or "Async"

	RateLimiter *rateLimiter `json:"rate_limiter,omitempty"`
}

type partialDrive struct {
	DriveID     string       `json:"drive_id"`
	RateLimiter *rateLimiter `json:"rate_limiter"`
}

type rateLimiter struct {
	Bandwidth *tokenBucket `json:"bandwidth,omitempty"` // bytes
	Ops       *tokenBucket `json:"ops,omitempty"`       // requests
}

// tokenBucket is refilled at Size per RefillTime, and holds no more than that.
type tokenBucket struct {
	Size       int64 `json:"size"`
	RefillTime int64 `json:"refill_time"` // milliseconds
}

// limiter is what bounds a disk; nil for no limit.
func limiter(l vmm.Limit) *rateLimiter {
	if l == (vmm.Limit{}) {
		return nil
	}
	return &rateLimiter{bucket(l.Bytes), bucket(l.Requests)}
}

// bucket is of a rate, per second; nil for none. It is small, so that what a guest may do at a time is.
func bucket(rate int64) *tokenBucket {
	const often = 10 // times per second
	switch {
	case rate == 0:
		return nil
	case rate%often != 0:
		return &tokenBucket{rate, 1000}
	}
	return &tokenBucket{rate / often, 1000 / often}
}

type networkInterface struct {
	IfaceID     string `json:"iface_id"`
	GuestMAC    string `json:"guest_mac"`
	HostDevName string `json:"host_dev_name"`
}

type vsock struct {
	GuestCID int    `json:"guest_cid"`
	UDSPath  string `json:"uds_path"`
}

type entropyDevice struct{}

type balloon struct {
	AmountMiB             int64 `json:"amount_mib"`
	DeflateOnOOM          bool  `json:"deflate_on_oom"`
	StatsPollingIntervalS int   `json:"stats_polling_interval_s"`
}

type balloonUpdate struct {
	AmountMiB int64 `json:"amount_mib"`
}

// balloonStats has what is used of what GET /balloon/statistics answers.
type balloonStats struct {
	ActualMiB int64 `json:"actual_mib"`
}

type action struct {
	ActionType string `json:"action_type"` // "InstanceStart" or "SendCtrlAltDel"
}

type vmState struct {
	State string `json:"state"` // "Paused" or "Resumed"
}

type snapshotCreateParams struct {
	SnapshotType string `json:"snapshot_type"` // "Full"
	SnapshotPath string `json:"snapshot_path"`
	MemFilePath  string `json:"mem_file_path"`
}

type snapshotLoadParams struct {
	SnapshotPath     string            `json:"snapshot_path"`
	MemBackend       memoryBackend     `json:"mem_backend"`
	ResumeVM         bool              `json:"resume_vm"`
	NetworkOverrides []networkOverride `json:"network_overrides,omitempty"` // from 1.12 on
}

type networkOverride struct {
	IfaceID     string `json:"iface_id"`
	HostDevName string `json:"host_dev_name"`
}

type memoryBackend struct {
	BackendType string `json:"backend_type"` // "File"
	BackendPath string `json:"backend_path"`
}

// instanceInfo is what GET / answers.
type instanceInfo struct {
	State   string `json:"state"`       // "Not started", "Running" or "Paused"
	Version string `json:"vmm_version"` // "1.13.1"
}

// maxAnswer bounds an answer, in bytes.
const maxAnswer = 1 << 20

// client speaks to one Firecracker. It is safe for concurrent use; Firecracker itself answers one request after the other.
type client struct {
	http http.Client
	log  *slog.Logger
}

// newClient makes a client of the socket at a path. Nothing is connected yet. What is said is logged for debugging.
func newClient(socket string, log *slog.Logger) *client {
	return &client{http: http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialSocket(ctx, socket)
		},
		DisableKeepAlives: true, // a Firecracker that was adopted has nobody else's connection
	}}, log: log}
}

// dialSocket connects to a socket, and to nothing that a link in its place leads to: the folder may be that of a jailed Firecracker.
func dialSocket(ctx context.Context, path string) (net.Conn, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open socket %q: %w", path, err)
	}
	defer unix.Close(fd)
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return nil, fmt.Errorf("open socket %q: %w", path, err)
	}
	if stat.Mode&unix.S_IFMT != unix.S_IFSOCK {
		return nil, fmt.Errorf("open socket %q: it is none", path)
	}
	return new(net.Dialer).DialContext(ctx, "unix", inherited(fd))
}

// fault is Firecracker's refusal of a request.
type fault struct {
	method, path string
	status       int
	message      string
}

func (f *fault) Error() string {
	return fmt.Sprintf("%s %s: Firecracker refuses (status %d): %s", f.method, f.path, f.status, f.message)
}

// call makes a request with a body, unless that is nil, and decodes the answer, unless result is nil.
func (c *client) call(ctx context.Context, method, path string, body, result any) error {
	var text []byte
	var content io.Reader
	if body != nil {
		var err error
		if text, err = json.Marshal(body); err != nil {
			return err
		}
		content = bytes.NewReader(text)
	}
	request, err := http.NewRequestWithContext(ctx, method, "http://localhost"+path, content)
	if err != nil {
		return err
	}
	request.Header.Set("Accept", "application/json")
	if body != nil {
		request.Header.Set("Content-Type", "application/json")
	}
	response, err := c.http.Do(request)
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer))
	if err != nil {
		return fmt.Errorf("%s %s: read the answer: %w", method, path, err)
	}
	c.log.Debug("Firecracker has answered", "request", method+" "+path, "body", string(text), "code", response.StatusCode, "answer", string(answer))
	if response.StatusCode >= 300 {
		var said struct {
			FaultMessage string `json:"fault_message"`
		}
		if json.Unmarshal(answer, &said) != nil || said.FaultMessage == "" {
			said.FaultMessage = string(answer)
		}
		return &fault{method, path, response.StatusCode, said.FaultMessage}
	}
	if result == nil {
		return nil
	}
	if err := json.Unmarshal(answer, result); err != nil {
		return fmt.Errorf("%s %s: decode the answer: %w", method, path, err)
	}
	return nil
}

func (c *client) put(ctx context.Context, path string, body any) error {
	return c.call(ctx, http.MethodPut, path, body, nil)
}

// info asks in which state the machine is, and of which version Firecracker.
func (c *client) info(ctx context.Context) (info instanceInfo, err error) {
	err = c.call(ctx, http.MethodGet, "/", nil, &info)
	return info, err
}

// await waits until Firecracker answers, which it does a few milliseconds after its start.
func (c *client) await(ctx context.Context, ended <-chan struct{}) (instanceInfo, error) {
	const first, last = 500 * time.Microsecond, 10 * time.Millisecond
	for pause := first; ; pause = min(2*pause, last) {
		info, err := c.info(ctx)
		if err == nil {
			return info, nil
		}
		select {
		case <-ended:
			return info, fmt.Errorf("firecracker has ended before it answered: %w", err)
		case <-ctx.Done():
			return info, fmt.Errorf("firecracker does not answer: %w", context.Cause(ctx))
		case <-time.After(pause):
		}
	}
}

// close ends connections that are idle.
func (c *client) close() { c.http.CloseIdleConnections() }
