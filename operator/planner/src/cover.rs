//! Cover: copies in two failure domains, so that the loss of any one leaves a copy.
//!
//! The rule is kept by every step: an operation may not leave an expert with fewer domains than it must have, unless
//! it had no more before. [`mend`] closes what is open, the heaviest expert first.

use crate::layer::{Layer, Operation, least};
use crate::problem::Room;
use crate::settings::Cover;

/// Domains that an expert's copies must span, with `copies` of them.
const fn must_span(cover: Cover, domains: usize, copies: usize) -> usize {
    let wanted = match cover {
        Cover::None => 0,
        Cover::Spread => {
            if copies < 2 {
                copies
            } else {
                2
            }
        }
        Cover::All => 2,
    };
    if wanted < domains { wanted } else { domains }
}

/// Domains that copies on `hosts` lack.
fn lack(room: &Room, hosts: impl Iterator<Item = usize>) -> usize {
    let (mut first, mut span, mut copies) = (usize::MAX, 0, 0);
    for domain in hosts.map(|g| room.domain[g]) {
        copies += 1;
        if span == 0 || (span == 1 && domain != first) {
            first = domain;
            span += 1;
        }
    }
    must_span(room.cover, room.domains, copies).saturating_sub(span)
}

/// Domains that an expert lacks now.
pub(crate) fn lacks(room: &Room, layer: &Layer, e: usize) -> usize {
    if room.cover == Cover::None {
        return 0;
    }
    lack(room, layer.hosts(e).iter().copied())
}

/// Experts that lack a domain.
pub(crate) fn open(room: &Room, layer: &Layer) -> impl Iterator<Item = usize> {
    (0..layer.experts()).filter(move |e| lacks(room, layer, *e) > 0)
}

/// Whether no expert lacks more after an operation than before, and, where copies are to stay, none leaves its domain.
pub(crate) fn allows(room: &Room, layer: &Layer, op: Operation) -> bool {
    if room.stay {
        let domain = |at: (usize, usize)| room.domain[at.0];
        return match op {
            Operation::Swap { from, to } => domain(from) == domain(to),
            Operation::Overwrite { .. } => false,
        };
    }
    if room.cover == Cover::None {
        return true;
    }
    let moves = |e: usize, from: usize, to: usize| {
        if room.domain[from] == room.domain[to] {
            return true;
        }
        let hosts = layer.hosts(e).iter();
        let after = hosts.map(|g| if *g == from { to } else { *g });
        lack(room, after) <= lacks(room, layer, e)
    };
    match op {
        Operation::Swap { from, to } => {
            let (e, f) = (layer.slots(from.0)[from.1], layer.slots(to.0)[to.1]);
            moves(e, from.0, to.0) && moves(f, to.0, from.0)
        }
        Operation::Overwrite { expert, at } => {
            let f = layer.slots(at.0)[at.1];
            allows_loss(room, layer, f, at.0) && allows_copy(room, layer, expert, at.0)
        }
    }
}

/// Whether the copy of e on g may go without another in its place.
pub(crate) fn allows_loss(room: &Room, layer: &Layer, e: usize, g: usize) -> bool {
    let left = layer.hosts(e).iter().copied().filter(|q| *q != g);
    !room.stay && lack(room, left) <= lacks(room, layer, e)
}

/// Whether a further copy of e may go to g: two copies in one domain cover nothing.
pub(crate) fn allows_copy(room: &Room, layer: &Layer, e: usize, g: usize) -> bool {
    let after = layer.hosts(e).iter().copied().chain([g]);
    lack(room, after) <= lacks(room, layer, e)
}

/// Gives experts that lack a domain a copy in another, the heaviest first, while at most `limit` copies differ from
/// `origin`: one of its copies changes place with a slot there, or, if it has only one, it overwrites a redundant copy
/// there. Each time the operation that leaves the least maximum of the loads touched; O(open · R). Returns the copies
/// moved and the experts left open.
pub(crate) fn mend(
    layer: &mut Layer,
    origin: &Layer,
    w: &[f64],
    room: &Room,
    limit: usize,
) -> (usize, usize) {
    let mut waiting: Vec<usize> = open(room, layer).collect();
    waiting.sort_by(|a, b| w[*b].total_cmp(&w[*a]).then(a.cmp(b)));
    let (before, mut left) = (layer.moved_from(origin), 0);
    for e in waiting {
        if lacks(room, layer, e) == 0 {
            continue; // Closed by a swap for another.
        }
        let spare = limit as isize - layer.moved_from(origin) as isize;
        match closing(layer, origin, w, room, e, spare) {
            Some(op) => layer.apply(op),
            None => left += 1,
        }
    }
    (layer.moved_from(origin).saturating_sub(before), left)
}

fn closing(
    layer: &Layer,
    origin: &Layer,
    w: &[f64],
    room: &Room,
    e: usize,
    spare: isize,
) -> Option<Operation> {
    let loads = layer.even_loads(w);
    let u = |x: usize| layer.per_copy(w, x);
    let single = layer.count(e) < 2;
    let mut best: Option<(f64, Operation)> = None;
    for &g in layer.hosts(e) {
        let Some(s) = layer.slots(g).iter().position(|x| *x == e) else {
            continue;
        };
        let elsewhere = |h: &usize| room.domain[*h] != room.domain[g] && !layer.has(*h, e);
        for h in (0..layer.ranks()).filter(elsewhere) {
            for (t, f) in layer.slots(h).iter().copied().enumerate() {
                let (op, v) = if single {
                    let at = Operation::Overwrite {
                        expert: e,
                        at: (h, t),
                    };
                    (
                        at,
                        (loads[h] - u(f) + w[e] / 2.0)
                            .max(w[f] / (layer.count(f) as f64 - 1.0).max(1.0)),
                    )
                } else {
                    let d = u(e) - u(f);
                    (
                        Operation::Swap {
                            from: (g, s),
                            to: (h, t),
                        },
                        (loads[g] - d).max(loads[h] + d),
                    )
                };
                if best.as_ref().is_some_and(|b| least(&(v, op), b).is_ge()) {
                    continue;
                }
                if !layer.doubles(op)
                    && layer.cost(origin, op) <= spare
                    && allows(room, layer, op)
                {
                    best = Some((v, op));
                }
            }
        }
    }
    best.map(|(_, op)| op)
}
