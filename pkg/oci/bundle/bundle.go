package bundle

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
)

// Names of the parts of a bundle, as the runtime specification has them, and the label of a bundle disk.
const (
	ConfigFile = "config.json"
	RootFolder = "rootfs"
	Label      = "oci"
)

// SpecVersion is the version of the runtime specification that config.json says it follows. Runtimes refuse versions that are newer than they are, as
// crun of Debian 12 does, whatever fields are used: those of a bundle are in the first one that is in use anywhere.
const SpecVersion = "1.0.2"

// Annotations of config.json, each of which may be absent.
const (
	NameAnnotation    = "org.drafter.name"    // what the container is called in the guest; else as the disk's device
	RestartAnnotation = "org.drafter.restart" // see [ParseRestart]
	ReadyAnnotation   = "org.drafter.ready"   // see [ParseReady]
)

// Restart says when a container that has ended is started again.
type Restart struct {
	Always    bool // whatever its exit status
	OnFailure bool // if its exit status was not 0
	Max       int  // of OnFailure, how often at most, one after another; 0: without end
}

// ParseRestart reads "no", "always", "on-failure" or "on-failure:N". Empty is on-failure: a virtual machine whose server has failed has nothing else to do.
func ParseRestart(s string) (Restart, error) {
	name, count, counted := strings.Cut(s, ":")
	switch {
	case s == "no":
		return Restart{}, nil
	case s == "always" || s == "unless-stopped":
		return Restart{Always: true}, nil
	case s == "" || s == "on-failure":
		return Restart{OnFailure: true}, nil
	case name == "on-failure" && counted:
		if n, err := strconv.Atoi(count); err == nil && n > 0 {
			return Restart{OnFailure: true, Max: n}, nil
		}
	}
	return Restart{}, fmt.Errorf("restart %q: use no, on-failure, on-failure:N or always", s)
}

// Ready says when a container counts as up. The zero value: as soon as its process runs.
type Ready struct {
	Port   int            // it accepts TCP connections on this port of the guest
	Log    *regexp.Regexp // it has written a line that matches
	Notify bool           // it says READY=1 to the socket in NOTIFY_SOCKET, as sd_notify(3) does
}

// ParseReady reads "port:N", "log:REGEXP" (RE2), "notify", or "started", which is also the empty one.
func ParseReady(s string) (Ready, error) {
	kind, value, _ := strings.Cut(s, ":")
	switch {
	case s == "" || s == "started":
		return Ready{}, nil
	case s == "notify":
		return Ready{Notify: true}, nil
	case kind == "port":
		if n, err := strconv.Atoi(value); err == nil && n > 0 && n < 1<<16 {
			return Ready{Port: n}, nil
		}
		return Ready{}, fmt.Errorf("ready %q: a port is a number from 1 to 65535", s)
	case kind == "log" && value != "":
		re, err := regexp.Compile(value)
		if err != nil {
			return Ready{}, fmt.Errorf("ready %q: %w", s, err)
		}
		return Ready{Log: re}, nil
	}
	return Ready{}, fmt.Errorf("ready %q: use started, port:N, log:REGEXP or notify", s)
}
