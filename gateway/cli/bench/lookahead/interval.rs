//! How sure a difference between two arms is: the bootstrap over pieces of their blocks.
//!
//! Requests that follow each other share a queue and a batch, so single ones are no independent draws. Each block is cut
//! into pieces of neighbours, and pieces are drawn with replacement, as many as the block has (Künsch 1989). Both arms are
//! drawn, the figure is made anew, and of a thousand changes the middle 95 % are the interval.

use super::block::{Block, One, Sample};
use super::figures::Figure;
use crate::bench::workload::Draw;

/// Draws.
const DRAWS: usize = 1000;
/// Requests of a piece.
const PIECE: usize = 10;
/// Samples of a piece, of a second each.
const SECONDS: usize = 3;

/// A figure of one arm against the first.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub(super) struct Change {
    /// The figure.
    pub(super) value: f64,
    /// Its change against the baseline, as a part of it, and the 95 % interval of that.
    pub(super) change: f64,
    pub(super) low: f64,
    pub(super) high: f64,
}

/// Compares a figure of some blocks with that of the baseline's; `None` if either has none.
pub(super) fn compare(figure: &Figure, own: &[&Block], base: &[&Block]) -> Option<Change> {
    let (value, other) = (whole(figure, own)?, whole(figure, base)?);
    let mut draw = Draw::new(1);
    let mut changes: Vec<f64> = (0..DRAWS)
        .filter_map(|_| {
            let (own, base) = (drawn(own, &mut draw), drawn(base, &mut draw));
            let change = (figure.of)(&own.0, &own.1)? / (figure.of)(&base.0, &base.1)? - 1.0;
            change.is_finite().then_some(change)
        })
        .collect();
    changes.sort_by(f64::total_cmp);
    let at = |part: f64| changes.get((changes.len() as f64 * part) as usize).copied();
    Some(Change {
        value,
        change: value / other - 1.0,
        low: at(0.025)?,
        high: at(0.975)?,
    })
}

/// The figure over all of the blocks.
pub(super) fn whole(figure: &Figure, blocks: &[&Block]) -> Option<f64> {
    let requests: Vec<One> = blocks
        .iter()
        .flat_map(|block| block.requests.clone())
        .collect();
    let samples: Vec<Sample> = blocks
        .iter()
        .flat_map(|block| block.samples.clone())
        .collect();
    (figure.of)(&requests, &samples)
}

fn drawn(blocks: &[&Block], draw: &mut Draw) -> (Vec<One>, Vec<Sample>) {
    let (mut requests, mut samples) = (Vec::new(), Vec::new());
    for block in blocks {
        pieces(&block.requests, PIECE, draw, &mut requests);
        pieces(&block.samples, SECONDS, draw, &mut samples);
    }
    (requests, samples)
}

/// As many entries as there are, in pieces that begin anywhere.
fn pieces<T: Copy>(all: &[T], length: usize, draw: &mut Draw, drawn: &mut Vec<T>) {
    let length = length.min(all.len().max(1));
    let mut left = all.len();
    while left > 0 {
        let start = draw.below(all.len() - length + 1);
        let taken = length.min(left);
        drawn.extend_from_slice(&all[start..start + taken]);
        left -= taken;
    }
}

#[cfg(test)]
mod tests {
    use super::super::cluster::Counted;
    use super::super::figures::FIGURES;
    use super::*;

    /// A block of requests of about `ms` each, drawn around it.
    fn block(ms: f64, seed: u64) -> Block {
        let mut draw = Draw::new(seed);
        let mut noise = move || 0.8 + draw.below(400) as f64 / 1000.0;
        let one = |ms: f64| One {
            first: ms / 2.0,
            per_token: Some(ms / 100.0),
            total: ms,
        };
        Block {
            arm: 0,
            half: 0,
            requests: (0..200).map(|_| one(ms * noise())).collect(),
            samples: vec![
                Sample {
                    seconds: 1.0,
                    counted: Counted {
                        decode_steps: 10.0,
                        decode_experts: ms,
                        ..Counted::default()
                    },
                };
                30
            ],
            answers: Vec::new(),
            seconds: 30.0,
            counted: Counted::default(),
            failures: Vec::new(),
        }
    }

    #[test]
    fn a_difference_is_seen_and_none_is_not() {
        let (base, same, less) = (block(100.0, 1), block(100.0, 2), block(80.0, 3));
        for figure in FIGURES
            .iter()
            .filter(|figure| figure.name.starts_with("latency"))
        {
            let none = compare(figure, &[&same], &[&base]).unwrap();
            assert!(
                none.low < 0.0 && none.high > 0.0,
                "{}: {none:?}",
                figure.name
            );
            let some = compare(figure, &[&less], &[&base]).unwrap();
            assert!(
                (some.change + 0.2).abs() < 0.05 && some.high < -0.1,
                "{some:?}"
            );
        }
        let experts = compare(&FIGURES[0], &[&less], &[&base]).unwrap();
        assert!((experts.value - 8.0).abs() < 1e-9 && (experts.change + 0.2).abs() < 1e-9);
    }

    #[test]
    fn nothing_to_compare_is_none() {
        let (empty, some) = (
            Block {
                requests: Vec::new(),
                samples: Vec::new(),
                ..block(1.0, 1)
            },
            block(1.0, 1),
        );
        for figure in &FIGURES {
            assert_eq!(compare(figure, &[&empty], &[&some]), None);
        }
    }
}
