//! /metrics, /healthz and /readyz of operator and worker. The gateway has its own.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::Router;
use prometheus::{Registry, TextEncoder};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// Whether a role is ready to do its work; shared with whoever knows.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ready(Arc<AtomicBool>);

impl Ready {
    /// Says so.
    pub(crate) fn set(&self, ready: bool) {
        self.0.store(ready, Ordering::Release);
    }

    fn get(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

#[derive(Clone)]
struct Status {
    registry: Registry,
    ready: Ready,
}

/// Serves until `shutdown`.
///
/// # Errors
/// The listener's.
pub(crate) async fn serve(
    listener: TcpListener,
    registry: Registry,
    ready: Ready,
    shutdown: CancellationToken,
) -> std::io::Result<()> {
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .with_state(Status { registry, ready });
    axum::serve(listener, router)
        .with_graceful_shutdown(shutdown.cancelled_owned())
        .await
}

/// Binds a listener with an error that names the address.
///
/// # Errors
/// The address cannot be bound; the text says why and what to do.
pub(crate) async fn bind(address: &str) -> Result<(TcpListener, SocketAddr), BindError> {
    let failed = |source| BindError {
        address: address.to_owned(),
        source,
    };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let local = listener.local_addr().map_err(failed)?;
    Ok((listener, local))
}

/// An address that cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address}: {source}{}", remedy(source))]
pub(crate) struct BindError {
    address: String,
    source: std::io::Error,
}

fn remedy(error: &std::io::Error) -> &'static str {
    match error.kind() {
        std::io::ErrorKind::AddrInUse => "; something else uses this port, choose another with --port",
        std::io::ErrorKind::PermissionDenied => "; ports below 1024 need privileges, choose a higher one",
        std::io::ErrorKind::AddrNotAvailable => "; this machine has no such address, see --host",
        _ => "",
    }
}

async fn metrics(State(status): State<Status>) -> Response {
    match TextEncoder::new().encode_to_string(&status.registry.gather()) {
        Ok(text) => (
            [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")],
            text,
        )
            .into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

async fn readyz(State(status): State<Status>) -> Response {
    if status.ready.get() {
        "ready\n".into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "not ready\n").into_response()
    }
}
