package supervise

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// What may be given at a time.
const (
	maxVariables   = 256
	maxEnvironment = 64 << 10
)

var variableName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_.-]*$`)

// variable is one that containers are given.
type variable struct{ container, name, value string } // container: empty for all

// parseEnvironment reads "K=V" and "NAME:K=V".
func parseEnvironment(list []string) ([]variable, error) {
	size := 0
	if len(list) > maxVariables {
		return nil, fmt.Errorf("%d variables are more than %d", len(list), maxVariables)
	}
	var all []variable
	for _, s := range list {
		if size += len(s); size > maxEnvironment {
			return nil, fmt.Errorf("the variables have more than %d KiB", maxEnvironment>>10)
		}
		name, value, ok := strings.Cut(s, "=")
		container, own := "", false
		if before, after, found := strings.Cut(name, ":"); found {
			container, name, own = before, after, true
		}
		if !ok || !variableName.MatchString(name) || own && !validName.MatchString(container) || strings.ContainsRune(value, 0) {
			return nil, fmt.Errorf("variable %.100q is not of the form NAME=VALUE or CONTAINER:NAME=VALUE", s)
		}
		all = append(all, variable{container, name, value})
	}
	return all, nil
}

// setEnvironment sets a variable in a copy of an environment.
func setEnvironment(env []string, name, value string) []string {
	env = slices.Clone(env)
	for n, v := range env {
		if k, _, _ := strings.Cut(v, "="); k == name {
			env[n] = name + "=" + value
			return env
		}
	}
	return append(env, name+"="+value)
}

// given is the environment of a container with those variables that are for it, of which later ones prevail over earlier, and those for it over those for all.
func given(env []string, container string, variables []variable) []string {
	for _, of := range []string{"", container} {
		for _, v := range variables {
			if v.container == of {
				env = setEnvironment(env, v.name, v.value)
			}
		}
	}
	return env
}

// kept is what outlasts a restart, of the supervisor and of the guest.
type kept struct {
	Environment []string `json:"environment"`
}

// readKept reads it; nothing if there is none.
func readKept(path string) (k kept, err error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return k, nil
	}
	if err != nil {
		return k, fmt.Errorf("read the environment that was given: %w", err)
	}
	defer f.Close()
	if err := json.NewDecoder(io.LimitReader(f, 16*maxEnvironment)).Decode(&k); err != nil {
		return kept{}, fmt.Errorf("read the environment that was given, from %q: %w", path, err)
	}
	return k, nil
}

// write replaces it, whole or not at all, also if the machine loses its power then.
func (k kept) write(path string) error {
	text, err := json.Marshal(k)
	if err == nil {
		err = os.MkdirAll(filepath.Dir(path), 0o755)
	}
	if err == nil {
		err = replaceFile(path, text)
	}
	if err != nil {
		return fmt.Errorf("keep the environment: %w", err)
	}
	return nil
}

func replaceFile(path string, text []byte) error {
	f, err := os.OpenFile(path+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}
