package oci

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/docker/cli/cli/config"
	"github.com/docker/cli/cli/config/types"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
)

// logins are the credentials of docker login, and then those of podman login, each with its helpers. That one of them cannot be asked matters only if no other
// has any.
type logins struct{}

// Resolve implements [authn.Keychain].
func (logins) Resolve(r authn.Resource) (authn.Authenticator, error) {
	found, err := authn.DefaultKeychain.Resolve(r) // docker's, or podman's where docker has no configuration
	if err == nil && found != authn.Anonymous {
		return found, nil
	}
	files := []string{os.Getenv("REGISTRY_AUTH_FILE")}
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		files = append(files, filepath.Join(dir, "containers", "auth.json"))
	}
	if dir, e := os.UserConfigDir(); e == nil {
		files = append(files, filepath.Join(dir, "containers", "auth.json"))
	}
	files = append(files, fmt.Sprintf("/run/containers/%d/auth.json", os.Getuid()))
	for _, file := range files {
		other, e := loginOf(file, r)
		if other != nil {
			return other, nil
		}
		err = errors.Join(err, e)
	}
	if err != nil {
		return nil, fmt.Errorf("find credentials for %s: %w", r.RegistryStr(), err)
	}
	return authn.Anonymous, nil
}

// loginOf looks for a login in a file; nil: there is none.
func loginOf(file string, r authn.Resource) (authn.Authenticator, error) {
	if file == "" {
		return nil, nil
	}
	f, err := os.Open(file)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	c, err := config.LoadFromReader(f)
	if err != nil {
		return nil, fmt.Errorf("read %q: %w", file, err)
	}
	for _, key := range []string{r.String(), r.RegistryStr()} {
		if key == name.DefaultRegistry {
			key = authn.DefaultAuthKey
		}
		a, err := c.GetAuthConfig(key)
		if err != nil {
			return nil, fmt.Errorf("read %q: %w", file, err)
		}
		a.ServerAddress = ""
		if a != (types.AuthConfig{}) {
			return authn.FromConfig(authn.AuthConfig{Username: a.Username, Password: a.Password, Auth: a.Auth, IdentityToken: a.IdentityToken, RegistryToken: a.RegistryToken}), nil
		}
	}
	return nil, nil
}
