package vmpackage

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
)

const (
	// configBlock is what the size of a config device is a multiple of: the smallest block size of a device.
	configBlock = 4096
	// maxConfigSize bounds a config device. A machine configuration is some hundred bytes plus its CPU features.
	maxConfigSize = 1 << 20
)

// EncodeConfig returns the content of a config device: v as JSON, which must be an object, padded with spaces and a
// final newline to a multiple of 4096 bytes, because a device has whole blocks.
func EncodeConfig(v any) ([]byte, error) {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encode machine configuration: %w", err)
	}
	if len(b) == 0 || b[0] != '{' {
		return nil, fmt.Errorf("encode machine configuration: it is not a JSON object")
	}
	size := (len(b) + 1 + configBlock - 1) / configBlock * configBlock
	if size > maxConfigSize {
		return nil, fmt.Errorf("encode machine configuration: %d bytes are more than %d", len(b), maxConfigSize-1)
	}
	padded := bytes.Repeat([]byte{' '}, size)
	copy(padded, b)
	padded[size-1] = '\n'
	return padded, nil
}

// DecodeConfig returns the JSON object that the content of a config device holds, without its padding.
func DecodeConfig(content []byte) (json.RawMessage, error) {
	if len(content) > maxConfigSize {
		return nil, fmt.Errorf("decode machine configuration: %d bytes are more than %d", len(content), maxConfigSize)
	}
	trimmed := bytes.TrimSpace(content)
	if len(trimmed) == 0 || trimmed[0] != '{' {
		return nil, fmt.Errorf("decode machine configuration: it is not a JSON object")
	}
	var raw json.RawMessage
	if err := json.Unmarshal(trimmed, &raw); err != nil {
		return nil, fmt.Errorf("decode machine configuration: %w", err)
	}
	return raw, nil
}

// ReadConfig reads and decodes the config device in the file at path.
func ReadConfig(path string) (json.RawMessage, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open device %q: %w", Config, err)
	}
	defer f.Close()
	content, err := io.ReadAll(io.LimitReader(f, maxConfigSize+1))
	if err != nil {
		return nil, fmt.Errorf("read device %q: %w", Config, err)
	}
	raw, err := DecodeConfig(content)
	if err != nil {
		return nil, fmt.Errorf("read device %q from %q: %w", Config, path, err)
	}
	return raw, nil
}

// machine is the part of a machine configuration that a package has to understand; the field names are vmm.Spec's.
type machine struct {
	Hypervisor  string   `json:"hypervisor"`
	Version     string   `json:"version"`
	CPUFeatures []string `json:"cpuFeatures"`
	Disks       []struct {
		Name string `json:"name"`
	} `json:"disks"`
}

func decodeMachine(raw json.RawMessage) (machine, error) {
	var m machine
	if len(raw) == 0 {
		return m, nil
	}
	if err := json.Unmarshal(raw, &m); err != nil {
		return m, fmt.Errorf("decode machine configuration: %w", err)
	}
	return m, nil
}

// disks is the order in which the guest sees its disks.
func (m machine) disks() []string {
	names := make([]string, len(m.Disks))
	for i, d := range m.Disks {
		names[i] = d.Name
	}
	return names
}
