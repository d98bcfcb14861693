// Package process is the process of a VMM: a child of ours, or one that was adopted.
package process
