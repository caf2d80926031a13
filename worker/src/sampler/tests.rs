use proptest::prelude::*;

use super::*;

fn turn(sampling: &Sampling, index: u32) -> Turn<'_> {
    Turn {
        sampling,
        history: None,
        masked: &[],
        index,
    }
}

fn choose(logits: &[f32], sampling: &Sampling, index: u32) -> u32 {
    Sampler::default()
        .choose(logits, &turn(sampling, index))
        .unwrap()
}

fn warm() -> Sampling {
    Sampling {
        temperature: 1.0,
        seed: 11,
        ..Sampling::greedy()
    }
}

#[test]
fn greedy_ties_go_to_the_lower_id() {
    assert_eq!(choose(&[0.5, 2.0, 2.0], &Sampling::greedy(), 0), 1);
}

#[test]
fn bias_is_added_before_the_choice() {
    let mut sampling = Sampling::greedy();
    sampling.logit_bias.insert(0, 5.0);
    assert_eq!(choose(&[0.5, 2.0, 2.0], &sampling, 0), 0);
}

#[test]
fn penalties_follow_their_definitions() {
    let history = History::new(&[0, 1, 2, 2], 2);
    let sampling = Sampling {
        repetition_penalty: 2.0,
        presence_penalty: 0.5,
        frequency_penalty: 0.25,
        ..Sampling::greedy()
    };
    let mut row = [4.0, -4.0, 4.0, 4.0];
    penalise(&mut row, &sampling, &history);
    assert_eq!(row, [2.0, -8.0, 2.0 - 2.0 * 0.25 - 0.5, 4.0]);
}

#[test]
fn masked_tokens_never_come() {
    let sampling = warm();
    for index in 0..200 {
        let turn = Turn {
            masked: &[1],
            ..turn(&sampling, index)
        };
        assert_ne!(Sampler::default().choose(&[0.0, 9.0, 0.0], &turn), Ok(1));
    }
    let all = Turn {
        masked: &[0, 1],
        ..turn(&sampling, 0)
    };
    let error = Sampler::default().choose(&[1.0, 2.0], &all);
    assert_eq!(error, Err(SamplerError::AllMasked));
}

#[test]
fn broken_logits_are_an_error() {
    let sampling = Sampling::greedy();
    let mut sampler = Sampler::default();
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let got = sampler.choose(&[0.0, bad], &turn(&sampling, 0));
        assert_eq!(got, Err(SamplerError::NotFinite(1)));
    }
    assert_eq!(
        sampler.choose(&[], &turn(&sampling, 0)),
        Err(SamplerError::Empty)
    );
}

#[test]
fn a_tiny_temperature_above_greedy_stays_finite() {
    let sampling = Sampling {
        temperature: 2.0 * GREEDY_BELOW,
        ..warm()
    };
    assert_eq!(choose(&[1e30, -1e30, 0.0], &sampling, 3), 0);
}

#[test]
fn frequencies_follow_the_softmax() {
    let logits = [0.0, 1.0, 2.0];
    let sum: f64 = logits.iter().map(|l: &f32| f64::from(*l).exp()).sum();
    let mut counts = [0_u32; 3];
    for index in 0..20_000 {
        counts[choose(&logits, &warm(), index) as usize] += 1;
    }
    for (count, logit) in counts.iter().zip(logits) {
        let want = f64::from(logit).exp() / sum;
        assert!(
            (f64::from(*count) / 20_000.0 - want).abs() < 0.012,
            "{counts:?}"
        );
    }
}

fn kept(logits: &[f32], sampling: &Sampling) -> Vec<u32> {
    let mut sampler = Sampler {
        row: logits.to_vec(),
        candidates: Vec::new(),
    };
    let best = logits[argmax(logits) as usize];
    sampler.filter(sampling, Weigh::new(best, sampling.temperature));
    sampler.candidates
}

/// The definition, by a full sort.
fn kept_by_definition(logits: &[f32], sampling: &Sampling) -> Vec<u32> {
    let best = logits[argmax(logits) as usize];
    let weigh = Weigh::new(best, sampling.temperature);
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    order.sort_by(|a, b| by_rank(logits, *a, *b));
    if sampling.top_k > 0 {
        order.truncate(sampling.top_k as usize);
    }
    if sampling.top_p < 1.0 {
        let mut ascending = order.clone();
        ascending.sort_unstable();
        let total: f64 = ascending
            .iter()
            .map(|id| weigh.of(logits[*id as usize]))
            .sum();
        let mut mass = 0.0;
        let mut keep = 0;
        while keep < order.len() && (keep == 0 || mass < f64::from(sampling.top_p) * total) {
            mass += weigh.of(logits[order[keep] as usize]);
            keep += 1;
        }
        order.truncate(keep);
    }
    order.retain(|id| weigh.of(logits[*id as usize]) >= f64::from(sampling.min_p));
    order.sort_unstable();
    order
}

proptest! {
    #[test]
    fn filters_agree_with_their_definition(
        logits in prop::collection::vec((-40_i32..40).prop_map(|n| n as f32 * 0.25), 1..400),
        top_k in 0_u32..30,
        top_p in prop_oneof![Just(1.0_f32), 0.01_f32..1.0],
        min_p in prop_oneof![Just(0.0_f32), 0.0_f32..1.0],
        temperature in 0.1_f32..3.0,
    ) {
        let sampling = Sampling { top_k, top_p, min_p, temperature, ..warm() };
        let got = kept(&logits, &sampling);
        prop_assert!(!got.is_empty());
        prop_assert_eq!(got, kept_by_definition(&logits, &sampling));
    }

    #[test]
    fn filters_that_keep_all_change_nothing(
        logits in prop::collection::vec(-5.0_f32..5.0, 1..50),
        seed: u64,
        index in 0_u32..10_000,
    ) {
        let plain = Sampling { seed, ..warm() };
        let wide = Sampling { top_k: logits.len() as u32, ..plain.clone() };
        prop_assert_eq!(choose(&logits, &plain, index), choose(&logits, &wide, index));
    }

    #[test]
    fn a_used_sampler_chooses_as_a_new_one(
        rows in prop::collection::vec(prop::collection::vec(-5.0_f32..5.0, 20), 1..10),
        seed: u64,
    ) {
        let sampling = Sampling { seed, top_p: 0.8, ..warm() };
        let mut used = Sampler::default();
        for (index, row) in rows.iter().enumerate() {
            let got = used.choose(row, &turn(&sampling, index as u32)).unwrap();
            prop_assert_eq!(got, choose(row, &sampling, index as u32));
        }
    }
}
