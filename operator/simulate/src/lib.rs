//! `foregate-simulate`: placements judged on synthetic expert loads, without a cluster.
//!
//! What goes in: a [`Case`] (a model on a cluster, how its load drifts, which policies) and a seed. What comes out:
//! how well each policy's placements balance batches that came after they were made, and the copies that it moved.
//! Our own policy is the operator's code: [`foregate_planner::demand`], then [`foregate_planner::plan`] with its
//! trigger. The others are published ones, written anew from their descriptions, as anchors.
//!
//! Invariants: a policy never sees a window or a batch that it is judged on. All policies of a run meet the same
//! windows and batches; a policy draws no random number. Same case and seed, same figures (times apart, which come
//! from a clock of the caller's).
//!
//! Start reading at [`run()`], then `judge.rs`.

#![forbid(unsafe_code)]

mod dice;
mod eplb;
mod flash;
mod generator;
mod header;
mod homes;
mod internode;
mod internode_report;
mod judge;
mod loss;
mod loss_report;
mod policy;
mod recording;
mod report;
mod run;
mod shape;
mod source;
mod sums;
mod tokens;

pub use crate::dice::Dice;
pub use crate::generator::{Counts, Generator, Regime, Rows, TOPICS, VERSION};
pub use crate::header::{Balance, Header, Load, Time};
pub use crate::internode::{InternodeOutcome, internode, internode_policies};
pub use crate::internode_report::{InternodeDocument, InternodePolicy, internode_document};
pub use crate::loss::{Lose, LossOutcome, lose};
pub use crate::loss_report::{LossDocument, Orphaned, Step, loss_document};
pub use crate::policy::{Forecast, Policy, eplb_layers};
pub use crate::recording::{Recording, replay};
pub use crate::report::{
    Document, Figures, OfPolicy, OfSeed, Replayed, document, replay_document,
};
pub use crate::run::{Case, Outcome, SimulateError, Watch, run};
pub use crate::shape::{DEVICES, Device, SETTINGS, Shape};
