//! Random histories on real images, with crashes in between.
#![cfg(feature = "lab")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on shall panic")]

mod qemu_lab;

use qemu_lab::{Ended, Lab, Wish};
use snaptree_engine::event::MergeStarted;
use snaptree_engine::tree::Snapshot;

/// A small generator, so that a seed repeats its run (xorshift64*).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        usize::try_from(self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33).unwrap() % limit
    }
}

async fn history(seed: u64, length: usize) {
    let mut random = Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    let mut lab = Lab::new(&["vda"]).await;
    for turn in 0..length {
        lab.write(&format!("write -P {} {}k {}k", turn + 2, 64 * random.below(100), 64 + random.below(1500)));
        let names: Vec<String> = lab.state.tree.iter().map(|s: &Snapshot| s.name.to_string()).collect();
        let crash = (random.below(3) == 0).then(|| random.below(9));
        let wish = if random.below(2) == 0 { Wish::Forward } else { Wish::Back };
        let choice = if names.is_empty() { 0 } else { random.below(7) };
        let mut picked = || names[random.below(names.len())].clone();
        let request = match choice {
            0..3 => lab.create_request(&format!("s{turn}")).into(),
            3 | 4 => lab.revert_request(&picked()),
            _ => lab.delete_request(&[&picked()]),
        };
        lab.second_crash = (random.below(2) == 0).then(|| random.below(6));
        let before = lab.now();
        let ended = lab.operate(request, crash, wish).await;
        if !(3..=4).contains(&choice) || ended != Ended::Done {
            assert_eq!(lab.now(), before, "seed {seed}, turn {turn}");
        }
        lab.check().await;
        if random.below(2) == 0
            && let Some(plan) = lab.next_merge().await
        {
            let before = lab.now();
            let crash = (random.below(2) == 0).then(|| random.below(14));
            lab.operate(MergeStarted { plan }.into(), crash, wish).await;
            assert_eq!(lab.now(), before, "seed {seed}, turn {turn}: merge");
            lab.check().await;
        }
    }
    let before = lab.now();
    lab.merge_all().await;
    assert_eq!(lab.now(), before, "seed {seed}");
    println!("seed {seed}: {} snapshots, {} tombstones", lab.state.tree.len(), lab.state.tombstones.len());
}

/// `SNAPTREE_SEED` repeats one history.
#[tokio::test]
async fn random_histories() {
    let seeds = match std::env::var("SNAPTREE_SEED") {
        Ok(seed) => vec![seed.parse().unwrap()],
        Err(_) => (1..=6).collect(),
    };
    for seed in seeds {
        println!("seed {seed} (repeat it with SNAPTREE_SEED={seed})");
        history(seed, 20).await;
    }
}
