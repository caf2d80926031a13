//! Properties of every plan, over random problems.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod hosts;

use foregate_api::ids::{ExpertId, Rank};
use foregate_api::placement::{Placement, Reason};
use foregate_planner::bound::{any_placement, certificate};
use foregate_planner::check::{Finding, check, refused};
use foregate_planner::redundancy::least_components;
use foregate_planner::report::{LayerReport, Step};
use foregate_planner::split::{FEW_ROWS, SplitTable, Splitter, balance, solve};
use foregate_planner::{
    Decision, History, Problem, RankSlots, Settings, Verdict, initial, plan,
};
use proptest::prelude::*;

use hosts::table;

/// Slots that hold all experts, with some to spare.
fn slots() -> impl Strategy<Value = (usize, Vec<usize>)> {
    (1_usize..7, 1_usize..20).prop_flat_map(|(ranks, experts)| {
        let least = experts.div_ceil(ranks);
        let slots = proptest::collection::vec(least..(least + 4), ranks);
        (Just(experts), slots)
    })
}

fn loads(experts: usize) -> impl Strategy<Value = Vec<f64>> {
    // Integers, some of them nought, with a heavy tail.
    let load = prop_oneof![
        1 => Just(0.0),
        6 => (1_u32..100).prop_map(f64::from),
        1 => (100_u32..2000).prop_map(f64::from),
    ];
    proptest::collection::vec(load, experts)
}

prop_compose! {
    fn problems()((experts, slots) in slots(), layers in 1_usize..3)(
        demand in proptest::collection::vec(loads(experts), layers),
        later in proptest::collection::vec(loads(experts), layers),
        (experts, slots, layers) in Just((experts, slots, layers)),
    ) -> (Problem, Vec<Vec<f64>>) {
        let ranks = slots.iter().enumerate().map(|(i, slots)| rank(i as u32 * 2, *slots));
        let problem = Problem {
            demand,
            ..Problem::uniform(ranks.collect(), layers, experts)
        };
        (problem, later)
    }
}

fn rank(rank: u32, slots: usize) -> RankSlots {
    RankSlots {
        rank: Rank(rank),
        slots,
        domain: format!("host-{}", rank % 3),
    }
}

fn first(problem: &Problem) -> Placement {
    initial(problem, &Settings::default()).unwrap().0
}

/// Every slot used, no expert twice on a rank, the least number of components if nothing limits the moves.
fn assert_sound(placement: &Placement, problem: &Problem, parent: Option<&Placement>) {
    let findings = check(placement, problem, parent);
    assert!(!refused(&findings), "{findings:?}");
    assert!(
        !findings.iter().any(|f| matches!(f, Finding::Double { .. })),
        "{findings:?}"
    );
    for layer in &placement.layers {
        for (held, rank) in layer.slots.iter().zip(&problem.ranks) {
            assert_eq!(held.len(), rank.slots.min(problem.experts));
        }
    }
}

fn assert_linked(placement: &Placement, problem: &Problem, parent: Option<&Placement>) {
    let findings = check(placement, problem, parent);
    assert!(
        !findings
            .iter()
            .any(|f| matches!(f, Finding::Components { .. })),
        "{findings:?}"
    );
}

prop_compose! {
    fn splits()(ranks in 1_u32..6, experts in 1_usize..14)(
        hosts in proptest::collection::vec(
            proptest::collection::btree_set(0..ranks, 1..=ranks as usize), experts),
        rows in proptest::collection::vec(prop_oneof![Just(0_u32), 1_u32..9, 1_u32..400], experts),
        base in proptest::collection::vec(0.0..500.0_f64, ranks as usize),
    ) -> (SplitTable, Vec<u32>, Vec<f64>) {
        let ranks = base.len() as u32;
        let hosts: Vec<Vec<u32>> = hosts.into_iter().map(|h| h.into_iter().collect()).collect();
        (table(&hosts, ranks), rows, base)
    }
}

fn loads_of(table: &SplitTable, per_copy: impl Fn(usize) -> f64, base: &[f64]) -> Vec<f64> {
    let mut loads = base.to_vec();
    for copy in 0..table.len() {
        loads[table.host(copy).unwrap()] += per_copy(copy);
    }
    loads
}

fn max(loads: &[f64]) -> f64 {
    loads.iter().copied().fold(0.0, f64::max)
}

fn even(table: &SplitTable, rows: &[f64], base: &[f64]) -> Vec<f64> {
    let mut part = vec![0.0; table.len()];
    for (e, rows) in rows.iter().enumerate() {
        let copies = table.copies(ExpertId(e as u32));
        for copy in copies.clone() {
            part[copy] = rows / copies.len() as f64;
        }
    }
    loads_of(table, |copy| part[copy], base)
}

/// Exact least maximum: over all sets of ranks, the rows of experts inside over the size.
fn optimum(table: &SplitTable, rows: &[f64]) -> f64 {
    let ranks = table.ranks().len();
    let mut best = 0.0_f64;
    for set in 1_u32..(1 << ranks) {
        let mut inside = 0.0;
        for (e, rows) in rows.iter().enumerate() {
            let mut copies = table.copies(ExpertId(e as u32));
            if copies.all(|copy| set & (1 << table.host(copy).unwrap()) != 0) {
                inside += rows;
            }
        }
        best = best.max(inside / f64::from(set.count_ones()));
    }
    best
}

fn closes_a_gap(layer: &LayerReport) -> bool {
    let closes = |step: &Step| matches!(step, Step::Cover { copies, .. } if *copies > 0);
    layer.steps.iter().any(closes)
}

/// The polish of a first plan: one more copy of expert 1 in place of a link would balance these loads better.
#[test]
fn a_first_plan_stays_linked_where_a_cut_would_balance_better() {
    let ranks = [2, 3, 1, 1]
        .into_iter()
        .zip(0..)
        .map(|(slots, r)| rank(r, slots));
    let problem = Problem {
        demand: vec![vec![80.0, 96.0, 64.0, 16.0]],
        ..Problem::uniform(ranks.collect(), 1, 4)
    };
    let placement = first(&problem);
    assert_sound(&placement, &problem, None);
    assert_linked(&placement, &problem, None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn a_first_plan_is_sound_linked_and_repeats((problem, _) in problems()) {
        let (placement, report) = initial(&problem, &Settings::default()).unwrap();
        assert_sound(&placement, &problem, None);
        assert_linked(&placement, &problem, None);
        for layer in &report.layers {
            let copies = problem.usable_slots();
            let least = least_components(problem.experts, problem.ranks.len(), copies);
            prop_assert_eq!(layer.components, least);
            prop_assert!(layer.after <= layer.bound + 1e-6, "{:?}", layer);
        }
        prop_assert_eq!(report.copies_moved, placement.copies_moved(None));
        let again = first(&problem);
        prop_assert_eq!(
            serde_json::to_string(&placement).unwrap(),
            serde_json::to_string(&again).unwrap()
        );
    }

    #[test]
    fn solving_twice_is_solving_once((problem, _) in problems()) {
        let placement = first(&problem);
        let again = plan(&problem, Some(&placement), &Settings::default(), &mut History::default());
        let again = again.unwrap();
        prop_assert!(matches!(again, Decision::Keep { .. }), "{}", again.report());
    }

    #[test]
    fn drift_moves_little_and_ends((mut problem, later) in problems(), limit in 0_usize..7) {
        let settings = Settings { max_moves_per_layer: limit, ..Settings::default() };
        let mut placement = first(&problem);
        problem.demand = later;
        let mut history = History::default();
        let (mut quiet, mut rounds) = (0, 0);
        while quiet < 4 {
            rounds += 1;
            prop_assert!(rounds < 400, "still busy");
            let decision = plan(&problem, Some(&placement), &settings, &mut history).unwrap();
            let report = decision.report();
            let Some(next) = decision.placement() else {
                quiet += 1;
                continue;
            };
            quiet = 0;
            assert_sound(next, &problem, Some(&placement));
            assert_linked(next, &problem, Some(&placement));
            prop_assert_eq!(report.copies_moved, next.copies_moved(Some(&placement)));
            let most = report.layers.iter().map(|l| l.copies_moved).max().unwrap();
            prop_assert!(most <= limit);
            let to_one = next.ranks.iter().map(|r| next.diff(Some(&placement), *r).load.len());
            prop_assert_eq!(report.most_to_one_rank, to_one.max().unwrap());
            for layer in &report.layers {
                match layer.verdict {
                    // Closing a gap in cover need not gain balance.
                    Verdict::Move if closes_a_gap(layer) => {}
                    Verdict::Move => prop_assert!(layer.after > layer.best, "{:?}", layer),
                    Verdict::Reweigh => prop_assert!(layer.after > layer.before, "{:?}", layer),
                    Verdict::Keep => {
                        let at = layer.layer.index();
                        prop_assert_eq!(&next.layers[at], &placement.layers[at]);
                    }
                }
            }
            prop_assert!(next.epoch == placement.epoch.next() && next.parent == placement.epoch);
            placement = next.clone();
        }
    }

    #[test]
    fn lost_and_new_ranks_leave_nobody_without_a_home(
        (mut problem, later) in problems(),
        lose in proptest::collection::vec(any::<bool>(), 6),
        join in proptest::collection::vec(0_usize..12, 0..3),
    ) {
        let placement = first(&problem);
        problem.demand = later;
        let before = problem.ranks.len();
        let mut lose = lose.into_iter();
        problem.ranks.retain(|_| !lose.next().unwrap_or(false));
        let lost = before - problem.ranks.len();
        // Odd numbers are free, so a new rank may come between the old ones.
        problem.ranks.extend(join.iter().enumerate().map(|(i, s)| rank(i as u32 * 2 + 1, *s)));
        problem.ranks.retain(|r| r.slots > 0);
        problem.ranks.sort_by_key(|r| r.rank);
        let enough = problem.usable_slots() >= problem.experts && !problem.ranks.is_empty();
        let mut history = History::default();
        let result = plan(&problem, Some(&placement), &Settings::default(), &mut history);
        prop_assert_eq!(result.is_ok(), enough, "{:?}", result.map(|d| d.report().to_string()));
        let Ok(decision) = result else { return Ok(()) };
        let same: Vec<Rank> = problem.ranks.iter().map(|r| r.rank).collect();
        if same == placement.ranks {
            return Ok(());
        }
        let next = decision.placement().unwrap();
        let reason = if lost > 0 { Reason::Repair } else { Reason::Resize };
        prop_assert_eq!(next.reason, reason);
        assert_sound(next, &problem, Some(&placement));
        prop_assert_eq!(decision.report().copies_moved, next.copies_moved(Some(&placement)));
    }

    #[test]
    fn a_batch_keeps_its_rows_and_is_no_worse_than_even((table, rows, base) in splits()) {
        let mut splitter = Splitter::new();
        let got = splitter.split(&table, &rows, &base).unwrap().to_vec();
        for (e, rows) in rows.iter().enumerate() {
            let copies = table.copies(ExpertId(e as u32));
            let used = got[copies.clone()].iter().filter(|x| **x > 0).count();
            prop_assert_eq!(got[copies.clone()].iter().sum::<u32>(), *rows);
            if (*rows as usize) < FEW_ROWS as usize * copies.len() {
                prop_assert!(used <= rows.div_ceil(FEW_ROWS) as usize);
            }
        }
        prop_assert_eq!(&got, splitter.split(&table, &rows, &base).unwrap(), "a warm workspace");
        // Rounding adds less than a row per copy; the few-rows rule gives up levelling experts of few rows.
        let plenty = (0..rows.len()).all(|e| {
            rows[e] == 0 || rows[e] >= FEW_ROWS * table.copies(ExpertId(e as u32)).len() as u32
        });
        if plenty {
            let real: Vec<f64> = rows.iter().copied().map(f64::from).collect();
            let copies_on = loads_of(&table, |_| 1.0, &vec![0.0; base.len()]);
            let split = loads_of(&table, |copy| f64::from(got[copy]), &base);
            prop_assert!(max(&split) <= max(&even(&table, &real, &base)) + max(&copies_on));
        }
    }

    #[test]
    fn the_solved_split_is_optimal_and_certified((table, rows, _) in splits()) {
        let rows: Vec<f64> = rows.iter().copied().map(f64::from).collect();
        let none = vec![0.0; table.ranks().len()];
        let solved = solve(&table, &rows, 20_000, 1e-7);
        let best = optimum(&table, &rows);
        prop_assert!((solved.max() - best).abs() <= 1e-5 * best.max(1.0), "{} {}", solved.max(), best);
        prop_assert!(solved.certificate <= best * (1.0 + 1e-9) && solved.certificate >= best * (1.0 - 1e-5));
        prop_assert!(solved.max() <= max(&even(&table, &rows, &none)) * (1.0 + 1e-9));
        prop_assert!((solved.loads.iter().sum::<f64>() - rows.iter().sum::<f64>()).abs() < 1e-6);
        // Valid for loads that are anything but converged, and above what any placement could reach.
        let crude = even(&table, &rows, &none);
        prop_assert!(certificate(&table, &rows, &crude).bound <= best * (1.0 + 1e-9));
        let copies = table.len();
        prop_assert!(any_placement(&rows, table.ranks().len(), copies) <= best * (1.0 + 1e-6));
        prop_assert!(balance(&solved.loads) <= 1.0);
    }
}
