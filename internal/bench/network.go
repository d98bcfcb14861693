package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"time"

	"github.com/drafter-vm/drafter/internal/testnet"
	"github.com/drafter-vm/drafter/pkg/flow"
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

func tunnelCase() benchCase {
	return benchCase{name: "tunnel", about: "a client of the host that a guest has left, to where the guest is now, beside one of a guest that is still there", run: benchTunnel}
}

// within runs f in the network namespace of a host of a network made for it, which is removed afterwards.
func within(host string, f func(h *testnet.Hosts) error) (err error) {
	if err := needRoot(); err != nil {
		return err
	}
	h, err := testnet.NewHosts("bench-net", "a", "b", "world")
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
		end, err := serveIn(ctx, ns, port)
		if err != nil {
			return err
		}
		defer end()
		if err := script(ctx, `nft add table ip plain
nft 'add chain ip plain pre { type nat hook prerouting priority dstnat; }'
nft add rule ip plain pre tcp dport %d dnat to %s:%d`, plain, ns.Inside, port); err != nil {
			return err
		}
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

// serveIn runs iperf3 in a namespace at the end of a guest's place, until end is called.
func serveIn(ctx context.Context, ns nat.Namespace, port int) (end func(), err error) {
	guest := ns.Name + "-guest"
	remove := func() { _ = exec.Command("ip", "netns", "delete", guest).Run() }
	if err := script(ctx, `ip netns add %[1]s
ip -n %[2]s link delete tap0
ip -n %[2]s link add tap0 address 02:0e:d9:fd:68:3d type veth peer name eth0 netns %[1]s
ip -n %[2]s address add 172.16.0.1/30 dev tap0
ip -n %[2]s link set tap0 up
ip -n %[1]s address add 172.16.0.2/30 dev eth0
ip -n %[1]s link set eth0 up
ip -n %[1]s route add default via 172.16.0.1`, guest, ns.Name); err != nil {
		remove()
		return nil, err
	}
	server := exec.CommandContext(ctx, "ip", "netns", "exec", guest, "iperf3", "-s", "-p", fmt.Sprint(port))
	if err := server.Start(); err != nil {
		remove()
		return nil, err
	}
	return func() {
		_ = server.Process.Kill()
		_ = server.Wait()
		remove()
	}, nil
}

// script runs a script of the shell, which ends at the first failure.
func script(ctx context.Context, format string, args ...any) error {
	if out, err := exec.CommandContext(ctx, "sh", "-ec", fmt.Sprintf(format, args...)).CombinedOutput(); err != nil {
		return fmt.Errorf("prepare a network: %w: %s", err, out)
	}
	return nil
}

// benchTunnel has a client come through the host that a guest has left, whose packets go on to where it is: by the peers' connection, which is
// plain TCP here, or by VXLAN. The reference is a guest that is still at that host.
func benchTunnel(ctx context.Context, b *bench) ([]Row, error) {
	const port, idle = 5201, 5202
	seconds := 3
	if b.quick {
		seconds = 1
	}
	const stream, vxlan, home = 0, 1, 2 // guests, whose forwards are at 3330 and on
	var rates [3][]float64
	err := within("a", func(h *testnet.Hosts) (err error) {
		var undo []func() error
		defer func() {
			for _, f := range slices.Backward(undo) {
				err = errors.Join(err, f())
			}
		}()
		clean := context.WithoutCancel(ctx)
		var spaces [2][]nat.Namespace
		for i, host := range []string{"a", "b"} {
			if err := testnet.Do(h.Host(host), func() error {
				n, err := nat.Open(ctx, nat.Config{Prefix: "bt" + host, Count: 3})
				if err == nil {
					spaces[i] = n.Namespaces()
					undo = append(undo, func() error { return n.Close(clean) })
				}
				return err
			}); err != nil {
				return err
			}
		}
		var forwards []forward.Forward
		for guest, ns := range spaces[0] {
			forwards = append(forwards,
				forward.Forward{Netns: ns.Name, InternalPort: port, Protocol: rule.TCP, External: fmt.Sprintf("0.0.0.0:%d", 3330+guest)},
				forward.Forward{Netns: ns.Name, InternalPort: idle, Protocol: rule.TCP, External: fmt.Sprintf("0.0.0.0:%d", 3340+guest)})
		}
		f, err := forward.Open(ctx, forward.Config{}, forwards)
		if err != nil {
			return err
		}
		undo = append(undo, func() error { return f.Close(clean) })
		for guest, ns := range spaces[0] {
			at := ns
			if guest != home {
				at = spaces[1][guest]
			}
			end, err := serveIn(ctx, at, port)
			if err != nil {
				return err
			}
			undo = append(undo, func() error { end(); return nil })
			if guest == home {
				continue
			}
			var keepers [2]*flow.Keeper
			for i, host := range []string{"a", "b"} {
				cfg := flow.Config{Netns: spaces[i][guest].Name, Logger: slog.New(slog.DiscardHandler), Dial: func(ctx context.Context, address string) (net.Conn, error) {
					return testnet.DialContext(ctx, h.Host(host), "tcp", address)
				}}
				if guest == vxlan {
					cfg.VXLAN = netip.AddrPortFrom(h.Addr4(host), flow.VXLANPort)
				}
				if err := testnet.Do(h.Host(host), func() (err error) {
					if cfg.Listen, err = net.Listen("tcp4", h.Addr4(host).String()+":0"); err != nil {
						return err
					}
					cfg.Address = cfg.Listen.Addr().String()
					keepers[i], err = flow.Open(ctx, cfg)
					return err
				}); err != nil {
					return err
				}
				undo = append(undo, keepers[i].Close)
			}
			if err := moveTo(ctx, keepers[0], keepers[1]); err != nil {
				return err
			}
			undo = append(undo, keepers[1].End)
			// What is kept ends with its last connection.
			err = testnet.Do(at.Name+"-guest", func() error {
				l, err := net.Listen("tcp", fmt.Sprintf(":%d", idle))
				if err == nil {
					undo = append(undo, l.Close)
				}
				return err
			})
			if err != nil {
				return err
			}
			conn, err := testnet.DialContext(ctx, h.Host("world"), "tcp", fmt.Sprintf("%s:%d", h.Addr4("a"), 3340+guest))
			if err != nil {
				return err
			}
			undo = append(undo, conn.Close)
			for end := time.Now().Add(10 * time.Second); guest == vxlan; time.Sleep(100 * time.Millisecond) {
				places, err := keepers[0].Places()
				if err != nil {
					return err
				}
				if len(places) == 1 && places[0].VXLAN {
					break
				}
				if time.Now().After(end) {
					return errors.New("packets do not go by VXLAN")
				}
			}
		}
		for i := range b.samples {
			for _, guest := range []int{stream, vxlan, home} {
				rate, err := iperf(ctx, h.Host("world"), h.Addr4("a").String(), 3330+guest, seconds)
				if err != nil {
					return err
				}
				rates[guest] = append(rates[guest], rate)
			}
			b.say("tunnel: %d/%d: %.1f Gbit/s, by VXLAN %.1f Gbit/s, before the move %.1f Gbit/s", i+1, b.samples, rates[stream][i], rates[vxlan][i], rates[home][i])
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return []Row{
		newRow("tunnel", "throughput after a move", "Gbit/s", more, rates[stream], rates[home], "before it", goal{}),
		newRow("tunnel", "throughput after a move, VXLAN", "Gbit/s", more, rates[vxlan], rates[home], "before it", goal{}),
	}, nil
}

// moveTo moves a guest that begins at one place to another, as far as its network is concerned.
func moveTo(ctx context.Context, from, to *flow.Keeper) error {
	if _, err := from.Start(); err != nil {
		return err
	}
	answer, err := to.Accept(from.Offer())
	if err != nil {
		return err
	}
	if err := from.Connect(ctx, answer); err != nil {
		return err
	}
	if err := from.Divert(); err != nil {
		return err
	}
	if _, err := from.Hand(ctx); err != nil {
		return err
	}
	if err := to.Arrive(); err != nil {
		return err
	}
	return from.Left()
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
