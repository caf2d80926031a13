//! Sampled tokens with experts that are used together: what bytes between nodes are counted on.
//!
//! A layer has topics with a profile each, and clusters of experts that a token likes or dislikes together; where the
//! model's gate chooses among groups of experts, only the best groups of a token are eligible.

use crate::dice::Dice;
use crate::generator::TOPICS;
use crate::shape::Shape;

/// Layers that stand for all, from the first to the last.
pub(crate) const LAYERS: usize = 6;
/// Tokens that placements are made for, and others that they are judged on.
const SEEN: usize = 12_000;
const JUDGED: usize = 6_000;
/// How strongly a token likes a cluster of experts.
pub(crate) const TOGETHER: f64 = 0.7;
/// Experts in a cluster.
const CLUSTER: usize = 8;
/// Groups that a token may use, and how many experts decide which.
const GROUPS_OF_A_TOKEN: usize = 4;
const DECIDE: usize = 2;

/// A token's experts.
pub(crate) type Token = Vec<usize>;

/// One layer's tokens.
#[derive(Debug)]
pub(crate) struct Tokens {
    pub(crate) seen: Vec<Token>,
    pub(crate) judged: Vec<Token>,
    /// Node of each judged token.
    pub(crate) source: Vec<usize>,
}

impl Tokens {
    /// Draws layer `layer` of [`LAYERS`].
    pub(crate) fn draw(shape: &Shape, layer: usize, dice: &mut Dice) -> Self {
        let gate = Gate::draw(shape, layer, dice);
        let popularity = dice.dirichlet([2.0; TOPICS]);
        let tokens = |n: usize, dice: &mut Dice| -> Vec<Token> {
            (0..n)
                .map(|_| {
                    let topic = dice.choice(&popularity);
                    gate.token(shape, topic, dice)
                })
                .collect()
        };
        let (seen, judged) = (tokens(SEEN, dice), tokens(JUDGED, dice));
        let node = |dice: &mut Dice| {
            ((dice.uniform() * shape.nodes as f64) as usize).min(shape.nodes - 1)
        };
        Self {
            source: judged.iter().map(|_| node(dice)).collect(),
            seen,
            judged,
        }
    }
}

/// Rows of each expert.
pub(crate) fn rows(tokens: &[Token], experts: usize) -> Vec<f64> {
    let mut rows = vec![0.0; experts];
    for expert in tokens.iter().flatten() {
        rows[*expert] += 1.0;
    }
    rows
}

struct Gate {
    /// `[topic][expert]`
    logits: Vec<Vec<f64>>,
    cluster: Vec<usize>,
    clusters: usize,
}

impl Gate {
    fn draw(shape: &Shape, layer: usize, dice: &mut Dice) -> Self {
        let down = 0.55 + 0.65 * layer as f64 / (LAYERS - 1) as f64;
        let mut base = vec![0.0; shape.experts];
        dice.fill(&mut base);
        let topic = |dice: &mut Dice| {
            let mut own = vec![0.0; shape.experts];
            dice.fill(&mut own);
            let both = own.iter().zip(&base);
            both.map(|(own, base)| 0.4 * base + 0.95 * down * own)
                .collect()
        };
        let clusters = (shape.experts / CLUSTER).max(1);
        let logits = (0..TOPICS).map(|_| topic(dice)).collect();
        let of =
            |dice: &mut Dice| ((dice.uniform() * clusters as f64) as usize).min(clusters - 1);
        Self {
            logits,
            cluster: (0..shape.experts).map(|_| of(dice)).collect(),
            clusters,
        }
    }

    /// The top experts of logits, Gumbel noise and what the token likes.
    fn token(&self, shape: &Shape, topic: usize, dice: &mut Dice) -> Token {
        let mut likes = vec![0.0; self.clusters];
        dice.fill(&mut likes);
        let gumbel = |dice: &mut Dice| -dice.exponential().ln();
        let mut scores: Vec<f64> = self.logits[topic]
            .iter()
            .zip(&self.cluster)
            .map(|(logit, cluster)| logit + TOGETHER * likes[*cluster] + gumbel(dice))
            .collect();
        if shape.groups > 1 {
            keep_best_groups(&mut scores, shape.groups);
        }
        top(&scores, shape.top_k)
    }
}

/// Puts the experts of all but the best groups out of reach.
fn keep_best_groups(scores: &mut [f64], groups: usize) {
    let size = scores.len() / groups;
    let best = |group: &[f64]| {
        let mut sorted = group.to_vec();
        sorted.sort_by(|a, b| b.total_cmp(a));
        sorted[..DECIDE.min(size)].iter().sum::<f64>()
    };
    let sums: Vec<f64> = scores.chunks(size).map(best).collect();
    let kept = top(&sums, GROUPS_OF_A_TOKEN);
    for (group, scores) in scores.chunks_mut(size).enumerate() {
        if !kept.contains(&group) {
            scores.fill(f64::NEG_INFINITY);
        }
    }
}

/// Indices of the n highest, in no order.
fn top(scores: &[f64], n: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    if n < order.len() {
        let higher = |a: &usize, b: &usize| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b));
        order.select_nth_unstable_by(n, higher);
        order.truncate(n);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_has_its_experts_once_and_from_four_groups_at_most() {
        let shape = Shape::named("dsv3-64g").unwrap();
        let mut dice = Dice::new(1, 6);
        let gate = Gate::draw(&shape, 5, &mut dice);
        for n in 0..200 {
            let mut token = gate.token(&shape, n % TOPICS, &mut dice);
            token.sort_unstable();
            token.dedup();
            assert_eq!(token.len(), 8);
            let mut groups: Vec<usize> = token.iter().map(|e| e / 32).collect();
            groups.dedup();
            assert!(groups.len() <= 4, "{groups:?}");
        }
    }

    #[test]
    fn the_best_groups_are_those_of_the_two_best_experts() {
        // Sums of the two best of five groups of three: 9, 8, 7, 6, 5.5.
        let mut scores = [
            9.0, 0.0, 0.0, 4.0, 4.0, 4.0, 5.0, 2.0, 0.0, 3.0, 3.0, 3.0, 3.0, 2.5, 2.0,
        ];
        keep_best_groups(&mut scores, 5);
        assert!(scores[..12].iter().all(|x| x.is_finite()));
        assert!(scores[12..].iter().all(|x| x.is_infinite()));
    }
}
