package testregistry_test

import (
	"os"
	"testing"
	"time"
	"fmt"

	"github.com/drafter-vm/drafter/internal/testregistry"
)

func TestManual(t *testing.T) {
	if os.Getenv("MANUAL") == "" {
		t.Skip()
	}
	s := testregistry.Start(t, testregistry.Options{})
	os.WriteFile("/tmp/regtool/addr", []byte(s.Address), 0o644)
	fmt.Println(s.Address)
	time.Sleep(2 * time.Hour)
}
