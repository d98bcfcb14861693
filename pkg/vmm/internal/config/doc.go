// Package config checks what of a machine's configuration any backend needs, before a VMM is asked.
package config
