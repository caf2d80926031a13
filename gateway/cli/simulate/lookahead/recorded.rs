//! Requests of recorded traces (docs/TRACES.md) in place of drawn ones.
//!
//! A trace has a request's histograms of prompt and answer, and neither its arrival nor the experts of single tokens. So
//! prompts, lengths, the order and the experts of whole answers are as recorded; arrivals are drawn as for the other
//! settings, and a token's experts are drawn from its answer's histogram with exactly its shares (systematic sampling over
//! experts in a drawn order: Madow 1949). What neighbouring tokens have in common beyond that is lost.

use std::path::{Path, PathBuf};

use foregate_gateway::signature::{Profile, Signature};
use foregate_simulate::Dice;
use foregate_trace::{Event, Header};

use super::tokens::{Request, Shape, Token, correlation};
use super::traffic::{Traffic, arrive, random_batch};
use crate::error::CliError;

/// Layers of a deeper model that are simulated, evenly spread.
const LAYERS: usize = 16;
/// Of the requests, one in so many comes before the run: kinds are made from them …
const BEFORE: usize = 3;
/// … as many at most.
const MOST_BEFORE: usize = 1000;
/// Fewest requests that say anything.
const LEAST: usize = 100;
/// Tokens of a shorter answer say nothing of a batch.
const SHORTEST: u64 = 2;

/// Stream of the arrivals; request `n` has stream `n` + 16.
const ARRIVALS: u64 = 1;
const FIRST_REQUEST: u64 = 16;

/// One recorded request.
#[derive(Debug, Clone)]
struct Seen {
    prompt_tokens: u32,
    answer_tokens: u32,
    prompt: Profile,
    answer: Profile,
    /// Shares of the answer's tokens, of prompt's and answer's, by simulated layer and expert.
    shares: Vec<f64>,
    prompt_shares: Vec<f64>,
}

/// The requests of a folder.
#[derive(Debug)]
pub(super) struct Recorded {
    shape: Shape,
    seen: Vec<Seen>,
}

impl Recorded {
    /// Reads the traces (`*.fgt`) of a folder, in the order of their names.
    ///
    /// # Errors
    /// No traces, one that cannot be read, traces of several models, or too few requests.
    pub(super) fn read(folder: &Path) -> Result<Self, CliError> {
        let wrong = |what: &dyn std::fmt::Display| {
            CliError::Usage(format!("--replay {}: {what}", folder.display()))
        };
        let entries = std::fs::read_dir(folder).map_err(|error| wrong(&error))?;
        let mut files: Vec<PathBuf> = entries
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<Result<_, _>>()
            .map_err(|error| wrong(&error))?;
        files.retain(|path| path.extension().is_some_and(|extension| extension == "fgt"));
        files.sort();
        let mut model: Option<Header> = None;
        let mut seen = Vec::new();
        for file in &files {
            let name = file.display();
            let bytes =
                std::fs::read(file).map_err(|error| wrong(&format!("{name}: {error}")))?;
            let (header, events) = foregate_trace::read(&bytes)
                .map_err(|error| wrong(&format!("{name}: {error}")))?;
            let shape = |header: &Header| (header.layers, header.experts, header.top_k);
            if model
                .as_ref()
                .is_some_and(|first| shape(first) != shape(&header))
            {
                return Err(wrong(&format!(
                    "{name} is of another model than the first trace"
                )));
            }
            for event in events {
                // One that breaks off is sound up to there.
                let Ok(event) = event else { break };
                seen.extend(Seen::of(&header, event));
            }
            model.get_or_insert(header);
        }
        let Some(header) = model else {
            return Err(wrong(&"there is no trace (*.fgt) in it"));
        };
        if seen.len() < LEAST {
            return Err(wrong(&format!(
                "{} requests with whole histograms, at least {LEAST} are wanted: record for longer",
                seen.len()
            )));
        }
        Ok(Self {
            shape: Shape {
                layers: layers(&header).count(),
                experts: header.experts,
                top_k: header.top_k,
            },
            seen,
        })
    }

    /// Requests and tokens in a few words.
    pub(super) fn told(&self) -> String {
        let Shape {
            layers,
            experts,
            top_k,
        } = self.shape;
        format!(
            "{} recorded requests, {experts} experts top-{top_k} in {layers} simulated layers",
            self.seen.len()
        )
    }

    /// The run of a seed.
    pub(super) fn traffic(&self, slots: u32, load: f64, seed: u64) -> Traffic {
        let before = (self.seen.len() / BEFORE).min(MOST_BEFORE);
        let (before, run) = self.seen.split_at(before);
        let requests: Vec<Request> = run
            .iter()
            .zip(FIRST_REQUEST..)
            .map(|(seen, number)| Request {
                topic: 0,
                prompt: seen.prompt_shares.clone(),
                tokens: draw(seen, self.shape, &mut Dice::new(seed, number)),
            })
            .collect();
        let random_batch = random_batch(&requests, self.shape.layers, f64::from(slots));
        let lengths = run.iter().map(|seen| f64::from(seen.answer_tokens));
        let answer = lengths.sum::<f64>() / run.len().max(1) as f64;
        let mut dice = Dice::new(seed, ARRIVALS);
        let both = run
            .iter()
            .map(|seen| correlation(&seen.prompt_shares, &seen.shares, self.shape.experts));
        Traffic {
            shape: self.shape,
            arrivals: arrive(run.len(), (slots, load), (random_batch, answer), &mut dice),
            profiles: run.iter().map(|seen| seen.prompt.clone()).collect(),
            labels: Vec::new(),
            used: run.iter().map(|seen| seen.answer.clone()).collect(),
            prompts: run.iter().map(|seen| seen.prompt_tokens).collect(),
            answer,
            before: before.iter().map(|seen| seen.prompt.clone()).collect(),
            correlation: both.sum::<f64>() / run.len().max(1) as f64,
            random_batch,
            requests,
        }
    }
}

fn layers(header: &Header) -> impl Iterator<Item = usize> {
    let (all, some) = (header.layers, header.layers.min(LAYERS));
    (0..some).map(move |at| all * (2 * at + 1) / (2 * some.max(1)))
}

impl Seen {
    /// `None` for other events, and for requests that say nothing.
    fn of(header: &Header, event: Event) -> Option<Self> {
        let Event::Request {
            prompt_tokens,
            answer_tokens,
            prompt,
            total,
            ..
        } = event
        else {
            return None;
        };
        let both = total.iter().zip(&prompt);
        let answer: Vec<u64> = both.map(|(all, read)| all.saturating_sub(*read)).collect();
        let narrow = |counts: &[u64]| -> Vec<u32> {
            let narrow = |count: &u64| u32::try_from(*count).unwrap_or(u32::MAX);
            counts.iter().map(narrow).collect()
        };
        let profile = |counts: &[u64]| {
            Profile::of(
                &Signature::new(header.experts, narrow(counts))?,
                header.top_k,
            )
        };
        let shares = |counts: &[u64]| -> Option<Vec<f64>> {
            let mut shares = Vec::new();
            for layer in layers(header) {
                let own = counts.get(layer * header.experts..(layer + 1) * header.experts)?;
                let rows = own.iter().sum::<u64>() as f64 / header.top_k.max(1) as f64;
                if rows <= 0.0 {
                    return None;
                }
                shares.extend(own.iter().map(|count| *count as f64 / rows));
            }
            Some(shares)
        };
        (answer_tokens >= SHORTEST).then_some(())?;
        Some(Self {
            prompt_tokens: u32::try_from(prompt_tokens).ok()?,
            // The last token of an answer is not computed.
            answer_tokens: u32::try_from(answer_tokens - 1).ok()?,
            prompt: profile(&prompt)?,
            answer: profile(&answer)?,
            shares: shares(&answer)?,
            prompt_shares: shares(&prompt)?,
        })
    }
}

/// The tokens of an answer.
fn draw(seen: &Seen, shape: Shape, dice: &mut Dice) -> Vec<Token> {
    let mut order: Vec<usize> = (0..shape.experts).collect();
    let words = shape.words();
    (0..seen.answer_tokens)
        .map(|_| {
            let mut token = vec![0_u128; shape.layers * words];
            for (layer, shares) in seen.shares.chunks(shape.experts).enumerate() {
                for at in (1..order.len()).rev() {
                    let other = (dice.uniform() * (at + 1) as f64) as usize;
                    order.swap(at, other.min(at));
                }
                for expert in systematic(shares, &order, dice.uniform()) {
                    token[layer * words + expert / 128] |= 1 << (expert % 128);
                }
            }
            token.into()
        })
        .collect()
}

/// Every expert whose stretch of the cumulated shares has one of the points `start`, `start + 1`, … in it.
fn systematic<'a>(
    shares: &'a [f64],
    order: &'a [usize],
    start: f64,
) -> impl Iterator<Item = usize> + 'a {
    let (mut sum, mut next) = (0.0, start);
    order.iter().copied().filter(move |expert| {
        sum += shares.get(*expert).copied().unwrap_or(0.0).min(1.0);
        let hit = sum > next;
        next += f64::from(hit);
        hit
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXPERTS: usize = 8;

    fn header() -> Header {
        Header {
            model: "m".to_owned(),
            layers: 2,
            experts: EXPERTS,
            top_k: 2,
            started_ms: 0,
        }
    }

    /// A request of one of two kinds, that use the lower or the upper half.
    fn request(kind: usize) -> Event {
        let rows = |each: u64| -> Vec<u64> {
            let of = |at: usize| if at % EXPERTS / 4 == kind { each } else { 0 };
            (0..2 * EXPERTS).map(of).collect()
        };
        Event::Request {
            at_ms: 1,
            number: 1,
            prompt_tokens: 8,
            answer_tokens: 21,
            prompt: rows(4),
            total: rows(14),
        }
    }

    fn recorded(number: usize) -> Recorded {
        let seen = (0..number).filter_map(|at| Seen::of(&header(), request(at % 2)));
        Recorded {
            shape: Shape {
                layers: 2,
                experts: EXPERTS,
                top_k: 2,
            },
            seen: seen.collect(),
        }
    }

    #[test]
    fn tokens_have_the_shares_of_their_answer() {
        let traffic = recorded(120).traffic(4, 1.25, 3);
        assert_eq!(traffic.requests.len(), 80);
        assert_eq!(traffic.before.len(), 40);
        let mut counts = [0_u32; EXPERTS];
        for request in traffic.requests.iter().step_by(2) {
            assert_eq!(request.tokens.len(), 20);
            for token in &request.tokens {
                assert!(token.iter().all(|bits| bits.count_ones() == 2));
                for (expert, count) in counts.iter_mut().enumerate() {
                    *count += (token[0] >> expert) as u32 & 1;
                }
            }
        }
        // 40 requests × 20 tokens × 2 choices over four experts.
        for (expert, count) in counts.into_iter().enumerate() {
            match expert < 4 {
                true => assert!((340..460).contains(&count), "{counts:?}"),
                false => assert_eq!(count, 0),
            }
        }
        assert!((traffic.correlation - 1.0).abs() < 1e-9);
    }

    #[test]
    fn a_folder_is_read_and_refused_by_its_fault() {
        let folder = tempfile::TempDir::new().unwrap();
        let refused = |folder: &Path| Recorded::read(folder).unwrap_err().to_string();
        assert!(refused(folder.path()).contains("no trace"));
        let mut bytes = foregate_trace::begin(&header());
        for at in 0..150 {
            request(at % 2).write(&mut bytes);
        }
        std::fs::write(folder.path().join("a.fgt"), &bytes).unwrap();
        assert_eq!(Recorded::read(folder.path()).unwrap().seen.len(), 150);
        let other = foregate_trace::begin(&Header {
            experts: 4,
            ..header()
        });
        std::fs::write(folder.path().join("b.fgt"), other).unwrap();
        assert!(refused(folder.path()).contains("another model"));
    }
}
