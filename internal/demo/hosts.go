package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"net"
	"os"
)

// A namespace of drafter nat on each host is for the VM, which has Valkey at its port.
const (
	namespacePrefix = "demo"
	guestPort       = "6379"
	hostPort        = "3333"
)

// netnsOf is the namespace on a host.
func netnsOf(host string) string { return namespacePrefix + host + "0" }

// external is where the guest is reached on a host.
func (d *demo) external(host string) string {
	return net.JoinHostPort(d.hosts.Addr4(host).String(), hostPort)
}

// startHost gives a host what it needs for a VM: a namespace with NAT, a forwarder, which forwards nothing yet, and the key by which peers know
// each other.
func (d *demo) startHost(ctx context.Context, host string) error {
	if _, err := os.Stat(d.path("demo", "key")); err != nil {
		key := make([]byte, 32)
		rand.Read(key) // ends the program rather than fail
		if err := os.WriteFile(d.path("demo", "key"), []byte(hex.EncodeToString(key)+"\n"), 0o600); err != nil {
			return err
		}
	}
	if err := os.WriteFile(d.forwards(host), []byte("[]\n"), 0o644); err != nil {
		return err
	}
	for _, s := range []struct {
		name, ready string
		args        []string
	}{
		{"nat of " + host, `(1 network namespace, .*);`, []string{"nat", "--count", "1", "--namespace-prefix", namespacePrefix + host}},
		{"forwarder of " + host, `(Forwarding nothing)`, []string{"forwarder", "--port-forwards-file", d.forwards(host)}},
	} {
		p, err := d.start(host, s.name, s.args...)
		if err != nil {
			return err
		}
		d.services = append(d.services, p)
		said, err := p.await(ctx, s.ready)
		if err != nil {
			return err
		}
		if d.say("host %s: %s", host, said); s.args[0] == "forwarder" {
			d.forwarders[host] = p
		}
	}
	return nil
}

// forwards is the file with what a host's forwarder forwards.
func (d *demo) forwards(host string) string { return d.path("demo", "forwards-"+host+".json") }

// forwardAt has the host that has the VM forward to it, and no other.
func (d *demo) forwardAt(ctx context.Context, at string) error {
	type forward struct {
		Netns        string `json:"netns"`
		InternalPort string `json:"internalPort"`
		Protocol     string `json:"protocol"`
		ExternalAddr string `json:"externalAddr"`
	}
	f := d.forwarders[at]
	seen := f.said()
	for host := range d.forwarders {
		list := []forward{}
		if host == at {
			list = append(list, forward{netnsOf(host), guestPort, "tcp", d.external(host)})
		}
		next := d.forwards(host) + ".next"
		if err := os.WriteFile(next, []byte(asJSON(list)), 0o644); err != nil {
			return err
		}
		if err := os.Rename(next, d.forwards(host)); err != nil {
			return err
		}
	}
	said, err := f.awaitAfter(ctx, seen, `(Forwarding tcp .*)`)
	if err == nil {
		d.say("host %s: %s", at, said)
	}
	return err
}
