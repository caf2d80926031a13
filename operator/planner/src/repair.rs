//! Experts without a copy first: after ranks were lost, or slots became fewer.

use crate::cover;
use crate::layer::Operation;
use crate::layer::{Layer, least};
use crate::pack::roomiest;
use crate::problem::Room;

/// What a repair did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Repaired {
    /// Experts that had no copy.
    pub(crate) orphans: usize,
    /// Copies that found no slot any more because a rank has fewer.
    pub(crate) dropped: usize,
}

/// Gives every expert a copy again. Slots beyond `slots[g]` are given up, the least needed first; each orphan,
/// heaviest first, goes to a free slot of the least loaded rank, else over the redundant copy that leaves the
/// least maximum of the loads touched. Needs at least as many slots as experts.
pub(crate) fn repair(layer: &mut Layer, w: &[f64], room: &Room) -> Repaired {
    let dropped = shrink(layer, w, &room.slots);
    let mut orphans: Vec<usize> = (0..w.len()).filter(|e| layer.count(*e) == 0).collect();
    orphans.sort_by(|a, b| w[*b].total_cmp(&w[*a]).then(a.cmp(b)));
    for orphan in &orphans {
        place(layer, w, room, *orphan);
    }
    Repaired {
        orphans: orphans.len(),
        dropped,
    }
}

/// Gives up slots that do not exist any more: redundant copies with the least load, then the lightest experts.
fn shrink(layer: &mut Layer, w: &[f64], slots: &[usize]) -> usize {
    let mut dropped = 0;
    for (g, room) in slots.iter().enumerate() {
        while layer.slots(g).len() > *room {
            let held = layer.slots(g).iter().enumerate();
            let choice = held
                .map(|(s, e)| (layer.per_copy(w, *e), (layer.count(*e) < 2, s)))
                .min_by(|a, b| a.1.0.cmp(&b.1.0).then_with(|| least(a, b)));
            let Some((_, (_, s))) = choice else {
                break;
            };
            layer.remove(g, s);
            dropped += 1;
        }
    }
    dropped
}

fn place(layer: &mut Layer, w: &[f64], room: &Room, orphan: usize) {
    let loads = layer.even_loads(w);
    if let Some(g) = roomiest(layer, &room.slots, &loads, orphan, |_| true) {
        layer.add(g, orphan);
        return;
    }
    // An orphan comes first, but where there is a choice no cover is broken for it.
    let mut best: Option<(bool, (f64, (usize, usize)))> = None;
    for (g, load) in loads.iter().enumerate() {
        for (s, x) in layer.slots(g).iter().copied().enumerate() {
            let copies = layer.count(x) as f64;
            if copies < 2.0 {
                continue;
            }
            let left = w[x] / (copies - 1.0);
            let value = (left.max(load - w[x] / copies + w[orphan]), (g, s));
            let over = Operation::Overwrite {
                expert: orphan,
                at: (g, s),
            };
            let breaks = !cover::allows(room, layer, over);
            let less = |b: &(bool, (f64, (usize, usize)))| {
                breaks.cmp(&b.0).then_with(|| least(&value, &b.1)).is_lt()
            };
            if best.as_ref().is_none_or(less) {
                best = Some((breaks, value));
            }
        }
    }
    // With at least as many slots as experts and one of them missing, some expert has two copies.
    if let Some((_, (_, (g, s)))) = best {
        layer.overwrite(g, s, orphan);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orphans_replace_redundant_copies() {
        // Expert 3 is gone; experts 0 and 1 have two copies each.
        let mut layer = Layer::from_slots(&[vec![0, 1], vec![0, 2], vec![1, 0]], 4);
        let done = repair(&mut layer, &[9.0, 2.0, 3.0, 4.0], &Room::plain(&[2, 2, 2]));
        assert_eq!(
            done,
            Repaired {
                orphans: 1,
                dropped: 0
            }
        );
        assert!((0..4).all(|e| layer.count(e) > 0));
        assert_eq!(layer.copies(), 6);
    }

    #[test]
    fn fewer_slots_give_up_redundant_copies_first() {
        let mut layer = Layer::from_slots(&[vec![0, 1, 2], vec![2, 3]], 4);
        let done = repair(&mut layer, &[1.0, 1.0, 9.0, 1.0], &Room::plain(&[2, 2]));
        assert_eq!(
            done,
            Repaired {
                orphans: 0,
                dropped: 1
            }
        );
        assert_eq!(layer.all_slots(), [[0, 1], [2, 3]]);
    }

    #[test]
    fn an_orphan_takes_a_free_slot_if_there_is_one() {
        let mut layer = Layer::from_slots(&[vec![0, 1], vec![]], 3);
        repair(&mut layer, &[1.0, 1.0, 1.0], &Room::plain(&[2, 2]));
        assert_eq!(layer.slots(1), [2]);
    }
}
