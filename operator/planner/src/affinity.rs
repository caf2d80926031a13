//! Which experts share a node: those that tokens use together, at loads that stay level.
//!
//! A token is sent once to each node that it needs, so what counts are the nodes it visits beside its own. Copies of an
//! expert are spread over nodes; a token takes those on its own node first, then goes where it must, then where it is
//! already. From nodes of level load, pairs of copies change places while that saves visits of a sample of tokens and
//! no node gets too heavy. What a pair saves is guessed for all pairs at once (how often a node is visited anyway), and
//! the promising ones are counted on the sample.

use smallvec::SmallVec;

use crate::layer::least;
use crate::problem::Room;

/// How far above its part of the load a node may get.
const HEAVY: f64 = 1.005;
/// Pairs that are counted in each round, the most promising first.
const PROMISING: usize = 512;
/// Most rounds; each saves visits, so there is an end before.
const ROUNDS: usize = 200;
/// Nodes that a set of them has room for.
const MOST_NODES: usize = u64::BITS as usize;

/// The experts of each node (a failure domain of `room`), `counts[e]` of each as far as nodes go, and one more of
/// another where they do not. `tokens` are the experts of sampled tokens. Every slot is used.
pub(crate) fn assign(
    w: &[f64],
    counts: &[usize],
    room: &Room,
    tokens: &[Vec<usize>],
) -> Vec<Vec<usize>> {
    let mut nodes = Nodes::packed(w, counts, room);
    if (2..=MOST_NODES).contains(&room.domains) {
        Search::new(&mut nodes, w.len(), tokens).run();
    }
    nodes.held
}

/// Copies on nodes.
#[derive(Debug)]
struct Nodes {
    held: Vec<Vec<usize>>,
    load: Vec<f64>,
    /// Load that each may have.
    most: Vec<f64>,
    /// Load of a copy of each expert.
    per_copy: Vec<f64>,
}

impl Nodes {
    /// Heaviest copy first to the node with the least load for its ranks that has room and lacks the expert.
    fn packed(w: &[f64], counts: &[usize], room: &Room) -> Self {
        let (mut slots, mut ranks) = (vec![0; room.domains], vec![0.0; room.domains]);
        for (domain, own) in room.domain.iter().zip(&room.slots) {
            slots[*domain] += own;
            ranks[*domain] += 1.0;
        }
        let part = w.iter().sum::<f64>() / room.ranks.len() as f64;
        let most: Vec<f64> = ranks.iter().map(|ranks| HEAVY * part * ranks).collect();
        let mut nodes = Self {
            held: vec![Vec::new(); room.domains],
            load: vec![0.0; room.domains],
            per_copy: (0..w.len())
                .map(|e| w[e] / counts[e].max(1) as f64)
                .collect(),
            most,
        };
        let mut order: Vec<usize> = (0..w.len()).collect();
        order.sort_by(|a, b| {
            nodes.per_copy[*b]
                .total_cmp(&nodes.per_copy[*a])
                .then(a.cmp(b))
        });
        for e in &order {
            for _ in 0..counts[*e] {
                nodes.add(*e, &slots);
            }
        }
        // What was wanted more often than there are nodes leaves slots to others.
        for e in order.iter().cycle().take(order.len() * room.domains) {
            nodes.add(*e, &slots);
        }
        nodes
    }

    fn add(&mut self, e: usize, slots: &[usize]) {
        let fits = |d: &usize| self.held[*d].len() < slots[*d] && !self.held[*d].contains(&e);
        let lightest = (0..self.held.len())
            .filter(fits)
            .map(|d| (self.load[d] / self.most[d], d))
            .min_by(least);
        if let Some((_, d)) = lightest {
            self.held[d].push(e);
            self.load[d] += self.per_copy[e];
        }
    }

    /// Whether a node may go from what it has to `load`.
    fn bears(&self, d: usize, load: f64) -> bool {
        load <= self.most[d] || load <= self.load[d]
    }
}

/// A copy: node, and its place there.
type At = (usize, usize);

struct Search<'a> {
    nodes: &'a mut Nodes,
    tokens: &'a [Vec<usize>],
    /// Tokens that use each expert.
    of: Vec<Vec<usize>>,
    /// Nodes of each expert, as bits.
    on: Vec<u64>,
    /// Visits of each token, over all nodes that it may come from.
    visits: Vec<u32>,
}

impl<'a> Search<'a> {
    fn new(nodes: &'a mut Nodes, experts: usize, tokens: &'a [Vec<usize>]) -> Self {
        let mut of = vec![Vec::new(); experts];
        for (t, token) in tokens.iter().enumerate() {
            token.iter().for_each(|e| of[*e].push(t));
        }
        let mut on = vec![0; experts];
        for (d, held) in nodes.held.iter().enumerate() {
            held.iter().for_each(|e| on[*e] |= 1 << d);
        }
        let count = nodes.held.len();
        Self {
            visits: tokens
                .iter()
                .map(|token| visits(token, &on, count))
                .collect(),
            nodes,
            tokens,
            of,
            on,
        }
    }

    fn run(&mut self) {
        for _ in 0..ROUNDS {
            let mut touched = vec![false; self.on.len()];
            let mut swapped = false;
            for (a, b) in self.promising() {
                let (e, f) = (self.nodes.held[a.0][a.1], self.nodes.held[b.0][b.1]);
                if !touched[e] && !touched[f] && self.try_swap(a, b) {
                    (touched[e], touched[f], swapped) = (true, true, true);
                }
            }
            if !swapped {
                return;
            }
        }
    }

    /// How often each node is visited by tokens of an expert for the sake of their other experts: `[e · nodes + d]`.
    fn anyway(&self) -> Vec<u32> {
        let count = self.nodes.held.len();
        let mut anyway = vec![0; self.on.len() * count];
        for token in self.tokens {
            for e in token {
                let others = token.iter().filter(|x| *x != e).map(|x| self.on[*x]);
                let sure = others
                    .filter(|on| on.count_ones() == 1)
                    .fold(0, |all, on| all | on);
                for (d, n) in anyway[e * count..(e + 1) * count].iter_mut().enumerate() {
                    *n += u32::from(sure >> d & 1 == 1);
                }
            }
        }
        anyway
    }

    /// Pairs of copies that may change places and seem to save visits, the most promising first.
    fn promising(&self) -> Vec<(At, At)> {
        let (nodes, count) = (&*self.nodes, self.nodes.held.len());
        let anyway = self.anyway();
        let gain = |e: usize, from: usize, to: usize| {
            let often = |d: usize| f64::from(anyway[e * count + d]);
            (often(to) - often(from)) / f64::from(self.on[e].count_ones())
        };
        let mut found: Vec<(f64, (At, At))> = Vec::new();
        for a in 0..count {
            for b in a + 1..count {
                for (s, e) in nodes.held[a].iter().copied().enumerate() {
                    if self.on[e] >> b & 1 == 1 {
                        continue;
                    }
                    let goes = gain(e, a, b);
                    for (t, f) in nodes.held[b].iter().copied().enumerate() {
                        let saves = goes + gain(f, b, a);
                        let there = self.on[f] >> a & 1 == 1;
                        if saves > 0.0 && !there && self.fits((a, e), (b, f)) {
                            found.push((-saves, ((a, s), (b, t))));
                        }
                    }
                }
            }
        }
        if found.len() > PROMISING {
            found.select_nth_unstable_by(PROMISING, least);
            found.truncate(PROMISING);
        }
        found.sort_unstable_by(least);
        found.into_iter().map(|(_, pair)| pair).collect()
    }

    fn fits(&self, (a, e): (usize, usize), (b, f): (usize, usize)) -> bool {
        let d = self.nodes.per_copy[e] - self.nodes.per_copy[f];
        let (nodes, load) = (&*self.nodes, &self.nodes.load);
        nodes.bears(a, load[a] - d) && nodes.bears(b, load[b] + d)
    }

    /// Swaps two copies if that saves visits.
    fn try_swap(&mut self, (a, s): At, (b, t): At) -> bool {
        let (e, f) = (self.nodes.held[a][s], self.nodes.held[b][t]);
        if !self.fits((a, e), (b, f)) {
            return false;
        }
        self.on[e] ^= 1 << a | 1 << b;
        self.on[f] ^= 1 << a | 1 << b;
        let also = self.of[f].iter().filter(|t| !self.tokens[**t].contains(&e));
        let changed: Vec<(usize, u32)> = self.of[e]
            .iter()
            .chain(also)
            .map(|t| {
                (
                    *t,
                    visits(&self.tokens[*t], &self.on, self.nodes.held.len()),
                )
            })
            .collect();
        let saved: i64 = changed
            .iter()
            .map(|(t, now)| i64::from(self.visits[*t]) - i64::from(*now))
            .sum();
        if saved <= 0 {
            self.on[e] ^= 1 << a | 1 << b;
            self.on[f] ^= 1 << a | 1 << b;
            return false;
        }
        for (t, now) in changed {
            self.visits[t] = now;
        }
        let d = self.nodes.per_copy[e] - self.nodes.per_copy[f];
        self.nodes.load[a] -= d;
        self.nodes.load[b] += d;
        (self.nodes.held[a][s], self.nodes.held[b][t]) = (f, e);
        true
    }
}

/// Other nodes that a token visits, over all nodes that it may come from: those that are the only home of one of its
/// experts, then as few as cover what is neither at home nor there.
fn visits(token: &[usize], on: &[u64], nodes: usize) -> u32 {
    let only = |on: &u64| on.count_ones() == 1;
    let homes = || token.iter().map(|e| on[*e]);
    let sure = homes().filter(only).fold(0, |all, on| all | on);
    let left: SmallVec<[u64; 8]> = homes().filter(|on| !only(on) && on & sure == 0).collect();
    // Each of the nodes that are needed is itself where a token may come from.
    let needed = sure.count_ones() * (nodes as u32 - 1);
    if left.is_empty() {
        return needed;
    }
    let more = |source: usize| {
        let away = left.iter().copied().filter(|on| on >> source & 1 == 0);
        covering(away.collect(), nodes)
    };
    needed + (0..nodes).map(more).sum::<u32>()
}

/// Nodes taken until all sets have one of theirs, each time the one that is in the most.
fn covering(mut sets: SmallVec<[u64; 8]>, nodes: usize) -> u32 {
    let mut taken = 0;
    while sets.len() > 1 {
        let count = |d: usize| sets.iter().filter(|on| **on >> d & 1 == 1).count();
        let most = (0..nodes).max_by_key(|d| (count(*d), std::cmp::Reverse(*d)));
        let most = most.unwrap_or(0);
        sets.retain(|on| *on >> most & 1 == 0);
        taken += 1;
    }
    taken + sets.len() as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::Cover;

    /// Two ranks a node.
    fn room(nodes: usize, slots: usize) -> Room {
        Room {
            domain: (0..2 * nodes).map(|g| g / 2).collect(),
            domains: nodes,
            cover: Cover::None,
            ..Room::plain(&vec![slots; 2 * nodes])
        }
    }

    #[test]
    fn visits_by_hand() {
        // Expert 0 on node 0, 1 on 1 and 2, 2 on 2 and 3, 3 on 3.
        let on = [0b0001, 0b0110, 0b1100, 0b1000];
        assert_eq!(visits(&[0], &on, 4), 3, "from each other node");
        // From 0 and 3: one visit covers both; from 2: none; from 1: expert 2 is away.
        assert_eq!(visits(&[1, 2], &on, 4), 1 + 1 + 1);
        // Node 3 is needed, and has 2; 1 is away from 0 and 3.
        assert_eq!(visits(&[1, 2, 3], &on, 4), 3 + 2);
    }

    #[test]
    fn experts_that_are_used_together_come_together() {
        // Pairs (0, 7), (1, 6), (2, 5), (3, 4) of equal load: packing by load would part them.
        let tokens: Vec<Vec<usize>> = (0..400).map(|t| vec![t % 4, 7 - t % 4]).collect();
        let w = [100.0; 8];
        let held = assign(&w, &[1; 8], &room(4, 1), &tokens);
        for mut held in held {
            held.sort_unstable();
            assert_eq!(held[0] + held[1], 7, "{held:?}");
        }
    }

    #[test]
    fn every_slot_is_used_and_no_node_has_an_expert_twice() {
        let w: Vec<f64> = (0..10).map(|e| f64::from(e * e)).collect();
        let tokens: Vec<Vec<usize>> = (0..50).map(|t| vec![t % 10, (3 * t + 1) % 10]).collect();
        // Expert 9 is wanted five times on three nodes.
        let held = assign(&w, &[1, 1, 1, 1, 1, 1, 1, 1, 1, 5], &room(3, 3), &tokens);
        for mut held in held {
            held.sort_unstable();
            held.dedup();
            assert_eq!(held.len(), 6);
        }
    }
}
