//! Expert caches: hits by policy on streams of the token model, one layer. The cache is the worker's code.

use foregate_api::ids::ExpertId;
use foregate_worker::residency::cache::{Cache, Outlook, Policy};
use serde::Serialize;

use super::figures::Change;
use super::tokens::{EXPERTS, Fit, TOPICS, Token, World, experts};
use super::traffic::{FIRST_REQUEST, draw};
use foregate_simulate::Dice;

/// Tokens of a request.
const TOKENS: usize = 129;
/// Sequences that decode together, requests of the stream, cache sizes.
const CASES: [(usize, usize, &[usize]); 2] =
    [(1, 40, &[16, 32, 64]), (4, 96, &[32, 48, 64, 96])];
/// Steps that the outlook reaches.
const AHEAD: u32 = 16;
/// Share of uses that an imperfect predictor does not see.
const UNSEEN: f64 = 0.3;
/// Steps over which the demand slides from the active requests to those that follow.
const SLIDE: f64 = 16.0;
/// The layer that is looked at.
const LAYER: usize = 0;

/// Hits of one policy in one case.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Row {
    pub(super) batch: usize,
    pub(super) capacity: usize,
    pub(super) policy: &'static str,
    pub(super) hit_ratio: f64,
    /// In percent of Belady's.
    pub(super) of_belady: Change,
    /// Part of the way from LRU to Belady that it goes, in percent.
    pub(super) gap_closed: Change,
}

/// What a stream asks of the cache.
struct Stream {
    steps: Vec<Vec<ExpertId>>,
    /// Steps until the next use, all seen, and with some unseen.
    next: Vec<Vec<Option<u32>>>,
    guessed: Vec<Vec<Option<u32>>>,
    demand: Vec<Vec<f64>>,
}

/// Runs all cases; `done` is told after each.
pub(super) fn run(
    fit: Fit,
    share: f64,
    decay: f64,
    seeds: &[u64],
    done: impl Fn(),
) -> Vec<Row> {
    let policies = [
        ("lru", Policy::LeastRecent),
        ("recent", Policy::Recent { decay }),
        ("signature", Policy::Signature { share, decay }),
        ("ahead:16", Policy::Ahead { steps: AHEAD }),
        ("ahead:16, 30 % unseen", Policy::Ahead { steps: AHEAD }),
        ("belady", Policy::Ahead { steps: u32::MAX }),
    ];
    let mut rows = Vec::new();
    for (batch, requests, capacities) in CASES {
        let streams: Vec<Stream> = seeds
            .iter()
            .map(|seed| Stream::new(fit, *seed, batch, requests))
            .collect();
        for capacity in capacities {
            let ratios: Vec<Vec<f64>> = policies
                .iter()
                .map(|(name, policy)| {
                    streams
                        .iter()
                        .map(|stream| stream.hit_ratio(*policy, name, *capacity))
                        .collect()
                })
                .collect();
            let (lru, belady) = (&ratios[0], &ratios[policies.len() - 1]);
            for ((policy, _), ratio) in policies.iter().zip(&ratios) {
                let percent = |of: &dyn Fn(usize) -> f64| {
                    Change::over((0..seeds.len()).map(|at| 100.0 * of(at)))
                };
                rows.push(Row {
                    batch,
                    capacity: *capacity,
                    policy,
                    hit_ratio: ratio.iter().sum::<f64>() / ratio.len().max(1) as f64,
                    of_belady: percent(&|at| ratio[at] / belady[at]),
                    gap_closed: percent(&|at| {
                        (ratio[at] - lru[at]) / (belady[at] - lru[at]).max(1e-9)
                    }),
                });
            }
            done();
        }
    }
    rows
}

/// Cases that [`run`] tells of.
pub(super) fn cases() -> usize {
    CASES
        .iter()
        .map(|(_, _, capacities)| capacities.len())
        .sum()
}

impl Stream {
    fn new(fit: Fit, seed: u64, batch: usize, requests: usize) -> Self {
        let world = World::new(fit, seed);
        let mut dice = Dice::new(seed, batch as u64);
        let wanted: Vec<(usize, u32)> = (0..requests)
            .map(|_| (dice.choice(&[1.0; TOPICS]), TOKENS as u32))
            .collect();
        let requests = draw(
            &world,
            seed,
            FIRST_REQUEST + ((batch as u64) << 33),
            &wanted,
        );
        let groups: Vec<_> = requests.chunks_exact(batch).collect();
        let mut steps = Vec::new();
        let mut demand = Vec::new();
        for (at, group) in groups.iter().enumerate() {
            let own = demand_of(group.iter().map(|request| request.prompt.as_slice()));
            let following = groups.get(at + 1).unwrap_or(group);
            let after = demand_of(following.iter().map(|request| request.prompt.as_slice()));
            for token in 0..TOKENS {
                let tokens = group.iter().map(|request| &request.tokens[token]);
                steps.push(used(tokens));
                let stays = ((TOKENS - token) as f64 / SLIDE).min(1.0);
                let mix = own
                    .iter()
                    .zip(&after)
                    .map(|(own, after)| stays * own + (1.0 - stays) * after);
                demand.push(mix.collect());
            }
        }
        let next = next_uses(&steps, |_| true);
        let mut coin = Dice::new(seed, 8 + batch as u64);
        let guessed = next_uses(&steps, |_| coin.uniform() >= UNSEEN);
        Self {
            steps,
            next,
            guessed,
            demand,
        }
    }

    fn hit_ratio(&self, policy: Policy, name: &str, capacity: usize) -> f64 {
        let mut cache = Cache::new(policy, EXPERTS, capacity, &[]);
        let (mut hits, mut uses) = (0.0, 0.0);
        for (at, step) in self.steps.iter().enumerate() {
            let outlook = match policy {
                Policy::Signature { .. } => Outlook::Demand(&self.demand[at]),
                Policy::Ahead { .. } if name.contains("unseen") => {
                    Outlook::Next(&self.guessed[at])
                }
                Policy::Ahead { .. } => Outlook::Next(&self.next[at]),
                Policy::LeastRecent | Policy::Recent { .. } => Outlook::Unknown,
            };
            hits += f64::from(cache.step(step, outlook).hits);
            uses += step.len() as f64;
        }
        hits / uses
    }
}

/// Expected uses per step by the signatures of these requests.
fn demand_of<'a>(prompts: impl Iterator<Item = &'a [f64]>) -> Vec<f64> {
    let mut sum = vec![0.0; EXPERTS];
    for prompt in prompts {
        let layer = &prompt[LAYER * EXPERTS..(LAYER + 1) * EXPERTS];
        sum.iter_mut()
            .zip(layer)
            .for_each(|(sum, share)| *sum += share);
    }
    sum
}

fn used<'a>(tokens: impl Iterator<Item = &'a Token>) -> Vec<ExpertId> {
    let bits = tokens.fold(0, |bits, token| bits | token[LAYER]);
    experts(bits)
        .map(|expert| ExpertId(expert as u32))
        .collect()
}

/// After every step and for every expert, the steps until its next use that is `seen`.
fn next_uses(
    steps: &[Vec<ExpertId>],
    mut seen: impl FnMut(usize) -> bool,
) -> Vec<Vec<Option<u32>>> {
    let mut ahead: Vec<Option<u32>> = vec![None; EXPERTS];
    let mut all = Vec::with_capacity(steps.len());
    for step in steps.iter().rev() {
        all.push(ahead.clone());
        ahead.iter_mut().flatten().for_each(|ahead| *ahead += 1);
        for expert in step {
            if seen(expert.index()) {
                ahead[expert.index()] = Some(1);
            }
        }
    }
    all.reverse();
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_use_is_counted_from_the_step_before() {
        let steps = [vec![ExpertId(3)], vec![ExpertId(1)], vec![ExpertId(3)]];
        let next = next_uses(&steps, |_| true);
        assert_eq!(
            (next[0][3], next[0][1], next[1][3], next[2][3]),
            (Some(2), Some(1), Some(1), None)
        );
    }

    #[test]
    fn policies_rank_as_they_must() {
        let rows = run(super::super::tokens::STRONG, 0.6, 0.9, &[1], || {});
        let of = |policy: &str| {
            let row = rows
                .iter()
                .find(|row| row.policy == policy && row.capacity == 32);
            row.unwrap().hit_ratio
        };
        assert!(of("belady") >= of("ahead:16") && of("ahead:16") > of("lru"));
        assert!(of("signature") > of("recent"));
    }
}
