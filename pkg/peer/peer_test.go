package peer

import (
	"strings"
	"testing"

	"github.com/drafter-vm/drafter/pkg/runner"
)

func TestCheckMigratable(t *testing.T) {
	for name, changes := range map[string]bool{
		"kernel": false, "initrd": false, "config": false, "state": true, "memory": true, "disk": true, "data": true,
	} {
		cfg := Config{Devices: []Device{{DeviceConfig: runner.DeviceConfig{Name: name}, Stationary: true}}}
		err := cfg.CheckMigratable()
		if changes && (err == nil || !strings.Contains(err.Error(), `"`+name+`"`)) {
			t.Errorf("stationary %q: error %v, want one that names it", name, err)
		}
		if !changes && err != nil {
			t.Errorf("stationary %q: %v", name, err)
		}
	}
}

func TestOneSendAtATime(t *testing.T) {
	p := newPeer(Config{}, nil)
	_, done, err := p.begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := p.begin(t.Context()); err != ErrBusy {
		t.Errorf("second send: error %v, want ErrBusy", err)
	}
	done()
	if _, done, err = p.begin(t.Context()); err != nil {
		t.Errorf("send after the first ended: %v", err)
	} else {
		done()
	}
}
