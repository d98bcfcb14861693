package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"time"

	"github.com/drafter-vm/drafter/internal/testnet"
	"github.com/drafter-vm/drafter/pkg/forward"
	"github.com/drafter-vm/drafter/pkg/nat"
	"github.com/drafter-vm/drafter/pkg/nat/rule"
)

func natCase() benchCase {
	return benchCase{name: "nat", about: "256 network namespaces with NAT, made and removed", run: benchNAT}
}

func forwardCase() benchCase {
	return benchCase{name: "forward", about: "a client of another host through a forward to a guest's namespace, beside a DNAT rule that nft made", run: benchForward}
}

// within runs f in the network namespace of a host of a network made for it, which is removed afterwards.
func within(host string, f func(h *testnet.Hosts) error) (err error) {
	if err := needRoot(); err != nil {
		return err
	}
	h, err := testnet.NewHosts("bench-net", "a", "world")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, h.Close()) }()
	return testnet.Do(h.Host(host), func() error { return f(h) })
}

func benchNAT(ctx context.Context, b *bench) ([]Row, error) {
	count := 256
	if b.quick {
		count = 16
	}
	var made, removed []float64
	err := within("a", func(*testnet.Hosts) error {
		for i := range b.samples {
			began := time.Now()
			n, err := nat.Open(ctx, nat.Config{Prefix: "bn", Count: count})
			if err != nil {
				return err
			}
			made = append(made, time.Since(began).Seconds())
			began = time.Now()
			if err := n.Close(ctx); err != nil {
				return err
			}
			removed = append(removed, time.Since(began).Seconds())
			b.say("nat: %d/%d: %d namespaces made in %.2f s, removed in %.2f s", i+1, b.samples, count, made[i], removed[i])
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return []Row{
		newRow("nat", "256 namespaces made", "s", less, made, nil, "", atMost(10, "s")),
		newRow("nat", "256 namespaces removed", "s", less, removed, nil, "", goal{}),
	}, nil
}

// benchForward has a namespace of a guest at the end of the tap's place, at the kernel's speed: what is compared is the way there.
func benchForward(ctx context.Context, b *bench) ([]Row, error) {
	const port, ours, plain = 5201, 3333, 4444
	seconds := 3
	if b.quick {
		seconds = 1
	}
	var rates [2][]float64
	err := within("a", func(h *testnet.Hosts) (err error) {
		n, err := nat.Open(ctx, nat.Config{Prefix: "bf", Count: 1})
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, n.Close(context.WithoutCancel(ctx))) }()
		ns := n.Namespaces()[0]
		f, err := forward.Open(ctx, forward.Config{}, []forward.Forward{{Netns: ns.Name, InternalPort: port, Protocol: rule.TCP, External: fmt.Sprintf("0.0.0.0:%d", ours)}})
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, f.Close(context.WithoutCancel(ctx))) }()
		guest := ns.Name + "-guest"
		defer exec.Command("ip", "netns", "delete", guest).Run()
		script := fmt.Sprintf(`ip netns add %[1]s
ip -n %[2]s link delete tap0
ip -n %[2]s link add tap0 address 02:0e:d9:fd:68:3d type veth peer name eth0 netns %[1]s
ip -n %[2]s address add 172.16.0.1/30 dev tap0
ip -n %[2]s link set tap0 up
ip -n %[1]s address add 172.16.0.2/30 dev eth0
ip -n %[1]s link set eth0 up
ip -n %[1]s route add default via 172.16.0.1
nft add table ip plain
nft 'add chain ip plain pre { type nat hook prerouting priority dstnat; }'
nft add rule ip plain pre tcp dport %[3]d dnat to %[4]s:%[5]d`, guest, ns.Name, plain, ns.Inside, port)
		if out, err := exec.CommandContext(ctx, "sh", "-ec", script).CombinedOutput(); err != nil {
			return fmt.Errorf("prepare a guest: %w: %s", err, out)
		}
		server := exec.CommandContext(ctx, "ip", "netns", "exec", guest, "iperf3", "-s", "-p", fmt.Sprint(port))
		if err := server.Start(); err != nil {
			return err
		}
		defer server.Wait()
		defer server.Process.Kill()
		for i := range b.samples {
			for way, p := range []int{ours, plain} {
				rate, err := iperf(ctx, h.Host("world"), h.Addr4("a").String(), p, seconds)
				if err != nil {
					return err
				}
				rates[way] = append(rates[way], rate)
			}
			b.say("forward: %d/%d: %.1f Gbit/s, plain DNAT %.1f Gbit/s", i+1, b.samples, rates[0][i], rates[1][i])
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return []Row{newRow("forward", "throughput", "Gbit/s", more, rates[0], rates[1], "plain DNAT", ratioAtLeast(0.9))}, nil
}

// iperf measures what a client in a namespace sends to an address, in Gbit/s. The server may not listen yet.
func iperf(ctx context.Context, namespace, host string, port, seconds int) (float64, error) {
	type report struct {
		End struct {
			Received struct {
				Rate float64 `json:"bits_per_second"`
			} `json:"sum_received"`
		} `json:"end"`
	}
	var failed error
	for range 50 {
		out, err := exec.CommandContext(ctx, "ip", "netns", "exec", namespace, "iperf3", "-J", "-c", host, "-p", fmt.Sprint(port), "-t", fmt.Sprint(seconds)).Output()
		var r report
		if err == nil {
			err = json.Unmarshal(out, &r)
		}
		if err == nil && r.End.Received.Rate > 0 {
			return r.End.Received.Rate / 1e9, nil
		}
		if failed = errors.Join(errors.New("iperf3 does not measure"), err, fmt.Errorf("it says %.300s", out)); ctx.Err() != nil {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	return 0, failed
}
