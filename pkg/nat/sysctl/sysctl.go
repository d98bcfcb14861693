package sysctl

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Setting is a key below /proc/sys, as net/ipv4/ip_forward, and the value that it is to have.
type Setting struct {
	Key, Value string // path below /proc/sys

	// Aside is for a setting that the kernel changes itself when one before it in the list is changed: it is put back with the others.
	Aside bool
}

// Settings are those of one network namespace.
type Settings struct {
	// File is where it is written down what the settings were. Its folder must be there.
	File string

	// Within runs f on a thread of that network namespace: /proc/sys/net is that of who looks.
	Within func(f func() error) error
}

// loan is a setting that was changed.
type loan struct {
	Key    string   `json:"key"`
	Before string   `json:"before"`
	Set    string   `json:"set"` // empty: by the kernel itself
	Users  []string `json:"users"`
}

// Borrow makes settings what user needs. Those that are so already, by nobody's doing here, are left alone; so are keys that this
// kernel does not have.
func (s Settings) Borrow(user string, settings ...Setting) error {
	return s.update("borrow", func(loans []loan) ([]loan, error) {
		var changes []Setting
		lent := false // the setting before those aside is on loan already, and has changed them
		for _, want := range settings {
			if n := slices.IndexFunc(loans, func(l loan) bool { return l.Key == want.Key }); n >= 0 {
				if !slices.Contains(loans[n].Users, user) {
					loans[n].Users = append(loans[n].Users, user)
				}
				if !want.Aside {
					changes, lent = append(changes, want), true
				}
				continue
			}
			if want.Aside && lent { // of an interface that has come since: how it would be is not known
				continue
			}
			lent = lent && want.Aside
			before, err := read(want.Key)
			if errors.Is(err, fs.ErrNotExist) || err == nil && before == want.Value && !want.Aside {
				continue
			} else if err != nil {
				return loans, err
			}
			l := loan{Key: want.Key, Before: before, Users: []string{user}}
			if !want.Aside {
				l.Set = want.Value
				changes = append(changes, want)
			}
			loans = append(loans, l)
		}
		if err := s.save(loans); err != nil {
			return loans, err
		}
		for _, c := range changes {
			if err := write(c.Key, c.Value); err != nil {
				return loans, err
			}
		}
		return loans, nil
	})
}

// Return gives back all that user has borrowed.
func (s Settings) Return(user string) error {
	return s.update("return", func(loans []loan) ([]loan, error) {
		var kept []loan
		var errs []error
		for _, l := range loans {
			l.Users = slices.DeleteFunc(l.Users, func(u string) bool { return u == user })
			if len(l.Users) > 0 {
				kept = append(kept, l)
				continue
			}
			now, err := read(l.Key)
			if errors.Is(err, fs.ErrNotExist) || err == nil && (now == l.Before || l.Set != "" && now != l.Set) {
				continue // of an interface that is gone, or what somebody else has made it
			}
			if err == nil {
				err = write(l.Key, l.Before)
			}
			if err != nil {
				errs = append(errs, err)
				kept = append(kept, l)
			}
		}
		return kept, errors.Join(errs...)
	})
}

// update changes what is written down, under the lock.
func (s Settings) update(verb string, f func([]loan) ([]loan, error)) error {
	err := s.Within(func() error {
		lock, err := os.Open(filepath.Dir(s.File)) // of the folder, so that no file is left
		if err != nil {
			return err
		}
		defer lock.Close()
		if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
			return fmt.Errorf("lock %q: %w", lock.Name(), err)
		}
		var loans []loan
		if b, err := os.ReadFile(s.File); err == nil {
			if err := json.Unmarshal(b, &loans); err != nil {
				return fmt.Errorf("decode %q: %w: remove the file if nothing of ours runs on this host", s.File, err)
			}
		} else if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		loans, err = f(loans)
		return errors.Join(err, s.save(loans))
	})
	if err != nil {
		return fmt.Errorf("%s kernel settings: %w", verb, err)
	}
	return nil
}

// save replaces the file as a whole. No sync: settings, too, are gone when the host is.
func (s Settings) save(loans []loan) error {
	if len(loans) == 0 {
		if err := os.Remove(s.File); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	b, err := json.MarshalIndent(loans, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(s.File+".new", b, 0o600); err != nil {
		return err
	}
	return os.Rename(s.File+".new", s.File)
}

func path(key string) string { return filepath.Join("/proc/sys", key) }

func read(key string) (string, error) {
	b, err := os.ReadFile(path(key))
	if err != nil {
		return "", err
	}
	return strings.TrimSpace(string(b)), nil
}

func write(key, value string) error {
	if err := os.WriteFile(path(key), []byte(value), 0); err != nil {
		return fmt.Errorf("set %s to %s: %w", strings.ReplaceAll(key, "/", "."), value, err)
	}
	return nil
}

// Set sets keys of the network namespace of the calling thread for good, as far as this kernel has them.
func Set(settings ...Setting) error {
	for _, s := range settings {
		if err := write(s.Key, s.Value); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}
