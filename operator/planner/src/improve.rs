//! Local search from a placement: swaps and overwrites around the most loaded rank, under a limit on copies.
//!
//! Judged under even split; shares are solved afterwards.

use crate::cover;
use crate::layer::{Layer, Operation};
use crate::problem::Room;

/// Weight of the tie-break on squared loads, which makes progress when several ranks are equally bad.
const TIE_BREAK: f64 = 0.02;
/// Least relative gain of an operation.
const LEAST_GAIN: f64 = 1e-5;
/// Most operations per call.
const MOST_OPERATIONS: usize = 400;

#[derive(Debug, Clone, Copy)]
enum Kind {
    /// Slot s of the worst rank and slot t of g change places: two copies.
    Swap,
    /// Slot t of g gets one more copy of what slot s of the worst rank holds: one copy.
    Overwrite,
}

#[derive(Debug, Clone, Copy)]
struct Candidate {
    kind: Kind,
    s: usize,
    g: usize,
    t: usize,
}

/// State of the search.
struct Search<'a> {
    layer: &'a mut Layer,
    origin: &'a Layer,
    room: &'a Room,
    w: &'a [f64],
    loads: Vec<f64>,
    /// Ranks by load, descending.
    order: Vec<usize>,
    /// Load of one copy of each expert.
    per_copy: Vec<f64>,
    /// What every host of an expert is relieved of by one more copy.
    relief: Vec<f64>,
    /// What every other host of an expert carries more with one copy less; meaningless for a single copy.
    burden: Vec<f64>,
}

/// Improves `layer` until its highest load is at most `target`, nothing helps, or more than `limit` copies would
/// differ from `origin`.
pub(crate) fn improve(
    layer: &mut Layer,
    origin: &Layer,
    w: &[f64],
    room: &Room,
    target: f64,
    limit: usize,
) {
    let mut search = Search {
        loads: Vec::new(),
        order: (0..layer.ranks()).collect(),
        per_copy: Vec::new(),
        relief: Vec::new(),
        burden: Vec::new(),
        layer,
        origin,
        room,
        w,
    };
    search.refresh();
    for _ in 0..MOST_OPERATIONS {
        let worst = search.order[0];
        if search.loads[worst] <= target {
            return;
        }
        let room = limit as isize - search.layer.moved_from(origin) as isize;
        let Some(best) = search.best(worst, room) else {
            return;
        };
        let op = search.operation(worst, best);
        let back = match op {
            Operation::Swap { .. } => op,
            Operation::Overwrite { at, .. } => Operation::Overwrite {
                expert: search.layer.slots(at.0)[at.1],
                at,
            },
        };
        let before = search.potential();
        search.layer.apply(op);
        search.refresh();
        if search.potential().falls_short_of(before) {
            search.layer.apply(back);
            return;
        }
    }
}

/// What every operation must lower. The score of a candidate looks at two ranks and the maximum only, so an overwrite
/// may pay on other ranks; without this the search could go in circles over operations that cost no copy.
#[derive(Debug, Clone, Copy)]
struct Potential {
    max: f64,
    squares: f64,
}

impl Potential {
    fn falls_short_of(self, before: Self) -> bool {
        let max_falls = self.max < before.max * (1.0 - LEAST_GAIN);
        let squares_fall = self.squares < before.squares && self.max <= before.max;
        !(max_falls || squares_fall)
    }
}

impl Search<'_> {
    fn refresh(&mut self) {
        self.loads = self.layer.even_loads(self.w);
        self.per_copy.clear();
        self.relief.clear();
        self.burden.clear();
        for (e, w) in self.w.iter().enumerate() {
            let c = self.layer.count(e).max(1) as f64;
            self.per_copy.push(w / c);
            self.relief.push(w / c - w / (c + 1.0));
            self.burden.push(w / (c - 1.0).max(1.0) - w / c);
        }
        let loads = &self.loads;
        self.order
            .sort_by(|a, b| loads[*b].total_cmp(&loads[*a]).then(a.cmp(b)));
    }

    fn potential(&self) -> Potential {
        Potential {
            max: self.loads[self.order[0]],
            squares: self.loads.iter().map(|load| load * load).sum(),
        }
    }

    /// The operation with the least score that fits `room` more copies; ties go to the lower (s, g, t).
    fn best(&self, h: usize, room: isize) -> Option<Candidate> {
        let mut score = (self.loads[h] + TIE_BREAK * self.loads[h]) * (1.0 - LEAST_GAIN);
        let mut found = None;
        for s in 0..self.layer.slots(h).len() {
            let e = self.layer.slots(h)[s];
            for g in (0..self.layer.ranks()).filter(|g| *g != h && !self.layer.has(*g, e)) {
                for t in 0..self.layer.slots(g).len() {
                    for kind in [Kind::Swap, Kind::Overwrite] {
                        let candidate = Candidate { kind, s, g, t };
                        if let Some(v) = self.score(h, e, candidate, room, score) {
                            (score, found) = (v, Some(candidate));
                        }
                    }
                }
            }
        }
        found
    }

    /// The score of an operation, if it is allowed and below `best`.
    fn score(&self, h: usize, e: usize, c: Candidate, room: isize, best: f64) -> Option<f64> {
        let f = self.layer.slots(c.g)[c.t];
        let (on_h, on_g, others) = match c.kind {
            Kind::Swap => {
                let d = self.per_copy[e] - self.per_copy[f];
                if d <= 0.0 || self.layer.has(h, f) {
                    return None;
                }
                (self.loads[h] - d, self.loads[c.g] + d, None)
            }
            Kind::Overwrite => {
                if self.layer.count(f) < 2 {
                    return None;
                }
                let (de, df) = (self.relief[e], self.burden[f]);
                let (gone, new) = (self.per_copy[f], self.per_copy[e] - de);
                let on_h = self.loads[h] - de + if self.layer.has(h, f) { df } else { 0.0 };
                (on_h, self.loads[c.g] + new - gone, Some((de, df)))
            }
        };
        let tie = TIE_BREAK * (on_h * on_h + on_g * on_g - self.loads[c.g] * self.loads[c.g])
            / self.loads[h];
        let near = on_h.max(on_g);
        if near + tie >= best {
            return None;
        }
        let op = self.operation(h, c);
        if self.layer.cost(self.origin, op) > room {
            return None;
        }
        let v = near.max(self.rest(h, c.g, e, f, others)) + tie;
        (v < best && cover::allows(self.room, self.layer, op)).then_some(v)
    }

    /// The highest load of all ranks but h and g after the operation. `change` is what the hosts of e lose and
    /// those of f gain; `None` if only h and g change.
    fn rest(&self, h: usize, g: usize, e: usize, f: usize, change: Option<(f64, f64)>) -> f64 {
        let mut max = 0.0_f64;
        let Some((de, df)) = change else {
            let next = self.order.iter().find(|q| **q != h && **q != g);
            return next.map_or(0.0, |q| self.loads[*q]);
        };
        let eased = |q: usize| if self.layer.has(q, e) { de } else { 0.0 };
        for q in self.layer.hosts(f).iter().filter(|q| **q != g && **q != h) {
            max = max.max(self.loads[*q] - eased(*q) + df);
        }
        // Of the rest the first that does not shrink decides; nobody after it is above it.
        for q in self.order.iter().copied() {
            if q == h || q == g || self.layer.has(q, f) {
                continue;
            }
            max = max.max(self.loads[q] - eased(q));
            if !self.layer.has(q, e) {
                break;
            }
        }
        max
    }

    fn operation(&self, h: usize, c: Candidate) -> Operation {
        match c.kind {
            Kind::Swap => Operation::Swap {
                from: (h, c.s),
                to: (c.g, c.t),
            },
            Kind::Overwrite => Operation::Overwrite {
                expert: self.layer.slots(h)[c.s],
                at: (c.g, c.t),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_copy_of_the_hot_expert_is_worth_more_than_a_cold_redundant_one() {
        // Expert 0 is hot and alone; expert 1 has a copy that nobody needs.
        let origin = Layer::from_slots(&[vec![0, 1], vec![1, 2]], 3);
        let mut layer = origin.clone();
        let room = Room::plain(&[2, 2]);
        improve(&mut layer, &origin, &[90.0, 2.0, 10.0], &room, 0.0, 1);
        assert_eq!(layer.hosts(0), [0, 1]);
        assert_eq!(layer.moved_from(&origin), 1);
    }

    #[test]
    fn the_limit_counts_copies_that_differ() {
        let origin = Layer::from_slots(&[vec![0, 1], vec![2, 3]], 4);
        let w = [50.0, 40.0, 1.0, 2.0];
        let mut layer = origin.clone();
        let room = Room::plain(&[2, 2]);
        improve(&mut layer, &origin, &w, &room, 0.0, 1);
        assert_eq!(layer, origin, "a swap costs two");
        improve(&mut layer, &origin, &w, &room, 0.0, 2);
        assert_eq!(layer.moved_from(&origin), 2);
        let loads = layer.even_loads(&w);
        assert!(loads[0].max(loads[1]) <= 52.0, "{loads:?}");
    }
}
