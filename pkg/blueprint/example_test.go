package blueprint_test

import (
	"context"
	"fmt"
	"log"

	"github.com/drafter-vm/drafter/pkg/blueprint"
)

func ExampleBuild() {
	result, err := blueprint.Build(context.Background(), blueprint.Config{
		Output:   "out/blueprint",
		Agent:    "bin/drafter-agent",
		Packages: []string{"valkey-server"},
		Fstab:    []string{"LABEL=data /data ext4 defaults 0 2"},
		Progress: func(p blueprint.Progress) { fmt.Printf("%s: %d of %d bytes\n", p.Stage, p.Done, p.Total) },
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(result.Kernel, result.Initrd, result.Disk)
}
