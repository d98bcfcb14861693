// Package wire is the language two Drafters speak while a VM moves: frames, their encoding, their decoding and their
// limits. The specification, with byte tables and the order of frames, is docs/protocol.md; this package is its
// implementation and nothing else: it holds no policy, starts no goroutine and knows no device.
//
// A connection opens with a [Preface] in each direction: who I am, which versions I speak, which stream of which
// migration this is. Then frames follow, each a 16-byte [Header] and at most [MaxPayload] bytes:
//
//	r := wire.NewReader(conn)
//	theirs, err := wire.ReadPreface(conn)      // before the Reader takes bytes
//	version, err := wire.Negotiate(ours, theirs)
//	h, err := r.Next()                         // a valid header, or an error that wraps ErrMalformed
//	err = r.Payload(buf[:h.Length])            // exactly its payload
//
// # Invariants
//
//   - A decoder accepts exactly what the encoder produces: a decoded header, encoded again, gives the same bytes. A type,
//     flag or length that the specification does not list is an error, never ignored.
//   - Nothing the peer says makes a decoder allocate more than the frame it has already delivered.
//   - The schema has no field for a path, an address of storage or a secret.
//   - [Reader.Next], [Reader.Payload], [Header.Put] and the [Buffer] pool allocate nothing once warm.
//
// # Concurrency
//
// A Reader belongs to one goroutine. Functions and the Buffer pool may be used by any number.
package wire
