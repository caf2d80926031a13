//! A split in work: the rows of all copies under one load, kept level while copies come and go.
//!
//! The planner asks of many placements that differ in one copy how level their best split is. Solving each anew costs
//! some ten times as much as going on from the split of the placement they differ from.

use foregate_api::placement::LayerPlacement;

use crate::face::{Copies, Face};
use crate::layer::{Layer, Operation};
use crate::pour::{RELAXATION, pour};
use crate::problem::Room;

/// Sweeps between two exact steps.
const ROUND: usize = 4;

/// A copy's share of its expert as it is published: even if the expert has no load.
pub(crate) fn share(rows: f64, all: f64, copies: usize) -> f32 {
    (if all > 0.0 {
        rows / all
    } else {
        1.0 / copies.max(1) as f64
    }) as f32
}

/// Rows of each copy and load of each rank, for one layer and one load.
#[derive(Debug, Clone, Default)]
pub(crate) struct Flow {
    /// First place of each expert's copies; an expert has one place to spare.
    start: Vec<u32>,
    /// Copies of each expert.
    count: Vec<u32>,
    /// Dense rank of each copy.
    host: Vec<u32>,
    /// Rows of each copy.
    rows: Vec<f64>,
    /// Load of each rank.
    pub(crate) loads: Vec<f64>,
    /// Experts with several copies, in the order in which they are poured.
    shared: Vec<u32>,
}

/// Buffers that splits are settled with: they grow to the largest layer they see, and say nothing between two calls but
/// what [`Workspace::ranks_by_load`] is for.
#[derive(Debug, Default)]
pub(crate) struct Workspace {
    level: Vec<f64>,
    face: Face,
    /// Ranks by load, descending.
    order: Vec<u32>,
    /// What they are sorted by.
    keys: Vec<u64>,
    /// Place of each rank in `order`.
    at: Vec<u32>,
    own: Vec<f64>,
    inside: Vec<f64>,
    /// Splits that nobody needs any more, for the sake of their memory.
    spare: Vec<Flow>,
}

impl Workspace {
    /// A split to become something else.
    pub(crate) fn spare(&mut self) -> Flow {
        self.spare.pop().unwrap_or_default()
    }

    /// Takes a split that nobody needs any more.
    pub(crate) fn retire(&mut self, flow: Flow) {
        self.spare.push(flow);
    }

    /// Ranks by load, descending, as of the last [`Flow::tight`].
    pub(crate) fn ranks_by_load(&self) -> impl Iterator<Item = usize> + '_ {
        self.order.iter().map(|g| *g as usize)
    }
}

impl Flow {
    /// Even shares of `w` over the copies of a layer.
    pub(crate) fn even(layer: &Layer, w: &[f64]) -> Self {
        let mut flow = Self::default();
        flow.become_even(layer, w);
        flow
    }

    /// The same, in the memory of this one.
    pub(crate) fn become_even(&mut self, layer: &Layer, w: &[f64]) {
        let places = layer.copies() + w.len();
        self.start.clear();
        self.start.reserve(w.len());
        self.count.clear();
        self.count.reserve(w.len());
        self.host.clear();
        self.host.reserve(places);
        self.rows.clear();
        self.rows.reserve(places);
        self.shared.clear();
        self.loads.clear();
        self.loads.resize(layer.ranks(), 0.0);
        for (e, rows) in w.iter().enumerate() {
            self.push(layer.hosts(e).iter().map(|g| *g as u32), *rows);
        }
    }

    /// What a placement's shares give on the copies that are left: what a lost rank had of an expert goes to its other
    /// copies in proportion, an orphan's rows to nobody.
    pub(crate) fn published(
        layer: &Layer,
        room: &Room,
        of: &LayerPlacement,
        w: &[f64],
    ) -> Self {
        let mut flow = Self::even(layer, w);
        flow.loads.fill(0.0);
        for (e, copies) in of.copies.iter().enumerate() {
            let span = flow.span(e);
            let (mut at, mut total) = (span.start, 0.0);
            flow.rows[span.clone()].fill(0.0);
            for copy in copies {
                // Both ascend by rank; a copy whose rank is gone has no place here.
                while at < span.end && room.ranks[flow.host[at] as usize] < copy.rank {
                    at += 1;
                }
                if at < span.end && room.ranks[flow.host[at] as usize] == copy.rank {
                    flow.rows[at] = f64::from(copy.share);
                    total += flow.rows[at];
                    at += 1;
                }
            }
            flow.share_out(e, total, w[e]);
        }
        flow
    }

    /// What the published form of this split gives, whose shares are single-precision numbers.
    pub(crate) fn rounded(&self, w: &[f64]) -> Self {
        let mut flow = self.clone();
        flow.loads.fill(0.0);
        for (e, rows) in w.iter().enumerate() {
            let span = flow.span(e);
            let all: f64 = flow.rows[span.clone()].iter().sum();
            let mut total = 0.0;
            for at in span.clone() {
                flow.rows[at] = f64::from(share(flow.rows[at], all, span.len()));
                total += flow.rows[at];
            }
            flow.share_out(e, total, *rows);
        }
        flow
    }

    /// Turns an expert's shares, which sum to `total`, into rows, and adds them to the loads.
    fn share_out(&mut self, e: usize, total: f64, rows: f64) {
        let span = self.span(e);
        let even = 1.0 / span.len().max(1) as f64;
        for at in span {
            let share = if total > 0.0 {
                self.rows[at] / total
            } else {
                even
            };
            self.rows[at] = share * rows;
            self.loads[self.host[at] as usize] += self.rows[at];
        }
    }

    /// Variance of each load if the rows of each expert were drawn independently: `Σ share² · rows`.
    pub(crate) fn variances(&self, w: &[f64]) -> Vec<f64> {
        let mut variances = vec![0.0; self.loads.len()];
        for (e, rows) in w.iter().enumerate().filter(|(_, rows)| **rows > 0.0) {
            for at in self.span(e) {
                variances[self.host[at] as usize] += self.rows[at] * self.rows[at] / rows;
            }
        }
        variances
    }

    pub(crate) fn over(ranks: usize) -> Self {
        Self {
            loads: vec![0.0; ranks],
            ..Self::default()
        }
    }

    /// The next expert's copies, with even shares of its rows.
    pub(crate) fn push(&mut self, hosts: impl ExactSizeIterator<Item = u32>, rows: f64) {
        if hosts.len() > 1 && rows > 0.0 {
            self.shared.push(self.start.len() as u32);
        }
        self.start.push(self.host.len() as u32);
        self.count.push(hosts.len() as u32);
        let part = rows / hosts.len().max(1) as f64;
        for g in hosts {
            self.host.push(g);
            self.rows.push(part);
            self.loads[g as usize] += part;
        }
        self.host.push(0);
        self.rows.push(0.0);
    }

    /// Becomes the shares of `other`, under its load `from`, of another load.
    pub(crate) fn become_scaled(&mut self, other: &Self, from: &[f64], to: &[f64]) {
        self.become_like(other);
        self.loads.fill(0.0);
        for (e, rows) in to.iter().enumerate() {
            let factor = if from[e] > 0.0 { rows / from[e] } else { 0.0 };
            for at in self.span(e) {
                self.rows[at] *= factor;
                self.loads[self.host[at] as usize] += self.rows[at];
            }
        }
    }

    /// Becomes the rows of `other` where `layer` still has their copies, in its order; what other copies had goes to an
    /// expert's first.
    pub(crate) fn become_sorted(&mut self, other: &Self, layer: &Layer, w: &[f64]) {
        self.become_even(layer, w);
        self.loads.fill(0.0);
        for (e, rows) in w.iter().enumerate() {
            let (from, to) = (other.span(e), self.span(e));
            let mut left = *rows;
            for at in to.clone() {
                let g = self.host[at];
                let old = from.clone().find(|i| other.host[*i] == g);
                self.rows[at] = old.map_or(0.0, |i| other.rows[i]).min(left);
                left -= self.rows[at];
                self.loads[g as usize] += self.rows[at];
            }
            if left > 0.0 && !to.is_empty() {
                self.rows[to.start] += left;
                self.loads[self.host[to.start] as usize] += left;
            }
        }
    }

    /// Rows of each copy, experts one after the other.
    pub(crate) fn copies(&self) -> Vec<f64> {
        let all = (0..self.count.len()).flat_map(|e| self.span(e));
        all.map(|at| self.rows[at]).collect()
    }

    fn span(&self, e: usize) -> std::ops::Range<usize> {
        let start = self.start[e] as usize;
        start..start + self.count[e] as usize
    }

    /// Becomes what `other` is, without allocating.
    pub(crate) fn become_like(&mut self, other: &Self) {
        self.start.clone_from(&other.start);
        self.count.clone_from(&other.count);
        self.host.clone_from(&other.host);
        self.rows.clone_from(&other.rows);
        self.loads.clone_from(&other.loads);
        self.shared.clone_from(&other.shared);
    }

    /// Rows of expert e on rank g.
    pub(crate) fn rows_on(&self, e: usize, g: usize) -> f64 {
        let at = self.span(e).find(|i| self.host[*i] as usize == g);
        at.map_or(0.0, |i| self.rows[i])
    }

    pub(crate) fn max(&self) -> f64 {
        self.loads.iter().copied().fold(0.0, f64::max)
    }

    pub(crate) fn squares(&self) -> f64 {
        self.loads.iter().map(|load| load * load).sum()
    }

    /// Follows an operation on the layer, before it is applied there.
    pub(crate) fn follow(
        &mut self,
        layer: &Layer,
        op: Operation,
        w: &[f64],
        work: &mut Workspace,
    ) {
        match op {
            Operation::Swap { from, to } => {
                let (e, f) = (layer.slots(from.0)[from.1], layer.slots(to.0)[to.1]);
                self.carry(e, from.0, to.0);
                self.carry(f, to.0, from.0);
                self.level_one(e, w, work);
                self.level_one(f, w, work);
            }
            Operation::Overwrite { expert, at } => {
                let f = layer.slots(at.0)[at.1];
                self.drop_copy(f, at.0);
                self.level_one(f, w, work);
                self.add_copy(expert, at.0);
                self.level_one(expert, w, work);
            }
        }
    }

    /// The copy of e on g goes to h with its rows.
    fn carry(&mut self, e: usize, g: usize, h: usize) {
        for i in self.span(e) {
            if self.host[i] as usize == g {
                self.host[i] = h as u32;
                self.loads[g] -= self.rows[i];
                self.loads[h] += self.rows[i];
            }
        }
    }

    fn add_copy(&mut self, e: usize, g: usize) {
        let at = self.span(e).end;
        self.host[at] = g as u32;
        self.rows[at] = 0.0;
        self.count[e] += 1;
        if self.count[e] == 2 {
            self.shared.push(e as u32);
        }
    }

    fn drop_copy(&mut self, e: usize, g: usize) {
        let span = self.span(e);
        let Some(at) = span.clone().find(|i| self.host[*i] as usize == g) else {
            return;
        };
        let last = span.end - 1;
        let rows = self.rows[at];
        self.loads[g] -= rows;
        (self.host[at], self.rows[at]) = (self.host[last], self.rows[last]);
        self.count[e] -= 1;
        self.rows[span.start] += rows;
        self.loads[self.host[span.start] as usize] += rows;
        if self.count[e] == 1 {
            self.shared.retain(|x| *x as usize != e);
        }
    }

    fn level_one(&mut self, e: usize, w: &[f64], work: &mut Workspace) {
        let span = self.span(e);
        if span.len() > 1 {
            let (hosts, rows) = (&self.host[span.clone()], &mut self.rows[span]);
            pour(&mut self.loads, hosts, rows, w[e], 1.0, &mut work.level);
        }
    }

    /// One sweep over all shared experts, forward or backward.
    fn sweep(&mut self, w: &[f64], backward: bool, relaxation: f64, work: &mut Workspace) {
        for i in 0..self.shared.len() {
            let i = if backward {
                self.shared.len() - 1 - i
            } else {
                i
            };
            let e = self.shared[i] as usize;
            let start = self.start[e] as usize;
            let span = start..start + self.count[e] as usize;
            let (hosts, rows) = (&self.host[span.clone()], &mut self.rows[span]);
            pour(
                &mut self.loads,
                hosts,
                rows,
                w[e],
                relaxation,
                &mut work.level,
            );
        }
    }

    /// Sweeps and exact steps until the maximum is within `1 + gap` of the certificate, at most `sweeps` sweeps. Returns
    /// the certificate and the sweeps made.
    pub(crate) fn settle(
        &mut self,
        w: &[f64],
        sweeps: usize,
        gap: f64,
        work: &mut Workspace,
    ) -> (f64, usize) {
        self.settle_below(f64::INFINITY, w, sweeps, gap, work)
    }

    /// The same, but given up as soon as the certificate is not below `enough`.
    pub(crate) fn settle_below(
        &mut self,
        enough: f64,
        w: &[f64],
        sweeps: usize,
        gap: f64,
        work: &mut Workspace,
    ) -> (f64, usize) {
        let mut certificate = self.certificate(w, work);
        let mut done = 0;
        while done < sweeps && certificate < enough && self.max() > (1.0 + gap) * certificate {
            let round = ROUND.min(sweeps - done);
            for i in 1..=round {
                // The last of a round is exact: nothing is left above its level for the sake of speed.
                let relaxation = if i < round { RELAXATION } else { 1.0 };
                self.sweep(w, i % 2 == 0, relaxation, work);
            }
            done += round;
            self.straighten(work);
            certificate = certificate.max(self.certificate(w, work));
        }
        (certificate, done)
    }

    /// See [`Face::level`].
    fn straighten(&mut self, work: &mut Workspace) {
        let copies = Copies {
            start: &self.start,
            count: &self.count,
            host: &self.host,
            shared: &self.shared,
        };
        work.face.level(copies, &mut self.rows, &mut self.loads);
    }

    /// A lower bound on the maximum load of any split of this placement ([`crate::bound::certificate`]).
    fn certificate(&self, w: &[f64], work: &mut Workspace) -> f64 {
        self.tight(w, work).0
    }

    /// The certificate, and how many of the most loaded ranks set it; [`Workspace::ranks_by_load`] tells which.
    pub(crate) fn tight(&self, w: &[f64], work: &mut Workspace) -> (f64, usize) {
        let Workspace {
            order,
            keys,
            at,
            own,
            inside,
            ..
        } = work;
        let ranks = self.loads.len();
        // Loads are not negative, and then their bits are in order. The rank takes the place of the last of them: the
        // certificate holds for any order, and one number sorts faster than two.
        let last = ranks.next_power_of_two() as u64 - 1;
        let key = |(g, load): (usize, &f64)| !(load.max(0.0).to_bits() | last) | g as u64;
        keys.clear();
        keys.extend(self.loads.iter().enumerate().map(key));
        keys.sort_unstable();
        order.clear();
        order.extend(keys.iter().map(|key| (key & last) as u32));
        at.resize(ranks, 0);
        for (place, g) in order.iter().enumerate() {
            at[*g as usize] = place as u32;
        }
        // What is not of shared experts stays where it is.
        own.clone_from(&self.loads);
        inside.clear();
        inside.resize(ranks, 0.0);
        for e in &self.shared {
            let span = self.span(*e as usize);
            let mut last = 0;
            for place in span {
                let g = self.host[place] as usize;
                own[g] -= self.rows[place];
                last = last.max(at[g]);
            }
            inside[last as usize] += w[*e as usize];
        }
        let (mut sum, mut bound, mut size) = (0.0, 0.0, 0);
        for (j, g) in order.iter().enumerate() {
            sum += inside[j] + own[*g as usize];
            let mean = sum / (j + 1) as f64;
            if mean > bound {
                (bound, size) = (mean, j + 1);
            }
        }
        (bound, size)
    }
}
