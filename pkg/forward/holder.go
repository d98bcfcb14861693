package forward

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// holder names the program that has an address, or one that overlaps with it, as well as can be found out.
func (f *Forwarder) holder(network string, s spot) string {
	protocol := network[:3]
	var inodes []string
	_ = f.within(func() error {
		for _, table := range []string{protocol, protocol + "6"} {
			b, err := os.ReadFile("/proc/thread-self/net/" + table)
			if err != nil {
				continue
			}
			inodes = append(inodes, sockets(b, s)...)
		}
		return nil
	})
	if name := ownerOf(inodes); name != "" {
		return name
	}
	return "another program"
}

// sockets are the inodes of the sockets in a table of /proc/net (proc_pid_net(5)) that listen at an address or at one that overlaps.
func sockets(table []byte, s spot) (inodes []string) {
	for line := range bytes.Lines(table) {
		fields := strings.Fields(string(line))
		if len(fields) < 10 {
			continue
		}
		const established = "01"
		local, ok := parseLocal(fields[1])
		if !ok || fields[3] == established || local.Port() != s.port {
			continue
		}
		a := local.Addr().Unmap()
		if a == s.addr || a.IsUnspecified() || s.addr.IsUnspecified() {
			inodes = append(inodes, fields[9])
		}
	}
	return inodes
}

// parseLocal reads an address as /proc/net has it: words of 32 bits in the machine's order, which is little endian here.
func parseLocal(text string) (netip.AddrPort, bool) {
	host, port, ok := strings.Cut(text, ":")
	b, err := hex.DecodeString(host)
	n, e := strconv.ParseUint(port, 16, 16)
	if !ok || err != nil || e != nil || len(b) != 4 && len(b) != 16 {
		return netip.AddrPort{}, false
	}
	for word := range slices.Chunk(b, 4) {
		slices.Reverse(word)
	}
	a, _ := netip.AddrFromSlice(b)
	return netip.AddrPortFrom(a, uint16(n)), true
}

// ownerOf names a process that has one of these sockets.
func ownerOf(inodes []string) string {
	if len(inodes) == 0 {
		return ""
	}
	links, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, l := range links {
		to, err := os.Readlink(l)
		inode, ok := strings.CutPrefix(to, "socket:[")
		if err != nil || !ok || !slices.Contains(inodes, strings.TrimSuffix(inode, "]")) {
			continue
		}
		pid := strings.Split(l, "/")[2]
		name, _ := os.ReadFile("/proc/" + pid + "/comm")
		return fmt.Sprintf("process %s (%s)", pid, strings.TrimSpace(string(name)))
	}
	return ""
}
