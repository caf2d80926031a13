//! Listeners for gRPC, opened in one place.
//!
//! In: a bound listener, a router of services, and the keys of this instance where the cluster has them. Out: a server
//! that runs until it is told to stop and then finishes the calls it has.

mod secure;

use std::time::Duration;

use foregate_tls::Keys;
use tokio::net::TcpListener;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::transport::server::Router;

/// How often a quiet connection is probed, so that a vanished client's streams end.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// A server with the settings every gRPC listener of the cluster has. Add services to it.
#[must_use]
pub fn server() -> Server {
    Server::builder()
        .tcp_nodelay(true)
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .http2_keepalive_timeout(Some(KEEP_ALIVE))
}

/// Serves `router` on `listener`; with `keys` only to callers that prove to be of this cluster. After `shutdown` no
/// call is taken any more; returns when the running ones have ended, so the caller bounds them.
///
/// # Errors
/// tonic's, when the listener breaks.
pub async fn serve(
    router: Router,
    listener: TcpListener,
    keys: Option<Keys>,
    shutdown: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    if let Some(keys) = keys {
        return secure::serve(router, listener, keys, shutdown).await;
    }
    let incoming = TcpListenerStream::new(listener).map(|stream| {
        let stream = stream?;
        stream.set_nodelay(true)?;
        Ok::<_, std::io::Error>(stream)
    });
    router
        .serve_with_incoming_shutdown(incoming, shutdown.cancelled_owned())
        .await
}
