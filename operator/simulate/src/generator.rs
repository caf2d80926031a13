//! Synthetic expert loads, generator version 1.
//!
//! Each layer has 16 topics with an expert profile of their own, the more different the deeper the layer. The weights
//! of the topics drift; a window is a Poisson draw of their mixture, a batch has weights around theirs. The spreads
//! were fitted to the public routing dumps of OLMoE and Mixtral.

use crate::dice::Dice;
use crate::shape::Shape;

/// Version of the generator: other numbers need another one.
pub const VERSION: u32 = 1;
/// Topics.
pub const TOPICS: usize = 16;
/// How strongly profiles differ in the first and the last layer, against the setting's own strength.
const DEPTH: (f64, f64) = (0.55, 1.20);
/// A token uses an expert once at most: no share over 1/k, which renormalising approaches in this many rounds.
const CAP_ROUNDS: usize = 20;
/// Concentration of a decode batch around the topics' weights.
const DECODE_CONCENTRATION: f64 = 1000.0;
/// Tokens of one request in a prefill batch.
const PREFILL_REQUEST: f64 = 1500.0;
/// Requests that a forecast of topics knows.
const FORECAST_REQUESTS: usize = 500;
/// Relative error of each expert in a noisy forecast.
const FORECAST_ERROR: f64 = 0.15;

/// Rows per expert: `[layer][expert]`.
pub type Counts = Vec<Vec<u64>>;
/// Expected rows per expert: `[layer][expert]`.
pub type Rows = Vec<Vec<f64>>;
type Weights = [f64; TOPICS];

/// How the mix drifts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Regime {
    /// Not at all.
    Stationary,
    /// Slowly.
    Moderate,
    /// Fast and far.
    Strong,
}

impl Regime {
    /// All.
    pub const ALL: [Self; 3] = [Self::Stationary, Self::Moderate, Self::Strong];

    /// Name on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Stationary => "stationary",
            Self::Moderate => "moderate",
            Self::Strong => "strong",
        }
    }

    /// How far weights spread, and how much of the state a step keeps.
    #[must_use]
    pub const fn drift(self) -> (f64, f64) {
        match self {
            Self::Stationary | Self::Moderate => (1.0, 0.99),
            Self::Strong => (2.0, 0.95),
        }
    }
}

/// The load of one seed. What is drawn for windows, batches and forecasts never changes the drift.
#[derive(Debug, Clone)]
pub struct Generator {
    shape: Shape,
    regime: Regime,
    /// `[layer][topic · experts + expert]`, each topic's shares sum to 1.
    profiles: Rows,
    state: Weights,
    weights: Weights,
    drift: Dice,
    windows: Dice,
    batches: Dice,
    forecast: Dice,
    noise: Dice,
}

impl Generator {
    /// The load before the first step.
    #[must_use]
    pub fn new(shape: &Shape, regime: Regime, seed: u64) -> Self {
        let stream = |n| Dice::new(seed, n);
        let mut first = stream(0);
        let profiles = profiles(shape, &mut first);
        let mut state = [0.0; TOPICS];
        first.fill(&mut state);
        let mut load = Self {
            shape: *shape,
            regime,
            profiles,
            state,
            weights: softmax(&state, regime.drift().0),
            drift: stream(1),
            windows: stream(2),
            batches: stream(3),
            forecast: stream(4),
            noise: stream(5),
        };
        if regime == Regime::Stationary {
            (0..3).for_each(|_| load.step());
        }
        load
    }

    /// One step of the load statistic further.
    pub fn advance(&mut self) {
        if self.regime != Regime::Stationary {
            self.step();
        }
    }

    fn step(&mut self) {
        let (spread, keep) = self.regime.drift();
        let mut shock = [0.0; TOPICS];
        self.drift.fill(&mut shock);
        let fresh = (1.0 - keep * keep).sqrt();
        for (x, shock) in self.state.iter_mut().zip(shock) {
            *x = keep * *x + fresh * shock;
        }
        self.weights = softmax(&self.state, spread);
    }

    /// The window that is expected now.
    #[must_use]
    pub fn expected(&self) -> Rows {
        self.mixture(&self.weights, self.shape.window_tokens())
    }

    /// The window of this step.
    pub fn window(&mut self) -> Counts {
        let expected = self.expected();
        draw(&expected, &mut self.windows)
    }

    /// A decode batch of this step.
    pub fn decode(&mut self) -> Counts {
        self.decode_part(1.0)
    }

    /// A decode batch of this step with a part of its tokens, when ranks are lost.
    pub fn decode_part(&mut self, part: f64) -> Counts {
        self.batch(self.shape.decode_tokens() * part, DECODE_CONCENTRATION)
    }

    /// A prefill batch of this step: few requests, so its mix is off the step's by much.
    pub fn prefill(&mut self) -> Counts {
        let tokens = self.shape.prefill_tokens();
        self.batch(tokens, (tokens / PREFILL_REQUEST).max(8.0))
    }

    fn batch(&mut self, tokens: f64, concentration: f64) -> Counts {
        let weights = self
            .batches
            .dirichlet(self.weights.map(|w| w * concentration));
        let expected = self.mixture(&weights, tokens);
        draw(&expected, &mut self.batches)
    }

    /// What gateways know of this step's window: the topics of some of its requests.
    pub fn forecast_topics(&mut self) -> Rows {
        let mut seen = [0.0; TOPICS];
        for _ in 0..FORECAST_REQUESTS {
            seen[self.forecast.choice(&self.weights)] += 1.0 / FORECAST_REQUESTS as f64;
        }
        self.mixture(&seen, self.shape.window_tokens())
    }

    /// This step's expected window with an error of its own for each expert.
    pub fn forecast_noisy(&mut self) -> Rows {
        let mut rows = self.expected();
        for row in &mut rows {
            let mut errors = vec![0.0; row.len()];
            self.noise.fill(&mut errors);
            for (rows, error) in row.iter_mut().zip(errors) {
                *rows *= (1.0 + FORECAST_ERROR * error).max(0.1);
            }
        }
        rows
    }

    fn mixture(&self, weights: &Weights, tokens: f64) -> Rows {
        let (experts, rows) = (self.shape.experts, tokens * self.shape.top_k as f64);
        let layer = |profile: &Vec<f64>| {
            let mut mean = vec![0.0; experts];
            for (topic, weight) in profile.chunks(experts).zip(weights) {
                for (mean, share) in mean.iter_mut().zip(topic) {
                    *mean += rows * weight * share;
                }
            }
            mean
        };
        self.profiles.iter().map(layer).collect()
    }

    /// How far two topics' shares of a layer are apart (total variation), mean over all pairs.
    #[must_use]
    pub fn topic_distance(&self, layer: usize) -> f64 {
        let experts = self.shape.experts;
        let topic = |t: usize| &self.profiles[layer][t * experts..(t + 1) * experts];
        let pairs: Vec<(usize, usize)> = (0..TOPICS)
            .flat_map(|a| (0..a).map(move |b| (a, b)))
            .collect();
        let apart = |(a, b): &(usize, usize)| {
            let both = topic(*a).iter().zip(topic(*b));
            0.5 * both.map(|(x, y)| (x - y).abs()).sum::<f64>()
        };
        pairs.iter().map(apart).sum::<f64>() / pairs.len() as f64
    }
}

fn profiles(shape: &Shape, dice: &mut Dice) -> Rows {
    // Mixtral's experts are nearly all alike.
    let (common, own) = if shape.experts == 8 {
        (0.10, 0.10)
    } else {
        (0.40, 0.95)
    };
    let experts = shape.experts;
    let mut base = vec![0.0; shape.layers * experts];
    dice.fill(&mut base);
    let layer = |(l, base): (usize, &[f64])| {
        let down = l as f64 / (shape.layers.max(2) - 1) as f64;
        let own = own * (DEPTH.0 + (DEPTH.1 - DEPTH.0) * down);
        let mut profile = vec![0.0; TOPICS * experts];
        dice.fill(&mut profile);
        for topic in profile.chunks_mut(experts) {
            for (x, base) in topic.iter_mut().zip(base) {
                *x = (common * base + own * *x).exp();
            }
            cap(topic, 0.95 / shape.top_k as f64);
        }
        profile
    };
    base.chunks(experts).enumerate().map(layer).collect()
}

/// Normalises, then cuts at `most` and normalises again, some times.
fn cap(shares: &mut [f64], most: f64) {
    let normalise = |shares: &mut [f64]| {
        let sum: f64 = shares.iter().sum();
        shares.iter_mut().for_each(|x| *x /= sum);
    };
    normalise(shares);
    for _ in 0..CAP_ROUNDS {
        shares.iter_mut().for_each(|x| *x = x.min(most));
        normalise(shares);
    }
}

fn softmax(state: &Weights, spread: f64) -> Weights {
    let weights = state.map(|x| (spread * x).exp());
    let sum: f64 = weights.iter().sum();
    weights.map(|w| w / sum)
}

fn draw(expected: &Rows, dice: &mut Dice) -> Counts {
    let layer = |row: &Vec<f64>| row.iter().map(|mean| dice.poisson(*mean)).collect();
    expected.iter().map(layer).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sums::spread;

    fn main_setting() -> Shape {
        Shape::named("dsv3-64g").unwrap()
    }

    #[test]
    fn loads_spread_as_the_contract_says() {
        let shape = main_setting();
        let (mut deviations, mut apart) = (Vec::new(), [0.0; 3]);
        for seed in 0..3 {
            let mut load = Generator::new(&shape, Regime::Moderate, seed);
            let mut ratios = Vec::new();
            // As many windows as a run of 20 steps has.
            for _ in 0..30 {
                load.advance();
                let (ratio, deviation) = spread(&load.window());
                ratios.push(ratio);
                deviations.push(deviation);
            }
            let ratio = ratios.iter().sum::<f64>() / ratios.len() as f64;
            assert!((3.8..5.5).contains(&ratio), "seed {seed}: {ratio}");
            // Three layers each: one alone is off by more than a digit.
            for (sum, first) in apart.iter_mut().zip([0, 28, 55]) {
                let three = (first..first + 3).map(|layer| load.topic_distance(layer));
                *sum += three.sum::<f64>() / 9.0;
            }
        }
        let deviation = deviations.iter().sum::<f64>() / deviations.len() as f64;
        assert!((deviation - 0.59).abs() < 0.06, "{deviation}");
        for (found, wanted) in apart.iter().zip([0.28, 0.47, 0.59]) {
            assert!((found - wanted).abs() < 0.03, "{apart:?}");
        }
    }

    #[test]
    fn what_a_policy_asks_for_never_changes_the_trajectory() {
        let shape = Shape::named("mixtral-8g").unwrap();
        let mut quiet = Generator::new(&shape, Regime::Strong, 7);
        let mut asked = Generator::new(&shape, Regime::Strong, 7);
        for _ in 0..5 {
            quiet.advance();
            asked.advance();
            asked.decode();
            asked.forecast_topics();
            asked.forecast_noisy();
            assert_eq!(quiet.window(), asked.window());
        }
        assert_ne!(
            Generator::new(&shape, Regime::Strong, 8).window(),
            Generator::new(&shape, Regime::Strong, 7).window()
        );
    }

    #[test]
    fn a_stationary_mix_stays() {
        let shape = Shape::named("mixtral-8g").unwrap();
        let mut load = Generator::new(&shape, Regime::Stationary, 0);
        let before = load.expected();
        load.advance();
        assert_eq!(before, load.expected());
        let rows: f64 = before[3].iter().sum();
        assert!((rows / (64.0 * 8.0 * 50.0 * 2.0) - 1.0).abs() < 1e-9);
    }
}
