package peer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/wire"
)

func TestCheckMigratable(t *testing.T) {
	for name, changes := range map[string]bool{
		"kernel": false, "initrd": false, "config": false, "state": true, "memory": true, "disk": true, "data": true,
	} {
		cfg := Config{Devices: []Device{{DeviceConfig: runner.DeviceConfig{Name: name}, Stationary: true}}}
		if name != runner.MemoryDevice {
			cfg.Devices = append(cfg.Devices, withMemory.Devices...)
		}
		err := cfg.CheckMigratable()
		if changes && (!errors.Is(err, ErrNotMigratable) || !strings.Contains(err.Error(), `"`+name+`"`)) {
			t.Errorf("stationary %q: error %v, want one that names it", name, err)
		}
		if !changes && err != nil {
			t.Errorf("stationary %q: %v", name, err)
		}
	}
}

func TestOneSendAtATime(t *testing.T) {
	p := newPeer(Config{}, nil)
	_, done, err := p.begin(t.Context(), copying)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := p.begin(t.Context(), migrating); !errors.Is(err, ErrBusy) || !strings.Contains(err.Error(), "a snapshot is under way") {
		t.Errorf("second send: error %v, want ErrBusy, and what is under way", err)
	}
	done()
	if _, done, err = p.begin(t.Context(), migrating); err != nil {
		t.Errorf("send after the first ended: %v", err)
	} else {
		done()
	}
}

// TestSendToStranger sends to what is no peer, and to peers that go away later.
func TestSendToStranger(t *testing.T) {
	receiver := wire.Preface{Newest: wire.Version, Oldest: wire.OldestVersion, Role: wire.RoleDestination}
	newer, source := receiver, receiver
	newer.Newest, newer.Oldest = 99, 98
	source.Role = wire.RoleSource
	for _, tt := range []struct {
		name     string
		says     []byte
		cancel   bool
		stranger bool
	}{
		{name: "nothing", stranger: true},
		{name: "HTTP", says: []byte("GET / HTTP/1.1\r\n\r\n"), stranger: true},
		{name: "half a preface", says: receiver.Append(nil)[:20], stranger: true},
		{name: "newer version", says: newer.Append(nil), stranger: true},
		{name: "another source", says: source.Append(nil), stranger: true},
		{name: "a peer that leaves", says: receiver.Append(nil)},
		{name: "cancelled", cancel: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			ours, theirs := net.Pipe()
			gone := make(chan struct{})
			go func() {
				defer close(gone)
				defer theirs.Close()
				io.ReadFull(theirs, make([]byte, wire.PrefaceSize))
				if theirs.Write(tt.says); tt.cancel {
					cancel()
					<-ctx.Done()
					io.Copy(io.Discard, theirs) // until Send closes it
				}
			}()
			var told []string
			_, err := send(ctx, []io.ReadWriter{ours}, migrate.SourceConfig{
				Devices: []migrate.SourceDevice{{Name: "disk", Device: block.NewMemory(4096)}},
				Guest:   struct{ migrate.Guest }{}, Journal: struct{ migrate.Journal }{}, // neither is called
				OnState: func(s migrate.SourceState) { told = append(told, s.String()) },
			})
			<-gone
			if err == nil || errors.Is(err, ErrStranger) != tt.stranger {
				t.Errorf("error %v, want a stranger: %t", err, tt.stranger)
			}
			if s := fmt.Sprint(told); !strings.HasPrefix(s, "[connecting ") || !strings.HasSuffix(s, " kept]") {
				t.Errorf("the caller was told of the states %s", s)
			}
		})
	}
}
