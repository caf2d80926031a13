//! /metrics, /healthz and /readyz of operator and worker. The gateway has its own.

use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use foregate_gateway::serve::{self as server, End, Limits};
use foregate_worker::Health;
use prometheus::{Registry, TextEncoder};
use tokio::net::TcpListener;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

/// Longest time for answers on their way when the role has ended.
const FLUSH: Duration = Duration::from_millis(500);

/// Who knows how a role is.
#[derive(Debug, Clone)]
pub(crate) enum Probe {
    /// An operator works from its start on: what it waits for, it waits for by design.
    Operator,
    /// A worker says so itself.
    Worker(Health),
}

impl Probe {
    fn alive(&self) -> Result<(), String> {
        match self {
            Self::Operator => Ok(()),
            Self::Worker(health) => health.alive(),
        }
    }

    fn ready(&self) -> Result<(), String> {
        match self {
            Self::Operator => Ok(()),
            Self::Worker(health) => health.ready(),
        }
    }
}

#[derive(Clone)]
struct Status {
    registry: Registry,
    probe: Probe,
}

/// Serves until `ended`; then answers that are on their way get a moment, and every connection is cut: one on which
/// half a request was sent must not hold up the end of the role.
pub(crate) async fn serve(
    listener: TcpListener,
    registry: Registry,
    probe: Probe,
    ended: CancellationToken,
) {
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .with_state(Status { registry, probe });
    let cut = async {
        ended.cancelled().await;
        sleep(FLUSH).await;
    };
    tokio::select! {
        () = server::serve(listener, router, Limits::for_requests(0), End::at_once(ended.clone())) => {}
        () = cut => {}
    }
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
        std::io::ErrorKind::AddrInUse => {
            "; something else uses this port, choose another with --port"
        }
        std::io::ErrorKind::PermissionDenied => {
            "; ports below 1024 need privileges, choose a higher one"
        }
        std::io::ErrorKind::AddrNotAvailable => {
            "; this machine has no such address, see --host"
        }
        _ => "",
    }
}

async fn metrics(State(status): State<Status>) -> Response {
    match TextEncoder::new().encode_to_string(&status.registry.gather()) {
        Ok(text) => (
            [(
                header::CONTENT_TYPE,
                "text/plain; version=0.0.4; charset=utf-8",
            )],
            text,
        )
            .into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

async fn healthz(State(status): State<Status>) -> Response {
    verdict(status.probe.alive())
}

async fn readyz(State(status): State<Status>) -> Response {
    verdict(status.probe.ready())
}

fn verdict(said: Result<(), String>) -> Response {
    match said {
        Ok(()) => "ok\n".into_response(),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response(),
    }
}
