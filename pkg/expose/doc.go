// Package expose hands a [block.Device] to a virtual machine monitor.
//
// # NBD on a unix socket
//
// [ListenNBD] serves any number of devices on one unix socket in the NBD protocol. QEMU is its main client: started with
// reconnect-delay, it goes on without an I/O error in the guest when this process is restarted and listens on the
// same path again.
//
//	server, err := expose.ListenNBD("/run/drafter/vm0/disk.nbd", []expose.Export{{Name: "disk", Device: disk}}, expose.NBDOptions{})
//	if err != nil {
//		return err
//	}
//	// qemu … -blockdev driver=nbd,node-name=disk,server.type=unix,server.path=/run/drafter/vm0/disk.nbd,export=disk,reconnect-delay=30
//	…
//	err = errors.Join(server.Close(), disk.Close()) // in this order: a request must not meet a closed device
//
// The protocol is written from its specification,
// https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md: fixed newstyle negotiation with EXPORT_NAME, LIST,
// INFO, GO and STRUCTURED_REPLY; READ, WRITE, FLUSH, TRIM, WRITE_ZEROES and DISC with the flags FUA, NO_HOLE and DF.
// Requests are not bound to blocks of any size, and carry up to [MaxRequest] bytes.
//
// # What may be relied on
//
//   - Each connection has many requests in flight. One that takes long, because a lazy device waits for a block, delays no
//     other, up to NBDOptions.Workers of them per connection.
//   - Several connections to an export see the same device: what one has flushed, all have (CAN_MULTI_CONN).
//   - A FLUSH, and a write with FUA, is answered after [block.Device.Flush] has returned; what that promises is
//     what the guest gets.
//   - An error of the device is an error of the request, and is logged. It never ends the connection.
//   - Whatever arrives from the client is checked before memory is taken for it; what is in flight is bounded in number
//     and in bytes. A client that breaks the protocol loses its connection, and disturbs nobody else.
//   - Close answers what is in flight, then disconnects. The socket file is gone when it returns.
//
// # Who may call what
//
// All methods may be called from any goroutine. The server never closes a device. A Server has one goroutine that accepts,
// and per connection one for each request in flight and one that reads; Close waits for all of them.
//
// # What it does not do
//
// There is no TLS and no authentication: the folder of the socket (mode 0700) decides who may connect. Block status
// (sparseness as seen by the client), resizing and caching requests are not offered.
package expose
