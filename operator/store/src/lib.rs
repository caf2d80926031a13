//! `foregate-store`: where roles meet. A key-value store with leases and watches, in memory or in etcd.
//!
//! In: typed values of `foregate-api`. Out: the same, at every role. Start reading at [`kv`], then [`coord`].
//! Invariants: a watch begins with a snapshot and repeats it after a gap; every value carries a format number;
//! a value that cannot be read is logged and left out, it never stops a reader.
#![forbid(unsafe_code)]

pub mod codec;
pub mod coord;
pub mod etcd;
pub mod keys;
pub mod kv;
pub mod memory;
pub mod own_etcd;
pub mod past;
pub mod rendezvous;
mod state;
mod view;

pub use coord::Coord;
pub use etcd::EtcdStore;
pub use keys::Keys;
pub use kv::{Entry, Expect, Lease, Store, StoreError, WatchEvent};
pub use memory::MemoryStore;
pub use own_etcd::OwnEtcd;
pub use past::Archive;
pub use rendezvous::{Group, RendezvousError};
pub use state::ClusterState;
