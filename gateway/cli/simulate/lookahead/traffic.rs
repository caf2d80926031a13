//! The requests of a run: what they use, when they come, and what was seen before them.

use foregate_gateway::signature::Profile;

use super::settings::Cluster;
use super::tokens::{
    EXPERTS, LAYERS, PROMPT, Request, SHAPE, Shape, TOPICS, World, correlation, shares,
};
use foregate_gateway::route::window::StepModel;
use foregate_simulate::Dice;

/// Workers.
pub(super) const WORKERS: usize = 8;
/// Requests of a run.
pub(super) const REQUESTS: usize = 900;
/// Requests that the gateway saw before the run; its kinds are made from them.
const BEFORE: usize = 1000;
/// Tokens of an answer: mean and least.
const ANSWER: (f64, u32) = (120.0, 8);
/// A request repeats the topic of the one before with this probability.
const REPEAT: f64 = 0.3;
/// A topic label is right with this probability.
const LABEL: f64 = 0.9;
/// Popularity of the n-th topic is n to the minus this.
const ZIPF: f64 = 0.6;

/// Stream of the traffic; request `n` has stream `n` + 16.
const TRAFFIC: u64 = 1;
pub(super) const FIRST_REQUEST: u64 = 16;
/// Requests of which the correlation is taken, and the first of their streams.
const AGREEMENT: usize = 50;
const FIRST_OTHER: u64 = 1 << 32;

/// A run's requests, ascending by arrival.
#[derive(Debug)]
pub(super) struct Traffic {
    pub(super) shape: Shape,
    pub(super) requests: Vec<Request>,
    /// What the gateway is told of each: its prompt's signature.
    pub(super) profiles: Vec<Profile>,
    /// The mean signature of its topic as labelled, for a gateway without signatures.
    pub(super) labels: Vec<Profile>,
    /// What their answers use.
    pub(super) used: Vec<Profile>,
    /// Tokens of their prompts.
    pub(super) prompts: Vec<u32>,
    /// Tokens that an answer is expected to have.
    pub(super) answer: f64,
    /// Milliseconds.
    pub(super) arrivals: Vec<f64>,
    /// Signatures seen before.
    pub(super) before: Vec<Profile>,
    /// Mean correlation of prompt and answer.
    pub(super) correlation: f64,
    /// Distinct experts of a full batch of random requests, as its arrival rate assumes.
    pub(super) random_batch: f64,
}

impl Traffic {
    pub(super) fn new(cluster: Cluster, seed: u64) -> Self {
        let world = World::new(cluster.fit, seed);
        let mut dice = Dice::new(seed, TRAFFIC);
        let mut topic = Topics::default();
        let mut drawn: Vec<(usize, u32)> = (0..BEFORE + REQUESTS)
            .map(|_| {
                (
                    topic.next(&mut dice),
                    dice.geometric(ANSWER.0).max(ANSWER.1),
                )
            })
            .collect();
        // Only the prompts of earlier requests matter.
        drawn[..BEFORE]
            .iter_mut()
            .for_each(|(_, answer)| *answer = 0);
        let mut requests = draw(&world, seed, FIRST_REQUEST, &drawn);
        let before: Vec<Request> = requests.drain(..BEFORE).collect();
        let random_batch = random_batch(&requests, LAYERS, f64::from(cluster.slots));
        let arrivals = arrive(
            requests.len(),
            (cluster.slots, cluster.load),
            (random_batch, ANSWER.0),
            &mut dice,
        );
        let labels = labels(&requests, &mut dice);
        Self {
            correlation: agreement(&world, seed),
            profiles: requests
                .iter()
                .map(|request| profile(&request.prompt))
                .collect(),
            before: before
                .iter()
                .map(|request| profile(&request.prompt))
                .collect(),
            shape: SHAPE,
            used: requests
                .iter()
                .map(|request| profile(&shares(&request.tokens)))
                .collect(),
            prompts: vec![PROMPT as u32; requests.len()],
            answer: ANSWER.0,
            labels,
            arrivals,
            random_batch,
            requests,
        }
    }
}

/// So many arrivals of a Poisson process, at a part of what full random batches serve. `batch`: distinct experts of one,
/// and tokens of an answer.
pub(super) fn arrive(
    number: usize,
    (slots, load): (u32, f64),
    (distinct, answer): (f64, f64),
    dice: &mut Dice,
) -> Vec<f64> {
    let step = StepModel::default().step(distinct, f64::from(slots));
    let rate = load * WORKERS as f64 * f64::from(slots) / step / answer;
    let mut clock = 0.0;
    let mut arrival = || {
        clock += dice.exponential() / rate;
        clock
    };
    (0..number).map(|_| arrival()).collect()
}

/// Mean correlation of prompts with answers of the usual length, over requests of their own.
fn agreement(world: &World, seed: u64) -> f64 {
    let wanted: Vec<(usize, u32)> = (0..AGREEMENT)
        .map(|at| (at % TOPICS, ANSWER.0 as u32))
        .collect();
    let requests = draw(world, seed, FIRST_OTHER, &wanted);
    let of =
        |request: &Request| correlation(&request.prompt, &shares(&request.tokens), EXPERTS);
    requests.iter().map(of).sum::<f64>() / AGREEMENT as f64
}

/// Topics come in short runs.
#[derive(Debug, Default)]
struct Topics(Option<usize>);

impl Topics {
    fn next(&mut self, dice: &mut Dice) -> usize {
        let popularity: Vec<f64> = (1..=TOPICS).map(|n| (n as f64).powf(-ZIPF)).collect();
        let repeats = dice.uniform() < REPEAT;
        let fresh = dice.choice(&popularity);
        let topic = self.0.filter(|_| repeats).unwrap_or(fresh);
        self.0 = Some(topic);
        topic
    }
}

/// Draws all requests, on every processor there is: it is what takes the time.
pub(super) fn draw(
    world: &World,
    seed: u64,
    first: u64,
    wanted: &[(usize, u32)],
) -> Vec<Request> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let share = wanted.len().div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        let parts: Vec<_> = wanted
            .chunks(share)
            .enumerate()
            .map(|(part, wanted)| {
                scope.spawn(move || {
                    let first = first + (part * share) as u64;
                    let numbered = wanted.iter().zip(first..);
                    numbered
                        .map(|((topic, answer), n)| {
                            world.request(seed, n, *topic, *answer as usize)
                        })
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        parts
            .into_iter()
            .flat_map(|part| part.join().unwrap_or_default())
            .collect()
    })
}

/// A profile of shares; the shape is this file's own, so it always fits.
pub(super) fn profile(shares: &[f64]) -> Profile {
    Profile::from_shares(EXPERTS, shares).unwrap_or_else(|| Profile::nothing(EXPERTS))
}

/// Distinct experts of a full batch of random requests.
pub(super) fn random_batch(requests: &[Request], layers: usize, slots: f64) -> f64 {
    let mut mean = vec![0.0; requests.first().map_or(0, |request| request.prompt.len())];
    for request in requests {
        for (mean, share) in mean.iter_mut().zip(&request.prompt) {
            *mean += share / requests.len() as f64;
        }
    }
    mean.iter()
        .map(|q| 1.0 - (1.0 - q.min(1.0)).powf(slots))
        .sum::<f64>()
        / layers as f64
}

/// What is known of requests by a label of their topic alone.
fn labels(requests: &[Request], dice: &mut Dice) -> Vec<Profile> {
    let mut means = vec![(0.0, vec![0.0; LAYERS * EXPERTS]); TOPICS];
    for request in requests {
        let (count, mean) = &mut means[request.topic];
        *count += 1.0;
        mean.iter_mut()
            .zip(&request.prompt)
            .for_each(|(mean, share)| *mean += share);
    }
    let of: Vec<Profile> = means
        .iter()
        .map(|(count, sum)| {
            profile(
                &sum.iter()
                    .map(|s| s / f64::max(*count, 1.0))
                    .collect::<Vec<_>>(),
            )
        })
        .collect();
    let label = |request: &Request| {
        let right = dice.uniform() < LABEL;
        let other = (dice.uniform() * TOPICS as f64) as usize;
        of[if right {
            request.topic
        } else {
            other.min(TOPICS - 1)
        }]
        .clone()
    };
    requests.iter().map(label).collect()
}
