package flow

import (
	"context"
	"errors"
	mathrand "math/rand/v2"
	"net"
	"time"
)

// dial connects to a place, again and again while it is one.
func (k *Keeper) dial(place uint32) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.dialing[place] != nil || k.closed {
		return
	}
	ctx, cancel := context.WithCancel(k.ctx)
	k.dialing[place] = cancel
	k.tasks.Go(func() {
		defer cancel()
		const least, most = 50 * time.Millisecond, 2 * time.Second
		for wait := least; ctx.Err() == nil; {
			k.mu.Lock()
			t, info := k.tunnels[place], k.saved.Places[place]
			k.mu.Unlock()
			if t == nil {
				return
			}
			if s := t.present(); s != nil {
				select {
				case <-s.ended:
					// Not at once: the other side may dial, too, and each would take the other's connection for the newer one.
					wait = least
					select {
					case <-time.After(mathrand.N(2 * least)):
					case <-ctx.Done():
						return
					}
				case <-ctx.Done():
					return
				}
				continue
			}
			err := k.dialOnce(ctx, place, info.Address, t)
			if err == nil {
				continue
			}
			k.log.Debug("another place is not reached", "place", place, "address", info.Address, "error", err)
			select {
			case <-time.After(wait):
				wait = min(2*wait, most)
			case <-ctx.Done():
			}
		}
	})
}

// hangUp dials a place no more.
func (k *Keeper) hangUp(place uint32) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if stop := k.dialing[place]; stop != nil {
		stop()
		delete(k.dialing, place)
	}
}

func (k *Keeper) dialOnce(ctx context.Context, place uint32, address string, t *tunnel) error {
	ctx, cancel := context.WithTimeout(ctx, handshakeTime)
	defer cancel()
	conn, err := k.cfg.Dial(ctx, address)
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	k.mu.Lock()
	id, key, self := k.saved.ID, k.saved.Key, k.saved.Self
	k.mu.Unlock()
	r, err := greet(conn, id, key, self, place)
	if err != nil {
		conn.Close()
		return err
	}
	if !stop() {
		conn.Close()
		return context.Cause(ctx)
	}
	t.join(conn, r)
	k.tasks.Go(func() { k.joined(t) })
	return nil
}

// accept takes the connections of other places.
func (k *Keeper) accept() {
	for {
		conn, err := k.cfg.Listen.Accept()
		if k.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
			if err == nil {
				conn.Close()
			}
			return
		}
		if err != nil {
			k.log.Error("cannot accept a connection of another place", "error", err)
			select {
			case <-time.After(time.Second):
			case <-k.ctx.Done():
			}
			continue
		}
		d := k.doors.enter(conn)
		k.tasks.Go(func() {
			if err := k.meet(d); err != nil {
				conn.Close()
				if k.doors.leave(d) && k.ctx.Err() == nil {
					k.log.Warn("refused a connection of another place", "from", conn.RemoteAddr(), "reason", err)
				}
			}
		})
	}
}

func (k *Keeper) meet(d *door) error {
	conn := d.conn
	stop := context.AfterFunc(k.ctx, func() { conn.Close() })
	defer stop()
	if k.cfg.Handshake != nil {
		ctx, cancel := context.WithTimeout(k.ctx, handshakeTime)
		defer cancel()
		if err := k.cfg.Handshake(ctx, conn); err != nil {
			return err
		}
	}
	from, r, err := welcome(conn, func(vm string, from, to uint32) (string, error) {
		k.mu.Lock()
		defer k.mu.Unlock()
		if vm != k.saved.ID || to != k.saved.Self || k.tunnels[from] == nil {
			return "", errors.New("there is no such place here")
		}
		return k.saved.Key, nil
	})
	if err != nil {
		return err
	}
	k.mu.Lock()
	t := k.tunnels[from]
	k.mu.Unlock()
	if t == nil {
		return errors.New("it is no place of this VM any more")
	}
	if !k.doors.leave(d) {
		return net.ErrClosed
	}
	t.join(conn, r)
	k.tasks.Go(func() { k.joined(t) })
	return nil
}
