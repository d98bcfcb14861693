package flow

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"
)

// TestFrames holds frames to bytes.
func TestFrames(t *testing.T) {
	var b bytes.Buffer
	if err := sayJSON(&b, message{Number: 1, Say: sayFlows, Flows: []flow{{6, netip.MustParseAddrPort("192.0.2.1:7"), netip.MustParseAddrPort("172.16.0.2:8"), 1, 300, 3}}}); err != nil {
		t.Fatal(err)
	}
	const text = `{"number":1,"say":"flows","flows":[{"p":6,"f":"192.0.2.1:7","t":"172.16.0.2:8","o":1,"s":300,"c":3}]}`
	if got, want := hex.EncodeToString(b.Bytes()), "02000065"+hex.EncodeToString([]byte(text)); got != want {
		t.Errorf("a message is %s, want %s", got, want)
	}
	if got := hex.EncodeToString(appendFrame(nil, framePing, nil)); got != "03000000" {
		t.Errorf("a ping is %s", got)
	}
	var m message
	if err := hearJSON(bufio.NewReader(&b), &m); err != nil || m.Say != sayFlows || len(m.Flows) != 1 {
		t.Errorf("it is read as %+v, %v", m, err)
	}
	for _, bad := range []string{"\x00\x00\x00\x00", "\x04\x00\x00\x00", "\x01\x01\x00\x41", "\x01\xff\xff\xff"} {
		if _, _, err := readFrame(bufio.NewReader(strings.NewReader(bad)), make([]byte, maxFrame)); !errors.Is(err, errMalformed) {
			t.Errorf("%q: got error %v", bad, err)
		}
	}
	if err := sayJSON(&b, message{Error: strings.Repeat("x", maxFrame)}); err == nil {
		t.Error("a message that is too large is sent")
	}
}

// TestHandshake: both sides prove to have the key, or nothing comes of it.
func TestHandshake(t *testing.T) {
	for _, c := range []struct {
		what        string
		dials, said string
		ok          bool
	}{{"the same key", "key", "key", true}, {"another key", "guess", "key", false}, {"no key", "", "key", false}} {
		t.Run(c.what, func(t *testing.T) {
			a, b := net.Pipe()
			done := make(chan error, 1)
			go func() {
				_, _, err := welcome(b, func(vm string, from, to uint32) (string, error) {
					if vm != "vm" || from != 1 || to != 2 {
						return "", errors.New("there is no such place here")
					}
					return c.said, nil
				})
				b.Close()
				done <- err
			}()
			_, err := greet(a, "vm", c.dials, 1, 2)
			a.Close()
			if there := <-done; (err == nil) != c.ok || (there == nil) != c.ok {
				t.Errorf("the one that dials says %v, the other one %v", err, there)
			}
		})
	}
	if proves(prove("key", 1, 2, "x", "y"), "key", 2, 1, "x", "y") || proves(prove("key", 1, 2, "x", "y"), "key", 1, 2, "y", "x") {
		t.Error("a proof is good for what it was not made for")
	}
}

func FuzzFrames(f *testing.F) {
	f.Add(appendFrame(nil, frameSay, []byte(`{"say":"flows","flows":[{"p":6,"f":"192.0.2.1:7","t":"172.16.0.2:8"}]}`)))
	f.Add(appendFrame(nil, framePacket, make([]byte, 50)))
	f.Add(appendFrame(nil, frameSay, []byte(`{"hello":"drafter flow 1","vm":"x","from":1,"to":2,"nonce":"y"}`)))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bufio.NewReader(bytes.NewReader(b))
		buffer := make([]byte, maxFrame)
		for {
			_, payload, err := readFrame(r, buffer)
			if err != nil {
				break
			}
			if len(payload) > maxFrame {
				t.Fatalf("payload of %d bytes", len(payload))
			}
		}
		var m message
		_ = hearJSON(bufio.NewReader(bytes.NewReader(b)), &m)
	})
}

// TestProbe holds a probe to bytes, and the names of places in VXLAN.
func TestProbe(t *testing.T) {
	b := appendProbe(nil, true, 0x010203, 4, 5)
	if got, want := hex.EncodeToString(b), hex.EncodeToString([]byte("drafter flow probe 1"))+"01"+"00010203"+"00000004"+"0000000000000005"; got != want {
		t.Errorf("a probe is %s, want %s", got, want)
	}
	if answer, from, to, number, ok := parseProbe(append(b, make([]byte, 1400)...)); !answer || from != 0x010203 || to != 4 || number != 5 || !ok {
		t.Errorf("it is read as %t, %d, %d, %d, %t", answer, from, to, number, ok)
	}
	if _, _, _, _, ok := parseProbe(b[:len(b)-1]); ok {
		t.Error("one that was cut short is read")
	}
	for place, want := range map[uint32][3]string{
		1:        {"02:64:66:00:00:01", "100.64.0.1", "fe80::6466:0:0:1"},
		maxPlace: {"02:64:66:10:00:00", "100.80.0.0", "fe80::6466:0:10:0"},
	} {
		got := [3]string{vxlanMAC(place).String(), gateway(place, netip.MustParseAddr("172.16.0.2")).String(), gateway(place, netip.MustParseAddr("fd00::2")).String()}
		if got != want {
			t.Errorf("place %d is %v, want %v", place, got, want)
		}
	}
	for end, want := range map[string]bool{
		`{"address":"192.0.2.1:4789","vni":1}`: true, `{"address":"[2001:db8::1]:4789","vni":16777215}`: true,
		`{"address":"0.0.0.0:4789","vni":1}`: false, `{"address":"224.0.0.1:4789","vni":1}`: false, `{"address":"192.0.2.1:0","vni":1}`: false,
		`{"address":"192.0.2.1:4789","vni":0}`: false, `{"address":"192.0.2.1:4789","vni":16777216}`: false, `{"address":"[fe80::1%eth0]:4789","vni":1}`: false, `{}`: false,
	} {
		var e vxlanEnd
		if err := json.Unmarshal([]byte(end), &e); err != nil || e.valid() != want {
			t.Errorf("%s: valid is %t, want %t (%v)", end, e.valid(), want, err)
		}
	}
}

func FuzzProbe(f *testing.F) {
	f.Add(appendProbe(nil, false, 1, 2, 3))
	f.Add([]byte(probeText))
	f.Fuzz(func(t *testing.T, b []byte) {
		answer, from, to, number, ok := parseProbe(b)
		if ok && !bytes.Equal(appendProbe(nil, answer, from, to, number), b[:probeSize]) {
			t.Errorf("%x is read as what is written otherwise", b)
		}
	})
}
