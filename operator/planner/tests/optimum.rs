//! The solved split against a linear program, on layers too wide to try all sets of ranks.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod hosts;

use foregate_api::ids::ExpertId;
use foregate_planner::bound::certificate;
use foregate_planner::split::{SplitTable, solve};
use microlp::{ComparisonOp, LinearExpr, OptimizationDirection, Problem, Variable};
use proptest::prelude::*;

use hosts::table;

/// The least maximum load: minimise T, where the copies of each expert carry all of its rows and no rank carries more
/// than T.
fn least_maximum(table: &SplitTable, rows: &[f64]) -> f64 {
    let mut problem = Problem::new(OptimizationDirection::Minimize);
    let most = problem.add_var(1.0, (0.0, f64::INFINITY));
    let mut on: Vec<Vec<Variable>> = vec![Vec::new(); table.ranks().len()];
    for (e, rows) in rows.iter().enumerate() {
        let mut all = LinearExpr::empty();
        for copy in table.copies(ExpertId(e as u32)) {
            let part = problem.add_var(0.0, (0.0, f64::INFINITY));
            all.add(part, 1.0);
            on[table.host(copy).unwrap()].push(part);
        }
        problem.add_constraint(all, ComparisonOp::Eq, *rows);
    }
    for parts in on {
        let mut over = LinearExpr::empty();
        parts.into_iter().for_each(|part| over.add(part, 1.0));
        over.add(most, -1.0);
        problem.add_constraint(over, ComparisonOp::Le, 0.0);
    }
    let solution = problem.solve().unwrap().into_solution().unwrap();
    solution.objective()
}

prop_compose! {
    fn layers()(ranks in 2_u32..24, experts in 1_usize..64)(
        hosts in proptest::collection::vec(
            proptest::collection::btree_set(0..ranks, 1..=3.min(ranks as usize)), experts),
        rows in proptest::collection::vec(prop_oneof![Just(0_u32), 1_u32..9, 1_u32..400], experts),
        ranks in Just(ranks),
    ) -> (SplitTable, Vec<f64>) {
        let hosts: Vec<Vec<u32>> = hosts.into_iter().map(|h| h.into_iter().collect()).collect();
        (table(&hosts, ranks), rows.into_iter().map(f64::from).collect())
    }
}

#[test]
fn the_linear_program_by_hand() {
    // Expert 0 on ranks 0 and 1, expert 1 on 1 alone: (10 + 4) / 2, then 4 + 10 > 7 on rank 1 alone.
    let table = table(&[vec![0, 1], vec![1]], 2);
    assert!((least_maximum(&table, &[10.0, 4.0]) - 7.0).abs() < 1e-6);
    assert!((least_maximum(&table, &[4.0, 10.0]) - 10.0).abs() < 1e-6);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn the_solved_split_reaches_the_linear_program((table, rows) in layers()) {
        let best = least_maximum(&table, &rows);
        let solved = solve(&table, &rows, 20_000, 1e-6);
        let near = |x: f64| (x - best).abs() <= 1e-4 * best.max(1.0);
        prop_assert!(near(solved.max()), "{} {best}", solved.max());
        prop_assert!(near(solved.certificate), "{} {best}", solved.certificate);
        // What the certificate says of any loads is below what any split can do.
        let bound = certificate(&table, &rows, &vec![0.0; table.ranks().len()]).bound;
        prop_assert!(bound <= best * (1.0 + 1e-6) + 1e-6, "{bound} {best}");
    }
}
