package objstore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/minio/minio-go/v7"
)

// Root is what makes lists, and their chunks, worth keeping. It is JSON.
type Root struct {
	// Time is when it was made, by the clock of who made it.
	Time time.Time `json:"time"`
	// Expires, if set, is when it is garbage itself: for one that is put again and again by who needs it.
	Expires *time.Time `json:"expires,omitempty"`
	// Devices are those that it has lists of.
	Devices []RootDevice `json:"devices"`
	// Body is whatever else there is to say.
	Body json.RawMessage `json:"body,omitempty"`
}

// RootDevice is a device of a root.
type RootDevice struct {
	Name string `json:"name"`
	Size int64  `json:"size"` // bytes
	List string `json:"list"` // the name of its list
}

// Device is the device of that name, nil if there is none.
func (r *Root) Device(name string) *RootDevice {
	for n := range r.Devices {
		if r.Devices[n].Name == name {
			return &r.Devices[n]
		}
	}
	return nil
}

const maxRootBytes = 1 << 20

var rootPart = regexp.MustCompile(`^[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}$`)

// CheckName reports why a name cannot be a part of a root's.
func CheckName(name string) error {
	if !rootPart.MatchString(name) {
		return fmt.Errorf("name %q: use 1 to 128 letters, digits, '.', '_' or '-', not beginning with '.'", name)
	}
	return nil
}

func rootName(parts []string) (string, error) {
	for _, p := range parts {
		if err := CheckName(p); err != nil {
			return "", err
		}
	}
	return "roots/" + strings.Join(parts, "/"), nil
}

// PutRoot puts a root, in place of the one of that name, if there is one. What it refers to must be there.
func (s *Store) PutRoot(ctx context.Context, r *Root, name ...string) error {
	object, err := rootName(name)
	if err != nil {
		return fmt.Errorf("put root: %w", err)
	}
	b, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("put root %q: %w", object, err)
	}
	if len(b) > maxRootBytes {
		return fmt.Errorf("put root %q: it has %d bytes, and at most %d are allowed", object, len(b), maxRootBytes)
	}
	body, err := s.cfg.Key.pack(object, b)
	if err != nil {
		return err
	}
	return s.putObject(ctx, object, body)
}

// GetRoot gets a root.
func (s *Store) GetRoot(ctx context.Context, name ...string) (*Root, error) {
	object, err := rootName(name)
	if err != nil {
		return nil, fmt.Errorf("get root: %w", err)
	}
	return s.getRoot(ctx, object)
}

func (s *Store) getRoot(ctx context.Context, object string) (*Root, error) {
	body, err := s.getObject(ctx, object, maxRootBytes+overhead)
	if err != nil {
		return nil, err
	}
	b, err := s.cfg.Key.unpack(object, body, maxRootBytes)
	if err != nil {
		return nil, fmt.Errorf("get root %q: %w", object, err)
	}
	r := new(Root)
	if err := json.Unmarshal(b, r); err != nil {
		return nil, fmt.Errorf("get root %q: %w: %w", object, err, ErrCorrupt)
	}
	for _, d := range r.Devices {
		if _, err := ParseID(d.List); err != nil || d.Size < 0 {
			return nil, fmt.Errorf("get root %q: device %q of %d bytes has list %q: %w", object, d.Name, d.Size, d.List, ErrCorrupt)
		}
	}
	return r, nil
}

// RemoveRoot removes a root, if it is there. What it refers to becomes garbage, unless others refer to it.
func (s *Store) RemoveRoot(ctx context.Context, name ...string) error {
	object, err := rootName(name)
	if err != nil {
		return fmt.Errorf("remove root: %w", err)
	}
	return s.removeObject(ctx, object)
}

// Roots returns the names of the roots below a folder, in order, each as its parts below that.
func (s *Store) Roots(ctx context.Context, folder ...string) ([][]string, error) {
	under, err := rootName(folder)
	if err != nil {
		return nil, fmt.Errorf("list roots: %w", err)
	}
	var names [][]string
	err = s.eachObject(ctx, strings.TrimSuffix(under, "/"), func(name string, _ minio.ObjectInfo) error {
		names = append(names, strings.Split(strings.TrimPrefix(name, under+"/"), "/"))
		return nil
	})
	slices.SortFunc(names, slices.Compare)
	return names, err
}

// CollectOptions say what is garbage.
type CollectOptions struct {
	// Grace is how long ago something was put at least that is removed. 0 means [Grace]; less is for who knows that nobody else uses the store.
	Grace time.Duration
	// DryRun removes nothing.
	DryRun bool
}

// Collected says what Collect did, or would do.
type Collected struct {
	Roots, Lists, Chunks int   // that are kept
	Bytes                int64 // of the lists and chunks that are kept, as they are in the store
	Expired              int   // roots that were removed
	Garbage              int   // lists and chunks that were removed
	GarbageBytes         int64 // of these
	Young                int   // lists and chunks that nothing refers to, and that are too young to be garbage
}

// Collect removes roots that have expired, and what no root refers to. It fails, and removes nothing more, if it cannot read a root or a list, as with
// another key than theirs. It may run while the store is used.
func (s *Store) Collect(ctx context.Context, opts CollectOptions) (c Collected, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("collect garbage: %w", err)
		}
	}()
	if opts.Grace == 0 {
		opts.Grace = Grace
	}
	now := time.Now()
	needed := make(map[string]bool)
	// In the order of names, in which newer backups follow older ones: who replaces one by the other meanwhile is seen with either.
	err = s.eachObject(ctx, "roots", func(name string, info minio.ObjectInfo) error {
		r, err := s.getRoot(ctx, name)
		if errors.Is(err, ErrNotFound) {
			return nil // it was removed meanwhile
		}
		if err != nil {
			return err
		}
		if r.Expires != nil && now.After(*r.Expires) {
			c.Expired++
			if opts.DryRun {
				return nil
			}
			return s.removeObject(ctx, name)
		}
		c.Roots++
		for _, d := range r.Devices {
			id, _ := ParseID(d.List) // which was checked
			if list := "lists/" + id.path(); !needed[list] {
				needed[list] = true
				l, err := s.GetList(ctx, id, d.Size)
				if errors.Is(err, ErrNotFound) && r.Expires != nil {
					continue // of something that went on and is gone, as it seems: there is nothing to keep
				}
				if err != nil {
					return fmt.Errorf("root %q: %w", name, err)
				}
				for _, chunk := range l.Chunks {
					needed["chunks/"+chunk.path()] = true
				}
			}
		}
		return nil
	})
	if err != nil {
		return c, err
	}
	for _, folder := range []string{"lists", "chunks"} {
		err := s.eachObject(ctx, folder, func(name string, info minio.ObjectInfo) error {
			switch {
			case needed[name]:
				if folder == "lists" {
					c.Lists++
				} else {
					c.Chunks++
				}
				c.Bytes += info.Size
				return nil
			case now.Sub(info.LastModified) <= opts.Grace:
				c.Young++
				return nil
			}
			if !opts.DryRun { // somebody may have put it again since it was listed
				age, err := s.age(ctx, name)
				if errors.Is(err, ErrNotFound) || err == nil && age <= opts.Grace {
					c.Young++
					return nil
				}
				if err != nil {
					return err
				}
			}
			c.Garbage++
			c.GarbageBytes += info.Size
			if opts.DryRun {
				return nil
			}
			s.forget(name)
			return s.removeObject(ctx, name)
		})
		if err != nil {
			return c, err
		}
	}
	return c, nil
}

// forget no longer believes that an object is there, or that it is what it is to be.
func (s *Store) forget(name string) {
	id, err := ParseID(name[strings.LastIndexByte(name, '/')+1:])
	if err != nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seen[id] = time.Time{}
}

// suspects reports whether an object was found to be missing, or damaged.
func (s *Store) suspects(id ID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	until, ok := s.seen[id]
	return ok && until.IsZero()
}
