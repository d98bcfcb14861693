package objstore

import (
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"sync"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/crypto/chacha20poly1305"
)

// ID is the name of a chunk, or of a list: SHA-256 of its content, or with a key HMAC-SHA256.
type ID [sha256.Size]byte

// None is the name of no chunk, and Zeros that of any number of zeros.
var (
	None  = ID{}
	Zeros = ID{sha256.Size - 1: 1}
)

// String is the name in hexadecimal.
func (id ID) String() string { return hex.EncodeToString(id[:]) }

// ParseID reads what String writes.
func ParseID(s string) (ID, error) {
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != len(ID{}) {
		return ID{}, fmt.Errorf("name %q: it is to have %d hexadecimal digits", s, 2*len(ID{}))
	}
	return ID(b), nil
}

// path is where an object of that name is in its folder.
func (id ID) path() string {
	s := id.String()
	return s[:2] + "/" + s
}

// Key encrypts what is in a store. A nil Key encrypts nothing.
type Key struct {
	naming, sealing []byte
	id              string
}

const keySize = 32

// NewKey derives what is needed from a secret of 32 bytes, which should be random.
func NewKey(secret []byte) (*Key, error) {
	if len(secret) != keySize {
		return nil, fmt.Errorf("a key has %d bytes, this one %d: make one with: drafter store keygen", keySize, len(secret))
	}
	k := new(Key)
	for _, d := range []struct {
		to   *[]byte
		what string
	}{{&k.naming, "name"}, {&k.sealing, "seal"}} {
		var err error
		if *d.to, err = hkdf.Key(sha256.New, secret, nil, "drafter store "+d.what, keySize); err != nil {
			return nil, err
		}
	}
	id, err := hkdf.Key(sha256.New, secret, nil, "drafter store id", 8)
	k.id = hex.EncodeToString(id)
	return k, err
}

// ReadKey reads a key from a file with 64 hexadecimal digits, which nobody but its owner may read.
func ReadKey(path string) (*Key, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read key of object store: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("read key of object store: %w", err)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("read key of object store %q: others may read it (mode %v): chmod 600 %s", path, info.Mode().Perm(), path)
	}
	b := make([]byte, 4*keySize)
	n, _ := f.Read(b)
	secret, err := hex.DecodeString(strings.TrimSpace(string(b[:n])))
	if err != nil {
		return nil, fmt.Errorf("read key of object store %q: it is to have %d hexadecimal digits: make one with: drafter store keygen", path, 2*keySize)
	}
	k, err := NewKey(secret)
	if err != nil {
		return nil, fmt.Errorf("read key of object store %q: %w", path, err)
	}
	return k, nil
}

// WriteKey writes a new key to a new file.
func WriteKey(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("write key of object store: %w: nothing is overwritten, as what is encrypted with a key is lost with it", err)
	}
	if err != nil {
		return fmt.Errorf("write key of object store: %w", err)
	}
	secret := make([]byte, keySize)
	_, _ = rand.Read(secret) // never fails
	_, err = fmt.Fprintf(f, "%x\n", secret)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("write key of object store: %w", errors.Join(err, os.Remove(path)))
	}
	return nil
}

// ID tells a key from others, and nothing else of it. It is empty for a nil Key.
func (k *Key) ID() string {
	if k == nil {
		return ""
	}
	return k.id
}

func (k *Key) idOf(content []byte) ID {
	if k == nil {
		return sha256.Sum256(content)
	}
	h := hmac.New(sha256.New, k.naming)
	h.Write(content)
	return ID(h.Sum(nil))
}

// An object is the byte 'D', the version 1, flags, and then, by these: a nonce of 24 bytes, and the rest sealed under the object's name,
// without the store's prefix, and the three bytes; compressed by zstd.
const (
	flagZstd   = 1
	flagSealed = 2

	objectHead = 3
	leastZstd  = 1 << 10 // bytes of content that are compressed
	overhead   = objectHead + chacha20poly1305.NonceSizeX + chacha20poly1305.Overhead
)

var zstdEncoder = sync.OnceValues(func() (*zstd.Encoder, error) {
	return zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedDefault), zstd.WithEncoderCRC(false), zstd.WithWindowSize(1<<20))
})

var zstdDecoder = sync.OnceValues(func() (*zstd.Decoder, error) {
	return zstd.NewReader(nil, zstd.WithDecoderMaxMemory(maxListBytes), zstd.WithDecoderMaxWindow(1<<20))
})

// pack is the object of that name for some content.
func (k *Key) pack(name string, content []byte) ([]byte, error) {
	enc, err := zstdEncoder()
	if err != nil {
		return nil, fmt.Errorf("compress object %q: %w", name, err)
	}
	head := []byte{'D', 1, 0}
	inner := content
	if len(content) >= leastZstd { // and so the frame says its length
		if z := enc.EncodeAll(content, make([]byte, 0, len(content)/2)); len(z) < len(content)-len(content)/16 {
			head[2] |= flagZstd
			inner = z
		}
	}
	if k == nil {
		return append(head, inner...), nil
	}
	head[2] |= flagSealed
	aead, err := chacha20poly1305.NewX(k.sealing)
	if err != nil {
		return nil, fmt.Errorf("encrypt object %q: %w", name, err)
	}
	out := make([]byte, objectHead+chacha20poly1305.NonceSizeX, len(inner)+overhead)
	copy(out, head)
	nonce := out[objectHead:]
	_, _ = rand.Read(nonce) // never fails
	return aead.Seal(out, nonce, inner, sealedName(name, head)), nil
}

func sealedName(name string, head []byte) []byte { return append([]byte(name+"\x00"), head...) }

// unpack is the content, of at most limit bytes, of an object of that name.
func (k *Key) unpack(name string, object []byte, limit int) ([]byte, error) {
	if len(object) < objectHead || object[0] != 'D' || object[1] != 1 || object[2]&^(flagZstd|flagSealed) != 0 {
		return nil, fmt.Errorf("it is no object of a version that this one knows: %w", ErrCorrupt)
	}
	head, inner := object[:objectHead], object[objectHead:]
	if sealed := head[2]&flagSealed != 0; sealed != (k != nil) {
		if sealed {
			return nil, fmt.Errorf("it is encrypted, and there is no key: %w", ErrCorrupt)
		}
		return nil, fmt.Errorf("it is not encrypted, and there is a key: %w", ErrCorrupt)
	}
	if k != nil {
		aead, err := chacha20poly1305.NewX(k.sealing)
		if err != nil {
			return nil, err
		}
		if len(inner) < aead.NonceSize() {
			return nil, fmt.Errorf("it is too short: %w", ErrCorrupt)
		}
		inner, err = aead.Open(nil, inner[:aead.NonceSize()], inner[aead.NonceSize():], sealedName(name, head))
		if err != nil {
			return nil, fmt.Errorf("it cannot be decrypted with key %s: %w", k.id, ErrCorrupt)
		}
	}
	if head[2]&flagZstd != 0 {
		var frame zstd.Header
		if err := frame.Decode(inner); err != nil || !frame.HasFCS || frame.FrameContentSize > uint64(limit) {
			return nil, fmt.Errorf("its compressed content is not of the size it is to have: %w", ErrCorrupt)
		}
		dec, err := zstdDecoder()
		if err != nil {
			return nil, err
		}
		if inner, err = dec.DecodeAll(inner, make([]byte, 0, frame.FrameContentSize)); err != nil {
			return nil, fmt.Errorf("its content cannot be decompressed: %w: %w", err, ErrCorrupt)
		}
	}
	if len(inner) > limit {
		return nil, fmt.Errorf("it has %d bytes, and at most %d were put: %w", len(inner), limit, ErrCorrupt)
	}
	return inner, nil
}
