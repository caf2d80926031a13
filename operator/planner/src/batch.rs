//! The split of a batch: whole rows of one sender, over the loads that its peers last reported.

use foregate_api::ids::ExpertId;

use crate::pour::pour;
use crate::table::SplitTable;

/// Sweeps of the per-batch split: within a point of the optimum, and never a data-dependent number.
pub const BATCH_SWEEPS: usize = 8;
/// Rows per copy below which fewer copies are used: an activated copy costs its weights' bytes whatever its rows.
pub const FEW_ROWS: u32 = 8;

/// Why a batch could not be split; the caller passed arrays of another layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SplitError {
    /// `rows` has another length than the layer has experts.
    #[error("rows of {found} experts for a layer of {expected}")]
    Experts {
        /// Length of `rows`.
        found: usize,
        /// Experts of the layer.
        expected: usize,
    },
    /// `base` has another length than the placement has ranks.
    #[error("base loads of {found} ranks for a placement over {expected}")]
    Ranks {
        /// Length of `base`.
        found: usize,
        /// Ranks of the placement.
        expected: usize,
    },
    /// An expert with rows has no copy.
    #[error("expert {expert} has rows and no copy in this placement")]
    NoCopy {
        /// The expert.
        expert: ExpertId,
    },
}

/// An expert whose rows go to several copies in this batch.
#[derive(Debug, Clone, Copy)]
struct Item {
    rows: u32,
    start: usize,
    end: usize,
}

/// Splits batches; keeps its buffers between calls, so that a warm call does not allocate.
#[derive(Debug, Default)]
pub struct Splitter {
    loads: Vec<f64>,
    items: Vec<Item>,
    // Copies in play of all items, back to back: dense rank, copy index, rows.
    hosts: Vec<u32>,
    copies: Vec<u32>,
    flow: Vec<f64>,
    few: Vec<u32>,
    level: Vec<f64>,
    rank_order: Vec<(f64, u32)>,
    rows: Vec<u32>,
}

impl Splitter {
    /// An empty workspace; it grows to the largest layer it sees.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Splits whole rows over copies: the answer has one number per copy index, and an expert's numbers sum to
    /// its rows.
    ///
    /// `rows[e]`: rows of this sender for expert `e`. `base[g]`: load of the g-th rank of the table without
    /// these rows, in rows. A rank whose base is not finite is avoided: it gets rows only of experts that live
    /// nowhere else. Starts from the published shares; the number of sweeps is fixed ([`BATCH_SWEEPS`]). An
    /// expert with fewer than [`FEW_ROWS`] rows per copy uses ⌈rows/[`FEW_ROWS`]⌉ of them, those of the lowest
    /// level. Rounding is by largest remainder, ties to the lower rank.
    ///
    /// # Errors
    /// If the arrays are of another layer's size, or an expert with rows has no copy.
    pub fn split(
        &mut self,
        table: &SplitTable,
        rows: &[u32],
        base: &[f64],
    ) -> Result<&[u32], SplitError> {
        if rows.len() != table.experts() {
            return Err(SplitError::Experts {
                found: rows.len(),
                expected: table.experts(),
            });
        }
        if base.len() != table.ranks.len() {
            return Err(SplitError::Ranks {
                found: base.len(),
                expected: table.ranks.len(),
            });
        }
        self.start(table, base);
        for (e, count) in rows.iter().enumerate() {
            if *count > 0 {
                self.admit(table, e, *count, base)?;
            }
        }
        for at in 0..self.few.len() {
            let expert = self.few[at] as usize;
            self.admit_few(table, expert, rows[expert], base);
        }
        self.sweep();
        self.round();
        Ok(&self.rows)
    }

    fn start(&mut self, table: &SplitTable, base: &[f64]) {
        self.loads.clear();
        let finite = |x: &f64| if x.is_finite() { *x } else { 0.0 };
        self.loads.extend(base.iter().map(finite));
        self.items.clear();
        self.hosts.clear();
        self.copies.clear();
        self.flow.clear();
        self.few.clear();
        self.rows.clear();
        self.rows.resize(table.len(), 0);
    }

    /// Enters one expert's rows at its published shares; experts with few rows wait until the levels are known.
    fn admit(
        &mut self,
        table: &SplitTable,
        expert: usize,
        rows: u32,
        base: &[f64],
    ) -> Result<(), SplitError> {
        let span = table.span(expert);
        if span.is_empty() {
            return Err(SplitError::NoCopy {
                expert: ExpertId(expert as u32),
            });
        }
        let copies = span.len();
        if copies > 1 && u64::from(rows) < u64::from(FEW_ROWS) * copies as u64 {
            self.few.push(expert as u32);
            return Ok(());
        }
        let start = self.hosts.len();
        let avoid = span
            .clone()
            .any(|c| base[table.hosts[c] as usize].is_finite());
        let mut total = 0.0;
        for copy in span {
            let host = table.hosts[copy];
            if avoid && !base[host as usize].is_finite() {
                continue;
            }
            self.hosts.push(host);
            self.copies.push(copy as u32);
            let share = f64::from(table.shares[copy]).max(0.0);
            self.flow.push(share);
            total += share;
        }
        self.enter(rows, start, total);
        Ok(())
    }

    /// Turns the shares pushed since `start` into rows and adds them to the loads.
    fn enter(&mut self, rows: u32, start: usize, total: f64) {
        let end = self.hosts.len();
        if end - start == 1 {
            // Nothing to choose: the rows are final, the load is part of everybody else's base.
            self.loads[self.hosts[start] as usize] += f64::from(rows);
            self.rows[self.copies[start] as usize] = rows;
            self.hosts.truncate(start);
            self.copies.truncate(start);
            self.flow.truncate(start);
            return;
        }
        let even = 1.0 / (end - start) as f64;
        for at in start..end {
            let share = if total > 0.0 {
                self.flow[at] / total
            } else {
                even
            };
            self.flow[at] = share * f64::from(rows);
            self.loads[self.hosts[at] as usize] += self.flow[at];
        }
        self.items.push(Item { rows, start, end });
    }

    /// Enters an expert with few rows on as many copies as they fill, those of the lowest level.
    fn admit_few(&mut self, table: &SplitTable, expert: usize, rows: u32, base: &[f64]) {
        let span = table.span(expert);
        let avoid = span
            .clone()
            .any(|c| base[table.hosts[c] as usize].is_finite());
        self.rank_order.clear();
        for copy in span {
            let host = table.hosts[copy] as usize;
            if !avoid || base[host].is_finite() {
                self.rank_order.push((self.loads[host], copy as u32));
            }
        }
        // Copy indices ascend by rank, so a tie goes to the lower rank.
        self.rank_order
            .sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        self.rank_order.truncate(rows.div_ceil(FEW_ROWS) as usize);
        self.rank_order.sort_unstable_by_key(|(_, copy)| *copy);
        let start = self.hosts.len();
        for (_, copy) in &self.rank_order {
            self.hosts.push(table.hosts[*copy as usize]);
            self.copies.push(*copy);
            self.flow.push(0.0);
        }
        self.enter(rows, start, 0.0);
    }

    fn sweep(&mut self) {
        for _ in 0..BATCH_SWEEPS {
            for item in &self.items {
                let (hosts, flow) = (
                    &self.hosts[item.start..item.end],
                    &mut self.flow[item.start..item.end],
                );
                let rows = f64::from(item.rows);
                pour(&mut self.loads, hosts, flow, rows, 1.0, &mut self.level);
            }
        }
    }

    fn round(&mut self) {
        for item in &self.items {
            self.rank_order.clear();
            let mut left = item.rows;
            for at in item.start..item.end {
                let whole = (self.flow[at].floor() as u32).min(left);
                left -= whole;
                let copy = self.copies[at];
                self.rows[copy as usize] = whole;
                self.rank_order
                    .push((self.flow[at] - f64::from(whole), copy));
            }
            self.rank_order
                .sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            for (_, copy) in self.rank_order.iter().cycle().take(left as usize) {
                self.rows[*copy as usize] += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use foregate_api::ids::Rank;

    use super::*;

    fn table(ranks: u32, hosts: &[&[usize]]) -> SplitTable {
        let ranks: Vec<Rank> = (0..ranks).map(Rank).collect();
        SplitTable::even(&ranks, hosts.iter().copied())
    }

    #[test]
    fn rows_flow_to_the_lower_level() {
        // Expert 0 lives on ranks 0 and 1, experts 1 and 2 alone on them.
        let t = table(2, &[&[0, 1], &[0], &[1]]);
        let mut splitter = Splitter::new();
        assert_eq!(
            splitter.split(&t, &[100, 80, 20], &[0.0, 0.0]).unwrap(),
            [20, 80, 80, 20]
        );
        assert_eq!(
            splitter.split(&t, &[100, 0, 0], &[60.0, 0.0]).unwrap(),
            [20, 80, 0, 0]
        );
    }

    #[test]
    fn few_rows_use_few_copies() {
        let t = table(4, &[&[0, 1, 2, 3]]);
        let mut splitter = Splitter::new();
        // 8 rows fill one copy: the one with the least load; 9 rows fill two.
        assert_eq!(
            splitter.split(&t, &[8], &[3.0, 2.0, 1.0, 4.0]).unwrap(),
            [0, 0, 8, 0]
        );
        assert_eq!(splitter.split(&t, &[9], &[0.0; 4]).unwrap(), [5, 4, 0, 0]);
        assert_eq!(splitter.split(&t, &[32], &[0.0; 4]).unwrap(), [8, 8, 8, 8]);
    }

    #[test]
    fn an_avoided_rank_gets_only_what_lives_nowhere_else() {
        let t = table(2, &[&[0, 1], &[1]]);
        let mut splitter = Splitter::new();
        let base = [0.0, f64::INFINITY];
        assert_eq!(splitter.split(&t, &[100, 5], &base).unwrap(), [100, 0, 5]);
        assert_eq!(splitter.split(&t, &[3, 0], &base).unwrap(), [3, 0, 0]);
        assert_eq!(
            splitter.split(&t, &[40, 0], &[f64::NAN; 2]).unwrap(),
            [20, 20, 0]
        );
    }

    #[test]
    fn arrays_of_another_layer_are_refused() {
        let t = table(2, &[&[0, 1], &[]]);
        let mut splitter = Splitter::new();
        assert_eq!(
            splitter.split(&t, &[1], &[0.0; 2]),
            Err(SplitError::Experts {
                found: 1,
                expected: 2
            })
        );
        assert_eq!(
            splitter.split(&t, &[1, 0], &[0.0]),
            Err(SplitError::Ranks {
                found: 1,
                expected: 2
            })
        );
        assert_eq!(
            splitter.split(&t, &[1, 1], &[0.0; 2]),
            Err(SplitError::NoCopy {
                expert: ExpertId(1)
            })
        );
    }
}
