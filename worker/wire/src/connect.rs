//! Channels to workers, opened in one place.
//!
//! In: a worker's `host:port`. Out: a lazily connecting channel that reconnects by itself.

use std::time::Duration;

use tonic::transport::{Channel, Endpoint};

/// How long a connection attempt may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How often a quiet HTTP/2 connection is probed, so that a vanished peer is noticed.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// The address is not a `host:port`.
#[derive(Debug, thiserror::Error)]
#[error("{address:?} is not a worker's address: write host:port")]
pub struct BadAddress {
    /// What was given.
    pub address: String,
    /// What tonic says about it.
    #[source]
    source: tonic::transport::Error,
}

/// A channel to `host:port`. Connects on first use; calls fail with `UNAVAILABLE` while it cannot.
/// Must be called inside a tokio runtime.
///
/// # Errors
/// When the address cannot be parsed.
pub fn channel(address: &str) -> Result<Channel, BadAddress> {
    let endpoint =
        Endpoint::from_shared(format!("http://{address}")).map_err(|source| BadAddress {
            address: address.to_owned(),
            source,
        })?;
    Ok(endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .keep_alive_while_idle(true)
        .connect_lazy())
}
