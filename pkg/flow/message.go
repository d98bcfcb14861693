package flow

import (
	"bufio"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
)

// Between two places go frames: a byte with the kind, 3 bytes with the length of what follows, big-endian, and that. A packet is the
// header of virtio-net (struct virtio_net_hdr, 10 bytes, of the machine's order) and an IP packet, as the kernel's TUN has it; a message
// is JSON.
const (
	frameHeader = 4
	framePacket = 1
	frameSay    = 2
	framePing   = 3

	// maxFrame is the largest payload, in bytes: a packet of 64 KiB, which the kernel cuts to size, with its header.
	maxFrame = 1<<16 + 64
)

var errMalformed = errors.New("malformed frame")

// appendFrame appends a frame.
func appendFrame(b []byte, kind byte, payload []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(kind)<<24|uint32(len(payload)))
	return append(b, payload...)
}

// readFrame reads a frame into b, which has maxFrame bytes, and returns its payload.
func readFrame(r *bufio.Reader, b []byte) (kind byte, payload []byte, err error) {
	var h [frameHeader]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return 0, nil, err
	}
	n := binary.BigEndian.Uint32(h[:]) & (1<<24 - 1)
	switch kind = h[0]; {
	case kind < framePacket || kind > framePing:
		return 0, nil, fmt.Errorf("%w: kind %d", errMalformed, kind)
	case n > maxFrame:
		return 0, nil, fmt.Errorf("%w: %d bytes", errMalformed, n)
	}
	if _, err := io.ReadFull(r, b[:n]); err != nil {
		return 0, nil, err
	}
	return kind, b[:n], nil
}

// message is what one place says to another. One with a number is answered by one with the same, and Answer set.
type message struct {
	Number uint64 `json:"number,omitempty"`
	Answer bool   `json:"answer,omitempty"`
	Error  string `json:"error,omitempty"` // of an answer

	Say     verb      `json:"say,omitempty"`
	Place   uint32    `json:"place,omitempty"`
	Address string    `json:"address,omitempty"`
	Flows   []flow    `json:"flows,omitempty"`
	VXLAN   *vxlanEnd `json:"vxlan,omitempty"`
	Carry   bool      `json:"carry,omitempty"`
	Via     uint32    `json:"via,omitempty"`
}

type verb string

const (
	sayPoint    verb = "point"  // to an owner: the guest is about to go to Place, which listens at Address: be connected with it
	sayFollow   verb = "follow" // to an owner: the guest is at Place
	sayForget   verb = "forget" // to an owner: it is not going to Place after all
	sayRelay    verb = "relay"  // to the destination, or the guest's place: Place is reached through Via, or me, while it is not connected with you
	sayHere     verb = "here"   // to any: I am reached at Address from now on
	sayFlows    verb = "flows"  // to the destination: these connections are the guest's
	sayGone     verb = "gone"   // to whoever has the guest: I own no connection any more
	sayEnd      verb = "end"    // to all: the guest is no more
	sayVXLAN    verb = "vxlan"  // to all: I am reached by VXLAN there; the answer says where you are
	sayCarry    verb = "carry"  // to all: send me packets by VXLAN, or not any more
	maxPerFrame      = 300      // flows
	helloText        = "drafter flow 1"
)

// flow is a connection as the guest's side of a NAT sees it.
type flow struct {
	Protocol uint8          `json:"p"`
	From     netip.AddrPort `json:"f"` // who began it
	To       netip.AddrPort `json:"t"`
	Owner    uint32         `json:"o"`
	Timeout  uint32         `json:"s"` // seconds until the entry ends by itself
	State    uint8          `json:"c"` // of TCP, as conntrack has it
}

// hello is the first message of each side of a connection.
type hello struct {
	Hello string `json:"hello"`
	VM    string `json:"vm"`
	From  uint32 `json:"from"`
	To    uint32 `json:"to"`
	Nonce string `json:"nonce"`
}

// proof is the second: that it has the VM's key.
type proof struct {
	Proof string `json:"proof"`
}

func nonce() string { return rand.Text() }

// prove is the HMAC-SHA256 (RFC 2104), keyed with the VM's key, of who speaks to whom, and what both have chosen by chance for this
// connection.
func prove(key string, from, to uint32, theirs, ours string) string {
	h := hmac.New(sha256.New, []byte(key))
	fmt.Fprintf(h, "%s %d %d %s %s", helloText, from, to, theirs, ours)
	return hex.EncodeToString(h.Sum(nil))
}

func proves(p, key string, from, to uint32, theirs, ours string) bool {
	return hmac.Equal([]byte(p), []byte(prove(key, from, to, theirs, ours)))
}

// sayJSON writes a value as one message.
func sayJSON(w io.Writer, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if len(b) > maxFrame {
		return fmt.Errorf("message of %d bytes: at most %d fit", len(b), maxFrame)
	}
	_, err = w.Write(appendFrame(nil, frameSay, b))
	return err
}

// hearJSON reads one message.
func hearJSON(r *bufio.Reader, v any) error {
	kind, b, err := readFrame(r, make([]byte, maxFrame))
	if err != nil {
		return err
	}
	if kind != frameSay {
		return fmt.Errorf("%w: kind %d where a message was due", errMalformed, kind)
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%w: %w", errMalformed, err)
	}
	return nil
}
