// Package lifecycle is where a machine is in its life.
package lifecycle
