package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"

	"github.com/drafter-vm/drafter/internal/testguest"
	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/peer"
	"github.com/drafter-vm/drafter/pkg/transport"
	"github.com/drafter-vm/drafter/pkg/vmm/qemu"
)

// tinySession is a tiny guest that writes all over its memory, at a peer of this process, and moves to another one.
type tinySession struct {
	b           *bench
	pkg, folder string
	console     *testguest.Console
	peers       []*peer.Peer // the last one has it
}

func newTinySession(b *bench, pkg string) (_ *tinySession, err error) {
	s := &tinySession{b: b, pkg: pkg}
	if s.console, err = testguest.NewConsole(); err != nil {
		return nil, err
	}
	if s.folder, err = os.MkdirTemp(b.path("bench"), "instance-"); err != nil {
		return nil, errors.Join(err, s.console.Close())
	}
	return s, nil
}

func (s *tinySession) close() error {
	var errs []error
	for _, p := range s.peers {
		errs = append(errs, p.Kill())
	}
	return errors.Join(append(errs, s.console.Close(), os.RemoveAll(s.folder))...)
}

// config is an instance of its own for each peer.
func (s *tinySession) config(change func(*peer.Config)) (peer.Config, error) {
	cfg := peer.Config{Backend: qemu.New(qemu.Options{}), Host: s.b.tinyHost(s.console), ResumeTimeout: guestWait, Logger: quiet}
	var err error
	cfg.Devices, err = peer.PackageDevices(s.pkg, filepath.Join(s.folder, fmt.Sprint(len(s.peers))))
	if change != nil {
		change(&cfg)
	}
	return cfg, err
}

// start resumes the guest and waits until its loop has written everything once and goes on.
func (s *tinySession) start(ctx context.Context, change func(*peer.Config)) error {
	cfg, err := s.config(change)
	if err != nil {
		return err
	}
	p, err := peer.Resume(ctx, cfg)
	if err != nil {
		return err
	}
	s.peers = append(s.peers, p)
	if err := startLoop(ctx, s.console, movingLoop); err != nil {
		return err
	}
	_, err = guestDo(ctx, s.console, "mem go")
	return err
}

// move hands the guest over to a new peer, over TCP.
func (s *tinySession) move(ctx context.Context) (*peer.Peer, error) {
	to, _, err := s.moveOver(ctx, "tcp")
	return to, err
}

// moveOver is move over "tcp" or "unix", with the source's report.
func (s *tinySession) moveOver(ctx context.Context, network string) (*peer.Peer, *migrate.Report, error) {
	cfg, err := s.config(nil)
	if err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, guestWait)
	defer cancel()
	address := "tcp://127.0.0.1:0"
	if network == "unix" {
		address = "unix://" + filepath.Join(s.folder, "socket")
	}
	l, err := transport.Listen(ctx, address)
	if err != nil {
		return nil, nil, err
	}
	defer l.Close()
	if network == "tcp" {
		address = "tcp://" + l.Addr().String()
	}
	there, err := peer.DialStreams(ctx, engineStreams, func(ctx context.Context) (net.Conn, error) { return transport.Dial(ctx, address) })
	if err != nil {
		return nil, nil, err
	}
	here, err := acceptStreams(l, engineStreams)
	if err != nil {
		return nil, nil, err
	}
	var wg sync.WaitGroup
	var sent *migrate.Report
	var sendErr error
	wg.Go(func() { sent, sendErr = s.peers[len(s.peers)-1].Send(ctx, here) })
	to, _, err := peer.Receive(ctx, cfg, there)
	wg.Wait()
	for _, stream := range append(here, there...) {
		_ = stream.(io.Closer).Close() // mostly closed already
	}
	if to != nil {
		s.peers = append(s.peers, to)
	}
	return to, sent, errors.Join(err, sendErr)
}
