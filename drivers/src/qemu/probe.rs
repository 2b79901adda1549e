//! Looking at the images of a domain that is to be registered.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Metadata};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use serde::Deserialize;
use snaptree_engine::claim::{Claim, ClaimKind};
use snaptree_engine::domain::Disk;
use snaptree_engine::driver::{CallOff, DriverError, NoWatch, Probe, Registration};
use snaptree_engine::operation::{Code, Failure};
use snaptree_engine::{DiskName, DomainName};

use super::config::{
    BACKING_PATH_BYTES_MAX, DEPTH_MAX, DiskPaths, PathWish, QemuConfig, QemuOptions, RawWish, RepairWish,
    capabilities,
};
use super::files::{self, Doing, folder_of, make_private, remove, stamp_of, sync};
use super::img::{Dirty, ForceShare, Patron, QemuImg};
use super::inside::foreign_names;
use super::internal::table;
use super::libvirt;
use super::live::Monitor;
use super::lock::{in_use, writer};
use super::qcow2::{Header, HeaderError, ReadError};
use super::qmp::QmpError;
use super::runs::{Runs, SOCKET_PATH_BYTES_MAX};

/// What a layer's file name adds to a disk's name: two dashes, a UUID, `base`, `.qcow2.new`, and a slash.
const FILE_NAME_BYTES: usize = 64;
const NAME_BYTES_MAX: usize = 255;

/// Files that belong to somebody, told by path and by inode.
pub(super) struct Owned {
    paths: BTreeMap<PathBuf, DomainName>,
    inodes: BTreeMap<(u64, u64), DomainName>,
}

impl Owned {
    pub(super) fn new(paths: &BTreeMap<PathBuf, DomainName>) -> Self {
        let inode = |path: &Path| fs::metadata(path).ok().map(|file| (file.dev(), file.ino()));
        let inodes = paths.iter().filter_map(|(path, owner)| Some((inode(path)?, owner.clone()))).collect();
        Self { paths: paths.clone(), inodes }
    }

    pub(super) fn owner(&self, path: &Path, metadata: &Metadata) -> Option<&DomainName> {
        self.paths.get(path).or_else(|| self.inodes.get(&(metadata.dev(), metadata.ino())))
    }
}

/// Looks at everything, and converts raw images if that is wished.
///
/// `run_dir` is where a machine that Snaptree runs has its socket.
pub(super) async fn probe(
    img: &QemuImg,
    registration: &Registration,
    run_dir: &Path,
) -> Result<Probe, DriverError> {
    let options = options(registration)?;
    if registration.disks.is_empty() {
        return Err(invalid("a QEMU domain needs at least one disk".to_owned()).hint("--disk vda=FILE"));
    }
    let taken = Owned::new(&registration.taken);
    let bases = Owned::new(&options.bases);
    let mut notes = Vec::new();
    let names: Vec<&DiskName> = registration.disks.iter().map(|(name, _)| name).collect();
    let mut config = QemuConfig {
        layers: PathBuf::new(),
        keep_path: options.keep_path,
        disks: BTreeMap::new(),
        removed: BTreeMap::new(),
        runs: Runs::of(&options.runs, &names, &run_dir.join(registration.id.to_string()))?,
        agent: options.agent.clone(),
    };
    check_agent(&config)?;
    check_monitor(&config.runs).await?;
    let mut disks = Vec::new();
    let mut inodes = BTreeMap::new();
    for (name, given) in &registration.disks {
        let (given, resolved) = resolve(given)?;
        let metadata = check_file(&resolved)?;
        if let Some(owner) = taken.owner(&resolved, &metadata).or_else(|| bases.owner(&resolved, &metadata)) {
            return Err(invalid(format!("image {} already belongs to domain '{owner}'", resolved.display())));
        }
        if let Some(other) = inodes.insert((metadata.dev(), metadata.ino()), name.clone()) {
            return Err(invalid(format!(
                "disks '{other}' and '{name}' are the same image {}",
                resolved.display()
            )));
        }
        if config.disks.contains_key(name) {
            return Err(invalid(format!("disk '{name}' is given twice")));
        }
        let (disk, paths) =
            disk(img, (name, given, resolved), (options.raw, options.repair, &taken), &mut notes).await?;
        disks.push(disk);
        config.disks.insert(name.clone(), paths);
    }
    check_own_bases(&config)?;
    config.layers = layers_folder(registration, &options, &config)?;
    note_running(&registration.name, &config, &mut notes)?;
    let capabilities = capabilities(config.agent.as_ref(), &config.runs);
    let claims = claims(&config)?;
    Ok(Probe { disks, config: config.to_value()?, capabilities, claims, notes })
}

/// What the domain would have for itself: its images, by every path that they can be reached by, and its layers folder.
pub(super) fn claims(config: &QemuConfig) -> Result<Vec<Claim>, DriverError> {
    let mut claims = vec![Claim::new(ClaimKind::Layers, config.layers.to_string_lossy())];
    for paths in config.disks.values() {
        claims.push(Claim::new(ClaimKind::Image, paths.given.to_string_lossy()));
        claims.push(Claim::new(ClaimKind::Image, paths.resolved.to_string_lossy()));
        let found = fs::metadata(&paths.resolved).doing("look at", &paths.resolved)?;
        // A number is used again when its file is gone, so the file's birth is part of what it is. Where the file system
        // knows none, who came first is told by the paths alone.
        let born = found.created().ok().and_then(|born| born.duration_since(UNIX_EPOCH).ok());
        if let Some(born) = born {
            let file = format!("{}:{}:{}", found.dev(), found.ino(), born.as_nanos());
            claims.push(Claim::new(ClaimKind::File, file));
        }
    }
    Ok(claims)
}

/// Refuses a QMP socket that is libvirt's own, or behind which nobody speaks to us though somebody is there. A machine
/// that is off has none.
pub(super) async fn check_monitor(runs: &Runs) -> Result<(), DriverError> {
    let (Runs::Attached { qmp } | Runs::Commands { qmp: Some(qmp), .. }) = runs else { return Ok(()) };
    libvirt::check_monitor(qmp)?;
    match Monitor::connect(qmp).await {
        Err(error @ (QmpError::Silent { .. } | QmpError::Malformed { .. })) => {
            let failure = Failure::new(Code::InUse, error.to_string()).refused();
            Err(failure.hint(
                "a monitor takes one client at a time: give the machine a QMP socket for Snaptree alone, or end what has it",
            ))?
        }
        _ => Ok(()),
    }
}

/// The image of a disk and all that it is built upon.
pub(super) async fn disk(
    img: &QemuImg,
    (name, given, resolved): (&DiskName, PathBuf, PathBuf),
    (raw, repair, taken): (RawWish, RepairWish, &Owned),
    notes: &mut Vec<String>,
) -> Result<(Disk, DiskPaths), DriverError> {
    let header = header(img, &resolved, raw, notes).await?;
    let bases = chain(&resolved, &header, taken)?;
    check_images(img, (&resolved, &header), &bases, repair, notes).await?;
    note_internal_snapshots(&resolved, &header, notes);
    let disk = Disk::new(name.clone(), Some(given.clone()), header.virtual_size_bytes);
    let inside = Some(foreign_snapshots(&resolved)?);
    let relative_base = header.backing.map(|backing| backing.name).filter(|name| name.is_relative());
    Ok((disk, DiskPaths { given, resolved, bases, relative_base, inside }))
}

/// A machine that runs, and that nothing was said about reaching: nothing can be done with it until it is off.
fn note_running(name: &DomainName, config: &QemuConfig, notes: &mut Vec<String>) -> Result<(), DriverError> {
    if config.runs.qmp().is_some() {
        return Ok(());
    }
    for disk in config.disks.values() {
        let holder = writer(&disk.resolved).doing("ask for the locks of", &disk.resolved)?;
        let Some(holder) = holder else { continue };
        let by = holder.pid.map_or_else(|| "another process".to_owned(), |pid| format!("process {pid}"));
        notes.push(format!(
            "the machine runs now ({by} writes {}), and without its QMP socket snapshots can be taken only while it is \
             off; `snaptree domain set {name} --qmp SOCKET` says where it is reached",
            disk.resolved.display()
        ));
        return Ok(());
    }
    Ok(())
}

/// A guest is quiesced for the moment in which its machine is stopped, and that is done by QMP.
pub(super) fn check_agent(config: &QemuConfig) -> Result<(), DriverError> {
    let Some(socket) = &config.agent else { return Ok(()) };
    if config.runs.qmp().is_none() {
        return Err(invalid(
            "--agent is of no use without a way to reach the machine while it runs".to_owned(),
        )
        .hint("add --qmp SOCKET, or let Snaptree start the machine with --launch"));
    }
    let bytes = socket.as_os_str().len();
    if bytes > SOCKET_PATH_BYTES_MAX {
        return Err(invalid(format!(
            "the path of the guest agent's socket {} has {bytes} bytes, and a socket's may have \
             {SOCKET_PATH_BYTES_MAX}",
            socket.display()
        )));
    }
    Ok(())
}

pub(super) fn invalid(message: String) -> DriverError {
    DriverError::from(Failure::new(Code::Invalid, message).refused())
}

fn bad_image(message: String) -> DriverError {
    DriverError::from(Failure::new(Code::BadImage, message).refused())
}

fn options(registration: &Registration) -> Result<QemuOptions, DriverError> {
    if registration.options.is_null() {
        return Ok(QemuOptions::default());
    }
    QemuOptions::deserialize(&registration.options)
        .map_err(|error| invalid(format!("the options of a QEMU domain cannot be read: {error}")))
}

/// The path made absolute, and where it leads.
pub(super) fn resolve(given: &Path) -> Result<(PathBuf, PathBuf), DriverError> {
    let given = std::path::absolute(given).doing("make absolute", given)?;
    if files::is_of_the_process(&given) {
        return Err(no_file(&given, "another file for each process"));
    }
    let error = match fs::canonicalize(&given) {
        Ok(resolved) => return Ok((given, resolved)),
        Err(error) => error,
    };
    let shown = given.display();
    // ELOOP has no stable kind.
    if error.raw_os_error() == Some(nix::libc::ELOOP) {
        return Err(invalid(format!("the symbolic links at {shown} lead round in a circle")));
    }
    if error.kind() != ErrorKind::NotFound {
        return Err(files::io_error("resolve", &given, error));
    }
    let message = match fs::symlink_metadata(&given) {
        Ok(_) => format!("{shown} is a symbolic link to a file that is missing"),
        Err(_) => format!("there is no image {shown}"),
    };
    Err(Failure::new(Code::NotFound, message).refused().into())
}

fn no_file(path: &Path, what: &str) -> DriverError {
    let message = format!("{} is {what}, and only files can be disks", path.display());
    Failure::new(Code::Unsupported, message).refused().into()
}

pub(super) fn check_file(path: &Path) -> Result<Metadata, DriverError> {
    let metadata = fs::metadata(path).doing("look at", path)?;
    let shown = path.display();
    if let Some(what) = files::unfit(path).doing("look at", path)? {
        return Err(no_file(path, what));
    }
    if !metadata.is_file() {
        return Err(no_file(path, "no regular file"));
    }
    if metadata.nlink() != 1 {
        return Err(invalid(format!(
            "image {shown} has {} names (hard links); a machine started by another one would miss its snapshots",
            metadata.nlink()
        ))
        .hint("remove the other names, or make copies of them"));
    }
    Ok(metadata)
}

fn unreadable(path: &Path, error: &ReadError) -> DriverError {
    match error {
        ReadError::Io(error) if error.kind() == ErrorKind::PermissionDenied => DriverError::from(
            Failure::new(Code::Permission, format!("image {} may not be read", path.display())).refused(),
        ),
        ReadError::Header(HeaderError::Unsupported(_)) => DriverError::from(
            Failure::new(Code::Unsupported, format!("image {}: {error}", path.display())).refused(),
        ),
        error => bad_image(format!("image {} cannot be used: {error}", path.display())),
    }
}

/// The header of a registered image, which is converted first where that is wished and needed.
async fn header(
    img: &QemuImg,
    path: &Path,
    raw: RawWish,
    notes: &mut Vec<String>,
) -> Result<Header, DriverError> {
    match files::facts(path) {
        Ok((_, _, header)) => Ok(header),
        Err(ReadError::Header(HeaderError::NotQcow2)) => {
            if raw == RawWish::Refuse {
                return Err(bad_image(format!("image {} is not in qcow2 format", path.display()))
                    .hint("--convert makes a raw image a qcow2 one, in its place"));
            }
            check_raw(img, path).await?;
            convert(img, path).await?;
            notes.push(format!("{} was a raw image, and is qcow2 now", path.display()));
            let (_, _, header) = files::facts(path).map_err(|error| unreadable(path, &error))?;
            Ok(header)
        }
        Err(error) => Err(unreadable(path, &error)),
    }
}

/// An image of some third format would be wrapped up as if it were a disk's bytes.
async fn check_raw(img: &QemuImg, path: &Path) -> Result<(), DriverError> {
    let format = img.format(path).await?;
    if format == "raw" {
        return Ok(());
    }
    Err(DriverError::from(
        Failure::new(Code::Unsupported, format!("image {} is in {format} format", path.display()))
            .refused()
            .hint("qemu-img convert -O qcow2 makes a qcow2 image of it"),
    ))
}

/// Puts a qcow2 image in a raw one's place.
async fn convert(img: &QemuImg, path: &Path) -> Result<(), DriverError> {
    if let Some(holder) = writer(path).doing("ask for the locks of", path)? {
        return Err(in_use(&holder).refused().into());
    }
    let mut draft = path.as_os_str().to_os_string();
    draft.push(".snaptree-convert");
    let draft = PathBuf::from(draft);
    if fs::symlink_metadata(&draft).is_ok() {
        return Err(DriverError::from(
            Failure::new(Code::Exists, format!("{} is in the way of the conversion", draft.display()))
                .refused()
                .hint("if it was left behind by an interrupted conversion, remove it"),
        ));
    }
    make_private(&draft)?;
    let converted = convert_into(img, path, &draft).await;
    if converted.is_err() {
        remove(&draft)?;
    }
    converted
}

async fn convert_into(img: &QemuImg, path: &Path, draft: &Path) -> Result<(), DriverError> {
    let before = stamp_of(path)?;
    let patron = Patron { progress: &NoWatch, call_off: CallOff::default() };
    img.convert(None, (path, "raw"), draft, None, patron).await?;
    img.compare(None, (path, "raw"), (draft, "qcow2")).await?;
    let mode = fs::metadata(path).doing("look at", path)?.mode();
    files::dress(draft, path, mode)?;
    sync(draft).await?;
    let unused = writer(path).doing("ask for the locks of", path)?.is_none();
    if !unused || stamp_of(path)? != before {
        return Err(DriverError::permanent(
            Code::InUse,
            format!("image {} was written while it was converted", path.display()),
        )
        .hint("shut the machine down and try again"));
    }
    fs::rename(draft, path).doing("put the converted image at", path)?;
    sync(&folder_of(path)).await
}

/// A base is a file, or a block device that is said to be raw; whoever opened a pipe or a device would wait, or do
/// something there.
fn check_base(above: &Path, named: &Path, base: &Path, format: Option<&str>) -> Result<(), DriverError> {
    let what = if files::is_of_the_process(named) {
        Some("another file for each process")
    } else {
        files::unfit(base).doing("look at", base)?
    };
    let is_file = fs::metadata(base).doing("look at", base)?.is_file();
    let what =
        what.or((!is_file && format != Some("raw")).then_some("a block device, and not said to be raw"));
    match what {
        None => Ok(()),
        Some(what) => Err(Failure::new(
            Code::Unsupported,
            format!("image {} is built upon {}, which is {what}", above.display(), named.display()),
        )
        .refused()
        .hint("an image can be built upon files, and upon block devices as raw ones")
        .into()),
    }
}

/// What the image is built upon, nearest first.
fn chain(image: &Path, header: &Header, taken: &Owned) -> Result<Vec<PathBuf>, DriverError> {
    let mut bases = Vec::new();
    let mut seen = BTreeSet::new();
    let metadata = fs::metadata(image).doing("look at", image)?;
    seen.insert((metadata.dev(), metadata.ino()));
    let mut above = image.to_path_buf();
    let mut next = header.backing.clone();
    while let Some(backing) = next {
        if backing.is_protocol() {
            return Err(DriverError::from(
                Failure::new(
                    Code::Unsupported,
                    format!(
                        "image {} is built upon {}, which is no file",
                        above.display(),
                        backing.name.display()
                    ),
                )
                .refused(),
            ));
        }
        let named = backing.file(&above);
        let base = match fs::canonicalize(&named) {
            Ok(base) => base,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(bad_image(format!(
                    "image {} is built upon {}, which is missing",
                    above.display(),
                    named.display()
                )));
            }
            Err(error) => return Err(files::io_error("resolve", &named, error)),
        };
        let metadata = fs::metadata(&base).doing("look at", &base)?;
        check_base(&above, &named, &base, backing.format.as_deref())?;
        if !seen.insert((metadata.dev(), metadata.ino())) {
            return Err(bad_image(format!(
                "the backing chain of {} loops at {}",
                image.display(),
                base.display()
            )));
        }
        if let Some(owner) = taken.owner(&base, &metadata) {
            return Err(invalid(format!(
                "image {} is built upon {}, which already belongs to domain '{owner}'",
                above.display(),
                base.display()
            )));
        }
        if bases.len() >= DEPTH_MAX {
            return Err(bad_image(format!(
                "the backing chain of {} has more than {DEPTH_MAX} files",
                image.display()
            )));
        }
        // A base that is declared as raw ends the chain, whatever its first bytes look like.
        let may_be_qcow2 = backing.format.as_deref().is_none_or(|format| format == "qcow2");
        next = match files::facts(&base) {
            Ok((_, _, header)) if may_be_qcow2 => header.backing,
            Err(ReadError::Header(HeaderError::NotQcow2)) if backing.format.as_deref() != Some("qcow2") => {
                None
            }
            Err(error) if may_be_qcow2 => return Err(unreadable(&base, &error)),
            _ => None,
        };
        above.clone_from(&base);
        bases.push(base);
    }
    Ok(bases)
}

/// Asks qemu-img about damage, where nobody writes the image.
async fn check_images(
    img: &QemuImg,
    (image, header): (&Path, &Header),
    bases: &[PathBuf],
    repair: RepairWish,
    notes: &mut Vec<String>,
) -> Result<(), DriverError> {
    if let Some(holder) = writer(image).doing("ask for the locks of", image)? {
        let refusal = in_use(&holder);
        notes.push(format!("{}: it was not checked for damage", refusal.message));
    } else {
        if header.is_dirty && repair == RepairWish::Mend {
            img.mend(None, image).await.map_err(refused)?;
            notes.push(format!("{} was mended (qemu-img check -r all)", image.display()));
        }
        // Read anew: it may have been mended.
        let (_, _, header) = files::facts(image).map_err(|error| unreadable(image, &error))?;
        notes.extend(img.check(image, ForceShare::No, dirty(&header)).await.map_err(refused)?);
    }
    for base in bases {
        if let Some(holder) = writer(base).doing("ask for the locks of", base)? {
            let refusal = in_use(&holder);
            return Err(Failure::new(
                Code::InUse,
                format!("{}, and {} is built upon it", refusal.message, image.display()),
            )
            .refused()
            .into());
        }
        if let Ok((_, _, header)) = files::facts(base) {
            notes.extend(img.check(base, ForceShare::Yes, dirty(&header)).await.map_err(refused)?);
        }
    }
    Ok(())
}

fn dirty(header: &Header) -> Dirty {
    if header.is_dirty { Dirty::Yes } else { Dirty::No }
}

fn refused(error: DriverError) -> DriverError {
    DriverError { failure: error.failure.refused(), ..error }
}

/// The names of the snapshots that somebody else made inside the image.
fn foreign_snapshots(path: &Path) -> Result<BTreeSet<String>, DriverError> {
    let entries = table::read(path).map_err(|error| unreadable(path, &error))?;
    Ok(foreign_names(&entries))
}

fn note_internal_snapshots(path: &Path, header: &Header, notes: &mut Vec<String>) {
    if header.internal_snapshots > 0 {
        notes.push(format!(
            "{} has {} snapshots of its own inside the image: they stay, and its layer is never merged away",
            path.display(),
            header.internal_snapshots
        ));
    }
}

/// No disk is built upon another disk of the domain.
pub(super) fn check_own_bases(config: &QemuConfig) -> Result<(), DriverError> {
    let disks: BTreeMap<&Path, &DiskName> =
        config.disks.iter().map(|(name, paths)| (paths.resolved.as_path(), name)).collect();
    for (name, paths) in &config.disks {
        if let Some(other) = paths.bases.iter().find_map(|base| disks.get(base.as_path())) {
            return Err(invalid(format!("disk '{name}' is built upon the image of disk '{other}'")));
        }
    }
    Ok(())
}

/// Where the layers will be: absolute, its existing part resolved, on the file system of all disks, and writable.
fn layers_folder(
    registration: &Registration,
    options: &QemuOptions,
    config: &QemuConfig,
) -> Result<PathBuf, DriverError> {
    let first = registration.disks.first().and_then(|(name, _)| config.disks.get(name));
    let around = match (&options.layers_dir, first) {
        (Some(folder), _) => std::path::absolute(folder).doing("make absolute", folder)?,
        (None, Some(disk)) => folder_of(&disk.resolved).join(files::LAYERS_FOLDER),
        (None, None) => return Err(invalid("a QEMU domain needs at least one disk".to_owned())),
    };
    // Before links are resolved: one in the place of our folder leads who knows where.
    files::check_layers(&around.join(registration.id.to_string()))?;
    let (existing, rest) = existing_part(&around)?;
    let layers = existing.join(rest).join(registration.id.to_string());
    let device = fs::metadata(&existing).doing("look at", &existing)?.dev();
    for (name, paths) in &config.disks {
        if fs::metadata(&paths.resolved).doing("look at", &paths.resolved)?.dev() != device {
            return Err(invalid(format!(
                "disk '{name}' ({}) is not on the file system of the layers folder {}",
                paths.resolved.display(),
                layers.display()
            ))
            .hint("all disks of a domain must be on one file system; --layers names a folder there"));
        }
        check_place(&layers, options.keep_path, name, paths)?;
    }
    check_writable(&existing)?;
    Ok(layers)
}

/// Whether the layers of a disk can be made and named.
pub(super) fn check_place(
    layers: &Path,
    keep_path: PathWish,
    name: &DiskName,
    paths: &DiskPaths,
) -> Result<(), DriverError> {
    if keep_path == PathWish::Follow {
        check_writable(&folder_of(&paths.resolved))?;
    }
    let bytes = layers.as_os_str().len() + name.as_str().len() + FILE_NAME_BYTES;
    if bytes > BACKING_PATH_BYTES_MAX || name.as_str().len() + FILE_NAME_BYTES > NAME_BYTES_MAX {
        return Err(invalid(format!("the path of the layers folder {} is too long", layers.display())));
    }
    Ok(())
}

/// The part of a path that is there, resolved, and the rest.
pub(super) fn existing_part(path: &Path) -> Result<(PathBuf, PathBuf), DriverError> {
    for folder in path.ancestors() {
        match fs::canonicalize(folder) {
            Ok(existing) => {
                if !existing.is_dir() {
                    return Err(invalid(format!("{} is no folder", folder.display())));
                }
                let rest = path.strip_prefix(folder).unwrap_or(Path::new("")).to_path_buf();
                return Ok((existing, rest));
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(files::io_error("resolve", folder, error)),
        }
    }
    Err(invalid(format!("no part of {} exists", path.display())))
}

pub(super) fn check_writable(folder: &Path) -> Result<(), DriverError> {
    use rustix::fs::{Access, AtFlags, CWD};
    let access = Access::WRITE_OK | Access::EXEC_OK;
    rustix::fs::accessat(CWD, folder, access, AtFlags::EACCESS).map_err(|error| {
        Failure::new(Code::Permission, format!("the folder {} cannot be written: {error}", folder.display()))
            .refused()
            .hint("run snaptree as root, or as the owner of the images")
            .into()
    })
}
