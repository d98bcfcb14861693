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

// Meeting is what the two sides of a session know of it, and a proof is good for: no other.
type Meeting struct {
	Source, Destination End // what each side has said

	// Channels has, for each stream in the source's order, what only the two ends of its channel can know, so that nobody can be between
	// them and pass proofs on. It is empty unless both sides have said CapBound.
	Channels [][]byte
}

// End is what a side has said of itself in its prefaces.
type End struct {
	Session      uint64 // chosen at random, so that what was proven in one session proves nothing in another
	Capabilities uint32 // so that nobody between can take one away
}

// proofSize is how much of the hash a proof has, in bytes.
const proofSize = 16

// prove is what a side says to prove that it has the secret of a migration's id, and that it is the one who says what it says with it:
// the begin of the HMAC-SHA256 (RFC 2104), keyed with the secret, of the text "drafter rejoin", the byte of the role, both session
// numbers, both capabilities, the number of channels, each of them behind its length, and what is said. Of an id without a secret it is zeros.
func prove(id string, role Role, m Meeting, said []byte) []byte {
	_, secret, ok := strings.Cut(id, secretMark)
	if !ok {
		return make([]byte, proofSize)
	}
	b := append([]byte("drafter rejoin"), byte(role))
	b = binary.BigEndian.AppendUint64(b, m.Source.Session)
	b = binary.BigEndian.AppendUint64(b, m.Destination.Session)
	b = binary.BigEndian.AppendUint32(b, m.Source.Capabilities)
	b = binary.BigEndian.AppendUint32(b, m.Destination.Capabilities)
	b = binary.BigEndian.AppendUint32(b, uint32(len(m.Channels)))
	for _, c := range m.Channels {
		b = append(binary.BigEndian.AppendUint32(b, uint32(len(c))), c...)
	}
	h := hmac.New(sha256.New, []byte(secret))
	h.Write(b)
	h.Write(said)
	return h.Sum(nil)[:proofSize]
}

// proves reports whether a proof is that of a side.
func proves(proof []byte, id string, role Role, m Meeting, said []byte) bool {
	return subtle.ConstantTimeCompare(proof, prove(id, role, m, said)) == 1
}

// EncodeSeek returns the payload of a Seek frame: the public part of the migration's id and the source's proof, if the id has a secret.
func EncodeSeek(id string, m Meeting) []byte {
	public := PublicID(id)
	if public == id {
		return []byte(id)
	}
	return []byte(public + secretMark + hex.EncodeToString(prove(id, RoleSource, m, nil)))
}

// Seek is the payload of a Seek frame.
type Seek struct {
	ID    string // its public part
	proof []byte
}

// DecodeSeek decodes the payload of a Seek frame.
func DecodeSeek(b []byte) (Seek, error) {
	if err := CheckName(string(b)); err != nil {
		return Seek{}, fmt.Errorf("%w: seek: %w", ErrMalformed, err)
	}
	public, proof, ok := strings.Cut(string(b), secretMark)
	s := Seek{public, make([]byte, proofSize)}
	if ok {
		var err error
		if s.proof, err = hex.DecodeString(proof); err != nil {
			return Seek{}, fmt.Errorf("%w: proof of a seek: %w", ErrMalformed, err)
		}
	}
	return s, nil
}

// Proves reports whether it is the source of the migration id that has said this, in this meeting.
func (s Seek) Proves(id string, m Meeting) bool { return proves(s.proof, id, RoleSource, m, nil) }
