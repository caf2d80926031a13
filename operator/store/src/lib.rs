//! `foregate-store`: where roles meet. A key-value store with leases and watches, in memory or in etcd.
//!
//! In: typed values of `foregate-api`. Out: the same, at every role. Start reading at [`kv`], then [`coord`].
//! Invariants: a watch begins with a snapshot and repeats it after a gap; every value carries a format number.

pub mod coord;
pub mod keys;
pub mod kv;
