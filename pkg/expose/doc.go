// Package expose hands a [block.Device] to a virtual machine monitor, or to any program on this host: on a socket that speaks
// NBD, or as a file.
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
// # A file in a folder
//
// [MountFUSE] mounts a folder that has a file for each device. The files are read and written past the page cache
// (FOPEN_DIRECT_IO), so that the device sees each request when it is made; programs that map a file still can.
//
//	mount, err := expose.MountFUSE("out/mnt", []expose.Export{{Name: "disk", Device: disk}}, expose.FUSEOptions{})
//	if err != nil {
//		return err
//	}
//	// dd if=out/mnt/disk …, mount -o loop out/mnt/disk …, a VMM that wants a path
//	…
//	err = errors.Join(mount.Close(), disk.Close()) // in this order
//
// Unlike an NBD socket, a mount does not survive its process: who has a file of it open gets errors from then on.
//
// # What may be relied on
//
// Of NBD:
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
// Of a mount:
//
//   - fsync(2) is answered after [block.Device.Flush] has returned.
//   - A request that takes long delays no other, unless what waits to be written exceeds 128 MiB.
//   - A file has the size of its device, always: what would change it is refused (truncate with EPERM, so dd needs
//     conv=notrunc; writes over the end with ENOSPC, and nothing is written).
//   - When this process dies, by whatever signal, those who look at the folder get ENOTCONN, and nobody waits for ever.
//     The next MountFUSE there takes it over. A program that this process started changes nothing in that.
//
// # Who may call what
//
// All methods may be called from any goroutine. Neither server closes a device. A Server has one goroutine that accepts,
// and per connection one for each request in flight and one that reads; Close waits for all of them.
//
// # What it does not do
//
// There is no TLS and no authentication: the folder of the socket (mode 0700) decides who may connect, and a mount is for
// the user who made it. Block status
// (sparseness as seen by the client), resizing and caching requests are not offered.
package expose
