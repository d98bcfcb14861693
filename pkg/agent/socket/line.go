package socket

import (
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
)

// MaxLine is the longest line of the protocol in bytes, its newline included. It is Firecracker's limit.
const MaxLine = 32

// WriteRequest asks the other end of w for a connection to port.
func WriteRequest(w io.Writer, port uint32) error {
	_, err := fmt.Fprintf(w, "CONNECT %d\n", port)
	return err
}

// ReadRequest reads what WriteRequest wrote, and not one byte more. As Firecracker, it accepts the word in any case and
// any white space between and around the words.
func ReadRequest(r io.Reader) (port uint32, err error) { return readLine(r, "CONNECT") }

// WriteReply grants a request. assigned is the port number of the requesting end.
func WriteReply(w io.Writer, assigned uint32) error {
	_, err := fmt.Fprintf(w, "OK %d\n", assigned)
	return err
}

// ReadReply reads what WriteReply wrote, and not one byte more. It returns [io.EOF] when the other end closed the
// connection without an answer, which is how a request is refused.
func ReadReply(r io.Reader) (assigned uint32, err error) { return readLine(r, "OK") }

// readLine reads a line of a word and a number.
func readLine(r io.Reader, word string) (uint32, error) {
	// Byte by byte: whatever follows the newline belongs to the two programs.
	line := make([]byte, 0, MaxLine)
	for {
		line = line[:len(line)+1]
		if _, err := io.ReadFull(r, line[len(line)-1:]); err != nil {
			if errors.Is(err, io.EOF) && len(line) > 1 {
				err = io.ErrUnexpectedEOF
			}
			return 0, err
		}
		if line[len(line)-1] == '\n' {
			break
		}
		if len(line) == MaxLine {
			return 0, fmt.Errorf("line %q is longer than %d bytes; send \"%s <port>\\n\"", line, MaxLine, word)
		}
	}
	fields := strings.Fields(string(line))
	if len(fields) != 2 || !strings.EqualFold(fields[0], word) {
		return 0, fmt.Errorf("unexpected line %q; send \"%s <port>\\n\"", line, word)
	}
	n, err := strconv.ParseUint(fields[1], 10, 32)
	if err != nil {
		return 0, fmt.Errorf("port %q in line %q is not a number from 0 to 4294967295", fields[1], line)
	}
	return uint32(n), nil
}
