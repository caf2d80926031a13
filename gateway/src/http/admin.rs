//! Routes for operators: version, health, readiness, metrics, the load matrix.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderValue, Response, StatusCode, header};
use foregate_api::forecast::Forecast;
use foregate_api::ids::Rank;
use foregate_api::load::sum_gate;
use foregate_api::placement::Placement;
use foregate_store::coord::ClusterState;
use prometheus::{Encoder, TextEncoder};
use serde_json::{Map, Value, json};

use super::answer::json_response;
use super::state::Gateway;
use crate::calibration::Score;
use crate::error::ApiError;
use crate::heat::{Hot, OfTenant};
use crate::metrics::{imbalance, rank_rows};

/// Experts shown of a tenant.
const HOTTEST: usize = 10;

pub(super) async fn version() -> Response<Body> {
    json_response(
        StatusCode::OK,
        &json!({ "version": env!("CARGO_PKG_VERSION") }),
    )
}

/// Liveness: this process answers. Whether it can serve is `/ready`.
pub(super) async fn health() -> Response<Body> {
    json_response(StatusCode::OK, &json!({ "status": "ok" }))
}

pub(super) async fn ready(State(gateway): State<Arc<Gateway>>) -> Response<Body> {
    let reason = if gateway.leaving.is_cancelled() {
        Some("the server is shutting down".to_owned())
    } else {
        gateway.runner.upstream.not_ready()
    };
    match reason {
        None => json_response(StatusCode::OK, &json!({ "status": "ready" })),
        Some(reason) => json_response(
            StatusCode::SERVICE_UNAVAILABLE,
            &json!({ "status": "not ready", "reason": reason }),
        ),
    }
}

pub(super) async fn metrics(
    State(gateway): State<Arc<Gateway>>,
) -> Result<Response<Body>, ApiError> {
    let encoder = TextEncoder::new();
    let mut text = Vec::new();
    encoder
        .encode(&gateway.metrics.registry().gather(), &mut text)
        .map_err(|error| ApiError::internal(format!("metrics: {error}")))?;
    let mut response = Response::new(Body::from(text));
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/plain; version=0.0.4"),
    );
    Ok(response)
}

/// Everything the gateway knows about experts: placements, epochs, loads by rank, layer and expert.
pub(super) async fn experts(State(gateway): State<Arc<Gateway>>) -> Response<Body> {
    let view = gateway.views.load();
    let state = &view.state;
    let (layers, experts) = view
        .model()
        .map_or((0, 0), |model| (model.moe_layers(), model.experts));
    let rows = rank_rows(state);
    let document = json!({
        "connected": state.connected,
        "leader": state.leader,
        "layers": layers,
        "experts": experts,
        "active": placement(state.active.as_ref().map(|(plan, _)| plan.as_ref())),
        "target": placement(state.target.as_ref().map(|(plan, _)| plan.as_ref())),
        "load": sum_gate(state.loads.values().map(AsRef::as_ref), layers, experts),
        "rank_rows": by_rank(rows.iter().map(|(rank, rows)| (*rank, json!(rows))).collect()),
        "imbalance": imbalance(&rows),
        "forecasts": forecasts(state),
        "predictors": predictors(&gateway),
        "tenants": tenants(&gateway),
        "workers": by_rank(state.members.keys().map(|rank| (*rank, worker(state, *rank))).collect()),
    });
    json_response(StatusCode::OK, &document)
}

/// What is kept of the decisions about placements, as it lies in the store: `foregate explain` reads it.
pub(super) async fn plan(
    State(gateway): State<Arc<Gateway>>,
) -> Result<Response<Body>, ApiError> {
    let entries = gateway.past.entries().await;
    let entries = entries.map_err(|error| ApiError::unavailable("store", error.to_string()))?;
    let document = json!({
        "now_ms": gateway.clock.unix_millis(),
        "entries": entries.as_ref(),
    });
    Ok(json_response(StatusCode::OK, &document))
}

/// What each gateway expects, without the shares.
fn forecasts(state: &ClusterState) -> Vec<Value> {
    let of = |forecast: &Arc<Forecast>| {
        json!({
            "sequence": forecast.sequence,
            "horizon_ms": forecast.horizon_ms,
            "rows": forecast.rows,
            "confidence": forecast.confidence,
        })
    };
    state.forecasts.values().map(of).collect()
}

/// How right predictors were in their last windows, beside the mean of all answers on the same ones.
fn predictors(gateway: &Gateway) -> Value {
    let score = |score: Score| {
        json!({
            "answers": score.answers,
            "hit": score.hit,
            "log_loss": score.loss,
            "mean": { "hit": score.mean.0, "log_loss": score.mean.1 },
        })
    };
    let states = gateway.runner.upstream.predictors().into_iter();
    let entries = states.map(|state| {
        let of = json!({
            "believed": state.believed,
            "switches": state.switches,
            "last_window": state.score.map(score),
        });
        (state.predictor.word().to_owned(), of)
    });
    entries.collect::<Map<_, _>>().into()
}

/// What the most active tenants asked of the experts, the last minutes more than older ones.
fn tenants(gateway: &Gateway) -> Vec<Value> {
    let hot = |hot: &Hot| {
        json!({
            "layer": hot.layer,
            "expert": hot.expert,
            "of_tenant": hot.of_tenant,
            "of_expert": hot.of_expert,
        })
    };
    let of = |of: &OfTenant| {
        json!({
            "tenant": of.tenant,
            "routed_rows": of.rows,
            "share": of.share,
            "hottest": of.hottest.iter().map(hot).collect::<Vec<_>>(),
        })
    };
    gateway
        .runner
        .upstream
        .heat(HOTTEST)
        .iter()
        .map(of)
        .collect()
}

fn by_rank(entries: Vec<(Rank, Value)>) -> Value {
    entries
        .into_iter()
        .map(|(rank, value)| (rank.to_string(), value))
        .collect::<Map<_, _>>()
        .into()
}

fn placement(plan: Option<&Placement>) -> Value {
    let Some(plan) = plan else {
        return Value::Null;
    };
    serde_json::to_value(plan).unwrap_or(Value::Null)
}

fn worker(state: &ClusterState, rank: Rank) -> Value {
    let member = state.members.get(&rank);
    json!({
        "phase": member.map(|member| member.phase),
        "rpc": member.map(|member| member.rpc.as_str()),
        "domain": member.map(|member| member.domain.as_str()),
        "slots": member.map(|member| member.slots),
        "cpu_path": member.map(|member| member.cpu_path.as_str()),
        "ack": state.acks.get(&rank),
        "window": state.loads.get(&rank).map(AsRef::as_ref),
    })
}
