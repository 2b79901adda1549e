//! Calendar expressions beside `systemd-analyze calendar`, in UTC.

use std::process::Command;

use fastrand::Rng;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use snaptree_peers::sets;
use snaptree_policies::schedule::{OnCalendar, Schedule};

const ITERATIONS: usize = 5;
const BATCH: usize = 200;

/// What systemd says about an expression: when it comes next, or that it is none.
#[derive(Debug, PartialEq)]
enum Answer {
    Refused,
    Comes(Vec<Timestamp>),
}

/// One field: any, a value, a range, a repetition, or a list of them. Some are out of bounds, some ranges go downward.
///
/// A repetition without an end can run over the end of the field (`*:03/17` to minute 71); systemd then goes on from
/// there (minute 11 of the next hour) and misses what lies before, and ours does not. So it stands alone here, and
/// `step` says which ones come out even.
fn field(random: &mut Rng, first: i64, last: i64, step: impl Fn(&mut Rng) -> i64) -> String {
    match random.u8(..9) {
        0..3 => return "*".to_owned(),
        3 => return format!("{}/{}", random.i64(first..=(first + last) / 2), step(random)),
        _ => {}
    }
    let items: Vec<String> = (0..random.usize(1..=3))
        .map(|_| {
            // The end stays in bounds: systemd takes one that is out of them if the steps do not reach it.
            let stop = random.i64(first..=last);
            let beyond = i64::from(random.u8(..60) == 0);
            let start = random.i64(first..=last + beyond);
            let (start, stop) = if stop < start && beyond == 0 && random.u8(..12) > 0 {
                (stop, start)
            } else {
                (start, stop)
            };
            match random.u8(..6) {
                // systemd refuses a range of one second, and takes one of anything else; ours takes both.
                0 if start != stop => format!("{start}..{stop}"),
                1 => format!("{start}..{stop}/{}", random.i64(1..=(last - first).min(20))),
                _ => format!("{start:02}"),
            }
        })
        .collect();
    items.join(",")
}

/// A step after which a field with so many values begins anew.
fn even(values: i64) -> impl Fn(&mut Rng) -> i64 {
    move |random| {
        let steps: Vec<i64> = (1..values).filter(|step| values % step == 0).collect();
        steps[random.usize(..steps.len())]
    }
}

fn expression(random: &mut Rng) -> String {
    let any = |random: &mut Rng| random.i64(1..=12);
    let mut words = Vec::new();
    if random.u8(..20) == 0 {
        let names =
            ["minutely", "hourly", "Daily", "weekly", "monthly", "quarterly", "semiannually", "yearly"];
        return format!("{} UTC", names[random.usize(..names.len())]);
    }
    if random.u8(..3) == 0 {
        let days = ["Mon", "tuesday", "Wed", "Thu", "FRI", "Sat", "Sunday"];
        let one = |random: &mut Rng| days[random.usize(..7)];
        let two = |random: &mut Rng| format!("{}..{}", days[random.usize(..5)], days[random.usize(3..7)]);
        words.push(match random.u8(..4) {
            0 => two(random),
            1 => format!("{},{}", one(random), one(random)),
            2 => format!("{},{}", one(random), two(random)),
            _ => one(random).to_owned(),
        });
    }
    if random.u8(..3) > 0 {
        let between = if random.u8(..4) == 0 { '~' } else { '-' };
        let day = match between {
            // systemd lowers its limit of 28 days from the end by three for each further item of a list; ours stays.
            '~' if random.bool() => random.i64(1..=30).to_string(),
            '~' => field(random, 1, 21, any),
            _ => field(random, 1, 31, any),
        };
        // Months are not equally long: no step comes out even, but in a single month it need not.
        let endless = day.split(',').any(|item| item.contains('/') && !item.contains(".."));
        let month = if endless { random.i64(1..=11).to_string() } else { field(random, 1, 12, even(12)) };
        let date = format!("{month}{between}{day}");
        words.push(match random.u8(..3) {
            0 => date,
            1 => format!("{}-{date}", field(random, 2026, 2040, any)),
            _ => format!("*-{date}"),
        });
    }
    if words.is_empty() || random.u8(..3) > 0 {
        let time = format!("{}:{}", field(random, 0, 23, even(24)), field(random, 0, 59, even(60)));
        words.push(if random.bool() { time } else { format!("{time}:{}", field(random, 0, 59, even(60))) });
    }
    words.push("UTC".to_owned());
    words.join(" ")
}

/// Asks about many at once. Refused ones leave no trace on standard output, so blocks are matched by their text.
fn systemd(expressions: &[String], base: Timestamp) -> Vec<Answer> {
    let base = base.strftime("%Y-%m-%d %H:%M:%S UTC").to_string();
    let output = Command::new("systemd-analyze")
        .args(["calendar", &format!("--iterations={ITERATIONS}"), &format!("--base-time={base}")])
        .args(expressions)
        .envs([("TZ", "UTC"), ("LC_ALL", "C"), ("SYSTEMD_PAGER", ""), ("SYSTEMD_COLORS", "0")])
        .output()
        .expect("systemd-analyze runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut blocks = text.split("\n\n").filter(|block| !block.trim().is_empty()).peekable();
    let value = |block: &str, key: &str| {
        let mut lines = block.lines().filter_map(|line| line.trim().split_once(": "));
        lines.find(|(found, _)| *found == key).map(|(_, value)| value.trim().to_owned())
    };
    let answers: Vec<Answer> = expressions
        .iter()
        .map(|expression| {
            let about = |block: &&str| {
                let given = value(block, "Original form").or_else(|| value(block, "Normalized form"));
                given.as_deref() == Some(expression)
            };
            match blocks.next_if(about) {
                Some(block) => Answer::Comes(instants(block)),
                None => Answer::Refused,
            }
        })
        .collect();
    assert_eq!(blocks.next(), None, "an answer that belongs to no expression");
    answers
}

/// The lines `Next elapse` and `Iter. #n`: a weekday, a date, a time and UTC.
fn instants(block: &str) -> Vec<Timestamp> {
    let found = block.lines().filter_map(|line| {
        let (key, value) = line.trim().split_once(": ")?;
        (key == "Next elapse" || key.starts_with("Iter.")).then(|| value.trim().to_owned())
    });
    found
        .filter(|value| value != "never")
        .map(|value| {
            let words: Vec<&str> = value.split(' ').collect();
            format!("{}T{}Z", words[1], words[2]).parse().unwrap()
        })
        .collect()
}

fn ours(expression: &str, base: Timestamp) -> Answer {
    match expression.parse::<OnCalendar>() {
        Err(_) => Answer::Refused,
        Ok(calendar) => Answer::Comes(
            Schedule::Calendar(calendar).upcoming(base, &TimeZone::UTC).take(ITERATIONS).collect(),
        ),
    }
}

#[test]
fn calendar_expressions_come_when_systemd_says() {
    let mut random = Rng::with_seed(4);
    let (mut come, mut refused, mut never) = (0, 0, 0);
    for _ in 0..sets(50_000) / BATCH {
        let base = Timestamp::from_second(1_767_225_600 + random.i64(0..400_000_000)).unwrap();
        let expressions: Vec<String> = (0..BATCH).map(|_| expression(&mut random)).collect();
        for (expression, theirs) in expressions.iter().zip(systemd(&expressions, base)) {
            assert_eq!(ours(expression, base), theirs, "{expression} from {base}");
            match theirs {
                Answer::Refused => refused += 1,
                Answer::Comes(instants) if instants.is_empty() => never += 1,
                Answer::Comes(_) => come += 1,
            }
        }
    }
    println!("{come} come, {never} never do, {refused} are refused");
    assert!(come > refused, "the expressions are no test if most are refused");
}
