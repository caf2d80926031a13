//! The fabric inside one process: calls are moved, not copied. Reference of the contract tests.
//!
//! The composition root makes one [`LocalHub`] and hands it to every worker of the process.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use foregate_api::ids::Rank;
use foregate_wire::frame::{Call, Refuse, Reply};

use super::pending::Pending;
use super::{Answer, CallHandler, Fabric, Identity, Inbox, PeerAddress, Responder, SendError};

/// The meeting place of the workers of one process.
#[derive(Debug, Default)]
pub struct LocalHub {
    seats: Mutex<BTreeMap<(String, Rank), Arc<Seat>>>,
}

/// One worker at the hub.
#[derive(Debug)]
struct Seat {
    incarnation: u64,
    handler: Arc<dyn CallHandler>,
    /// Lanes of callers into this seat, closed with it.
    lanes: Mutex<Vec<Arc<Pending>>>,
}

impl LocalHub {
    /// An empty hub.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Takes a seat for a worker. An earlier seat of the same rank is closed.
    #[must_use]
    pub fn open(
        self: &Arc<Self>,
        me: Identity,
        handler: Arc<dyn CallHandler>,
        inbox: Arc<Inbox>,
        in_flight: usize,
    ) -> LocalFabric {
        let seat = Arc::new(Seat {
            incarnation: me.incarnation,
            handler,
            lanes: Mutex::default(),
        });
        let old = self
            .lock()
            .insert((me.cluster.clone(), me.rank), Arc::clone(&seat));
        if let Some(old) = old {
            old.close();
        }
        LocalFabric {
            hub: Arc::clone(self),
            me,
            seat,
            inbox,
            in_flight,
            lanes: Mutex::default(),
        }
    }

    fn seat(&self, cluster: &str, rank: Rank) -> Option<Arc<Seat>> {
        self.lock().get(&(cluster.to_owned(), rank)).cloned()
    }

    fn leave(&self, me: &Identity, seat: &Arc<Seat>) {
        let key = (me.cluster.clone(), me.rank);
        let mut seats = self.lock();
        if seats.get(&key).is_some_and(|held| Arc::ptr_eq(held, seat)) {
            seats.remove(&key);
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<(String, Rank), Arc<Seat>>> {
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seat {
    fn close(&self) {
        let lanes = std::mem::take(&mut *lock(&self.lanes));
        for lane in lanes {
            lane.close();
        }
    }
}

/// A way into a peer's seat.
#[derive(Debug, Clone)]
struct Lane {
    seat: Arc<Seat>,
    pending: Arc<Pending>,
}

/// One worker's view of the hub.
#[derive(Debug)]
pub struct LocalFabric {
    hub: Arc<LocalHub>,
    me: Identity,
    seat: Arc<Seat>,
    inbox: Arc<Inbox>,
    in_flight: usize,
    lanes: Mutex<Lanes>,
}

#[derive(Debug, Default)]
struct Lanes {
    peers: BTreeMap<Rank, PeerAddress>,
    open: BTreeMap<Rank, Lane>,
    closed: bool,
}

impl LocalFabric {
    /// The lane to a peer, opened on first use and again after the peer took a new seat.
    fn lane(&self, peer: Rank) -> Result<Lane, SendError> {
        let mut lanes = lock(&self.lanes);
        let down = SendError::Down(peer);
        let wanted = lanes.peers.get(&peer).ok_or(down)?.incarnation;
        if lanes.closed {
            return Err(down);
        }
        let seat = self.hub.seat(&self.me.cluster, peer).ok_or(down)?;
        if seat.incarnation != wanted {
            return Err(down);
        }
        if let Some(lane) = lanes.open.get(&peer)
            && Arc::ptr_eq(&lane.seat, &seat)
        {
            return Ok(lane.clone());
        }
        let pending = Arc::new(Pending::new(peer, self.in_flight, Arc::clone(&self.inbox)));
        lock(&seat.lanes).push(Arc::clone(&pending));
        let lane = Lane { seat, pending };
        lanes.open.insert(peer, lane.clone());
        Ok(lane)
    }
}

impl Fabric for LocalFabric {
    fn send(&self, peer: Rank, call: Call, deadline: Instant) -> Result<(), SendError> {
        let lane = self.lane(peer)?;
        lane.pending.enter(call.call, deadline)?;
        let responder = Responder::new(&call, Box::new(LocalAnswer(lane.pending)));
        lane.seat.handler.call(self.me.rank, call, responder);
        Ok(())
    }

    fn set_peers(&self, peers: &BTreeMap<Rank, PeerAddress>) {
        let mut lanes = lock(&self.lanes);
        lanes.open.retain(|rank, lane| {
            let keep = peers
                .get(rank)
                .is_some_and(|peer| peer.incarnation == lane.seat.incarnation);
            if !keep {
                lane.pending.close();
            }
            keep
        });
        lanes.peers.clone_from(peers);
    }

    fn is_up(&self, peer: Rank) -> bool {
        self.lane(peer).is_ok()
    }

    fn address(&self) -> String {
        format!("local:{}", self.me.rank)
    }

    fn close(&self) {
        self.hub.leave(&self.me, &self.seat);
        self.seat.close();
        let mut lanes = lock(&self.lanes);
        lanes.closed = true;
        for lane in std::mem::take(&mut lanes.open).into_values() {
            lane.pending.close();
        }
    }
}

impl Drop for LocalFabric {
    fn drop(&mut self) {
        self.close();
    }
}

struct LocalAnswer(Arc<Pending>);

impl Answer for LocalAnswer {
    fn answer(&self, answer: Result<Reply, Refuse>) {
        self.0.complete(answer);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
