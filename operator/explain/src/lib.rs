//! `foregate-explain`: why an expert lives where it lives, from what was recorded when that was decided.
//!
//! What goes in: the [`Past`] of a cluster, that is [`Record`]s of decisions and the placements they were made on and
//! led to. What comes out: answers about an expert, a rank, the last move, the next one, and about workers and slots
//! that nobody has paid for yet; each as a value for JSON and as text.
//!
//! Invariants: nothing is told from memory that can be computed: a record holds what the planner was given, and every
//! answer is the planner's own code run on it again. Pure: no clock (the time of the question is given), no I/O.
//!
//! Start reading at [`record`], then `expert.rs`.

#![forbid(unsafe_code)]

mod case;
mod coming;
mod expert;
mod last;
mod next;
mod past;
mod rank;
pub mod record;
mod text;
mod what_if;

pub use crate::coming::{Coming, coming};
pub use crate::expert::{Alternative, Change, ExpertAnswer, HeldCopy, Kind, expert};
pub use crate::last::{LastAnswer, LayerStory, change, last};
pub use crate::next::{NearLayer, NextAnswer, next};
pub use crate::past::{Missing, Past};
pub use crate::rank::{LayerLoad, RankAnswer, rank};
pub use crate::record::Record;
pub use crate::what_if::{Machine, Offer, WhatIf, Wish, WishError, what_if};
