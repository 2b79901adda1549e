//! Files and folders: what has to be synced, how something is put in place of something else.

use std::fs::{self, File, Metadata, Permissions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use snaptree_engine::driver::{DriverError, FileFacts};
use snaptree_engine::layer::FileStamp;
use snaptree_engine::operation::{Code, Failure};
use snaptree_files::FolderError;

use super::qcow2::{Header, ReadError};
pub(super) use crate::failing::{Doing, if_there, io_error};

/// Bits that let someone write.
pub(super) const WRITE_BITS: u32 = 0o222;
/// The permission bits that Snaptree keeps and gives back.
pub(super) const MODE_BITS: u32 = 0o7777;
/// Where layers are kept beside the images.
pub(super) const LAYERS_FOLDER: &str = ".snaptree";
const SELINUX: &str = "security.selinux";
const LABEL_BYTES_MAX: usize = 4096;

/// What tells that a file was not touched.
pub(super) fn stamp(metadata: &Metadata) -> FileStamp {
    FileStamp {
        inode: metadata.ino(),
        size_bytes: metadata.len(),
        mtime_ns: metadata.mtime().saturating_mul(1_000_000_000).saturating_add(metadata.mtime_nsec()),
    }
}

/// The stamp of the regular file at `path`.
pub(super) fn stamp_of(path: &Path) -> Result<FileStamp, DriverError> {
    let metadata = fs::symlink_metadata(path).doing("look at", path)?;
    if !metadata.is_file() {
        return Err(DriverError::permanent(
            Code::Drift,
            format!("{} is no regular file any more", path.display()),
        ));
    }
    Ok(stamp(&metadata))
}

/// All that is known of an image without a child process.
pub(super) fn facts(path: &Path) -> Result<(FileFacts, Metadata, Header), ReadError> {
    let file = open_image(path).map_err(ReadError::Io)?;
    let metadata = file.metadata().map_err(ReadError::Io)?;
    if !metadata.is_file() {
        return Err(ReadError::Io(io::Error::other("it is no regular file")));
    }
    let header = Header::read(&file)?;
    let facts = FileFacts {
        stamp: stamp(&metadata),
        mode: metadata.mode() & MODE_BITS,
        allocated_bytes: metadata.blocks().saturating_mul(512),
        backing: header.backing.as_ref().map(|backing| backing.file(path)),
        virtual_size_bytes: header.virtual_size_bytes,
        internal_snapshots: header.internal_snapshots,
    };
    Ok((facts, metadata, header))
}

/// Opens a regular file for reading. What is none is not opened at all: a pipe would make the open wait, and a device may
/// do something when it is opened.
pub(super) fn open_image(path: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    let flags = nix::libc::O_NONBLOCK | nix::libc::O_NOCTTY;
    let file = fs::OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    // It may be another one by now.
    if !file.metadata()?.is_file() || is_the_kernels(rustix::fs::fstatfs(&file)?.f_type) {
        return Err(io::Error::other("it is no file on a disk"));
    }
    Ok(file)
}

/// Why something cannot be a part of a disk, if it cannot: a pipe, a socket, a device that is no block device, a file that
/// the kernel makes up. It is not opened to know that.
pub(super) fn unfit(path: &Path) -> io::Result<Option<&'static str>> {
    use std::os::unix::fs::FileTypeExt;
    let kind = fs::metadata(path)?.file_type();
    if kind.is_block_device() {
        return Ok(None);
    }
    if !kind.is_file() {
        return Ok(Some("no regular file"));
    }
    let made_up = is_the_kernels(rustix::fs::statfs(path)?.f_type);
    Ok(made_up.then_some("a file of the kernel's, on no disk"))
}

/// `/dev/stdin`, `/dev/fd/3`, `/proc/self/fd/3`: what they lead to depends on who opens them.
pub(super) fn is_of_the_process(path: &Path) -> bool {
    path.starts_with("/proc")
        || path.starts_with("/dev/fd")
        || ["/dev/stdin", "/dev/stdout", "/dev/stderr"].iter().any(|name| path == Path::new(name))
}

/// The magic numbers of procfs, sysfs, debugfs, tracefs, securityfs, both cgroup file systems and the pipes'
/// (`linux/magic.h`).
fn is_the_kernels(kind: rustix::fs::FsWord) -> bool {
    const MADE_UP: [u32; 8] =
        [0x9fa0, 0x6265_6572, 0x6462_6720, 0x7472_6163, 0x7363_6673, 0x0027_e0eb, 0x6367_7270, 0x5049_5045];
    u32::try_from(kind).is_ok_and(|kind| MADE_UP.contains(&kind))
}

/// Syncs a file or a folder, on a thread that may wait for the disk.
pub(super) async fn sync(path: &Path) -> Result<(), DriverError> {
    let owned = path.to_path_buf();
    let synced =
        tokio::task::spawn_blocking(move || File::open(owned).and_then(|file| file.sync_all())).await;
    match synced {
        Ok(result) => result.doing("sync", path),
        Err(error) => {
            Err(DriverError::unknown(Code::Io, format!("cannot sync {}", path.display())).source(error))
        }
    }
}

/// The folder that `path` is in.
pub(super) fn folder_of(path: &Path) -> PathBuf {
    path.parent().map_or_else(|| PathBuf::from("/"), Path::to_path_buf)
}

/// Removes a file or symlink; one that is not there is fine. Says whether there was one.
pub(super) fn remove(path: &Path) -> Result<bool, DriverError> {
    Ok(if_there(fs::remove_file(path)).doing("remove", path)?.is_some())
}

/// Sets the permission bits, if they are others.
pub(super) fn set_mode(path: &Path, mode: u32) -> Result<(), DriverError> {
    let now = fs::metadata(path).doing("look at", path)?.mode() & MODE_BITS;
    if now != mode & MODE_BITS {
        fs::set_permissions(path, Permissions::from_mode(mode & MODE_BITS))
            .doing("change the mode of", path)?;
    }
    Ok(())
}

/// Gives a new file the owner, group, label and mode that the layer below had before it was frozen.
pub(super) fn dress(path: &Path, like: &Path, mode: u32) -> Result<(), DriverError> {
    let below = fs::metadata(like).doing("look at", like)?;
    let now = fs::metadata(path).doing("look at", path)?;
    if (now.uid(), now.gid()) != (below.uid(), below.gid()) {
        std::os::unix::fs::chown(path, Some(below.uid()), Some(below.gid())).map_err(|error| {
            io_error("give the new layer to the owner of the image below it:", path, error)
                .hint("run snaptree as root, or as the owner of the image")
        })?;
    }
    copy_label(path, like)?;
    set_mode(path, mode)
}

/// Copies the SELinux label; file systems and kernels without labels have none to copy.
fn copy_label(path: &Path, like: &Path) -> Result<(), DriverError> {
    let mut label = vec![0_u8; LABEL_BYTES_MAX];
    let Ok(length) = rustix::fs::getxattr(like, SELINUX, &mut label[..]) else { return Ok(()) };
    label.truncate(length);
    match rustix::fs::setxattr(path, SELINUX, &label, rustix::fs::XattrFlags::empty()) {
        Err(rustix::io::Errno::NOTSUP) => Ok(()),
        set => set.doing("label", path),
    }
}

/// Whether the layers folder, as far as it is there, is ours alone: neither it nor the `.snaptree` that it is in is a
/// link or can be changed by others. The images beside it may be anybody's, and Snaptree often runs as root.
pub(super) fn check_layers(layers: &Path) -> Result<(), DriverError> {
    let Some(id) = layers.file_name().map(Path::new) else { return Ok(()) };
    let around = folder_of(layers);
    let checked = if around.ends_with(LAYERS_FOLDER) {
        snaptree_files::check_folders(&folder_of(&around), &Path::new(LAYERS_FOLDER).join(id))
    } else {
        snaptree_files::check_folders(&around, id)
    };
    match checked {
        Err(FolderError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(()),
        Err(FolderError::Io { path, source }) => Err(io_error("look at the folder", &path, source)),
        Err(error) => {
            let failure = Failure::new(Code::Permission, error.to_string()).refused();
            Err(match error.mend() {
                Some(mend) => failure.hint(mend),
                None => failure.hint("layers are kept in folders of Snaptree's own; move it out of the way"),
            }
            .into())
        }
        Ok(()) => Ok(()),
    }
}

/// Makes a folder and its missing parents, and syncs each folder that got a new entry.
pub(super) async fn make_folder(path: &Path) -> Result<(), DriverError> {
    let mut missing = Vec::new();
    let mut at = path;
    while !at.is_dir() {
        missing.push(at.to_path_buf());
        let Some(parent) = at.parent() else { break };
        at = parent;
    }
    for folder in missing.iter().rev() {
        match fs::create_dir(folder) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                return Err(io_error("make the folder", folder, error));
            }
            _ => {}
        }
        // QEMU may run as another user, and has to pass through; the images have modes of their own.
        set_mode(folder, 0o755)?;
        sync(&folder_of(folder)).await?;
    }
    Ok(())
}

/// Makes an empty file that only its owner may read. One that is there is an error.
pub(super) fn make_private(path: &Path) -> Result<(), DriverError> {
    use std::os::unix::fs::OpenOptionsExt;
    fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).doing("make", path).map(|_| ())
}

/// A short name for a temporary entry beside `path`, of this operation alone.
pub(super) fn beside(path: &Path, name: &str) -> PathBuf {
    folder_of(path).join(name)
}
