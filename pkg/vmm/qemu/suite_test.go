package qemu

import (
	"testing"

	"github.com/drafter-vm/drafter/pkg/vmm/vmmtest"
)

func TestSuite(t *testing.T) {
	if testing.Short() {
		t.Skip("starts QEMU with real guests")
	}
	vmmtest.Run(t, vmmtest.Harness{Backend: New(Options{})})
}
