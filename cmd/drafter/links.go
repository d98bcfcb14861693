package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/drafter-vm/drafter/pkg/peer"
	"github.com/drafter-vm/drafter/pkg/transport"
)

// links are the addresses of other peers, and the flags that say how to get at them and who they may be.
type links struct {
	laddr, raddr string
	accept       string // as laddr, for those who bring a VM
	transport.Options

	sources, destinations []string // who may bring a VM and who may have one, besides those of Options.Allow
	pushes                bool     // addresses may be named later, to which the VM is sent: drafter ctl migrate
	giving                bool     // raddr is one of these
}

// options are those of connections by which a VM is given, or by which one is taken.
func (l *links) options(give bool) transport.Options {
	o := l.Options
	o.Allow = slices.Concat(l.Allow, l.sources)
	if give {
		o.Allow = slices.Concat(l.Allow, l.destinations)
	}
	return o
}

// both are options of connections to whoever may do either, as the places of a VM's connections do to each other. Where one may be anybody
// with a good certificate, so may they.
func (l *links) both() transport.Options {
	o := l.Options
	o.AnyHost = true // they prove to be places of the VM, and tell addresses, not names
	give, take := l.options(true).Allow, l.options(false).Allow
	if o.Allow = nil; len(give) > 0 && len(take) > 0 {
		o.Allow = slices.Concat(take, l.destinations)
	}
	return o
}

// pskVariable is the environment variable of the key for psk. A flag for the key itself would show it to whoever lists processes.
const pskVariable = "DRAFTER_PSK"

// register adds the flags but for the addresses, whose meaning is the command's.
func (l *links) register(flags *pflag.FlagSet) {
	flags.StringVar(&l.Certificate, "tls-cert", "", "for tls, wss and quic: file of the certificate to show, PEM")
	flags.StringVar(&l.PrivateKey, "tls-key", "", "for tls, wss and quic: file of its key, PEM")
	flags.StringVar(&l.Authorities, "tls-ca", "", "for tls, wss and quic: file of the certificates that have to have signed the other peer's, PEM (empty: only keys that --allow-peer pins)")
	flags.StringVar(&l.KeyFile, "psk-file", "", "for psk: file of the key, 32 bytes in hexadecimal or base64 (empty: $"+pskVariable+")")
	flags.StringArrayVar(&l.Allow, "allow-peer", nil, "who the other peer may be, may be given again: spiffe://DOMAIN/PATH, a host's name or pin-sha256:BASE64 of its certificate, uid:NUMBER of a unix socket (default: as docs/transports.md says)")
}

// registerBothWays adds the flags of a command that may take a VM as well as give one.
func (l *links) registerBothWays(flags *pflag.FlagSet) {
	l.register(flags)
	flags.StringArrayVar(&l.sources, "allow-source", nil, "who a VM may be taken from (--raddr, --accept), besides those of --allow-peer; may be given again")
	flags.StringArrayVar(&l.destinations, "allow-destination", nil, "who the VM may be given to (--laddr, drafter ctl migrate), besides those of --allow-peer; may be given again")
}

// needs says what flags an address needs.
func needs(address string) string {
	switch transport.Scheme(address) {
	case "tls", "wss", "quic":
		return "certificate"
	case "psk":
		return "key"
	case "stdio":
		return "stdio"
	}
	return ""
}

// pskKey is what the key of psk has in a context.
type pskKey struct{}

// withPSK takes the key of psk out of the environment, which programs that are started have too, and into a context.
func withPSK(ctx context.Context) (context.Context, error) {
	key, ok := os.LookupEnv(pskVariable)
	if !ok {
		return ctx, nil
	}
	if err := os.Unsetenv(pskVariable); err != nil {
		return nil, fmt.Errorf("remove $%s from the environment: %w", pskVariable, err)
	}
	return context.WithValue(ctx, pskKey{}, key), nil
}

// maxKey bounds what is read of a key that is no file, in bytes.
const maxKey = 4 << 10

// readKey looks at the file of the key for psk. What is no regular file, as of <(pass drafter), has it once, and is read now.
func (l *links) readKey(ctx context.Context, stdin io.Reader) error {
	info, err := os.Stat(l.KeyFile)
	if err != nil || info.IsDir() {
		return nil // whoever reads it says so
	}
	if info.Mode().IsRegular() {
		if info.Mode().Perm()&0o077 != 0 {
			logger(ctx).Warn("other users can get at the key: chmod 600 its file", "path", l.KeyFile)
		}
		return nil
	}
	if in, ok := stdin.(*os.File); ok && l.Stdio != nil {
		if own, err := in.Stat(); err == nil && os.SameFile(info, own) {
			return usageErrorf("--psk-file %q is standard input, which stdio: is: give another file", l.KeyFile)
		}
	}
	f, err := os.Open(l.KeyFile)
	if err != nil {
		return usageErrorf("--psk-file: %w", err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxKey))
	switch {
	case err != nil:
		return usageErrorf("--psk-file: %w", err)
	case len(bytes.TrimSpace(text)) == 0:
		return usageErrorf("--psk-file %q is empty: give one with the key", l.KeyFile)
	}
	l.KeyFile, l.Key = "", string(text)
	return nil
}

// check looks at the flags before anything is begun. Stdin and stdout are what stdio: is.
func (l *links) check(ctx context.Context, flags *pflag.FlagSet, stdin io.Reader, stdout io.Writer) (err error) {
	needed := make(map[string]bool)
	proves := func(addresses ...string) bool {
		return slices.ContainsFunc(addresses, func(a string) bool { return needs(a) == "certificate" || transport.Scheme(a) == "unix" })
	}
	for _, address := range []string{l.laddr, l.raddr, l.accept} {
		needed[needs(address)] = true
	}
	// What has no effect may be a protection that somebody believes in.
	for _, v := range []struct {
		need  string
		flags []string
		kinds string
	}{{"certificate", []string{"tls-cert", "tls-key", "tls-ca"}, "tls://, wss:// or quic://"}, {"key", []string{"psk-file"}, "psk://"}} {
		for _, name := range v.flags {
			if flags.Changed(name) && !needed[v.need] && !l.pushes {
				return usageErrorf("--%s has no effect: no address is %s…; %s", name, v.kinds, plainWarning)
			}
		}
	}
	for _, v := range []struct {
		flag, where string
		effect      bool
	}{
		{"allow-peer", "", l.pushes || proves(l.laddr, l.raddr, l.accept)},
		{"allow-source", " of --raddr or --accept", proves(l.raddr, l.accept)},
		{"allow-destination", " of --laddr, or of drafter ctl migrate (--control),", l.pushes || proves(l.laddr)},
	} {
		if flags.Changed(v.flag) && !v.effect {
			return usageErrorf("--%s has no effect: only tls://, wss://, quic:// and unix:// peers%s prove a name; %s", v.flag, v.where, plainWarning)
		}
	}
	if l.pushes && (l.Certificate != "" || l.PrivateKey != "" || l.Authorities != "") && !needed["certificate"] {
		if err := l.options(true).Check("tls://localhost:1"); err != nil { // for an address that is named later
			return usageErrorf("%w", err)
		}
	}
	if needed["stdio"] {
		var those []string
		for _, v := range []struct{ flag, address string }{{"--laddr", l.laddr}, {"--raddr", l.raddr}, {"--accept", l.accept}} {
			if needs(v.address) == "stdio" {
				those = append(those, v.flag)
			}
		}
		if len(those) > 1 {
			return usageErrorf("%s are both stdio:, of which there is one", strings.Join(those, " and "))
		}
		if l.Stdio, err = openStdio(stdin, stdout); err != nil {
			return usageErrorf("stdio: %w", err)
		}
	}
	if l.KeyFile == "" {
		l.Key, _ = ctx.Value(pskKey{}).(string)
	} else if needed["key"] || l.pushes {
		if err := l.readKey(ctx, stdin); err != nil {
			return err
		}
	}
	for _, v := range []struct{ flag, address string }{{"laddr", l.laddr}, {"raddr", l.raddr}, {"accept", l.accept}} {
		if v.address == "" {
			continue
		}
		o := l.options(v.flag == "laddr")
		switch need := needs(v.address); {
		case need == "certificate" && (o.Certificate == "" || o.PrivateKey == "" || o.Authorities == "" && len(o.Allow) == 0):
			return usageErrorf("--%s %s needs --tls-cert and --tls-key, and --tls-ca or --allow-peer pin-sha256:BASE64", v.flag, transport.Redacted(v.address))
		case need == "key" && l.KeyFile == "" && l.Key == "":
			return usageErrorf("--%s %s needs --psk-file, or the key in $%s", v.flag, transport.Redacted(v.address), pskVariable)
		}
		if err := o.Check(v.address); err != nil {
			return usageErrorf("--%s: %w", v.flag, err)
		}
		if v.flag != "raddr" && !transport.CanListen(v.address) {
			return usageErrorf("--%s %s: such addresses can only be dialled: listen on another (localhost:1337), which the other peer gets at by it", v.flag, transport.Redacted(v.address))
		}
	}
	return nil
}

const plainWarning = "as it is, what passes is neither authenticated nor encrypted"

// listen listens at the address of a flag.
func (l *links) listen(ctx context.Context, flag, address string) (net.Listener, error) {
	if transport.Insecure(address) {
		logger(ctx).Warn("peers are neither authenticated nor encrypted; use a trusted network, or tls://, psk:// or ssh://", "flag", "--"+flag, "address", transport.Redacted(address))
	}
	o := l.options(flag == "laddr")
	o.Logger = logger(ctx)
	listener, err := o.Listen(ctx, address)
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, fmt.Errorf("--%s: %w: %s", flag, err, inUse(address))
	} else if err != nil {
		return nil, fmt.Errorf("--%s: %w", flag, err)
	}
	return listener, nil
}

// inUse is the remedy where another listens at an address already.
func inUse(address string) string {
	if transport.Scheme(address) == "unix" {
		return "end the program that uses it, or choose another path"
	}
	return "end the program that uses it, or choose another port (0: any that is free)"
}

// serving is the address that others give to get at the listener of --laddr.
func (l *links) serving(a net.Addr) string { return served(l.laddr, a) }

// served is the address that others give to get at a listener on an address.
func served(address string, a net.Addr) string {
	scheme := transport.Scheme(address)
	_, rest, ok := strings.Cut(address, "://")
	switch {
	case transport.Single(address) || scheme == "unix":
		return transport.Redacted(address)
	case !ok:
		return a.String()
	}
	_, path, _ := strings.Cut(rest, "/")
	return strings.TrimSuffix(scheme+"://"+a.String()+"/"+path, "/")
}

// streams is how many connections a migration has: one is for what somebody waits for.
const streams = 3

// dial dials the connections of a migration, at --raddr.
func (l *links) dial(ctx context.Context) ([]io.ReadWriter, error) {
	n := streams
	if !transport.Parallel(l.raddr) {
		n = 1
	}
	return peer.DialStreams(ctx, n, func(ctx context.Context) (net.Conn, error) { return l.options(l.giving).Dial(ctx, l.raddr) })
}

// redial is dial for when a link was lost; nil where that cannot be.
func (l *links) redial() func(context.Context) ([]io.ReadWriter, error) {
	if l.raddr == "" || transport.Single(l.raddr) {
		return nil
	}
	return l.dial
}

// dialFirst is dial of --raddr with what a person wants to know when it does not work.
func (l *links) dialFirst(ctx context.Context) ([]io.ReadWriter, error) {
	conns, err := l.dialOr(ctx, "start the peer that has the VM, with --laddr")
	if err != nil {
		return nil, fmt.Errorf("--raddr: %w", err)
	}
	return conns, nil
}

// dialOr is dial for the first time, with the remedy where nobody listens.
func (l *links) dialOr(ctx context.Context, remedy string) ([]io.ReadWriter, error) {
	if transport.Insecure(l.raddr) {
		logger(ctx).Warn("the peer is neither authenticated nor encrypted; use a trusted network, or tls://, psk:// or ssh://", "flag", "--raddr", "address", transport.Redacted(l.raddr))
	}
	conns, err := l.dial(ctx)
	var dialled *net.OpError // of a unix socket that is not there; a certificate's file is another matter
	if errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, transport.ErrNoAnswer) || errors.Is(err, fs.ErrNotExist) && errors.As(err, &dialled) {
		return nil, fmt.Errorf("%w: %s, or correct the address", err, remedy)
	}
	return conns, err
}

// stdio is this program's standard input and output.
type stdio struct {
	*os.File // in
	out      *os.File
}

// openStdio makes a stream of standard input and output that can be interrupted.
func openStdio(stdin io.Reader, stdout io.Writer) (io.ReadWriteCloser, error) {
	in, ok := stdin.(*os.File)
	out, too := stdout.(*os.File)
	if !ok || !too {
		return nil, errors.New("standard input and output are no files")
	}
	var s stdio
	for _, v := range []struct {
		from *os.File
		to   **os.File
		name string
	}{{in, &s.File, "input"}, {out, &s.out, "output"}} {
		if term.IsTerminal(int(v.from.Fd())) {
			return nil, fmt.Errorf("standard %s is a terminal: connect it to the other peer, as by ssh HOST drafter peer --raddr stdio: …", v.name)
		}
		fd, err := unix.FcntlInt(v.from.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return nil, err
		}
		// Only then reads end when it is closed. What is at the other end of a pipe does not share that.
		if err := unix.SetNonblock(fd, true); err != nil {
			return nil, err
		}
		*v.to = os.NewFile(uintptr(fd), "standard "+v.name)
	}
	return s, nil
}

func (s stdio) Write(p []byte) (int, error) { return s.out.Write(p) }
func (s stdio) Close() error                { return errors.Join(s.out.Close(), s.File.Close()) }
