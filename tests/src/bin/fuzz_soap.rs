//! Feeds the reader of SOAP replies with damaged and invented ones: it must not panic, and its memory must stay bounded.
//!
//! ```text
//! fuzz_soap [--executions N] [--seconds N] [--seed N] [--corpus FOLDER]
//! ```
//! The corpus is what real conversations look like; each input is some of it, changed. The seed is printed, and repeats
//! the run. Ends at whichever limit comes first (default: 10 million executions or 30 minutes); an input that made the
//! reader panic is written to `fuzz_soap.crash`.

#![allow(clippy::expect_used, reason = "a test program ends with what went wrong")]

use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use snaptree_drivers::esx::soap::{BYTES_MAX, Fault, body};
use snaptree_tests::random::Random;

/// Most that the process may ever have in memory, in kilobytes: the inputs are small, so what they need is, too.
const MEMORY_KB_MAX: u64 = 256 << 10;
/// Longest input, in bytes.
const INPUT_BYTES_MAX: usize = 64 << 10;

/// What XML and SOAP are made of.
const WORDS: [&str; 28] = [
    "<",
    ">",
    "</",
    "/>",
    "\"",
    "'",
    "&",
    ";",
    "&#x0;",
    "&#55555555;",
    "&lt;",
    "&unknown;",
    "<![CDATA[",
    "]]>",
    "<!--",
    "-->",
    "<?xml version=\"1.0\"?>",
    "<!DOCTYPE a [<!ENTITY b \"c\">]>",
    " xmlns=\"urn:vim25\"",
    " xmlns:a=\"\"",
    " xsi:type=\"TaskInProgress\"",
    " type=\"Task\"",
    "<childSnapshotList>",
    "</childSnapshotList>",
    "<returnval/>",
    "\u{feff}",
    "\u{0}",
    "<soapenv:Fault>",
];

/// What is asked for.
struct Wanted {
    executions: u64,
    time: Duration,
    seed: u64,
    corpus: PathBuf,
}

fn asked() -> Result<Wanted, String> {
    let clock = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus/soap");
    let time = Duration::from_secs(1_800);
    let mut wanted = Wanted { executions: 10_000_000, time, seed: clock, corpus };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let text = words.next().ok_or_else(|| format!("{word} needs a value"))?;
        let number = || text.parse::<u64>().map_err(|_| format!("{word} {text}: a number is needed"));
        match word.as_str() {
            "--executions" => wanted.executions = number()?,
            "--seconds" => wanted.time = Duration::from_secs(number()?),
            "--seed" => wanted.seed = number()?,
            "--corpus" => wanted.corpus = PathBuf::from(text),
            other => return Err(format!("unknown option {other}")),
        }
    }
    Ok(wanted)
}

fn main() -> ExitCode {
    let Wanted { executions, time, seed, corpus } = match asked() {
        Ok(wanted) => wanted,
        Err(error) => {
            eprintln!(
                "{error}\nusage: fuzz_soap [--executions N] [--seconds N] [--seed N] [--corpus FOLDER]"
            );
            return ExitCode::from(2);
        }
    };
    let corpus = read(&corpus);
    println!("seed {seed}, {} in the corpus", corpus.len());
    for text in &corpus {
        body(text).expect("what was said in a real conversation is read");
    }
    let mut random = Random::new(seed);
    let begun = Instant::now();
    let (mut done, mut understood) = (0_u64, 0_u64);
    while done < executions && begun.elapsed() < time {
        let input = invent(&corpus, &mut random);
        match catch_unwind(|| body(&input).map(|reply| Fault::of_call(&reply).to_string()).is_ok()) {
            Ok(read) => understood += u64::from(read),
            Err(_) => {
                std::fs::write("fuzz_soap.crash", &input).expect("the input is kept");
                println!("the reader panicked after {done} executions: see fuzz_soap.crash");
                return ExitCode::FAILURE;
            }
        }
        done += 1;
    }
    let memory = peak_kb();
    println!(
        "{done} executions in {:.1} s ({understood} of them readable), at most {} MiB in memory",
        begun.elapsed().as_secs_f64(),
        memory >> 10
    );
    if memory > MEMORY_KB_MAX {
        println!("that is more than {} MiB", MEMORY_KB_MAX >> 10);
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn read(folder: &Path) -> Vec<Vec<u8>> {
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(folder).expect("the corpus").map(|entry| entry.expect("an entry").path()).collect();
    files.sort();
    assert!(!files.is_empty(), "the corpus is empty");
    files.iter().map(|file| std::fs::read(file).expect("a file of the corpus")).collect()
}

/// One of the corpus, changed in some places.
fn invent(corpus: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut text = random.pick(corpus).clone();
    for _ in 0..=random.below(6) {
        change(&mut text, corpus, random);
    }
    text.truncate(INPUT_BYTES_MAX.min(BYTES_MAX));
    text
}

fn change(text: &mut Vec<u8>, corpus: &[Vec<u8>], random: &mut Random) {
    let at = random.below(text.len() + 1);
    let end = (at + random.below(200)).min(text.len());
    match random.below(8) {
        0 => text.truncate(at),
        1 => drop(text.drain(at..end)),
        2 if at < text.len() => text[at] = u8::try_from(random.below(256)).unwrap_or_default(),
        // The same again and again: deep nesting, and long texts.
        3 => {
            let part: Vec<u8> = text[at..end].repeat(1 + random.below(60));
            drop(text.splice(at..at, part));
        }
        4 | 5 => drop(text.splice(at..at, random.pick(&WORDS).bytes())),
        6 => {
            let other = random.pick(corpus);
            let from = random.below(other.len());
            let to = (from + random.below(400)).min(other.len());
            drop(text.splice(at..end, other[from..to].iter().copied()));
        }
        _ if at < text.len() => text[at] ^= 1 << random.below(8),
        _ => {}
    }
}

/// The most that this process ever had in memory, in kilobytes.
fn peak_kb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse().ok()).unwrap_or(0)
}
