//! The forecast for the planner: what the requests that are admitted, and not yet computed, will ask of the experts.
//!
//! ```text
//!  request ── Work ──┐  prompt and answer that are left, and what is known of its experts: its own histogram, that of a
//!                    │  known prefix, or the kinds of text that its words resemble
//!  prefill ─ example ┴─ Outlook ── every half window ── Publisher ── store ── the operator's demand
//! ```
//!
//! Rows of a request within the horizon: the prompt that no worker has read, and as many tokens of the answer as steps
//! fit in. Who waits counts only as far as the workers will come in that time. What is published is a sum over the
//! requests, never a request: errors of single requests would read as drift in every layer.

mod kinds;
mod publish;
mod work;

pub use kinds::{Example, Kinds, Words};
pub use publish::{Publisher, keep_fitted};
pub use work::{Expected, Outlook, Work};
