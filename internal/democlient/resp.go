package democlient

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"strconv"
)

// maxBulk bounds the strings a server may send. Ours are a few dozen bytes long.
const maxBulk = 1 << 20

// serverError is a reply that says that a command failed. The connection is good.
type serverError string

func (e serverError) Error() string { return "server: " + string(e) }

// appendCommand appends a command as the server expects it: an array of bulk strings.
func appendCommand(b []byte, args ...string) []byte {
	b = append(strconv.AppendInt(append(b, '*'), int64(len(args)), 10), "\r\n"...)
	for _, a := range args {
		b = append(strconv.AppendInt(append(b, '$'), int64(len(a)), 10), "\r\n"...)
		b = append(append(b, a...), "\r\n"...)
	}
	return b
}

// readReply reads a reply of the kinds that SET, GET and PING have: a simple string, a bulk string, or an error, which
// becomes a serverError. exists is false for the bulk string that stands for no value. After other errors the connection
// is of no use.
func readReply(r *bufio.Reader) (value string, exists bool, err error) {
	line, err := r.ReadSlice('\n')
	if err != nil {
		if errors.Is(err, bufio.ErrBufferFull) {
			err = errors.New("reply has too long a line")
		}
		return "", false, err
	}
	if len(line) < 3 || line[len(line)-2] != '\r' {
		return "", false, fmt.Errorf("reply %.40q is not RESP", line)
	}
	text := string(line[1 : len(line)-2])
	switch line[0] {
	case '+':
		return text, true, nil
	case '-':
		return "", false, serverError(text)
	case '$':
		if text == "-1" {
			return "", false, nil
		}
		n, err := strconv.ParseUint(text, 10, 31)
		if err != nil || n > maxBulk {
			return "", false, fmt.Errorf("reply announces a string of %.40q bytes", text)
		}
		b := make([]byte, n+2)
		if _, err := io.ReadFull(r, b); err != nil {
			return "", false, err
		}
		if string(b[n:]) != "\r\n" {
			return "", false, errors.New("reply has a string that does not end where it should")
		}
		return string(b[:n]), true, nil
	}
	return "", false, fmt.Errorf("reply %.40q is of an unexpected kind", line)
}
