//! `GET /debug/trace`: an expert trace of what goes on, as a stream, until the client has enough.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderValue, Response, header};
use foregate_trace::{Event, Header, begin};
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::{Interval, MissedTickBehavior, interval};

use super::state::Gateway;
use crate::error::ApiError;
use crate::feed::{Ended, Windows};

/// How often it is looked for new load windows.
const LOOK: Duration = Duration::from_millis(200);

/// A trace that is being written.
struct Tracing {
    gateway: Arc<Gateway>,
    header: Header,
    requests: Receiver<Arc<Ended>>,
    windows: Windows,
    ticks: Interval,
}

/// Streams a trace. It ends with the gateway.
pub(super) async fn trace(
    State(gateway): State<Arc<Gateway>>,
) -> Result<Response<Body>, ApiError> {
    let view = gateway.views.load();
    let model = view.model().ok_or_else(|| {
        ApiError::unavailable("not_ready", "no worker has told yet which model it serves")
    })?;
    let header = Header {
        model: gateway.main_name().to_owned(),
        layers: model.moe_layers(),
        experts: model.experts,
        top_k: model.top_k,
        started_ms: gateway.clock.unix_millis(),
    };
    let first = begin(&header);
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let tracing = Tracing {
        requests: gateway.runner.upstream.feed().listen(),
        header,
        gateway,
        windows: Windows::default(),
        ticks,
    };
    let events = futures::stream::unfold(tracing, |mut tracing| async move {
        let bytes = tracing.more().await?;
        Some((Ok::<_, std::convert::Infallible>(bytes), tracing))
    });
    let begun = futures::stream::once(async move { Ok(first) });
    let mut response =
        Response::new(Body::from_stream(futures::StreamExt::chain(begun, events)));
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/octet-stream"),
    );
    Ok(response)
}

impl Tracing {
    /// The next events; `None` at the end.
    async fn more(&mut self) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        while bytes.is_empty() {
            let told = tokio::select! {
                told = self.requests.recv() => Some(told),
                _ = self.ticks.tick() => None,
            };
            let at_ms = self
                .gateway
                .clock
                .unix_millis()
                .saturating_sub(self.header.started_ms);
            let events = match told {
                Some(Ok(ended)) => ended.event(&self.header, at_ms).into_iter().collect(),
                Some(Err(RecvError::Lagged(lost))) => vec![Event::Gap { at_ms, lost }],
                Some(Err(RecvError::Closed)) => return None,
                None if self.gateway.leaving.is_cancelled() => return None,
                None => {
                    let view = self.gateway.views.load();
                    self.windows.new_in(&view.state, &self.header, at_ms)
                }
            };
            for event in events {
                event.write(&mut bytes);
            }
        }
        Some(bytes)
    }
}
