// Package tap opens the tap interface of a machine, in its network namespace.
package tap
