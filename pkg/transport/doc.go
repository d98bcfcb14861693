// Package transport turns addresses into connections that a migration can run over.
//
// A bare HOST:PORT (or :PORT, to listen) is plain TCP: neither authenticated nor encrypted, so it belongs on a loopback
// interface or inside a network that one trusts; [Insecure] tells which addresses deserve a warning. A program that has a
// connection of its own needs nothing of this package: the engine takes any io.ReadWriter.
//
// All functions may be called concurrently. What they return is an ordinary net.Conn or net.Listener, which the caller
// closes.
package transport
