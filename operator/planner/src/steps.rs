//! The ways to a layer's homes: from scratch, from what survived, and lazily from the previous placement.
//!
//! Each returns the layer and what every step did; shares are solved by the caller.

use std::borrow::Cow;

use crate::affinity;
use crate::bound;
use crate::connect::connect;
use crate::cover;
use crate::flow::{Flow, Workspace};
use crate::improve::improve;
use crate::layer::Layer;
use crate::pack::{fill, pack, pack_into, pack_twice};
use crate::problem::Room;
use crate::relabel::relabel;
use crate::repair::repair;
use crate::replicate::counts;
use crate::report::Step;
use crate::search::{Effort, Splits, search};
use crate::settings::{Cover, Settings};
use crate::solve::{SOLVE_GAP, SOLVE_SWEEPS};
use crate::trigger::{LEAST_GAIN, Worth};

/// How far above the mean the highest load of the local search under even split may stay.
const TARGET: f64 = 1.01;
/// Most lazy steps after a plan from scratch; each gains at least [`LEAST_GAIN`], so this is never the reason to end.
const MOST_POLISH: usize = 512;
/// How much the predicted balance may fall for the sake of the expected one.
const WORSE: f64 = 1e-3;
/// Operations that the search solves in each of its rounds under one load and under all, and most rounds.
const TRIES: usize = 12;
const FINALS: usize = 4;
const ROUNDS: usize = 64;
/// No limit on copies.
const ALL: usize = usize::MAX >> 1;

/// A layer's homes and how they came about.
#[derive(Debug, Clone)]
pub(crate) struct Homes<'a> {
    pub(crate) layer: Cow<'a, Layer>,
    /// The best splits of the layer.
    pub(crate) splits: Splits<'a>,
    /// The split to publish, if it is another than that of `splits`.
    pub(crate) exact: Option<Flow>,
    pub(crate) steps: Vec<Step>,
}

impl<'a> Homes<'a> {
    /// A layer as it stands, with a split to begin from.
    pub(crate) fn as_is(
        layer: &'a Layer,
        loads: &'a [Vec<f64>],
        split: &Flow,
        work: &mut Workspace,
    ) -> Self {
        Self {
            layer: Cow::Borrowed(layer),
            splits: Splits::from(split.clone(), loads, work),
            exact: None,
            steps: Vec::new(),
        }
    }

    /// The layer as the next window will find it: with the shares that are published, which are rounded.
    fn publish(&mut self, loads: &'a [Vec<f64>], work: &mut Workspace) {
        let mut flow = self.splits.prediction().clone();
        flow.settle(&loads[0], SOLVE_SWEEPS, SOLVE_GAP, work);
        self.splits = Splits::from(flow.rounded(&loads[0]), loads, work);
        self.exact = Some(flow);
    }
}

/// Counts, pack, cover, improve, connect, and (after an earlier placement) relabel; then lazy steps until none helps,
/// so that the next window with the same demand finds nothing to do.
pub(crate) fn from_scratch<'a>(
    room: &Room,
    loads: &'a [Vec<f64>],
    settings: &Settings,
    old: Option<&Layer>,
    work: &mut Workspace,
) -> Homes<'a> {
    let w = &loads[0];
    let counts = counts(w, room.total(), room.ranks.len(), floor(room));
    let packed = if floor(room) > 1 {
        pack_twice(w, &counts, room)
    } else {
        pack(w, &counts, room)
    };
    let most_copies = counts.iter().copied().max().unwrap_or(0);
    let mut steps = vec![Step::Pack {
        most_copies,
        deferred: packed.deferred,
    }];
    let mut layer = packed.layer;
    let scratch = layer.clone();
    close(&mut layer, &scratch, w, room, ALL, &mut steps);
    let covered = layer.clone();
    improve(&mut layer, &covered, w, room, target(&covered, w), ALL);
    steps.push(Step::Improve {
        copies: layer.moved_from(&covered),
    });
    link(&mut layer, &scratch, w, room, ALL, &mut steps);
    if let Some(old) = old {
        let (named, kept) = relabel(&layer, old, room);
        layer = named;
        steps.push(Step::Relabel { kept });
    }
    polish(layer, steps, room, loads, settings, work)
}

/// Lazy steps until none helps.
fn polish<'a>(
    layer: Layer,
    steps: Vec<Step>,
    room: &Room,
    loads: &'a [Vec<f64>],
    settings: &Settings,
    work: &mut Workspace,
) -> Homes<'a> {
    let mut homes = Homes {
        splits: Splits::of(&layer, loads, work),
        layer: Cow::Owned(layer),
        exact: None,
        steps,
    };
    for _ in 0..MOST_POLISH {
        homes.publish(loads, work);
        let covered = cover::open(room, &homes.layer).next().is_none();
        if covered && homes.splits.expected() >= settings.threshold {
            break;
        }
        let Some(mut better) = lazy(&homes, room, loads, settings, Worth::anyway(), work)
        else {
            break;
        };
        homes.steps.append(&mut better.steps);
        better.steps = homes.steps;
        homes = better;
    }
    homes
}

/// Copies that every expert must have.
fn floor(room: &Room) -> usize {
    usize::from(room.cover == Cover::All && room.domains > 1) + 1
}

/// Experts to nodes by what `tokens` use together, then to ranks inside of nodes; improve and lazy steps inside of nodes;
/// links inside of nodes first.
pub(crate) fn near<'a>(
    room: &Room,
    loads: &'a [Vec<f64>],
    settings: &Settings,
    tokens: &[Vec<usize>],
    work: &mut Workspace,
) -> Homes<'a> {
    let w = &loads[0];
    let counts = counts(w, room.total(), room.domains, floor(room));
    let nodes = affinity::assign(w, &counts, room, tokens);
    let mut layer = pack_into(w, &nodes, room);
    let scratch = layer.clone();
    let mut steps = vec![Step::Pack {
        most_copies: (0..w.len()).map(|e| layer.count(e)).max().unwrap_or(0),
        deferred: 0,
    }];
    let inside = Room {
        stay: true,
        ..room.clone()
    };
    improve(&mut layer, &scratch, w, &inside, target(&scratch, w), ALL);
    steps.push(Step::Improve {
        copies: layer.moved_from(&scratch),
    });
    for room in [&inside, room] {
        link(&mut layer, &scratch, w, room, ALL, &mut steps);
    }
    polish(layer, steps, &inside, loads, settings, work)
}

/// What survived of an earlier placement, with every expert placed and every slot used again, and as many gaps in
/// cover closed as the limit on copies allows.
pub(crate) fn from_survivors<'a>(
    survivors: &Layer,
    room: &Room,
    loads: &'a [Vec<f64>],
    settings: &Settings,
    work: &mut Workspace,
) -> Homes<'a> {
    let w = &loads[0];
    let mut layer = survivors.clone();
    let done = repair(&mut layer, w, room);
    let filled = fill(&mut layer, w, room);
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
    let whole = layer.clone();
    let limit = settings.max_moves_per_layer;
    close(&mut layer, &whole, w, room, limit, &mut steps);
    Homes {
        splits: Splits::of(&layer, loads, work),
        layer: Cow::Owned(layer),
        exact: None,
        steps,
    }
}

/// The lazy step: close gaps in cover, connect, then search, within the limit on copies together. `None` if no gap is
/// closed and nothing found gains enough of expected balance.
///
/// Connecting costs copies that the search may need more: if both together gain nothing, the search goes alone.
pub(crate) fn lazy<'a>(
    now: &Homes<'a>,
    room: &Room,
    loads: &'a [Vec<f64>],
    settings: &Settings,
    worth: Worth,
    work: &mut Workspace,
) -> Option<Homes<'a>> {
    let (origin, w): (&Layer, _) = (&now.layer, &loads[0]);
    let limit = settings.max_moves_per_layer;
    let mut layer = origin.clone();
    let mut steps = Vec::new();
    let mended = close(&mut layer, origin, w, room, limit, &mut steps);
    let covered = layer.clone();
    let mut ways = vec![(covered, steps.clone())];
    if link(&mut layer, origin, w, room, limit, &mut steps) > 0 {
        ways.insert(0, (layer, steps));
    }
    for (layer, steps) in ways {
        let homes = searched(layer, steps, now, room, loads, settings, work);
        let gain = homes.splits.expected() - now.splits.expected();
        let falls = now.splits.predicted() - homes.splits.predicted();
        let copies = homes.layer.moved_from(origin);
        let gains = worth.is_reached(gain, copies) && falls <= WORSE;
        if *homes.layer != *origin && (mended > 0 || gains) {
            return Some(homes);
        }
        homes.splits.retire(work);
    }
    None
}

fn searched<'a>(
    mut layer: Layer,
    mut steps: Vec<Step>,
    now: &Homes<'a>,
    room: &Room,
    loads: &'a [Vec<f64>],
    settings: &Settings,
    work: &mut Workspace,
) -> Homes<'a> {
    let mut splits = if layer == *now.layer {
        now.splits.clone()
    } else {
        Splits::of(&layer, loads, work)
    };
    let start = layer.clone();
    let effort = Effort {
        limit: settings.max_moves_per_layer,
        enough: settings.threshold,
        gain: LEAST_GAIN,
        tries: TRIES,
        finals: FINALS,
        rounds: ROUNDS,
    };
    search(&mut layer, &now.layer, room, &mut splits, effort, work);
    let copies = layer.moved_from(&start);
    if copies > 0 {
        steps.push(Step::Improve { copies });
    }
    Homes {
        layer: Cow::Owned(layer),
        splits,
        exact: None,
        steps,
    }
}

/// Closes gaps in cover; returns the copies moved.
fn close(
    layer: &mut Layer,
    origin: &Layer,
    w: &[f64],
    room: &Room,
    limit: usize,
    steps: &mut Vec<Step>,
) -> usize {
    if cover::open(room, layer).next().is_none() {
        return 0;
    }
    let (copies, open) = cover::mend(layer, origin, w, room, limit);
    steps.push(Step::Cover { copies, open });
    copies
}

/// Joins islands; returns the swaps made.
fn link(
    layer: &mut Layer,
    origin: &Layer,
    w: &[f64],
    room: &Room,
    limit: usize,
    steps: &mut Vec<Step>,
) -> usize {
    let before = layer.components();
    if before <= layer.least_components() {
        return 0;
    }
    let swaps = connect(layer, origin, w, room, limit);
    if swaps > 0 {
        steps.push(Step::Connect {
            swaps,
            before,
            after: layer.components(),
        });
    }
    swaps
}

fn target(layer: &Layer, w: &[f64]) -> f64 {
    TARGET * bound::any_placement(w, layer.ranks(), layer.copies())
}
