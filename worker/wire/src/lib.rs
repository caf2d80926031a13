//! `foregate-wire`: what travels between gateway and workers, and between workers.
//!
//! In: `.proto` files (gRPC) and the exchange frame. Out: stubs, the frame codec, listeners and channels.
//! Invariants: decoding never panics on any bytes; a frame carries epoch, deadline and checksum.

pub mod connect;
pub mod frame;
pub mod prefix;
pub mod serve;

#[allow(
    missing_docs,
    missing_debug_implementations,
    unreachable_pub,
    unused_qualifications,
    single_use_lifetimes,
    rust_2018_idioms,
    trivial_numeric_casts,
    clippy::all,
    clippy::pedantic,
    clippy::allow_attributes,
    clippy::allow_attributes_without_reason,
    clippy::wildcard_imports,
    clippy::same_name_method,
    clippy::large_enum_variant,
    clippy::disallowed_types,
    reason = "generated"
)]
mod generated {
    pub mod generation {
        tonic::include_proto!("foregate.generation.v1");
    }
    pub mod experts {
        tonic::include_proto!("foregate.experts.v1");
    }
    pub mod sglang {
        tonic::include_proto!("sglang.grpc.scheduler");
    }
}

pub use generated::{experts, generation, sglang};
pub use tonic;
