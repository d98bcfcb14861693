package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/drafter-vm/drafter/pkg/blueprint"
)

// newBlueprintCommand is `drafter blueprint`.
func newBlueprintCommand() *cobra.Command {
	var (
		cfg    blueprint.Config
		copies []string
		size   string
	)
	cmd := &cobra.Command{
		Use:   "blueprint",
		Short: "Build a kernel, an initrd and a root disk from Debian packages",
		Long: `Build what a VM boots: vmlinux, initrd.img and rootfs.ext4, from Debian packages.

It needs no root, no loop device and no container: the root file system is laid out in memory. The same versions (kept
in the lock file) give the same bytes. A run with nothing changed takes a moment.

The guest logs in as root on its serial console, without a password unless --root-password gives one, and is
172.16.0.2/30 and fd00:172:16::2/64 on its one interface. Programs in /etc/drafter/before-suspend.d and
/etc/drafter/after-resume.d run around every snapshot and move.

With --desktop the guest shows a terminal, with --desktop=COMMAND another program, to whoever reaches its port 5900 by
VNC: no password is asked for, so forward it to loopback only. It is a Debian 13 then, unless --suite says otherwise.

With --oci it runs what is on disks that hold an OCI runtime bundle each, with crun, and is up when all of that is ready
(docs/containers.md).

Exit status: 0 built or up to date, 1 failed, 2 wrong usage, 130 interrupted.`,
		Example: `  drafter blueprint --packages valkey-server
  drafter blueprint --packages nginx --copy ./site:/var/www/html --size 2G
  drafter blueprint --kernel-package linux-image-cloud-amd64/bookworm-backports
  drafter blueprint --desktop='foot --font=monospace:size=14' --packages mesa-utils
  drafter blueprint --oci --output out/oci
  drafter blueprint --script ./setup.sh --unit ./my.service --fstab 'LABEL=data /data ext4 defaults 0 2'`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 && cmd.Flags().Changed("desktop") {
				return usageErrorf("%q is no part of --desktop: give --desktop=%q", args[0], strings.Join(args, " "))
			}
			return cobra.NoArgs(cmd, args)
		},
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			for _, c := range copies {
				host, guest, ok := strings.Cut(c, ":")
				if !ok || host == "" || guest == "" {
					return usageErrorf("--copy %q is not of the form HOST:GUEST", c)
				}
				cfg.Copies = append(cfg.Copies, blueprint.Copy{Host: host, Guest: guest})
			}
			if (cfg.Desktop != "" || cfg.OCI) && !cmd.Flags().Changed("packages") {
				cfg.Packages = nil // the example's server has nothing to show, and is no container
			}
			var err error
			if cfg.Size, err = parseDiskSize(size); err != nil {
				return usageErrorf("--size: %w", err)
			}
			if cfg.Agent == "" {
				if cfg.Agent, err = findAgent(); err != nil {
					return err
				}
			}
			show := newStages(cmd.ErrOrStderr())
			cfg.Progress = show.blueprint
			cfg.Logger = logger(cmd.Context())
			start := time.Now()
			result, err := blueprint.Build(cmd.Context(), cfg)
			show.end()
			if err != nil && cmd.Context().Err() != nil {
				return errInterrupted
			}
			if err != nil {
				return err
			}
			out := cmd.OutOrStdout()
			for _, path := range []string{result.Kernel, result.Initrd, result.Disk} {
				fmt.Fprintf(out, "%s  %s\n", result.SHA256[filepath.Base(path)], path)
			}
			what := "built"
			if result.UpToDate {
				what = "up to date"
			}
			fmt.Fprintf(cmd.ErrOrStderr(), "Blueprint %s in %.1f s: Linux %s, %d packages, lock %s\n",
				what, time.Since(start).Seconds(), result.KernelVersion, len(result.Packages), result.Lock)
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&cfg.Output, "output", filepath.Join("out", "blueprint"), "`folder` to write to")
	f.StringVar(&cfg.Agent, "agent", "", "`path` of the guest's program (default drafter-agent beside this program, else in PATH)")
	f.StringSliceVar(&cfg.Packages, "packages", []string{"valkey-server"}, "`packages` to install, each NAME, NAME/SUITE or NAME=VERSION; with --desktop or --oci none by default")
	f.StringVar(&cfg.Suite, "suite", "", "Debian `release`; its backports serve what it lacks (default bookworm, with --desktop trixie)")
	f.StringVar(&cfg.Arch, "arch", "amd64", "`architecture` of the guest")
	f.StringVar(&cfg.KernelPackage, "kernel-package", "linux-image-cloud-amd64", "`package` of the kernel; append /bookworm-backports for the newer one")
	f.StringVar(&size, "size", "", "size of the root disk, such as 2G (default what is needed and 0.5 GiB)")
	f.StringVar(&cfg.Mirror, "mirror", "", "`URL` of the Debian archive (default as in /etc/apt)")
	f.StringVar(&cfg.Hostname, "hostname", "drafter", "host `name` of the guest")
	f.StringVar(&cfg.RootPassword, "root-password", "", "`password` of root, or its crypt(5) hash (default none is asked for)")
	f.StringArrayVar(&cfg.Units, "unit", nil, "systemd unit `file` to install and enable (repeatable)")
	f.StringArrayVar(&cfg.Scripts, "script", nil, "`file` to run at boot, as a service (repeatable)")
	f.StringArrayVar(&copies, "copy", nil, "`HOST:GUEST` file or folder to put into the guest (repeatable)")
	f.StringVar(&cfg.Desktop, "desktop", "", "show a program, by default the terminal foot, by VNC at port 5900 of the guest: `COMMAND` line, given as --desktop=COMMAND")
	f.Lookup("desktop").NoOptDefVal = blueprint.DefaultDesktop
	f.BoolVar(&cfg.OCI, "oci", false, "run the containers of disks that hold an OCI runtime bundle each")
	f.StringArrayVar(&cfg.Fstab, "fstab", nil, "`line` for /etc/fstab, as for an additional disk, by LABEL=; a disk that is absent is waited for 20 s, then left out (repeatable)")
	f.StringVar(&cfg.Lock, "lock", "", "lock `file` (default blueprint.lock in the output folder)")
	f.BoolVar(&cfg.Locked, "locked", false, "fail where the lock file would have to change")
	f.BoolVar(&cfg.UpdateLock, "update-lock", false, "choose the newest versions of everything")
	f.StringVar(&cfg.Cache, "cache", "", "`folder` of downloads (default drafter/blueprint in the user's cache folder)")
	return cmd
}

// parseDiskSize reads a size with a binary unit: 512M, 2G, 2GiB. Empty is 0, the default; no unit means bytes.
func parseDiskSize(s string) (int64, error) {
	if s == "" {
		return 0, nil
	}
	units := map[string]int64{"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
	i := strings.IndexFunc(s, func(r rune) bool { return r < '0' || r > '9' })
	if i < 0 {
		i = len(s)
	}
	var n int64
	unit, ok := units[strings.TrimSuffix(strings.TrimSuffix(strings.ToUpper(s[i:]), "B"), "I")]
	if _, err := fmt.Sscanf(s[:i], "%d", &n); err != nil || !ok || n <= 0 || n > (1<<50)/unit {
		return 0, fmt.Errorf("%q is not a size; give one such as 512M or 2G", s)
	}
	return n * unit, nil
}

// findAgent looks for drafter-agent beside this program, then in PATH.
func findAgent() (string, error) {
	const name = "drafter-agent"
	if self, err := os.Executable(); err == nil {
		if self, err = filepath.EvalSymlinks(self); err == nil {
			if path := filepath.Join(filepath.Dir(self), name); isFile(path) {
				return path, nil
			}
		}
	}
	path, err := exec.LookPath(name)
	if err != nil && !errors.Is(err, exec.ErrDot) {
		return "", fmt.Errorf("%s is neither beside this program nor in PATH: run `make build`, or give its path with --agent", name)
	}
	return path, nil
}

func isFile(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.Mode().IsRegular()
}
