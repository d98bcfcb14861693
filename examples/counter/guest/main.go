// Command guest is the half of the counter that runs in the guest.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"sync/atomic"

	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/drafter-vm/drafter/examples/counter"
	"github.com/drafter-vm/drafter/pkg/agent/service"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	var count atomic.Int64
	e, err := service.StartGuest(service.Config{
		Port: counter.Port, Name: counter.Name, Version: counter.Version,
		Register: func(s *ttrpc.Server) {
			s.RegisterService(counter.Service, &ttrpc.ServiceDesc{Methods: map[string]ttrpc.Method{
				counter.Method: func(_ context.Context, unmarshal func(any) error) (any, error) {
					if err := unmarshal(new(emptypb.Empty)); err != nil {
						return nil, err
					}
					return wrapperspb.Int64(count.Add(1)), nil
				},
			}})
		},
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, "guest:", err)
		os.Exit(1)
	}
	<-ctx.Done()
	e.Close()
}
