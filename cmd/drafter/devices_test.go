package main

import (
	"errors"
	"reflect"
	"strings"
	"testing"
)

type testDevice struct {
	Name      string `json:"name"`
	Path      string `json:"path"`
	BlockSize uint32 `json:"blockSize"`
	Shared    bool   `json:"shared"`
}

func TestDecodeDevices(t *testing.T) {
	got, err := decodeDevices[testDevice](` [{"name":"disk","path":"a/b","blockSize":65536}, {"shared":true,"name":"data-2"}] `)
	if err != nil {
		t.Fatal(err)
	}
	want := []testDevice{{Name: "disk", Path: "a/b", BlockSize: 65536}, {Name: "data-2", Shared: true}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func TestDecodeDevicesRefuses(t *testing.T) {
	for _, tt := range []struct{ flag, want string }{
		{``, `expected a JSON array`},
		{`{}`, `expected a JSON array`},
		{`null`, `expected a JSON array`},
		{`[]`, `the array is empty`},
		{`["disk"]`, `device number 1 to be an object, not disk`},
		{`[{"name":"disk"},{"name":"disk"}]`, `device "disk" is there twice`},
		{`[{"name":"disk","Path":"x"}]`, `device "disk": unknown key "Path"; known keys are name, path, blockSize, shared`},
		{`[{"path":"x","nome":"disk"}]`, `device number 1: unknown key "nome"`},
		{`[{"name":"disk","path":"x","path":"y"}]`, `device "disk": key "path" is there twice`},
		{`[{"path":"x"}]`, `device number 1 has no key "name"`},
		{`[{"name":""}]`, `device number 1: device name is empty`},
		{`[{"name":null}]`, `key "name" is null`},
		{`[{"name":7}]`, `key "name" is 7, but must be a string`},
		{`[{"name":"../disk"}]`, `contains '/'`},
		{`[{"name":"Disk"}]`, `contains 'D'`},
		{`[{"name":"disk","blockSize":"4k"}]`, `device "disk": key "blockSize" is "4k", but must be a whole number that is not negative`},
		{`[{"name":"disk","blockSize":-1}]`, `key "blockSize" is -1`},
		{`[{"name":"disk","blockSize":1.5}]`, `key "blockSize" is 1.5`},
		{`[{"name":"disk","shared":"yes"}]`, `key "shared" is "yes", but must be true or false`},
		{`[{"name":"disk"}`, `too early`},
		{`[{"name":"disk"`, `too early`},
		{`[{"name":"disk"}] x`, `after the array`},
		{`[{"name":"disk"}][]`, `unexpected "[" after the array`},
	} {
		_, err := decodeDevices[testDevice](tt.flag)
		var usage *usageError
		if !errors.As(err, &usage) || !strings.HasPrefix(err.Error(), "--devices: ") || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("decodeDevices(%s): %v, want a usage error with %q", tt.flag, err, tt.want)
		}
	}
}

// TestPeerDeviceIgnores decodes keys that ask for nothing: defaults that configurations carry.
func TestPeerDeviceIgnores(t *testing.T) {
	plain := `{"name":"disk","base":"b","overlay":"o","state":"s"}`
	for _, more := range []string{
		`"shared":false,"sharedbase":false`,
		`"s3sync":false,"s3accesskey":"","s3secretkey":"","s3endpoint":"","s3secure":false,"s3bucket":"","s3concurrency":0`,
		`"s3secure":true,"s3concurrency":10`,
	} {
		decoded, err := decodeDevices[peerDevice]("[" + strings.TrimSuffix(plain, "}") + "," + more + "}," + strings.Replace(plain, "disk", "data", 1) + "]")
		if err != nil {
			t.Fatal(err)
		}
		got, err := decoded[0].device()
		if err != nil {
			t.Errorf("%s: %v", more, err)
			continue
		}
		want, err := decoded[1].device()
		if want.Name = "disk"; err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: got %+v, want %+v (%v)", more, got, want, err)
		}
	}
}

func FuzzDecodeDevices(f *testing.F) {
	f.Add(`[{"name":"disk","path":"x","blockSize":4096,"shared":true}]`)
	f.Add(`[{"name":"a","name":"b"}] 7`)
	f.Fuzz(func(t *testing.T, flag string) {
		devices, err := decodeDevices[testDevice](flag)
		if err == nil && len(devices) == 0 {
			t.Error("no devices and no error")
		}
		for _, d := range devices {
			if d.Name == "" || strings.Contains(d.Name, "/") {
				t.Errorf("name %q was accepted", d.Name)
			}
		}
	})
}
