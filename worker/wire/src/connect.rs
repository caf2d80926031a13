//! Channels to workers, opened in one place.
//!
//! In: a worker's `host:port`, and the keys of this instance where the cluster has them. Out: a lazily connecting
//! channel that reconnects by itself.

use std::time::Duration;

use foregate_tls::{Keys, Protocol};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tower::service_fn;

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

/// A channel to the worker at `host:port`; with `keys` over connections on which both sides prove that they are of one
/// cluster, else over plain ones. Connects on first use; calls fail with `UNAVAILABLE` while it cannot.
/// Must be called inside a tokio runtime.
///
/// # Errors
/// When the address cannot be parsed.
pub fn channel(address: &str, keys: Option<&Keys>) -> Result<Channel, BadAddress> {
    let endpoint =
        Endpoint::from_shared(format!("http://{address}")).map_err(|source| BadAddress {
            address: address.to_owned(),
            source,
        })?;
    let endpoint = endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .keep_alive_while_idle(true);
    let Some(keys) = keys else {
        return Ok(endpoint.connect_lazy());
    };
    let (address, keys) = (address.to_owned(), keys.clone());
    let connect = move |_: Uri| {
        let (address, keys) = (address.clone(), keys.clone());
        async move { secure(&address, &keys).await.map(TokioIo::new) }
    };
    Ok(endpoint.connect_with_connector_lazy(service_fn(connect)))
}

async fn secure(
    address: &str,
    keys: &Keys,
) -> Result<impl tokio::io::AsyncRead + tokio::io::AsyncWrite + use<>, foregate_tls::TlsError> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let secured = keys.connect(Protocol::Grpc, stream, CONNECT_TIMEOUT).await;
    secured.inspect_err(|error| {
        if error.is_refusal() {
            tracing::warn!(address, %error, "worker_refused");
        }
    })
}
