//! `foregate-gateway`: HTTP in, text out.
//!
//! In: OpenAI requests over HTTP, the cluster's state over the store, events of sequences over gRPC.
//! Out: answers in OpenAI's shape, token by token; metrics; the load matrix.
//! Invariants: an unsupported field is refused by its name, never ignored; a request in work holds guards
//! (permit, load) that its end in any form gives back; half a character is never sent; every queue has a
//! bound and every wait a deadline.
//! Start reading at [`http`], then `generate`, then `upstream`. Modules import downwards only:
//! `tests/layers.rs` has the order.

#![forbid(unsafe_code)]

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use foregate_api::manifest::RoutingPolicy;
use foregate_api::node::GatewayConfig;
use foregate_store::Archive;
use foregate_store::coord::Coord;
use foregate_store::kv::Store;
use foregate_tls::Keys;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub mod admission;
pub mod api_keys;
pub mod cached;
pub mod calibration;
pub mod clock;
pub mod error;
pub mod feed;
pub mod forecast;
pub mod generate;
pub mod heat;
pub mod http;
pub mod loads;
pub mod metrics;
pub mod model_files;
pub mod output;
pub mod past;
pub mod prefixes;
pub mod prompt;
pub mod random;
pub mod route;
pub mod serve;
pub mod signature;
pub mod trace;
pub mod traffic;
pub mod upstream;
pub mod view;

pub use error::ApiError;

use admission::Admission;
use api_keys::{ApiKeys, ApiKeysError};
use forecast::{Outlook, Publisher};
use generate::Runner;
use http::{Defaults, Gateway};
use loads::Loads;
use metrics::Metrics;
use prompt::Prompter;
use serve::End;
pub use upstream::Trial;
use upstream::Upstream;
use view::Views;

/// Time after `shutdown` in which a request is still taken on a connection that is already open: long enough for most clients
/// to be told by an answer that their connection ends.
const LEAVE: Duration = Duration::from_secs(10);

/// Longest time that requests in work may take after `shutdown`.
const DRAIN: Duration = Duration::from_secs(30);

/// Time after `shutdown`, and after the last request in work, in which answers may still reach their clients.
const FLUSH: Duration = Duration::from_secs(2);

/// Why the gateway could not start or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// A file of the model directory cannot be used.
    #[error(transparent)]
    ModelFile(#[from] model_files::ModelFileError),
    /// A metric could not be registered (registered twice, most likely).
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// A setting of the gateway cannot work.
    #[error("gateway setting {field}: {what}")]
    Config {
        /// The field of `GatewayConfig`.
        field: &'static str,
        /// What is wrong with it.
        what: String,
    },
    /// The keys of clients cannot be read.
    #[error(transparent)]
    ApiKeys(#[from] ApiKeysError),
    /// Reading the model directory did not come to an end.
    #[error("reading the model directory: {0}")]
    Reading(#[from] tokio::task::JoinError),
}

/// What a gateway needs from its composition root.
#[derive(Debug)]
pub struct Deps {
    /// Name of the cluster, prefix of the store's keys.
    pub cluster: String,
    /// Settings.
    pub config: GatewayConfig,
    /// What the gateway and workers prove themselves with; without them connections to workers are plain.
    pub keys: Option<Keys>,
    /// The bound listener of the HTTP API.
    pub listener: TcpListener,
    /// Where the roles meet.
    pub store: Arc<dyn Store>,
    /// Where metrics are registered; `/metrics` shows all of it.
    pub registry: prometheus::Registry,
    /// How the window is tried out; `Trial::default()` unless something is measured.
    pub trial: Trial,
    /// Ends the gateway: connections end with their next answer, then new requests are refused; those in work are finished.
    pub shutdown: CancellationToken,
}

/// Serves HTTP until `shutdown`. Then it takes no new connection, ends each one with its next answer, after 10 s refuses what still
/// comes, and finishes what is in work (for 30 s at most).
///
/// # Errors
/// Settings or files that cannot work, found before the first request.
pub async fn run(deps: Deps) -> Result<(), GatewayError> {
    let Deps {
        cluster,
        config,
        keys,
        listener,
        store,
        registry,
        trial,
        shutdown,
    } = deps;
    check(&config)?;
    let api_keys = config.api_keys.as_deref().map(ApiKeys::open).transpose()?;
    let (prompter, defaults) = model(config.model_dir.clone()).await?;
    let name = config
        .served_names
        .first()
        .map_or("default", String::as_str);
    let metrics = Arc::new(Metrics::new(registry, name)?);
    let views = Arc::new(Views::default());
    let loads = Arc::new(Loads::default());

    // The view outlives the requests in work: they may still have to find another worker.
    let ended = CancellationToken::new();
    let _end = ended.clone().drop_guard();
    let tasks = TaskTracker::new();
    let past = past::Past::new(Archive::new(Arc::clone(&store), &cluster));
    let coord = Coord::new(store, &cluster);
    let states = coord.watch_cluster(ended.clone());
    tasks.spawn({
        let (views, loads, metrics) =
            (Arc::clone(&views), Arc::clone(&loads), Arc::clone(&metrics));
        let ended = ended.clone();
        async move { views.follow(states, &loads, &metrics, ended).await }
    });

    let limits = serve::Limits::for_requests(
        (config.max_in_flight as usize).saturating_add(config.max_queued as usize),
    );
    let outlook = Arc::new(Outlook::default());
    let upstream = upstream(&config, trial, &views, loads, &metrics, keys)
        .with_outlook(Arc::clone(&outlook))
        .with_hints(config.expert_hints);
    match config.forecast_ms.map(Duration::from_millis) {
        Some(horizon) => {
            let (views, metrics) = (Arc::clone(&views), Arc::clone(&metrics));
            let publisher = Publisher::new(coord, outlook, views, metrics, horizon);
            tasks.spawn(publisher.run(ended.clone()));
        }
        // Nobody asks for a forecast; kinds of text are still what requests are routed by.
        None => {
            tasks.spawn(forecast::keep_fitted(outlook, ended.clone()));
        }
    }
    let end = End {
        leaving: shutdown.clone(),
        closing: CancellationToken::new(),
    };
    let gateway = Arc::new(gateway(
        config, api_keys, prompter, defaults, views, upstream, metrics, past, trial, &end,
    ));
    if gateway.runner.upstream.wants_prefixes() {
        let upstream = Arc::clone(&gateway.runner.upstream);
        let ended = ended.clone();
        tasks.spawn(async move { upstream.follow_prefixes(ended).await });
    }
    // The registry outlives the gateway, so it must not hold it.
    let looked_at = Arc::downgrade(&gateway);
    gateway.metrics.refresh_with(move || {
        if let Some(gateway) = looked_at.upgrade() {
            gateway.show();
        }
    });
    let router = http::router(Arc::clone(&gateway));
    tokio::select! {
        () = serve::serve(listener, router, limits, end.clone()) => {}
        () = async {
            shutdown.cancelled().await;
            tokio::time::sleep(DRAIN).await;
        } => {
            tracing::warn!("requests in work were cut off after {} s of draining", DRAIN.as_secs());
        }
        () = idle(&gateway.admission, &shutdown) => {}
        () = close(&end) => {}
    }
    ended.cancel();
    tasks.close();
    tasks.wait().await;
    Ok(())
}

/// Waits until nothing is in work any more after `shutdown`. The server itself waits for every connection,
/// also for one on which half a request was sent and no more will come.
async fn idle(admission: &Admission, shutdown: &CancellationToken) {
    shutdown.cancelled().await;
    loop {
        tokio::time::sleep(FLUSH).await;
        if admission.running() == 0 {
            return;
        }
        while admission.running() > 0 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// Brings the second step of the end after the first. Never returns.
async fn close(end: &End) {
    end.leaving.cancelled().await;
    tokio::time::sleep(LEAVE).await;
    end.closing.cancel();
    std::future::pending().await
}

/// What the model directory says about text and sampling. The tokenizer alone takes a second.
async fn model(dir: String) -> Result<(Prompter, Defaults), GatewayError> {
    let (prompter, defaults) = tokio::task::spawn_blocking(move || {
        let dir = Path::new(&dir);
        Ok::<_, GatewayError>((Prompter::load(dir)?, Defaults::load(dir)?))
    })
    .await??;
    if defaults != Defaults::default() {
        tracing::info!(
            ?defaults,
            "generation_config.json sets what requests leave open"
        );
    }
    Ok((prompter, defaults))
}

/// The way to the workers.
fn upstream(
    config: &GatewayConfig,
    trial: Trial,
    views: &Arc<Views>,
    loads: Arc<Loads>,
    metrics: &Arc<Metrics>,
    keys: Option<Keys>,
) -> Upstream {
    let router = route::Router::new(config.routing);
    let upstream = Upstream::new(Arc::clone(views), loads, router, Arc::clone(metrics), keys);
    match config.routing {
        RoutingPolicy::Window => {
            let longest = Duration::from_millis(config.queue_timeout_ms);
            upstream.with_window(config.max_in_flight, longest, trial)
        }
        RoutingPolicy::Signature
        | RoutingPolicy::PrefixAware
        | RoutingPolicy::LeastLoaded
        | RoutingPolicy::RoundRobin => upstream,
    }
}

/// Puts the parts together.
fn gateway(
    config: GatewayConfig,
    api_keys: Option<ApiKeys>,
    prompter: Prompter,
    defaults: Defaults,
    views: Arc<Views>,
    upstream: Upstream,
    metrics: Arc<Metrics>,
    past: past::Past,
    trial: Trial,
    end: &End,
) -> Gateway {
    let windowed = config.routing == RoutingPolicy::Window;
    let runner = Runner {
        prompter: prompter.clone(),
        upstream: Arc::new(upstream),
        metrics: Arc::clone(&metrics),
    };
    let settings = traffic::Settings {
        // The head of the queue is the window.
        slots: config
            .max_in_flight
            .saturating_add(if windowed { trial.width } else { 0 }),
        capacity: config.max_queued,
        patience: Duration::from_millis(config.queue_timeout_ms),
        rules: config.traffic.clone(),
    };
    let admission = Admission::new(settings, end.closing.clone());
    Gateway {
        config,
        api_keys,
        prompter,
        defaults,
        bodies: http::Bodies::default(),
        views,
        past,
        leaving: end.leaving.clone(),
        admission,
        runner,
        metrics,
        clock: clock::Clock::start(),
        random: random::Random::default(),
    }
}

/// Settings that no request could be served with.
fn check(config: &GatewayConfig) -> Result<(), GatewayError> {
    let error = |field, what: &str| GatewayError::Config {
        field,
        what: what.to_owned(),
    };
    if config.served_names.is_empty() {
        return Err(error("served_names", "name the model at least once"));
    }
    if config.max_in_flight == 0 {
        return Err(error("max_in_flight", "must be at least 1"));
    }
    if config.max_model_len == 0 {
        return Err(error("max_model_len", "must be at least 1"));
    }
    if config.forecast_ms == Some(0) {
        return Err(error(
            "forecast_ms",
            "must be at least 1, or absent for no forecast",
        ));
    }
    if config.request_timeout_ms == 0 {
        return Err(error("request_timeout_ms", "must be at least 1"));
    }
    Ok(())
}
