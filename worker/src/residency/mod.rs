//! Which experts are in this worker's memory, and which placement its steps use.
//!
//! ```text
//!  table.rs     (layer, expert) → weights: what is resident
//!  gate.rs      the epoch that steps use, switched between steps; the epochs whose calls are served
//!  follow.rs    the actor that does what the rollover machine orders
//!  migrate.rs   loads what a placement wants, from a peer or the checkpoint, and verifies it
//!  background.rs  packing and unpacking beside serving, with low priority
//!  cache.rs     which experts stay where not all fit; pure, not asked yet: a worker holds what its placement says
//!  serve.rs     the Experts service: hands resident experts to peers
//! ```
//!
//! What to load, serve and release is decided by `foregate_planner::rollover::member`; here are its effects.
//! Invariant: a table holds only what an active, draining or wanted placement gives this rank.

mod background;
pub mod cache;
pub mod follow;
pub mod gate;
pub mod migrate;
pub mod serve;
pub mod table;

pub use gate::{EpochGate, Routing};
pub use table::{Residency, Resident};
