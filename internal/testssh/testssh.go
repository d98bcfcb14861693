// Package testssh is an SSH server for tests that the system's ssh is a client of: it lets one key in, and does no more than
// connect to addresses (ssh -W).
package testssh

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/crypto/ssh"
)

// Server is the server.
type Server struct {
	Addr   string // host and port
	Config string // file for ssh -F, with the key that is let in, and the server's

	tasks sync.WaitGroup
	mu    sync.Mutex // guards what follows
	conns []net.Conn
}

// New starts a server that ends with the test.
func New(t testing.TB) *Server {
	t.Helper()
	dir := t.TempDir()
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(key, "")
	if err != nil {
		t.Fatal(err)
	}
	_, hostKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	host, err := ssh.NewSignerFromKey(hostKey)
	if err != nil {
		t.Fatal(err)
	}
	allowed, err := ssh.NewPublicKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{Addr: l.Addr().String(), Config: filepath.Join(dir, "config")}
	_, port, _ := net.SplitHostPort(s.Addr)
	identity, known := filepath.Join(dir, "identity"), filepath.Join(dir, "known_hosts")
	err = errors.Join(
		os.WriteFile(identity, pem.EncodeToMemory(block), 0o600),
		os.WriteFile(known, fmt.Appendf(nil, "[127.0.0.1]:%s %s", port, ssh.MarshalAuthorizedKey(host.PublicKey())), 0o600),
		os.WriteFile(s.Config, fmt.Appendf(nil, "IdentityFile %s\nIdentitiesOnly yes\nUserKnownHostsFile %s\nStrictHostKeyChecking yes\n", identity, known), 0o600),
	)
	if err != nil {
		t.Fatal(err)
	}
	config := &ssh.ServerConfig{PublicKeyCallback: func(_ ssh.ConnMetadata, k ssh.PublicKey) (*ssh.Permissions, error) {
		if string(k.Marshal()) != string(allowed.Marshal()) {
			return nil, errors.New("another key")
		}
		return nil, nil
	}}
	config.AddHostKey(host)
	s.tasks.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			s.mu.Lock()
			s.conns = append(s.conns, conn)
			s.mu.Unlock()
			s.tasks.Go(func() { s.serve(conn, config) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		s.Cut()
		s.tasks.Wait()
	})
	return s
}

// Cut ends all connections.
func (s *Server) Cut() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.conns {
		c.Close()
	}
	s.conns = nil
}

func (s *Server) serve(conn net.Conn, config *ssh.ServerConfig) {
	defer conn.Close()
	_, channels, requests, err := ssh.NewServerConn(conn, config)
	if err != nil {
		return
	}
	s.tasks.Go(func() { ssh.DiscardRequests(requests) })
	for c := range channels {
		var to struct { // RFC 4254, 7.2
			Host       string
			Port       uint32
			Originator string
			From       uint32
		}
		if c.ChannelType() != "direct-tcpip" || ssh.Unmarshal(c.ExtraData(), &to) != nil {
			c.Reject(ssh.UnknownChannelType, "only -W")
			continue
		}
		target, err := net.Dial("tcp", net.JoinHostPort(to.Host, fmt.Sprint(to.Port)))
		if err != nil {
			c.Reject(ssh.ConnectionFailed, err.Error())
			continue
		}
		channel, requests, err := c.Accept()
		if err != nil {
			target.Close()
			continue
		}
		s.tasks.Go(func() { ssh.DiscardRequests(requests) })
		s.tasks.Go(func() {
			io.Copy(target, channel)
			target.(*net.TCPConn).CloseWrite()
		})
		s.tasks.Go(func() {
			io.Copy(channel, target)
			channel.Close()
			target.Close()
		})
	}
}
