//! Where ranks of a test meet: threads that hand each other bytes, or NCCL's host side over a library that does.
#![allow(dead_code, reason = "each test target uses its part")]
#![allow(unreachable_pub, reason = "a module of test targets")]

use std::fmt::Debug;
use std::sync::{Arc, Mutex};

use foregate_api::ids::Rank;
use foregate_store::coord::Coord;
use foregate_store::memory::MemoryStore;
use foregate_worker::fabric::lockstep::Groups;
use foregate_worker::fabric::nccl::NcclGroups;
use tokio::runtime::{Builder, Runtime};

use crate::peers::{self, Gone};
use crate::threads::{Meeting, Seat};

/// A place to meet.
pub trait Hall: Debug + Send + Sync {
    /// One rank's way in.
    fn groups(&self, rank: Rank) -> Arc<dyn Groups>;
    /// No group forms any more, and who waits for one does not.
    fn close(&self);
}

/// How a test gets halls of its own.
pub type NewHall = fn() -> Arc<dyn Hall>;

/// Threads that hand each other bytes.
pub fn by_threads() -> Arc<dyn Hall> {
    Arc::new(Threads(Arc::default()))
}

/// NCCL, where a rank that is gone is an error to the others.
pub fn by_nccl() -> Arc<dyn Hall> {
    Arc::new(Nccl::new(Gone::Told))
}

/// NCCL, where a rank that is gone is waited for.
pub fn by_silent_nccl() -> Arc<dyn Hall> {
    Arc::new(Nccl::new(Gone::Silent))
}

#[derive(Debug)]
struct Threads(Arc<Meeting>);

impl Hall for Threads {
    fn groups(&self, rank: Rank) -> Arc<dyn Groups> {
        Arc::new(Seat::new(Arc::clone(&self.0), rank))
    }

    fn close(&self) {
        self.0.close();
    }
}

/// Ranks that find each other through a store.
#[derive(Debug)]
pub struct Nccl {
    pub coord: Coord,
    gone: Gone,
    /// Where the store's watches run; taken by the drop.
    runtime: Option<Runtime>,
    seats: Mutex<Vec<Arc<NcclGroups>>>,
}

impl Nccl {
    pub fn new(gone: Gone) -> Self {
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        Self {
            coord: Coord::new(Arc::new(MemoryStore::new()), "test"),
            gone,
            runtime: Some(runtime),
            seats: Mutex::default(),
        }
    }

    pub fn runtime(&self) -> &Runtime {
        self.runtime.as_ref().unwrap()
    }
}

impl Hall for Nccl {
    fn groups(&self, rank: Rank) -> Arc<dyn Groups> {
        let groups = Arc::new(NcclGroups::new(
            rank,
            self.coord.clone(),
            Arc::new(peers::comms(self.gone)),
            self.runtime().handle().clone(),
        ));
        self.seats.lock().unwrap().push(Arc::clone(&groups));
        groups
    }

    fn close(&self) {
        for seat in self.seats.lock().unwrap().iter() {
            seat.close();
        }
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        // A test of a runtime may not wait for another one.
        self.runtime.take().unwrap().shutdown_background();
    }
}
