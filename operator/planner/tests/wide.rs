//! Properties over the whole range of sizes, of the limits, and against exhaustive search.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod dice;

use std::collections::BTreeSet;

use foregate_api::ids::{ExpertId, LayerId, Rank};
use foregate_api::placement::Placement;
use foregate_planner::check::{Finding, check, refused};
use foregate_planner::split::{SplitTable, solve};
use foregate_planner::{
    Cover, Decision, History, Problem, RankSlots, Settings, Verdict, initial, plan,
};
use proptest::prelude::*;

use dice::Dice;

/// Loads with the spread of real ones.
impl Dice {
    /// From 1 to 10,000, few of them large; some nought.
    fn load(&mut self) -> f64 {
        let x = self.uniform();
        if x < 0.05 {
            0.0
        } else {
            (9.2 * x * x).exp().round()
        }
    }

    fn demand(&mut self, layers: usize, experts: usize) -> Vec<Vec<f64>> {
        let mut layer = |_| (0..experts).map(|_| self.load()).collect();
        (0..layers).map(&mut layer).collect()
    }
}

/// Ranks of four to a domain, with enough slots and `spare` more on every other rank.
fn problem(
    (layers, experts, ranks): (usize, usize, usize),
    spare: usize,
    dice: &mut Dice,
) -> Problem {
    let once = experts.div_ceil(ranks);
    let rank = |r: usize| RankSlots {
        rank: Rank(3 * r as u32),
        slots: once
            + if r.is_multiple_of(2) {
                spare
            } else {
                spare / 2
            },
        domain: format!("host-{}", r / 4),
    };
    Problem {
        demand: dice.demand(layers, experts),
        batch_rows: 64.0 * ranks as f64,
        ..Problem::uniform((0..ranks).map(rank).collect(), layers, experts)
    }
}

fn first(problem: &Problem, settings: &Settings) -> Placement {
    let (placement, report) = initial(problem, settings).unwrap();
    assert!(
        report
            .findings
            .iter()
            .all(|f| !matches!(f, Finding::Components { .. }))
    );
    assert_valid(&placement, problem, None);
    placement
}

fn assert_valid(placement: &Placement, problem: &Problem, parent: Option<&Placement>) {
    let findings = check(placement, problem, parent);
    assert!(!refused(&findings), "{findings:?}");
    for layer in &placement.layers {
        for (held, rank) in layer.slots.iter().zip(&problem.ranks) {
            let once: BTreeSet<_> = held.iter().collect();
            assert_eq!(once.len(), held.len(), "an expert twice on a rank");
            assert_eq!(held.len(), rank.slots.min(problem.experts));
        }
    }
}

fn text(placement: &Placement) -> String {
    serde_json::to_string(placement).unwrap()
}

/// Experts of a layer whose copies are all in one domain.
fn in_one_domain(placement: &Placement, problem: &Problem, l: usize) -> usize {
    let domain = |rank: Rank| {
        let at = problem.ranks.iter().position(|r| r.rank == rank).unwrap();
        problem.ranks[at].domain.as_str()
    };
    let copies = placement.layers[l].copies.iter();
    let domains = copies.map(|on| on.iter().map(|c| domain(c.rank)).collect::<BTreeSet<_>>());
    domains.filter(|domains| domains.len() < 2).count()
}

/// The largest problem that is promised: the first plan, and a window of another load.
#[test]
fn sixty_four_layers_of_512_experts_on_512_ranks() {
    let mut dice = Dice(1);
    let mut problem = problem((64, 512, 512), 1, &mut dice);
    let settings = Settings {
        threads: 2,
        ..Settings::default()
    };
    let placement = first(&problem, &settings);
    problem.demand = dice.demand(64, 512);
    let decision = plan(
        &problem,
        Some(&placement),
        &settings,
        &mut History::default(),
    )
    .unwrap();
    let next = decision.placement().unwrap();
    assert_valid(next, &problem, Some(&placement));
    let most = decision
        .report()
        .layers
        .iter()
        .map(|l| l.copies_moved)
        .max();
    assert!(most <= Some(settings.max_moves_per_layer));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_size_is_planned_well_formed_once_and_alike_by_any_threads(
        (layers, experts, ranks) in (1_usize..5, 1_usize..130, 1_usize..70),
        spare in 0_usize..4,
        seed in any::<u64>(),
        threads in 2_usize..5,
    ) {
        let mut dice = Dice(seed);
        let mut problem = problem((layers, experts, ranks), spare, &mut dice);
        let settings = Settings::default();
        let placement = first(&problem, &settings);
        let side_by_side = Settings { threads, ..settings };
        prop_assert_eq!(text(&placement), text(&first(&problem, &side_by_side)));
        let again = plan(&problem, Some(&placement), &settings, &mut History::default()).unwrap();
        prop_assert!(matches!(again, Decision::Keep { .. }), "{}", again.report());
        problem.demand = dice.demand(layers, experts);
        let one = plan(&problem, Some(&placement), &settings, &mut History::default()).unwrap();
        let many = plan(&problem, Some(&placement), &side_by_side, &mut History::default()).unwrap();
        prop_assert_eq!(one.placement().map(text), many.placement().map(text));
        prop_assert_eq!(
            serde_json::to_string(one.report()).unwrap(),
            serde_json::to_string(many.report()).unwrap()
        );
        if let Some(next) = one.placement() {
            assert_valid(next, &problem, Some(&placement));
        }
    }

    #[test]
    fn more_bytes_gain_no_less(seed in any::<u64>(), ranks in 2_usize..12) {
        let mut dice = Dice(seed);
        let mut problem = problem((6, 24, ranks), 3, &mut dice);
        problem.expert_bytes = 10;
        let placement = first(&problem, &Settings::default());
        problem.demand = dice.demand(6, 24);
        let mut gained = 0.0;
        for copies in [0_u64, 3, 6, 12, 24] {
            let settings = Settings { max_bytes: Some(10 * copies), ..Settings::default() };
            let decision = plan(&problem, Some(&placement), &settings, &mut History::default());
            let decision = decision.unwrap();
            let report = decision.report();
            prop_assert!(report.copies_moved as u64 <= copies);
            prop_assert_eq!(report.bytes_moved, 10 * report.copies_moved as u64);
            let moved = report.layers.iter().filter(|l| l.verdict == Verdict::Move);
            let gain = moved.map(|l| l.expected_after - l.expected_before).sum::<f64>();
            prop_assert!(gain >= gained - 1e-12, "{gain} after {gained} with {copies}");
            gained = gain;
        }
    }

    #[test]
    fn cover_of_all_is_reached_if_it_can_be_and_kept(
        seed in any::<u64>(),
        domains in 2_usize..5,
        experts in 4_usize..20,
    ) {
        let mut dice = Dice(seed);
        let ranks = 4 * domains;
        let mut problem = problem((2, experts, ranks), 0, &mut dice);
        for rank in &mut problem.ranks {
            rank.slots = (2 * experts).div_ceil(ranks) + 1;
        }
        problem.cover = Cover::All;
        let mut placement = first(&problem, &Settings::default());
        for _ in 0..6 {
            for l in 0..2 {
                prop_assert_eq!(in_one_domain(&placement, &problem, l), 0);
            }
            problem.demand = dice.demand(2, experts);
            let decision =
                plan(&problem, Some(&placement), &Settings::default(), &mut History::default());
            if let Some(next) = decision.unwrap().placement() {
                assert_valid(next, &problem, Some(&placement));
                placement = next.clone();
            }
        }
        // Any one domain may go: what is left needs no repair, only cover anew.
        problem.ranks.retain(|rank| rank.domain != "host-0");
        let decision = plan(&problem, Some(&placement), &Settings::default(), &mut History::default());
        if problem.usable_slots() >= experts {
            let decision = decision.unwrap();
            prop_assert!(decision.report().layers.iter().all(|l| l.orphans == 0));
        }
    }
}

/// Every way to fill `slots` slots of each of `ranks` ranks with `experts` experts, none twice on a rank.
fn placements(experts: u32, ranks: usize, slots: usize) -> Vec<Vec<u32>> {
    let sets: Vec<u32> = (0_u32..1 << experts)
        .filter(|set| set.count_ones() as usize == slots)
        .collect();
    let mut all = vec![Vec::new()];
    for _ in 0..ranks {
        let longer = |held: &Vec<u32>| {
            let mut each = Vec::new();
            for set in sets
                .iter()
                .filter(|set| held.last().is_none_or(|last| last <= set))
            {
                let mut held = held.clone();
                held.push(*set);
                each.push(held);
            }
            each
        };
        all = all.iter().flat_map(longer).collect();
    }
    let full = (1_u32 << experts) - 1;
    all.retain(|held| held.iter().fold(0, |sum, set| sum | set) == full);
    all
}

/// Least maximum load of the best split: over all sets of ranks the rows held only inside, over the size.
fn least_maximum(held: &[u32], rows: &[f64]) -> f64 {
    let mut worst = 0.0_f64;
    for set in 1_u32..1 << held.len() {
        let outside = (0..held.len()).filter(|g| set & (1 << g) == 0);
        let elsewhere = outside.fold(0, |sum, g| sum | held[g]);
        let inside = (0..rows.len()).filter(|e| elsewhere & (1 << e) == 0);
        let sum: f64 = inside.map(|e| rows[e]).sum();
        worst = worst.max(sum / f64::from(set.count_ones()));
    }
    worst
}

/// First plans of small problems, against the best of all placements.
#[test]
fn first_plans_are_near_the_best_of_all_placements() {
    let mut dice = Dice(7);
    for (experts, ranks, slots) in [(5_u32, 3, 2), (6, 3, 3), (5, 4, 2), (6, 4, 2)] {
        let all = placements(experts, ranks, slots);
        let (mut ratio, mut worst) = (0.0, 0.0_f64);
        const CASES: usize = 20;
        for _ in 0..CASES {
            let rows: Vec<f64> = (0..experts).map(|_| dice.load() + 1.0).collect();
            let best = all
                .iter()
                .map(|held| least_maximum(held, &rows))
                .fold(f64::INFINITY, f64::min);
            let rank = |r: usize| RankSlots {
                rank: Rank(r as u32),
                slots,
                domain: String::new(),
            };
            let problem = Problem {
                demand: vec![rows.clone()],
                ..Problem::uniform((0..ranks).map(rank).collect(), 1, experts as usize)
            };
            let placement = first(
                &problem,
                &Settings {
                    threshold: 1.0,
                    ..Settings::default()
                },
            );
            let table = SplitTable::new(&placement, LayerId(0)).unwrap();
            let got = solve(&table, &rows, 4000, 1e-6).max() / best;
            assert!(got > 1.0 - 1e-3, "better than the best of all: {got}");
            ratio += got / CASES as f64;
            worst = worst.max(got);
        }
        println!(
            "{experts} experts on {ranks} ranks of {slots}: mean {ratio:.4}, worst {worst:.4}"
        );
        assert!(
            ratio < 1.02 && worst < 1.2,
            "{experts} {ranks} {slots}: {ratio} {worst}"
        );
    }
}

/// A drawn order of `n` things.
fn shuffled(n: usize, dice: &mut Dice) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    for i in (1..n).rev() {
        order.swap(i, (dice.uniform() * (i + 1) as f64) as usize);
    }
    order
}

/// Names for the same things: expert e becomes `experts[e]`, the i-th rank the `ranks[i]`-th.
struct Names {
    experts: Vec<usize>,
    ranks: Vec<usize>,
}

impl Names {
    fn draw(problem: &Problem, dice: &mut Dice) -> Self {
        Self {
            experts: shuffled(problem.experts, dice),
            ranks: shuffled(problem.ranks.len(), dice),
        }
    }

    fn demand(&self, demand: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let row = |row: &Vec<f64>| {
            let mut named = vec![0.0; row.len()];
            (0..row.len()).for_each(|e| named[self.experts[e]] = row[e]);
            named
        };
        demand.iter().map(row).collect()
    }

    fn problem(&self, problem: &Problem) -> Problem {
        let mut ranks = problem.ranks.clone();
        for (rank, at) in problem.ranks.iter().zip(&self.ranks) {
            ranks[*at].slots = rank.slots;
            ranks[*at].domain.clone_from(&rank.domain);
        }
        Problem {
            ranks,
            demand: self.demand(&problem.demand),
            ..problem.clone()
        }
    }

    fn placement(&self, placement: &Placement) -> Placement {
        let mut named = placement.clone();
        let rank = |rank: Rank| {
            let at = placement.ranks.binary_search(&rank).unwrap();
            placement.ranks[self.ranks[at]]
        };
        for (layer, old) in named.layers.iter_mut().zip(&placement.layers) {
            for (held, at) in old.slots.iter().zip(&self.ranks) {
                let held = held
                    .iter()
                    .map(|e| ExpertId(self.experts[e.index()] as u32));
                layer.slots[*at] = held.collect();
                layer.slots[*at].sort_unstable();
            }
            for (copies, e) in old.copies.iter().zip(&self.experts) {
                layer.copies[*e].clone_from(copies);
                layer.copies[*e]
                    .iter_mut()
                    .for_each(|copy| copy.rank = rank(copy.rank));
                layer.copies[*e].sort_by_key(|copy| copy.rank);
            }
        }
        named
    }
}

/// Balance before and after so many windows that a load stays, and the copies that were moved.
fn followed(
    problem: &Problem,
    mut placement: Placement,
    settings: &Settings,
) -> (f64, f64, usize) {
    const WINDOWS: usize = 16;
    let mut history = History::default();
    let (mut balances, mut copies) = (Vec::new(), 0);
    for _ in 0..WINDOWS {
        let decision = plan(problem, Some(&placement), settings, &mut history).unwrap();
        let report = decision.report();
        balances.extend([report.balance_before, report.balance_after]);
        copies += report.copies_moved;
        if let Some(next) = decision.placement() {
            placement = next.clone();
        }
    }
    (balances[0], balances[2 * WINDOWS - 1], copies)
}

/// Numbers of experts and ranks are names: with others a plan is as good and costs as much, but for what ties decide.
#[test]
fn names_do_not_matter() {
    const CASES: u64 = 24;
    let mut dice = Dice(11);
    let (mut first, mut later, mut bias, mut copies) = (0.0_f64, 0.0_f64, 0.0, [0; 2]);
    for _ in 0..CASES {
        let mut problem = problem((3, 48, 12), 3, &mut dice);
        // Batches are drawn by number.
        problem.batch_rows = 0.0;
        let names = Names::draw(&problem, &mut dice);
        let settings = Settings {
            threshold: 0.999,
            ..Settings::default()
        };
        let (placement, report) = initial(&problem, &settings).unwrap();
        let (_, other) = initial(&names.problem(&problem), &settings).unwrap();
        first = first.max((report.balance_after - other.balance_after).abs());
        problem.demand = dice.demand(3, 48);
        let one = followed(&problem, placement.clone(), &settings);
        let names_of = (names.problem(&problem), names.placement(&placement));
        let other = followed(&names_of.0, names_of.1, &settings);
        // The same state, so the same question.
        assert!((one.0 - other.0).abs() < 1e-6);
        later = later.max((one.1 - other.1).abs());
        bias += (one.1 - other.1) / CASES as f64;
        copies[0] += one.2;
        copies[1] += other.2;
    }
    println!("first {first:.4}, later {later:.4}, on average {bias:.4}; copies {copies:?}");
    assert!(
        first < 0.005 && later < 0.03 && bias.abs() < 0.005,
        "{first} {later} {bias}"
    );
    let [one, other] = copies.map(|n| n as f64);
    assert!((one - other).abs() < 0.1 * one, "{copies:?}");
}

/// A larger limit on copies never makes a window's plan much worse: each layer's search is greedy.
#[test]
fn more_moves_gain_no_less() {
    let mut dice = Dice(13);
    let (mut worst, mut gained) = (0.0_f64, Vec::new());
    for _ in 0..24 {
        let mut problem = problem((3, 48, 12), 3, &mut dice);
        let placement = first(&problem, &Settings::default());
        problem.demand = dice.demand(3, 48);
        let mut before = 0.0;
        gained = [0, 2, 4, 8, 16]
            .map(|limit| {
                let settings = Settings {
                    max_moves_per_layer: limit,
                    ..Settings::default()
                };
                let mut history = History::default();
                let decision = plan(&problem, Some(&placement), &settings, &mut history);
                let after = decision.unwrap().report().balance_after;
                worst = worst.max(before - after);
                before = after;
                after
            })
            .to_vec();
    }
    println!("worst {worst:.4}, last case {gained:?}");
    assert!(worst < 0.01, "{worst}");
}
