//! Swaps that join ranks into one component through experts with several copies.
//!
//! The link graph has ranks on one side, experts with two or more copies on the other, and an edge per copy. A
//! *bridge* is an edge whose removal cuts its component. As long as there are more components than
//! `max(1, G − (R − N))` some component has a cycle, so some edge is no bridge; swapping its copy with any slot of
//! another component joins the two: exactly one component less for two copies, whatever the partner is.

use crate::cover;
use crate::layer::{Layer, Operation, Place, least};
use crate::problem::Room;

/// Pairs of slots above which only slots of nearly the same load are looked at.
const MANY: usize = 1 << 14;
/// Slots of the nearest loads on either side that are looked at then.
const NEAREST: usize = 8;

/// Joins components until the least possible number is reached or no swap fits: at most `limit` copies may differ
/// from `origin`, and no cover is broken. Each time the swap with the least of the two new loads under even split; of
/// many pairs those of nearly equal loads are looked at, O(R) for a join. Returns the swaps made.
pub(crate) fn connect(
    layer: &mut Layer,
    origin: &Layer,
    w: &[f64],
    room: &Room,
    limit: usize,
) -> usize {
    let mut loads = layer.even_loads(w);
    // Swaps leave counts as they are, so the load of a copy stays.
    let per_copy: Vec<f64> = (0..w.len()).map(|e| layer.per_copy(w, e)).collect();
    let mut by_load: Vec<(f64, Place)> = (0..layer.ranks())
        .flat_map(|g| {
            layer
                .slots(g)
                .iter()
                .enumerate()
                .map(move |(s, e)| (*e, (g, s)))
        })
        .map(|(e, place)| (per_copy[e], place))
        .collect();
    by_load.sort_by(least);
    let mut swaps = 0;
    loop {
        let links = Links::of(layer);
        if links.components <= 1 {
            return swaps;
        }
        let spare = limit as isize - layer.moved_from(origin) as isize;
        let pairs = Pairs {
            layer,
            origin,
            room,
            loads: &loads,
            per_copy: &per_copy,
            links: &links,
            spare,
        };
        let Some((from, to)) = pairs.best(&by_load) else {
            return swaps;
        };
        let d = per_copy[layer.slots(from.0)[from.1]] - per_copy[layer.slots(to.0)[to.1]];
        loads[from.0] -= d;
        loads[to.0] += d;
        for (_, place) in &mut by_load {
            if *place == from {
                *place = to;
            } else if *place == to {
                *place = from;
            }
        }
        layer.swap(from, to);
        swaps += 1;
    }
}

/// What a pair of slots is judged by.
struct Pairs<'a> {
    layer: &'a Layer,
    origin: &'a Layer,
    room: &'a Room,
    loads: &'a [f64],
    per_copy: &'a [f64],
    links: &'a Links,
    spare: isize,
}

type Best = Option<(f64, (Place, Place))>;

impl Pairs<'_> {
    /// Among pairs of a usable slot and a slot of another component, the one that leaves the least maximum on the two
    /// ranks; ties go to the lower (g, s, h, t).
    fn best(&self, by_load: &[(f64, Place)]) -> Option<(Place, Place)> {
        let usable: Vec<Place> = self.links.usable(self.layer).collect();
        let mut best = None;
        if usable.len() * by_load.len() > MANY {
            for from in &usable {
                self.nearest(*from, by_load, &mut best);
            }
        }
        if best.is_none() {
            for from in usable {
                for (_, to) in by_load {
                    self.offer(from, *to, &mut best);
                }
            }
        }
        best.map(|(_, swap)| swap)
    }

    /// The slots of other components whose copies' loads are next to that of `from`.
    fn nearest(&self, from: Place, by_load: &[(f64, Place)], best: &mut Best) {
        let u = self.per_copy[self.layer.slots(from.0)[from.1]];
        let at = by_load.partition_point(|(x, _)| *x < u);
        let others = |to: &&(f64, Place)| self.elsewhere(from, to.1);
        let below = by_load[..at].iter().rev().filter(others).take(NEAREST);
        for (_, to) in by_load[at..]
            .iter()
            .filter(others)
            .take(NEAREST)
            .chain(below)
        {
            self.offer(from, *to, best);
        }
    }

    fn elsewhere(&self, from: Place, to: Place) -> bool {
        self.links.component[from.0] != self.links.component[to.0]
    }

    fn offer(&self, from: Place, to: Place, best: &mut Best) {
        if !self.elsewhere(from, to) {
            return;
        }
        let (e, f) = (
            self.layer.slots(from.0)[from.1],
            self.layer.slots(to.0)[to.1],
        );
        let d = self.per_copy[e] - self.per_copy[f];
        let value = (self.loads[from.0] - d).max(self.loads[to.0] + d);
        let candidate = (value, (from, to));
        if best.as_ref().is_some_and(|b| least(&candidate, b).is_ge()) {
            return;
        }
        let op = Operation::Swap { from, to };
        if self.layer.cost(self.origin, op) <= self.spare
            && cover::allows(self.room, self.layer, op)
        {
            *best = Some(candidate);
        }
    }
}

/// Components and bridges of the link graph.
#[derive(Debug)]
struct Links {
    components: usize,
    /// Component of each rank.
    component: Vec<usize>,
    /// `bridge[g][s]`: whether the edge of this slot is a bridge (false for experts with one copy).
    bridge: Vec<Vec<bool>>,
}

/// A vertex on the way of the depth-first search. Vertices: ranks, then experts.
#[derive(Debug)]
struct Visit {
    vertex: usize,
    parent: usize,
    next: usize,
}

const NONE: usize = usize::MAX;

struct Search<'a> {
    layer: &'a Layer,
    entered: Vec<usize>,
    lowest: Vec<usize>,
    clock: usize,
    links: Links,
}

impl Links {
    /// One depth-first search over ranks and replicated experts, without recursion. O(R).
    fn of(layer: &Layer) -> Self {
        let ranks = layer.ranks();
        let vertices = ranks + layer.experts();
        let mut search = Search {
            layer,
            entered: vec![NONE; vertices],
            lowest: vec![NONE; vertices],
            clock: 0,
            links: Self {
                components: 0,
                component: vec![0; ranks],
                bridge: (0..ranks)
                    .map(|g| vec![false; layer.slots(g).len()])
                    .collect(),
            },
        };
        for rank in 0..ranks {
            if search.entered[rank] == NONE {
                search.walk(rank);
                search.links.components += 1;
            }
        }
        search.links
    }

    /// Slots whose copy may leave without cutting its component.
    fn usable<'a>(&'a self, layer: &'a Layer) -> impl Iterator<Item = Place> + 'a {
        (0..layer.ranks()).flat_map(move |g| {
            layer
                .slots(g)
                .iter()
                .enumerate()
                .filter(move |(s, e)| layer.count(**e) > 1 && !self.bridge[g][*s])
                .map(move |(s, _)| (g, s))
        })
    }
}

impl Search<'_> {
    fn walk(&mut self, from: usize) {
        let mut path = vec![self.enter(from, NONE)];
        while let Some(top) = path.last_mut() {
            let (vertex, parent) = (top.vertex, top.parent);
            let Some(next) = self.neighbour(vertex, top.next) else {
                path.pop();
                if parent != NONE {
                    self.leave(vertex, parent);
                }
                continue;
            };
            top.next += 1;
            if next == parent {
                continue;
            }
            if self.entered[next] == NONE {
                path.push(self.enter(next, vertex));
            } else {
                self.lowest[vertex] = self.lowest[vertex].min(self.entered[next]);
            }
        }
    }

    fn enter(&mut self, vertex: usize, parent: usize) -> Visit {
        self.entered[vertex] = self.clock;
        self.lowest[vertex] = self.clock;
        self.clock += 1;
        if vertex < self.layer.ranks() {
            self.links.component[vertex] = self.links.components;
        }
        Visit {
            vertex,
            parent,
            next: 0,
        }
    }

    fn leave(&mut self, vertex: usize, parent: usize) {
        self.lowest[parent] = self.lowest[parent].min(self.lowest[vertex]);
        if self.lowest[vertex] > self.entered[parent] {
            let (rank, expert) = (vertex.min(parent), vertex.max(parent) - self.layer.ranks());
            for (s, e) in self.layer.slots(rank).iter().enumerate() {
                if *e == expert {
                    self.links.bridge[rank][s] = true;
                }
            }
        }
    }

    /// The i-th neighbour; an expert with one copy has no edge, and is its rank's own for the search.
    fn neighbour(&self, vertex: usize, i: usize) -> Option<usize> {
        let ranks = self.layer.ranks();
        if vertex < ranks {
            return self.layer.slots(vertex).get(i).map(|e| {
                if self.layer.count(*e) > 1 {
                    ranks + e
                } else {
                    vertex
                }
            });
        }
        self.layer.hosts(vertex - ranks).get(i).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bridges_are_found_and_cycles_are_not() {
        // Ranks 0 and 1 share experts 0 and 1 (a cycle); rank 2 hangs on expert 2 (a bridge on both sides).
        let layer = Layer::from_slots(&[vec![0, 1], vec![0, 1, 2], vec![2, 3]], 4);
        let links = Links::of(&layer);
        assert_eq!(links.components, 1);
        assert_eq!(
            links.bridge,
            [vec![false; 2], vec![false, false, true], vec![true, false]]
        );
        assert_eq!(layer.components(), 1);
    }

    #[test]
    fn two_islands_become_one_with_two_copies() {
        let origin = Layer::from_slots(&[vec![0, 1], vec![0, 1], vec![2, 3], vec![2, 3]], 4);
        let (w, room) = ([4.0, 3.0, 2.0, 1.0], Room::plain(&[2; 4]));
        let mut layer = origin.clone();
        assert_eq!((layer.components(), layer.least_components()), (2, 1));
        assert_eq!(connect(&mut layer, &origin, &w, &room, 0), 0);
        assert_eq!(connect(&mut layer, &origin, &w, &room, 2), 1);
        assert_eq!((layer.components(), layer.moved_from(&origin)), (1, 2));
    }
}
