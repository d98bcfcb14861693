// Package serve is what the ends of all connections between a guest and its host have in common: a host that accepts ([Accept]), a
// guest that dials again and again ([Again]), and calls that are served on one connection ([Conn]), within bounds, for which ttrpc itself,
// made for listeners, has no call.
package serve
