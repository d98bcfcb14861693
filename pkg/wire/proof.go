package wire

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"strings"
)

// secretMark parts the id of a migration into what everybody may see of it and its secret.
const secretMark = "."

// NewID returns an id for a migration: a public part, by which it is logged, and a secret that only its two sides have, which they prove
// to each other when they meet again. Each has 128 bits of chance.
func NewID() string { return rand.Text() + secretMark + rand.Text() }

// PublicID is the part of an id that may be shown. An id without a secret, as one that is the same for many, is public as it is.
func PublicID(id string) string {
	public, _, _ := strings.Cut(id, secretMark)
	return public
}

// Sessions are the session numbers in the prefaces of both sides. Each chooses its own at random, so that what was proven in one
// session proves nothing in another.
type Sessions struct{ Source, Destination uint64 }

// proofSize is how much of the hash a proof has, in bytes.
const proofSize = 16

// Proof is what a side says to prove that it has the secret of a migration's id; empty where the id has none. It is the begin, in
// hexadecimal, of the HMAC-SHA256 (RFC 2104), keyed with the secret, of the text "drafter rejoin", the byte of the role, and both
// session numbers.
func Proof(id string, role Role, s Sessions) string {
	_, secret, ok := strings.Cut(id, secretMark)
	if !ok {
		return ""
	}
	h := hmac.New(sha256.New, []byte(secret))
	h.Write(append([]byte("drafter rejoin"), byte(role)))
	h.Write(binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, s.Source), s.Destination))
	return hex.EncodeToString(h.Sum(nil)[:proofSize])
}

// Proves reports whether a proof is that of a side.
func Proves(proof, id string, role Role, s Sessions) bool {
	return subtle.ConstantTimeCompare([]byte(proof), []byte(Proof(id, role, s))) == 1
}

// EncodeSeek returns the payload of a Seek frame: the public part of the migration's id and the source's proof.
func EncodeSeek(id string, s Sessions) []byte {
	b := []byte(PublicID(id))
	if proof := Proof(id, RoleSource, s); proof != "" {
		b = append(append(b, secretMark...), proof...)
	}
	return b
}

// ParseSeek decodes the payload of a Seek frame. The proof is empty for an id without a secret.
func ParseSeek(b []byte) (public, proof string, err error) {
	if err := CheckName(string(b)); err != nil {
		return "", "", fmt.Errorf("%w: seek: %w", ErrMalformed, err)
	}
	public, proof, _ = strings.Cut(string(b), secretMark)
	return public, proof, nil
}
