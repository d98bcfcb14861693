// Package socket connects programs on the host with programs in a guest, whatever carries the bytes.
//
// Both sides know ports (uint32), as AF_VSOCK does. On the host a guest is a folder, its VMPath:
//
//	conn, err := socket.DialGuest(ctx, vmPath, 8080)   // to the program in the guest that listens on port 8080
//	ln, err := socket.ListenHost(vmPath, 9000)         // for programs in the guest that dial port 9000
//
// and in the guest there is only one host:
//
//	conn, err := socket.Dial(ctx, 9000)
//	ln, err := socket.Listen(8080)
//
// # What carries it
//
// The host's end is always the unix socket VMPath/vsock.sock with Firecracker's protocol, and one unix socket
// VMPath/vsock.sock_PORT for each port a host program listens on. In the guest, Dial and Listen use AF_VSOCK where the
// machine has such a device; where it has none, drafter-agent offers the host's scheme in the guest, at
// /run/drafter/vsock.sock, over one serial port (package channel).
//
// # The protocol
//
// A program connects to vsock.sock and sends one line, at most [MaxLine] bytes long:
//
//	CONNECT <port>\n
//
// and, once the other side has accepted, receives one line
//
//	OK <assigned port>\n
//
// after which the connection carries the bytes of the two programs. The assigned port is the number of the dialling end;
// it says nothing a program needs. If nobody listens, or the line is malformed, the connection is closed without an
// answer. Connections that arrive at vsock.sock_PORT carry no lines at all.
//
// # What to expect
//
// Connections end when the virtual machine is snapshotted, resumed or moved: dial again. A unix socket has no way to
// tell an aborted connection from one that was ended, so a program that must know needs an end mark in its own protocol.
// Ends are half-closed by CloseWrite where the carrier can: package channel can, Firecracker's device ends both ways.
//
// All functions may be called concurrently.
package socket
