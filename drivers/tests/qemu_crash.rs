//! Every operation, cut off at every hook, and recovered forward and back.
#![cfg(feature = "lab")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on shall panic")]

mod qemu_lab;

use std::sync::Mutex;

use qemu_lab::{CrashAt, Ended, Lab, Wish};
use snaptree_drivers::qemu::PathWish;
use snaptree_engine::event::{DomainUnregisterRequested, Event, MergeStarted, RequestTerms, UnregisterWish};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Scenario {
    FirstCreate,
    FirstCreateKeep,
    FirstCreateOnRelativeBase,
    Create,
    Revert,
    Delete,
    Pull,
    PullIntoEach,
    PushActive,
    PushFrozen,
    Flatten,
}

async fn build(scenario: Scenario) -> (Lab, Event) {
    use Scenario as S;
    let mut lab = match scenario {
        S::FirstCreateKeep => Lab::with(&["vda", "vdb"], PathWish::Keep, |_| {}).await,
        S::FirstCreateOnRelativeBase => {
            Lab::with(&["vda"], PathWish::Follow, |dir| {
                std::fs::rename(dir.join("vda.qcow2"), dir.join("golden.qcow2")).unwrap();
                let path = dir.join("vda.qcow2");
                qemu_lab::make_on(&path, dir.join("golden.qcow2").to_str().unwrap());
                qemu_lab::run(
                    "qemu-img",
                    &[
                        "rebase",
                        "-u",
                        "-f",
                        "qcow2",
                        "-F",
                        "qcow2",
                        "-b",
                        "golden.qcow2",
                        path.to_str().unwrap(),
                    ],
                );
            })
            .await
        }
        // Two disks where the switch of both at once is what matters; the others only take longer with two.
        S::Delete | S::Pull | S::PullIntoEach | S::PushFrozen => Lab::new(&["vda"]).await,
        _ => Lab::new(&["vda", "vdb"]).await,
    };
    if matches!(scenario, S::FirstCreate | S::FirstCreateKeep | S::FirstCreateOnRelativeBase) {
        let request = lab.create_request("s1").into();
        return (lab, request);
    }
    lab.create("s1").await;
    lab.write("write -P 2 1M 512k");
    let request = match scenario {
        S::Create => lab.create_request("s2").into(),
        S::PushActive => {
            lab.delete(&["s1"]).await;
            MergeStarted { plan: lab.next_merge().await.unwrap() }.into()
        }
        _ => {
            lab.create("s2").await;
            lab.write(if scenario == S::PushFrozen { "write -P 3 2M 64k" } else { "write -P 3 2M 2M" });
            lab.create("s3").await;
            lab.write("write -P 4 3M 64k");
            match scenario {
                S::Revert => lab.revert_request("s2"),
                S::Delete => lab.delete_request(&["s3", "s2"]),
                S::Flatten => DomainUnregisterRequested {
                    wish: UnregisterWish::Flatten,
                    request: RequestTerms::default(),
                }
                .into(),
                _ => {
                    if scenario == S::PullIntoEach {
                        lab.revert("s2").await;
                        lab.write("write -P 5 4M 64k");
                    }
                    lab.delete(&["s2"]).await;
                    MergeStarted { plan: lab.next_merge().await.unwrap() }.into()
                }
            }
        }
    };
    (lab, request)
}

async fn matrix(scenario: Scenario) {
    let hooks = CrashAt { at: None, seen: Mutex::default() };
    let (mut lab, request) = build(scenario).await;
    assert_eq!(lab.operate_with(request, &hooks, Wish::Forward).await, Ended::Done);
    let places = hooks.seen.into_inner().unwrap();
    println!("{scenario:?}: {places:?}");
    for wish in [Wish::Forward, Wish::Back] {
        for (crash, place) in places.iter().enumerate() {
            let (mut lab, request) = build(scenario).await;
            // The recovery is cut off too, each time at another place.
            lab.second_crash = (crash % 2 == 1).then_some(crash / 2);
            let before = lab.now();
            let ended = lab.operate(request.clone(), Some(crash), wish).await;
            println!("{scenario:?} {wish:?} cut off at {place} ({crash}): {ended:?}");
            if scenario == Scenario::Flatten {
                if let Ended::Failed(_) = ended {
                    lab.check().await;
                    assert_eq!(lab.now(), before);
                    assert_eq!(lab.operate(request, None, Wish::Forward).await, Ended::Done);
                }
                for (disk, path) in &lab.disks {
                    assert!(path.symlink_metadata().unwrap().is_file());
                    assert_eq!(qemu_lab::content(path), before[disk]);
                }
                assert!(!lab.config().layers.exists());
                continue;
            }
            if scenario != Scenario::Revert {
                assert_eq!(lab.now(), before);
            }
            lab.check().await;
            if wish == Wish::Forward {
                assert_eq!(ended, Ended::Done);
            }
            if let Ended::Failed(_) = ended {
                assert_eq!(lab.now(), before);
                assert_eq!(lab.operate(request, None, Wish::Forward).await, Ended::Done);
                lab.check().await;
            }
            lab.write("write -P 6 5M 64k");
            lab.create("after").await;
            lab.merge_all().await;
            lab.check().await;
        }
    }
}

macro_rules! scenarios {
    ($($name:ident = $scenario:ident),* $(,)?) => {
        $(#[tokio::test]
        async fn $name() {
            matrix(Scenario::$scenario).await;
        })*
    };
}

scenarios! {
    first_create = FirstCreate,
    first_create_with_kept_paths = FirstCreateKeep,
    first_create_on_a_relative_base = FirstCreateOnRelativeBase,
    create = Create,
    revert = Revert,
    delete = Delete,
    pull = Pull,
    pull_into_each = PullIntoEach,
    push_of_the_active_layer = PushActive,
    push_of_a_frozen_layer = PushFrozen,
    flatten = Flatten,
}
