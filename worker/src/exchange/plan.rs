//! From (row, expert) to (rank, row of a call): one batch's routes.
//!
//! The split over an expert's copies is solved for this batch (`foregate_planner::split`) over the loads
//! that peers last reported. A row goes to a rank once per call, however many of its experts live there.

use std::collections::BTreeSet;

use foregate_api::ids::{ExpertId, Rank};
use foregate_models::experts::ExpertBatch;
use foregate_planner::split::{SplitTable, Splitter};
use foregate_wire::frame::Route;

/// Rows for one rank, as one call.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Shipment {
    /// Who runs them.
    pub rank: Rank,
    /// Rows of the batch, ascending: row `i` of the call is row `rows[i]` of the batch.
    pub rows: Vec<u32>,
    /// What to run; `row` counts rows of the call.
    pub routes: Vec<Route>,
    /// For each route, the (row, choice) pair of the batch: `row · top_k + choice`.
    pub pairs: Vec<u32>,
}

impl Shipment {
    fn new(rank: Rank) -> Self {
        Self {
            rank,
            rows: Vec::new(),
            routes: Vec::new(),
            pairs: Vec::new(),
        }
    }

    /// Adds a pair; pairs come in ascending order, so a row that was added before is the last one.
    fn add(&mut self, row: u32, expert: ExpertId, pair: u32) {
        if self.rows.last() != Some(&row) {
            self.rows.push(row);
        }
        self.routes.push(Route {
            row: count(self.rows.len() - 1),
            expert,
        });
        self.pairs.push(pair);
    }
}

/// Shipments under construction, at most `most` routes in each.
#[derive(Debug)]
struct Packer {
    most: usize,
    open: Vec<Option<Shipment>>,
    done: Vec<Shipment>,
}

impl Packer {
    fn new(ranks: usize, most: usize) -> Self {
        Self {
            most: most.max(1),
            open: (0..ranks).map(|_| None).collect(),
            done: Vec::new(),
        }
    }

    fn add(&mut self, host: usize, rank: Rank, row: u32, expert: ExpertId, pair: u32) {
        let Some(slot) = self.open.get_mut(host) else {
            return;
        };
        let shipment = slot.get_or_insert_with(|| Shipment::new(rank));
        shipment.add(row, expert, pair);
        if shipment.routes.len() >= self.most {
            self.done.extend(slot.take());
        }
    }

    fn finish(mut self) -> Vec<Shipment> {
        self.done.extend(self.open.into_iter().flatten());
        self.done
    }
}

/// What to send where, and what cannot be sent anywhere.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// One or more calls per rank, the local rank's among them.
    pub shipments: Vec<Shipment>,
    /// Pairs of experts without a copy in this placement.
    pub homeless: Vec<u32>,
}

/// Plans batches; keeps the buffers of the split.
#[derive(Debug, Default)]
pub struct Planner {
    splitter: Splitter,
    counts: Vec<u32>,
}

impl Planner {
    /// Plans one layer's batch. `base[g]` is the load of the table's g-th rank in rows, not finite for a rank
    /// to avoid; a call has at most `most` routes.
    ///
    /// # Errors
    /// When table and base do not belong together.
    pub fn plan(
        &mut self,
        table: &SplitTable,
        batch: &ExpertBatch<'_>,
        base: &[f64],
        most: usize,
    ) -> Result<Plan, foregate_planner::split::SplitError> {
        let mut homeless = Vec::new();
        self.count(table, batch, &mut homeless);
        let mut quota: Vec<u32> = self.splitter.split(table, &self.counts, base)?.to_vec();
        let mut packer = Packer::new(table.ranks().len(), most);
        for (pair, row, expert) in live_pairs(batch) {
            let mut copies = table.copies(expert);
            let copy = copies.find(|copy| quota.get(*copy).is_some_and(|left| *left > 0));
            let Some(copy) = copy else { continue };
            quota[copy] -= 1;
            if let (Some(host), Some(rank)) = (table.host(copy), table.rank(copy)) {
                packer.add(host, rank, row, expert, pair);
            }
        }
        Ok(Plan {
            shipments: packer.finish(),
            homeless,
        })
    }

    fn count(&mut self, table: &SplitTable, batch: &ExpertBatch<'_>, homeless: &mut Vec<u32>) {
        self.counts.clear();
        self.counts.resize(table.experts(), 0);
        for (pair, _, expert) in live_pairs(batch) {
            if table.copies(expert).is_empty() {
                homeless.push(pair);
            } else if let Some(rows) = self.counts.get_mut(expert.index()) {
                *rows += 1;
            }
        }
    }
}

/// Plans some pairs anew, each on the first copy whose rank is usable. Pairs without one are left out.
#[must_use]
pub fn replan(
    table: &SplitTable,
    batch: &ExpertBatch<'_>,
    pairs: &[u32],
    unusable: &dyn Fn(Rank) -> bool,
    most: usize,
) -> Vec<Shipment> {
    let mut packer = Packer::new(table.ranks().len(), most);
    // Ascending, so that pairs of one row stand together.
    let pairs: BTreeSet<u32> = pairs.iter().copied().collect();
    for pair in pairs {
        let Some(expert) = batch.experts.get(pair as usize).map(|e| ExpertId(*e)) else {
            continue;
        };
        let copy = table
            .copies(expert)
            .find(|copy| table.rank(*copy).is_some_and(|rank| !unusable(rank)));
        if let Some(copy) = copy
            && let (Some(host), Some(rank)) = (table.host(copy), table.rank(copy))
        {
            let row = pair / count(batch.top_k.max(1));
            packer.add(host, rank, row, expert, pair);
        }
    }
    packer.finish()
}

/// `(pair, row, expert)` of every row that is not dead.
fn live_pairs<'a>(
    batch: &'a ExpertBatch<'_>,
) -> impl Iterator<Item = (u32, u32, ExpertId)> + 'a {
    let top_k = count(batch.top_k.max(1));
    batch
        .experts
        .iter()
        .zip(0_u32..)
        .map(move |(expert, pair)| (pair, pair / top_k, ExpertId(*expert)))
        .filter(|(_, row, _)| !batch.dead.get(*row as usize).copied().unwrap_or(false))
}

/// Rows and pairs of a step fit 32 bits: a batch that large has no memory to stand in.
const fn count(number: usize) -> u32 {
    number as u32
}

#[cfg(test)]
mod tests;
