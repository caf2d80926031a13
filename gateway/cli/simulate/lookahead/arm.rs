//! The policies that are compared. All are the gateway's own code.

use std::collections::VecDeque;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use foregate_api::ids::Rank;
use foregate_api::manifest::RoutingPolicy;
use foregate_gateway::route::window::{
    self, CONTROL, Kinds, Settings, Waiting, Window, Worker,
};
use foregate_gateway::route::{Candidate, Router};
use foregate_gateway::signature::{Known, Profile};

use super::traffic::{Traffic, WORKERS};

/// After such a wait, in ms, a request is next.
pub(super) const PATIENCE: f64 = 4000.0;

/// A policy by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Policy {
    /// In order, the least loaded worker.
    Least,
    /// In order, one worker after the other.
    RoundRobin,
    /// In order, by cached prefix and load. No prompts of this benchmark share a prefix, so it must equal `least`.
    Prefix,
    /// In order, nearest kinds within a band, the least loaded of them.
    Band,
    /// The window over so many waiting requests.
    Window(usize),
    /// The same with only a label of the topic, right nine times of ten.
    Label(usize),
    /// The same with signatures exchanged among requests, which must do no harm.
    Placebo(usize),
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Least => f.write_str("least"),
            Self::RoundRobin => f.write_str("round-robin"),
            Self::Prefix => f.write_str("prefix"),
            Self::Band => f.write_str("band"),
            Self::Window(width) => write!(f, "ms:{width}"),
            Self::Label(width) => write!(f, "label:{width}"),
            Self::Placebo(width) => write!(f, "placebo:{width}"),
        }
    }
}

impl FromStr for Policy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || {
            format!(
                "no policy `{text}`: use least, round-robin, prefix, band, ms:W, label:W or placebo:W with a window W from 1 to 4096"
            )
        };
        let (name, width) = text
            .split_once(':')
            .map_or((text, None), |(n, w)| (n, Some(w)));
        let width = width
            .map(|width| {
                width
                    .parse()
                    .ok()
                    .filter(|w| (1..=4096).contains(w))
                    .ok_or_else(wrong)
            })
            .transpose()?;
        match (name, width) {
            ("least", None) => Ok(Self::Least),
            ("round-robin", None) => Ok(Self::RoundRobin),
            ("prefix", None) => Ok(Self::Prefix),
            ("band", None) => Ok(Self::Band),
            ("ms", Some(width)) => Ok(Self::Window(width)),
            ("label", Some(width)) => Ok(Self::Label(width)),
            ("placebo", Some(width)) => Ok(Self::Placebo(width)),
            _ => Err(wrong()),
        }
    }
}

/// How a request is chosen when it is not the window's turn to choose.
#[derive(Debug)]
pub(super) enum InOrder {
    Router(Router),
    Band(Arc<Kinds>),
}

/// A policy at work.
#[derive(Debug)]
pub(super) enum Arm {
    InOrder {
        queue: VecDeque<usize>,
        choose: InOrder,
    },
    Window {
        window: Box<Window>,
        /// Tokens that an answer is expected to have.
        answer: f64,
    },
}

impl Arm {
    /// A policy that has seen what came before the run; `control` in place of its own control slice.
    pub(super) fn new(policy: Policy, traffic: &Traffic, control: Option<f64>) -> Self {
        let ranks: Vec<Rank> = (0..WORKERS as u32).map(Rank).collect();
        let kinds = || Kinds::fit(&traffic.before, &ranks, None).map(Arc::new);
        let router = |policy| Self::in_order(InOrder::Router(Router::new(policy)));
        match policy {
            Policy::Least => router(RoutingPolicy::LeastLoaded),
            Policy::RoundRobin => router(RoutingPolicy::RoundRobin),
            Policy::Band => kinds().map_or_else(
                || router(RoutingPolicy::LeastLoaded),
                |kinds| Self::in_order(InOrder::Band(kinds)),
            ),
            Policy::Prefix => Self::window(1, traffic, None, control),
            Policy::Window(width) | Policy::Label(width) | Policy::Placebo(width) => {
                Self::window(width, traffic, kinds(), control)
            }
        }
    }

    fn in_order(choose: InOrder) -> Self {
        Self::InOrder {
            queue: VecDeque::new(),
            choose,
        }
    }

    fn window(
        width: usize,
        traffic: &Traffic,
        kinds: Option<Arc<Kinds>>,
        control: Option<f64>,
    ) -> Self {
        let mut window = Window::new(Settings {
            width,
            control: control.unwrap_or(CONTROL),
            ..Settings::new(traffic.shape.experts, traffic.shape.top_k)
        });
        if let Some(kinds) = kinds {
            window.adopt(kinds);
        }
        Self::Window {
            window: Box::new(window),
            answer: traffic.answer,
        }
    }

    /// A request joins the queue.
    pub(super) fn push(&mut self, id: usize, now_ms: f64, prompt: u32, profile: &Profile) {
        match self {
            Self::InOrder { queue, .. } => queue.push_back(id),
            Self::Window { window, answer } => window.push(Waiting {
                id: id as u64,
                arrived_ms: now_ms,
                patience_ms: PATIENCE,
                profile: Some(profile.clone()),
                prompt,
                answer: *answer,
                cached: Vec::new(),
            }),
        }
    }

    /// The next request and its worker.
    pub(super) fn pick(
        &mut self,
        now_ms: f64,
        workers: &[Worker],
        profiles: &[Profile],
    ) -> Option<(usize, Rank)> {
        match self {
            Self::Window { window, .. } => {
                let pick = window.pick(now_ms, workers)?;
                Some((pick.request.id as usize, pick.worker))
            }
            Self::InOrder { queue, choose } => {
                let open: Vec<Worker> =
                    workers.iter().copied().filter(|w| w.has_room).collect();
                let first = *queue.front()?;
                let rank = choose.choose(&open, &profiles[first])?;
                queue.pop_front();
                Some((first, rank))
            }
        }
    }

    /// A request ended, whose answer used experts like this.
    pub(super) fn ended(&mut self, id: usize, used: &Profile) {
        if let Self::Window { window, .. } = self {
            window.ended(id as u64, Some(used));
        }
    }

    /// The window, if there is one.
    pub(super) const fn seen_ahead(&self) -> Option<&Window> {
        match self {
            Self::Window { window, .. } => Some(window),
            Self::InOrder { .. } => None,
        }
    }
}

impl InOrder {
    fn choose(&self, open: &[Worker], profile: &Profile) -> Option<Rank> {
        match self {
            Self::Band(kinds) => {
                window::band::choose(kinds, Some(profile), open).map(|worker| worker.rank)
            }
            Self::Router(router) => {
                let candidate = |worker: &Worker| Candidate {
                    rank: worker.rank,
                    load: worker.active,
                    signature: Vec::new(),
                    cached: 0,
                };
                let candidates: Vec<Candidate> = open.iter().map(candidate).collect();
                router
                    .choose(&candidates, &Known::default())
                    .map(|choice| choice.rank)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_are_read_as_they_are_written() {
        for text in [
            "least",
            "round-robin",
            "prefix",
            "band",
            "ms:64",
            "label:1",
            "placebo:16",
        ] {
            assert_eq!(text.parse::<Policy>().unwrap().to_string(), text);
        }
        for text in ["", "ms", "ms:0", "ms:x", "least:3", "eldr"] {
            assert!(
                text.parse::<Policy>().unwrap_err().contains("no policy"),
                "{text}"
            );
        }
    }
}
