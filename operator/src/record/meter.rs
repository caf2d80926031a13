//! What ranks say they computed and loaded, by placement. Pure.

use std::collections::{BTreeMap, VecDeque};

use foregate_api::ids::{Epoch, Rank};
use foregate_api::load::LoadWindow;

/// Whole windows of a rank on a placement that are remembered.
const WINDOWS: usize = 3;
/// Placements of a rank that are remembered.
const PLACEMENTS: usize = 3;

/// A rank on a placement.
#[derive(Debug)]
struct Stay {
    epoch: Epoch,
    /// Experts that it had loaded since its start at the end of its first window here, and at that of the stay before.
    loaded: u64,
    loaded_before: u64,
    /// Rows by layer of its first window, part of which ran on the placement before.
    mixed: Vec<u64>,
    /// Rows by layer of its last windows that ran wholly here, oldest first.
    whole: VecDeque<Vec<u64>>,
    stall_us: u64,
}

#[derive(Debug, Default)]
struct Track {
    sequence: u64,
    stays: VecDeque<Stay>,
}

/// The last windows of all ranks.
#[derive(Debug, Default)]
pub(super) struct Meter {
    ranks: BTreeMap<Rank, Track>,
}

/// Balance on a placement.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Seen {
    /// Mean over maximum of the rows that ranks computed, mean over layers with rows.
    pub(super) balance: f64,
    /// Whole windows of each rank; 0: only windows that ran in part on the placement before.
    pub(super) windows: u32,
}

impl Meter {
    /// Takes in a window; false if it was there already.
    pub(super) fn observe(&mut self, window: &LoadWindow) -> bool {
        let track = self.ranks.entry(window.rank).or_default();
        if track.sequence == window.sequence {
            return false;
        }
        track.sequence = window.sequence;
        let stall_us = window.engine.switch_stall_us;
        if let Some(stay) = track
            .stays
            .back_mut()
            .filter(|stay| stay.epoch == window.epoch)
        {
            if stay.whole.len() == WINDOWS {
                stay.whole.pop_front();
            }
            stay.whole.push_back(window.served.clone());
            stay.stall_us = stall_us;
            return true;
        }
        let before = track.stays.back().map_or(0, |stay| stay.loaded);
        if track.stays.len() == PLACEMENTS {
            track.stays.pop_front();
        }
        track.stays.push_back(Stay {
            epoch: window.epoch,
            loaded: window.engine.experts_loaded,
            loaded_before: before,
            mixed: window.served.clone(),
            whole: VecDeque::new(),
            stall_us,
        });
        true
    }

    /// Whether every rank has told of a window on this placement or a later one.
    pub(super) fn told(&self, ranks: &[Rank], epoch: Epoch) -> bool {
        let newest = |rank: &Rank| self.ranks.get(rank)?.stays.back().map(|stay| stay.epoch);
        ranks
            .iter()
            .all(|rank| newest(rank).is_some_and(|newest| newest >= epoch))
    }

    /// Whole windows on a placement that every one of its ranks has told of.
    pub(super) fn windows(&self, ranks: &[Rank], epoch: Epoch) -> u32 {
        let of = |rank: &Rank| self.stay(*rank, epoch).map_or(0, |stay| stay.whole.len());
        u32::try_from(ranks.iter().map(of).min().unwrap_or(0)).unwrap_or(u32::MAX)
    }

    /// What the ranks computed on a placement. `None` if one of them has not told, or nothing was computed.
    pub(super) fn balance(&self, ranks: &[Rank], epoch: Epoch) -> Option<Seen> {
        let windows = self.windows(ranks, epoch);
        // As many of each rank, the newest.
        let rows = |rank: &Rank| {
            let stay = self.stay(*rank, epoch)?;
            Some(if windows == 0 {
                sum(stay.whole.iter().chain([&stay.mixed]))
            } else {
                sum(stay.whole.iter().rev().take(windows as usize))
            })
        };
        let rows: Vec<Vec<u64>> = ranks.iter().map(rows).collect::<Option<_>>()?;
        let layers = rows.iter().map(Vec::len).max().unwrap_or(0);
        let balances: Vec<f64> = (0..layers)
            .filter_map(|layer| {
                let of = |rows: &Vec<u64>| rows.get(layer).copied().unwrap_or(0);
                let most = rows.iter().map(of).max().unwrap_or(0);
                let all: u64 = rows.iter().map(of).fold(0, u64::saturating_add);
                (most > 0).then(|| all as f64 / rows.len() as f64 / most as f64)
            })
            .collect();
        let balance = balances.iter().sum::<f64>() / balances.len() as f64;
        (!balances.is_empty()).then_some(Seen { balance, windows })
    }

    /// Longest delay of a step by the switch to a placement, over the ranks that computed on it. `None` if none did.
    pub(super) fn stall_us(&self, ranks: &[Rank], epoch: Epoch) -> Option<u64> {
        let computed = |stay: &&Stay| stay.whole.iter().flatten().any(|rows| *rows > 0);
        let stays = ranks.iter().filter_map(|rank| self.stay(*rank, epoch));
        stays.filter(computed).map(|stay| stay.stall_us).max()
    }

    /// Experts that the ranks loaded to come to a placement. A rank has loaded them before it switches, so they are those
    /// between its first windows on this placement and on the one before. `None` if a rank has not told.
    pub(super) fn loaded(&self, ranks: &[Rank], epoch: Epoch) -> Option<u64> {
        let of = |rank: &Rank| {
            let stay = self.stay(*rank, epoch)?;
            // A rank that started anew counts from its start.
            Some(
                stay.loaded
                    .checked_sub(stay.loaded_before)
                    .unwrap_or(stay.loaded),
            )
        };
        ranks.iter().map(of).sum()
    }

    fn stay(&self, rank: Rank, epoch: Epoch) -> Option<&Stay> {
        self.ranks
            .get(&rank)?
            .stays
            .iter()
            .find(|stay| stay.epoch == epoch)
    }
}

fn sum<'a>(windows: impl Iterator<Item = &'a Vec<u64>>) -> Vec<u64> {
    let mut total: Vec<u64> = Vec::new();
    for window in windows {
        total.resize(total.len().max(window.len()), 0);
        for (sum, rows) in total.iter_mut().zip(window) {
            *sum = sum.saturating_add(*rows);
        }
    }
    total
}

#[cfg(test)]
mod tests {
    use foregate_api::load::EngineLoad;

    use super::*;

    fn window(rank: u32, epoch: u64, sequence: u64, served: u64, loaded: u64) -> LoadWindow {
        LoadWindow {
            rank: Rank(rank),
            epoch: Epoch(epoch),
            sequence,
            span_ms: 1000,
            gate: Vec::new(),
            served: vec![served],
            engine: EngineLoad {
                experts_loaded: loaded,
                switch_stall_us: 10 * u64::from(rank),
                ..EngineLoad::default()
            },
        }
    }

    #[test]
    fn whole_windows_of_the_epoch_count_before_mixed_ones() {
        let ranks = [Rank(0), Rank(1)];
        let mut meter = Meter::default();
        for (rank, rows) in [(0, 10), (1, 30)] {
            assert!(meter.observe(&window(rank, 1, 1, 40, 4)));
            assert!(meter.observe(&window(rank, 1, 2, rows, 4)));
            assert!(!meter.observe(&window(rank, 1, 2, 500, 4)), "seen");
        }
        let seen = |balance, windows| Some(Seen { balance, windows });
        assert_eq!(meter.balance(&ranks, Epoch(1)), seen(20.0 / 30.0, 1));
        assert_eq!(meter.loaded(&ranks, Epoch(1)), Some(8));
        assert!(meter.observe(&window(0, 2, 3, 10, 5)));
        assert!(meter.observe(&window(0, 2, 4, 20, 9)));
        assert_eq!(
            meter.balance(&ranks, Epoch(2)),
            None,
            "rank 1 has not switched"
        );
        assert!(!meter.told(&ranks, Epoch(2)));
        assert!(meter.observe(&window(1, 2, 1, 30, 3)));
        assert_eq!(
            meter.balance(&ranks, Epoch(2)),
            seen(1.0, 0),
            "with mixed windows"
        );
        assert!(meter.told(&ranks, Epoch(2)));
        assert!(meter.observe(&window(1, 2, 2, 10, 3)));
        assert_eq!(meter.balance(&ranks, Epoch(2)), seen(0.75, 1));
        // Rank 1 started anew; what rank 0 loaded after its first window is of the next placement.
        assert_eq!(meter.loaded(&ranks, Epoch(2)), Some(1 + 3));
        assert_eq!(meter.stall_us(&ranks, Epoch(2)), Some(10));
        assert_eq!(
            meter.balance(&ranks, Epoch(1)),
            seen(20.0 / 30.0, 1),
            "remembered"
        );
    }

    #[test]
    fn a_cluster_without_rows_has_no_balance() {
        let mut meter = Meter::default();
        for sequence in 1..5 {
            meter.observe(&window(0, 1, sequence, 0, 0));
        }
        assert_eq!(meter.windows(&[Rank(0)], Epoch(1)), 3);
        assert_eq!(meter.balance(&[Rank(0)], Epoch(1)), None);
        assert_eq!(meter.stall_us(&[Rank(0)], Epoch(1)), None);
    }
}
