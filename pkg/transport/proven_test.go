package transport_test

import (
	"bytes"
	"crypto/x509"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/internal/testcert"
	"github.com/drafter-vm/drafter/pkg/transport"
)

// TestProven lets somebody in by a pin who shows a certificate full of names: they count if an authority has signed it, and those
// of other methods do not even then.
func TestProven(t *testing.T) {
	ours, theirs := testcert.New(t), testcert.New(t)
	boast := func(c *x509.Certificate) {
		for _, s := range []string{"uid:0", "gid:0", "pin-sha256:XLmCPsOZ8onMLrI/h/iooBfdgaeNt2GUFBcpqQ+qs8U=", "pin-sha256://x/="} {
			u, err := url.Parse(s)
			if err != nil {
				t.Fatal(err)
			}
			c.URIs = append(c.URIs, u)
		}
		c.DNSNames = append(c.DNSNames, "uid:0", "spiffe://example.org/host/2")
	}
	server, serverPin := ours.Issue(t, boast, "127.0.0.1", "spiffe://example.org/host/0")
	client, clientPin := theirs.Issue(t, boast, "other.example.org", "spiffe://example.org/host/1")
	for _, tt := range []struct {
		name        string
		authorities string   // that the server trusts
		want        []string // that the client is to it
	}{
		{"nobody vouches", "", []string{clientPin}},
		{"another's authority", ours.File, []string{clientPin}},
		{"its authority", theirs.File, []string{"spiffe://example.org/host/1", "other.example.org", clientPin}},
	} {
		for _, scheme := range []string{"tls://127.0.0.1:0", "wss://127.0.0.1:0", "quic://127.0.0.1:0"} {
			t.Run(tt.name+"/"+scheme[:3], func(t *testing.T) {
				k := kind{"", server, client, scheme}
				k.server.Allow, k.server.Authorities = []string{clientPin}, tt.authorities
				k.client.Allow, k.client.Authorities = []string{serverPin}, ""
				dialled, accepted, who := connect(t, k)
				if !slices.Equal(who.Names, tt.want) || !transport.IdentityOf(accepted).Equal(who) {
					t.Errorf("the client is %v and %v, want %q", who, transport.IdentityOf(accepted), tt.want)
				}
				if is := transport.IdentityOf(dialled); !slices.Equal(is.Names, []string{serverPin}) {
					t.Errorf("the server is %v, want no more than its pin", is)
				}
			})
		}
	}
}

// journal keeps what is logged.
type journal struct {
	mu   sync.Mutex // guards text
	text bytes.Buffer
}

func (j *journal) Write(p []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.text.Write(p)
}

func (j *journal) String() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.text.String()
}

// TestRefusalsTell has listeners refuse a client behind whom nobody hears of it: the log says from where it came.
func TestRefusalsTell(t *testing.T) {
	a := testcert.New(t)
	server, _ := a.Issue(t, nil, "127.0.0.1")
	client, _ := a.Issue(t, nil, "client.example.org")
	server.Allow = []string{"another.example.org"}
	for _, scheme := range []string{"wss://127.0.0.1:0", "quic://127.0.0.1:0"} {
		t.Run(scheme[:3], func(t *testing.T) {
			var log journal
			server.Logger = slog.New(slog.NewTextHandler(&log, nil))
			l, err := server.Listen(t.Context(), scheme)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			conn, err := client.Dial(t.Context(), dialable(l, scheme))
			if err == nil {
				conn.Write([]byte("!"))
				conn.Read(make([]byte, 1))
				conn.Close()
			}
			for end := time.Now().Add(10 * time.Second); !strings.Contains(log.String(), "refused") && time.Now().Before(end); {
				time.Sleep(time.Millisecond)
			}
			if said := log.String(); !strings.Contains(said, "from=127.0.0.1:") || !strings.Contains(said, "none of those that are allowed") {
				t.Errorf("the log has %q", said)
			}
		})
	}
}

// TestNoRedirect dials a server that sends its clients elsewhere, where nobody proves anything: nobody goes there.
func TestNoRedirect(t *testing.T) {
	elsewhere, err := transport.Listen(t.Context(), "ws://127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer elsewhere.Close()
	s := httptest.NewServer(http.RedirectHandler("http://"+elsewhere.Addr().String(), http.StatusFound))
	defer s.Close()
	if conn, err := transport.Dial(t.Context(), "ws://"+s.Listener.Addr().String()); err == nil {
		conn.Close()
		t.Error("it was redirected")
	}
}
