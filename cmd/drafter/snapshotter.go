package main

import (
	"encoding/json"
	"fmt"
	"math"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/snapshot"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
)

// snapshotterDevice is an element of the snapshotter's --devices.
type snapshotterDevice struct {
	Name   string `json:"name"`
	Input  string `json:"input"`
	Output string `json:"output"`
	Shared bool   `json:"shared,omitempty"`
}

type snapshotterOptions struct {
	machineFlags
	devices      string
	cpuCount     int
	memorySize   int64 // MiB
	cpuTemplate  string
	bootArgs     string
	mac          string
	livenessPort uint32
	agentPorts   []uint
	shutDown     bool
}

func newSnapshotterCommand() *cobra.Command {
	var opts snapshotterOptions
	cmd := &cobra.Command{
		Use:   "snapshotter",
		Short: "Boot a blueprint and write it down as a package that can be resumed",
		Long: `Boot a blueprint in a machine, wait until the guest says that it is up, tell its agent that it will be suspended, and
write a package: device state, memory, machine description, and copies of the blueprint's files.

Each device is {"name":NAME,"input":BLUEPRINT_FILE,"output":PACKAGE_FILE}; state, memory and config have no input. Names
other than state, memory, kernel, initrd, disk, config and oci are additional disks, attached behind disk and oci in the order
given.

Exit statuses: 0 success; 1 no package was made; 2 the command line cannot be used; 130 ended by a signal, no package made.`,
		Example: `  drafter snapshotter
  drafter snapshotter --memory-size 512 --devices '[
    {"name":"state","output":"out/package/state.bin"},
    {"name":"memory","output":"out/package/memory.bin"},
    {"name":"kernel","input":"out/blueprint/vmlinux","output":"out/package/vmlinux"},
    {"name":"initrd","input":"out/blueprint/initrd.img","output":"out/package/initrd.img"},
    {"name":"disk","input":"out/blueprint/rootfs.ext4","output":"out/package/rootfs.ext4"},
    {"name":"config","output":"out/package/config.json"}]'`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return runSnapshotter(cmd, opts) },
	}
	flags := cmd.Flags()
	opts.register(flags)
	offerMachine(cmd)
	flags.StringVar(&opts.devices, "devices", "", "devices of the package, a JSON array (default: out/blueprint/* to out/package/*)")
	flags.IntVar(&opts.cpuCount, "cpu-count", 1, "virtual CPUs")
	flags.Int64Var(&opts.memorySize, "memory-size", 1024, "memory in MiB")
	flags.StringVar(&opts.cpuTemplate, "cpu-template", "None", "CPU model of the guest, as the hypervisor names it, or the file of a Firecracker CPU template, by a path with a / or .json (None: the default for the acceleration)")
	flags.StringVar(&opts.bootArgs, "boot-args", snapshot.DefaultBootArgs, "kernel arguments")
	flags.Lookup("interface").Usage = "tap interface in the network namespace (empty: a guest without network)"
	flags.StringVar(&opts.mac, "mac", "02:0e:d9:fd:68:3d", "MAC address of the guest's interface")
	flags.Uint32Var(&opts.livenessPort, "liveness-vsock-port", snapshot.DefaultLivenessVSockPort, "port on which the guest says that it is up (0: it does not)")
	flags.UintSliceVar(&opts.agentPorts, "agent-vsock-port", []uint{snapshot.DefaultAgentVSockPort}, "ports of the guest's agents (0: it has none)")
	flags.BoolVar(&opts.shutDown, "shut-down", false, "have the guest shut down, and write a package without memory, which boots at each start")
	return cmd
}

func runSnapshotter(cmd *cobra.Command, opts snapshotterOptions) error {
	if len(opts.vfio) > 0 && !opts.shutDown {
		return usageErrorf("--vfio %s: the state of a device of the host cannot be written down, so its VM cannot be snapshotted: with --shut-down a package without memory is made, which boots", opts.vfio[0])
	}
	if opts.devices == "" {
		opts.devices = defaultSnapshotterDevices(opts.shutDown)
	}
	decoded, err := decodeDevices[snapshotterDevice](opts.devices)
	if err != nil {
		return err
	}
	var devices []snapshot.Device
	for _, d := range decoded {
		devices = append(devices, snapshot.Device(d))
	}
	if opts.cpuCount < 1 {
		return usageErrorf("--cpu-count %d: give at least 1", opts.cpuCount)
	}
	if opts.memorySize < 1 || opts.memorySize > 1<<24 {
		return usageErrorf("--memory-size %d: give MiB, from 1 to %d", opts.memorySize, 1<<24)
	}
	if opts.iface == "" {
		for _, name := range []string{"mac", "netns"} {
			if f := cmd.Flags().Lookup(name); f.Changed && f.Value.String() != "" {
				return usageErrorf("--%s has no meaning with an empty --interface, which makes a guest without network; leave one of them out", name)
			}
		}
		opts.mac, opts.netns = "", ""
	} else if mac, err := net.ParseMAC(opts.mac); err != nil || len(mac) != 6 {
		return usageErrorf("--mac %q is not an Ethernet address, like 02:0e:d9:fd:68:3d", opts.mac)
	} else if mac[0]&1 != 0 {
		return usageErrorf("--mac %q is a multicast address, which no interface can have: make its first number even", opts.mac)
	}
	var agents []uint32
	for _, port := range opts.agentPorts {
		if port > math.MaxUint32 {
			return usageErrorf("--agent-vsock-port %d: a port is at most %d", port, uint32(math.MaxUint32))
		}
		agents = append(agents, uint32(port))
	}
	if len(agents) == 0 {
		agents = []uint32{0}
	}
	if err := (runner.Description{LivenessVSockPort: opts.livenessPort, AgentVSockPort: agents[0], MoreAgents: agents[1:]}).CheckPorts(); err != nil {
		return usageErrorf("--liveness-vsock-port and --agent-vsock-port: %w", err)
	}
	if err := opts.check(); err != nil {
		return err
	}
	if name := opts.cpuTemplate; strings.Contains(name, "/") || strings.HasSuffix(name, ".json") {
		text, err := os.ReadFile(name)
		if err != nil {
			return fmt.Errorf("--cpu-template: %w", err)
		}
		if !json.Valid(text) || !strings.HasPrefix(strings.TrimSpace(string(text)), "{") {
			return usageErrorf("--cpu-template %q has no JSON object: give a template as Firecracker has them, or the name of a CPU model", name)
		}
		opts.cpuTemplate = string(text)
	}
	backend, _, err := opts.backend(cmd)
	if err != nil {
		return err
	}

	result, err := snapshot.Create(cmd.Context(), snapshot.Config{
		Backend: backend, Devices: devices, Host: opts.host(cmd),
		CPUCount: opts.cpuCount, MemorySize: opts.memorySize << 20, CPUTemplate: opts.cpuTemplate, Accel: opts.accel,
		BootArgs: opts.bootArgs, MAC: opts.mac, LivenessVSockPort: opts.livenessPort, AgentVSockPort: agents[0], MoreAgents: agents[1:],
		ResumeTimeout: opts.resumeTimeout, ShutDown: opts.shutDown, Logger: logger(cmd.Context()),
		Progress: func(stage string) { logger(cmd.Context()).Info("snapshot", "stage", stage) },
	})
	if err != nil {
		return interrupted(cmd, err)
	}
	where := "the outputs given"
	if result.Manifest != nil {
		where = filepath.Dir(devices[0].Output)
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "Booted in %s, wrote the package to %s\n", result.BootTime.Round(10*time.Millisecond), where)
	return nil
}

// defaultSnapshotterDevices takes what is in out/blueprint to out/package. The initrd and the OCI disk are there or not,
// depending on the blueprint. Of a guest that is shut down there is no memory.
func defaultSnapshotterDevices(shutDown bool) string {
	devices := []snapshotterDevice{}
	for _, name := range vmpackage.KnownNames() {
		if shutDown && name == runner.MemoryDevice {
			continue
		}
		d := snapshotterDevice{Name: name, Output: filepath.Join("out", "package", vmpackage.DefaultFile(name))}
		switch name {
		case runner.StateDevice, runner.MemoryDevice, runner.ConfigDevice:
		default:
			d.Input = filepath.Join("out", "blueprint", vmpackage.DefaultFile(name))
			if _, err := os.Stat(d.Input); err != nil && (name == runner.InitrdDevice || name == "oci") {
				continue
			}
		}
		devices = append(devices, d)
	}
	b, _ := json.Marshal(devices) // strings only: cannot fail
	return string(b)
}
