package runner

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/pkg/vmm"
)

// obedient is a machine that pauses and resumes when it is told to, and does not end.
type obedient struct{ vmm.Machine }

func (obedient) Done() <-chan struct{}        { return nil }
func (obedient) Pause(context.Context) error  { return nil }
func (obedient) Resume(context.Context) error { return nil }

// TestSeenMeanwhile asks how an instance is while its agent takes its time.
func TestSeenMeanwhile(t *testing.T) {
	asked, answer := make(chan struct{}), make(chan struct{})
	i := &Instance{phase: running, machine: obedient{}, log: slog.New(slog.DiscardHandler), cfg: Config{Hooks: Hooks{BeforeSuspend: func() {
		close(asked) // in place of the agent, which is told then
		<-answer
	}}}}
	suspended := make(chan error)
	go func() { suspended <- i.Suspend(context.Background()) }()
	<-asked
	seen := make(chan struct{})
	go func() {
		defer close(seen)
		if _, doubt := i.InDoubt(); !i.Running() || doubt || i.Confirmed() || i.Missing() != 0 || !i.RunsSince().IsZero() {
			t.Error("the guest does not run while its agent is told that it will be suspended")
		}
	}()
	select {
	case <-seen:
	case <-time.After(10 * time.Second):
		t.Error("whoever asks waits for the agent")
	}
	close(answer)
	if err := <-suspended; err != nil {
		t.Error(err)
	}
	<-seen
	if i.Running() {
		t.Error("it runs when it is suspended")
	}
}

// TestOnRun has the owner told of the instance when its guest runs, and not again when it was paused meanwhile.
func TestOnRun(t *testing.T) {
	var told []bool
	i := &Instance{phase: suspended, machine: obedient{}, log: slog.New(slog.DiscardHandler)}
	i.cfg.OnRun = func(i *Instance) { told = append(told, i.Running()) }
	for range 2 {
		if err := i.Run(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := i.Suspend(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if len(told) != 1 || !told[0] {
		t.Errorf("it was told %t, want once, that it runs", told)
	}
}
