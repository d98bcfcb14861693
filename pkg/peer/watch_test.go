package peer

import (
	"errors"
	"strings"
	"testing"
)

type mortal struct {
	done chan struct{}
	err  error
}

func (m mortal) Done() <-chan struct{} { return m.done }
func (m mortal) Err() error            { return m.err }

func TestWatch(t *testing.T) {
	reason := errors.New("killed")
	for _, tt := range []struct {
		name string
		err  error
		want string
	}{{"with a reason", reason, "has ended: killed"}, {"without", nil, "has ended: it does not say why"}} {
		t.Run(tt.name, func(t *testing.T) {
			m := mortal{make(chan struct{}), tt.err}
			said := make(chan error, 1)
			stop := watch(m, func(err error) { said <- err })
			close(m.done)
			if err := <-said; !strings.Contains(err.Error(), tt.want) || tt.err != nil && !errors.Is(err, tt.err) {
				t.Errorf("error %v, want one that says %q", err, tt.want)
			}
			stop()
			stop()
		})
	}
	t.Run("stopped", func(t *testing.T) {
		m := mortal{done: make(chan struct{})}
		stop := watch(m, func(err error) { t.Errorf("%v, and nobody watched any more", err) })
		stop()
		close(m.done)
		stop()
	})
}
