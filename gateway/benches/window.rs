//! What the window costs at the gateway: one admission (a request joins, the best pair is picked, a request ends) with
//! 64 requests in the window, 64 workers, and profiles of eight layers of 128 experts. Once with one worker that has
//! room, as under full load, and once with all of them. A fit of kinds, which is beside the request path.

#![expect(clippy::expect_used, reason = "a bench fails by panicking")]

use std::hint::black_box;
use std::sync::Arc;

use criterion::{Criterion, criterion_group, criterion_main};
use foregate_api::ids::Rank;
use foregate_gateway::route::window::{Kinds, Settings, Waiting, Window, Worker};
use foregate_gateway::signature::{Profile, Signature};

const WORKERS: u32 = 64;
const WIDTH: u64 = 64;
const LAYERS: usize = 48;
const EXPERTS: usize = 128;
const TOP_K: usize = 8;
const SLOTS: u32 = 16;

/// Uniform in 0..n, by SplitMix64.
fn draw(state: &mut u64, n: u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (*state ^ (*state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    (z ^ (z >> 31)) % n
}

/// Profiles of sixteen kinds, each with its own hot experts.
fn profiles(n: u64) -> Vec<Profile> {
    let mut state = 1;
    let profile = |at: u64| {
        let mut count = |expert: usize| {
            let hot = (expert as u64 + at % 16).is_multiple_of(16);
            draw(&mut state, if hot { 128 } else { 12 }) as u32
        };
        let counts = (0..LAYERS * EXPERTS)
            .map(|entry| count(entry % EXPERTS))
            .collect();
        let signature = Signature::new(EXPERTS, counts).expect("the shape fits");
        Profile::of(&signature, TOP_K).expect("the model is small enough")
    };
    (0..n).map(profile).collect()
}

fn waiting(id: u64, profile: &Profile) -> Waiting {
    Waiting {
        id,
        arrived_ms: id as f64,
        patience_ms: 1e12,
        profile: Some(profile.clone()),
        prompt: 512,
        answer: 120.0,
        cached: Vec::new(),
    }
}

fn admissions(criterion: &mut Criterion) {
    let ranks: Vec<Rank> = (0..WORKERS).map(Rank).collect();
    let pool = profiles(1024);
    let kinds = Arc::new(Kinds::fit(&pool, &ranks, None).expect("enough profiles"));
    for (name, with_room) in [
        ("one worker with room", 1),
        ("all workers with room", WORKERS),
    ] {
        let mut window = Window::new(Settings::new(EXPERTS, TOP_K));
        window.adopt(Arc::clone(&kinds));
        let worker = |rank: u32| Worker {
            rank: Rank(rank),
            active: SLOTS - 1,
            has_room: rank < with_room,
        };
        let workers: Vec<Worker> = (0..WORKERS).map(worker).collect();
        let mut next = 0;
        for _ in 0..WIDTH {
            window.push(waiting(next, &pool[(next % 1024) as usize]));
            next += 1;
        }
        criterion.bench_function(&format!("admission, {name}"), |bencher| {
            bencher.iter(|| {
                window.push(waiting(next, &pool[(next % 1024) as usize]));
                next += 1;
                let pick = window.pick(next as f64, &workers).expect("somebody waits");
                black_box(window.ended(pick.request.id, pick.request.profile.as_ref()))
            });
        });
    }
    criterion.bench_function("fit of kinds, beside serving", |bencher| {
        bencher.iter(|| Kinds::fit(black_box(&pool[..1000]), &ranks, Some(&kinds)));
    });
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20);
    targets = admissions
}
criterion_main!(benches);
