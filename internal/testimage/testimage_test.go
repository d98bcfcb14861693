package testimage

import "testing"

// The images are what the tests of others stand on.
func TestMake(t *testing.T) {
	for name, spec := range map[string]Spec{"valkey": Valkey(), "nginx": Nginx(), "python": Python()} {
		image := Make(t, spec)
		layers, err := image.Layers()
		if err != nil || len(layers) != 4 {
			t.Errorf("%s has %d layers, %v", name, len(layers), err)
		}
	}
}
