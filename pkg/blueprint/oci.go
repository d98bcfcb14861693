package blueprint

// A guest of containers has a runtime (crun), and a service that runs with it what is on disks that hold an OCI runtime bundle each: see package
// pkg/oci/supervise, which is part of the guest's program. What it needs of the kernel is there in any guest: control groups of version 2, which systemd mounts; overlayfs, by the
// initrd; seccomp and namespaces, built in.

// ociPackages are what a guest of containers has besides. ociVersion is raised with every change of them, as it makes locks stale.
var ociPackages = []string{"crun"}

const ociVersion = "oci-1"

// containers installs the service that runs containers, if that is wanted.
func (s *system) containers() error {
	if !s.cfg.OCI {
		return nil
	}
	if err := s.WriteFile("/lib/systemd/system/drafter-containers.service", containersUnit, 0o644); err != nil {
		return err
	}
	return enableUnit(s.Tree, "drafter-containers.service")
}

// containersUnit has started once all containers are ready: the guest counts as alive then, and no earlier. How long that may take is for whoever waits for the
// guest to say. The supervisor ends its containers itself, and the journal is not to forget lines of one that writes many.
const containersUnit = `[Unit]
Description=Containers, of disks that hold an OCI bundle
After=local-fs.target network.target drafter-network.service
Before=drafter-liveness.service
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=main
ExecStart=/usr/bin/drafter-agent containers
LogRateLimitIntervalSec=0
Restart=always
RestartSec=1s
TimeoutStartSec=infinity
TimeoutStopSec=30s
KillMode=mixed
Delegate=yes
IgnoreSIGPIPE=no
OOMScoreAdjust=-900

[Install]
WantedBy=multi-user.target
`
