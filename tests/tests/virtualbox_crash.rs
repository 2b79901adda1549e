//! Snaptree, VBoxManage and `VBoxSVC` killed at every step and at random moments on the real VirtualBox; and beside it the
//! same kills with a plain retry by VBoxManage alone.
//!
//! By default some moments are tried; `SNAPTREE_POINTS=all` tries them all and `SNAPTREE_POINTS=N` about N of an
//! operation, `SNAPTREE_KILLS=N` that many at random moments of large merges, `SNAPTREE_ROUNDS=N` aims that often at the
//! moments after which VirtualBox cannot open the machine.
#![cfg(feature = "lab")]
#![allow(clippy::expect_used, reason = "a test")]

use std::collections::BTreeMap;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use snaptree_tests::program::Ran;
use snaptree_tests::random::Random;
use snaptree_tests::strace::Point;
use snaptree_tests::virtualbox::is_left_out;
use snaptree_tests::virtualbox::kill::{Bare, Kill, Plain, Victim, Wrapper};
use snaptree_tests::virtualbox::model::{BLOCKS, Modelled};

/// What is done to a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Doing {
    verb: &'static str,
    /// Blocks in the snapshot that a delete merges, and in what stands upon it: that decides which way it goes.
    below: usize,
    above: usize,
}

const CREATE: Doing = Doing { verb: "create", below: 0, above: 0 };
const REVERT: Doing = Doing { verb: "revert", below: 0, above: 0 };
const FORWARD: Doing = Doing { verb: "delete", below: 2, above: 6 };
const BACKWARD: Doing = Doing { verb: "delete", below: 6, above: 2 };

impl Doing {
    const fn words(self) -> &'static str {
        match (self.verb.as_bytes()[0], self.below < self.above) {
            (b'c', _) => "take",
            (b'r', _) => "restore",
            (_, true) => "delete, merged up",
            (_, false) => "delete, merged down",
        }
    }

    /// Brings the machine to where it can be done; the snapshot and the program's arguments.
    fn prepare(self, machine: &mut Modelled, number: usize) -> (String, Vec<String>) {
        let disks = machine.disks;
        let grow = |machine: &mut Modelled, blocks: usize| {
            (0..disks).for_each(|disk| machine.write(disk, 0..blocks));
        };
        grow(machine, 1);
        let name = match self.verb {
            "revert" => "root".to_owned(),
            "delete" => format!("going{number}"),
            _ => format!("taken{number}"),
        };
        if self.verb == "delete" {
            grow(machine, self.below);
            machine.create(&name);
            grow(machine, self.above);
            machine.create(&format!("stays{number}"));
            grow(machine, 1);
        }
        (
            name.clone(),
            [self.verb, "web", &name, "--yes"]
                .iter()
                .filter(|word| self.verb != "create" || **word != "--yes")
                .map(|word| (*word).to_owned())
                .collect(),
        )
    }
}

/// What became of the kills of one kind.
#[derive(Clone, Debug, Default)]
struct Tally {
    kills: usize,
    missed: usize,
    /// Snaptree came through it without being called again.
    by_itself: usize,
    /// A later `recover` had to finish it.
    by_recover: usize,
    repaired: usize,
    /// Images that VirtualBox left behind and that nothing names.
    orphans: usize,
    /// VBoxManage alone never ended.
    hung: usize,
    plain: BTreeMap<Plain, usize>,
}

#[derive(Default)]
struct Table(BTreeMap<(String, String), Tally>);

impl Table {
    fn of(&mut self, what: impl Into<String>, who: impl Into<String>) -> &mut Tally {
        self.0.entry((what.into(), who.into())).or_default()
    }

    fn print(&self) {
        println!(
            "{:<20} {:<46} {:>5} {:>6} {:>9} {:>10} {:>8} {:>7} | VBoxManage alone: {:>4} {:>4} {:>5} {:>6} {:>9}",
            "",
            "",
            "kills",
            "missed",
            "by itself",
            "by recover",
            "repaired",
            "orphans",
            "hung",
            "fine",
            "twice",
            "wedged",
            "forgotten"
        );
        let mut all = Tally::default();
        for ((what, who), tally) in &self.0 {
            line(what, who, tally);
            all.kills += tally.kills;
            all.missed += tally.missed;
            all.by_itself += tally.by_itself;
            all.by_recover += tally.by_recover;
            all.repaired += tally.repaired;
            all.orphans += tally.orphans;
            all.hung += tally.hung;
            for (plain, count) in &tally.plain {
                *all.plain.entry(*plain).or_default() += count;
            }
        }
        line("all", "", &all);
    }
}

/// Printed whatever ends the test.
impl Drop for Table {
    fn drop(&mut self) {
        self.print();
    }
}

fn line(what: &str, who: &str, tally: &Tally) {
    let plain = |plain| tally.plain.get(&plain).copied().unwrap_or(0);
    println!(
        "{what:<20} {who:<46} {:>5} {:>6} {:>9} {:>10} {:>8} {:>7} |                   {:>4} {:>4} {:>5} {:>6} {:>9}",
        tally.kills,
        tally.missed,
        tally.by_itself,
        tally.by_recover,
        tally.repaired,
        tally.orphans,
        tally.hung,
        plain(Plain::Fine),
        plain(Plain::Twice),
        plain(Plain::Wedged),
        plain(Plain::Forgotten)
    );
}

/// Recovers, and compares all with the model: the request was carried through or left no trace, and all can go on.
fn recovered(machine: &mut Modelled, doing: Doing, name: &str, ran: &Ran, what: &str, tally: &mut Tally) {
    let open =
        machine.program.json(0, &["op", "list", "--open"])["operations"].as_array().map_or(0, Vec::len);
    if open > 0 {
        tally.by_recover += 1;
        let recovered = machine.program.run(&["recover"]);
        assert_eq!(recovered.code, Some(0), "{what}: {ran:?}, then {recovered:?}");
    } else {
        tally.by_itself += 1;
    }
    println!("{what}: exit {:?}, open {open}", ran.code);
    machine.settled(doing.verb, name, what);
    tally.repaired += usize::from(machine.is_newly_repaired());
}

fn number_of(key: &str, usual: usize) -> usize {
    std::env::var(key).ok().map_or(usual, |text| text.parse().expect("a number"))
}

/// Some of them, spread over all; `SNAPTREE_POINTS` says how many.
fn some<T: Copy>(all: &[T], usual: usize, turn: usize) -> Vec<T> {
    let wanted = match std::env::var("SNAPTREE_POINTS") {
        Ok(text) if text == "all" => all.len(),
        Ok(text) => text.parse().expect("a number, or all"),
        Err(_) => usual,
    };
    let wanted = wanted.min(all.len());
    (0..wanted)
        .map(|index| all[(index * all.len() + turn * all.len() / 4) / wanted.max(1) % all.len()])
        .collect()
}

/// Every moment of an operation: each call of VBoxManage, what is sent in the one that changes the machine, and the
/// system calls of `VBoxSVC`.
fn moments(machine: &mut Modelled, bare: &mut Bare, doing: Doing) -> Vec<Kill> {
    let (name, args) = doing.prepare(machine, 0);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let mut counting = Wrapper::new(&machine.vbox, None);
    let ran = counting.snaptree(&machine.program, &args);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let (calls, syscalls) = (counting.calls(), counting.syscalls());
    drop(counting);
    machine.settled(doing.verb, &name, "undisturbed");
    let change =
        1 + calls.iter().position(|call| call == "snapshot").expect("a call that changes the machine");
    let args = bare.prepare(doing.verb, doing.below, doing.above);
    let sends = Wrapper::sends(&bare.vbox, &args);
    let whole = bare.vbox.manage(&["snapshot", "bare", "list"]);
    bare.retry(&args, &whole);
    let mut all = Vec::new();
    for victim in Victim::ALL {
        all.extend(
            (1..=calls.len()).flat_map(|call| [Kill::Before(victim, call), Kill::After(victim, call)]),
        );
    }
    all.push(Kill::Unnoticed(change));
    all.extend((1..=sends).step_by(12).map(|nth| Kill::Sending { call: change, nth }));
    all.extend(syscalls.iter().flat_map(|point| [Kill::Syscall(*point), Kill::SyscallAndSnaptree(*point)]));
    println!(
        "{}: {} calls of VBoxManage, {} things sent, {} system calls",
        doing.words(),
        calls.len(),
        sends,
        syscalls.len()
    );
    all
}

/// The same kill, where there is one, with VBoxManage alone and a plain retry.
fn plainly(bare: &mut Bare, doing: Doing, kill: Kill, tally: &mut Tally) {
    let alone = match kill {
        Kill::Sending { nth, .. } => Kill::Sending { call: 1, nth },
        Kill::Syscall(point) => Kill::Syscall(point),
        _ => return,
    };
    let args = bare.prepare(doing.verb, doing.below, doing.above);
    let mut wrapper = Wrapper::new(&bare.vbox, Some(alone));
    let ran = wrapper.bare(&args);
    let hit = wrapper.was_hit(alone);
    drop(wrapper);
    let plain = bare.retry(&args, &ran);
    if hit {
        *tally.plain.entry(plain).or_default() += 1;
    }
}

/// One kill; all is recovered, and every survivor equal.
fn kill(
    (machine, bare): (&mut Modelled, &mut Bare),
    doing: Doing,
    kill: Kill,
    number: usize,
    tally: &mut Tally,
) {
    let (name, args) = doing.prepare(machine, number);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let mut wrapper = Wrapper::new(&machine.vbox, Some(kill));
    let ran = wrapper.snaptree(&machine.program, &args);
    let hit = wrapper.was_hit(kill);
    drop(wrapper);
    *(if hit { &mut tally.kills } else { &mut tally.missed }) += 1;
    recovered(machine, doing, &name, &ran, &format!("{} {kill:?}", doing.words()), tally);
    tally.orphans = tally.orphans.max(machine.vbox.orphans("web"));
    machine.prune(4);
    plainly(bare, doing, kill, tally);
}

#[test]
fn whoever_is_killed_at_whatever_step_all_is_recovered_and_every_survivor_equal() {
    if is_left_out() {
        return;
    }
    let (mut machine, mut bare) = (Modelled::new(2, BLOCKS), Bare::new(2, BLOCKS));
    machine.write(0, 0..1);
    machine.create("root");
    let (mut table, mut number) = (Table::default(), 0);
    for (turn, doing) in [CREATE, REVERT, FORWARD, BACKWARD].into_iter().enumerate() {
        let all = moments(&mut machine, &mut bare, doing);
        for moment in some(&all, 2, turn) {
            number += 1;
            let tally = table.of(doing.words(), format!("{} {}", moment.whom(), moment.moment()));
            kill((&mut machine, &mut bare), doing, moment, number, tally);
        }
    }
    machine.check();
}

/// The moments after which VirtualBox itself cannot go on with a machine: an image gone that the settings still name, all
/// of them gone, the settings gone, and what a restore leaves behind.
const WINDOWS: [(Doing, Point); 8] = [
    (FORWARD, Point { calls: "unlink", at: 2 }),
    (BACKWARD, Point { calls: "unlink", at: 2 }),
    (FORWARD, Point { calls: "rename", at: 1 }),
    (BACKWARD, Point { calls: "rename", at: 1 }),
    (FORWARD, Point { calls: "rename", at: 2 }),
    (BACKWARD, Point { calls: "rename", at: 2 }),
    (REVERT, Point { calls: "unlink", at: 1 }),
    (REVERT, Point { calls: "rename", at: 6 }),
];

/// The number of disks, and the window's index.
const SOME_WINDOWS: [(usize, usize); 5] = [(1, 3), (1, 7), (2, 0), (2, 4), (2, 6)];

#[test]
fn a_machine_that_a_killed_service_left_wedged_is_repaired_and_the_operation_finished() {
    if is_left_out() {
        return;
    }
    let rounds = number_of("SNAPTREE_ROUNDS", 0);
    let mut table = Table::default();
    for disks in [1, 2] {
        let (mut machine, mut bare) = (Modelled::new(disks, BLOCKS), Bare::new(disks, BLOCKS));
        machine.create("root");
        let mut number = 0;
        for round in 0..rounds.max(1) {
            let windows = WINDOWS.iter().enumerate();
            // Some of them with each number of disks, where not all are asked for.
            let wanted = |index: usize| rounds > 0 || SOME_WINDOWS.contains(&(disks, index));
            for (_, (doing, point)) in windows.filter(|(index, _)| wanted(*index)) {
                number += 1;
                // With one disk there is one image to be unlinked, which the rename after it finds gone.
                let at = if point.calls == "unlink" { point.at.min(disks) } else { point.at };
                let point = Point { at, ..*point };
                let moment =
                    if round % 2 == 0 { Kill::Syscall(point) } else { Kill::SyscallAndSnaptree(point) };
                let who = format!("{} {} {at}, disks: {disks}", moment.whom(), moment.moment());
                kill((&mut machine, &mut bare), *doing, moment, number, table.of(doing.words(), who));
                println!("told so far: {}", machine.repairs().join("\n"));
            }
        }
    }
    let repaired: usize = table.0.values().map(|tally| tally.repaired).sum();
    let kills: usize = table.0.values().map(|tally| tally.kills).sum();
    assert!(repaired * 2 >= kills, "the windows were hit");
}

#[test]
fn snaptree_killed_at_every_step_is_recovered() {
    if is_left_out() {
        return;
    }
    let mut machine = Modelled::new(2, BLOCKS);
    machine.write(0, 0..1);
    machine.create("root");
    let mut number = 0;
    let mut kill = |machine: &mut Modelled, fault: &str, verb: &str| {
        number += 1;
        machine.write(number % 2, 0..1 + number % BLOCKS);
        let mut name = format!("k{number}");
        let args = match verb {
            "create" => vec!["create", "web", &name],
            "edit" => vec!["edit", "web", "root", "--description", &name],
            "delete" => {
                machine.create(&name);
                machine.write(0, 0..1 + (number + 1) % BLOCKS);
                vec!["delete", "web", &name, "--yes"]
            }
            "revert" => {
                name = "root".to_owned();
                vec!["revert", "web", "root", "--yes"]
            }
            other => panic!("{other}"),
        };
        let ran = machine.program.with_fault(&format!("{fault}=kill")).run(&args);
        assert_eq!(ran.code, None, "{fault}: {ran:?}");
        machine.program.json(0, &["recover"]);
        machine.settled(verb, &name, fault);
    };
    for verb in ["create", "edit", "delete", "revert"] {
        let word = match verb {
            "create" => "take",
            "revert" => "restore",
            other => other,
        };
        for place in ["before", "after"] {
            kill(&mut machine, &format!("virtualbox.{word}.{place}"), verb);
        }
        kill(&mut machine, "append.after@2", verb);
    }
}

/// Blocks of a disk whose merges take long.
const LARGE: usize = 96;

/// After which nobody would wait any longer for a command that moves less than 200 MiB.
const HANGS: Duration = Duration::from_secs(120);

/// Kills whoever it is after that time, if the command is still under way then; what it ended with, and whether it was
/// killed in time.
fn killed_after(
    mut command: Command,
    delay: Duration,
    victims: impl FnOnce(u32) -> Vec<u32>,
) -> (Ran, bool, Duration) {
    let begun = Instant::now();
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it starts");
    std::thread::sleep(delay);
    let pids = victims(child.id());
    let in_time = child.try_wait().expect("a child").is_none() && !pids.is_empty();
    for pid in &pids {
        let _ = Command::new("kill").args(["-9", &pid.to_string()]).stderr(Stdio::null()).status();
    }
    // A VBoxManage without its VBoxSVC may go on asking it for ever.
    while child.try_wait().expect("a child").is_none() && begun.elapsed() < delay + HANGS {
        std::thread::sleep(Duration::from_millis(20));
    }
    let _ = child.kill();
    let code = child.wait().expect("it ends").code();
    (Ran { code, stdout: String::new(), stderr: String::new() }, in_time, begun.elapsed())
}

/// How long each takes where nobody is killed, as far as was seen, with Snaptree and without.
type Lasts = BTreeMap<(&'static str, bool), Duration>;

/// A moment while it lasts.
fn moment(random: &mut Random, lasts: &Lasts, what: (&'static str, bool)) -> Duration {
    let last = lasts.get(&what).map_or(400, |last| last.as_millis());
    let last = usize::try_from(last.clamp(20, 60_000)).expect("a minute");
    Duration::from_millis(random.below(last) as u64)
}

#[test]
fn whoever_is_killed_at_random_moments_of_large_merges_all_is_recovered() {
    if is_left_out() {
        return;
    }
    let (seed, kills) = (number_of("SNAPTREE_SEED", 11), number_of("SNAPTREE_KILLS", 4));
    println!("SNAPTREE_SEED={seed}");
    let mut random = Random::new(seed as u64);
    let (mut machine, mut bare) = (Modelled::new(2, LARGE), Bare::new(2, LARGE));
    machine.write(0, 0..1);
    machine.create("root");
    let (mut table, mut number) = (Table::default(), 0);
    let mut lasts = Lasts::new();
    while table.0.values().map(|tally| tally.kills).sum::<usize>() < kills {
        number += 1;
        let victim = Victim::ALL[number % 3];
        let verb = *random.pick(&["create", "delete", "delete", "revert"]);
        let doing = Doing { verb, below: 1 + random.below(LARGE / 2), above: 1 + random.below(LARGE / 2) };
        let (name, args) = doing.prepare(&mut machine, number);
        let service = machine.vbox.service();
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let vbox = &machine.vbox;
        let (ran, hit, took) =
            killed_after(machine.program.command(&args), moment(&mut random, &lasts, (verb, false)), |pid| {
                match victim {
                    Victim::Snaptree => vec![pid],
                    Victim::Manage => vbox.clients(),
                    Victim::Service => vec![service],
                }
            });
        assert!(took < HANGS, "{number}: snaptree hung");
        if !hit {
            lasts.insert((verb, false), took);
        }
        let tally = table.of(doing.words(), victim.name());
        *(if hit { &mut tally.kills } else { &mut tally.missed }) += 1;
        recovered(
            &mut machine,
            doing,
            &name,
            &ran,
            &format!("{number}: {} in {}", victim.name(), doing.words()),
            tally,
        );
        tally.orphans = tally.orphans.max(machine.vbox.orphans("web"));
        machine.prune(4);
        if victim == Victim::Snaptree || !hit {
            continue;
        }
        let args = bare.prepare(verb, doing.below, doing.above);
        let service = bare.vbox.service();
        let (ran, hit, took) =
            killed_after(bare.vbox.command(&args), moment(&mut random, &lasts, (verb, true)), |pid| {
                match victim {
                    Victim::Service => vec![service],
                    _ => vec![pid],
                }
            });
        if !hit {
            lasts.insert((verb, true), took);
        }
        let plain = bare.retry(&args, &ran);
        table.of(doing.words(), victim.name()).hung += usize::from(took > HANGS);
        if hit {
            *table.of(doing.words(), victim.name()).plain.entry(plain).or_default() += 1;
        }
    }
}
