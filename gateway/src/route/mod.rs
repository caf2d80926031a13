//! Which worker runs a sequence. One policy per file; all of them see the same candidates.

mod least_loaded;
mod prefix_aware;
mod round_robin;
mod signature;
pub mod window;

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};

use foregate_api::ids::Rank;
use foregate_api::manifest::RoutingPolicy;

use crate::signature::Known;

/// A worker that may take the sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// Which.
    pub rank: Rank,
    /// Sequences it runs or keeps waiting.
    pub load: u32,
    /// Summed histogram of this gateway's sequences there (`layers × experts`); empty if none is known.
    pub signature: Vec<f64>,
    /// Tokens of the prompt that its KV cache holds, if the policy asks for them.
    pub cached: u32,
}

/// A decision and its reason.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// The worker.
    pub rank: Rank,
    /// The policy that was asked.
    pub policy: RoutingPolicy,
    /// What decided.
    pub outcome: Outcome,
    /// How well the worker's running requests fit, from 0 to 1, if that was asked and is known.
    pub fit: Option<f64>,
    /// Experts per layer that the request is expected to add to a usual batch of the worker, if the window chose.
    pub added: Option<f64>,
    /// Prompt tokens whose signature was known.
    pub known: usize,
    /// Prompt tokens that the worker was believed to hold, if the policy asks for them.
    pub cached: u32,
}

/// What decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// The best fit among several workers within the band.
    Fit,
    /// The longest prefix of the prompt among the workers within the band.
    Prefix,
    /// The smallest load (for `signature`: the prompt is unknown; for `prefix_aware`: nobody near has any of it).
    Load,
    /// The next in turn.
    Turn,
    /// There was one worker only.
    Only,
    /// The request had waited for as long as it may.
    Overdue,
    /// Placed at random, to compare with.
    Control,
    /// In order of arrival, by prefix and load: grouping is off.
    Order,
}

impl Outcome {
    /// The word in headers and metrics.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Fit => "fit",
            Self::Prefix => "prefix",
            Self::Load => "load",
            Self::Turn => "turn",
            Self::Only => "only",
            Self::Overdue => "overdue",
            Self::Control => "control",
            Self::Order => "order",
        }
    }
}

/// The word of a policy in headers and metrics.
#[must_use]
pub const fn word(policy: RoutingPolicy) -> &'static str {
    match policy {
        RoutingPolicy::Signature => "signature",
        RoutingPolicy::Window => "window",
        RoutingPolicy::PrefixAware => "prefix_aware",
        RoutingPolicy::LeastLoaded => "least_loaded",
        RoutingPolicy::RoundRobin => "round_robin",
    }
}

/// As in the header `x-foregate-route`: `signature; fit=0.83; known=64`.
impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(word(self.policy))?;
        if self.policy == RoutingPolicy::Signature {
            match self.fit {
                Some(fit) => write!(f, "; fit={fit:.2}")?,
                None => f.write_str("; fit=none")?,
            }
            write!(f, "; known={}", self.known)?;
        }
        if self.policy == RoutingPolicy::PrefixAware {
            write!(f, "; cached={}", self.cached)?;
        }
        if self.policy == RoutingPolicy::Window {
            write!(f, "; outcome={}", self.outcome.word())?;
            match self.added {
                Some(added) => write!(f, "; added={added:.2}")?,
                None => f.write_str("; added=none")?,
            }
            write!(f, "; known={}", self.known)?;
        }
        Ok(())
    }
}

/// The policy in use, with its state.
#[derive(Debug)]
pub struct Router {
    policy: RoutingPolicy,
    turn: AtomicUsize,
}

impl Router {
    /// A router with this policy.
    #[must_use]
    pub const fn new(policy: RoutingPolicy) -> Self {
        Self {
            policy,
            turn: AtomicUsize::new(0),
        }
    }

    /// The policy.
    #[must_use]
    pub const fn policy(&self) -> RoutingPolicy {
        self.policy
    }

    /// Chooses among `candidates` (ascending by rank); `None` if there are none.
    pub fn choose(&self, candidates: &[Candidate], known: &Known) -> Option<Choice> {
        let (at, outcome, fit) = match self.policy {
            // A sequence that the window places never comes here; one that may not wait does.
            RoutingPolicy::Signature | RoutingPolicy::Window => {
                signature::choose(candidates, known)?
            }
            RoutingPolicy::PrefixAware => {
                let (at, outcome) = prefix_aware::choose(candidates)?;
                (at, outcome, None)
            }
            RoutingPolicy::LeastLoaded => {
                (least_loaded::choose(candidates)?, Outcome::Load, None)
            }
            RoutingPolicy::RoundRobin => {
                let turn = self.turn.fetch_add(1, Ordering::Relaxed);
                (round_robin::choose(candidates, turn)?, Outcome::Turn, None)
            }
        };
        Some(Choice {
            rank: candidates.get(at)?.rank,
            policy: self.policy,
            outcome: if candidates.len() == 1 {
                Outcome::Only
            } else {
                outcome
            },
            fit,
            added: None,
            known: known.tokens,
            cached: candidates.get(at)?.cached,
        })
    }
}
