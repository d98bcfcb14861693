package peer

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/wire"
)

// TestAuthorizeEverywhere refuses at each place at which a peer meets another: it is asked what it should be, nothing comes of it, and the other
// side learns no more than that.
func TestAuthorizeEverywhere(t *testing.T) {
	var asked []Request
	no := func(_ context.Context, r Request) error {
		asked = append(asked, r)
		return errors.New("not on a Monday")
	}
	// once brings streams the first time, and nothing more.
	once := func(streams []io.ReadWriter) func(context.Context) ([]io.ReadWriter, error) {
		return func(ctx context.Context) ([]io.ReadWriter, error) {
			if first := streams; first != nil {
				streams = nil
				return first, nil
			}
			<-ctx.Done()
			return nil, context.Cause(ctx)
		}
	}
	devices := func(dir string) (devices []Device) {
		for _, name := range []string{runner.StateDevice, runner.MemoryDevice, "disk"} {
			devices = append(devices, Device{DeviceConfig: runner.DeviceConfig{Name: name, Base: filepath.Join(dir, name+".bin")}})
		}
		return devices
	}
	// inDoubt are the files of a mounter that does not know what has become of its VM.
	inDoubt := func(t *testing.T) MounterConfig {
		needFUSE(t)
		cfg := MounterConfig{Dir: newPackage(t), Mount: filepath.Join(t.TempDir(), "mnt"), Logger: quiet}
		m, err := OpenMounter(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		a, b := pairs(t, 1)
		m.cfg.OnState = func(s migrate.SourceState) {
			if s == migrate.SourceCommitted {
				a[0].(io.Closer).Close()
			}
		}
		go Terminator{Dir: filepath.Join(t.TempDir(), "out"), Logger: quiet}.Receive(t.Context(), b)
		if _, err := m.Send(t.Context(), a); !errors.Is(err, migrate.ErrInDoubt) {
			t.Fatalf("the source is not in doubt: %v", err)
		}
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
		return cfg
	}
	// void is a folder in which the record of a VM is that has not come.
	void := func(t *testing.T) string {
		dir := newPackage(t)
		state, err := block.OpenFile(filepath.Join(dir, "state.bin"), block.FileOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(runner.WriteRecord(state, runner.Record{Status: runner.Receiving, Migration: "VM.SECRET"}), state.Close()); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	const short = 300 * time.Millisecond
	for _, tt := range []struct {
		name string
		want Request
		meet func(t *testing.T, streams []io.ReadWriter) error
	}{
		{"Peer.Send", Request{Give: true}, func(t *testing.T, streams []io.ReadWriter) error {
			_, err := newPeer(Config{Authorize: no, Devices: withMemory.Devices}, new(runner.Instance)).Send(t.Context(), streams)
			return err
		}},
		{"Peer.SendTo", Request{Give: true}, func(t *testing.T, streams []io.ReadWriter) error {
			_, err := newPeer(Config{Authorize: no, Devices: withMemory.Devices}, new(runner.Instance)).SendTo(t.Context(), once(streams))
			return err
		}},
		{"Mounter.Send", Request{Give: true}, func(t *testing.T, streams []io.ReadWriter) error {
			needFUSE(t)
			m, err := OpenMounter(t.Context(), MounterConfig{Dir: newPackage(t), Mount: filepath.Join(t.TempDir(), "mnt"), Logger: quiet, Authorize: no})
			if err != nil {
				t.Fatal(err)
			}
			defer m.Close()
			_, err = m.Send(t.Context(), streams)
			return err
		}},
		{"Server.Serve", Request{Give: true}, func(t *testing.T, streams []io.ReadWriter) error {
			s, err := OpenServer(ServerConfig{Dir: newPackage(t), Logger: quiet, Authorize: no})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close(t.Context())
			_, err = s.Serve(t.Context(), streams)
			return err
		}},
		{"Server.Rejoin", Request{Give: true, Rejoin: true, Migration: "package-"}, func(t *testing.T, streams []io.ReadWriter) error {
			s, err := OpenServer(ServerConfig{Dir: newPackage(t), Logger: quiet, Authorize: no})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close(t.Context())
			_, err = s.Rejoin(t.Context(), streams)
			return err
		}},
		{"Given.Rejoin", Request{Give: true, Rejoin: true, Migration: "?"}, func(t *testing.T, streams []io.ReadWriter) error {
			cfg := inDoubt(t)
			cfg.Authorize, cfg.FindDestination, cfg.RescueTimeout = no, once(streams), short
			g, err := cfg.OpenGiven(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer g.Close()
			_, err = g.Rejoin(t.Context())
			if !errors.Is(err, migrate.ErrInDoubt) {
				t.Errorf("it is in doubt no more: %v", err)
			}
			return err
		}},
		{"Terminator.Settle, of what came", Request{Rejoin: true, Migration: "VM"}, func(t *testing.T, streams []io.ReadWriter) error {
			dir := newPackage(t)
			f, err := block.OpenFile(filepath.Join(dir, "state.bin"), block.FileOptions{})
			if err != nil {
				t.Fatal(err)
			}
			r, err := runner.ReadRecord(f)
			r.Migration = "VM.SECRET"
			if err := errors.Join(err, runner.WriteRecord(f, r), f.Close()); err != nil {
				t.Fatal(err)
			}
			_, err = Terminator{Dir: dir, Logger: quiet, Authorize: no, FindSource: once(streams), RescueTimeout: short}.Settle(t.Context())
			return err
		}},
		{"Terminator.Settle, of what did not", Request{Rejoin: true, Migration: "VM"}, func(t *testing.T, streams []io.ReadWriter) error {
			_, err := Terminator{Dir: void(t), Logger: quiet, Authorize: no, FindSource: once(streams), RescueTimeout: short}.Settle(t.Context())
			return err
		}},
		{"Disclaim", Request{Rejoin: true, Migration: "VM"}, func(t *testing.T, streams []io.ReadWriter) error {
			_, err := Disclaim(t.Context(), Config{Devices: devices(void(t)), Logger: quiet, Authorize: no, FindSource: once(streams), RescueTimeout: short})
			return err
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			asked = nil
			a, b := pairs(t, 1)
			says := make(chan string, 1)
			go func() {
				text, _ := io.ReadAll(b[0]) // its end may be a reset
				says <- string(text)
			}()
			err := tt.meet(t, a)
			if !errors.Is(err, ErrUnauthorized) || !strings.Contains(err.Error(), "Monday") {
				t.Errorf("it says %v", err)
			}
			want := tt.want
			if len(asked) == 1 && (want.Migration == "?" && asked[0].Migration != "" || want.Migration == "package-" && strings.HasPrefix(asked[0].Migration, want.Migration)) {
				want.Migration = asked[0].Migration
			}
			if len(asked) != 1 || asked[0].Give != want.Give || asked[0].Rejoin != want.Rejoin || asked[0].Migration != want.Migration || strings.Contains(want.Migration, ".") {
				t.Errorf("it was asked about %+v, want %+v", asked, want)
			}
			// All of it: who is not allowed to learns not even which machine this is, or which migration.
			role, reason := wire.RoleDestination, "this peer takes no VM from there"
			if want.Give {
				role, reason = wire.RoleSource, "this peer is not allowed to have the VM"
			}
			preface := wire.Preface{Newest: wire.Version, Oldest: wire.OldestVersion, Role: role, Streams: 1}
			if told := string(wire.Append(preface.Append(nil), wire.Header{Type: wire.TypeAbort}, wire.Abort{Code: wire.CodeRefused, Reason: reason}.Encode())); <-says != told {
				t.Errorf("the other side hears more, or less, than %q", told)
			}
		})
	}

	// Who takes is asked once it knows what, and before it makes anything.
	for name, receive := range map[string]func(t *testing.T, dir string, streams []io.ReadWriter) error{
		"Receive": func(t *testing.T, dir string, streams []io.ReadWriter) error {
			_, _, err := Receive(t.Context(), Config{Devices: devices(dir), Logger: quiet, Authorize: no}, streams)
			return err
		},
		"ReceiveMounter": func(t *testing.T, dir string, streams []io.ReadWriter) error {
			_, _, err := ReceiveMounter(t.Context(), MounterConfig{Dir: dir, Mount: filepath.Join(t.TempDir(), "mnt"), Logger: quiet, Authorize: no}, streams)
			return err
		},
		"Terminator.Receive": func(t *testing.T, dir string, streams []io.ReadWriter) error {
			_, _, err := Terminator{Dir: dir, Logger: quiet, Authorize: no}.Receive(t.Context(), streams)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			asked = nil
			s := newServer(t, newPackage(t))
			defer s.Close(t.Context())
			a, b := pairs(t, 2)
			served := make(chan error, 1)
			go func() {
				_, err := s.Serve(t.Context(), a)
				served <- err
			}()
			dir := filepath.Join(t.TempDir(), "out")
			if err := receive(t, dir, b); !errors.Is(err, ErrUnauthorized) || !strings.Contains(err.Error(), "Monday") {
				t.Errorf("it says %v", err)
			}
			if err := <-served; err == nil || strings.Contains(err.Error(), "Monday") || !strings.Contains(err.Error(), "this peer takes no such VM from there") {
				t.Errorf("the source hears %v", err)
			}
			if len(asked) != 1 || asked[0].Give || asked[0].Rejoin || !strings.HasPrefix(asked[0].Migration, "package-") || asked[0].Description.MemorySize == 0 || !slices.Contains(asked[0].Devices, runner.MemoryDevice) {
				t.Errorf("it was asked about %+v", asked)
			}
			if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
				t.Error("something was made for what did not come")
			}
		})
	}
}

// TestAuthorizeAgain: who comes when a link was cut is asked about, and one who is refused keeps nobody from being found.
func TestAuthorizeAgain(t *testing.T) {
	needFUSE(t)
	for _, role := range []wire.Role{wire.RoleSource, wire.RoleDestination} {
		t.Run("asked by the "+role.String(), func(t *testing.T) {
			var asked []Request
			second := func(_ context.Context, r Request) error {
				if !r.Rejoin {
					return nil
				}
				if asked = append(asked, r); len(asked) == 1 {
					return errors.New("not the first")
				}
				return nil
			}
			cfg := MounterConfig{Dir: newPackage(t), Mount: filepath.Join(t.TempDir(), "mnt"), Logger: quiet}
			term := Terminator{Dir: filepath.Join(t.TempDir(), "out"), Logger: quiet}
			called := make(chan []io.ReadWriter)
			cfg.FindDestination = func(ctx context.Context) ([]io.ReadWriter, error) {
				select {
				case streams := <-called:
					return streams, nil
				case <-ctx.Done():
					return nil, context.Cause(ctx)
				}
			}
			term.FindSource = func(ctx context.Context) ([]io.ReadWriter, error) {
				a, b := pairs(t, 1)
				select {
				case called <- a:
					return b, nil
				case <-ctx.Done():
					return nil, context.Cause(ctx)
				}
			}
			if role == wire.RoleSource {
				cfg.Authorize = second
			} else {
				term.Authorize = second
			}
			m, err := OpenMounter(t.Context(), cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer m.Close()
			a, b := pairs(t, 1)
			m.cfg.OnState = func(s migrate.SourceState) {
				if s == migrate.SourceCommitted {
					b[0].(io.Closer).Close() // the destination cannot say that it has the VM, or has no commit
				}
			}
			sent := make(chan error, 1)
			go func() {
				_, err := m.Send(t.Context(), a)
				sent <- err
			}()
			_, _, there := term.Receive(t.Context(), b)
			here := <-sent
			if (here == nil) != (there == nil) || errors.Is(here, migrate.ErrInDoubt) || m.Sent() != (here == nil) {
				t.Errorf("the source says %v, the destination %v", here, there)
			}
			if len(asked) < 2 || asked[0].Give != (role == wire.RoleSource) || asked[0].Migration == "" || asked[0].Migration != asked[1].Migration {
				t.Errorf("it was asked about %+v", asked)
			}
		})
	}
}
