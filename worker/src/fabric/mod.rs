//! How rows travel between workers: the trait every fabric implements, and what its users hold.
//!
//! In: a [`Call`] for a peer. Out: one [`Completion`] per accepted call in the worker's [`Inbox`].
//!
//! ```text
//!  engine thread ── send ──► Fabric ──────────► peer's fabric ── CallHandler::call ──► its compute thread
//!        ▲                                                                                   │
//!        └──────── Inbox ◄── Completion ◄── Fabric ◄──────────────────── Responder::reply ◄──┘
//! ```
//!
//! This is the *free* discipline: calls are point to point, each rank steps at its own pace, and an idle
//! worker keeps answering. Invariants:
//! - `send` does not wait for the answer. Calls in flight to a peer are bounded; a full peer is [`SendError::Busy`].
//! - An accepted call completes at most once. When the peer dies its pending calls complete as
//!   [`Outcome::Lost`] at once, and nothing else is affected.
//! - The caller owns the deadline: it stops waiting by itself. A call that nobody waits for any more keeps
//!   its place in the bound until it is answered, so a stopped peer becomes busy instead of a memory leak.
//!
//! The lock-step discipline, in which all ranks of an epoch step together, is [`lockstep`].

use std::collections::BTreeMap;
use std::fmt;
use std::time::Instant;

use foregate_api::ids::{Epoch, LayerId, Rank};
use foregate_wire::frame::{Call, Refuse, RefuseReason, Reply};

pub use inbox::{Completion, Inbox, Outcome};

mod inbox;
pub mod local;
pub mod lockstep;
pub mod nccl;
mod pending;
pub mod tcp;
pub(crate) mod uncalled;

/// Where a peer is, and which of its lives is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerAddress {
    /// `host:port`, or `local:<rank>`.
    pub exchange: String,
    /// The peer's incarnation; another process under the same address is not the peer.
    pub incarnation: u64,
}

/// Who this worker is to its peers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Name of the cluster.
    pub cluster: String,
    /// This worker's number.
    pub rank: Rank,
    /// This start of the process.
    pub incarnation: u64,
}

/// Why a call was not accepted for sending. The rows may go to another copy at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// As many calls as may be are in flight to this peer.
    #[error("rank {0} has too many calls in flight")]
    Busy(Rank),
    /// No connection to the peer, or no such peer.
    #[error("rank {0} is not connected")]
    Down(Rank),
    /// The call cannot be encoded.
    #[error("the call to rank {0} is malformed")]
    Malformed(Rank),
}

impl SendError {
    /// Whether the same call may succeed later or elsewhere.
    #[must_use]
    pub const fn is_retryable(self) -> bool {
        matches!(self, Self::Busy(_) | Self::Down(_))
    }
}

/// Carries calls to peers.
pub trait Fabric: Send + Sync + fmt::Debug {
    /// Hands a call over without waiting for its answer. `deadline` says when the caller stops waiting.
    /// Exactly one [`Completion`] with this call's number follows in the inbox the fabric was opened with.
    ///
    /// # Errors
    /// When the call was not accepted; no completion follows then.
    fn send(&self, peer: Rank, call: Call, deadline: Instant) -> Result<(), SendError>;

    /// Replaces what is known about the peers. Connections to peers that vanished or changed are closed.
    fn set_peers(&self, peers: &BTreeMap<Rank, PeerAddress>);

    /// Whether a call to `peer` would find a connection now.
    fn is_up(&self, peer: Rank) -> bool;

    /// Where peers reach this worker: the text for `Member::exchange`.
    fn address(&self) -> String;

    /// Closes every connection. Pending calls complete as lost; later sends are refused.
    fn close(&self);
}

/// Takes calls of peers.
pub trait CallHandler: Send + Sync + fmt::Debug {
    /// Takes one call. Must not wait: it queues the call or refuses it. Runs on a thread of the fabric.
    fn call(&self, from: Rank, call: Call, responder: Responder);
}

/// Carries one answer back; a fabric's half of a [`Responder`].
pub(crate) trait Answer: Send {
    /// Sends the answer. A caller that is gone is no error.
    fn answer(&self, answer: Result<Reply, Refuse>);
}

/// The right to answer one call, once. Dropping it refuses the call as busy.
pub struct Responder {
    to: Option<Box<dyn Answer>>,
    epoch: Epoch,
    call: u64,
    layer: LayerId,
    hidden: u32,
}

impl fmt::Debug for Responder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Responder")
            .field("call", &self.call)
            .finish_non_exhaustive()
    }
}

impl Responder {
    pub(crate) fn new(call: &Call, to: Box<dyn Answer>) -> Self {
        Self {
            to: Some(to),
            epoch: call.epoch,
            call: call.call,
            layer: call.layer,
            hidden: call.hidden,
        }
    }

    /// Answers with one row per route; `queued` rows still wait here.
    pub fn reply(mut self, rows: Vec<f32>, queued: u32) {
        if let Some(to) = self.to.take() {
            to.answer(Ok(Reply {
                epoch: self.epoch,
                call: self.call,
                layer: self.layer,
                hidden: self.hidden,
                queued,
                rows,
            }));
        }
    }

    /// Answers that the call will not be run. `active` is the epoch served here.
    pub fn refuse(mut self, active: Epoch, reason: RefuseReason) {
        self.send_refusal(active, reason);
    }

    fn send_refusal(&mut self, epoch: Epoch, reason: RefuseReason) {
        if let Some(to) = self.to.take() {
            to.answer(Err(Refuse {
                epoch,
                call: self.call,
                reason,
            }));
        }
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        self.send_refusal(Epoch(0), RefuseReason::Busy);
    }
}
