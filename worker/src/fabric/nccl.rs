//! The lock-step discipline over NCCL: groups whose ranks find each other through the store.
//!
//! In: the ranks of an epoch, what founds and joins groups on this worker's card ([`Comms`]), the store. Out: a
//! [`Collective`] whose rows are in memory of this process; `foregate_cuda` stages them to the card and back.
//!
//! ```text
//!  lowest rank: new id ─► group/<epoch>, one generation more ─► join
//!  the others:  wait for that key                            ─► join, as long as no later generation is there
//! ```
//!
//! Invariants:
//! - The founder founds a new generation each time it joins, so nobody waits in a group that another one was given up for.
//! - What is written for a group goes with the lease of its founder.
//! - Nothing waits longer than the deadline of the call, or after [`Groups::close`].

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use foregate_api::ids::{Epoch, Rank};
use foregate_kernels::{Comm, CommFault, Comms, Seat};
use foregate_store::coord::Coord;
use foregate_store::kv::{Lease, StoreError};
use foregate_store::rendezvous::{Group, RendezvousError};
use tokio::runtime::Handle;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::lockstep::{Collective, Groups, Joined, Lost};
use crate::membership::LEASE_TTL;

pub mod trial;

/// Times that a founder tries: another process of its rank, or a lease that ended, may be in its way.
const FOUNDINGS: usize = 4;

/// Groups of one worker.
pub struct NcclGroups {
    rank: Rank,
    coord: Coord,
    comms: Arc<dyn Comms>,
    /// Where the store is waited for; the threads that join are none of it.
    runtime: Handle,
    /// Of the groups that this worker founded.
    lease: Mutex<Option<Arc<dyn Lease>>>,
    closed: CancellationToken,
}

impl fmt::Debug for NcclGroups {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NcclGroups")
            .field("rank", &self.rank)
            .field("comms", &self.comms)
            .finish_non_exhaustive()
    }
}

impl NcclGroups {
    /// Groups of this rank. They are joined on threads that are not of `runtime`.
    pub fn new(rank: Rank, coord: Coord, comms: Arc<dyn Comms>, runtime: Handle) -> Self {
        Self {
            rank,
            coord,
            comms,
            runtime,
            lease: Mutex::default(),
            closed: CancellationToken::new(),
        }
    }

    /// The group to join, which the lowest rank founds and the others wait for.
    fn group(
        &self,
        epoch: Epoch,
        ranks: &[Rank],
        after: Option<u32>,
        deadline: Instant,
    ) -> Result<Group, Lost> {
        let lost = |why: String| lost(epoch, "join", why);
        let work = async {
            if Group::founder(ranks) == Some(self.rank) {
                return self.found(epoch, ranks, after).await;
            }
            let met = self.coord.meet(epoch, ranks, after, left(deadline)).await;
            met.map_err(|error| error.to_string())
        };
        let bounded = async {
            tokio::select! {
                group = work => group,
                () = tokio::time::sleep(left(deadline)) => Err("the store did not answer in time".to_owned()),
                () = self.closed.cancelled() => Err("this rank is leaving".to_owned()),
            }
        };
        self.runtime.block_on(bounded).map_err(lost)
    }

    async fn found(
        &self,
        epoch: Epoch,
        ranks: &[Rank],
        after: Option<u32>,
    ) -> Result<Group, String> {
        let mut ranks = ranks.to_vec();
        ranks.sort_unstable();
        let mut group = Group {
            epoch,
            generation: after.map_or(0, |lost| lost.saturating_add(1)),
            ranks,
            id: self.comms.new_id().map_err(|fault| fault.to_string())?,
        };
        let mut said = String::new();
        for _ in 0..FOUNDINGS {
            let lease = self.lease().await.map_err(|error| error.to_string())?;
            let Err(error) = self.coord.found_group(&group, lease.as_ref()).await else {
                return Ok(group);
            };
            said = error.to_string();
            match error {
                RendezvousError::Founded { generation, .. } => {
                    group.generation = generation.saturating_add(1);
                }
                RendezvousError::Store(StoreError::LeaseEnded) => self.forget_lease(),
                _ => break,
            }
        }
        Err(said)
    }

    async fn lease(&self) -> Result<Arc<dyn Lease>, StoreError> {
        let held = self
            .lease
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        if let Some(lease) = held {
            return Ok(lease);
        }
        let lease = self.coord.store().lease(LEASE_TTL).await?;
        let mut held = self.lease.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Arc::clone(held.insert(lease)))
    }

    fn forget_lease(&self) {
        *self.lease.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl Groups for NcclGroups {
    fn join(
        &self,
        epoch: Epoch,
        ranks: &[Rank],
        after: Option<u32>,
        deadline: Instant,
    ) -> Result<Joined, Lost> {
        let mut after = after;
        loop {
            let group = self.group(epoch, ranks, after, deadline)?;
            let Some(place) = group.place(self.rank) else {
                let why = format!("rank {} is none of {ranks:?}", self.rank);
                return Err(lost(epoch, "join", why));
            };
            let (generation, size) = (group.generation, group.ranks.len());
            let replaced = self.replaced(&group, deadline);
            let is_replaced = || replaced.now();
            let joined = self.comms.join(Seat {
                id: &group.id,
                ranks: size,
                rank: place,
                epoch: epoch.0,
                deadline,
                wanted: &|| !is_replaced() && !self.closed.is_cancelled(),
            });
            match joined {
                Ok(comm) => {
                    return Ok(Joined {
                        collective: Box::new(Member {
                            epoch,
                            size,
                            place,
                            comm,
                            copies: Vec::new(),
                        }),
                        generation,
                    });
                }
                // Its founder has given this one up, and waits in another.
                Err(_) if is_replaced() && !left(deadline).is_zero() => {
                    after = Some(generation);
                }
                Err(fault) => return Err(lost(epoch, fault.call, fault.why)),
            }
        }
    }

    fn close(&self) {
        self.closed.cancel();
    }
}

/// Whether a later generation of a group was founded. Dropping it ends the question.
struct Replaced {
    found: Arc<AtomicBool>,
    _watch: JoinSet<()>,
}

impl Replaced {
    fn now(&self) -> bool {
        self.found.load(Ordering::Relaxed)
    }
}

impl NcclGroups {
    /// Watches for the group's next generation. Its founder need not: nobody else founds.
    fn replaced(&self, group: &Group, deadline: Instant) -> Replaced {
        let found = Arc::<AtomicBool>::default();
        let mut watch = JoinSet::new();
        if group.ranks.first() != Some(&self.rank) {
            let (coord, found) = (self.coord.clone(), Arc::clone(&found));
            let (epoch, ranks, after) =
                (group.epoch, group.ranks.clone(), Some(group.generation));
            let patience = left(deadline);
            let next = async move {
                if coord.meet(epoch, &ranks, after, patience).await.is_ok() {
                    found.store(true, Ordering::Relaxed);
                }
            };
            watch.spawn_on(next, &self.runtime);
        }
        Replaced {
            found,
            _watch: watch,
        }
    }
}

/// One rank's place in a group.
#[derive(Debug)]
struct Member {
    epoch: Epoch,
    size: usize,
    place: usize,
    comm: Box<dyn Comm>,
    /// A gather is an exchange in which everybody gets the same.
    copies: Vec<u8>,
}

impl Member {
    fn lost(&self, fault: CommFault) -> Lost {
        lost(self.epoch, fault.call, fault.why)
    }
}

impl Collective for Member {
    fn size(&self) -> usize {
        self.size
    }

    fn place(&self) -> usize {
        self.place
    }

    fn all_to_all(
        &mut self,
        send: &[u8],
        recv: &mut [u8],
        block: usize,
        deadline: Instant,
    ) -> Result<(), Lost> {
        let done = self.comm.all_to_all(send, recv, block, deadline);
        done.map_err(|fault| self.lost(fault))
    }

    fn counted(
        &mut self,
        send: &[Vec<u8>],
        recv: &mut [Vec<u8>],
        deadline: Instant,
    ) -> Result<(), Lost> {
        let done = self.comm.counted(send, recv, deadline);
        done.map_err(|fault| self.lost(fault))
    }

    fn all_gather(
        &mut self,
        own: &[u8],
        all: &mut [u8],
        deadline: Instant,
    ) -> Result<(), Lost> {
        self.copies.clear();
        for _ in 0..self.size {
            self.copies.extend_from_slice(own);
        }
        let done = self.comm.all_to_all(&self.copies, all, own.len(), deadline);
        done.map_err(|fault| self.lost(fault))
    }

    fn finish(&mut self, deadline: Instant) -> Result<(), Lost> {
        let done = self.comm.finish(deadline);
        done.map_err(|fault| self.lost(fault))
    }

    fn abort(&mut self) {
        self.comm.abort();
    }
}

fn lost(epoch: Epoch, call: &'static str, why: String) -> Lost {
    Lost { epoch, call, why }
}

#[expect(
    clippy::disallowed_methods,
    reason = "threads that step together wait on the wall clock"
)]
fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}
