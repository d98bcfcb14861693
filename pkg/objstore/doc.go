// Package objstore keeps what devices hold in an object store that speaks S3: continuously while a VM runs, and as images of one moment.
//
//	store, err := objstore.Open(objstore.Config{Location: objstore.Location{Endpoint: "https://s3.example", Bucket: "vms", Prefix: "prod"}})
//	list, err := store.PutDevice(ctx, disk, objstore.PutOptions{}) // chunks that are there already are not sent
//	id, err := store.PutList(ctx, list)                      // and that is all one needs to know of it
//	…
//	list, err := store.GetList(ctx, id, disk.Size())
//	image := store.OpenImage(list)                           // a block.Device that is only read, and fetched as it is
//	defer image.Close()
//
// # What is where
//
//	PREFIX/chunks/AB/ABCD…   content of some pages in a row: see [ChunkSize]
//	PREFIX/lists/AB/ABCD…    the chunks of a device, in order
//	PREFIX/roots/…           what refers to lists: see [Root]
//
// Chunks and lists are called by what they hold, so that nothing is there twice, whoever has put it there, and nothing can be another
// than it was: what comes is held against its name. A chunk of zeros is known by its name alone. All is compressed by zstd where that helps.
//
// With a [Key], all is encrypted and authenticated by XChaCha20-Poly1305, under its name, and names are HMAC-SHA256 of the content instead of
// SHA-256, so that the store, which never sees the key, cannot even tell whether something is there that it knows. What it does see: how many
// objects there are, when each is put and asked for, and how long they are, so roughly how well each chunk compresses.
//
// Without a key, whoever may write to the bucket can make a root refer to other content. With one, they can no more than return what a root
// was at an earlier time.
//
// # Garbage
//
// A chunk that no root refers to any more, by its lists, is garbage, and [Store.Collect] removes it. It asks nobody and locks nothing: so what was put
// a short while ago, by somebody who has not put the root yet, is not garbage. Who puts a chunk that was there already, and is older than
// that, puts it anew. See [Grace].
//
// # Invariants
//
//   - What Get, GetList and an Image return is what was put, whatever the store does; or they return an error.
//   - A root is put when all that it refers to is there.
//   - A [Syncer] never delays a write, and a store that is slow or fails costs it nothing but being behind.
//
// # Concurrency
//
// All methods of a Store and of an Image may be called by any goroutine. A Syncer has one owner: see there.
//
// # What it does not do
//
// It knows nothing of VMs (pkg/depot does), makes no buckets, and changes none of their settings.
package objstore
