package testregistry_test

import (
	"crypto/tls"
	"crypto/x509"
	"net/http"
	"os"
	"testing"

	"github.com/drafter-vm/drafter/internal/testregistry"
)

// TestStart looks whether servers answer as their options say, also through a proxy.
func TestStart(t *testing.T) {
	for _, opts := range []testregistry.Options{{}, {TLS: true}, {User: "joe", Password: "secret"}, {TLS: true, User: "joe", Password: "secret"}} {
		s := testregistry.Start(t, opts)
		front := s.Front(t)
		client, scheme := http.DefaultClient, "http://"
		if opts.TLS {
			ca, err := os.ReadFile(s.CA)
			if err != nil {
				t.Fatal(err)
			}
			pool := x509.NewCertPool()
			pool.AppendCertsFromPEM(ca)
			client, scheme = &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}}, "https://"
		}
		for _, address := range []string{s.Address, front.Address} {
			for _, known := range []bool{true, false} {
				r, err := http.NewRequest(http.MethodGet, scheme+address+"/v2/", nil)
				if err != nil {
					t.Fatal(err)
				}
				want := http.StatusOK
				if known {
					r.SetBasicAuth(opts.User, opts.Password)
				} else if opts.User != "" {
					want = http.StatusUnauthorized
				}
				answer, err := client.Do(r)
				if err != nil {
					t.Fatalf("%+v at %s: %v", opts, address, err)
				}
				answer.Body.Close()
				if answer.StatusCode != want {
					t.Errorf("%+v at %s: %s, want %d", opts, address, answer.Status, want)
				}
			}
		}
		if front.Gets.Load() != 2 {
			t.Errorf("the proxy counted %d requests, want 2", front.Gets.Load())
		}
		s.Stop()
		s.Restart()
	}
}
