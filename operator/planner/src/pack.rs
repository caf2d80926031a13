//! Copies to ranks: heaviest first, each to the least loaded rank with room that lacks the expert.

use crate::cover;
use crate::layer::{Layer, least};
use crate::problem::Room;

/// A packed layer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Packed {
    pub(crate) layer: Layer,
    /// Copies for which every rank with room already held the expert; their slots went to other experts.
    pub(crate) deferred: usize,
}

/// Packs `counts[e]` copies of each expert into `slots[g]` slots of each rank. Every slot is used, as long as
/// `slots[g]` is at most the number of experts; every expert with a count gets at least one.
pub(crate) fn pack(w: &[f64], counts: &[usize], room: &Room) -> Packed {
    let slots = &room.slots;
    let mut layer = Layer::empty(slots.len(), w.len());
    let mut loads = vec![0.0; slots.len()];
    let mut deferred = 0;
    let per_copy = |e: usize| w[e] / counts[e].max(1) as f64;
    let mut order: Vec<usize> = (0..w.len()).collect();
    order.sort_by(|a, b| per_copy(*b).total_cmp(&per_copy(*a)).then(a.cmp(b)));
    for e in order {
        for _ in 0..counts[e] {
            match roomiest(&layer, slots, &loads, e, |_| true) {
                Some(g) => {
                    layer.add(g, e);
                    loads[g] += per_copy(e);
                }
                None => deferred += 1,
            }
        }
    }
    fill(&mut layer, w, room);
    Packed { layer, deferred }
}

/// The same where every expert is to be in two domains.
///
/// Heaviest first, the two copies of an expert would come to the two lightest ranks, which then weigh the same and are
/// the next expert's two as well: pairs of ranks that hold the same, and no split levels pairs. So all first copies are
/// packed, then all second ones, each in another domain, on the rank that will weigh the least if the domain of the first
/// is lost, if that can be one that shares no expert with the first one's rank yet; then the rest.
pub(crate) fn pack_twice(w: &[f64], counts: &[usize], room: &Room) -> Packed {
    let mut twice = Twice {
        layer: Layer::empty(room.slots.len(), w.len()),
        loads: vec![0.0; room.slots.len()],
        inherits: vec![0.0; room.slots.len() * room.domains],
        room,
    };
    let mut deferred = 0;
    let per_copy = |e: usize| w[e] / counts[e].max(1) as f64;
    let mut order: Vec<usize> = (0..w.len()).collect();
    order.sort_by(|a, b| per_copy(*b).total_cmp(&per_copy(*a)).then(a.cmp(b)));
    let most = counts.iter().copied().max().unwrap_or(0);
    for copy in 0..most {
        for e in order.iter().copied().filter(|e| counts[*e] > copy) {
            if !twice.place(e, per_copy(e)) {
                deferred += 1;
            }
        }
    }
    let mut layer = twice.layer;
    fill(&mut layer, w, room);
    Packed { layer, deferred }
}

struct Twice<'a> {
    layer: Layer,
    loads: Vec<f64>,
    /// `inherits[d · ranks + g]`: what g carries of experts whose only other copy is in domain d.
    inherits: Vec<f64>,
    room: &'a Room,
}

impl Twice<'_> {
    /// Gives e one more copy of this load; whether a rank had room.
    fn place(&mut self, e: usize, load: f64) -> bool {
        let (ranks, domain) = (self.loads.len(), &self.room.domain);
        let first = match *self.layer.hosts(e) {
            [first] => Some(first),
            _ => None,
        };
        let fit = |g: usize| first.is_none_or(|first| domain[g] != domain[first]);
        // Two ranks that share two experts have no use of the second link, and a hot expert's ranks no room for it.
        let meets = |g: usize| {
            let held = first.map_or(&[][..], |first| self.layer.slots(first));
            held.iter().any(|x| self.layer.has(g, *x))
        };
        let once_lost: Vec<f64> = match first {
            Some(first) => {
                let inherits = &self.inherits[domain[first] * ranks..];
                self.loads
                    .iter()
                    .zip(inherits)
                    .map(|(x, y)| x + y)
                    .collect()
            }
            None => self.loads.clone(),
        };
        let slots = &self.room.slots;
        let new = roomiest(&self.layer, slots, &once_lost, e, |g| fit(g) && !meets(g));
        let elsewhere = || roomiest(&self.layer, slots, &once_lost, e, fit);
        let anywhere = || roomiest(&self.layer, slots, &self.loads, e, |_| true);
        let Some(g) = new.or_else(elsewhere).or_else(anywhere) else {
            return false;
        };
        if let Some(first) = first {
            self.inherits[domain[first] * ranks + g] += load;
            self.inherits[domain[g] * ranks + first] += load;
        }
        self.layer.add(g, e);
        self.loads[g] += load;
        true
    }
}

/// Packs the experts of each node (a failure domain), every one once, onto its ranks.
pub(crate) fn pack_into(w: &[f64], nodes: &[Vec<usize>], room: &Room) -> Layer {
    let mut counts = vec![0_u32; w.len()];
    nodes.iter().flatten().for_each(|e| counts[*e] += 1);
    let per_copy = |e: usize| w[e] / f64::from(counts[e]);
    let mut layer = Layer::empty(room.slots.len(), w.len());
    let mut loads = vec![0.0; room.slots.len()];
    for (d, held) in nodes.iter().enumerate() {
        let mut order = held.clone();
        order.sort_by(|a, b| per_copy(*b).total_cmp(&per_copy(*a)).then(a.cmp(b)));
        for e in order {
            let here = |g: usize| room.domain[g] == d;
            if let Some(g) = roomiest(&layer, &room.slots, &loads, e, here) {
                layer.add(g, e);
                loads[g] += per_copy(e);
            }
        }
    }
    fill(&mut layer, w, room);
    layer
}

/// The least loaded rank that has a free slot, lacks e and is `fit`.
pub(crate) fn roomiest(
    layer: &Layer,
    slots: &[usize],
    loads: &[f64],
    e: usize,
    fit: impl Fn(usize) -> bool,
) -> Option<usize> {
    (0..slots.len())
        .filter(|g| fit(*g) && layer.slots(*g).len() < slots[*g] && !layer.has(*g, e))
        .map(|g| (loads[g], g))
        .min_by(least)
        .map(|(_, g)| g)
}

/// Gives every free slot a copy: each time the expert with the largest load per copy that some rank with room
/// lacks, on the least loaded of these, in another domain than its only copy if that can be. Returns the copies added.
pub(crate) fn fill(layer: &mut Layer, w: &[f64], room: &Room) -> usize {
    let slots = &room.slots;
    let free: usize = (0..slots.len())
        .map(|g| slots[g].saturating_sub(layer.slots(g).len()))
        .sum();
    if free == 0 {
        return 0;
    }
    let mut loads = layer.even_loads(w);
    for added in 0..free {
        let mut by_heat: Vec<usize> = (0..w.len()).collect();
        by_heat.sort_by(|a, b| {
            layer
                .per_copy(w, *b)
                .total_cmp(&layer.per_copy(w, *a))
                .then(a.cmp(b))
        });
        let place = |e: usize, strict: bool| {
            let fit = |g: usize| !strict || cover::allows_copy(room, layer, e, g);
            roomiest(layer, slots, &loads, e, fit).map(|g| (g, e))
        };
        let choice = by_heat
            .iter()
            .find_map(|e| place(*e, true))
            .or_else(|| by_heat.iter().find_map(|e| place(*e, false)));
        let Some((g, e)) = choice else {
            return added;
        };
        layer.add(g, e);
        loads = layer.even_loads(w);
    }
    free
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heaviest_first_to_the_lightest() {
        let packed = pack(&[5.0, 4.0, 3.0, 2.0], &[1; 4], &Room::plain(&[2, 2]));
        assert_eq!(packed.layer.all_slots(), [[0, 3], [1, 2]]);
        assert_eq!(packed.deferred, 0);
    }

    #[test]
    fn slots_of_different_sizes_are_all_used_without_doubles() {
        // Rank 0 must hold everything; the two copies that are left go to the small ranks.
        let packed = pack(
            &[9.0, 8.0, 1.0, 1.0],
            &[3, 1, 1, 1],
            &Room::plain(&[4, 1, 1]),
        );
        assert_eq!(packed.layer.copies(), 6);
        assert_eq!(packed.layer.slots(0).len(), 4);
        let experts: Vec<usize> = (0..4).map(|e| packed.layer.count(e)).collect();
        assert_eq!(experts, [3, 1, 1, 1]);
    }

    #[test]
    fn a_copy_that_nobody_may_take_leaves_its_slot_to_another() {
        // Expert 0 is wanted three times on two ranks.
        let packed = pack(&[9.0, 1.0], &[3, 1], &Room::plain(&[2, 2]));
        assert_eq!((packed.deferred, packed.layer.copies()), (1, 4));
        assert_eq!(packed.layer.count(1), 2);
    }
}
