//! Log-probabilities as they are reported: those of the raw logits, before bias, penalties and
//! temperature (what vLLM calls `raw_logprobs`, its default).

use super::transcendental::{exp, ln};

/// One token of a distribution.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ranked {
    /// Token id.
    pub id: u32,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// 1 for the most likely; ties rank by id.
    pub rank: u32,
}

/// The reported token and the most likely ones.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// The token that was chosen, or that the prompt has.
    pub chosen: Ranked,
    /// The most likely tokens, best first.
    pub top: Vec<Ranked>,
}

/// Log-softmax of a row of finite logits at `chosen` (an id inside the row) and at its `top` best.
#[must_use]
pub fn report(logits: &[f32], chosen: u32, top: usize) -> Report {
    let norm = log_sum_exp(logits);
    let at = |id: u32, rank: u32| Ranked {
        id,
        logprob: (f64::from(logits[id as usize]) - norm) as f32,
        rank,
    };
    Report {
        chosen: at(chosen, rank_of(logits, chosen)),
        top: best(logits, top)
            .into_iter()
            .zip(1..)
            .map(|(id, rank)| at(id, rank))
            .collect(),
    }
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let largest = f64::from(largest);
    let sum: f64 = logits
        .iter()
        .map(|logit| exp(f64::from(*logit) - largest))
        .sum();
    largest + ln(sum)
}

fn rank_of(logits: &[f32], id: u32) -> u32 {
    let own = logits[id as usize];
    let (before, after) = logits.split_at(id as usize);
    let ahead = before.iter().filter(|logit| **logit >= own).count()
        + after.iter().filter(|logit| **logit > own).count();
    ahead as u32 + 1
}

/// Ids of the `count` largest, best first. One pass with a short sorted list: `count` is small.
fn best(logits: &[f32], count: usize) -> Vec<u32> {
    let mut list: Vec<u32> = Vec::with_capacity(count + 1);
    if count == 0 {
        return list;
    }
    for (id, logit) in logits.iter().enumerate() {
        if list.len() == count && logits[list[count - 1] as usize] >= *logit {
            continue;
        }
        let place = list.partition_point(|other| logits[*other as usize] >= *logit);
        list.insert(place, id as u32);
        list.truncate(count);
    }
    list
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn agrees_with_the_definition(
            logits in prop::collection::vec(-20.0_f32..20.0, 1..60),
            pick in any::<prop::sample::Index>(),
            top in 0_usize..10,
        ) {
            let chosen = pick.index(logits.len()) as u32;
            let report = report(&logits, chosen, top);
            let sum: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
            let mut order: Vec<u32> = (0..logits.len() as u32).collect();
            order.sort_by(|a, b| {
                logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b))
            });
            let near = |r: &Ranked| {
                let want = (f64::from(logits[r.id as usize]).exp() / sum).ln();
                (f64::from(r.logprob) - want).abs() < 1e-5 && order[r.rank as usize - 1] == r.id
            };
            prop_assert_eq!(report.chosen.id, chosen);
            prop_assert!(near(&report.chosen));
            prop_assert!(report.top.iter().all(near));
            let ids: Vec<u32> = report.top.iter().map(|r| r.id).collect();
            prop_assert_eq!(&ids[..], &order[..top.min(order.len())]);
        }
    }

    #[test]
    fn ties_rank_by_id() {
        let report = report(&[1.0, 1.0, 1.0], 1, 2);
        assert_eq!(report.chosen.rank, 2);
        assert_eq!((report.top[0].id, report.top[1].id), (0, 1));
    }
}
