// Package channel offers guest sockets (package socket) where a virtual machine has no AF_VSOCK device: it carries all
// connections between a host and one guest over a single virtio-serial port.
//
// On the host the machine's owner runs a [Host] for as long as the machine is to be reachable:
//
//	host, err := channel.StartHost(channel.HostConfig{Dir: vmPath})
//	…
//	host.Close() // when the machine is snapshotted or moved; where it resumes, another Host is started
//
// In the guest, drafter-agent vsock runs a [Guest]. Both serve unix sockets; programs use package socket.
//
//	program ─ vsock.sock ─┐                                                    ┌─ vsock.sock ─ program
//	program ─ vsock.sock_P┴─ Host ─ channel.sock ─ VMM ═ virtio port ═ Guest ─┴─ vsock.sock_P ─ program
//	                         └─── yamux over sessions of frames over bytes ───┘
//
// # What the bytes are good for
//
// A serial port keeps no connection: bytes go in at one end and come out at the other, while the processes at the ends
// come and go. A guest is restored on another host with half a frame of an old session in its driver. A host's process is
// killed and another connects. The guest's process is restarted. The guest has not booted, and the host's bytes wait in a
// socket's buffer. A VMM drops what a guest sends to nobody. So a frame layer makes sessions, and yamux runs in those.
//
// The frame layer promises: what one end's yamux reads is what the other end's wrote in the same session, or the session
// ends. It promises nothing about bytes: whatever arrives that is not the next frame of the session is discarded.
//
// # Frames
//
// A frame is stuffed (COBS: S. Cheshire and M. Baker, "Consistent Overhead Byte Stuffing", 1999) so that it has no zero
// byte, and stands between two zero bytes. Therefore an end that has lost its place finds it at the next frame, at once,
// and no payload can look like a frame. Unstuffed, with numbers in network byte order:
//
//	offset  size  field
//	     0     2  magic     d7 4d
//	     2     1  version   1
//	     3     1  type      1 HELLO, 2 WELCOME, 3 DATA, 4 RESET
//	     4     8  nonce     of the session, random, not 0
//	    12     4  sequence  DATA: 0, 1, 2, …, wrapping, in each direction of a session; else 0
//	    16     n  payload   DATA: 1 to 31744 bytes of the yamux connection; else empty
//	  16+n     4  checksum  CRC-32C of all bytes before it
//
// Empty frames (two zero bytes in a row) are nothing. What is too long, is stuffed wrongly, has no magic, or fails the
// checksum is discarded; so are types that are not known, and frames of sessions that are not the present one. A frame of
// another version is discarded, too, and complained about once.
//
// # Sessions
//
//	host                                     guest
//	  │                    RESET nonce 0 ◄──── opens the port: "whatever you believe in, I do not"
//	  │ HELLO nonce ──────────────────────────► ends the session it has, resets all its streams
//	  │   (repeated until it is answered)      │
//	  │ ◄─────────────────────── WELCOME nonce │ (repeated if HELLO is)
//	  │ DATA 0, 1, … ◄────────► DATA 0, 1, …   │ yamux: the host is the client, so its streams have odd numbers
//	  │ RESET nonce ◄─────────────────────────►  the session is over, or was never known here
//
// The host alone begins sessions, each with a new nonce. It begins one when it has connected to the VMM and whenever the
// last is over: by a RESET, by a DATA frame that is not the next, by yamux's end (10 s in which a frame could not be
// written; 10 s of silence and then no answer to a ping for 10 s). The guest ends a session for the same reasons, says so
// by RESET, and when its driver tells it that the host's end of the port is disconnected. A DATA frame of an unknown
// session is answered by one RESET.
//
// # Streams
//
// Each connection of two programs is a yamux stream. The end whose program dials opens it and sends the line of package
// socket, CONNECT <port>; the other end dials its unix socket for that port and answers OK, or resets the stream. An end
// of file is carried each way by itself; an error on one side resets the other side. A program that does not read stalls
// its own stream only, after 256 KiB and what the unix sockets hold, up to 4096 streams that each side opens.
//
// # What it does not do
//
// It does not keep connections over a snapshot, a move or the restart of either end: they end, and programs dial again.
// It does not authenticate: the port belongs to the VMM, and vsock.sock to whoever may open it (0600). A hostile guest
// can break its own sessions and cost its host bounded memory (4096 windows of 256 KiB, if programs on the host accept
// that many connections and read from none), and nothing else.
package channel
