package firecracker

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"hash/crc64"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/drafter-vm/drafter/pkg/vmm"
	"github.com/drafter-vm/drafter/pkg/vmm/internal/lifecycle"
	"github.com/drafter-vm/drafter/pkg/vmm/internal/process"
	"github.com/drafter-vm/drafter/pkg/vmm/vmmtest"
	"golang.org/x/sys/unix"
)

// schema is what Firecracker's published API says of an object: testdata/api.json has that of each version, and request.
type schema struct {
	Type     string            `json:"type"`
	Enum     []string          `json:"enum"`
	Required []string          `json:"required"`
	Fields   map[string]schema `json:"fields"`
	Items    *schema           `json:"items"`
}

// check reports how a value does not fit.
func (s schema) check(t *testing.T, what string, value any) {
	t.Helper()
	object, isObject := value.(map[string]any)
	switch v := value.(type) {
	case string:
		if s.Type != "string" || len(s.Enum) > 0 && !slices.Contains(s.Enum, v) {
			t.Errorf("%s is %q, and has to be a %s of %q", what, v, s.Type, s.Enum)
		}
	case bool:
		if s.Type != "boolean" {
			t.Errorf("%s is %t, and has to be a %s", what, v, s.Type)
		}
	case float64:
		if s.Type != "integer" {
			t.Errorf("%s is %v, and has to be a %s", what, v, s.Type)
		}
	}
	if items, ok := value.([]any); ok {
		if s.Type != "array" || s.Items == nil {
			t.Errorf("%s is a list, and has to be a %s", what, s.Type)
			return
		}
		for _, v := range items {
			s.Items.check(t, what+"[]", v)
		}
	}
	if !isObject {
		return
	}
	for name, v := range object {
		field, ok := s.Fields[name]
		if !ok {
			t.Errorf("%s has a field %q, which is not one of %q", what, name, slices.Sorted(maps.Keys(s.Fields)))
			continue
		}
		field.check(t, what+"."+name, v)
	}
	for _, name := range s.Required {
		if _, ok := object[name]; !ok {
			t.Errorf("%s lacks the field %q", what, name)
		}
	}
}

// recorder is a Firecracker that does nothing, and remembers what it was asked for.
type recorder struct {
	mu       sync.Mutex // guards what follows
	requests []string
	bodies   []string
	answers  map[string]string // of requests that are refused, or have an answer: a status and the answer
	snapshot func()            // what is done for a snapshot, if anything
}

func (r *recorder) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	r.mu.Lock() // throughout: it answers one after the other
	defer r.mu.Unlock()
	body, _ := io.ReadAll(q.Body)
	name := q.Method + " " + q.URL.Path
	r.requests, r.bodies = append(r.requests, name), append(r.bodies, string(body))
	if name == "PUT /snapshot/create" && r.snapshot != nil {
		r.snapshot()
	}
	status, answer, ok := strings.Cut(r.answers[name], " ")
	switch {
	case !ok:
		w.WriteHeader(http.StatusNoContent)
	case status == "400":
		w.WriteHeader(http.StatusBadRequest)
	}
	io.WriteString(w, answer)
}

// recorded makes a machine of a recorder.
func recorded(t *testing.T, cfg vmm.Config) (*machine, *recorder) {
	t.Helper()
	r := &recorder{answers: map[string]string{"GET /": `200 {"state":"Paused","id":"x","app_name":"Firecracker","vmm_version":"1.10.1"}`}}
	m, snapshot := served(t, cfg, r)
	r.snapshot = func() {
		r.answers["PUT /snapshot/create"] = `400 {"fault_message":"Create snapshot error: Cannot perform truncate on the memory backing file: Invalid argument"}`
		snapshot()
	}
	return m, r
}

// served makes a machine of something that serves Firecracker's API. What a snapshot does to files is for that to have done.
func served(t *testing.T, cfg vmm.Config, api http.Handler) (m *machine, snapshot func()) {
	t.Helper()
	dir, err := os.MkdirTemp("", "fc-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	l, err := net.Listen("unix", filepath.Join(dir, apiSocket))
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: api}
	go server.Serve(l)
	t.Cleanup(func() { server.Close() })
	cfg.Dir, cfg.Logger, cfg.Graft = dir, vmmtest.Logger(t), func(do func() error) error { return do() }
	m = newMachine(cfg, nil)
	for name, file := range map[string]**os.File{"saved": &m.saved, "loaded": &m.loaded} {
		if *file, err = os.Create(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mkfifo(filepath.Join(dir, stillFIFO), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.disconnect)
	return m, func() {
		if _, err := m.saved.WriteAt(someState, 0); err != nil {
			t.Error(err)
		}
		if f, err := os.OpenFile(filepath.Join(dir, stillFIFO), os.O_WRONLY, 0); err != nil {
			t.Error(err)
		} else {
			f.Close()
		}
	}
}

// someState is device state as far as anybody can see.
var someState = func() []byte {
	state := []byte("the state of some devices")
	return binary.LittleEndian.AppendUint64(state, ^crc64.Update(^uint64(0), stateSum, state))
}()

// TestRequests: what is said to Firecracker is what it was last time, and what the API of each version takes.
func TestRequests(t *testing.T) {
	spec := vmm.Spec{
		CPUCount: 2, MemorySize: 512 << 20, CPUModel: "T2", MAC: "02:0e:d9:fd:68:3d", Sockets: true, BootArgs: "console=ttyS0 pci=conf1",
		Disks: []vmm.Disk{{Name: "disk", Size: 1 << 20}, {Name: "oci", Size: 1 << 20, ReadOnly: true}},
	}
	ctx := t.Context()
	m, r := recorded(t, vmm.Config{Spec: spec, Boot: &vmm.Boot{Kernel: "/k", Initrd: "/i"}, Interface: "tap0",
		DiskLimit: vmm.Limit{Bytes: 10 << 20, Requests: 15}})
	if err := m.boot(ctx); err != nil {
		t.Fatal(err)
	}
	m.life.Found(lifecycle.Running)
	if err := errors.Join(m.Pause(ctx), m.Resume(ctx), m.Pause(ctx)); err != nil {
		t.Fatal(err)
	}
	var state bytes.Buffer
	if err := errors.Join(m.Save(ctx, &state), m.Save(ctx, &state)); err != nil || state.String() != strings.Repeat(string(someState), 2) {
		t.Errorf("saved %q twice, and %q came of it (%v)", someState, state.String(), err)
	}
	if err := m.Resume(ctx); err != nil {
		t.Fatal(err)
	}
	m.life.Found(lifecycle.Running)
	r.answers["GET /balloon/statistics"] = `200 {"target_pages":3072,"actual_pages":2816,"target_mib":12,"actual_mib":11}`
	if given, err := m.Balloon(ctx); err != nil || given != 11<<20 {
		t.Errorf("the balloon has %d bytes (%v), want 11 MiB", given, err)
	}
	if err := m.SetBalloon(ctx, 12<<20+5); err != nil {
		t.Error(err)
	}
	for _, said := range []string{"Device not activated yet.", "Device not found."} {
		refused := `400 {"fault_message":"Error manipulating the balloon: ` + said + `"}`
		r.answers["GET /balloon/statistics"], r.answers["PATCH /balloon"] = refused, refused
		_, err := m.Balloon(ctx)
		if set := m.SetBalloon(ctx, 0); !errors.Is(err, vmm.ErrNoBalloon) || !errors.Is(set, vmm.ErrNoBalloon) {
			t.Errorf("with %q: got errors %v and %v, want ErrNoBalloon", said, err, set)
		}
	}
	r.snapshot = nil
	for what, want := range map[string]string{
		`400 {"fault_message":"Create snapshot error: Cannot perform open on the snapshot backing file: Permission denied"}`: "Permission denied",
		"204 ": "has written RAM",
	} {
		r.answers["PUT /snapshot/create"] = what
		if err := m.Pause(ctx); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("a snapshot that is answered with %s: got error %v", what, err)
		}
		m.life.Found(lifecycle.Running)
	}
	m.life.Found(lifecycle.Waiting)
	if err := m.load(ctx, someState); err != nil {
		t.Fatal(err)
	}

	const (
		pause    = "PATCH /vm " + `{"state":"Paused"}`
		resume   = "PATCH /vm " + `{"state":"Resumed"}`
		snapshot = "PUT /snapshot/create " + `{"snapshot_type":"Full","snapshot_path":"/proc/self/fd/3","mem_file_path":"still"}`
		look     = "GET / "
		limits   = `"rate_limiter":{"bandwidth":{"size":1048576,"refill_time":100},"ops":{"size":15,"refill_time":1000}}`
	)
	want := []string{
		"PUT /machine-config " + `{"vcpu_count":2,"mem_size_mib":512,"cpu_template":"T2"}`,
		"PUT /boot-source " + `{"kernel_image_path":"/k","initrd_path":"/i","boot_args":"console=ttyS0 pci=conf1 reboot=k i8042.noaux i8042.nomux i8042.dumbkbd"}`,
		"PUT /drives/disk0 " + `{"drive_id":"disk0","path_on_host":"0.disk","is_root_device":false,"is_read_only":false,"cache_type":"Writeback","io_engine":"Sync",` + limits + `}`,
		"PUT /drives/disk1 " + `{"drive_id":"disk1","path_on_host":"1.disk","is_root_device":false,"is_read_only":true,"cache_type":"Writeback","io_engine":"Sync",` + limits + `}`,
		"PUT /network-interfaces/net0 " + `{"iface_id":"net0","guest_mac":"02:0e:d9:fd:68:3d","host_dev_name":"tap0"}`,
		"PUT /vsock " + `{"guest_cid":3,"uds_path":"vsock.sock"}`,
		"PUT /entropy {}",
		"PUT /balloon " + `{"amount_mib":0,"deflate_on_oom":true,"stats_polling_interval_s":65535}`,
		"PUT /actions " + `{"action_type":"InstanceStart"}`,
		pause, snapshot, resume, pause, snapshot, resume,
		"GET /balloon/statistics ", "PATCH /balloon " + `{"amount_mib":12}`,
		"GET /balloon/statistics ", "PATCH /balloon " + `{"amount_mib":0}`, "GET /balloon/statistics ", "PATCH /balloon " + `{"amount_mib":0}`,
		pause, snapshot, look, resume, look, pause, snapshot, look, resume, look,
		"PUT /snapshot/load " + `{"snapshot_path":"/proc/self/fd/4","mem_backend":{"backend_type":"File","backend_path":"/proc/self/fd/5"},"resume_vm":false}`,
		"PATCH /drives/disk0 " + `{"drive_id":"disk0",` + limits + `}`, "PATCH /drives/disk1 " + `{"drive_id":"disk1",` + limits + `}`,
	}
	for i := range max(len(want), len(r.requests)) {
		got, wanted := "", ""
		if i < len(r.requests) {
			got = r.requests[i] + " " + r.bodies[i]
		}
		if i < len(want) {
			wanted = want[i]
		}
		if got != wanted {
			t.Errorf("request %d is %s\nwant %s", i, got, wanted)
		}
	}

	for version, requests := range published(t) {
		for i, name := range r.requests {
			name = strings.NewReplacer("/disk0", "/{drive_id}", "/disk1", "/{drive_id}", "/net0", "/{iface_id}").Replace(name)
			s, ok := requests[name]
			if !ok {
				t.Errorf("version %s has no %s", version, name)
				continue
			}
			if s == nil {
				continue
			}
			s.Type = "object"
			var body any
			if err := json.NewDecoder(bytes.NewReader([]byte(r.bodies[i]))).Decode(&body); err != nil {
				t.Fatal(err)
			}
			s.check(t, version+": "+name, body)
		}
	}
}

// published is the API of each version.
func published(t *testing.T) (api map[string]map[string]*schema) {
	t.Helper()
	text, err := os.ReadFile("testdata/api.json")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &api); err != nil {
		t.Fatal(err)
	}
	if len(api) < 7 {
		t.Fatalf("the API of %d versions is known", len(api))
	}
	return api
}

// TestRequestsByVersion: what is only said to some versions is what the API of that version takes, as is what is said for a template of one's own and
// a synchronous engine.
func TestRequestsByVersion(t *testing.T) {
	renamed := 0
	for version, requests := range published(t) {
		spec := vmm.Spec{
			CPUCount: 1, MemorySize: 64 << 20, MAC: "02:0e:d9:fd:68:3d", Disks: []vmm.Disk{{Name: "disk", Size: 1 << 20}},
			CPUTemplate: `{"cpuid_modifiers":[{"leaf":"0x1","subleaf":"0x0","flags":0,"modifiers":[{"register":"eax","bitmap":"0b0"}]}]}`,
		}
		sync := version == "1.16.1"
		m, r := recorded(t, vmm.Config{Spec: spec, Boot: &vmm.Boot{Kernel: "/k"}, Interface: "tap7", IOEngineSync: sync})
		m.version = version
		if err := m.checkInterface(); (err != nil) != (version < "1.12") || err != nil && !strings.Contains(err.Error(), `"tap7"`) {
			t.Errorf("version %s, with another interface: %v", version, err)
		}
		if err := errors.Join(m.boot(t.Context()), m.load(t.Context(), someState)); err != nil {
			t.Fatal(err)
		}
		for i, name := range r.requests {
			s := requests[strings.NewReplacer("/disk0", "/{drive_id}", "/net0", "/{iface_id}").Replace(name)]
			if s == nil {
				t.Fatalf("version %s has no %s", version, name)
			}
			if name == "PUT /cpu-config" { // the user's own, of lists that the API calls objects before 1.14
				continue
			}
			var body any
			if err := json.Unmarshal([]byte(r.bodies[i]), &body); err != nil {
				t.Fatal(err)
			}
			s.Type = "object"
			s.check(t, version+": "+name, body)
			if strings.Contains(r.bodies[i], `"network_overrides":[{"iface_id":"net0","host_dev_name":"tap7"}]`) {
				renamed++
			}
		}
		engine := `"io_engine":"Async"`
		if sync || version < "1.15" { // those would lose interrupts
			engine = `"io_engine":"Sync"`
		}
		if !slices.Contains(r.requests, "PUT /cpu-config") || !strings.Contains(strings.Join(r.bodies, ""), engine) {
			t.Errorf("version %s is not told the template, or %s: %q", version, engine, r.bodies)
		}
	}
	if renamed != 5 { // 1.12 to 1.16
		t.Errorf("%d versions are told of another interface, want 5", renamed)
	}
}

// TestHidesFeatures: no template makes up for a processor of another vendor, and one that hides nothing for none.
func TestHidesFeatures(t *testing.T) {
	for _, tt := range []struct {
		spec vmm.Spec
		want bool
	}{
		{vmm.Spec{}, false}, {vmm.Spec{CPUModel: "None"}, false}, {vmm.Spec{CPUModel: "T2"}, true}, {vmm.Spec{CPUTemplate: "{}"}, false},
		{vmm.Spec{CPUTemplate: `{"msr_modifiers":[{}]}`}, false}, {vmm.Spec{CPUTemplate: `{"cpuid_modifiers":[{}]}`}, true},
	} {
		if got := hidesFeatures(tt.spec); got != tt.want {
			t.Errorf("model %q, template %q: hides features: %t, want %t", tt.spec.CPUModel, tt.spec.CPUTemplate, got, tt.want)
		}
	}
}

// TestDialSocket: a link in the place of the control socket leads nowhere.
func TestDialSocket(t *testing.T) {
	dir := t.TempDir()
	l, err := net.Listen("unix", filepath.Join(dir, "real"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := os.Symlink("real", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	if c, err := dialSocket(t.Context(), filepath.Join(dir, "link")); err == nil {
		c.Close()
		t.Error("a link was followed")
	}
	c, err := dialSocket(t.Context(), filepath.Join(dir, "real"))
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}

// TestFaults: Firecracker's refusals are told with what was asked for, and its silence ends with the context.
func TestFaults(t *testing.T) {
	m, r := recorded(t, vmm.Config{})
	r.answers["PUT /actions"] = `400 {"fault_message":"no"}`
	if err := m.api.put(t.Context(), "/actions", action{"InstanceStart"}); err == nil || err.Error() != "PUT /actions: Firecracker refuses (status 400): no" {
		t.Errorf("got error %v", err)
	}
	r.answers["PUT /actions"] = "400 nonsense"
	if err := m.api.put(t.Context(), "/actions", action{"InstanceStart"}); err == nil || !strings.HasSuffix(err.Error(), ": nonsense") {
		t.Errorf("got error %v", err)
	}
	r.answers["GET /"] = "200 nonsense"
	if _, err := m.api.info(t.Context()); err == nil {
		t.Error("an answer that is none is understood")
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	gone := errors.New("gone")
	cancel(gone)
	if _, err := m.api.await(ctx, nil); !errors.Is(err, gone) {
		t.Errorf("got error %v, want %v", err, gone)
	}
}

func FuzzCheckState(f *testing.F) {
	f.Add([]byte("0123456789abcdef0123456789abcdef"))
	f.Fuzz(func(t *testing.T, state []byte) {
		if checkState(state) == nil && len(state) <= 16 {
			t.Errorf("%x passes for device state", state)
		}
	})
}

// TestAdoptElsewhere: a machine that runs in the jailer, or without, is adopted in the same way, and that is said.
func TestAdoptElsewhere(t *testing.T) {
	for _, test := range []struct {
		jailed bool
		says   string
	}{{true, "say where that is (--jailer-bin)"}, {false, "--jailer-bin none"}} {
		dir := filepath.Join(t.TempDir(), hypervisor, "vm1", "root")
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		opts, file := Options{Binary: "/bin/true", Jailer: "/bin/true"}, filepath.Join(dir, identityFile)
		if test.jailed {
			opts.Jailer, file = "", filepath.Join(filepath.Dir(dir), identityFile)
		}
		if err := (process.Identity{PID: os.Getpid(), Start: 1}).Write(file); err != nil {
			t.Fatal(err)
		}
		_, err := New(opts).Adopt(t.Context(), vmm.Config{Spec: vmm.Spec{MemorySize: 1 << 20, CPUCount: 1}, Dir: dir, NUMANode: -1})
		if err == nil || !strings.Contains(err.Error(), test.says) {
			t.Errorf("jailed %t: got error %v", test.jailed, err)
		}
	}
}
