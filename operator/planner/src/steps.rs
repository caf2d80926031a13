//! The ways to a layer's homes: from scratch, from what survived, and lazily from the previous placement.
//!
//! Each returns the layer and what every step did; shares are solved by the caller.

use crate::bound;
use crate::connect::connect;
use crate::guided::follow_split;
use crate::improve::improve;
use crate::layer::Layer;
use crate::pack::{fill, pack};
use crate::problem::Room;
use crate::relabel::relabel;
use crate::repair::repair;
use crate::replicate::counts;
use crate::report::Step;
use crate::settings::Settings;
use crate::solve::Solved;
use crate::trigger::LEAST_GAIN;

/// How far above the mean the highest load of the local search may stay.
const TARGET: f64 = 1.01;
/// Most lazy steps after a plan from scratch; each gains at least [`LEAST_GAIN`], so this is never the reason to end.
const MOST_POLISH: usize = 512;

/// A layer's homes and how they came about.
#[derive(Debug, Clone)]
pub(crate) struct Homes {
    pub(crate) layer: Layer,
    /// The best split of the layer.
    pub(crate) solved: Solved,
    pub(crate) steps: Vec<Step>,
}

/// Counts, pack, improve, connect, and (after an earlier placement) relabel; then lazy steps until none helps, so
/// that the next window with the same demand finds nothing to do.
pub(crate) fn from_scratch(
    room: &Room,
    w: &[f64],
    settings: &Settings,
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
    let mut solved = layer.best_split(room, w);
    for _ in 0..MOST_POLISH {
        if solved.balance() >= settings.threshold {
            break;
        }
        let Some(better) = lazy(&layer, room, w, solved.balance(), settings) else {
            break;
        };
        (layer, solved) = (better.layer, better.solved);
        steps.extend(better.steps);
    }
    if let Some(old) = old {
        let (named, kept) = relabel(&layer, old, &room.slots);
        (solved, layer) = (named.best_split(room, w), named);
        steps.push(Step::Relabel { kept });
    }
    Homes {
        layer,
        solved,
        steps,
    }
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
    Homes {
        solved: layer.best_split(room, w),
        layer,
        steps,
    }
}

/// The lazy step: improve, then connect, within `limit` copies together. `q0` is the balance of the best split now.
/// `None` if no way found gains more than [`LEAST_GAIN`].
///
/// Local search judges even split and may cut links that the best split needs, and connecting costs copies as well.
/// A way that ends with more components than `origin` is not taken: what a first plan linked stays linked.
/// So the limit is divided in three ways: none of it for the search, half, all. The first that reaches the
/// threshold wins, since it moves least; without one the best, where more copies must gain [`LEAST_GAIN`] more, and
/// from there a search judged by the split goes on with what is left of the limit.
pub(crate) fn lazy(
    origin: &Layer,
    room: &Room,
    w: &[f64],
    q0: f64,
    settings: &Settings,
) -> Option<Homes> {
    let limit = settings.max_moves_per_layer;
    let mut divisions = vec![0, limit / 2, limit];
    divisions.dedup();
    let most_components = origin.components();
    let (mut best, mut reached): (Option<Homes>, f64) = (None, q0);
    for search in divisions {
        let (layer, steps) = improve_then_connect(origin, w, search, limit);
        if layer == *origin || layer.components() > most_components {
            continue;
        }
        let solved = layer.best_split(room, w);
        if solved.balance() <= reached + LEAST_GAIN {
            continue;
        }
        reached = solved.balance();
        best = Some(Homes {
            layer,
            solved,
            steps,
        });
        if reached >= settings.threshold {
            return best;
        }
    }
    guided(origin, best, room, w, reached, settings)
}

/// Goes on from the best way found, or from `origin`, judged by the split itself.
fn guided(
    origin: &Layer,
    best: Option<Homes>,
    room: &Room,
    w: &[f64],
    reached: f64,
    settings: &Settings,
) -> Option<Homes> {
    let (mut layer, mut steps) = match &best {
        Some(homes) => (homes.layer.clone(), homes.steps.clone()),
        None => (origin.clone(), Vec::new()),
    };
    let start = layer.clone();
    let limit = settings.max_moves_per_layer;
    let solved = follow_split(&mut layer, origin, room, w, limit, settings.threshold);
    if layer == start || solved.balance() <= reached + LEAST_GAIN {
        return best;
    }
    steps.push(Step::Improve {
        copies: layer.moved_from(&start),
    });
    Some(Homes {
        layer,
        solved,
        steps,
    })
}

fn improve_then_connect(
    origin: &Layer,
    w: &[f64],
    search: usize,
    limit: usize,
) -> (Layer, Vec<Step>) {
    let mut layer = origin.clone();
    improve(&mut layer, origin, w, target(origin, w), search);
    let copies = layer.moved_from(origin);
    let before = layer.components();
    let swaps = connect(&mut layer, origin, w, limit);
    let after = layer.components();
    let mut steps = Vec::new();
    if copies > 0 {
        steps.push(Step::Improve { copies });
    }
    if swaps > 0 {
        steps.push(Step::Connect {
            swaps,
            before,
            after,
        });
    }
    (layer, steps)
}

fn target(layer: &Layer, w: &[f64]) -> f64 {
    TARGET * bound::any_placement(w, layer.ranks(), layer.copies())
}
