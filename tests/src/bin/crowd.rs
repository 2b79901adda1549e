//! Many clients of one daemon that register, rename, create and delete at random.
//!
//! `cargo run --release -p snaptree-tests --bin crowd -- [--clients N] [--domains D] [--images I] [--requests R] [--seed S]`
//!
//! It fails if a name or an image has two owners at the end, or a snapshot is lost. Images need qemu-img.

#![allow(clippy::expect_used, reason = "a test program ends with what went wrong")]

use std::process::ExitCode;
use std::time::Instant;

use snaptree_tests::crowd::{Crowd, gather};
use snaptree_tests::program::Program;

fn asked() -> Result<Crowd, String> {
    let mut crowd = Crowd { clients: 64, domains: 200, images: 0, requests: 20_000, seed: 1 };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let text = words.next().ok_or_else(|| format!("{word} needs a value"))?;
        let number: usize = text.parse().map_err(|_| format!("{word} {text}: a number is needed"))?;
        match word.as_str() {
            "--clients" if number > 0 => crowd.clients = number,
            "--domains" if number > 0 => crowd.domains = number,
            "--images" => crowd.images = number,
            "--requests" => crowd.requests = number,
            "--seed" => crowd.seed = number as u64,
            other => return Err(format!("unknown option or improper value: {other} {text}")),
        }
    }
    Ok(crowd)
}

fn main() -> ExitCode {
    let crowd = match asked() {
        Ok(crowd) => crowd,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(2);
        }
    };
    let dir = tempfile::tempdir().expect("a folder");
    let program = Program::release(dir.path().join("s"));
    let began = Instant::now();
    let figures = gather(dir.path(), &program, crowd);
    println!("{crowd:?}\n{figures:?} in {:.1} s", began.elapsed().as_secs_f64());
    ExitCode::SUCCESS
}
