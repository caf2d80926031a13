//! Times of the planner's hot paths: the split of one batch, and one window's decision over all layers.
//!
//! Shape of the main setting: 58 layers, 256 experts, 64 ranks of 5 slots. Loads are drawn once from a seeded
//! generator with the spread of real ones (largest about four times the mean).

#![expect(clippy::expect_used, reason = "a bench fails by panicking")]

#[path = "../tests/dice/mod.rs"]
mod dice;
#[path = "../tests/dice/mixed.rs"]
mod mixed;

use criterion::{Criterion, criterion_group, criterion_main};
use foregate_api::ids::{LayerId, Rank};
use foregate_planner::split::{SplitTable, Splitter};
use foregate_planner::{History, Problem, RankSlots, Settings, initial, plan};

use dice::Dice;

const LAYERS: usize = 58;
const EXPERTS: usize = 256;
const RANKS: u32 = 64;
const SLOTS: usize = 5;

fn problem(layers: usize) -> Problem {
    let mut dice = Dice(1);
    let ranks = (0..RANKS).map(|r| RankSlots {
        rank: Rank(r),
        slots: SLOTS,
        domain: String::new(),
    });
    Problem {
        demand: (0..layers)
            .map(|_| (0..EXPERTS).map(|_| 1000.0 * dice.mixed()).collect())
            .collect(),
        batch_rows: f64::from(RANKS) * 512.0,
        ..Problem::uniform(ranks.collect(), layers, EXPERTS)
    }
}

/// The same loads after some drift.
fn drifted(problem: &Problem, by: f64) -> Problem {
    let mut dice = Dice(2);
    let mut later = problem.clone();
    for x in later.demand.iter_mut().flatten() {
        *x *= 1.0 + by * (2.0 * dice.uniform() - 1.0);
    }
    later
}

fn bench(c: &mut Criterion) {
    let one = problem(1);
    let (placement, _) = initial(&one, &Settings::default()).expect("the problem is sound");
    let table = SplitTable::new(&placement, LayerId(0)).expect("there is a layer 0");
    let mut dice = Dice(3);
    // A batch of 64 tokens a rank, top-8: 128 rows per expert on average.
    let rows: Vec<u32> = (0..EXPERTS)
        .map(|_| (128.0 * dice.mixed()) as u32)
        .collect();
    let base = vec![0.0; RANKS as usize];
    let mut splitter = Splitter::new();
    c.bench_function("split one layer, 64 ranks x 5 slots, 256 experts", |b| {
        b.iter(|| splitter.split(&table, &rows, &base).map(|r| r[0]));
    });

    let all = problem(LAYERS);
    let settings = Settings::default();
    let (placement, _) = initial(&all, &settings).expect("the problem is sound");
    for (name, by) in [("keep", 0.0), ("reweigh", 0.2), ("move", 0.8)] {
        let later = drifted(&all, by);
        c.bench_function(&format!("plan 58 layers, {name}"), |b| {
            b.iter(|| plan(&later, Some(&placement), &settings, &mut History::default()));
        });
    }
    c.bench_function("first plan of one layer", |b| {
        b.iter(|| initial(&one, &settings))
    });
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10);
    targets = bench
}
criterion_main!(benches);
