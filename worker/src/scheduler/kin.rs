//! Which waiting sequence adds the fewest experts to the batch that runs. Pure.
//!
//! ```text
//!  added(r) = mean over layers of Σ_e p(r,e) · Π_{j runs} (1 − p(j,e))
//! ```
//!
//! `p` is the probability that a token of a sequence uses an expert: of its own histogram once that has rows enough, else
//! of the hint that came with it. This is Read-ME's batching by expert (arXiv 2410.19123) for models whose tokens use
//! several experts, without its queues by expert: the one that adds least goes next, and the scheduler bounds how long
//! anybody may be passed.

use crate::sequence::Sequence;

/// Rows from which a sequence's own histogram says more than a hint.
const ROWS: f32 = 32.0;

/// What is expected of a sequence's experts: on some MoE layers, the share of its tokens that use each expert.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Hint {
    /// MoE layers, ascending.
    pub layers: Vec<u32>,
    /// Experts of each, layer-major: the square root of the share, 255 for 1.
    pub roots: Vec<u8>,
}

impl Hint {
    fn experts(&self) -> usize {
        self.roots.len() / self.layers.len().max(1)
    }

    fn is_like(&self, other: &Self) -> bool {
        self.layers == other.layers && self.roots.len() == other.roots.len()
    }
}

/// Of these sequences, the first of those that add least to what runs. `None` if nothing runs, or nothing is known of the
/// waiting ones.
pub(super) fn fittest<'a>(
    waiting: impl Iterator<Item = &'a Sequence>,
    running: impl Iterator<Item = &'a Sequence>,
    top_k: usize,
) -> Option<usize> {
    let waiting: Vec<&Sequence> = waiting.collect();
    // Hints of one shape are compared; those of another gateway's making say nothing here.
    let shape = waiting
        .iter()
        .find_map(|sequence| sequence.request.hint.as_ref())?;
    let mut unused = vec![1.0_f32; shape.roots.len()];
    let mut known = false;
    for sequence in running {
        if let Some(likely) = likely(sequence, shape, top_k) {
            known = true;
            for (unused, p) in unused.iter_mut().zip(likely) {
                *unused *= 1.0 - p;
            }
        }
    }
    if !known {
        return None;
    }
    let added = |sequence: &&Sequence| -> Option<f32> {
        let likely = likely(sequence, shape, top_k)?;
        Some(
            likely
                .iter()
                .zip(&unused)
                .map(|(p, unused)| p * unused)
                .sum(),
        )
    };
    let added: Vec<Option<f32>> = waiting.iter().map(added).collect();
    let told: Vec<f32> = added.iter().copied().flatten().collect();
    // One that nothing is known of is taken to be as the others are.
    let mean = told.iter().sum::<f32>() / told.len().max(1) as f32;
    let of = |at: usize| added[at].unwrap_or(mean);
    (0..waiting.len()).min_by(|a, b| of(*a).total_cmp(&of(*b)))
}

/// Probabilities on the layers of `shape`.
fn likely(sequence: &Sequence, shape: &Hint, top_k: usize) -> Option<Vec<f32>> {
    let experts = shape.experts();
    let counts = &sequence.trace.signature;
    let of_layer = |layer: &u32| {
        let from = *layer as usize * experts;
        counts.get(from..from + experts)
    };
    let first = shape.layers.first().and_then(of_layer);
    let rows = first.map_or(0.0, |counts| {
        counts.iter().map(|count| *count as f32).sum::<f32>() / top_k.max(1) as f32
    });
    if rows >= ROWS {
        let layers: Option<Vec<&[u32]>> = shape.layers.iter().map(of_layer).collect();
        let share = |count: &u32| probability(*count as f32 / rows);
        return Some(layers?.into_iter().flatten().map(share).collect());
    }
    let hint = sequence
        .request
        .hint
        .as_ref()
        .filter(|hint| hint.is_like(shape))?;
    let share = |root: &u8| {
        let root = f32::from(*root) / 255.0;
        probability(root * root)
    };
    Some(hint.roots.iter().map(share).collect())
}

/// A share, kept away from the certainty that a few tokens cannot give.
fn probability(share: f32) -> f32 {
    0.98_f32.mul_add(share, 0.002).clamp(1e-4, 0.98)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sequence::SequenceId;
    use crate::sequence::tests::request;

    /// Of two layers with four experts, top-1: it uses `expert` only, as a hint or as its own histogram says.
    fn uses(id: u64, hinted: Option<usize>, seen: Option<usize>) -> Sequence {
        let mut request = request(vec![1], 4);
        request.hint = hinted.map(|expert| Hint {
            layers: vec![0, 1],
            roots: (0..8)
                .map(|at| if at % 4 == expert { 255 } else { 0 })
                .collect(),
        });
        let mut sequence = Sequence::new(SequenceId(id), request, 8);
        if let Some(expert) = seen {
            for layer in 0..2 {
                sequence.trace.signature[4 * layer + expert] = 40;
            }
        }
        sequence
    }

    fn choose(waiting: &[Sequence], running: &[Sequence]) -> Option<usize> {
        fittest(waiting.iter(), running.iter(), 1)
    }

    #[test]
    fn like_joins_like() {
        let waiting = [
            uses(1, Some(0), None),
            uses(2, Some(3), None),
            uses(3, Some(3), None),
        ];
        assert_eq!(choose(&waiting, &[uses(9, Some(3), None)]), Some(1));
        // What a sequence has done counts more than what was expected of it.
        assert_eq!(choose(&waiting, &[uses(9, Some(3), Some(0))]), Some(0));
    }

    #[test]
    fn without_knowledge_nobody_is_preferred() {
        let (known, unknown) = (uses(1, Some(0), None), uses(2, None, None));
        assert_eq!(
            choose(&[uses(1, None, None)], &[uses(9, Some(0), None)]),
            None
        );
        assert_eq!(choose(std::slice::from_ref(&known), &[]), None);
        assert_eq!(choose(std::slice::from_ref(&known), &[unknown]), None);
        let mut odd = uses(3, Some(0), None);
        odd.request.hint = Some(Hint {
            layers: vec![1],
            roots: vec![255, 0, 0, 0],
        });
        assert_eq!(choose(&[odd, known], &[uses(9, Some(0), None)]), None);
    }
}
