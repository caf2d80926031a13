//! The lock-step discipline: all ranks of an epoch step together, as collectives want it.
//!
//! In: what a rank wishes to step, then each layer's rows for each rank. Out: the same step everywhere, and rows back.
//!
//! ```text
//!  wishes ── all_gather ──► agree.rs: the same epoch everywhere? how many rows at most?
//!     │                      └─► capacity.rs: blocks of a fixed size in so many rounds, or counted ones
//!     ▼ per MoE layer
//!  rows by rank ── pack.rs ──► all_to_all ──► rows to run ──► all_to_all ──► one row per (row, expert)
//! ```
//!
//! Invariants:
//! - Every rank makes the same calls in the same order, also one that has nothing to do: it sends blocks without rows.
//! - What a step is, all ranks conclude from the same gathered values, so nobody has to be asked again.
//! - A block has a fixed size as long as few rows are stepped; its header says how many are in it. More rows take
//!   another round, and beyond a few rounds blocks are counted. No row is left out.
//! - A collective that fails is lost for all. Who sees it aborts the group, and takes no part in it again.
//!
//! [`Collective`] is all that the discipline asks of a library; [`super::nccl`] has it of NCCL. Who computes is
//! `exchange/lockstep.rs`.

use std::fmt;
use std::time::Instant;

use foregate_api::ids::{Epoch, Rank};

pub use agree::{Agreement, Wish, agree};
pub use capacity::{Form, Sizes};
pub use pack::{Answers, Incoming, PackError, Parcel, Requests};

mod agree;
mod capacity;
mod pack;

/// A collective, or a whole group, that is over.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the group of epoch {epoch} is lost in {call}: {why}")]
pub struct Lost {
    /// The epoch that the group was founded for.
    pub epoch: Epoch,
    /// What was called.
    pub call: &'static str,
    /// What the library says.
    pub why: String,
}

/// What the lock-step discipline asks of a library: three operations over the ranks of a group, which all of them call
/// in the same order. An error ends the group; every later call fails too.
pub trait Collective: Send + fmt::Debug {
    /// Ranks of the group.
    fn size(&self) -> usize;

    /// This one, below `size`.
    fn place(&self) -> usize;

    /// Sends block `i` of `send` to rank `i`, and receives rank `i`'s into block `i` of `recv`. All blocks of all ranks
    /// are `block` bytes long; both slices are `size · block`.
    ///
    /// # Errors
    /// A rank is gone, or not all came by `deadline`.
    fn all_to_all(
        &mut self,
        send: &[u8],
        recv: &mut [u8],
        block: usize,
        deadline: Instant,
    ) -> Result<(), Lost>;

    /// Sends `send[i]` to rank `i` and receives rank `i`'s into `recv[i]`, whose length is what that rank sends.
    ///
    /// # Errors
    /// As [`Self::all_to_all`]. Lengths of a pair that differ are an error where the library notices, by the deadline at the
    /// latest.
    fn counted(
        &mut self,
        send: &[Vec<u8>],
        recv: &mut [Vec<u8>],
        deadline: Instant,
    ) -> Result<(), Lost>;

    /// Brings a few bytes of each rank to all: rank `i`'s are block `i` of `all`, which is `size · own.len()`.
    ///
    /// # Errors
    /// As [`Self::all_to_all`].
    fn all_gather(&mut self, own: &[u8], all: &mut [u8], deadline: Instant)
    -> Result<(), Lost>;

    /// Ends the group in order: all ranks have agreed to, and call nothing more.
    ///
    /// # Errors
    /// As [`Self::all_to_all`]; the group is over all the same.
    fn finish(&mut self, deadline: Instant) -> Result<(), Lost>;

    /// Ends the group now, for all ranks that are still in it: they learn of it by the deadlines of what they call.
    fn abort(&mut self);
}

/// A group that a rank has joined.
#[derive(Debug)]
pub struct Joined {
    /// Its operations.
    pub collective: Box<dyn Collective>,
    /// Its number among the groups of the epoch: one more for each that was lost.
    pub generation: u32,
}

/// How groups come into being.
pub trait Groups: Send + Sync + fmt::Debug {
    /// Joins the group of these ranks, ascending, for an epoch: one of a higher generation than `after`, which was lost.
    ///
    /// # Errors
    /// Not all ranks came by `deadline`.
    fn join(
        &self,
        epoch: Epoch,
        ranks: &[Rank],
        after: Option<u32>,
        deadline: Instant,
    ) -> Result<Joined, Lost>;

    /// This rank joins no group any more, and does not wait for one either. Groups that stand are not touched.
    fn close(&self);
}
