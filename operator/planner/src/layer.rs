//! The working set of one layer: slots and hosts over dense indices, kept in step with each other.

use std::cmp::Ordering;

use foregate_api::ids::ExpertId;
use foregate_api::placement::{LayerPlacement, Placement};

use smallvec::SmallVec;

use crate::problem::Room;
use crate::redundancy;
use crate::table::SplitTable;

/// Ranks of an expert's copies, ascending: rarely more than four.
type Hosts = SmallVec<[usize; 4]>;

/// Experts on a rank: a few, so that a layer is copied without an allocation for each rank.
type Held = SmallVec<[usize; 6]>;

/// Bits of a word of [`Layer::has`].
const WORD: usize = u64::BITS as usize;

/// A slot: rank index and number of the slot there.
pub(crate) type Place = (usize, usize);

/// A change of one or two slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Operation {
    /// Two slots change places: two copies.
    Swap {
        /// One slot.
        from: Place,
        /// The other, on another rank.
        to: Place,
    },
    /// A slot with a redundant copy gets a copy of another expert: one copy.
    Overwrite {
        /// Which expert gets one more copy.
        expert: usize,
        /// Over what.
        at: Place,
    },
}

/// Which expert is in which slot. No rank holds an expert twice; a rank may have free slots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Layer {
    experts: usize,
    /// `slots[g]`: experts on rank index g.
    slots: Vec<Held>,
    /// `hosts[e]`: rank indices that hold e, ascending.
    hosts: Vec<Hosts>,
    /// A bit for each rank and expert: whether g holds e. Ranks begin at a new word.
    has: Vec<u64>,
}

impl Layer {
    pub(crate) fn empty(ranks: usize, experts: usize) -> Self {
        Self {
            experts,
            slots: vec![Held::new(); ranks],
            hosts: vec![Hosts::new(); experts],
            has: vec![0; ranks * experts.div_ceil(WORD)],
        }
    }

    pub(crate) fn from_slots(slots: &[Vec<usize>], experts: usize) -> Self {
        let mut layer = Self::empty(slots.len(), experts);
        for (g, held) in slots.iter().enumerate() {
            for e in held {
                layer.add(g, *e);
            }
        }
        layer
    }

    /// What is left of a layer of an earlier placement on the ranks of `room`: lost ranks' copies are gone, new
    /// ranks are empty, doubled or unknown experts are dropped.
    pub(crate) fn adopt(
        previous: &Placement,
        layer: usize,
        room: &Room,
        experts: usize,
    ) -> Self {
        let mut adopted = Self::empty(room.ranks.len(), experts);
        for (g, rank) in room.ranks.iter().enumerate() {
            let Ok(at) = previous.ranks.binary_search(rank) else {
                continue;
            };
            let held = previous.layers[layer]
                .slots
                .get(at)
                .map_or(&[][..], Vec::as_slice);
            for expert in held.iter().filter(|e| e.index() < experts) {
                adopted.add(g, expert.index());
            }
        }
        adopted
    }

    pub(crate) fn ranks(&self) -> usize {
        self.slots.len()
    }

    pub(crate) const fn experts(&self) -> usize {
        self.experts
    }

    pub(crate) fn slots(&self, g: usize) -> &[usize] {
        &self.slots[g]
    }

    #[cfg(test)]
    pub(crate) fn all_slots(&self) -> Vec<&[usize]> {
        self.slots.iter().map(SmallVec::as_slice).collect()
    }

    pub(crate) fn hosts(&self, e: usize) -> &[usize] {
        &self.hosts[e]
    }

    pub(crate) fn count(&self, e: usize) -> usize {
        self.hosts[e].len()
    }

    pub(crate) fn has(&self, g: usize, e: usize) -> bool {
        let (word, bit) = self.bit(g, e);
        self.has[word] & bit != 0
    }

    /// Word and bit of [`Self::has`] for e on g.
    const fn bit(&self, g: usize, e: usize) -> (usize, u64) {
        (g * self.experts.div_ceil(WORD) + e / WORD, 1 << (e % WORD))
    }

    pub(crate) fn copies(&self) -> usize {
        self.slots.iter().map(SmallVec::len).sum()
    }

    /// Puts e into a new slot of g; does nothing if g holds it.
    pub(crate) fn add(&mut self, g: usize, e: usize) {
        if !self.has(g, e) {
            self.slots[g].push(e);
            self.enter(g, e);
        }
    }

    /// Empties slot s of g.
    pub(crate) fn remove(&mut self, g: usize, s: usize) {
        let e = self.slots[g].remove(s);
        self.leave(g, e);
    }

    /// Puts e into slot s of g instead of what is there. The caller made sure that g lacks e.
    pub(crate) fn overwrite(&mut self, g: usize, s: usize, e: usize) {
        let old = std::mem::replace(&mut self.slots[g][s], e);
        self.leave(g, old);
        self.enter(g, e);
    }

    /// Exchanges slot s of g and slot t of h. The caller made sure that neither holds what it gets.
    pub(crate) fn swap(&mut self, (g, s): (usize, usize), (h, t): (usize, usize)) {
        let (e, f) = (self.slots[g][s], self.slots[h][t]);
        self.overwrite(g, s, f);
        self.overwrite(h, t, e);
    }

    pub(crate) fn apply(&mut self, op: Operation) {
        match op {
            Operation::Swap { from, to } => self.swap(from, to),
            Operation::Overwrite { expert, at } => self.overwrite(at.0, at.1, expert),
        }
    }

    fn enter(&mut self, g: usize, e: usize) {
        let (word, bit) = self.bit(g, e);
        self.has[word] |= bit;
        if let Err(at) = self.hosts[e].binary_search(&g) {
            self.hosts[e].insert(at, g);
        }
    }

    fn leave(&mut self, g: usize, e: usize) {
        let (word, bit) = self.bit(g, e);
        self.has[word] &= !bit;
        if let Ok(at) = self.hosts[e].binary_search(&g) {
            self.hosts[e].remove(at);
        }
    }

    /// Load per copy under even split; the whole load for an expert without a copy.
    pub(crate) fn per_copy(&self, w: &[f64], e: usize) -> f64 {
        w[e] / self.count(e).max(1) as f64
    }

    /// Load of each rank under even split.
    pub(crate) fn even_loads(&self, w: &[f64]) -> Vec<f64> {
        let of = |held: &Held| held.iter().map(|e| self.per_copy(w, *e)).sum();
        self.slots.iter().map(of).collect()
    }

    /// Copies here that `origin` has not: what must be loaded to go from `origin` to this.
    pub(crate) fn moved_from(&self, origin: &Self) -> usize {
        (0..self.ranks()).map(|g| self.moved_on(origin, g)).sum()
    }

    pub(crate) fn moved_on(&self, origin: &Self, g: usize) -> usize {
        self.slots[g].iter().filter(|e| !origin.has(g, **e)).count()
    }

    /// Change of [`Self::moved_from`] if slot content `old` of g is replaced by `new`.
    pub(crate) fn move_cost(origin: &Self, g: usize, old: usize, new: usize) -> isize {
        isize::from(!origin.has(g, new)) - isize::from(!origin.has(g, old))
    }

    /// Copies more than now that would differ from `origin` after an operation.
    pub(crate) fn cost(&self, origin: &Self, op: Operation) -> isize {
        match op {
            Operation::Swap { from, to } => {
                let (e, f) = (self.slots[from.0][from.1], self.slots[to.0][to.1]);
                Self::move_cost(origin, to.0, f, e) + Self::move_cost(origin, from.0, e, f)
            }
            Operation::Overwrite { expert, at } => {
                Self::move_cost(origin, at.0, self.slots[at.0][at.1], expert)
            }
        }
    }

    /// Whether an operation would leave two copies of an expert on one rank, or none of one.
    pub(crate) fn doubles(&self, op: Operation) -> bool {
        match op {
            Operation::Swap { from, to } => {
                let (e, f) = (self.slots[from.0][from.1], self.slots[to.0][to.1]);
                from.0 == to.0 || self.has(to.0, e) || self.has(from.0, f)
            }
            Operation::Overwrite { expert, at } => {
                self.has(at.0, expert) || self.count(self.slots[at.0][at.1]) < 2
            }
        }
    }

    /// Groups of ranks that hang together through experts with several copies.
    pub(crate) fn components(&self) -> usize {
        self.groups(|_, g| Some(g))
    }

    /// The same after an operation.
    pub(crate) fn components_after(&self, op: Operation) -> usize {
        match op {
            Operation::Swap { from, to } => {
                let (e, f) = (self.slots[from.0][from.1], self.slots[to.0][to.1]);
                self.groups(|x, g| {
                    Some(match g {
                        _ if x == e && g == from.0 => to.0,
                        _ if x == f && g == to.0 => from.0,
                        _ => g,
                    })
                })
            }
            Operation::Overwrite { expert, at } => {
                let f = self.slots[at.0][at.1];
                let beside = self.hosts[expert].first().map(|g| (*g, at.0));
                self.linked(|x, g| (x != f || g != at.0).then_some(g), beside)
            }
        }
    }

    fn groups(&self, host: impl Fn(usize, usize) -> Option<usize>) -> usize {
        self.linked(host, None)
    }

    /// Groups where a copy of x on g is on `host(x, g)`, with one more link.
    fn linked(
        &self,
        host: impl Fn(usize, usize) -> Option<usize>,
        link: Option<(usize, usize)>,
    ) -> usize {
        let mut parent: Vec<usize> = (0..self.ranks()).collect();
        let mut left = self.ranks();
        let mut join = |a: usize, b: usize| {
            let (a, b) = (root(&mut parent, a), root(&mut parent, b));
            if a != b {
                parent[a.max(b)] = a.min(b);
                left -= 1;
            }
        };
        for (e, hosts) in self.hosts.iter().enumerate().filter(|(_, h)| h.len() > 1) {
            let mut hosts = hosts.iter().filter_map(|g| host(e, *g));
            if let Some(first) = hosts.next() {
                hosts.for_each(|g| join(first, g));
            }
        }
        if let Some((a, b)) = link {
            join(a, b);
        }
        left
    }

    /// The least number of components that this many copies can have.
    pub(crate) fn least_components(&self) -> usize {
        redundancy::least_components(self.experts, self.ranks(), self.copies())
    }

    pub(crate) fn table(&self, room: &Room) -> SplitTable {
        SplitTable::even(&room.ranks, self.hosts.iter().map(SmallVec::as_slice))
    }

    /// The canonical form with even shares.
    pub(crate) fn placement(&self, room: &Room) -> LayerPlacement {
        let ids = |held: &Held| held.iter().map(|e| ExpertId(*e as u32)).collect();
        let slots = self.slots.iter().map(ids).collect();
        LayerPlacement::from_slots(&room.ranks, slots, self.experts)
    }
}

pub(crate) fn root(parent: &mut [usize], mut at: usize) -> usize {
    while parent[at] != at {
        parent[at] = parent[parent[at]];
        at = parent[at];
    }
    at
}

/// Least value first, then the lower key: every choice between candidates is made with this order.
pub(crate) fn least<K: Ord>(a: &(f64, K), b: &(f64, K)) -> Ordering {
    a.0.total_cmp(&b.0).then_with(|| a.1.cmp(&b.1))
}
