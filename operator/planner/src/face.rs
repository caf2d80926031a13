//! The exact step of a split: all ranks between which rows flow come to one level at once.
//!
//! Sweeps pour one expert after the other, and on long chains of ranks that are linked by few copies a difference takes
//! many sweeps from one end to the other. But a split is the minimum of a convex quadratic with bounds, and once it is
//! known which copies carry no rows, what is left is a linear system on a forest: leaves first, each rank hands what it
//! has above the level of its group to the rank that it was reached from. The step ends where the first copy runs out of
//! rows; that copy is then left out. Sweeps bring copies back in. So it goes with any quadratic with bounds (gradient
//! projection to find the face, the minimum of the face by elimination: Moré and Toraldo 1991).

/// Steps in a row, each of which leaves a copy out.
const STEPS: usize = 8;

/// The copies of a layer as the split sees them: places of an expert's copies stand side by side.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Copies<'a> {
    /// First place of each expert's copies.
    pub(crate) start: &'a [u32],
    /// Copies of each expert.
    pub(crate) count: &'a [u32],
    /// Dense rank at each place.
    pub(crate) host: &'a [u32],
    /// Experts with several copies.
    pub(crate) shared: &'a [u32],
}

impl Copies<'_> {
    fn span(&self, shared: usize) -> std::ops::Range<usize> {
        let e = self.shared[shared] as usize;
        let start = self.start[e] as usize;
        start..start + self.count[e] as usize
    }
}

/// A rank that was reached over an expert.
#[derive(Debug, Clone, Copy)]
struct Reached {
    rank: u32,
    /// Place of the expert's copy on this rank, and on the rank it was reached from; none at a root.
    by: u32,
    over: u32,
}

/// Workspace; it grows to the largest layer it sees, and is nobody's state.
#[derive(Debug, Default)]
pub(crate) struct Face {
    /// First of each rank's entries in `held`, and their end.
    first: Vec<u32>,
    /// Place of a copy and number of its expert among the shared ones, rank by rank.
    held: Vec<(u32, u32)>,
    reached: Vec<Reached>,
    seen: Vec<bool>,
    /// Ranks whose group is level: nothing that happens elsewhere changes it.
    level: Vec<bool>,
    poured: Vec<bool>,
    /// What a rank has above the level of its group.
    excess: Vec<f64>,
    /// Change of each place's rows.
    change: Vec<f64>,
}

impl Face {
    /// Brings every group of ranks between which rows flow to one level, as far as rows go. The sum of squares of
    /// the loads never rises, and rows are kept.
    pub(crate) fn level(&mut self, copies: Copies<'_>, rows: &mut [f64], loads: &mut [f64]) {
        self.index(copies, loads.len());
        for _ in 0..STEPS {
            if self.step(copies, rows, loads) {
                return;
            }
        }
    }

    fn index(&mut self, copies: Copies<'_>, ranks: usize) {
        self.first.clear();
        self.first.resize(ranks + 2, 0);
        let mut held = 0;
        for s in 0..copies.shared.len() {
            for place in copies.span(s) {
                self.first[copies.host[place] as usize + 2] += 1;
                held += 1;
            }
        }
        for g in 0..ranks {
            self.first[g + 2] += self.first[g + 1];
        }
        self.held.clear();
        self.held.resize(held, (0, 0));
        for s in 0..copies.shared.len() {
            for place in copies.span(s) {
                let next = &mut self.first[copies.host[place] as usize + 1];
                self.held[*next as usize] = (place as u32, s as u32);
                *next += 1;
            }
        }
        self.change.clear();
        self.change.resize(copies.host.len(), 0.0);
        self.excess.clear();
        self.excess.resize(ranks, 0.0);
        self.level.clear();
        self.level.resize(ranks, false);
    }

    /// One step of every group that is not level yet; whether all are.
    fn step(&mut self, copies: Copies<'_>, rows: &mut [f64], loads: &mut [f64]) -> bool {
        self.seen.clone_from(&self.level);
        self.poured.clear();
        self.poured.resize(copies.shared.len(), false);
        let mut all = true;
        for root in 0..loads.len() as u32 {
            if !self.seen[root as usize] {
                self.reach(root, copies, rows);
                let mut whole = true;
                if self.reached.len() > 1 {
                    self.solve(copies, loads);
                    whole = self.go(copies, rows, loads);
                }
                if whole {
                    for r in &self.reached {
                        self.level[r.rank as usize] = true;
                    }
                }
                all &= whole;
            }
        }
        all
    }

    /// All ranks that rows of shared experts join to `root`, nearest first.
    fn reach(&mut self, root: u32, copies: Copies<'_>, rows: &[f64]) {
        self.reached.clear();
        self.reached.push(Reached {
            rank: root,
            by: 0,
            over: 0,
        });
        self.seen[root as usize] = true;
        let mut at = 0;
        while at < self.reached.len() {
            let g = self.reached[at].rank as usize;
            at += 1;
            for &(place, s) in &self.held[self.first[g] as usize..self.first[g + 1] as usize] {
                if rows[place as usize] <= 0.0 || self.poured[s as usize] {
                    continue;
                }
                self.poured[s as usize] = true;
                for other in copies.span(s as usize) {
                    let rank = copies.host[other];
                    if rows[other] > 0.0 && !self.seen[rank as usize] {
                        self.seen[rank as usize] = true;
                        self.reached.push(Reached {
                            rank,
                            by: other as u32,
                            over: place,
                        });
                    }
                }
            }
        }
    }

    /// The change of rows that brings the ranks reached to one level.
    fn solve(&mut self, copies: Copies<'_>, loads: &[f64]) {
        let all = self.reached.iter();
        let sum: f64 = all.map(|r| loads[r.rank as usize]).sum();
        let level = sum / self.reached.len() as f64;
        for r in &self.reached {
            self.excess[r.rank as usize] = loads[r.rank as usize] - level;
        }
        for r in self.reached[1..].iter().rev() {
            let excess = self.excess[r.rank as usize];
            self.change[r.by as usize] -= excess;
            self.change[r.over as usize] += excess;
            self.excess[copies.host[r.over as usize] as usize] += excess;
        }
    }

    /// Makes the change as far as rows go; whether they went all the way.
    fn go(&mut self, copies: Copies<'_>, rows: &mut [f64], loads: &mut [f64]) -> bool {
        let (mut part, mut empty) = (1.0, None);
        for r in &self.reached[1..] {
            for place in [r.by as usize, r.over as usize] {
                let change = self.change[place];
                if rows[place] + part * change < 0.0 {
                    (part, empty) = (-rows[place] / change, Some(place));
                }
            }
        }
        for r in &self.reached[1..] {
            for place in [r.by as usize, r.over as usize] {
                let change = part * self.change[place];
                self.change[place] = 0.0;
                rows[place] = (rows[place] + change).max(0.0);
                loads[copies.host[place] as usize] += change;
            }
        }
        if let Some(place) = empty {
            rows[place] = 0.0;
        }
        empty.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Expert s of a chain joins ranks s and s + 1.
    fn chain(ranks: u32) -> (Vec<u32>, Vec<u32>, Vec<u32>, Vec<u32>) {
        let links = ranks - 1;
        (
            (0..links).map(|s| 2 * s).collect(),
            vec![2; links as usize],
            (0..links).flat_map(|s| [s, s + 1]).collect(),
            (0..links).collect(),
        )
    }

    #[test]
    fn a_chain_is_level_after_one_step() {
        let (start, count, host, shared) = chain(64);
        let copies = Copies {
            start: &start,
            count: &count,
            host: &host,
            shared: &shared,
        };
        let mut rows = vec![1000.0; host.len()];
        let mut loads: Vec<f64> = (0..64).map(|g| 2000.0 + f64::from(g)).collect();
        let mut face = Face::default();
        assert!(face.index_and_step(copies, &mut rows, &mut loads));
        assert!(
            loads.iter().all(|load| (load - 2031.5).abs() < 1e-6),
            "{loads:?}"
        );
        assert!(
            rows.chunks(2)
                .all(|pair| (pair[0] + pair[1] - 2000.0).abs() < 1e-6)
        );
    }

    #[test]
    fn a_link_that_runs_out_cuts_its_chain() {
        // Rank 0 has 90 too many for its link, which carries 10 of its own there: they all leave.
        let (start, count, host, shared) = chain(3);
        let copies = Copies {
            start: &start,
            count: &count,
            host: &host,
            shared: &shared,
        };
        let (mut rows, mut loads) = (vec![10.0, 10.0, 10.0, 10.0], vec![100.0, 20.0, 10.0]);
        Face::default().level(copies, &mut rows, &mut loads);
        assert!(rows[0] < 1e-9 && (rows[1] - 20.0).abs() < 1e-9, "{rows:?}");
        assert!((loads[0] - 90.0).abs() < 1e-9, "{loads:?}");
        assert!((loads[1] - 20.0).abs() < 1e-9, "{loads:?}");
        assert!((loads[2] - 20.0).abs() < 1e-9, "{loads:?}");
    }

    impl Face {
        fn index_and_step(
            &mut self,
            copies: Copies<'_>,
            rows: &mut [f64],
            loads: &mut [f64],
        ) -> bool {
            self.index(copies, loads.len());
            self.step(copies, rows, loads)
        }
    }
}
