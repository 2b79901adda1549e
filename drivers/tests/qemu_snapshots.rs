//! Create, branch, revert, delete and merge on real images.
#![cfg(feature = "lab")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on shall panic")]

mod qemu_lab;

use qemu_lab::{Ended, Lab, Wish, content, io, run};
use snaptree_drivers::qemu::PathWish;
use snaptree_engine::event::{DomainUnregisterRequested, Event, MergeStarted, RequestTerms, UnregisterWish};
use snaptree_engine::operation::Code;
use snaptree_engine::reconcile::merge::MergeAction;

fn kinds(plans: &[snaptree_engine::reconcile::merge::MergePlan]) -> Vec<&'static str> {
    let kind = |action: &MergeAction| match action {
        MergeAction::Drop { .. } => "drop",
        MergeAction::Pull { .. } => "pull",
        MergeAction::Push { .. } => "push",
        MergeAction::Fold { .. } => "fold",
    };
    plans.iter().flat_map(|plan| plan.actions.iter().map(kind)).collect()
}

#[tokio::test]
async fn create_branch_and_revert_on_two_disks() {
    let mut lab = Lab::new(&["vda", "vdb"]).await;
    lab.create("s1").await;
    lab.check().await;
    lab.write("write -P 2 1M 1M");
    lab.create("s2").await;
    lab.write("write -P 3 2M 1M");
    lab.check().await;
    lab.revert("s1").await;
    lab.check().await;
    lab.write("write -P 4 0 64k");
    lab.create("s3").await;
    lab.check().await;
    lab.revert("s2").await;
    lab.check().await;
    assert_eq!(lab.state.tree.roots().len(), 1);
}

#[tokio::test]
async fn kept_paths_stay_images() {
    let mut lab = Lab::with(&["vda"], PathWish::Keep, |_| {}).await;
    lab.create("s1").await;
    lab.write("write -P 2 1M 1M");
    lab.create("s2").await;
    lab.check().await;
    lab.revert("s1").await;
    lab.delete(&["s2"]).await;
    assert_eq!(kinds(&lab.merge_all().await), ["drop"]);
    assert!(lab.disks[0].1.symlink_metadata().unwrap().is_file());
}

#[tokio::test]
async fn a_small_tombstone_is_pulled() {
    let mut lab = Lab::new(&["vda", "vdb"]).await;
    lab.create("s1").await;
    lab.write("write -P 2 1M 64k");
    lab.create("s2").await;
    lab.write("write -P 3 2M 3M");
    lab.create("s3").await;
    let now = lab.now();
    lab.delete(&["s2"]).await;
    lab.check().await;
    assert_eq!(kinds(&lab.merge_all().await), ["pull", "pull"]);
    assert_eq!(lab.now(), now);
    assert!(lab.state.tombstones.is_empty());
}

#[tokio::test]
async fn a_large_tombstone_takes_a_push_and_its_dependants_follow() {
    let mut lab = Lab::new(&["vda"]).await;
    lab.create("s1").await;
    lab.write("write -P 2 1M 5M");
    lab.create("s2").await;
    lab.write("write -P 3 2M 64k");
    lab.write("write -z 3M 256k");
    lab.create("s3").await;
    lab.write("write -P 4 3M 64k");
    lab.create("s4").await;
    lab.revert("s3").await;
    lab.write("write -P 5 4M 64k");
    let now = lab.now();
    lab.delete(&["s2"]).await;
    assert_eq!(kinds(&lab.merge_all().await), ["push"]);
    assert_eq!(lab.now(), now);
    lab.revert("s4").await;
    lab.check().await;
}

#[tokio::test]
async fn the_active_layer_is_pushed_into_the_registered_image() {
    let mut lab = Lab::new(&["vda"]).await;
    lab.create("s1").await;
    lab.write("write -P 2 1M 64k");
    let now = lab.now();
    lab.delete(&["s1"]).await;
    assert_eq!(kinds(&lab.merge_all().await), ["push"]);
    assert_eq!(lab.now(), now);
    assert_eq!(lab.state.layers.disks.values().next().unwrap().layers.len(), 1);
    lab.write("write -P 3 2M 64k");
    lab.create("s2").await;
    lab.write("write -P 4 3M 64k");
    lab.revert("s2").await;
    lab.check().await;
}

#[tokio::test]
async fn several_tombstones_in_a_row_go_at_once() {
    let mut lab = Lab::new(&["vda"]).await;
    for (index, name) in ["s1", "s2", "s3", "s4"].iter().enumerate() {
        lab.create(name).await;
        lab.write(&format!("write -P {} {index}M 512k", index + 10));
    }
    let now = lab.now();
    lab.delete(&["s3", "s2"]).await;
    let plans = lab.merge_all().await;
    assert_eq!(plans.len(), 1, "{plans:?}");
    assert_eq!(lab.now(), now);
    lab.delete(&["s4"]).await;
    lab.merge_all().await;
    lab.delete(&["s1"]).await;
    lab.merge_all().await;
    assert_eq!(lab.now(), now);
    assert_eq!(lab.state.layers.disks.values().next().unwrap().layers.len(), 1);
}

#[tokio::test]
async fn a_tombstone_with_several_dependants_is_pulled_into_each() {
    let mut lab = Lab::new(&["vda"]).await;
    lab.create("s1").await;
    lab.write("write -P 2 1M 2M");
    lab.create("s2").await;
    lab.write("write -P 3 2M 64k");
    lab.create("s3").await;
    lab.revert("s2").await;
    lab.write("write -P 4 1M 64k");
    lab.create("s4").await;
    let now = lab.now();
    lab.delete(&["s2"]).await;
    assert_eq!(kinds(&lab.merge_all().await), ["pull"]);
    assert_eq!(lab.now(), now);
    lab.revert("s3").await;
    lab.check().await;
}

#[tokio::test]
async fn a_resized_disk_keeps_its_snapshots() {
    let mut lab = Lab::new(&["vda"]).await;
    lab.create("s1").await;
    lab.write("write -P 2 1M 2M");
    lab.create("s2").await;
    run("qemu-img", &["resize", "-q", "-f", "qcow2", lab.disks[0].1.to_str().unwrap(), "16M"]);
    lab.write("write -P 3 12M 1M");
    lab.create("s3").await;
    lab.write("write -P 4 13M 1M");
    let now = lab.now();
    lab.delete(&["s2"]).await;
    while let Some(plan) = lab.next_merge().await {
        if let Ended::Failed(failure) = lab.operate(MergeStarted { plan }.into(), None, Wish::Forward).await {
            assert_eq!(failure.code, Code::Unsupported, "{failure}");
            break;
        }
        lab.check().await;
    }
    assert_eq!(lab.now(), now);
    lab.revert("s1").await;
    lab.check().await;
    lab.revert("s3").await;
    lab.check().await;
}

#[tokio::test]
async fn one_disk_of_two() {
    let mut lab = Lab::new(&["vda", "vdb"]).await;
    let mut request = lab.create_request("s1");
    request.disks.pop_last();
    assert_eq!(lab.operate(request.into(), None, Wish::Forward).await, Ended::Done);
    assert!(lab.disks[1].1.symlink_metadata().unwrap().is_file());
    lab.write("write -P 2 1M 64k");
    let untouched = content(&lab.disks[1].1);
    let request = lab.revert_request("s1");
    assert_eq!(lab.operate(request, None, Wish::Forward).await, Ended::Done);
    assert_eq!(content(&lab.disks[1].1), untouched);
    lab.create("s2").await;
    lab.check().await;
}

fn unregister(wish: UnregisterWish) -> Event {
    DomainUnregisterRequested { wish, request: RequestTerms::default() }.into()
}

#[tokio::test]
async fn flattening_puts_plain_images_back() {
    for keep in [PathWish::Follow, PathWish::Keep] {
        let mut lab = Lab::with(&["vda", "vdb"], keep, |_| {}).await;
        lab.create("s1").await;
        lab.write("write -P 2 1M 64k");
        lab.create("s2").await;
        lab.write("write -P 3 2M 64k");
        let now = lab.now();
        assert_eq!(lab.operate(unregister(UnregisterWish::Flatten), None, Wish::Forward).await, Ended::Done);
        for (disk, path) in &lab.disks {
            assert!(path.symlink_metadata().unwrap().is_file());
            assert_eq!(content(path), now[disk]);
            assert!(!run("qemu-img", &["info", path.to_str().unwrap()]).contains("backing"));
        }
        assert!(!lab.config().layers.exists());
        assert!(lab.state.tree.is_empty());
    }
}

#[tokio::test]
async fn a_domain_without_snapshots_gets_its_own_file_back() {
    use std::os::unix::fs::MetadataExt;
    let mut lab = Lab::new(&["vda"]).await;
    let inode = lab.disks[0].1.metadata().unwrap().ino();
    lab.create("s1").await;
    lab.delete(&["s1"]).await;
    lab.merge_all().await;
    assert_eq!(lab.operate(unregister(UnregisterWish::Flatten), None, Wish::Forward).await, Ended::Done);
    let found = lab.disks[0].1.symlink_metadata().unwrap();
    assert!(found.is_file());
    assert_eq!((found.ino(), found.mode() & 0o777), (inode, 0o644));
    assert!(!lab.config().layers.exists());
}

#[tokio::test]
async fn an_image_on_a_relative_base_is_adopted_and_flattened() {
    let mut lab = Lab::with(&["vda"], PathWish::Follow, |dir| {
        qemu_lab::make(&dir.join("golden.qcow2"), "8M");
        io(&dir.join("golden.qcow2"), "write -P 9 4M 2M");
        std::fs::remove_file(dir.join("vda.qcow2")).unwrap();
        std::env::set_current_dir(dir).unwrap();
        qemu_lab::make_on(&dir.join("vda.qcow2"), "golden.qcow2");
        io(&dir.join("vda.qcow2"), "write -P 1 1M 64k");
    })
    .await;
    lab.create("s1").await;
    lab.write("write -P 2 2M 64k");
    lab.create("s2").await;
    lab.write("write -P 3 5M 64k");
    lab.check().await;
    let now = lab.now();
    assert_eq!(lab.operate(unregister(UnregisterWish::Flatten), None, Wish::Forward).await, Ended::Done);
    let path = &lab.disks[0].1;
    assert_eq!(content(path), now[&lab.disks[0].0]);
    assert!(run("qemu-img", &["info", path.to_str().unwrap()]).contains("golden.qcow2"));
}
