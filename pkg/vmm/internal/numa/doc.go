// Package numa binds processes to the CPUs of NUMA nodes.
package numa
