//! `foregate-planner`: which rank holds which expert, and how a cluster gets from one answer to the next.
//!
//! What goes in: ranks with slots, predicted rows per layer and expert, the placement in force, and the trigger's
//! [`History`]. What comes out: a [`Decision`] with a numbered placement and the report of why. Beside it the split
//! of a batch over copies ([`split`]) and both halves of the epoch protocol ([`rollover`]).
//!
//! Invariants: pure (no async, no clock, no randomness, no hash order): the same input gives the same bytes. Ties go
//! to the lower index. Weights first, copies last: copies move only when no split of what is there is good enough.
//! No placement leaves this crate with a finding that [`check`] refuses.
//!
//! Start reading at [`plan()`] in `plan.rs`, then `steps.rs`; wanted properties and the heuristic are in the README
//! beside it.

#![forbid(unsafe_code)]

mod affinity;
mod backtest;
mod batch;
pub mod bound;
mod budget;
pub mod check;
mod connect;
mod cover;
pub mod demand;
mod face;
mod finding;
mod flow;
mod improve;
mod layer;
mod likely;
mod noise;
mod pack;
mod plan;
mod pour;
mod problem;
pub mod redundancy;
mod relabel;
mod repair;
mod replicate;
pub mod report;
pub mod rollover;
mod search;
mod settings;
mod solve;
pub mod split;
mod steps;
mod table;
mod trigger;

pub use crate::plan::{Decision, initial, initial_near, plan};
pub use crate::problem::{PlanError, Problem, RankSlots};
pub use crate::relabel::assign;
pub use crate::replicate::Load;
pub use crate::report::Report;
pub use crate::settings::{Cover, Economy, Settings};
pub use crate::trigger::{Because, History, Verdict};
