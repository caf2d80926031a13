use proptest::prelude::*;

use super::kinds::tests::profiles;
use super::*;

const WORKERS: u32 = 4;
const SLOTS: u32 = 4;

fn ranks() -> Vec<Rank> {
    (0..WORKERS).map(Rank).collect()
}

/// A window of 16 experts top-4 that knows four clear kinds, or none.
fn window(width: usize, clear: bool) -> Window {
    let mut window = Window::new(Settings {
        width,
        ..Settings::new(16, 4)
    });
    if clear {
        let kinds = Kinds::fit(&profiles(160, 4, 0.8, 1), &ranks(), None).unwrap();
        window.adopt(Arc::new(kinds));
    }
    window
}

fn waiting(id: u64, arrived_ms: f64, profile: Option<Profile>) -> Waiting {
    Waiting {
        id,
        arrived_ms,
        patience_ms: 1000.0,
        profile,
        prompt: 64,
        answer: 100.0,
        cached: Vec::new(),
    }
}

fn workers(active: &[u32]) -> Vec<Worker> {
    let worker = |(rank, active): (u32, &u32)| Worker {
        rank: Rank(rank),
        active: *active,
        has_room: *active < SLOTS,
    };
    (0..).zip(active).map(worker).collect()
}

/// Requests of kind `id % 4` in the queue.
fn filled(width: usize, requests: u64) -> Window {
    let mut window = window(width, true);
    for (id, profile) in (0..requests).zip(profiles(requests as usize, 4, 0.8, 5)) {
        window.push(waiting(id, id as f64, Some(profile)));
    }
    window
}

#[test]
fn one_free_slot_takes_a_request_of_its_kind_from_the_window() {
    let mut window = filled(64, 40);
    let mut kinds = BTreeMap::<Rank, Vec<u64>>::new();
    for at in 0..32 {
        let mut active = [SLOTS; WORKERS as usize];
        active[at % WORKERS as usize] = SLOTS - 1;
        let pick = window.pick(100.0, &workers(&active)).unwrap();
        if pick.why == Why::Cost {
            kinds
                .entry(pick.worker)
                .or_default()
                .push(pick.request.id % 4);
        }
    }
    assert!(window.is_grouping());
    let mut seen: Vec<u64> = kinds.values().map(|own| own[0]).collect();
    seen.sort_unstable();
    assert_eq!(seen, [0, 1, 2, 3]);
    for (worker, own) in kinds {
        assert!(own.iter().all(|kind| *kind == own[0]), "{worker}: {own:?}");
    }
}

#[test]
fn without_kinds_it_is_exactly_order_prefix_and_load() {
    let mut window = window(64, false);
    for (id, profile) in (0..6).zip(profiles(6, 4, 0.8, 5)) {
        window.push(waiting(id, 0.0, Some(profile)));
    }
    let mut prefixed = waiting(9, 0.0, None);
    prefixed.cached = vec![(Rank(3), 64)];
    prefixed.answer = 16.0;
    window.push(prefixed);
    let mut order = Vec::new();
    let mut active = [2, 0, 1, 3];
    while let Some(pick) = window.pick(0.0, &workers(&active)) {
        let least = (0..4).min_by_key(|at| active[*at]).unwrap();
        let at = pick.worker.0 as usize;
        if pick.request.id != 9 {
            assert_eq!(at, least, "the least loaded, of equals the first");
            active[at] += 1;
        } else {
            assert_eq!(at, 3, "64 cached tokens outweigh a sequence");
        }
        assert_eq!((pick.why, pick.added), (Why::Order, None));
        order.push(pick.request.id);
    }
    assert_eq!(order, [0, 1, 2, 3, 4, 5, 9]);
}

/// Where a step does not take longer for more experts, there is nothing to gain, whatever kinds there are.
#[test]
fn grouping_follows_the_measured_cost_of_experts() {
    let model = |expert| StepModel {
        base: 1.0,
        expert,
        sequence: 0.5,
    };
    let mut window = filled(64, 8);
    let busy = workers(&[3; 4]);
    window.pick(0.0, &busy).unwrap();
    assert!(window.is_grouping() && !window.step().1);
    for rank in ranks() {
        window.timed(rank, model(0.0), 0.9);
    }
    assert_eq!(window.step(), (model(0.0), true));
    assert_eq!(window.regime(), Regime::Mix);
    assert_eq!(window.pick(0.0, &busy).unwrap().why, Why::Order);
    for rank in ranks() {
        window.timed(rank, model(0.3), 0.9);
    }
    assert!(window.is_grouping());
    window.keep_only(|_| false);
    assert_eq!(window.step(), (StepModel::default(), false));
}

#[test]
fn an_overdue_request_is_next_and_one_that_left_is_not() {
    let mut window = filled(64, 20);
    window.remove(0);
    let overdue = window.pick(1500.0, &workers(&[3, 4, 4, 4])).unwrap();
    assert_eq!(overdue.request.id, 1);
    assert!(
        window.pick(100.0, &workers(&[4; 4])).is_none(),
        "nobody has room"
    );
    assert!(!window.remove(1), "it was placed");
    assert_eq!(window.waiting(), 18);
}

#[test]
fn control_requests_are_few_and_in_order() {
    let mut window = filled(64, 900);
    let mut controls = 0;
    while let Some(pick) = window.pick(0.0, &workers(&[3; 4])) {
        controls += u32::from(pick.why == Why::Control);
    }
    // 5 % of 900 are 45; nothing ends, so nothing is proven.
    assert!((25..=65).contains(&controls), "{controls}");
    assert_eq!(window.counts(), (900, u64::from(controls)));
}

#[test]
fn the_gain_of_true_signatures_is_seen_and_that_of_wrong_ones_is_not() {
    for (shift, gains) in [(0, true), (1, false)] {
        let mut window = window(64, true);
        let true_ones = profiles(1200, 4, 0.8, 5);
        let mut running = VecDeque::new();
        let mut active = [0; WORKERS as usize];
        for id in 0..1200_u64 {
            // The wrong ones are those of somebody else, drawn so that no pattern is left.
            let told = if shift == 0 { id } else { split_mix(id) % 1200 };
            window.push(waiting(
                id,
                id as f64,
                Some(true_ones[told as usize].clone()),
            ));
            while let Some(pick) = window.pick(id as f64, &workers(&active)) {
                active[pick.worker.0 as usize] += 1;
                running.push_back((pick.request.id, pick.worker));
            }
            if running.len() > 14 {
                let (done, worker) = running.pop_front().unwrap();
                active[worker.0 as usize] -= 1;
                window.ended(done, Some(&true_ones[done as usize]));
            }
        }
        let guard = window.guard();
        assert_eq!(
            guard.switch_offs() == 0,
            gains,
            "{:?} {:?}",
            guard,
            window.regime()
        );
    }
}

#[test]
fn a_request_without_a_signature_is_placed_like_any_other() {
    let mut window = filled(64, 4);
    window.push(waiting(100, 0.0, None));
    window.push(waiting(101, 0.0, Profile::from_shares(8, &[0.5; 8])));
    let mut placed = Vec::new();
    while let Some(pick) = window.pick(10.0, &workers(&[3; 4])) {
        placed.push(pick.request.id);
        window.ended(pick.request.id, None);
    }
    placed.sort_unstable();
    assert_eq!(placed, [0, 1, 2, 3, 100, 101]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    /// The bound on age: whatever comes and goes, nobody is passed by a younger one after its patience.
    #[test]
    fn nobody_overtakes_one_whose_patience_is_over(
        steps in proptest::collection::vec((0usize..160, 0u32..4, 0u32..300), 50..200)
    ) {
        let pool = profiles(160, 4, 0.8, 3);
        let mut window = window(64, true);
        let mut ages = BTreeMap::new();
        let mut now = 0.0;
        for (id, (profile, free, pause)) in (0..).zip(steps) {
            now += f64::from(pause);
            window.push(waiting(id, now, Some(pool[profile].clone())));
            ages.insert(id, now);
            let mut active = [SLOTS; WORKERS as usize];
            active[free as usize] = SLOTS - 1;
            if free == 0 {
                continue;
            }
            if let Some(pick) = window.pick(now, &workers(&active)) {
                ages.remove(&pick.request.id);
                let passed = ages.range(..pick.request.id).any(|(_, came)| now - came > 1000.0);
                prop_assert!(!passed, "{} was placed", pick.request.id);
            }
        }
    }
}
