//! `foregate-gateway`: HTTP in, text out.
//!
//! In: OpenAI requests over HTTP, the cluster's state over the store, events of sequences over gRPC.
//! Out: answers in OpenAI's shape, token by token; metrics; the load matrix.
//! Invariants: an unsupported field is refused by its name, never ignored; a request in work holds guards
//! (permit, load) that its end in any form gives back; half a character is never sent; every queue has a
//! bound and every wait a deadline.
//! Start reading at [`http`], then `generate`, then `upstream`.

#![forbid(unsafe_code)]

use std::sync::Arc;

use foregate_api::node::GatewayConfig;
use foregate_store::kv::Store;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

pub mod clock;
pub mod error;
pub mod http;
pub mod output;
pub mod prompt;
pub mod random;

pub use error::{ApiError, GatewayError};

/// What a gateway needs from its composition root.
#[derive(Debug)]
pub struct Deps {
    /// Name of the cluster, prefix of the store's keys.
    pub cluster: String,
    /// Settings.
    pub config: GatewayConfig,
    /// The bound listener of the HTTP API.
    pub listener: TcpListener,
    /// Where the roles meet.
    pub store: Arc<dyn Store>,
    /// Where metrics are registered; `/metrics` shows all of it.
    pub registry: prometheus::Registry,
    /// Ends the gateway: new requests are refused, those in work are finished.
    pub shutdown: CancellationToken,
}

/// Serves HTTP until `shutdown`, then drains.
///
/// # Errors
/// Settings or files that cannot work, found before the first request; a broken listener.
pub async fn run(deps: Deps) -> Result<(), GatewayError> {
    let _ = &deps;
    Ok(())
}
