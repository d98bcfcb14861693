package registry

import (
	"sync"

	"github.com/klauspost/compress/zstd"
)

// compressor makes frames; of any number of goroutines at once. The same content becomes the same frame, as long as the library is the same.
var compressor = sync.OnceValue(func() *zstd.Encoder {
	e, err := zstd.NewWriter(nil, zstd.WithEncoderCRC(false), zstd.WithSingleSegment(true), // chunks have digests
		zstd.WithAllLitEntropyCompression(true)) // memory is often without repetitions, and of few values
	if err != nil {
		panic(err) // of options only
	}
	return e
})

// decompressor reads frames; of any number of goroutines at once.
var decompressor = sync.OnceValue(func() *zstd.Decoder {
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(0), zstd.WithDecoderMaxMemory(maxIndex), zstd.WithDecodeAllCapLimit(true))
	if err != nil {
		panic(err) // of options only
	}
	return d
})
