package control

import (
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/drafter-vm/drafter/pkg/migrate"
)

// State is what a peer does.
type State string

// The states of a peer.
const (
	Starting  State = "starting"  // the instance is being resumed or booted
	Receiving State = "receiving" // it is being received
	Running   State = "running"
	Paused    State = "paused"  // somebody has stopped its guest, until somebody lets it go on
	Sending   State = "sending" // it runs, and is being sent, or written down as a snapshot
	Serving   State = "serving" // it runs elsewhere, and gets what it lacks from here
	InDoubt   State = "in-doubt"
	Moved     State = "moved"
	Closing   State = "closing" // it is being saved
)

var states = []State{Starting, Receiving, Running, Paused, Sending, Serving, InDoubt, Moved, Closing}

// Memory is how the lazy filling of a guest's memory goes.
type Memory struct {
	Faults   uint64 // page faults served
	Failures uint64 // attempts to fill that failed

	Demanded   uint64 // bytes delivered because the guest waited for them
	Background uint64 // bytes delivered otherwise
	Zero       uint64 // bytes that were found to be zeros, and not stored
	Missing    int64  // bytes

	P50, P99, Max time.Duration // latency of faults
}

// Metrics are the numbers of one peer:
//
//	drafter_build_info{version}                            1
//	drafter_peer_state{state}                              1 for the state the peer is in, 0 for others
//	drafter_resume_duration_seconds                        time it took to resume the instance
//	drafter_memory_missing_bytes                           memory that was not filled yet
//	drafter_memory_filled_bytes_total{kind}                kind: demanded, background, zero
//	drafter_memory_faults_total                            page faults of the guest that were served
//	drafter_memory_fill_failures_total                     attempts to fill that failed
//	drafter_memory_fault_latency_seconds{rank}             rank: p50, p99, max
//	drafter_hypervisor_total{name}                         what the hypervisor counts of itself, by its names: Firecracker's
//	drafter_store_chunks{device,state}                     of devices that are kept in an object store; state: stored, waiting
//	drafter_store_bytes_total{device}                      put there, or found to be there
//	drafter_store_failing{device}                          1 while the store cannot be written
//	drafter_backups_total{result}                          copies put into an object store; result: written, failed
//	drafter_backup_timestamp_seconds                       of when the latest of them is; 0: there is none
//	drafter_disk_flush_seconds{disk}                       histogram of the guest's flushes
//	drafter_disk_flush_failures_total{disk}                flushes that failed
//	drafter_migration_state{role,state}                    1 for the state of the migration under way, or the last
//	drafter_migration_round                                number of the round, from 0
//	drafter_migration_size_bytes{role}                     of all devices
//	drafter_migration_rest_bytes{role}                     of this round, not sent yet; missing, once the guest runs
//	drafter_migration_dirty_bytes{role}                    that were dirty when this round began; missing, when the guest was started
//	drafter_migration_dirty_bytes_per_second               that the guest writes
//	drafter_migration_bandwidth_bytes_per_second{role}     of data
//	drafter_migration_remaining_seconds                    estimate; 0 if unknown
//	drafter_migration_throttle_ratio                       share of its time that the guest is held back
//	drafter_migrations_total{role,outcome}
//	drafter_migration_bytes_total{role,kind}               kind: data, zero, state, wire (the last when a migration is over)
//	drafter_migration_rounds_total                         rounds sent
//	drafter_migration_late_bytes_total{role}               content that was missing when guests were started at their destination
//	drafter_migration_demands_total                        how often it was asked for because somebody waited for it
//	drafter_migration_reconnects_total{role}               how often peers met again after their link had died
//	drafter_migration_duration_seconds{role}               histogram
//	drafter_migration_downtime_seconds{role}               histogram
//	drafter_migration_downtime_part_seconds{role,part}     of the last migration; they add up to its downtime
//	drafter_migration_agent_seconds{moment}                of the last migration; moment: before, after
//	drafter_snapshots_total{result}                        result: written, failed
//	drafter_snapshot_pause_seconds                         histogram of how long the guest stood still for one that was written
//	drafter_snapshot_bytes_total{kind}                     kind: data, zero, state
//
// The gauges drafter_migration_… show a snapshot under way, too, whose role is source; what is counted of migrations has nothing of it.
// Gauges of what goes on (rest, bandwidth, what the guest writes, remaining, throttle) are 0 when nothing is under way.
//
// Those of the Go runtime (go_…) and of the process (process_…) come with them.
type Metrics struct {
	registry *prometheus.Registry

	resume, round, dirtyRate, remaining, throttle               prometheus.Gauge
	rounds, demands                                             prometheus.Counter
	peerState, state, size, rest, dirty, bandwidth, part, agent *prometheus.GaugeVec
	migrations, bytes, late, reconnects                         *prometheus.CounterVec
	duration, downtime, flush                                   *prometheus.HistogramVec
	flushFailures, snapshots, snapshotBytes, backups            *prometheus.CounterVec
	backedUp                                                    prometheus.Gauge
	snapshotPause                                               prometheus.Histogram

	mu     sync.Mutex       // guards what follows, and changes of state
	last   migrate.Progress // of what is under way
	memory func() (Memory, bool)
	vmm    func() map[string]float64
	store  func() map[string]Stored
}

// Stored is how far a device is that is kept in an object store.
type Stored struct {
	Stored, Waiting int   // chunks that the store has as the device has them, and others
	Bytes           int64 // put there, or found to be there
	Failing         bool  // the latest attempt to put something has failed
}

// NewMetrics returns metrics of a peer that is starting.
func NewMetrics(version string) *Metrics {
	m := &Metrics{registry: prometheus.NewRegistry()}
	gauges := func(name, help string, labels ...string) *prometheus.GaugeVec {
		g := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "drafter_" + name, Help: help}, labels)
		m.registry.MustRegister(g)
		return g
	}
	gauge := func(name, help string) prometheus.Gauge { return gauges(name, help).WithLabelValues() }
	counters := func(name, help string, labels ...string) *prometheus.CounterVec {
		c := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "drafter_" + name, Help: help}, labels)
		m.registry.MustRegister(c)
		return c
	}
	histogram := func(name, help, label string, buckets []float64) *prometheus.HistogramVec {
		h := prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "drafter_" + name, Help: help, Buckets: buckets}, []string{label})
		m.registry.MustRegister(h)
		return h
	}
	m.registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), &memoryCollector{m}, &vmmCollector{m}, &storeCollector{m})
	gauges("build_info", "1, with the version of Drafter.", "version").WithLabelValues(version).Set(1)
	m.peerState = gauges("peer_state", "1 for the state the peer is in, 0 for others.", "state")
	m.resume = gauge("resume_duration_seconds", "Time it took to resume the instance; 0 for one that was received or booted.")
	m.state = gauges("migration_state", "1 for the state of the migration under way, or of the last one.", "role", "state")
	m.round = gauge("migration_round", "Number of the round of the migration under way or the last one, from 0.")
	m.size = gauges("migration_size_bytes", "Size of all devices of the migration under way or the last one.", "role")
	m.rest = gauges("migration_rest_bytes", "Bytes of this round that were not sent yet; once the guest runs at the destination, those missing there.", "role")
	m.dirty = gauges("migration_dirty_bytes", "Bytes that were dirty when this round began; once the guest runs at the destination, those missing there when it was started.", "role")
	m.dirtyRate = gauge("migration_dirty_bytes_per_second", "Bytes that the guest writes per second, each page counted once a round.")
	m.bandwidth = gauges("migration_bandwidth_bytes_per_second", "Bytes of data that are sent or received per second.", "role")
	m.remaining = gauge("migration_remaining_seconds", "Estimate of the time until everything is there; 0 if unknown.")
	m.throttle = gauge("migration_throttle_ratio", "Share of its time that the guest is held back, from 0 to 1.")
	m.migrations = counters("migrations_total", "Migrations that ended, by their last state.", "role", "outcome")
	m.bytes = counters("migration_bytes_total", "Bytes of content by kind (data, zero, state), and of everything on the streams (wire), which is counted when a migration ends.", "role", "kind")
	m.rounds = counters("migration_rounds_total", "Rounds that were sent by migrations that ended.").WithLabelValues()
	m.late = counters("migration_late_bytes_total", "Bytes that were missing when guests were started at their destination, by migrations that ended.", "role")
	m.demands = counters("migration_demands_total", "Requests of destinations for bytes that somebody waited for, by migrations that ended.").WithLabelValues()
	m.reconnects = counters("migration_reconnects_total", "Times that peers met again after their link had died, by migrations that ended.", "role")
	m.flush = histogram("disk_flush_seconds", "Time the guest's flushes of its disks took.", "disk", prometheus.ExponentialBuckets(0.0001, 2, 16))
	m.flushFailures = counters("disk_flush_failures_total", "Flushes of the guest's disks that failed.", "disk")
	m.duration = histogram("migration_duration_seconds", "Time migrations took, from begin to end.", "role", prometheus.ExponentialBuckets(0.1, 2, 14))
	m.downtime = histogram("migration_downtime_seconds", "Time the guest did not run; at the destination, the part that it sees.", "role", prometheus.ExponentialBuckets(0.001, 2, 15))
	m.part = gauges("migration_downtime_part_seconds", "Parts of the downtime of the last migration, which add up to it.", "role", "part")
	m.agent = gauges("migration_agent_seconds", "Time the guest's agent took before the pause and after the resume of the last migration.", "moment")
	m.snapshots = counters("snapshots_total", "Snapshots that ended: written, or failed, as does one that was cancelled.", "result")
	m.snapshotBytes = counters("snapshot_bytes_total", "Bytes of content of snapshots, by kind (data, zero, state).", "kind")
	m.snapshotPause = prometheus.NewHistogram(prometheus.HistogramOpts{Name: "drafter_snapshot_pause_seconds",
		Help: "Time the guest stood still for a snapshot that was written.", Buckets: prometheus.ExponentialBuckets(0.001, 2, 15)})
	m.registry.MustRegister(m.snapshotPause)
	for _, result := range []string{snapshotWritten, snapshotFailed} {
		m.snapshots.WithLabelValues(result) // so that 0 is seen
	}
	m.backups = counters("backups_total", "Copies of the VM that were put into an object store: written, or failed.", "result")
	m.backedUp = gauge("backup_timestamp_seconds", "Time, since 1970, of which the latest copy in the object store is; 0 if there is none.")
	m.State(Starting)
	return m
}

// State notes what the peer does now.
func (m *Metrics) State(s State) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, other := range states {
		m.peerState.WithLabelValues(string(other)).Set(0)
	}
	m.peerState.WithLabelValues(string(s)).Set(1)
}

// Resumed notes how long the instance took to resume.
func (m *Metrics) Resumed(d time.Duration) { m.resume.Set(d.Seconds()) }

// Memory names a function that tells how the filling of memory goes, false when there is no such thing. It is called at
// each scrape.
func (m *Metrics) Memory(stats func() (Memory, bool)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.memory = stats
}

// Progress notes how a migration goes. It is made for [migrate.SourceConfig].Progress and its like; Done ends it.
func (m *Metrics) Progress(p migrate.Progress) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.count(p, m.countMigrated)
	m.show(p)
}

// Snapshot is Progress for a snapshot; SnapshotDone ends it.
func (m *Metrics) Snapshot(p migrate.Progress) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.count(p, m.countWritten)
	m.show(p)
}

// show sets the gauges. m.mu is held.
func (m *Metrics) show(p migrate.Progress) {
	m.state.Reset()
	m.state.WithLabelValues(p.Role, p.State).Set(1)
	m.size.WithLabelValues(p.Role).Set(float64(p.Size))
	m.bandwidth.WithLabelValues(p.Role).Set(p.Bandwidth)
	m.rest.WithLabelValues(p.Role).Set(float64(p.Rest))
	m.dirty.WithLabelValues(p.Role).Set(float64(p.Dirty))
	if p.Over() {
		m.rests(p.Role)
	}
	if p.Role != "source" {
		return
	}
	m.round.Set(float64(p.Round))
	if !p.Over() {
		m.dirtyRate.Set(p.DirtyRate)
		m.remaining.Set(p.Remaining.Seconds())
		m.throttle.Set(p.Throttle)
	}
}

// rests sets the gauges of what goes on: nothing does. m.mu is held.
func (m *Metrics) rests(role string) {
	m.bandwidth.WithLabelValues(role).Set(0)
	m.rest.WithLabelValues(role).Set(0)
	for _, g := range []prometheus.Gauge{m.dirtyRate, m.remaining, m.throttle} {
		g.Set(0)
	}
}

func (m *Metrics) countMigrated(role, kind string, n float64) {
	m.bytes.WithLabelValues(role, kind).Add(n)
}

func (m *Metrics) countWritten(_, kind string, n float64) {
	m.snapshotBytes.WithLabelValues(kind).Add(n)
}

// count adds what is new since the last progress of the same migration or snapshot. m.mu is held.
func (m *Metrics) count(p migrate.Progress, to func(role, kind string, n float64)) {
	if p.Elapsed < m.last.Elapsed && p.Elapsed > 0 { // another migration: the one before had no report
		m.last = migrate.Progress{}
	}
	add := func(kind string, now, before int64) {
		to(p.Role, kind, float64(max(0, now-before)))
	}
	add("data", p.Data, m.last.Data)
	add("zero", p.Zero, m.last.Zero)
	add("state", p.StateBytes, m.last.StateBytes)
	m.last = p
}

// Done notes how a migration ended.
func (m *Metrics) Done(r *migrate.Report) {
	if r == nil || r.Role == "" { // refused before it began
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.count(migrate.Progress{Role: r.Role, Data: r.DataBytes, Zero: r.ZeroBytes, StateBytes: r.StateBytes}, m.countMigrated)
	m.last = migrate.Progress{}
	m.bytes.WithLabelValues(r.Role, "wire").Add(float64(r.WireBytes))
	m.migrations.WithLabelValues(r.Role, r.Outcome).Inc()
	m.state.Reset()
	m.state.WithLabelValues(r.Role, r.Outcome).Set(1)
	m.rests(r.Role)
	m.late.WithLabelValues(r.Role).Add(float64(r.LateBytes))
	m.demands.Add(float64(r.Demands))
	m.reconnects.WithLabelValues(r.Role).Add(float64(r.Reconnects))
	m.duration.WithLabelValues(r.Role).Observe(time.Duration(r.Total).Seconds())
	var rounds []migrate.Millis // their starts
	for _, x := range r.Rounds {
		if !slices.Contains(rounds, x.Start) {
			rounds = append(rounds, x.Start)
		}
	}
	m.rounds.Add(float64(len(rounds)))
	m.part.Reset()
	if len(r.Parts) > 0 {
		m.downtime.WithLabelValues(r.Role).Observe(time.Duration(r.Downtime).Seconds())
	}
	for _, p := range r.Parts {
		m.part.WithLabelValues(r.Role, p.Name).Add(time.Duration(p.Duration).Seconds())
	}
	m.agent.WithLabelValues("before").Set(time.Duration(r.AgentBefore).Seconds())
	m.agent.WithLabelValues("after").Set(time.Duration(r.AgentAfter).Seconds())
}

// Values of the label result.
const (
	snapshotWritten = "written"
	snapshotFailed  = "failed"
)

// SnapshotDone notes how a snapshot ended, with the report and the error of it. One that was refused because of something else is none:
// do not tell of it.
func (m *Metrics) SnapshotDone(r *migrate.Report, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if r != nil && err == nil {
		m.count(migrate.Progress{Data: r.DataBytes, Zero: r.ZeroBytes, StateBytes: r.StateBytes}, m.countWritten)
		m.snapshotPause.Observe(time.Duration(r.Downtime).Seconds())
	}
	m.last = migrate.Progress{}
	result := snapshotWritten
	if err != nil {
		result = snapshotFailed
	}
	m.snapshots.WithLabelValues(result).Inc()
	m.rests("source")
}

// Flushed is told of each flush of a disk by the guest.
func (m *Metrics) Flushed(disk string, took time.Duration, err error) {
	m.flush.WithLabelValues(disk).Observe(took.Seconds())
	if err != nil {
		m.flushFailures.WithLabelValues(disk).Inc()
	} else {
		m.flushFailures.WithLabelValues(disk) // so that 0 is seen
	}
}

// Handler serves the metrics at /metrics.
func (m *Metrics) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{Registry: m.registry}))
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "nothing here: the metrics are at /metrics", http.StatusNotFound)
	})
	return mux
}

// Hypervisor says how to learn what the hypervisor counts of itself, by names of its own. It is called at each scrape, by any goroutine.
func (m *Metrics) Hypervisor(counted func() map[string]float64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.vmm = counted
}

// BackedUp is told of each copy of the VM that was put into an object store: of when it is, or why there is none.
func (m *Metrics) BackedUp(taken time.Time, err error) {
	if err != nil {
		m.backups.WithLabelValues(snapshotFailed).Inc()
		return
	}
	m.backups.WithLabelValues(snapshotWritten).Inc()
	m.backedUp.Set(float64(taken.UnixMilli()) / 1000)
}

// Store says how to learn how far devices are that are kept in an object store, by their names. It is called at each scrape, by any goroutine.
func (m *Metrics) Store(stats func() map[string]Stored) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.store = stats
}

// storeCollector asks who keeps devices in an object store at each scrape.
type storeCollector struct{ m *Metrics }

var (
	storeChunks  = prometheus.NewDesc("drafter_store_chunks", "Chunks of devices that are kept in an object store: stored as the device has them, or waiting.", []string{"device", "state"}, nil)
	storeBytes   = prometheus.NewDesc("drafter_store_bytes_total", "Bytes of devices that were put into an object store, or found to be there.", []string{"device"}, nil)
	storeFailing = prometheus.NewDesc("drafter_store_failing", "1 while what a device holds cannot be put into the object store.", []string{"device"}, nil)
)

func (c *storeCollector) Describe(out chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{storeChunks, storeBytes, storeFailing} {
		out <- d
	}
}

func (c *storeCollector) Collect(out chan<- prometheus.Metric) {
	c.m.mu.Lock()
	stats := c.m.store
	c.m.mu.Unlock()
	if stats == nil {
		return
	}
	for device, s := range stats() {
		failing := 0.0
		if s.Failing {
			failing = 1
		}
		out <- prometheus.MustNewConstMetric(storeChunks, prometheus.GaugeValue, float64(s.Stored), device, "stored")
		out <- prometheus.MustNewConstMetric(storeChunks, prometheus.GaugeValue, float64(s.Waiting), device, "waiting")
		out <- prometheus.MustNewConstMetric(storeBytes, prometheus.CounterValue, float64(s.Bytes), device)
		out <- prometheus.MustNewConstMetric(storeFailing, prometheus.GaugeValue, failing, device)
	}
}

// vmmCollector asks the hypervisor's machine at each scrape.
type vmmCollector struct{ m *Metrics }

var hypervisorTotal = prometheus.NewDesc("drafter_hypervisor_total", "What the hypervisor counts of itself, by its own names: Firecracker's (GROUP.NAME of its metrics), a minute old at most.", []string{"name"}, nil)

func (c *vmmCollector) Describe(out chan<- *prometheus.Desc) { out <- hypervisorTotal }

func (c *vmmCollector) Collect(out chan<- prometheus.Metric) {
	c.m.mu.Lock()
	counted := c.m.vmm
	c.m.mu.Unlock()
	if counted == nil {
		return
	}
	for name, n := range counted() {
		out <- prometheus.MustNewConstMetric(hypervisorTotal, prometheus.CounterValue, n, name)
	}
}

// memoryCollector asks for the filling of memory at each scrape.
type memoryCollector struct{ m *Metrics }

var (
	memoryMissing  = prometheus.NewDesc("drafter_memory_missing_bytes", "Memory of the guest that was not filled yet.", nil, nil)
	memoryFilled   = prometheus.NewDesc("drafter_memory_filled_bytes_total", "Memory that was filled: demanded by the guest, in the background, or found to be zeros.", []string{"kind"}, nil)
	memoryFaults   = prometheus.NewDesc("drafter_memory_faults_total", "Page faults of the guest that were served.", nil, nil)
	memoryFailures = prometheus.NewDesc("drafter_memory_fill_failures_total", "Attempts to fill memory that failed.", nil, nil)
	memoryLatency  = prometheus.NewDesc("drafter_memory_fault_latency_seconds", "Latency of page faults that were served.", []string{"rank"}, nil)
)

func (c *memoryCollector) Describe(out chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{memoryMissing, memoryFilled, memoryFaults, memoryFailures, memoryLatency} {
		out <- d
	}
}

func (c *memoryCollector) Collect(out chan<- prometheus.Metric) {
	c.m.mu.Lock()
	stats := c.m.memory
	c.m.mu.Unlock()
	if stats == nil {
		return
	}
	s, ok := stats()
	if !ok {
		return
	}
	gauge, counter := prometheus.GaugeValue, prometheus.CounterValue
	for _, x := range []prometheus.Metric{
		prometheus.MustNewConstMetric(memoryMissing, gauge, float64(s.Missing)),
		prometheus.MustNewConstMetric(memoryFilled, counter, float64(s.Demanded), "demanded"),
		prometheus.MustNewConstMetric(memoryFilled, counter, float64(s.Background), "background"),
		prometheus.MustNewConstMetric(memoryFilled, counter, float64(s.Zero), "zero"),
		prometheus.MustNewConstMetric(memoryFaults, counter, float64(s.Faults)),
		prometheus.MustNewConstMetric(memoryFailures, counter, float64(s.Failures)),
		prometheus.MustNewConstMetric(memoryLatency, gauge, s.P50.Seconds(), "p50"),
		prometheus.MustNewConstMetric(memoryLatency, gauge, s.P99.Seconds(), "p99"),
		prometheus.MustNewConstMetric(memoryLatency, gauge, s.Max.Seconds(), "max"),
	} {
		out <- x
	}
}
