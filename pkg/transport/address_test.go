package transport_test

import (
	"context"
	"strings"
	"testing"

	"github.com/drafter-vm/drafter/pkg/transport"
)

func TestRedacted(t *testing.T) {
	for address, want := range map[string]string{
		"":                                     "",
		"localhost:1337":                       "localhost:1337",
		"me:pw@h:1":                            "me:***@h:1",
		"ssh:me:pw@h/localhost:1":              "ssh:***@h/localhost:1",
		"ssh://root:hunter2@h/localhost:1":     "ssh://root:***@h/localhost:1",
		"SSH://root:hunter2@h/localhost:1":     "SSH://root:***@h/localhost:1",
		"ssh://root:%zz@h/localhost:1":         "ssh://root:***@h/localhost:1",
		"ssh://:hunter2@h/localhost:1":         "ssh://:***@h/localhost:1",
		"ssh://root:a@b@h/localhost:1":         "ssh://root:***@h/localhost:1",
		"ssh://root:a/b@h/localhost:1":         "ssh://root:***@h/localhost:1",
		"ssh://root:22/b@h/localhost:1":        "ssh://root:***@h/localhost:1",
		"ssh://root:a?b@h/localhost:1":         "ssh://root:***@h/localhost:1",
		"ssh://root:a@b?c@h/localhost:1":       "ssh://root:***@h/localhost:1",
		"ssh://ro@ot:a/b@h/localhost:1":        "ssh://ro@ot:***@h/localhost:1",
		"ssh://root:a://b@h/localhost:1":       "ssh://root:***@h/localhost:1",
		"root:a://b@h:1":                       "root:***@h:1",
		"ws://u:hunter2@h:1/p":                 "ws://u:***@h:1/p",
		"carrier://u:hunter2@h:1/p":            "carrier://u:***@h:1/p",
		"ssh://root@h:22/localhost:1":          "ssh://root@h:22/localhost:1",
		"ssh://h/localhost:1?config=/a@b":      "ssh://h/localhost:1?config=/a@b",
		"ssh://h:22/localhost:1?config=/a@b":   "ssh://h:22/localhost:1?config=/a@b",
		"ssh://me@[::1]/localhost:1?config=@b": "ssh://me@[::1]/localhost:1?config=@b",
		"ws://h:1/~me@host":                    "ws://h:1/~me@host",
		"wss://[::1]:1/~me@host":               "wss://[::1]:1/~me@host",
		"unix:///run/a:b@c":                    "unix:///run/a:b@c",
		"exec:nc a:b@c":                        "exec:nc a:b@c",
		"stdio:":                               "stdio:",
	} {
		if got := transport.Redacted(address); got != want {
			t.Errorf("Redacted(%q) = %q, want %q", address, got, want)
		}
	}
}

func TestScheme(t *testing.T) {
	for address, want := range map[string]string{
		"localhost:1337": "tcp", "tls:1337": "tcp", "psk:1337": "tcp", "stdio:1": "tcp", "unix:1": "tcp", "": "tcp", "://": "tcp", "a b://c": "tcp", "1a://c": "tcp",
		"tls://h:1": "tls", "QUIC://h:1": "quic", "carrier://pigeon": "carrier", "exec:echo a://b": "exec", "Exec:x": "exec", "stdio:": "stdio", "STDIO:": "stdio",
	} {
		if got := transport.Scheme(address); got != want {
			t.Errorf("Scheme(%q) = %q, want %q", address, got, want)
		}
	}
}

// TestSecretsOfAddresses dials and listens where a password is: no error has it.
func TestSecretsOfAddresses(t *testing.T) {
	for _, address := range []string{
		"ssh://root:hunter2@h/localhost:1", "ssh://root:hunter2%zz@h/localhost:1", "ws://u:hunter2@localhost:1/p", "wss://u:hunter2@localhost:1", "u:hunter2@localhost:1",
		"tls://u:hunter2/@localhost:1", "http://u:hunter2@localhost:1", "u:hunter2://x@localhost:1",
	} {
		for what, do := range map[string]func(context.Context, string) error{
			"dial":   func(ctx context.Context, a string) error { _, err := transport.Dial(ctx, a); return err },
			"listen": func(ctx context.Context, a string) error { _, err := transport.Listen(ctx, a); return err },
			"check":  func(_ context.Context, a string) error { return transport.Check(a) },
		} {
			if err := do(t.Context(), address); err == nil || strings.Contains(err.Error(), "hunter2") || !strings.Contains(err.Error(), "***@") {
				t.Errorf("%s %s: %v", what, address, err)
			}
		}
	}
}
