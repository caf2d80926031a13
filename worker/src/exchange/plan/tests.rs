use std::collections::BTreeMap;

use foregate_api::ids::{Epoch, LayerId};
use foregate_api::placement::{LayerPlacement, Placement, Reason};
use proptest::prelude::*;

use super::*;

/// A table over ranks 0.. where `slots[r]` are the experts of rank `r`.
fn table(experts: usize, slots: &[&[u32]]) -> SplitTable {
    let ranks: Vec<Rank> = (0_u32..).zip(slots).map(|(rank, _)| Rank(rank)).collect();
    let slots = slots
        .iter()
        .map(|held| held.iter().map(|e| ExpertId(*e)).collect())
        .collect();
    let layers = vec![LayerPlacement::from_slots(&ranks, slots, experts)];
    let placement = Placement {
        epoch: Epoch(1),
        parent: Epoch(0),
        reason: Reason::Initial,
        ranks,
        layers,
        balance_before: 1.0,
        balance_after: 1.0,
    };
    SplitTable::new(&placement, LayerId(0)).unwrap()
}

fn batch<'a>(experts: &'a [u32], top_k: usize, dead: &'a [bool]) -> ExpertBatch<'a> {
    ExpertBatch {
        layer: LayerId(0),
        input: &[],
        hidden: 0,
        experts,
        weights: &[],
        top_k,
        dead,
    }
}

#[test]
fn a_row_goes_to_a_rank_once() {
    let table = table(4, &[&[0, 1], &[2, 3]]);
    let experts = [0, 1, 1, 2, 2, 3];
    let batch = batch(&experts, 2, &[false; 3]);
    let plan = Planner::default()
        .plan(&table, &batch, &[0.0; 2], 100)
        .unwrap();
    let rows: BTreeMap<Rank, Vec<u32>> = plan
        .shipments
        .iter()
        .map(|s| (s.rank, s.rows.clone()))
        .collect();
    assert_eq!(
        rows,
        BTreeMap::from([(Rank(0), vec![0, 1]), (Rank(1), vec![1, 2])])
    );
    assert_eq!(plan.shipments[0].pairs, [0, 1, 2]);
    assert!(plan.homeless.is_empty());
}

#[test]
fn dead_rows_are_not_sent_and_homeless_pairs_are_named() {
    let table = table(3, &[&[0], &[1]]);
    let experts = [0, 1, 0, 2, 1, 2];
    let batch = batch(&experts, 2, &[true, false, false]);
    let plan = Planner::default()
        .plan(&table, &batch, &[0.0; 2], 100)
        .unwrap();
    assert_eq!(plan.homeless, [3, 5]);
    let pairs: Vec<u32> = plan
        .shipments
        .iter()
        .flat_map(|s| s.pairs.clone())
        .collect();
    assert_eq!(pairs, [2, 4]);
}

#[test]
fn a_rank_that_is_down_gets_only_what_lives_nowhere_else() {
    let table = table(2, &[&[0], &[0, 1]]);
    let experts = [0, 1, 0, 1];
    let batch = batch(&experts, 2, &[false; 2]);
    let base = [0.0, f64::INFINITY];
    let plan = Planner::default().plan(&table, &batch, &base, 100).unwrap();
    let pairs: BTreeMap<Rank, Vec<u32>> = plan
        .shipments
        .iter()
        .map(|s| (s.rank, s.pairs.clone()))
        .collect();
    assert_eq!(
        pairs,
        BTreeMap::from([(Rank(0), vec![0, 2]), (Rank(1), vec![1, 3])])
    );
}

#[test]
fn replanning_uses_the_other_copy_or_none() {
    let table = table(2, &[&[0], &[0, 1]]);
    let experts = [0, 1];
    let batch = batch(&experts, 2, &[false]);
    let again = replan(&table, &batch, &[1, 0], &|rank| rank == Rank(1), 100);
    assert_eq!(again.len(), 1);
    assert_eq!((again[0].rank, &again[0].pairs), (Rank(0), &vec![0]));
}

proptest! {
    #[test]
    fn every_live_pair_travels_exactly_once_to_a_holder(
        chosen in proptest::collection::vec((0_u32..4, 4_u32..8, any::<bool>()), 0..60),
        base in proptest::collection::vec(0.0_f64..50.0, 3),
        most in 1_usize..20,
    ) {
        let slots: [&[u32]; 3] = [&[0, 1, 2, 3, 4], &[2, 3, 4, 5, 6], &[0, 5, 6, 7]];
        let table = table(8, &slots);
        let experts: Vec<u32> = chosen.iter().flat_map(|(a, b, _)| [*a, *b]).collect();
        let dead: Vec<bool> = chosen.iter().map(|(_, _, dead)| *dead).collect();
        let batch = batch(&experts, 2, &dead);
        let plan = Planner::default().plan(&table, &batch, &base, most).unwrap();
        let mut seen = Vec::new();
        for shipment in &plan.shipments {
            prop_assert!(shipment.routes.len() <= most);
            prop_assert!(shipment.rows.is_sorted_by(|a, b| a < b));
            for (route, pair) in shipment.routes.iter().zip(&shipment.pairs) {
                prop_assert_eq!(shipment.rows[route.row as usize], pair / 2);
                prop_assert_eq!(route.expert, ExpertId(experts[*pair as usize]));
                prop_assert!(slots[shipment.rank.index()].contains(&route.expert.0));
                seen.push(*pair);
            }
        }
        seen.sort_unstable();
        let live: Vec<u32> = (0_u32..).zip(&experts)
            .map(|(pair, _)| pair)
            .filter(|pair| !dead[*pair as usize / 2])
            .collect();
        prop_assert_eq!(seen, live);
    }
}
