// Package transport turns addresses into connections that a migration can run over.
//
//	o := transport.Options{KeyFile: "/etc/drafter/key"}
//	l, err := o.Listen(ctx, "psk://:1337")
//	conn, err := o.Dial(ctx, "psk://host.example:1337")
//
// # Addresses
//
//	HOST:PORT               plain TCP, as tcp://HOST:PORT
//	tls://HOST:PORT         TLS 1.3 over TCP; both sides show a certificate
//	psk://HOST:PORT         TCP with a Noise channel (NNpsk0) between two that have the same key, and no certificates
//	unix:///PATH            a unix socket of this host; the kernel says who the other side is
//	ws://HOST:PORT/PATH     WebSocket, through what lets only HTTP pass; wss: over TLS as above
//	quic://HOST:PORT        QUIC, over UDP, with TLS as above
//	ssh://USER@HOST/TARGET  through the system's ssh: TARGET, a HOST:PORT as HOST sees it. With ?config=FILE at its end, ssh reads
//	                        that file instead of its own configuration. Only to dial
//	exec:COMMAND            standard input and output of a program that the shell starts, and that Close ends. Only to dial
//	stdio:                  this program's own: see Options.Stdio. One connection, once
//
// A program that has a connection of its own needs nothing of this package: the engine takes any io.ReadWriter that keeps bytes
// in order and loses none. Datagrams do not: use quic.
//
// # Who is at the other end
//
// Tcp and ws neither authenticate nor encrypt: they belong on a loopback interface or inside a network that one trusts; [Insecure]
// tells which addresses deserve a warning. With tls, wss and quic the other side must have a certificate that the authorities
// have signed, or whose key is pinned, which is all that is known of it then; with psk, the key. A unix socket is for processes of the same user, and root. Options.Allow
// narrows that further, or names other users: see [Identity]. Whoever is refused has seen nothing of the program behind the
// listener: a connection counts when its [Handshake] is over, which Dial does and whoever accepts has to do. With TLS 1.3 a client
// that the server refuses learns that from its first Read.
//
// Credentials are files, read anew for each connection, so that new ones count without a restart.
//
// # Concurrency
//
// All functions may be called concurrently. What they return are ordinary net.Conns and net.Listeners, which the caller closes.
package transport
