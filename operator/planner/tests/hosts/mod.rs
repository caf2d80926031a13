//! A layer as the ranks that each of its experts is on.

use foregate_api::ids::{Epoch, ExpertId, LayerId, Rank};
use foregate_api::placement::{LayerPlacement, Placement, Reason};
use foregate_planner::split::SplitTable;

/// The table of a layer where expert e lives on `hosts[e]`.
pub(crate) fn table(hosts: &[Vec<u32>], ranks: u32) -> SplitTable {
    let ranks: Vec<Rank> = (0..ranks).map(Rank).collect();
    let slots = ranks.iter().map(|rank| {
        let on = hosts.iter().enumerate();
        let held = on.filter(|(_, on)| on.contains(&rank.0));
        held.map(|(e, _)| ExpertId(e as u32)).collect()
    });
    let layer = LayerPlacement::from_slots(&ranks, slots.collect(), hosts.len());
    let placement = Placement {
        epoch: Epoch(1),
        parent: Epoch(0),
        reason: Reason::Initial,
        ranks,
        layers: vec![layer],
        balance_before: 0.0,
        balance_after: 0.0,
    };
    SplitTable::new(&placement, LayerId(0)).unwrap()
}
