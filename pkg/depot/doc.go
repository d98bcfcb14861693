// Package depot keeps VMs in an object store (pkg/objstore): what a running one holds, so that less of it has to travel when it moves;
// copies of it, from which it goes on when its host has died; and packages, from which VMs start before they have been fetched.
//
// # Moving with the help of a store
//
//	storage, err := depot.NewStorage(depot.StorageConfig{Devices: map[string]depot.DeviceConfig{"disk": {Store: objstore.Config{…}}}})
//	p, err := peer.Resume(ctx, peer.Config{…, Storage: storage})
//
// While the VM runs, what its devices have held for a while goes to the store. A peer that receives it, and has a Storage for the same, gets
// that from there, and from the source what was written since, and what is not to be had: see pkg/migrate. What a source says of its store names no
// secrets. The destination uses its own, and only for the store that it is configured for, or, if it is configured to, for whatever store the source
// names; and so on, with whom it sends the VM to.
//
// # Copies
//
//	b, err := depot.NewBackup(depot.BackupConfig{Store: store, Name: "web-1", Every: time.Minute})
//	err = b.Run(ctx, p)
//
// Every minute the VM is paused for a moment, as for a migration to a place that has it already, and what it has changed since the last time is put.
// An image has a name and versions; each is a VM of one moment, whole.
//
//	v, err := depot.Open(ctx, store, "web-1", "")      // the newest; v.Taken says of when it is: what came later is lost
//	p, report, err := peer.Receive(ctx, cfg, streams)  // with streams of v.Dial: it runs at once, and gets the rest behind
//
// Whoever starts a VM from an image must know that the one that it is a copy of does not run, or does not mind: nobody else can.
//
// # Concurrency
//
// A Storage is for one peer. Its methods, and those of a Version, may be called by any goroutine. A Backup runs once at a time.
//
// # What it does not do
//
// It makes no keys and removes no garbage: see objstore.
package depot
