package expose

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/block"
)

// FUSEOptions are the settings of a [Mount]. The zero value is good.
type FUSEOptions struct {
	// UID and GID own the folder and the files; nobody else can use them, not even root. 0 is root; this process has to be
	// root for anybody else.
	UID, GID int

	// Logger receives failed requests; nil means slog.Default().
	Logger *slog.Logger
}

const (
	fuseDevice = "/dev/fuse"

	// fuseMaxWrite is the largest read or write in one request, in bytes: what the kernel allows without a sysctl.
	fuseMaxWrite = 1 << 20

	// fuseBackground is how many asynchronous requests (O_DIRECT with io_uring or libaio) the kernel has in flight.
	fuseBackground = 128

	// fuseInFlight bounds the memory for requests that are being read and carried out, in bytes.
	fuseInFlight = 128 << 20

	// fuseForever is how long the kernel may remember names and attributes, which never change.
	fuseForever = math.MaxUint32 * time.Second
)

// Mount is a folder with one file for each device, served by this process through FUSE.
type Mount struct {
	dir        string
	made       bool       // the folder was made by us
	files      *fuseFiles // whom the kernel asks
	connection *os.File   // to the kernel, which the server has under another number
	number     int        // that number
	lasting    bool       // requests can be repeated for whoever serves the mount after us
	ended      chan struct{}
	mu         sync.Mutex // guards what follows
	closed     bool
	abandoned  bool // and so somebody else's
}

// MountFUSE mounts a file system at dir that has a file for each export, named as it and as long as its device. Reads,
// writes, hole punching, zeroing and seeking for holes reach the device, fsync(2) is its Flush. It needs root (CAP_SYS_ADMIN)
// and /dev/fuse.
//
// The folder is made, for this user alone, if it does not exist; otherwise it must be empty. What a process that was
// killed has left mounted there is removed first.
//
// The server must not open a file of its own mount, nor may what it starts inherit one: a process that waits for itself
// cannot be killed.
func MountFUSE(dir string, exports []Export, opts FUSEOptions) (_ *Mount, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("mount devices at %q: %w", dir, err)
		}
	}()
	if opts.Logger == nil {
		opts.Logger = slog.Default()
	}
	names := make(map[string]bool)
	for _, e := range exports {
		switch {
		case e.Device == nil:
			return nil, fmt.Errorf("export %q has no device", e.Name)
		case e.Name == "" || e.Name == "." || e.Name == ".." || len(e.Name) > unix.NAME_MAX || strings.ContainsAny(e.Name, "/\x00"):
			return nil, fmt.Errorf("export %q: this cannot be the name of a file", e.Name)
		case names[e.Name]:
			return nil, fmt.Errorf("two exports are named %q", e.Name)
		}
		names[e.Name] = true
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return nil, err
	}
	fd, err := unix.Open(fuseDevice, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fuseMissing(err)
	}
	made, err := mountPoint(dir)
	if err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	defer func() {
		if err != nil && made {
			err = errors.Join(err, os.Remove(dir))
		}
	}()
	settings := fmt.Sprintf("fd=%d,rootmode=%o,user_id=%d,group_id=%d,max_read=%d,default_permissions", fd, syscall.S_IFDIR, opts.UID, opts.GID, fuseMaxWrite)
	if err := unix.Mount("drafter", dir, "fuse.drafter", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC|unix.MS_NOATIME, settings); err != nil {
		if errors.Is(err, unix.EPERM) {
			err = fmt.Errorf("%w: mounting needs root (CAP_SYS_ADMIN)", err)
		}
		return nil, errors.Join(err, unix.Close(fd))
	}
	m, server, err := newMount(dir, fd, exports, opts)
	if err != nil { // the descriptor is closed
		return nil, errors.Join(err, detach(dir))
	}
	m.made, m.lasting = made, server.KernelSettings().Flags64()&fuse.CAP_HAS_RESEND != 0
	m.serve(server)
	return m, nil
}

// newMount makes the server of a mount, which asks at descriptor fd what the kernel can do, and takes it over.
func newMount(dir string, fd int, exports []Export, opts FUSEOptions) (*Mount, *fuse.Server, error) {
	log := opts.Logger.With("mount", dir)
	m := &Mount{dir: dir, number: fd, ended: make(chan struct{}), files: newFUSEFiles(exports, opts, log)}
	own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, nil, errors.Join(err, unix.Close(fd))
	}
	m.connection = os.NewFile(uintptr(own), fuseDevice)
	m.files.resend = func() {
		if err := resend(m.connection); err != nil {
			log.Debug("requests of an abandoned mount wait", "error", err)
		}
	}
	// Mounted by ourselves, the descriptor is never inherited by what another goroutine starts: the mount of a dead process
	// whose child has the descriptor hangs whoever looks at it.
	server, err := fuse.NewServer(m.files, fmt.Sprintf("/dev/fd/%d", fd), &fuse.MountOptions{
		MaxBackground: fuseBackground, MaxWrite: fuseMaxWrite, MaxInflightRequestBytes: fuseInFlight,
		ExplicitDataCacheControl: true, DisableXAttrs: true, DisableSplice: true,
		ExtraCapabilities: fuse.CAP_ASYNC_DIO | fuse.CAP_DIRECT_IO_ALLOW_MMAP | fuse.CAP_HAS_RESEND,
		Logger:            slog.NewLogLogger(opts.Logger.Handler(), slog.LevelDebug),
	})
	if err != nil { // it has closed the descriptor
		m.connection.Close()
		return nil, nil, err
	}
	return m, server, nil
}

func (m *Mount) serve(server *fuse.Server) {
	go func() {
		defer close(m.ended)
		server.Serve()
		m.connection.Close()
	}()
}

// fuseMissing says what to do where there is no FUSE.
func fuseMissing(err error) error {
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return fmt.Errorf("open %s: %w: this kernel has no FUSE: load it (modprobe fuse), or give the device to this container (--device %s)", fuseDevice, err, fuseDevice)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return fmt.Errorf("open %s: %w: run as root, or let this user and container open the device", fuseDevice, err)
	}
	return fmt.Errorf("open %s: %w", fuseDevice, err)
}

// mountPoint makes dir an empty folder that nothing is mounted on, and reports whether it made it.
func mountPoint(dir string) (made bool, err error) {
	var stat unix.Statfs_t
	if err := unix.Statfs(dir, &stat); errors.Is(err, unix.ENOTCONN) {
		// The server of what is mounted here is dead. Nobody can miss it.
		if err := detach(dir); err != nil {
			return false, err
		}
	}
	err = os.Mkdir(dir, 0o700)
	if err == nil {
		return true, nil
	}
	if !errors.Is(err, os.ErrExist) {
		return false, err
	}
	f, err := os.Open(dir)
	if err != nil {
		return false, err
	}
	defer f.Close()
	var here, above unix.Stat_t
	if err := errors.Join(unix.Lstat(dir, &here), unix.Lstat(filepath.Dir(dir), &above)); err != nil {
		return false, err
	}
	if here.Dev != above.Dev {
		return false, fmt.Errorf("something is mounted there already: unmount it (umount %s), or choose another folder", dir)
	}
	switch names, err := f.Readdirnames(1); {
	case err == nil && len(names) > 0:
		return false, fmt.Errorf("the folder is not empty, it has %q: choose another one", names[0])
	case err != nil && err != io.EOF:
		return false, err
	}
	return false, nil
}

// detach takes the mount at dir away from everybody: what is open there fails from now on.
func detach(dir string) error {
	if err := unix.Unmount(dir, unix.MNT_FORCE|unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
		return fmt.Errorf("unmount %q: %w", dir, err)
	}
	return nil
}

// Dir is where the files are.
func (m *Mount) Dir() string { return m.dir }

// Path is where the file of an export is.
func (m *Mount) Path(name string) string { return filepath.Join(m.dir, name) }

// Done is closed when nothing is served any more: after Close, or when somebody else has unmounted the folder.
func (m *Mount) Done() <-chan struct{} { return m.ended }

// Close unmounts, and removes the folder if MountFUSE made it. Programs that have a file of it open get errors from then
// on; what they wrote is in the device, except what they wrote through a mapping and did not sync. Close waits for calls of devices
// that have not returned, as [Server.Close] does. A second Close waits as the first, and returns nil. Of a mount that was abandoned it only waits for
// those calls.
func (m *Mount) Close() error {
	m.mu.Lock()
	first, abandoned := !m.closed, m.abandoned
	m.closed = true
	m.mu.Unlock()
	if abandoned {
		m.files.using.Lock()
		defer m.files.using.Unlock()
		return nil
	}
	if !first {
		<-m.ended
		return nil
	}
	var err error
	select {
	case <-m.ended: // unmounted by somebody else: what is mounted there now is not ours
	default:
		err = detach(m.dir)
		select {
		case <-m.ended:
			err = nil // at the same moment
		default:
		}
		if err != nil {
			return fmt.Errorf("close mount: %w", err)
		}
		<-m.ended
	}
	if m.made {
		err = os.Remove(m.dir)
	}
	if err != nil {
		return fmt.Errorf("close mount: %w", err)
	}
	return nil
}

// fuseFiles answers the kernel: a folder, inode 1, and a file for each export, from inode 2 on.
type fuseFiles struct {
	fuse.RawFileSystem // answers ENOSYS: not offered

	files  []fuseFile
	byName map[string]uint64 // inodes
	owner  fuse.Owner
	made   time.Time
	log    *slog.Logger
	errors *errorLog

	using     sync.RWMutex // held for reading by whoever uses a device
	abandoned atomic.Bool  // nothing may be done with the devices any more: see Mount.Abandon
	resend    func()       // has the kernel repeat what is not answered
}

type fuseFile struct {
	Export
	size int64
}

func newFUSEFiles(exports []Export, opts FUSEOptions, log *slog.Logger) *fuseFiles {
	fs := &fuseFiles{
		RawFileSystem: fuse.NewDefaultRawFileSystem(), byName: make(map[string]uint64), made: time.Now(), log: log, errors: &errorLog{},
		owner: fuse.Owner{Uid: uint32(opts.UID), Gid: uint32(opts.GID)},
	}
	for i, e := range exports {
		fs.files = append(fs.files, fuseFile{Export: e, size: e.Device.Size()})
		fs.byName[e.Name] = uint64(i) + fuse.FUSE_ROOT_ID + 1
	}
	return fs
}

// file is the file of an inode, nil for the folder.
func (fs *fuseFiles) file(inode uint64) *fuseFile {
	if i := inode - fuse.FUSE_ROOT_ID - 1; i < uint64(len(fs.files)) {
		return &fs.files[i]
	}
	return nil
}

// use begins the use of a device, which ends with using.RUnlock, if that is allowed still. If not, whatever the kernel is told
// does not reach it: who serves the mount now has to be asked.
func (fs *fuseFiles) use() bool {
	fs.using.RLock()
	if !fs.abandoned.Load() {
		return true
	}
	fs.using.RUnlock()
	fs.resend()
	return false
}

// status is what the kernel is told of an error of a device, which is logged.
func (fs *fuseFiles) status(f *fuseFile, request string, offset, length int64, err error) fuse.Status {
	if err == nil {
		return fuse.OK
	}
	fs.errors.log(fs.log.With("file", f.Name), request, offset, length, err)
	var errno syscall.Errno
	switch {
	case errors.As(err, &errno):
		return fuse.Status(errno)
	case errors.Is(err, os.ErrClosed):
		return fuse.Status(syscall.ENODEV)
	}
	return fuse.EIO
}

func (fs *fuseFiles) String() string { return "drafter" }

func (fs *fuseFiles) attributes(inode uint64, out *fuse.Attr) {
	at := uint64(fs.made.Unix())
	*out = fuse.Attr{Ino: inode, Atime: at, Mtime: at, Ctime: at, Owner: fs.owner, Blksize: block.PageSize}
	f := fs.file(inode)
	switch {
	case f == nil:
		out.Mode, out.Nlink = syscall.S_IFDIR|0o500, 2
		return
	case f.ReadOnly:
		out.Mode = syscall.S_IFREG | 0o400
	default:
		out.Mode = syscall.S_IFREG | 0o600
	}
	if !f.Modified.IsZero() {
		out.Mtime = uint64(f.Modified.Unix())
	}
	out.Nlink, out.Size, out.Blocks = 1, uint64(f.size), uint64(f.size+511)/512
}

func (fs *fuseFiles) entry(inode uint64, out *fuse.EntryOut) {
	out.NodeId, out.Generation = inode, 1
	out.SetEntryTimeout(fuseForever)
	out.SetAttrTimeout(fuseForever)
	fs.attributes(inode, &out.Attr)
}

// Lookup implements [fuse.RawFileSystem], as all that follow.
func (fs *fuseFiles) Lookup(_ <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	inode, ok := fs.byName[name]
	if !ok || h.NodeId != fuse.FUSE_ROOT_ID {
		return fuse.ENOENT
	}
	fs.entry(inode, out)
	return fuse.OK
}

func (fs *fuseFiles) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	out.SetTimeout(fuseForever)
	fs.attributes(in.NodeId, &out.Attr)
	return fuse.OK
}

// SetAttr accepts times, which are not kept, and the size that the file has. A device has one size.
func (fs *fuseFiles) SetAttr(_ <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	if in.Valid&(fuse.FATTR_MODE|fuse.FATTR_UID|fuse.FATTR_GID) != 0 {
		return fuse.EPERM
	}
	if f := fs.file(in.NodeId); in.Valid&fuse.FATTR_SIZE != 0 && (f == nil || int64(in.Size) != f.size) {
		return fuse.EPERM
	}
	out.SetTimeout(fuseForever)
	fs.attributes(in.NodeId, &out.Attr)
	return fuse.OK
}

func (fs *fuseFiles) Open(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	f := fs.file(in.NodeId)
	if f == nil {
		return fuse.EISDIR
	}
	if f.ReadOnly && in.Flags&syscall.O_ACCMODE != syscall.O_RDONLY {
		return fuse.EROFS
	}
	// Nothing is to be done when a file is closed: there is no cache. A program that ends while nobody serves the mount must not wait for that.
	out.OpenFlags = fuse.FOPEN_DIRECT_IO | fuse.FOPEN_PARALLEL_DIRECT_WRITES | fuse.FOPEN_NOFLUSH
	return fuse.OK
}

func (fs *fuseFiles) Read(_ <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	if !fs.use() {
		return nil, fuse.EIO
	}
	defer fs.using.RUnlock()
	f := fs.file(in.NodeId)
	if f == nil {
		return nil, fuse.EISDIR
	}
	off := int64(in.Offset)
	if off >= f.size {
		return fuse.ReadResultData(nil), fuse.OK
	}
	p := buf[:min(int64(in.Size), int64(len(buf)), f.size-off)]
	n, err := f.Device.ReadAt(p, off)
	if n == len(p) {
		err = nil // io.EOF at the end of the device
	} else if err == nil {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return nil, fs.status(f, "read", off, int64(len(p)), err)
	}
	return fuse.ReadResultData(p), fuse.OK
}

// Write writes nothing of what would reach over the end of the device: there is no space there.
func (fs *fuseFiles) Write(_ <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	if !fs.use() {
		return 0, fuse.EIO
	}
	defer fs.using.RUnlock()
	f := fs.file(in.NodeId)
	if f == nil {
		return 0, fuse.EISDIR
	}
	off := int64(in.Offset)
	if int64(len(data)) > f.size-off {
		return 0, fuse.Status(syscall.ENOSPC)
	}
	if _, err := f.Device.WriteAt(data, off); err != nil {
		return 0, fs.status(f, "write", off, int64(len(data)), err)
	}
	return uint32(len(data)), fuse.OK
}

func (fs *fuseFiles) Fsync(_ <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	if !fs.use() {
		return fuse.EIO
	}
	defer fs.using.RUnlock()
	f := fs.file(in.NodeId)
	if f == nil || f.ReadOnly {
		return fuse.OK
	}
	return fs.status(f, "flush", 0, f.size, f.Device.Flush())
}

func (fs *fuseFiles) Fallocate(_ <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	if !fs.use() {
		return fuse.EIO
	}
	defer fs.using.RUnlock()
	const zero = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_ZERO_RANGE
	f := fs.file(in.NodeId)
	switch {
	case f == nil:
		return fuse.EISDIR
	case in.Mode&^(zero|unix.FALLOC_FL_KEEP_SIZE) != 0:
		return fuse.Status(syscall.EOPNOTSUPP)
	case in.Offset > math.MaxInt64 || in.Length > math.MaxInt64-in.Offset:
		return fuse.EINVAL
	case int64(in.Offset+in.Length) > f.size && in.Mode&unix.FALLOC_FL_KEEP_SIZE == 0:
		return fuse.Status(syscall.ENOSPC)
	case in.Mode&zero == 0 || int64(in.Offset) >= f.size:
		return fuse.OK // there is nothing to allocate
	}
	off := int64(in.Offset)
	n := min(int64(in.Length), f.size-off)
	return fs.status(f, "discard", off, n, f.Device.Discard(off, n))
}

func (fs *fuseFiles) Lseek(_ <-chan struct{}, in *fuse.LseekIn, out *fuse.LseekOut) fuse.Status {
	if !fs.use() {
		return fuse.EIO
	}
	defer fs.using.RUnlock()
	f := fs.file(in.NodeId)
	if f == nil {
		return fuse.EISDIR
	}
	at := int64(in.Offset)
	if at < 0 || at >= f.size {
		return fuse.Status(syscall.ENXIO)
	}
	for {
		data, err := block.NextData(f.Device, at)
		switch {
		case err == io.EOF && in.Whence == unix.SEEK_DATA:
			return fuse.Status(syscall.ENXIO)
		case err == io.EOF:
			out.Offset = uint64(at)
			return fuse.OK
		case err != nil:
			return fs.status(f, "find data", at, f.size-at, err)
		case in.Whence == unix.SEEK_DATA:
			out.Offset = uint64(data.Offset)
			return fuse.OK
		case in.Whence != unix.SEEK_HOLE:
			return fuse.EINVAL
		case data.Offset > at:
			out.Offset = uint64(at)
			return fuse.OK
		case data.End() >= f.size: // there is a hole at the end of every file
			out.Offset = uint64(f.size)
			return fuse.OK
		}
		at = data.End()
	}
}

func (fs *fuseFiles) OpenDir(_ <-chan struct{}, _ *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	return fuse.OK
}

func (fs *fuseFiles) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	for i := in.Offset; ; i++ {
		e, ok := fs.dirEntry(i)
		if !ok || !out.AddDirEntry(e) {
			return fuse.OK
		}
	}
}

func (fs *fuseFiles) ReadDirPlus(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	for i := in.Offset; ; i++ {
		e, ok := fs.dirEntry(i)
		if !ok {
			return fuse.OK
		}
		entry := out.AddDirLookupEntry(e)
		if entry == nil {
			return fuse.OK
		}
		if i >= 2 { // the two dots are not looked up
			fs.entry(e.Ino, entry)
		}
	}
}

// dirEntry is the folder's entry number i.
func (fs *fuseFiles) dirEntry(i uint64) (fuse.DirEntry, bool) {
	switch {
	case i < 2:
		return fuse.DirEntry{Name: ".."[:i+1], Ino: fuse.FUSE_ROOT_ID, Mode: syscall.S_IFDIR}, true
	case i < uint64(len(fs.files))+2:
		return fuse.DirEntry{Name: fs.files[i-2].Name, Ino: i, Mode: syscall.S_IFREG}, true
	}
	return fuse.DirEntry{}, false
}

func (fs *fuseFiles) ReleaseDir(*fuse.ReleaseIn)                          {}
func (fs *fuseFiles) FsyncDir(<-chan struct{}, *fuse.FsyncIn) fuse.Status { return fuse.OK }
func (fs *fuseFiles) Release(<-chan struct{}, *fuse.ReleaseIn)            {}

// StatFs says that the file system is full: it has its files, and room for no more.
func (fs *fuseFiles) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	*out = fuse.StatfsOut{Bsize: block.PageSize, Frsize: block.PageSize, Files: uint64(len(fs.files)), NameLen: unix.NAME_MAX}
	for _, f := range fs.files {
		out.Blocks += uint64(f.size+block.PageSize-1) / block.PageSize
	}
	return fuse.OK
}

// The files are what they are: none can be added, removed or renamed.

func (fs *fuseFiles) Create(<-chan struct{}, *fuse.CreateIn, string, *fuse.CreateOut) fuse.Status {
	return fuse.EPERM
}

func (fs *fuseFiles) Mknod(<-chan struct{}, *fuse.MknodIn, string, *fuse.EntryOut) fuse.Status {
	return fuse.EPERM
}

func (fs *fuseFiles) Mkdir(<-chan struct{}, *fuse.MkdirIn, string, *fuse.EntryOut) fuse.Status {
	return fuse.EPERM
}

func (fs *fuseFiles) Symlink(<-chan struct{}, *fuse.InHeader, string, string, *fuse.EntryOut) fuse.Status {
	return fuse.EPERM
}

func (fs *fuseFiles) Link(<-chan struct{}, *fuse.LinkIn, string, *fuse.EntryOut) fuse.Status {
	return fuse.EPERM
}

func (fs *fuseFiles) Rename(<-chan struct{}, *fuse.RenameIn, string, string) fuse.Status {
	return fuse.EPERM
}

func (fs *fuseFiles) Unlink(<-chan struct{}, *fuse.InHeader, string) fuse.Status { return fuse.EPERM }
func (fs *fuseFiles) Rmdir(<-chan struct{}, *fuse.InHeader, string) fuse.Status  { return fuse.EPERM }
