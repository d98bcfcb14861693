package main

import (
	"context"
	"fmt"
	"path"
	"path/filepath"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/drafter-vm/drafter/pkg/registry"
)

// registryFlags say how a registry is spoken to.
type registryFlags struct {
	plainHTTP   bool
	ca          string
	platform    string
	concurrency int  // 0: the default
	own         bool // there is a flag for that
}

// registryFlagNames are those that every command has.
var registryFlagNames = []string{"plain-http", "registry-ca", "platform"}

func (f *registryFlags) register(flags *pflag.FlagSet) {
	flags.BoolVar(&f.plainHTTP, "plain-http", false, "speak with the registry without TLS: only where all that is between is to be trusted (default: on loopback, if it has none)")
	flags.StringVar(&f.ca, "registry-ca", "", "file of certificates, PEM, that the registry's is trusted by, beside the system's (SSL_CERT_FILE)")
	flags.StringVar(&f.platform, "platform", "", "what the package is for, as linux/amd64 (default: what this host is)")
}

// alone registers what commands have that do nothing but speak with a registry.
func (f *registryFlags) alone(flags *pflag.FlagSet) {
	f.register(flags)
	f.own = true
	flags.IntVar(&f.concurrency, "concurrency", 4, "most requests at once")
}

// options are what the flags say.
func (f *registryFlags) options(ctx context.Context, flags *pflag.FlagSet) (registry.OpenOptions, error) {
	t := registry.Transport{CA: f.ca, Concurrency: f.concurrency, Logger: logger(ctx)}
	if flags.Changed("plain-http") {
		t.PlainHTTP = &f.plainHTTP
	}
	if err := registry.CheckPlatform(f.platform); err != nil {
		return registry.OpenOptions{}, usageErrorf("--platform: %w", err)
	}
	if f.own && (f.concurrency < 1 || f.concurrency > 256) {
		return registry.OpenOptions{}, usageErrorf("--concurrency %d: give 1 to 256", f.concurrency)
	}
	return registry.OpenOptions{Transport: t, Platform: f.platform}, nil
}

// parseReference reads a reference of the command line.
func parseReference(s string) (registry.Reference, error) {
	ref, err := registry.ParseReference(s)
	if err != nil {
		return ref, usageErrorf("%w", err)
	}
	return ref, nil
}

// twoArgs are the two arguments of a command.
func twoArgs(what string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) != 2 || args[0] == "" || args[1] == "" {
			return usageErrorf("give two arguments: %s", what)
		}
		return nil
	}
}

// credentialsHelp is the same for all commands.
const credentialsHelp = `Credentials are those of docker login (DOCKER_CONFIG, else ~/.docker/config.json, and its credential helpers), else those of podman login.`

func newPushCommand() *cobra.Command {
	var (
		flags registryFlags
		bases []string
	)
	cmd := &cobra.Command{
		Use:   "push DIR oci://HOST/NAME:TAG",
		Short: "Put a package into a registry",
		Long: `Puts a package, in a folder, into an OCI registry, and prints its name with the digest, which pins every byte of it.

It is cut in pieces. What the registry has in what the tag named before, in what the package was pulled from, or in a --base, is referred to and
not sent again. A push that was interrupted is made again, and goes on where it was. The tag may name a package for each of several platforms:
pushing for one leaves the others.

` + credentialsHelp + `

Exit statuses: 0 done; 1 it failed; 2 the command line cannot be used; 130 ended by a signal.`,
		Example: `  drafter push out/package oci://registry.example/vms/web:1
  drafter push out/package oci://registry.example/vms/web:2 --base oci://registry.example/vms/web:1
  drafter push out/arm oci://registry.example/vms/web:1 --platform linux/arm64`,
		Args: twoArgs("the folder of the package, and where to push it, as oci://HOST/NAME:TAG"),
		RunE: func(cmd *cobra.Command, args []string) error {
			ref, err := parseReference(args[1])
			if err != nil {
				return err
			}
			if ref.Digest != "" {
				return usageErrorf("%s: a package is pushed to a tag, and its digest comes of that: leave the digest out", ref)
			}
			open, err := flags.options(cmd.Context(), cmd.Flags())
			if err != nil {
				return err
			}
			opts := registry.PushOptions{Transport: open.Transport, Platform: open.Platform}
			for _, b := range bases {
				base, err := parseReference(b)
				if err != nil {
					return usageErrorf("--base: %w", err)
				}
				opts.Bases = append(opts.Bases, base)
			}
			if isFile(args[0]) {
				return usageErrorf("%q is a file, and a folder is needed: extract it (mkdir out/package && tar -xf %s -C out/package)", args[0], args[0])
			}
			show := newStages(cmd.ErrOrStderr())
			opts.Progress = show.registry
			start := time.Now()
			pushed, err := registry.Push(cmd.Context(), args[0], ref, opts)
			show.end()
			if err != nil {
				return interrupted(cmd, err)
			}
			fmt.Fprintf(cmd.ErrOrStderr(), "Pushed %s in %.1f s: %s\n", args[0], time.Since(start).Seconds(), pushSummary(pushed))
			fmt.Fprintln(cmd.OutOrStdout(), pushed.Reference)
			return nil
		},
	}
	flags.alone(cmd.Flags())
	cmd.Flags().StringArrayVar(&bases, "base", nil, "package of the same registry that this one is like: what it holds is not sent again; again for each")
	return cmd
}

// pushSummary says how much was sent, of how much.
func pushSummary(p *registry.Pushed) string {
	size := func(n int64) string { return humanize.IBytes(uint64(n)) }
	s := fmt.Sprintf("sent %s for %s of content", size(p.Sent), size(p.Data))
	if p.Known > 0 {
		s += fmt.Sprintf(", of which %s (%.1f%%) were there", size(p.Known), 100*float64(p.Known)/float64(max(1, p.Data)))
	}
	if p.Present > 0 {
		s += fmt.Sprintf("; %s, compressed, had been sent before", size(p.Present))
	}
	if p.Sent > 0 {
		s += fmt.Sprintf("; 1 byte for %.1f of the devices' %s", float64(p.Size)/float64(p.Sent), size(p.Size))
	}
	return s
}

func newPullCommand() *cobra.Command {
	var flags registryFlags
	cmd := &cobra.Command{
		Use:   "pull oci://HOST/NAME:TAG DIR",
		Short: "Fetch a package from a registry, whole",
		Long: `Makes a folder of a package in an OCI registry, as it was pushed, and verifies every byte. Until it is whole the folder is called DIR.partial:
a pull that was interrupted is made again, and goes on where it was. To start a VM before it has been fetched: drafter run.

` + credentialsHelp + `

Exit statuses: 0 done; 1 it failed; 2 the command line cannot be used; 130 ended by a signal.`,
		Example: `  drafter pull oci://registry.example/vms/web:1 out/web
  drafter pull oci://registry.example/vms/web@sha256:0123… out/web`,
		Args: twoArgs("the package, as oci://HOST/NAME:TAG, and the folder to make"),
		RunE: func(cmd *cobra.Command, args []string) error {
			ref, err := parseReference(args[0])
			if err != nil {
				return err
			}
			open, err := flags.options(cmd.Context(), cmd.Flags())
			if err != nil {
				return err
			}
			show := newStages(cmd.ErrOrStderr())
			start := time.Now()
			pulled, err := registry.Pull(cmd.Context(), ref, args[1], registry.PullOptions{OpenOptions: open, Progress: show.registry})
			show.end()
			if err != nil {
				return interrupted(cmd, err)
			}
			already := ""
			if pulled.Present > 0 {
				already = fmt.Sprintf(", and %s were here", humanize.IBytes(uint64(pulled.Present)))
			}
			fmt.Fprintf(cmd.ErrOrStderr(), "Pulled to %s in %.1f s: %s came for %s of content%s\n", args[1], time.Since(start).Seconds(), humanize.IBytes(uint64(pulled.Fetched)),
				humanize.IBytes(uint64(pulled.Data)), already)
			fmt.Fprintln(cmd.OutOrStdout(), pulled.Reference)
			return nil
		},
	}
	flags.alone(cmd.Flags())
	return cmd
}

// notOfRun are flags of a peer that say where else an instance comes from.
var notOfRun = []string{"restore", "package", "devices", "raddr", "accept", "parent", "rollback", "verify"}

func newRunCommand() *cobra.Command {
	opts := peerOptions{}
	opts.run = true
	cmd := refuseMachineFlags(peerCommand(&opts, &cobra.Command{
		Use:   "run oci://HOST/NAME:TAG",
		Short: "Start a VM from a package in a registry, before it has been fetched",
		Long: `Starts an instance of a package in an OCI registry: as soon as the state of its machine is here. What the guest touches of its memory and disks is
fetched first, and the rest behind it, into the folder --instance, which is a package of its own then. The same command goes on with what is in
that folder: a VM whose peer was killed, a fetch that was interrupted, an instance that was closed.

It is drafter peer with --restore and --package, which has more to say of all the flags.

` + credentialsHelp + `

Exit statuses: as of drafter peer.`,
		Example: `  drafter run oci://registry.example/vms/web:1
  drafter run oci://registry.example/vms/web:1 --instance out/web-2 --netns ark1 --laddr localhost:1337`,
		Args: oneArg("the package, as oci://HOST/NAME:TAG"),
	}))
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		for _, name := range notOfRun {
			if cmd.Flags().Changed(name) {
				return usageErrorf("--%s says where else an instance comes from: leave it out, or use drafter peer", name)
			}
		}
		ref, err := parseReference(args[0])
		if err != nil {
			return err
		}
		opts := opts
		opts.restore = ref.String()
		if opts.packagePath, opts.instance = opts.instance, ""; opts.packagePath == "" {
			opts.packagePath = filepath.Join("out", "instance-"+path.Base(ref.Repository))
			fmt.Fprintf(cmd.ErrOrStderr(), "Instance folder: %s\n", opts.packagePath)
		}
		return runPeer(cmd, opts)
	}
	for _, name := range notOfRun {
		cmd.Flags().Lookup(name).Hidden = true
	}
	cmd.Flags().Lookup("instance").Usage = "folder for the instance (default: out/instance-NAME)"
	return cmd
}
