// Command guest is what the end-to-end tests run inside their guest, beside drafter-agent:
//
//	guest listen PORT      echo what programs on the host send to that port
//	guest say PORT TEXT    send TEXT to that port of the host
//	guest -c WORD          append WORD to /hooks: the shell of the agent's hooks
package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"time"

	"github.com/drafter-vm/drafter/pkg/agent/socket"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "guest:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) == 2 && args[0] == "-c" {
		f, err := os.OpenFile("/hooks", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = fmt.Fprintf(f, "[%s]", args[1])
		return err
	}
	if len(args) < 2 {
		return fmt.Errorf("usage: guest listen PORT | say PORT TEXT | -c WORD")
	}
	n, err := strconv.ParseUint(args[1], 10, 32)
	if err != nil {
		return err
	}
	port := uint32(n)
	switch {
	case args[0] == "listen" && len(args) == 2:
		l, err := socket.Listen(port)
		if err != nil {
			return err
		}
		for {
			conn, err := l.Accept()
			if err != nil {
				return err
			}
			go echo(conn)
		}
	case args[0] == "say" && len(args) == 3:
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		conn, err := socket.Dial(ctx, port)
		if err != nil {
			return err
		}
		defer conn.Close()
		_, err = io.WriteString(conn, args[2])
		return err
	}
	return fmt.Errorf("unknown command %q", args)
}

func echo(conn net.Conn) {
	defer conn.Close()
	io.Copy(conn, conn) // ends with the connection
}
