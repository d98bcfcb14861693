package expose

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/drafter-vm/drafter/pkg/block"
)

const (
	// maxOption is the largest data of an option in bytes: a name and a list of information requests.
	maxOption = nbdMaxString + 6 + 2*64
	// maxSkipped is the largest data of an option that is read only to be refused. Beyond it the client is cut off.
	maxSkipped = 64 << 10
	// maxOptions is how many options a client may send before it must have chosen an export.
	maxOptions = 64
	// preferredBlock is the granularity in bytes below which requests cost more than they must.
	preferredBlock = block.PageSize
)

// errHandshakeOver is returned when the client has ended the negotiation, as it may.
var errHandshakeOver = errors.New("the client left during the negotiation")

// session is what was negotiated.
type session struct {
	export     *Export
	structured bool // READ is answered with structured replies
}

func (s session) transmissionFlags(export *Export) uint16 {
	flags := uint16(transHasFlags | transFlush | transFUA | transCanMultiConn)
	if export.ReadOnly {
		flags |= transReadOnly
	} else {
		flags |= transTrim | transWriteZeroes
	}
	if s.structured {
		flags |= transDF
	}
	return flags
}

// negotiate does the handshake up to the beginning of transmission. Every reply is one Write.
func negotiate(r *bufio.Reader, w io.Writer, exports []Export) (session, error) {
	be := binary.BigEndian
	hello := be.AppendUint64(nil, nbdMagic)
	hello = be.AppendUint64(hello, nbdOptionMagic)
	hello = be.AppendUint16(hello, flagFixedNewstyle|flagNoZeroes)
	if _, err := w.Write(hello); err != nil {
		return session{}, err
	}
	var b [16]byte
	if _, err := io.ReadFull(r, b[:4]); err != nil {
		return session{}, left(err)
	}
	clientFlags := be.Uint32(b[:])
	if clientFlags&^(flagFixedNewstyle|flagNoZeroes) != 0 {
		return session{}, fmt.Errorf("the client sets unknown flags %#x: %w", clientFlags, errNotNBD)
	}

	var s session
	for range maxOptions {
		if _, err := io.ReadFull(r, b[:]); err != nil {
			return session{}, left(err)
		}
		if magic := be.Uint64(b[:]); magic != nbdOptionMagic {
			return session{}, fmt.Errorf("an option begins with %#016x: %w", magic, errNotNBD)
		}
		option, length := be.Uint32(b[8:]), be.Uint32(b[12:])
		if length > maxOption {
			if length > maxSkipped {
				return session{}, fmt.Errorf("option %d has %d bytes of data, at most %d are accepted", option, length, maxOption)
			}
			if _, err := io.CopyN(io.Discard, r, int64(length)); err != nil {
				return session{}, left(err)
			}
			if option == optExportName {
				return session{}, errors.New("the client asks for an export with a name that is too long")
			}
			if _, err := w.Write(optionReply(nil, option, repErrTooBig, []byte("too much data"))); err != nil {
				return session{}, err
			}
			continue
		}
		data := make([]byte, length)
		if _, err := io.ReadFull(r, data); err != nil {
			return session{}, left(err)
		}

		switch option {
		case optExportName:
			export := findExport(exports, string(data))
			if export == nil {
				return session{}, fmt.Errorf("the client asks for the export %q, there is none", data)
			}
			reply := be.AppendUint64(nil, uint64(export.Device.Size()))
			reply = be.AppendUint16(reply, s.transmissionFlags(export))
			if clientFlags&flagNoZeroes == 0 {
				reply = append(reply, make([]byte, 124)...)
			}
			s.export = export
			_, err := w.Write(reply)
			return s, err

		case optAbort:
			_, _ = w.Write(optionReply(nil, option, repAck, nil)) // the client may be gone already
			return session{}, errHandshakeOver

		case optGo, optInfo:
			reply, export := s.info(exports, option, data)
			if _, err := w.Write(reply); err != nil {
				return session{}, err
			}
			if option == optGo && export != nil {
				s.export = export
				return s, nil
			}

		default:
			if _, err := w.Write(s.simpleOption(exports, option, data)); err != nil {
				return session{}, err
			}
		}
	}
	return session{}, fmt.Errorf("the client sent %d options and chose no export", maxOptions)
}

// left turns the end of the client's bytes into errHandshakeOver.
func left(err error) error {
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return errHandshakeOver
	}
	return err
}

// simpleOption answers the options that choose no export.
func (s *session) simpleOption(exports []Export, option uint32, data []byte) []byte {
	switch option {
	case optList, optStructuredReply:
		if len(data) > 0 {
			return optionReply(nil, option, repErrInvalid, []byte("this option has no data"))
		}
	default:
		return optionReply(nil, option, repErrUnsup, nil)
	}
	if option == optStructuredReply {
		s.structured = true
		return optionReply(nil, option, repAck, nil)
	}
	var reply []byte
	for i := range exports {
		name := exports[i].Name
		reply = optionReply(reply, option, repServer, append(binary.BigEndian.AppendUint32(nil, uint32(len(name))), name...))
	}
	return optionReply(reply, option, repAck, nil)
}

// info answers INFO and GO, and returns the export if there is such a one.
func (s *session) info(exports []Export, option uint32, data []byte) (reply []byte, _ *Export) {
	be := binary.BigEndian
	name, requests, ok := parseInfo(data)
	if !ok {
		return optionReply(nil, option, repErrInvalid, []byte("malformed request")), nil
	}
	export := findExport(exports, name)
	if export == nil {
		return optionReply(nil, option, repErrUnknown, fmt.Appendf(nil, "no export %q", name)), nil
	}
	b := be.AppendUint16(nil, infoExport)
	b = be.AppendUint64(b, uint64(export.Device.Size()))
	b = be.AppendUint16(b, s.transmissionFlags(export))
	reply = optionReply(reply, option, repInfo, b)
	for ; len(requests) > 0; requests = requests[2:] {
		if be.Uint16(requests) == infoName {
			reply = optionReply(reply, option, repInfo, append(be.AppendUint16(nil, infoName), export.Name...))
			break
		}
	}
	// Sent unasked, too: clients must ignore what they do not know.
	b = be.AppendUint16(nil, infoBlockSize)
	b = be.AppendUint32(b, 1)
	b = be.AppendUint32(b, preferredBlock)
	b = be.AppendUint32(b, MaxRequest)
	reply = optionReply(reply, option, repInfo, b)
	return optionReply(reply, option, repAck, nil), export
}

// parseInfo takes the data of INFO and GO apart: the length of the name (4 bytes), the name, the number of information
// requests (2 bytes), and 2 bytes for each.
func parseInfo(data []byte) (name string, requests []byte, ok bool) {
	be := binary.BigEndian
	if len(data) < 6 {
		return "", nil, false
	}
	n := be.Uint32(data)
	if n > nbdMaxString || int(n) > len(data)-6 {
		return "", nil, false
	}
	name, requests = string(data[4:4+n]), data[4+n:]
	if count := int(be.Uint16(requests)); len(requests) != 2+2*count {
		return "", nil, false
	}
	return name, requests[2:], true
}

// findExport looks an export up. The empty name is the only one there is, if there is but one.
func findExport(exports []Export, name string) *Export {
	for i := range exports {
		if exports[i].Name == name {
			return &exports[i]
		}
	}
	if name == "" && len(exports) == 1 {
		return &exports[0]
	}
	return nil
}

// optionReply appends a reply to an option to b.
func optionReply(b []byte, option, kind uint32, data []byte) []byte {
	be := binary.BigEndian
	b = be.AppendUint64(b, nbdOptReply)
	b = be.AppendUint32(b, option)
	b = be.AppendUint32(b, kind)
	b = be.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}
