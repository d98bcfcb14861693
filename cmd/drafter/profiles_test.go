package main

import (
	"net/http/httptest"
	"testing"

	"github.com/drafter-vm/drafter/pkg/control"
)

func TestProfiles(t *testing.T) {
	h := withProfiles(control.NewMetrics("v").Handler())
	for path, status := range map[string]int{"/metrics": 200, "/debug/pprof/": 200, "/debug/pprof/heap": 200, "/other": 404} {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest("GET", path, nil))
		if w.Code != status {
			t.Errorf("%s: %d, want %d", path, w.Code, status)
		}
	}
}
