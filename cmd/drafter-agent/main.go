// Command drafter-agent runs inside a guest. It runs the guest's hooks before the machine is suspended and after it
// resumes, says once that the guest is up, and offers the host's sockets where the machine has no AF_VSOCK device.
//
// It is one static program for the guest's services: drafter-agent, drafter-agent liveness (also by the name
// drafter-liveness) and drafter-agent vsock.
//
// Exit statuses: 0 success, also when ended by SIGINT or SIGTERM; 1 the work failed; 2 the command line cannot be used.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/drafter-vm/drafter/internal/agentcmd"
)

func main() {
	ctx, _ := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := agentcmd.Run(ctx, os.Args, os.Stdin, os.Stdout, os.Stderr)
	os.Exit(agentcmd.ExitStatus(err))
}
