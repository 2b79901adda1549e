//! What is refused: unfit images, images in use, differences between disk and log.
#![cfg(feature = "lab")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on shall panic")]

mod qemu_lab;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use qemu_lab::{Ended, Lab, Wish, content, io, make, make_on, registration};
use snaptree_drivers::qemu::{PathWish, QemuDriver, QemuOptions, RawWish, bases_of, files_of};
use snaptree_engine::driver::{Driver, DriverError, Probe};
use snaptree_engine::event::MergeStarted;
use snaptree_engine::operation::Code;
use snaptree_engine::{DiskName, DomainName};

async fn probe_with(dir: &Path, images: &[&str], options: QemuOptions) -> Result<Probe, DriverError> {
    let names = ["vda", "vdb"].into_iter().map(|name| DiskName::new(name).unwrap());
    let disks: Vec<(DiskName, PathBuf)> = names.zip(images.iter().map(|image| dir.join(image))).collect();
    QemuDriver::new(dir.join("run")).probe(&registration(&disks, &options)).await
}

async fn refused(dir: &Path, image: &str) -> DriverError {
    let error = probe_with(dir, &[image], QemuOptions::default()).await.unwrap_err();
    assert!(error.to_string().contains(image.split('/').next().unwrap()), "{error}");
    error
}

#[tokio::test]
async fn unfit_images_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    assert_eq!(refused(dir.path(), "nothing").await.failure.code, Code::NotFound);
    symlink("nothing", at("dangling")).unwrap();
    assert_eq!(refused(dir.path(), "dangling").await.failure.code, Code::NotFound);
    symlink("round2", at("round1")).unwrap();
    symlink("round1", at("round2")).unwrap();
    assert_eq!(refused(dir.path(), "round1").await.failure.code, Code::Invalid);
    fs::create_dir(at("folder")).unwrap();
    assert_eq!(refused(dir.path(), "folder").await.failure.code, Code::Unsupported);
    fs::write(at("raw"), vec![0; 1 << 20]).unwrap();
    let raw = refused(dir.path(), "raw").await;
    assert_eq!(raw.failure.code, Code::BadImage);
    assert!(raw.failure.hint.unwrap().contains("--convert"));

    make(&at("good"), "8M");
    io(&at("good"), "write -P 1 0 2M");
    fs::copy(at("good"), at("short")).unwrap();
    let length = fs::metadata(at("short")).unwrap().len();
    for cut in [length - (1 << 20), 70_000, 100] {
        fs::OpenOptions::new().write(true).open(at("short")).unwrap().set_len(cut).unwrap();
        assert_eq!(refused(dir.path(), "short").await.failure.code, Code::BadImage, "cut to {cut}");
    }
    fs::hard_link(at("good"), at("second")).unwrap();
    assert_eq!(refused(dir.path(), "good").await.failure.code, Code::Invalid);
    fs::remove_file(at("second")).unwrap();

    make_on(&at("orphan"), at("good").to_str().unwrap());
    fs::rename(at("good"), at("moved")).unwrap();
    let orphan = refused(dir.path(), "orphan").await;
    assert!(orphan.to_string().contains("good, which is missing"), "{orphan}");
    fs::rename(at("moved"), at("good")).unwrap();

    make(&at("loop1"), "8M");
    make_on(&at("loop2"), at("loop1").to_str().unwrap());
    let (one, two) = (at("loop1"), at("loop2"));
    let args = ["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b"];
    qemu_lab::run("qemu-img", &[&args[..], &[two.to_str().unwrap(), one.to_str().unwrap()]].concat());
    assert!(refused(dir.path(), "loop1").await.to_string().contains("loops"));

    // The header's field alone: making a real one times the CPU, which a busy host fails at.
    let mut encrypted = fs::read(at("good")).unwrap();
    encrypted[35] = 2;
    fs::write(at("luks"), encrypted).unwrap();
    assert_eq!(refused(dir.path(), "luks").await.failure.code, Code::Unsupported);

    assert!(probe_with(dir.path(), &["good"], QemuOptions::default()).await.is_ok());
    let same = probe_with(dir.path(), &["good", "good"], QemuOptions::default()).await.unwrap_err();
    assert!(same.to_string().contains("the same image"), "{same}");
    let base = probe_with(dir.path(), &["good", "orphan"], QemuOptions::default()).await.unwrap_err();
    assert!(base.to_string().contains("built upon"), "{base}");
    let shm = QemuOptions { layers_dir: Some("/dev/shm/snaptree-test".into()), ..QemuOptions::default() };
    let far = probe_with(dir.path(), &["good"], shm).await.unwrap_err();
    assert!(far.to_string().contains("file system"), "{far}");
    assert!(!Path::new("/dev/shm/snaptree-test").exists());
    assert!(!at(".snaptree").exists(), "a probe makes nothing");
}

#[tokio::test]
async fn a_raw_image_is_converted_when_asked() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    let mut bytes = vec![7_u8; 1 << 20];
    bytes[500_000] = 9;
    fs::write(&path, &bytes).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    std::os::unix::fs::chown(&path, Some(65534), Some(65534)).unwrap();
    let before = content(&path);
    qemu_lab::run(
        "qemu-img",
        &["create", "-q", "-f", "vmdk", dir.path().join("vmdk").to_str().unwrap(), "1M"],
    );
    let convert = || QemuOptions { raw: RawWish::Convert, ..QemuOptions::default() };
    let error = probe_with(dir.path(), &["vmdk"], convert()).await.unwrap_err();
    assert_eq!(error.failure.code, Code::Unsupported, "{error}");
    let draft = dir.path().join("disk.img.snaptree-convert");
    fs::write(&draft, "mine").unwrap();
    let error = probe_with(dir.path(), &["disk.img"], convert()).await.unwrap_err();
    assert_eq!(error.failure.code, Code::Exists);
    assert_eq!(fs::read(&draft).unwrap(), b"mine");
    fs::remove_file(&draft).unwrap();
    let probe = probe_with(dir.path(), &["disk.img"], convert()).await.unwrap();
    assert_eq!(probe.notes.len(), 1, "{:?}", probe.notes);
    assert_eq!(content(&path), before);
    let found = fs::metadata(&path).unwrap();
    assert_eq!(found.permissions().mode() & 0o7777, 0o640);
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&found), 65534);
}

#[tokio::test]
async fn an_image_of_another_domain_is_refused() {
    let mut lab = Lab::with(&["vda"], PathWish::Follow, |dir| {
        fs::rename(dir.join("vda.qcow2"), dir.join("golden.qcow2")).unwrap();
        make_on(&dir.join("vda.qcow2"), dir.join("golden.qcow2").to_str().unwrap());
    })
    .await;
    lab.create("s1").await;
    let owner = DomainName::new("web").unwrap();
    let owned = |files: Vec<PathBuf>| -> BTreeMap<PathBuf, DomainName> {
        files.into_iter().map(|file| (file, owner.clone())).collect()
    };
    let dir = lab.dir.path().to_path_buf();
    symlink("vda.qcow2", dir.join("alias")).unwrap();
    make_on(&dir.join("clone"), dir.join("golden.qcow2").to_str().unwrap());
    make_on(&dir.join("thief"), files_of(&lab.state)[0].to_str().unwrap());
    for (image, fits) in
        [("vda.qcow2", false), ("alias", false), ("golden.qcow2", false), ("thief", false), ("clone", true)]
    {
        let disks = vec![(DiskName::new("vda").unwrap(), dir.join(image))];
        let options = QemuOptions { bases: owned(bases_of(&lab.state)), ..QemuOptions::default() };
        let mut registration = registration(&disks, &options);
        registration.taken = owned(files_of(&lab.state));
        let probe = lab.driver.probe(&registration).await;
        assert_eq!(probe.is_ok(), fits, "{image}: {probe:?}");
    }
}

/// A machine on these images.
struct Machine(Child);

impl Machine {
    fn start(path: &Path) -> Self {
        let mut child = Command::new("qemu-system-x86_64")
            .args([
                "-machine",
                "accel=tcg",
                "-display",
                "none",
                "-nodefaults",
                "-S",
                "-qmp",
                "stdio",
                "-drive",
            ])
            .arg(format!("file={},format=qcow2,if=virtio", path.display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // It greets once its disks are open.
        let mut greeting = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut greeting).unwrap();
        assert!(greeting.contains("QMP"), "{greeting}");
        Self(child)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[tokio::test]
async fn a_running_machine_is_left_alone() {
    let mut lab = Lab::new(&["vda", "vdb"]).await;
    let path = lab.disks[0].1.clone();
    for round in ["registered", "adopted"] {
        let machine = Machine::start(&path);
        let seen = lab.observe().await;
        assert_eq!(seen.in_use.len(), 1, "{round}");
        assert_eq!(seen.in_use[0].pid, Some(machine.0.id()));
        let request = lab.create_request("s9");
        lab.read_before_create = false;
        let Ended::Failed(failure) = lab.operate(request.into(), None, Wish::Forward).await else {
            panic!("{round}: a running machine was touched");
        };
        lab.read_before_create = true;
        assert_eq!(failure.code, Code::InUse);
        assert!(failure.message.contains("qemu-system-x86"), "{failure}");
        assert!(failure.message.contains(&machine.0.id().to_string()), "{failure}");
        drop(machine);
        lab.create(round).await;
        lab.check().await;
    }
}

/// At each hook of a create, a machine that is started runs on the disk that it should.
#[tokio::test]
async fn a_machine_that_is_started_after_a_crash_is_never_cut_off() {
    // `adopted` says whether it is the first create; places are those of the crash matrix.
    for adopted in [false, true] {
        let hooks = qemu_lab::CrashAt::default();
        let mut lab = Lab::new(&["vda"]).await;
        if adopted {
            lab.create("s1").await;
        }
        let request = lab.create_request("probe").into();
        lab.operate_with(request, &hooks, Wish::Forward).await;
        let places = hooks.seen.into_inner().unwrap();
        for (crash, place) in places.iter().enumerate() {
            let mut lab = Lab::new(&["vda"]).await;
            if adopted {
                lab.create("s1").await;
            }
            let request = lab.create_request("s2").into();
            let path = lab.disks[0].1.clone();
            lab.after_crash = Some(Box::new(move || io(&path, "write -P 77 6M 64k")));
            let ended = lab.operate(request, Some(crash), Wish::Forward).await;
            println!("{place}: {ended:?}");
            let after = lab.now();
            lab.check().await;
            // What was written after the crash is there, whether the create was finished or taken back.
            let text = qemu_lab::run(
                "qemu-io",
                &["-r", "-f", "qcow2", "-c", "read -P 77 6M 64k", lab.disks[0].1.to_str().unwrap()],
            );
            assert!(!text.contains("failed"), "{place}: {text}");
            lab.create("s3").await;
            assert_eq!(lab.now(), after);
            lab.check().await;
        }
    }
}

#[tokio::test]
async fn differences_between_disk_and_log_are_refused() {
    let build = async || {
        let mut lab = Lab::new(&["vda"]).await;
        lab.create("s1").await;
        lab.write("write -P 2 1M 64k");
        lab.create("s2").await;
        lab
    };
    type Damage = fn(&Lab, &Path);
    let damages: [(&str, Damage); 6] = [
        ("written", |_, frozen| io(frozen, "write -P 9 0 64k")),
        ("missing", |_, frozen| fs::rename(frozen, frozen.with_extension("away")).unwrap()),
        ("copied", |_, frozen| {
            fs::copy(frozen, frozen.with_extension("copy")).unwrap();
            fs::rename(frozen.with_extension("copy"), frozen).unwrap();
        }),
        ("no link", |lab, _| {
            fs::remove_file(&lab.disks[0].1).unwrap();
            make(&lab.disks[0].1, "8M");
        }),
        ("no generation", |lab, _| fs::remove_file(lab.config().layers.join("active")).unwrap()),
        ("cut", |_, frozen| fs::write(frozen, "x").unwrap()),
    ];
    for (what, damage) in damages {
        let mut lab = build().await;
        let (_, layers) = lab.state.layers.disks.first_key_value().unwrap();
        let frozen = layers.layer_of(lab.names["s2"]).unwrap().1.file.clone();
        damage(&lab, &frozen);
        let request = lab.create_request("s3");
        // The contents cannot be read any more in all of these.
        lab.read_before_create = false;
        let Ended::Failed(failure) = lab.operate(request.into(), None, Wish::Forward).await else {
            panic!("'{what}' was not noticed");
        };
        assert_eq!(failure.code, Code::Drift, "{what}: {failure}");
        assert!(failure.hint.is_some());
        println!("{what}: {failure}");
    }
}

#[tokio::test]
async fn what_a_foreign_file_is_built_upon_stays() {
    let mut lab = Lab::new(&["vda"]).await;
    lab.create("s1").await;
    lab.write("write -P 2 1M 64k");
    lab.create("s2").await;
    lab.write("write -P 3 2M 64k");
    let (disk, layers) = lab.state.layers.disks.first_key_value().unwrap();
    let disk = disk.clone();
    let active = layers.active_layer().unwrap().1.file.clone();
    let frozen = layers.layer_of(lab.names["s2"]).unwrap().1.file.clone();
    let foreign = lab.dir.path().join("foreign.qcow2");
    make_on(&foreign, active.to_str().unwrap());
    let request = lab.revert_request("s1");
    let Ended::Failed(failure) = lab.operate(request, None, Wish::Forward).await else { panic!("reverted") };
    assert!(failure.message.contains("foreign.qcow2"), "{failure}");
    fs::remove_file(&foreign).unwrap();
    // A merge that was planned before the foreign file appeared.
    lab.delete(&["s2"]).await;
    let plan = lab.next_merge().await.unwrap();
    make_on(&foreign, frozen.to_str().unwrap());
    let before = content(&foreign);
    assert!(lab.next_merge().await.is_none());
    let merge = MergeStarted { plan: plan.clone() }.into();
    let Ended::Failed(failure) = lab.operate(merge, None, Wish::Forward).await else { panic!("merged") };
    assert!(failure.message.contains("foreign.qcow2"), "{failure}");
    assert_eq!(content(&foreign), before);
    fs::remove_file(&foreign).unwrap();
    lab.merge_all().await;
    assert_eq!(lab.state.layers.disks[&disk].layers.len(), 2);
}

#[tokio::test]
async fn an_image_with_a_linked_clone_is_not_adopted() {
    let mut lab = Lab::new(&["vda"]).await;
    make_on(&lab.dir.path().join("clone.qcow2"), lab.disks[0].1.to_str().unwrap());
    let request = lab.create_request("s1");
    let Ended::Failed(failure) = lab.operate(request.into(), None, Wish::Forward).await else {
        panic!("adopted")
    };
    assert!(failure.message.contains("clone.qcow2"), "{failure}");
}

#[tokio::test]
async fn new_layers_have_the_owner_and_mode_of_the_image() {
    use std::os::unix::fs::MetadataExt;
    let mut lab = Lab::with(&["vda"], PathWish::Follow, |dir| {
        let path = dir.join("vda.qcow2");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o660)).unwrap();
        std::os::unix::fs::chown(&path, Some(65534), Some(1)).unwrap();
    })
    .await;
    let path = lab.disks[0].1.clone();
    let check = |what: &str| {
        let found = fs::metadata(&path).unwrap();
        assert_eq!((found.uid(), found.gid(), found.mode() & 0o7777), (65534, 1, 0o660), "{what}");
    };
    lab.create("s1").await;
    check("create");
    lab.write("write -P 2 1M 64k");
    lab.create("s2").await;
    lab.revert("s1").await;
    check("revert");
    lab.write("write -P 2 1M 64k");
    lab.delete(&["s2"]).await;
    lab.merge_all().await;
    lab.delete(&["s1"]).await;
    lab.merge_all().await;
    check("push");
}
