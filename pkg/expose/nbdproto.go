package expose

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"syscall"
)

// Numbers of the NBD protocol, by the names of its specification without the prefix NBD_. All fields are big endian.
const (
	nbdMagic        = 0x4e42444d41474943 // "NBDMAGIC"
	nbdOptionMagic  = 0x49484156454f5054 // "IHAVEOPT"
	nbdOptReply     = 0x0003e889045565a9
	nbdRequestMagic = 0x25609513
	nbdSimpleReply  = 0x67446698
	nbdChunkMagic   = 0x668e33ef // of a structured reply

	flagFixedNewstyle = 1 << 0 // handshake flags, and client flags
	flagNoZeroes      = 1 << 1

	transHasFlags     = 1 << 0 // transmission flags
	transReadOnly     = 1 << 1
	transFlush        = 1 << 2
	transFUA          = 1 << 3
	transTrim         = 1 << 5
	transWriteZeroes  = 1 << 6
	transDF           = 1 << 7
	transCanMultiConn = 1 << 8

	optExportName      = 1
	optAbort           = 2
	optList            = 3
	optInfo            = 6
	optGo              = 7
	optStructuredReply = 8

	repAck        = 1
	repServer     = 2
	repInfo       = 3
	repErrUnsup   = 1<<31 + 1
	repErrInvalid = 1<<31 + 3
	repErrUnknown = 1<<31 + 6
	repErrTooBig  = 1<<31 + 9

	infoExport    = 0
	infoName      = 1
	infoBlockSize = 3

	cmdRead        = 0
	cmdWrite       = 1
	cmdDisc        = 2
	cmdFlush       = 3
	cmdTrim        = 4
	cmdWriteZeroes = 6

	cmdFlagFUA    = 1 << 0
	cmdFlagNoHole = 1 << 1
	cmdFlagDF     = 1 << 2

	chunkDone       = 1 << 0 // flag of a chunk
	chunkNone       = 0      // types of chunks
	chunkOffsetData = 1
	chunkError      = 1<<15 + 1

	nbdEPERM     = 1
	nbdEIO       = 5
	nbdENOMEM    = 12
	nbdEINVAL    = 22
	nbdENOSPC    = 28
	nbdESHUTDOWN = 108

	nbdRequestSize     = 28
	nbdSimpleReplySize = 16
	nbdChunkSize       = 20
	nbdMaxString       = 4096
)

// MaxRequest is the largest payload of a READ or WRITE request in bytes, the one every NBD client may rely on.
const MaxRequest = 32 << 20

// nbdRequest is the header of a request.
type nbdRequest struct {
	flags   uint16
	command uint16
	cookie  uint64
	offset  uint64
	length  uint32
}

var errNotNBD = errors.New("the client does not speak the NBD protocol")

func decodeNBDRequest(b *[nbdRequestSize]byte) (nbdRequest, error) {
	be := binary.BigEndian
	if magic := be.Uint32(b[:]); magic != nbdRequestMagic {
		return nbdRequest{}, fmt.Errorf("a request begins with %#08x: %w", magic, errNotNBD)
	}
	return nbdRequest{
		flags:   be.Uint16(b[4:]),
		command: be.Uint16(b[6:]),
		cookie:  be.Uint64(b[8:]),
		offset:  be.Uint64(b[16:]),
		length:  be.Uint32(b[24:]),
	}, nil
}

// name is what logs call the command.
func (r nbdRequest) name() string {
	switch r.command {
	case cmdRead:
		return "read"
	case cmdWrite:
		return "write"
	case cmdFlush:
		return "flush"
	case cmdTrim:
		return "trim"
	case cmdWriteZeroes:
		return "write zeroes"
	}
	return fmt.Sprintf("command %d", r.command)
}

// payload is how many bytes follow the header, or answer it.
func (r nbdRequest) payload() int {
	if r.command == cmdRead || r.command == cmdWrite {
		return int(r.length)
	}
	return 0
}

// check reports the NBD error of a request that must not reach the device, or 0.
func (r nbdRequest) check(size int64, readOnly, structured bool) uint32 {
	allowed := uint16(cmdFlagFUA) // clients set it where it means nothing, too
	writes := true
	switch r.command {
	case cmdRead:
		writes = false
		if structured {
			allowed |= cmdFlagDF
		}
		if r.length > MaxRequest {
			return nbdEINVAL
		}
	case cmdFlush:
		if r.flags&^allowed != 0 {
			return nbdEINVAL
		}
		return 0 // offset and length are reserved
	case cmdWrite, cmdTrim:
	case cmdWriteZeroes:
		allowed |= cmdFlagNoHole
	default:
		return nbdEINVAL
	}
	switch {
	case r.flags&^allowed != 0:
		return nbdEINVAL
	case writes && readOnly:
		return nbdEPERM
	case r.offset > uint64(size) || uint64(r.length) > uint64(size)-r.offset:
		if r.command == cmdWrite || r.command == cmdWriteZeroes {
			return nbdENOSPC
		}
		return nbdEINVAL
	}
	return 0
}

// nbdError is the NBD error for an error of a device. The protocol knows few; all others are an I/O error.
func nbdError(err error) uint32 {
	for _, e := range []struct {
		err  error
		code uint32
	}{
		{syscall.ENOSPC, nbdENOSPC}, {syscall.EDQUOT, nbdENOSPC}, {syscall.EFBIG, nbdENOSPC},
		{syscall.EROFS, nbdEPERM}, {syscall.EPERM, nbdEPERM}, {syscall.EACCES, nbdEPERM},
		{syscall.ENOMEM, nbdENOMEM},
		{os.ErrClosed, nbdESHUTDOWN},
		{os.ErrInvalid, nbdEINVAL},
	} {
		if errors.Is(err, e.err) {
			return e.code
		}
	}
	return nbdEIO
}
