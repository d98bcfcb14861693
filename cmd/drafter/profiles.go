package main

import (
	"net/http"
	"net/http/pprof"
	"time"
)

// withProfiles adds to a handler what net/http/pprof shows of this process, under /debug/pprof/. It is here and in no library, as that
// package adds itself to http.DefaultServeMux too, which in another program may be served to anybody.
func withProfiles(h http.Handler) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/", h)
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("GET /debug/pprof/profile", unhurried(pprof.Profile))
	mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("GET /debug/pprof/trace", unhurried(pprof.Trace))
	return mux
}

// unhurried is a handler that takes as long as it was asked to.
func unhurried(h http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).SetWriteDeadline(time.Time{})
		h(w, r)
	}
}
