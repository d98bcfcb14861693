// Package cgroup puts a machine into a cgroup of its own.
package cgroup
