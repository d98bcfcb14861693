// Package bundle is what the host, which makes disks of OCI runtime bundles, and the guest, which runs them, agree on.
//
// A bundle disk is a file system with config.json, as the OCI runtime specification has it, and the folder rootfs at its root. Nothing else makes
// it one: its label is [Label] by convention only. What the specification has no place for is among the annotations of config.json:
//
//	"annotations": {
//		"org.drafter.name": "web",
//		"org.drafter.restart": "on-failure:3",
//		"org.drafter.ready": "port:8080"
//	}
//
// A mount of config.json whose source is LABEL=… or UUID=… is a file system on another disk of the machine, a volume.
package bundle
