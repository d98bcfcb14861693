// Command guest is what the end-to-end tests run inside their guest, beside drafter-agent:
//
//	guest listen PORT      echo what programs on the host send to that port
//	guest say PORT TEXT    send TEXT to that port of the host
//	guest serve PORT       count, for the host, and ask it back: see [serve]
//	guest -c WORD          append WORD to /hooks: the shell of the agent's hooks
//	guest -c poweroff      power off
package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/drafter-vm/drafter/pkg/agent/service"
	"github.com/drafter-vm/drafter/pkg/agent/socket"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "guest:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) == 2 && args[0] == "-c" && args[1] == "poweroff" {
		unix.Sync()
		return unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	}
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
		return fmt.Errorf("usage: guest listen PORT | say PORT TEXT | serve PORT | -c WORD")
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
	case args[0] == "serve" && len(args) == 2:
		return serve(port)
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

// serve is a service in the guest: Next counts its calls, Ask asks the host for its name by its method Name.
func serve(port uint32) error {
	var count atomic.Int64
	var host *service.Endpoint
	ready := make(chan struct{})
	host, err := service.StartGuest(service.Config{Port: port, Name: "e2e", Version: 2, Oldest: 1, Register: func(s *ttrpc.Server) {
		s.RegisterService("e2e.v1.Guest", &ttrpc.ServiceDesc{Methods: map[string]ttrpc.Method{
			"Next": func(context.Context, func(any) error) (any, error) { return wrapperspb.Int64(count.Add(1)), nil },
			"Ask": func(ctx context.Context, _ func(any) error) (any, error) {
				<-ready
				name := new(wrapperspb.StringValue)
				return name, host.Retry(ctx, func(ctx context.Context, c *ttrpc.Client) error {
					return c.Call(ctx, "e2e.v1.Host", "Name", new(wrapperspb.StringValue), name)
				})
			},
		}})
	}})
	if err != nil {
		return err
	}
	close(ready)
	select {} // for as long as the guest runs
}

func echo(conn net.Conn) {
	defer conn.Close()
	io.Copy(conn, conn) // ends with the connection
}
