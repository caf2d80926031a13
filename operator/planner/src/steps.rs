//! The ways to a layer's homes: from scratch, from what survived, and lazily from the previous placement.
//!
//! Each returns the layer and what every step did; shares are solved by the caller.

use crate::bound;
use crate::connect::connect;
use crate::improve::improve;
use crate::layer::Layer;
use crate::pack::{fill, pack};
use crate::problem::Room;
use crate::relabel::relabel;
use crate::repair::repair;
use crate::replicate::counts;
use crate::report::Step;
use crate::split::{SOLVE_GAP, SOLVE_SWEEPS, solve};

/// How far above the mean the highest load of the local search may stay.
const TARGET: f64 = 1.01;
/// Least gain in balance that is worth moving a copy for.
pub(crate) const LEAST_GAIN: f64 = 0.002;
/// Most lazy steps after a plan from scratch; each gains at least [`LEAST_GAIN`], so this is never the reason to end.
const MOST_POLISH: usize = 512;

/// A layer's homes and how they came about.
#[derive(Debug, Clone)]
pub(crate) struct Homes {
    pub(crate) layer: Layer,
    pub(crate) steps: Vec<Step>,
}

/// Balance of the best split of this layer under `w`.
pub(crate) fn best_balance(layer: &Layer, room: &Room, w: &[f64]) -> f64 {
    solve(&layer.table(room), w, SOLVE_SWEEPS, SOLVE_GAP).balance()
}

/// Counts, pack, improve, connect, and (after an earlier placement) relabel; then lazy steps until none helps, so
/// that the next window with the same demand finds nothing to do.
pub(crate) fn from_scratch(
    room: &Room,
    w: &[f64],
    threshold: f64,
    limit: usize,
    old: Option<&Layer>,
) -> Homes {
    let counts = counts(w, room.total(), room.ranks.len());
    let packed = pack(w, &counts, &room.slots);
    let most_copies = counts.iter().copied().max().unwrap_or(0);
    let mut steps = vec![Step::Pack {
        most_copies,
        deferred: packed.deferred,
    }];
    let mut layer = packed.layer;
    let scratch = layer.clone();
    improve(
        &mut layer,
        &scratch,
        w,
        target(&scratch, w),
        usize::MAX >> 1,
    );
    steps.push(Step::Improve {
        copies: layer.moved_from(&scratch),
    });
    let before = layer.components();
    let swaps = connect(&mut layer, &scratch, w, usize::MAX >> 1);
    steps.push(Step::Connect {
        swaps,
        before,
        after: layer.components(),
    });
    for _ in 0..MOST_POLISH {
        let q0 = best_balance(&layer, room, w);
        if q0 >= threshold {
            break;
        }
        let Some(better) = lazy(&layer, room, w, q0, limit) else {
            break;
        };
        layer = better.layer;
        steps.extend(better.steps);
    }
    if let Some(old) = old {
        let (named, kept) = relabel(&layer, old, &room.slots);
        layer = named;
        steps.push(Step::Relabel { kept });
    }
    Homes { layer, steps }
}

/// What survived of an earlier placement, with every expert placed and every slot used again.
pub(crate) fn from_survivors(survivors: &Layer, room: &Room, w: &[f64]) -> Homes {
    let mut layer = survivors.clone();
    let done = repair(&mut layer, w, &room.slots);
    let filled = fill(&mut layer, w, &room.slots);
    let mut steps = Vec::new();
    if done.orphans + done.dropped > 0 {
        steps.push(Step::Repair {
            orphans: done.orphans,
            dropped: done.dropped,
        });
    }
    if filled > 0 {
        steps.push(Step::Fill { copies: filled });
    }
    Homes { layer, steps }
}

/// The lazy step: improve, then connect, within `limit` copies together. `q0` is the balance of the best split now.
/// `None` if no way found gains more than [`LEAST_GAIN`].
///
/// Local search judges even split and may cut links that the best split needs, and connecting costs copies as well.
/// So the limit is tried in three divisions: all of it for the search, half of it, none.
pub(crate) fn lazy(
    origin: &Layer,
    room: &Room,
    w: &[f64],
    q0: f64,
    limit: usize,
) -> Option<Homes> {
    let mut best: Option<(f64, Homes)> = None;
    let mut shares = vec![limit, limit / 2, 0];
    shares.dedup();
    for share in shares {
        let homes = improve_then_connect(origin, w, share, limit);
        if homes.layer == *origin {
            continue;
        }
        let q1 = best_balance(&homes.layer, room, w);
        if best.as_ref().is_none_or(|(q, _)| q1 > *q) {
            best = Some((q1, homes));
        }
    }
    best.filter(|(q1, _)| *q1 > q0 + LEAST_GAIN)
        .map(|(_, homes)| homes)
}

fn improve_then_connect(origin: &Layer, w: &[f64], share: usize, limit: usize) -> Homes {
    let mut layer = origin.clone();
    improve(&mut layer, origin, w, target(origin, w), share);
    let copies = layer.moved_from(origin);
    let before = layer.components();
    let swaps = connect(&mut layer, origin, w, limit);
    let mut steps = Vec::new();
    if copies > 0 {
        steps.push(Step::Improve { copies });
    }
    if swaps > 0 {
        steps.push(Step::Connect {
            swaps,
            before,
            after: layer.components(),
        });
    }
    Homes { layer, steps }
}

fn target(layer: &Layer, w: &[f64]) -> f64 {
    TARGET * bound::any_placement(w, layer.ranks(), layer.copies())
}
