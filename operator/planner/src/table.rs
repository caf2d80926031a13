//! One layer's copies in dense form: what bounds and splits are computed over.

use foregate_api::ids::{ExpertId, LayerId, Rank};
use foregate_api::placement::{LayerPlacement, Placement};

/// One layer's copies in dense form: who holds which expert, and the published shares.
///
/// A *copy index* counts the copies of expert 0, then of expert 1, …, ascending by rank within an expert.
#[derive(Debug, Clone, PartialEq)]
pub struct SplitTable {
    pub(crate) ranks: Vec<Rank>,
    /// First copy of each expert, and the number of copies.
    starts: Vec<u32>,
    /// Dense rank index of each copy.
    pub(crate) hosts: Vec<u32>,
    pub(crate) shares: Vec<f32>,
}

impl SplitTable {
    /// The table of one layer of a placement; `None` if it has no such layer or a copy lies outside its ranks.
    #[must_use]
    pub fn new(placement: &Placement, layer: LayerId) -> Option<Self> {
        Self::of(&placement.ranks, placement.layers.get(layer.index())?)
    }

    pub(crate) fn of(ranks: &[Rank], layer: &LayerPlacement) -> Option<Self> {
        let mut table = Self::empty(ranks.to_vec(), layer.copies.len());
        for copies in &layer.copies {
            for copy in copies {
                let host = ranks.binary_search(&copy.rank).ok()?;
                table.hosts.push(host as u32);
                table.shares.push(copy.share);
            }
            table.starts.push(table.hosts.len() as u32);
        }
        Some(table)
    }

    /// The table with even shares; `hosts[e]` are dense rank indices, ascending.
    pub(crate) fn even<'a>(
        ranks: &[Rank],
        hosts: impl ExactSizeIterator<Item = &'a [usize]>,
    ) -> Self {
        let mut table = Self::empty(ranks.to_vec(), hosts.len());
        for list in hosts {
            let share = 1.0 / list.len().max(1) as f32;
            for host in list {
                table.hosts.push(*host as u32);
                table.shares.push(share);
            }
            table.starts.push(table.hosts.len() as u32);
        }
        table
    }

    fn empty(ranks: Vec<Rank>, experts: usize) -> Self {
        let mut starts = Vec::with_capacity(experts + 1);
        starts.push(0);
        Self {
            ranks,
            starts,
            hosts: Vec::new(),
            shares: Vec::new(),
        }
    }

    /// Ranks of the placement, ascending; the order of `base`.
    #[must_use]
    pub fn ranks(&self) -> &[Rank] {
        &self.ranks
    }

    /// Experts of the layer; the length of `rows`.
    #[must_use]
    pub fn experts(&self) -> usize {
        self.starts.len() - 1
    }

    /// Copies of the layer; the length of a split's answer.
    #[must_use]
    pub fn len(&self) -> usize {
        self.hosts.len()
    }

    /// Whether the layer has no copies at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.hosts.is_empty()
    }

    /// Copy indices of an expert; empty for an expert outside the layer.
    #[must_use]
    pub fn copies(&self, expert: ExpertId) -> std::ops::Range<usize> {
        let at = expert.index();
        if at >= self.experts() {
            return 0..0;
        }
        self.span(at)
    }

    /// The rank that holds a copy.
    #[must_use]
    pub fn rank(&self, copy: usize) -> Option<Rank> {
        self.hosts.get(copy).map(|host| self.ranks[*host as usize])
    }

    /// The dense index (into [`Self::ranks`] and `base`) of the rank that holds a copy.
    #[must_use]
    pub fn host(&self, copy: usize) -> Option<usize> {
        self.hosts.get(copy).map(|host| *host as usize)
    }

    pub(crate) fn span(&self, expert: usize) -> std::ops::Range<usize> {
        self.starts[expert] as usize..self.starts[expert + 1] as usize
    }

    /// Load of each rank when every copy takes its published share.
    pub(crate) fn fixed_loads(&self, rows: &[f64]) -> Vec<f64> {
        let mut loads = vec![0.0; self.ranks.len()];
        for (e, rows) in rows.iter().enumerate() {
            for copy in self.span(e) {
                loads[self.hosts[copy] as usize] += rows * f64::from(self.shares[copy]);
            }
        }
        loads
    }
}
