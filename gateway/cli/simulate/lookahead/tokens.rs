//! The token model: which experts every token of every request uses, drawn before any policy runs.
//!
//! ```text
//!  logit(e; token j of request r on topic t) = 0.4·base + ST·topic + SR·request + SA·a_j
//!  a_j = 0.95·a_{j−1} + √(1 − 0.95²)·ε;   the token's experts are the top-8 of logit + Gumbel noise
//! ```
//!
//! Fitted to public decode statistics of Qwen3-30B-A3B (gajsanders/moe-trace: overlap of neighbouring tokens, hit
//! ratios of LRU and Belady). A request's tokens come from a stream of its own, so all policies meet the same ones.

use foregate_simulate::Dice;

/// Experts per layer; one bit each.
pub(super) const EXPERTS: usize = 128;
/// Experts per token and layer.
pub(super) const TOP_K: usize = 8;
/// Layers; they stand for all.
pub(super) const LAYERS: usize = 2;
/// Topics.
pub(super) const TOPICS: usize = 8;
/// Prompt tokens, of which the signature is made.
pub(super) const PROMPT: usize = 128;
/// How much of the walk stays from token to token.
const PHI: f64 = 0.95;
const BASE: f64 = 0.4;

/// Sizes of a token model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) layers: usize,
    /// Per layer.
    pub(super) experts: usize,
    /// Of a token and layer.
    pub(super) top_k: usize,
}

impl Shape {
    /// Words of a layer in a token.
    pub(super) const fn words(self) -> usize {
        self.experts.div_ceil(128)
    }
}

/// Sizes of the drawn model.
pub(super) const SHAPE: Shape = Shape {
    layers: LAYERS,
    experts: EXPERTS,
    top_k: TOP_K,
};

/// The experts of one token, a bit per expert, layer by layer, each in whole words.
pub(super) type Token = Box<[u128]>;

/// How far topic, request and token push the logits.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fit {
    pub(super) topic: f64,
    pub(super) request: f64,
    pub(super) token: f64,
}

/// Prefill and decode of a request agree with correlation 0.89.
pub(super) const STRONG: Fit = Fit {
    topic: 1.6,
    request: 1.48,
    token: 1.0,
};
/// With correlation 0.69.
pub(super) const WEAK: Fit = Fit {
    topic: 1.2,
    request: 1.45,
    token: 1.8,
};
/// Topics nearly absent.
pub(super) const NONE: Fit = Fit {
    topic: 0.4,
    request: 1.84,
    token: 1.8,
};

/// Logits by (layer, expert), without the walk and the noise.
type Logits = Vec<f64>;

/// The topics of a world.
#[derive(Debug)]
pub(super) struct World {
    fit: Fit,
    topics: Vec<Logits>,
}

/// One request.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) topic: usize,
    /// Share of prompt tokens that use an expert, by (layer, expert).
    pub(super) prompt: Vec<f64>,
    /// The answer.
    pub(super) tokens: Vec<Token>,
}

impl World {
    /// Draws the topics.
    pub(super) fn new(fit: Fit, seed: u64) -> Self {
        let mut dice = Dice::new(seed, 0);
        let mut draw = |scale: f64| -> Logits {
            let mut out = vec![0.0; LAYERS * EXPERTS];
            dice.fill(&mut out);
            out.iter_mut().for_each(|x| *x *= scale);
            out
        };
        let base = draw(BASE);
        let topics = (0..TOPICS).map(|_| {
            base.iter()
                .zip(draw(fit.topic))
                .map(|(base, own)| base + own)
                .collect()
        });
        Self {
            fit,
            topics: topics.collect(),
        }
    }

    /// Draws a request of `topic` with an answer of `answer` tokens from stream `number` of the seed.
    pub(super) fn request(
        &self,
        seed: u64,
        number: u64,
        topic: usize,
        answer: usize,
    ) -> Request {
        let mut dice = Dice::new(seed, number);
        let mut logits = vec![0.0; LAYERS * EXPERTS];
        dice.fill(&mut logits);
        for (logit, topic) in logits.iter_mut().zip(&self.topics[topic]) {
            *logit = topic + self.fit.request * *logit;
        }
        let prompt = shares(&self.walk(&logits, PROMPT, &mut dice));
        let tokens = self.walk(&logits, answer, &mut dice);
        Request {
            topic,
            prompt,
            tokens,
        }
    }

    fn walk(&self, logits: &[f64], tokens: usize, dice: &mut Dice) -> Vec<Token> {
        let (mut state, mut step) = (vec![0.0; logits.len()], vec![0.0; logits.len()]);
        let fresh = (1.0 - PHI * PHI).sqrt();
        dice.fill(&mut state);
        let mut token = || {
            dice.fill(&mut step);
            let mut token: Token = [0; LAYERS].into();
            for (layer, bits) in token.iter_mut().enumerate() {
                let mut arrival = [0.0; EXPERTS];
                for (expert, arrival) in arrival.iter_mut().enumerate() {
                    let at = layer * EXPERTS + expert;
                    state[at] = PHI * state[at] + fresh * step[at];
                    // The largest of logit + Gumbel is the first of exponential / e^logit.
                    let rate = (logits[at] + self.fit.token * state[at]).exp();
                    *arrival = dice.exponential() / rate;
                }
                *bits = first(&mut arrival);
            }
            token
        };
        (0..tokens).map(|_| token()).collect()
    }
}

/// The experts that arrive first.
fn first(arrivals: &mut [f64; EXPERTS]) -> u128 {
    let mut last = *arrivals;
    let (_, limit, _) = last.select_nth_unstable_by(TOP_K - 1, f64::total_cmp);
    let limit = *limit;
    let early = arrivals
        .iter()
        .enumerate()
        .filter(|(_, arrival)| **arrival <= limit);
    early.fold(0, |bits, (expert, _)| bits | 1 << expert)
}

/// Share of the tokens that use an expert, by (layer, expert).
pub(super) fn shares(tokens: &[Token]) -> Vec<f64> {
    let mut shares = vec![0.0; LAYERS * EXPERTS];
    for token in tokens {
        for (layer, bits) in token.iter().enumerate() {
            for expert in experts(*bits) {
                shares[layer * EXPERTS + expert] += 1.0 / tokens.len() as f64;
            }
        }
    }
    shares
}

/// The experts whose bit is set, ascending.
pub(super) fn experts(mut bits: u128) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let expert = bits.trailing_zeros() as usize;
        (bits != 0).then(|| {
            bits &= bits - 1;
            expert
        })
    })
}

/// Correlation over experts of two tables of shares, mean over layers.
pub(super) fn correlation(a: &[f64], b: &[f64], experts: usize) -> f64 {
    let layers = a.chunks(experts).zip(b.chunks(experts));
    let number = layers.len() as f64;
    let of = |(a, b): (&[f64], &[f64])| {
        let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
        let (ma, mb) = (mean(a), mean(b));
        let sum = |f: fn(f64, f64) -> f64| {
            a.iter().zip(b).map(|(x, y)| f(x - ma, y - mb)).sum::<f64>()
        };
        sum(|x, y| x * y) / (sum(|x, _| x * x) * sum(|_, y| y * y)).sqrt()
    };
    layers.map(of).sum::<f64>() / number
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_has_top_k_experts_and_repeats() {
        let world = World::new(STRONG, 3);
        let request = world.request(3, 1001, 2, 20);
        assert_eq!(request.tokens, world.request(3, 1001, 2, 20).tokens);
        assert_ne!(request.tokens, world.request(3, 1002, 2, 20).tokens);
        for token in request.tokens {
            assert!(token.iter().all(|bits| bits.count_ones() as usize == TOP_K));
        }
        let sum: f64 = request.prompt.iter().sum();
        assert!((sum - (LAYERS * TOP_K) as f64).abs() < 1e-9);
    }

    #[test]
    fn correlation_is_that_of_the_published_bounds() {
        for (fit, published) in [(STRONG, 0.89), (WEAK, 0.69)] {
            let world = World::new(fit, 1);
            let one = |at: usize| {
                let request = world.request(1, 1000 + at as u64, at % TOPICS, 120);
                correlation(&request.prompt, &shares(&request.tokens), EXPERTS)
            };
            let mean = (0..24).map(one).sum::<f64>() / 24.0;
            assert!((mean - published).abs() < 0.03, "{mean} for {published}");
        }
    }
}
