//! A simulated year of domains under hourly, daily, weekly and monthly policies, with crashes.
//!
//! `cargo run --release -p snaptree-tests --bin year -- --domains N --days D --crashes C [--leaps L] [--seed S] [--dir DIR]`
//!
//! The state is kept in a folder in `DIR` (`/dev/shm`) and removed at the end. It fails if the trees or the log at the
//! end are not what the rules say.

#![allow(clippy::expect_used, reason = "a test program ends with what went wrong")]

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use snaptree_tests::year::{Figures, Wanted, live};

/// How often it says how far it has come.
const DAYS_TOLD: u32 = 10;

fn asked() -> Result<(Wanted, PathBuf), String> {
    let mut wanted = Wanted { domains: 20, days: 365, crashes: 100, leaps: 0, seed: 1 };
    let mut dir = PathBuf::from("/dev/shm");
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let text = words.next().ok_or_else(|| format!("{word} needs a value"))?;
        let number = |least: u32| match text.parse::<u32>() {
            Ok(number) if number >= least => Ok(number),
            _ => Err(format!("{word} {text}: a number from {least} is needed")),
        };
        match word.as_str() {
            "--domains" => wanted.domains = usize::try_from(number(1)?).expect("a number"),
            "--days" => wanted.days = number(1)?,
            "--crashes" => wanted.crashes = number(0)?,
            "--leaps" => wanted.leaps = number(0)?,
            "--seed" => wanted.seed = u64::from(number(0)?),
            "--dir" => dir = PathBuf::from(text),
            other => return Err(format!("unknown option {other}")),
        }
    }
    Ok((wanted, dir))
}

fn main() -> ExitCode {
    let (wanted, dir) = match asked() {
        Ok(asked) => asked,
        Err(error) => {
            eprintln!(
                "{error}\nusage: year [--domains N] [--days D] [--crashes C] [--leaps L] [--seed S] [--dir DIR]"
            );
            return ExitCode::from(2);
        }
    };
    let began = Instant::now();
    std::fs::create_dir_all(&dir).expect("a folder");
    let folder = tempfile::tempdir_in(dir).expect("a folder");
    let mut told = 0;
    let lived = live(wanted, folder.path(), &mut |progress| {
        if progress.days >= told + DAYS_TOLD {
            told = progress.days;
            let seconds = began.elapsed().as_secs();
            println!(
                "day {:>4} after {seconds:>5} s: {} events, {} crashes",
                progress.days, progress.events, progress.crashes
            );
        }
    });
    match lived {
        Ok(figures) => {
            tell(&wanted, &figures);
            ExitCode::SUCCESS
        }
        Err(what) => {
            println!("seed {}: {what}", wanted.seed);
            ExitCode::FAILURE
        }
    }
}

fn tell(wanted: &Wanted, figures: &Figures) {
    let Figures { audited, .. } = figures;
    println!(
        "{} domains, {} days: {} snapshots taken, {} deleted with the right reasons, {} merges, {} left, as the rules say",
        wanted.domains,
        wanted.days,
        audited.created,
        audited.deleted,
        audited.merged,
        audited.left_in_all(),
    );
    println!(
        "{} crashes ({} asleep, then away for hours: {} planned instants passed over; {} steps made out)",
        figures.crashes, figures.away, audited.skipped, audited.resolved
    );
    println!("{} leaps of the clock were told, and of each its deletes were held back", audited.leapt);
    println!(
        "{} events, a database of {} MiB; {:.1} s, of which processors worked {:.1} s ({:.1} s of it in starts), and {:.1} s \
         for the audit",
        audited.events,
        figures.database_bytes >> 20,
        figures.lived.as_secs_f64(),
        figures.worked.as_secs_f64(),
        figures.starting.as_secs_f64(),
        figures.auditing.as_secs_f64(),
    );
}
