//! The free fabric of a worker that exchanges in lock-step: nobody calls anybody over it.

use std::collections::BTreeMap;
use std::time::Instant;

use foregate_api::ids::Rank;
use foregate_wire::frame::Call;

use super::{Fabric, PeerAddress, SendError};

/// Refuses every call.
#[derive(Debug)]
pub(crate) struct Uncalled {
    /// This worker.
    pub(crate) rank: Rank,
}

impl Fabric for Uncalled {
    fn send(&self, peer: Rank, _call: Call, _deadline: Instant) -> Result<(), SendError> {
        Err(SendError::Down(peer))
    }

    /// Groups are found through the store, so addresses say nothing.
    fn set_peers(&self, _peers: &BTreeMap<Rank, PeerAddress>) {}

    fn is_up(&self, _peer: Rank) -> bool {
        false
    }

    fn address(&self) -> String {
        format!("nccl:{}", self.rank)
    }

    fn close(&self) {}
}
