//! What comes of it, piece by piece.

use foregate_wire::generation::{RoutedExperts, TokenInfo};
use tokio::time::Instant;

/// What is new in one choice.
#[derive(Debug, Clone, Default)]
pub struct Delta {
    /// Which choice.
    pub choice: usize,
    /// Once, first: the prompt is read.
    pub prompt: Option<PromptReport>,
    /// Text that is certain.
    pub text: String,
    /// Tokens.
    pub tokens: Vec<TokenReport>,
    /// Experts of positions after the prompt.
    pub routed: Vec<RoutedExperts>,
    /// The end.
    pub finish: Option<Finish>,
    /// When the event arrived.
    pub arrived: Option<Instant>,
}

/// What prefill reported.
#[derive(Debug, Clone, Default)]
pub struct PromptReport {
    /// Entry `i` belongs to prompt token `i + 1`.
    pub logprobs: Vec<TokenInfo>,
    /// Experts of the prompt's positions.
    pub routed: Option<RoutedExperts>,
    /// Tokens found in the prefix cache.
    pub cached: u32,
}

/// A generated token.
#[derive(Debug, Clone, Default)]
pub struct TokenReport {
    /// Its id.
    pub id: u32,
    /// Characters of the answer before it.
    pub offset: usize,
    /// Its probability, if asked.
    pub info: Option<TokenInfo>,
}

/// Why a choice ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finish {
    /// `stop` or `length`.
    pub reason: &'static str,
    /// The stop string or the stop token, if the client's own ended it.
    pub stop: Option<Stop>,
}

/// What stopped a choice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stop {
    /// A stop string.
    Text(String),
    /// A stop token.
    Token(u32),
}

impl Delta {
    /// Adds a later delta of the same choice.
    pub fn merge(&mut self, later: Self) {
        if later.prompt.is_some() {
            self.prompt = later.prompt;
        }
        self.text.push_str(&later.text);
        self.tokens.extend(later.tokens);
        self.routed.extend(later.routed);
        if later.finish.is_some() {
            self.finish = later.finish;
        }
    }
}
