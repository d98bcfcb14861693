package service_test

import (
	"context"
	"fmt"
	"log"
	"net"
	"os"

	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/drafter-vm/drafter/pkg/agent/service"
	"github.com/drafter-vm/drafter/pkg/agent/socket"
)

// A program on the host asks one in the guest. Here both are in this process; in a guest, Dial is left out, and methods are
// registered and called by what protoc-gen-go-ttrpc generates.
func Example() {
	vmPath, err := os.MkdirTemp("", "dr") // of a peer: runner.Hooks.Made, or Peer.VMPath
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(vmPath)
	host, err := service.ListenHost(vmPath, service.Config{Port: 9000, Name: "example.upper", Version: 2, Oldest: 1})
	if err != nil {
		log.Fatal(err)
	}
	defer host.Close()

	guest, err := service.StartGuest(service.Config{
		Port: 9000, Name: "example.upper",
		Register: func(s *ttrpc.Server) {
			s.RegisterService("example.v1.Upper", &ttrpc.ServiceDesc{Methods: map[string]ttrpc.Method{
				"Greet": func(_ context.Context, unmarshal func(any) error) (any, error) {
					name := new(wrapperspb.StringValue)
					if err := unmarshal(name); err != nil {
						return nil, err
					}
					return wrapperspb.String("hello, " + name.Value), nil
				},
			}})
		},
		Dial: func(ctx context.Context, port uint32) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket.PortPath(socket.HostPath(vmPath), port))
		},
	})
	if err != nil {
		log.Fatal(err)
	}
	defer guest.Close()

	ctx := context.Background()
	version, err := host.Wait(ctx)
	if err != nil {
		log.Fatal(err)
	}
	answer := new(wrapperspb.StringValue)
	err = host.Call(ctx, func(ctx context.Context, c *ttrpc.Client) error {
		return c.Call(ctx, "example.v1.Upper", "Greet", wrapperspb.String("host"), answer)
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("version %d: %s\n", version, answer.Value)
	// Output: version 1: hello, host
}
