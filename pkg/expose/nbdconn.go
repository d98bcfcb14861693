package expose

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/bits"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/drafter-vm/drafter/pkg/block"
)

// nbdConn is a connection with one client.
//
// Its workers take turns to read: the one that holds reading reads a request, lets the next worker read, carries its
// request out, and sends the reply. So a request changes hands nowhere on its way, and the next one is read while it
// is in the device. Workers are added when all others are busy, up to a limit.
//
// Replies are sent by whoever comes first; those that come while it is in write(2) are left for it to send
// together, in one call.
type nbdConn struct {
	server *Server
	conn   net.Conn
	log    *slog.Logger
	ctx    context.Context // ends when the connection stops reading
	cancel context.CancelFunc

	session session
	device  block.Device
	size    int64

	reading sync.Mutex    // guards the three below
	r       *bufio.Reader // of conn
	stopped bool          // nothing more is read
	head    [nbdRequestSize]byte

	workers sync.WaitGroup
	running atomic.Int32 // workers there are
	waiting atomic.Int32 // workers that wait for reading

	inFlight *semaphore.Weighted // bytes, see requestCost

	sending struct {
		sync.Mutex // guards the fields below
		queue      []nbdReply
		busy       bool  // someone is sending, and will send what is in queue
		err        error // why nothing can be sent any more
	}

	errors errorLog
}

// nbdReply is an encoded reply and the resources to give back when it is sent.
type nbdReply struct {
	bytes  []byte
	buffer *nbdBuffer // what bytes lie in
	cost   int64
}

func newNBDConn(s *Server, conn net.Conn) *nbdConn {
	c := &nbdConn{
		server: s, conn: conn, log: s.log, r: bufio.NewReaderSize(conn, 32<<10),
		inFlight: semaphore.NewWeighted(s.opts.MaxInFlight),
	}
	c.ctx, c.cancel = context.WithCancel(s.ctx)
	return c
}

// requestCost is what a request counts against MaxInFlight, in bytes. Each counts something, so that their number is
// bounded, too.
func requestCost(payload int) int64 { return int64(max(payload, block.PageSize)) }

// serve does all that happens on the connection, and returns when it is closed.
func (c *nbdConn) serve() {
	defer c.cancel()
	defer c.conn.Close()
	deadline := time.Now().Add(c.server.opts.HandshakeTimeout)
	if err := c.conn.SetDeadline(deadline); err != nil {
		return
	}
	if c.server.ctx.Err() != nil { // drain was here before the deadline was set
		return
	}
	session, err := negotiate(c.r, c.conn, c.server.exports)
	if err != nil {
		if !errors.Is(err, errHandshakeOver) && c.server.ctx.Err() == nil {
			c.log.Warn("an NBD client did not complete the negotiation", "error", err)
		}
		return
	}
	if err := c.conn.SetDeadline(time.Time{}); err != nil {
		return
	}
	if c.server.ctx.Err() != nil { // and so on
		return
	}
	c.session, c.device, c.size = session, session.export.Device, session.export.Device.Size()
	c.log = c.log.With("export", session.export.Name)
	c.log.Debug("an NBD client is connected")
	c.running.Store(1)
	c.workers.Go(c.work)
	c.workers.Wait()
	c.log.Debug("an NBD client is disconnected")
}

// drain makes the connection end when what it has read is answered. It is called after the context of the server ended.
func (c *nbdConn) drain() {
	now := time.Now()
	// Errors mean that the connection is closed already.
	_ = c.conn.SetReadDeadline(now)
	_ = c.conn.SetWriteDeadline(now.Add(drainTimeout))
}

// work reads and carries out requests until nothing more is read.
func (c *nbdConn) work() {
	for {
		c.waiting.Add(1)
		c.reading.Lock()
		c.waiting.Add(-1)
		request, buffer, err := c.read()
		if err != nil {
			if !c.stopped {
				c.stopped = true
				c.cancel()
				c.logEnd(err)
			}
			c.reading.Unlock()
			return
		}
		if c.waiting.Load() == 0 && int(c.running.Load()) < c.server.opts.Workers {
			c.running.Add(1)
			c.workers.Go(c.work)
		}
		c.reading.Unlock()
		c.carryOut(request, buffer)
	}
}

// errDisconnect is the end the client asked for.
var errDisconnect = errors.New("disconnected")

func (c *nbdConn) logEnd(err error) {
	switch {
	case errors.Is(err, errDisconnect), err == io.EOF, c.server.ctx.Err() != nil:
	case errors.Is(err, net.ErrClosed), errors.Is(err, context.Canceled): // sending failed, and said so
	default:
		c.log.Warn("an NBD connection broke", "error", err)
	}
}

// read reads the next request, and its payload into a buffer, which also has room for the reply. The caller holds reading.
func (c *nbdConn) read() (nbdRequest, *nbdBuffer, error) {
	if c.stopped {
		return nbdRequest{}, nil, errDisconnect
	}
	if _, err := io.ReadFull(c.r, c.head[:]); err != nil {
		return nbdRequest{}, nil, err
	}
	request, err := decodeNBDRequest(&c.head)
	if err != nil {
		return nbdRequest{}, nil, err
	}
	if request.command == cmdDisc {
		return nbdRequest{}, nil, errDisconnect
	}
	payload := request.payload()
	if payload > MaxRequest {
		if request.command == cmdWrite { // skipping its data would be doing what an attacker wants
			return nbdRequest{}, nil, fmt.Errorf("a write has %d bytes, at most %d are accepted", payload, MaxRequest)
		}
		payload = 0 // will be refused
	}
	if err := c.inFlight.Acquire(c.ctx, requestCost(payload)); err != nil {
		return nbdRequest{}, nil, err
	}
	buffer := getNBDBuffer(payload)
	if request.command == cmdWrite {
		if _, err := io.ReadFull(c.r, buffer.payload(payload)); err != nil {
			putNBDBuffer(buffer)
			return nbdRequest{}, nil, err
		}
	}
	return request, buffer, nil
}

// carryOut does what a request asks for, and sends the reply.
func (c *nbdConn) carryOut(r nbdRequest, buffer *nbdBuffer) {
	code := r.check(c.size, c.session.export.ReadOnly, c.session.structured)
	message := ""
	if code == 0 {
		if err := c.do(r, buffer); err != nil {
			code = nbdError(err)
			message = err.Error()
			c.errors.log(c.log, r.name(), int64(r.offset), int64(r.length), err)
		}
	} else {
		c.log.Debug("refused an NBD request", "request", r.name(), "flags", r.flags, "offset", r.offset, "length", r.length, "code", code)
	}
	payload := r.payload()
	if payload > MaxRequest {
		payload = 0
	}
	reply := nbdReply{buffer: buffer, cost: requestCost(payload)}
	if c.session.structured {
		reply.bytes = structuredReply(buffer, r, code, message)
	} else {
		reply.bytes = simpleReply(buffer, r, code)
	}
	c.send(reply)
}

// do calls the device.
func (c *nbdConn) do(r nbdRequest, buffer *nbdBuffer) error {
	off, n := int64(r.offset), int64(r.length)
	var err error
	switch r.command {
	case cmdRead:
		p := buffer.payload(int(n))
		var got int
		if got, err = c.device.ReadAt(p, off); got == len(p) && err == io.EOF {
			err = nil // the end of the device, where the request ends, too
		} else if err == nil && got < len(p) {
			err = io.ErrUnexpectedEOF
		}
		return err
	case cmdFlush:
		return c.device.Flush()
	case cmdWrite:
		_, err = c.device.WriteAt(buffer.payload(int(n)), off)
	case cmdTrim:
		err = c.device.Discard(off, n)
	case cmdWriteZeroes:
		if r.flags&cmdFlagNoHole == 0 {
			err = c.device.Discard(off, n)
		} else {
			err = c.writeZeroes(off, n)
		}
	}
	if err == nil && r.flags&cmdFlagFUA != 0 {
		err = c.device.Flush()
	}
	return err
}

// zeroBlock is never written.
var zeroBlock [1 << 20]byte

func (c *nbdConn) writeZeroes(off, n int64) error {
	for end := off + n; off < end; {
		k := min(end-off, int64(len(zeroBlock)))
		if _, err := c.device.WriteAt(zeroBlock[:k], off); err != nil {
			return err
		}
		off += k
	}
	return nil
}

// simpleReply encodes the reply to a request in front of the data that lies in buffer.
func simpleReply(buffer *nbdBuffer, r nbdRequest, code uint32) []byte {
	data := 0
	if r.command == cmdRead && code == 0 {
		data = int(r.length)
	}
	b := buffer.reply(nbdSimpleReplySize, data)
	be := binary.BigEndian
	be.PutUint32(b, nbdSimpleReply)
	be.PutUint32(b[4:], code)
	be.PutUint64(b[8:], r.cookie)
	return b
}

// structuredReply encodes the one chunk that answers a request.
func structuredReply(buffer *nbdBuffer, r nbdRequest, code uint32, message string) []byte {
	be := binary.BigEndian
	kind, length := uint16(chunkNone), 0
	var b []byte
	switch {
	case code != 0:
		message = message[:min(len(message), maxReplyHead-nbdChunkSize-6)]
		kind, length = chunkError, 6+len(message)
		b = buffer.reply(nbdChunkSize+length, 0)
		be.PutUint32(b[20:], code)
		be.PutUint16(b[24:], uint16(len(message)))
		copy(b[26:], message)
	case r.command == cmdRead && r.length > 0:
		kind, length = chunkOffsetData, 8+int(r.length)
		b = buffer.reply(nbdChunkSize+8, int(r.length))
		be.PutUint64(b[20:], r.offset)
	default:
		b = buffer.reply(nbdChunkSize, 0)
	}
	be.PutUint32(b, nbdChunkMagic)
	be.PutUint16(b[4:], chunkDone)
	be.PutUint16(b[6:], kind)
	be.PutUint64(b[8:], r.cookie)
	be.PutUint32(b[16:], uint32(length))
	return b
}

// send sends a reply, or leaves it to the worker that is sending.
func (c *nbdConn) send(reply nbdReply) {
	s := &c.sending
	s.Lock()
	s.queue = append(s.queue, reply)
	if s.busy {
		s.Unlock()
		return
	}
	s.busy = true
	var batch []nbdReply
	var vectors net.Buffers
	for len(s.queue) > 0 {
		batch, s.queue = s.queue, batch[:0]
		err := s.err
		s.Unlock()

		if err == nil {
			if len(batch) == 1 {
				_, err = c.conn.Write(batch[0].bytes)
			} else {
				vectors = vectors[:0]
				for _, reply := range batch {
					vectors = append(vectors, reply.bytes)
				}
				rest := vectors // WriteTo consumes it
				_, err = rest.WriteTo(c.conn)
			}
			if err != nil {
				if c.server.ctx.Err() == nil && c.ctx.Err() == nil {
					c.log.Warn("an NBD client does not take its replies", "error", err)
				}
				_ = c.conn.Close() // so that nothing more is read
			}
		}
		for i, reply := range batch {
			putNBDBuffer(reply.buffer)
			c.inFlight.Release(reply.cost)
			batch[i] = nbdReply{}
		}

		s.Lock()
		if s.err == nil {
			s.err = err
		}
	}
	s.queue = batch[:0]
	s.busy = false
	s.Unlock()
}

// maxReplyHead is the room in front of a payload: the largest header, or a short error message.
const maxReplyHead = 256

// nbdBuffer holds the payload of a request or of its reply, with room for the header in front of it, so that a reply is
// sent in one piece.
type nbdBuffer struct {
	bytes []byte
	class int // the pool it belongs to
}

func (b *nbdBuffer) payload(n int) []byte { return b.bytes[maxReplyHead : maxReplyHead+n] }

// reply is the last n bytes of the head and the first data bytes of the payload.
func (b *nbdBuffer) reply(n, data int) []byte { return b.bytes[maxReplyHead-n : maxReplyHead+data] }

// nbdBuffers has a pool for each payload size 2^class.
var nbdBuffers [26]sync.Pool

// minBufferClass is that of the smallest buffer, a page.
const minBufferClass = 12

func getNBDBuffer(payload int) *nbdBuffer {
	class := max(minBufferClass, bits.Len(uint(max(payload, 1)-1)))
	if b, ok := nbdBuffers[class].Get().(*nbdBuffer); ok {
		return b
	}
	return &nbdBuffer{bytes: make([]byte, maxReplyHead+1<<class), class: class}
}

func putNBDBuffer(b *nbdBuffer) { nbdBuffers[b.class].Put(b) }

// errorLog logs failed requests, one a second: a disk that fails fails often.
type errorLog struct {
	mu         sync.Mutex // guards the fields below
	last       time.Time
	suppressed int
}

func (e *errorLog) log(log *slog.Logger, request string, offset, length int64, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if now := time.Now(); now.Sub(e.last) >= time.Second {
		log.Error("a request for a device failed", "request", request, "offset", offset, "length", length, "error", err, "unlogged", e.suppressed)
		e.last, e.suppressed = now, 0
	} else {
		e.suppressed++
	}
}
