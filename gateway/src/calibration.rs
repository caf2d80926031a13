//! How well a request's experts were foreseen, measured at the end of every answer, and who is believed because of it.
//!
//! ```text
//!  predictors: prefix memory, kinds of text (before the prompt is read), the prompt's own histogram (after)
//!  at the end: what the answer's tokens used ─ hit@k and log loss of each, beside the mean of all answers
//!  a window closes: who was no better than the mean is not believed until another window shows that it is
//! ```
//!
//! A predictor's histogram of `n` rows is blended with the mean by pseudo-counts, `(n·h + 64·mean) / (n + 64)`, so that
//! one that says nothing scores as the mean does. *hit@k*: the part of the answer's choices that fell on the `k` experts
//! of a layer that were thought most likely, `k` being the experts of a token. *Log loss*: `−Σ answer·ln(predicted)`,
//! in nats per choice. Both are means over sampled layers, then over answers.
//!
//! Pure: the caller says what time it is.

use std::sync::Arc;

use crate::signature::{Signature, sampled_layers};

/// Length of a window in milliseconds …
const WINDOW_MS: f64 = 30_000.0;
/// … and answers that it must have for a predictor to be judged.
const LEAST: u64 = 32;
/// Answers that the mean is made of before anybody is compared with it.
const LEAST_MEAN: u64 = 16;
/// Weight of a new answer in the mean, once there are many.
const FRESH: f64 = 1.0 / 256.0;
/// Rows of the mean that are blended into a predictor's histogram.
const PSEUDO_ROWS: f64 = 64.0;
/// Part of the mean that is spread evenly, so that no expert is taken to be impossible.
const EVEN: f64 = 0.02;
/// Nats by which a predictor that is not believed must beat the mean to be believed again.
const MARGIN: f64 = 0.005;

/// Who foresees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Predictor {
    /// The histogram remembered with the longest known prefix of the prompt.
    Prefix,
    /// The kinds of text that the prompt's words resemble.
    Kinds,
    /// The histogram of the prompt itself, once it is read.
    Prefill,
}

impl Predictor {
    /// All, in the order of [`Ended::foreseen`].
    pub const ALL: [Self; 3] = [Self::Prefix, Self::Kinds, Self::Prefill];

    /// The word in metrics and in `/debug/experts`.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Prefix => "prefix",
            Self::Kinds => "kinds",
            Self::Prefill => "prefill",
        }
    }

    const fn index(self) -> usize {
        match self {
            Self::Prefix => 0,
            Self::Kinds => 1,
            Self::Prefill => 2,
        }
    }
}

/// An answer that has ended.
#[derive(Debug, Clone)]
pub struct Ended {
    /// What its tokens used.
    pub answer: Signature,
    /// What each of [`Predictor::ALL`] had said, if it had.
    pub foreseen: [Option<Arc<Signature>>; 3],
}

/// Figures of a window, means over its answers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Score {
    /// Answers.
    pub answers: u64,
    /// Part of the choices that fell on the k likeliest experts.
    pub hit: f64,
    /// Log loss in nats per choice.
    pub loss: f64,
    /// What the mean of all answers had on the same answers: hit and log loss.
    pub mean: (f64, f64),
}

/// A predictor at a moment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct State {
    /// Which.
    pub predictor: Predictor,
    /// Whether it is believed.
    pub believed: bool,
    /// How often that changed.
    pub switches: u64,
    /// The last window that had enough answers.
    pub score: Option<Score>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Tally {
    answers: u64,
    sums: [f64; 4],
}

#[derive(Debug, Clone, Copy)]
struct Judged {
    believed: bool,
    switches: u64,
    tally: Tally,
    score: Option<Score>,
}

/// The judge of all predictors of one model. A histogram of another shape begins anew.
#[derive(Debug)]
pub struct Calibration {
    experts: usize,
    /// Layers that are looked at.
    layers: Vec<usize>,
    entries: usize,
    /// Share of each expert in its layer's choices, by sampled layer.
    mean: Vec<Vec<f64>>,
    answers: u64,
    began_ms: f64,
    judged: [Judged; 3],
}

impl Default for Calibration {
    fn default() -> Self {
        Self {
            experts: 0,
            layers: Vec::new(),
            entries: 0,
            mean: Vec::new(),
            answers: 0,
            began_ms: 0.0,
            judged: [Judged {
                believed: true,
                switches: 0,
                tally: Tally::default(),
                score: None,
            }; 3],
        }
    }
}

impl Calibration {
    /// Whether a predictor is believed. All are until a window shows otherwise.
    #[must_use]
    pub const fn believes(&self, predictor: Predictor) -> bool {
        self.judged[predictor.index()].believed
    }

    /// All predictors.
    #[must_use]
    pub fn states(&self) -> [State; 3] {
        Predictor::ALL.map(|predictor| {
            let judged = &self.judged[predictor.index()];
            State {
                predictor,
                believed: judged.believed,
                switches: judged.switches,
                score: judged.score,
            }
        })
    }

    /// Compares what was foreseen of an answer with what it used. `top_k`: experts of a token.
    pub fn note(&mut self, now_ms: f64, ended: &Ended, top_k: usize) {
        self.fit(now_ms, &ended.answer);
        if self.answers >= LEAST_MEAN {
            for predictor in Predictor::ALL {
                let said = ended.foreseen[predictor.index()].as_deref();
                if let Some(said) = said.filter(|said| self.is_like(said)) {
                    let figures = self.compare(&ended.answer, said, top_k.max(1));
                    self.judged[predictor.index()].tally.add(figures);
                }
            }
        }
        self.learn(&ended.answer);
        if now_ms - self.began_ms >= WINDOW_MS {
            self.began_ms = now_ms;
            self.judged.iter_mut().for_each(Judged::close);
        }
    }

    fn is_like(&self, signature: &Signature) -> bool {
        signature.experts == self.experts && signature.counts.len() == self.entries
    }

    /// Begins anew if the model is another one.
    fn fit(&mut self, now_ms: f64, answer: &Signature) {
        if self.is_like(answer) {
            return;
        }
        let experts = answer.experts.max(1);
        let layers = sampled_layers(answer.counts.len() / experts);
        *self = Self {
            experts: answer.experts,
            entries: answer.counts.len(),
            mean: vec![vec![1.0 / experts as f64; experts]; layers.len()],
            layers,
            began_ms: now_ms,
            ..Self::default()
        };
    }

    /// Hit and loss of a predictor, then of the mean.
    fn compare(&self, answer: &Signature, said: &Signature, top_k: usize) -> [f64; 4] {
        let mut sums = [0.0; 4];
        let mut number = 0.0_f64;
        for (layer, mean) in self.layers.iter().zip(&self.mean) {
            let used = of_layer(answer, *layer);
            let all: f64 = used.iter().copied().map(f64::from).sum();
            if all == 0.0 {
                continue;
            }
            number += 1.0;
            let even = EVEN / self.experts.max(1) as f64;
            let mean: Vec<f64> = mean
                .iter()
                .map(|share| (1.0 - EVEN) * share + even)
                .collect();
            let said = of_layer(said, *layer);
            let choices: f64 = said.iter().copied().map(f64::from).sum();
            let pseudo = PSEUDO_ROWS * top_k as f64;
            let blend: Vec<f64> = said
                .iter()
                .zip(&mean)
                .map(|(count, mean)| (f64::from(*count) + pseudo * mean) / (choices + pseudo))
                .collect();
            for (at, shares) in [(0, &blend), (2, &mean)] {
                sums[at] += hit(used, shares, top_k) / all;
                sums[at + 1] += loss(used, shares) / all;
            }
        }
        sums.map(|sum| sum / number.max(1.0))
    }

    /// Every answer counts alike, whatever its length.
    fn learn(&mut self, answer: &Signature) {
        self.answers += 1;
        let weight = FRESH.max(1.0 / self.answers as f64);
        for (layer, mean) in self.layers.iter().zip(&mut self.mean) {
            let used = of_layer(answer, *layer);
            let all: f64 = used.iter().copied().map(f64::from).sum();
            if all > 0.0 {
                for (mean, count) in mean.iter_mut().zip(used) {
                    *mean += weight * (f64::from(*count) / all - *mean);
                }
            }
        }
    }
}

fn of_layer(signature: &Signature, layer: usize) -> &[u32] {
    let from = layer * signature.experts;
    let layer = signature.counts.get(from..from + signature.experts);
    layer.unwrap_or_default()
}

/// Choices that fell on the `top_k` likeliest experts; ties go to the lower number.
fn hit(used: &[u32], shares: &[f64], top_k: usize) -> f64 {
    let mut order: Vec<usize> = (0..shares.len()).collect();
    if top_k < order.len() {
        order.select_nth_unstable_by(top_k, |a, b| {
            shares[*b].total_cmp(&shares[*a]).then(a.cmp(b))
        });
    }
    let likeliest = order.into_iter().take(top_k);
    likeliest.map(|expert| f64::from(used[expert])).sum()
}

fn loss(used: &[u32], shares: &[f64]) -> f64 {
    let chosen = used.iter().zip(shares).filter(|(count, _)| **count > 0);
    chosen
        .map(|(count, share)| -f64::from(*count) * share.ln())
        .sum()
}

impl Tally {
    fn add(&mut self, figures: [f64; 4]) {
        if figures.iter().all(|figure| figure.is_finite()) {
            self.answers += 1;
            for (sum, figure) in self.sums.iter_mut().zip(figures) {
                *sum += figure;
            }
        }
    }
}

impl Judged {
    /// A window has ended. One with too few answers says nothing and goes on.
    fn close(&mut self) {
        if self.tally.answers < LEAST {
            return;
        }
        let [hit, loss, mean_hit, mean_loss] =
            self.tally.sums.map(|sum| sum / self.tally.answers as f64);
        self.score = Some(Score {
            answers: self.tally.answers,
            hit,
            loss,
            mean: (mean_hit, mean_loss),
        });
        self.tally = Tally::default();
        let gain = mean_loss - loss;
        let believed = if self.believed {
            gain > 0.0
        } else {
            gain > MARGIN
        };
        self.switches += u64::from(believed != self.believed);
        self.believed = believed;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXPERTS: usize = 8;

    /// 64 rows of two experts each, three quarters of them on the pair `2·kind, 2·kind + 1`, in two layers.
    fn of_kind(kind: usize) -> Signature {
        let layer = |expert: usize| if expert / 2 == kind { 48 } else { 5 };
        let counts = (0..2 * EXPERTS).map(|at| layer(at % EXPERTS)).collect();
        Signature::new(EXPERTS, counts).unwrap()
    }

    /// Lets answers of four kinds end, two a second; what is said of one is of kind `said(kind)`.
    fn run(
        calibration: &mut Calibration,
        now_ms: &mut f64,
        seconds: usize,
        said: impl Fn(usize) -> usize,
    ) {
        for at in 0..2 * seconds {
            *now_ms += 500.0;
            let kind = at % 4;
            let ended = Ended {
                answer: of_kind(kind),
                foreseen: [
                    Some(Arc::new(of_kind(said(kind)))),
                    None,
                    Some(Arc::new(of_kind(kind))),
                ],
            };
            calibration.note(*now_ms, &ended, 2);
        }
    }

    #[test]
    fn who_is_worse_than_the_mean_is_not_believed_until_it_is_better() {
        let mut calibration = Calibration::default();
        let mut now = 1e6;
        run(&mut calibration, &mut now, 90, |kind| kind);
        let [prefix, kinds, prefill] = calibration.states();
        assert!(prefix.believed && kinds.believed && prefill.believed);
        let good = prefix.score.unwrap();
        // Three quarters of the choices are on the pair, a quarter on three others: 96 of 126.
        assert!((good.hit - 96.0 / 126.0).abs() < 1e-9, "{good:?}");
        // Of four kinds in turn the mean leans to those that came last, and the next one is never among them.
        assert!(good.mean.0 < 0.3, "{good:?}");
        assert!(good.loss < good.mean.1 - 0.3, "{good:?}");
        assert_eq!(kinds.score, None, "it said nothing");

        // Now the memory is of other texts: the next whole window shows it.
        run(&mut calibration, &mut now, 61, |kind| (kind + 1) % 4);
        assert!(!calibration.believes(Predictor::Prefix));
        assert!(calibration.believes(Predictor::Prefill));
        let bad = calibration.states()[0].score.unwrap();
        assert!(bad.loss > bad.mean.1, "{bad:?}");

        run(&mut calibration, &mut now, 61, |kind| kind);
        let [prefix, ..] = calibration.states();
        assert!(prefix.believed);
        assert_eq!(prefix.switches, 2);
    }

    #[test]
    fn few_answers_change_nothing() {
        let mut calibration = Calibration::default();
        let mut now = 0.0;
        run(&mut calibration, &mut now, 60, |kind| kind);
        for _ in 0..20 {
            now += 10.0 * WINDOW_MS / 20.0;
            let ended = Ended {
                answer: of_kind(0),
                foreseen: [Some(Arc::new(of_kind(3))), None, None],
            };
            calibration.note(now, &ended, 2);
        }
        assert!(calibration.believes(Predictor::Prefix));
    }

    #[test]
    fn one_that_says_what_the_mean_says_does_not_earn_its_cost() {
        let mut calibration = Calibration::default();
        let same = |at: usize| {
            let counts = (0..2 * EXPERTS).map(|_| 3 + (at % 2) as u32).collect();
            Signature::new(EXPERTS, counts).unwrap()
        };
        for at in 0..400 {
            let ended = Ended {
                answer: of_kind(at % 4),
                foreseen: [None, Some(Arc::new(same(at))), None],
            };
            calibration.note(at as f64 * 500.0, &ended, 2);
        }
        let [_, kinds, _] = calibration.states();
        let score = kinds.score.unwrap();
        assert!((score.loss - score.mean.1).abs() < 0.02, "{score:?}");
        // Of no use to anybody: whichever way the noise points, it stays within the margin.
        assert!(kinds.switches <= 1, "{kinds:?}");
    }

    #[test]
    fn another_model_begins_anew_and_odd_histograms_are_left_out() {
        let mut calibration = Calibration::default();
        let mut now = 0.0;
        run(&mut calibration, &mut now, 90, |kind| (kind + 1) % 4);
        assert!(!calibration.believes(Predictor::Prefix));
        let other = Signature::new(4, vec![1; 12]).unwrap();
        let ended = Ended {
            answer: other.clone(),
            foreseen: [Some(Arc::new(of_kind(0))), None, Some(Arc::new(other))],
        };
        for _ in 0..200 {
            now += 500.0;
            calibration.note(now, &ended, 2);
        }
        assert!(calibration.believes(Predictor::Prefix));
        assert_eq!(calibration.states()[0].score, None);
        assert!(calibration.states()[2].score.is_some());
    }
}
