//! `foregate-api`: the vocabulary that operator, gateway and workers share. Values only.
//!
//! What goes in: nothing. What comes out: plain types with serde, and the few pure functions that
//! belong to a value (a placement's diff, a load window's sums).
//! Invariants: no I/O, no clock, no async; maps are ordered, so equal values have equal bytes.
//! Start reading at [`placement`], then [`node`].

pub mod cpu;
pub mod forecast;
pub mod ids;
pub mod limits;
pub mod load;
pub mod manifest;
pub mod member;
pub mod model;
pub mod node;
pub mod placement;
pub mod security;
pub mod tls;
pub mod traffic;
pub mod weights;
