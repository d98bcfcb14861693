package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"reflect"
	"slices"
	"strings"

	"github.com/drafter-vm/drafter/pkg/vmpackage"
)

// decodeDevices decodes the value of a --devices flag: a JSON array of objects with the keys of the struct T, as its json
// tags name them. One of them must be "name", a string, which must be there, valid as the name of a device, and unique.
//
// It is stricter than encoding/json, because a misspelt key would otherwise be a setting silently not made: keys must be
// known, spelt exactly, and not repeated. What else is required of a device is for the caller to check. All errors are
// usage errors.
func decodeDevices[T any](flag string) ([]T, error) {
	devices, err := parseDevices[T](flag)
	if err != nil {
		return nil, usageErrorf("--devices: %w", err)
	}
	return devices, nil
}

func parseDevices[T any](flag string) ([]T, error) {
	known := jsonKeys(reflect.TypeFor[T]())
	dec := json.NewDecoder(strings.NewReader(flag))
	if err := expect(dec, json.Delim('['), `a JSON array, like [{"name":"disk",…},…]`); err != nil {
		return nil, err
	}
	devices := []T{}
	names := map[string]bool{}
	for dec.More() {
		what := fmt.Sprintf("device number %d", len(devices)+1)
		if err := expect(dec, json.Delim('{'), what+" to be an object"); err != nil {
			return nil, err
		}
		// Value by value, so that an error can say which device and which key it is about.
		object := map[string]json.RawMessage{}
		var order []string
		for dec.More() {
			token, err := dec.Token()
			if err != nil {
				return nil, fmt.Errorf("%s: %w", what, plain(err))
			}
			key := token.(string) // the decoder has made sure
			if _, ok := object[key]; ok {
				return nil, fmt.Errorf("%s: key %q is there twice", what, key)
			}
			var value json.RawMessage
			if err := dec.Decode(&value); err != nil {
				return nil, fmt.Errorf("%s: key %q: %w", what, key, plain(err))
			}
			if key == "name" {
				what = fmt.Sprintf("device %s", value)
			}
			object[key] = value
			order = append(order, key)
		}
		if _, err := dec.Token(); err != nil { // the closing brace
			return nil, fmt.Errorf("%s: %w", what, plain(err))
		}

		var device T
		for _, key := range order {
			if !slices.Contains(known, key) {
				return nil, fmt.Errorf("%s: unknown key %q; known keys are %s", what, key, strings.Join(known, ", "))
			}
			if bytes.Equal(object[key], []byte("null")) {
				return nil, fmt.Errorf("%s: key %q is null; leave it out instead", what, key)
			}
			one, err := json.Marshal(map[string]json.RawMessage{key: object[key]})
			if err != nil {
				return nil, fmt.Errorf("%s: key %q: %w", what, key, err)
			}
			value := json.NewDecoder(bytes.NewReader(one))
			value.DisallowUnknownFields() // of what is within
			if err := value.Decode(&device); err != nil {
				if wrong, ok := err.(*json.UnmarshalTypeError); ok {
					if strings.HasSuffix(key, "key") { // a secret
						return nil, fmt.Errorf("%s: key %q must be %s", what, key, jsonType(wrong.Type))
					}
					return nil, fmt.Errorf("%s: key %q is %s, but must be %s", what, key, object[key], jsonType(wrong.Type))
				}
				return nil, fmt.Errorf("%s: key %q: %w", what, key, err)
			}
		}
		var name string
		if raw, ok := object["name"]; !ok {
			return nil, fmt.Errorf(`%s has no key "name"`, what)
		} else if err := json.Unmarshal(raw, &name); err != nil {
			return nil, fmt.Errorf("%s: %w", what, err)
		}
		if err := vmpackage.CheckName(name); err != nil {
			return nil, fmt.Errorf("device number %d: %w", len(devices)+1, err)
		}
		if names[name] {
			return nil, fmt.Errorf("device %q is there twice", name)
		}
		names[name] = true
		devices = append(devices, device)
	}
	if _, err := dec.Token(); err != nil { // the closing bracket
		return nil, plain(err)
	}
	if token, err := dec.Token(); err != io.EOF {
		if err != nil {
			return nil, fmt.Errorf("after the array: %w", plain(err))
		}
		return nil, fmt.Errorf("unexpected %q after the array", fmt.Sprint(token))
	}
	if len(devices) == 0 {
		return nil, fmt.Errorf("the array is empty")
	}
	return devices, nil
}

// expect reads one token, which must be want.
func expect(dec *json.Decoder, want json.Delim, what string) error {
	token, err := dec.Token()
	if err != nil {
		return fmt.Errorf("expected %s: %w", what, plain(err))
	}
	if token != want {
		return fmt.Errorf("expected %s, not %v", what, token)
	}
	return nil
}

// plain says what the end of the input means here.
func plain(err error) error {
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return fmt.Errorf("the JSON ends too early")
	}
	return err
}

// jsonKeys returns the keys of a struct type in the order of its fields.
func jsonKeys(t reflect.Type) []string {
	var keys []string
	for f := range t.Fields() {
		if key, _, _ := strings.Cut(f.Tag.Get("json"), ","); f.IsExported() && key != "-" {
			if key == "" {
				key = f.Name
			}
			keys = append(keys, key)
		}
	}
	return keys
}

// jsonType is what users call a type.
func jsonType(t reflect.Type) string {
	switch t.Kind() {
	case reflect.String:
		return "a string"
	case reflect.Bool:
		return "true or false"
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		return "a whole number"
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return "a whole number that is not negative"
	case reflect.Float32, reflect.Float64:
		return "a number"
	}
	return "a " + t.String()
}
