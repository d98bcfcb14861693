package rule

import (
	"encoding/binary"
	"net"
	"net/netip"

	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Part narrows what a rule matches, or says what happens.
type Part []expr.Any

// Rule is what happens to which packets.
type Rule []expr.Any

// Of is the rule of these parts, in their order.
func Of(parts ...Part) Rule {
	var r Rule
	for _, p := range parts {
		r = append(r, p...)
	}
	return r
}

// Registers of the kernel's rule machine. Every part loads what it compares, so parts can share them.
const (
	register = unix.NFT_REG_1
	second   = unix.NFT_REG_2
)

func equal(key expr.MetaKey, value []byte) Part {
	return Part{&expr.Meta{Key: key, Register: register}, &expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: value}}
}

// name is an interface's name as the kernel compares it.
func name(s string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, s)
	return b
}

// In matches what comes in by the interface of that name, Out what goes out by it.
func In(iface string) Part { return equal(expr.MetaKeyIIFNAME, name(iface)) }

// Out: see In.
func Out(iface string) Part { return equal(expr.MetaKeyOIFNAME, name(iface)) }

// NotIn is the contrary of In.
func NotIn(iface string) Part {
	return Part{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: register}, &expr.Cmp{Op: expr.CmpOpNeq, Register: register, Data: name(iface)}}
}

// NotOut is the contrary of Out.
func NotOut(iface string) Part {
	return Part{&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: register}, &expr.Cmp{Op: expr.CmpOpNeq, Register: register, Data: name(iface)}}
}

// InSet matches what comes in by an interface of the set, OutSet what goes out by one.
func InSet(set string) Part {
	return Part{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: register}, &expr.Lookup{SourceRegister: register, SetName: set}}
}

// OutSet matches what goes out by an interface of the set.
func OutSet(set string) Part {
	return Part{&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: register}, &expr.Lookup{SourceRegister: register, SetName: set}}
}

// IPv4 and IPv6 match packets of that family.
func IPv4() Part { return equal(expr.MetaKeyNFPROTO, []byte{unix.NFPROTO_IPV4}) }

// IPv6: see IPv4.
func IPv6() Part { return equal(expr.MetaKeyNFPROTO, []byte{unix.NFPROTO_IPV6}) }

// family matches packets of an address's family.
func family(a netip.Addr) Part {
	if a.Is4() {
		return IPv4()
	}
	return IPv6()
}

// Offsets of the addresses in the headers of IPv4 (RFC 791) and IPv6 (RFC 8200), in bytes.
const (
	source4, destination4 = 12, 16
	source6, destination6 = 8, 24
)

// From matches packets that come from an address of the prefix, To those that go to one.
func From(p netip.Prefix) Part { return address(p, source4, source6, expr.CmpOpEq) }

// To: see From.
func To(p netip.Prefix) Part { return address(p, destination4, destination6, expr.CmpOpEq) }

// NotFrom matches packets of the prefix's family that come from elsewhere.
func NotFrom(p netip.Prefix) Part { return address(p, source4, source6, expr.CmpOpNeq) }

// NotTo matches packets of the prefix's family that go elsewhere.
func NotTo(p netip.Prefix) Part { return address(p, destination4, destination6, expr.CmpOpNeq) }

func address(p netip.Prefix, offset4, offset6 uint32, op expr.CmpOp) Part {
	p = p.Masked()
	a := p.Addr()
	offset, size := offset6, uint32(16)
	if a.Is4() {
		offset, size = offset4, 4
	}
	part := append(family(a), &expr.Payload{DestRegister: register, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: size})
	if p.Bits() < a.BitLen() {
		mask := make([]byte, size)
		for bit := range p.Bits() {
			mask[bit/8] |= 0x80 >> (bit % 8)
		}
		part = append(part, &expr.Bitwise{SourceRegister: register, DestRegister: register, Len: size, Mask: mask, Xor: make([]byte, size)})
	}
	return append(part, &expr.Cmp{Op: op, Register: register, Data: a.AsSlice()})
}

// FromMAC matches packets from an Ethernet address. It goes after [In], of an interface of Ethernet.
func FromMAC(mac net.HardwareAddr) Part {
	const source = 6 // behind the destination, in a frame's header
	return Part{
		&expr.Payload{DestRegister: register, Base: expr.PayloadBaseLLHeader, Offset: source, Len: 6},
		&expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: mac},
	}
}

// Host is the prefix of one address.
func Host(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// Protocol is a transport protocol by its number of IANA.
type Protocol byte

// The protocols that have ports.
const (
	TCP Protocol = unix.IPPROTO_TCP
	UDP Protocol = unix.IPPROTO_UDP
)

// Is matches packets of a transport protocol.
func Is(p Protocol) Part { return equal(expr.MetaKeyL4PROTO, []byte{byte(p)}) }

// ToPort matches packets of TCP or UDP to that port. It goes after [Is].
func ToPort(port uint16) Part {
	return Part{
		&expr.Payload{DestRegister: register, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: binaryutil.BigEndian.PutUint16(port)},
	}
}

// ToLocal matches packets to any address of this host.
func ToLocal() Part {
	return Part{
		&expr.Fib{Register: register, FlagDADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)},
	}
}

// Bits of a connection's state, as conntrack has them.
const (
	Invalid     uint32 = expr.CtStateBitINVALID
	Established uint32 = expr.CtStateBitESTABLISHED
	Related     uint32 = expr.CtStateBitRELATED
	New         uint32 = expr.CtStateBitNEW
)

// State matches packets of connections in one of these states.
func State(bits uint32) Part { return bitsOf(expr.CtKeySTATE, bits, expr.CmpOpNeq) }

// Of IPS_… of the kernel's nf_conntrack_common.h.
const (
	statusConfirmed = 1 << 3
	statusDNAT      = 1 << 5
)

// Unknown matches packets that begin a connection, as far as conntrack knows: it has none for them yet. Packets of one that was not answered
// yet are [New], too, but not unknown.
func Unknown() Part { return bitsOf(expr.CtKeySTATUS, statusConfirmed, expr.CmpOpEq) }

// Redirected matches packets of connections whose destination was translated; NotRedirected those of others.
func Redirected() Part { return bitsOf(expr.CtKeySTATUS, statusDNAT, expr.CmpOpNeq) }

// NotRedirected: see Redirected.
func NotRedirected() Part { return bitsOf(expr.CtKeySTATUS, statusDNAT, expr.CmpOpEq) }

func bitsOf(key expr.CtKey, bits uint32, op expr.CmpOp) Part {
	return Part{
		&expr.Ct{Key: key, Register: register},
		&expr.Bitwise{SourceRegister: register, DestRegister: register, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(bits), Xor: make([]byte, 4)},
		&expr.Cmp{Op: op, Register: register, Data: make([]byte, 4)},
	}
}

// Untracked has packets pass conntrack by: they belong to no connection, and are not translated. It is for chains at [Raw].
func Untracked() Part { return Part{&expr.Notrack{}} }

// Remember puts a packet's connection into a [FlowSet], and matches. InFlows matches packets in the direction of those that have put theirs there.
// Both match packets of the set's family only.
func Remember(s FlowSet) Part {
	return append(s.key(), &expr.Dynset{SrcRegKey: unix.NFT_REG32_00, SetName: s.Name, Operation: uint32(unix.NFT_DYNSET_OP_UPDATE)})
}

// InFlows: see Remember.
func InFlows(s FlowSet) Part {
	return append(s.key(), &expr.Lookup{SourceRegister: unix.NFT_REG32_00, SetName: s.Name})
}

// key loads what the connections of a set are told apart by, but for the destination's address, into consecutive registers of 32 bits.
func (s FlowSet) key() Part {
	family, source, size := IPv4(), uint32(source4), uint32(4)
	if s.IPv6 {
		family, source, size = IPv6(), source6, 16
	}
	port := uint32(unix.NFT_REG32_01) + size/4
	return append(family,
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: unix.NFT_REG32_00},
		&expr.Payload{DestRegister: unix.NFT_REG32_01, Base: expr.PayloadBaseNetworkHeader, Offset: source, Len: size},
		&expr.Payload{DestRegister: port, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 2},
		&expr.Payload{DestRegister: port + 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
	)
}

// Marked matches packets of connections with any mark but 0.
func Marked() Part {
	return Part{&expr.Ct{Key: expr.CtKeyMARK, Register: register}, &expr.Cmp{Op: expr.CmpOpNeq, Register: register, Data: make([]byte, 4)}}
}

// Unmarked matches packets of connections with the mark 0.
func Unmarked() Part {
	return Part{&expr.Ct{Key: expr.CtKeyMARK, Register: register}, &expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: make([]byte, 4)}}
}

// CopyMark gives a packet the mark of its connection, by which it is routed.
func CopyMark() Part {
	return Part{&expr.Ct{Key: expr.CtKeyMARK, Register: register}, &expr.Meta{Key: expr.MetaKeyMARK, Register: register, SourceRegister: true}}
}

// Mark gives a packet's connection a mark.
func Mark(mark uint32) Part {
	return Part{
		&expr.Immediate{Register: register, Data: binaryutil.NativeEndian.PutUint32(mark)},
		&expr.Ct{Key: expr.CtKeyMARK, Register: register, SourceRegister: true},
	}
}

// Accept lets a packet go on; Drop ends it.
func Accept() Part { return Part{&expr.Verdict{Kind: expr.VerdictAccept}} }

// Drop: see Accept.
func Drop() Part { return Part{&expr.Verdict{Kind: expr.VerdictDrop}} }

// FromAddress translates the source of a connection to an address.
func FromAddress(a netip.Addr) Part {
	return Part{
		&expr.Immediate{Register: register, Data: a.AsSlice()},
		&expr.NAT{Type: expr.NATTypeSourceNAT, Family: nfproto(a), RegAddrMin: register, RegAddrMax: register},
	}
}

// ToAddress translates the destination of a connection to an address, and to a port if that is not 0.
func ToAddress(a netip.Addr, port uint16) Part {
	part := Part{&expr.Immediate{Register: register, Data: a.AsSlice()}}
	nat := &expr.NAT{Type: expr.NATTypeDestNAT, Family: nfproto(a), RegAddrMin: register, RegAddrMax: register}
	if port != 0 {
		part = append(part, &expr.Immediate{Register: second, Data: binary.BigEndian.AppendUint16(nil, port)})
		nat.RegProtoMin, nat.RegProtoMax = second, second
	}
	return append(part, nat)
}

func nfproto(a netip.Addr) uint32 {
	if a.Is4() {
		return unix.NFPROTO_IPV4
	}
	return unix.NFPROTO_IPV6
}

// Masquerade translates the source of a connection to the address of the interface that it leaves by.
func Masquerade() Part { return Part{&expr.Masq{}} }

// optionMSS is TCP's option for the size of segments (RFC 9293, 3.2), whose value is 2 bytes behind kind and length.
const optionMSS = 2

// ClampSegments has both ends of a TCP connection agree on segments of at most size bytes: it matches packets that begin a connection
// and say more, and changes them.
func ClampSegments(size uint16) Part {
	const flagsOffset, synOrReset = 13, 0x02 | 0x04
	return append(Is(TCP),
		&expr.Payload{DestRegister: register, Base: expr.PayloadBaseTransportHeader, Offset: flagsOffset, Len: 1},
		&expr.Bitwise{SourceRegister: register, DestRegister: register, Len: 1, Mask: []byte{synOrReset}, Xor: []byte{0}},
		&expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: []byte{0x02}},
		&expr.Exthdr{DestRegister: register, Type: optionMSS, Offset: 2, Len: 2, Op: expr.ExthdrOpTcpopt},
		&expr.Cmp{Op: expr.CmpOpGt, Register: register, Data: binaryutil.BigEndian.PutUint16(size)},
		&expr.Immediate{Register: register, Data: binaryutil.BigEndian.PutUint16(size)},
		&expr.Exthdr{SourceRegister: register, Type: optionMSS, Offset: 2, Len: 2, Op: expr.ExthdrOpTcpopt},
	)
}
