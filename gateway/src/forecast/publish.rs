//! The actor that writes a gateway's forecast into the store, on a lease of its own: with the gateway it vanishes.

use std::sync::Arc;
use std::time::Duration;

use foregate_api::forecast::Forecast;
use foregate_store::coord::Coord;
use foregate_store::kv::{Lease, StoreError};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::work::{Expected, Outlook};
use crate::metrics::Metrics;
use crate::view::Views;

/// Time to live of the lease.
const LEASE_TTL: Duration = Duration::from_secs(5);
/// Pause after a write that failed: the store has other things to do when it comes back.
const PAUSE: Duration = Duration::from_secs(2);

/// Pause between two looks whether kinds are due, where nothing is published.
const LOOK: Duration = Duration::from_secs(1);

/// Keeps the kinds of text up to date until `shutdown`, for a gateway that publishes no forecast.
pub async fn keep_fitted(outlook: Arc<Outlook>, shutdown: CancellationToken) {
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let outlook = Arc::clone(&outlook);
        if let Err(error) = tokio::task::spawn_blocking(move || outlook.refit()).await {
            tracing::warn!(%error, "kinds_not_fitted");
        }
    }
}

/// Writes one gateway's forecast.
#[derive(Debug)]
pub struct Publisher {
    coord: Coord,
    outlook: Arc<Outlook>,
    views: Arc<Views>,
    metrics: Arc<Metrics>,
    horizon: Duration,
    lease: Option<Arc<dyn Lease>>,
    sequence: u64,
    /// Whether what is in the store says something.
    says: bool,
}

impl Publisher {
    /// Of what `outlook` expects within `horizon`.
    #[must_use]
    pub const fn new(
        coord: Coord,
        outlook: Arc<Outlook>,
        views: Arc<Views>,
        metrics: Arc<Metrics>,
        horizon: Duration,
    ) -> Self {
        Self {
            coord,
            outlook,
            views,
            metrics,
            horizon,
            lease: None,
            sequence: 0,
            says: false,
        }
    }

    /// Writes twice per horizon until `shutdown`, then takes the forecast back. A write that fails is not repeated: the
    /// next one says more.
    pub async fn run(mut self, shutdown: CancellationToken) {
        // Half a horizon: what the operator reads is never older than that.
        let mut ticks = interval((self.horizon / 2).max(Duration::from_millis(10)));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut last = Instant::now();
        loop {
            tokio::select! {
                () = shutdown.cancelled() => break,
                _ = ticks.tick() => {}
            }
            let since = last.elapsed();
            last = Instant::now();
            let Some(forecast) = self.forecast(since).await else {
                continue;
            };
            let written = tokio::select! {
                () = shutdown.cancelled() => break,
                written = self.write(&forecast) => written,
            };
            if let Err(error) = written {
                tracing::debug!(%error, "forecast_dropped");
                if matches!(error, StoreError::LeaseEnded) {
                    self.lease = None;
                }
                tokio::select! {
                    () = shutdown.cancelled() => break,
                    () = tokio::time::sleep(PAUSE) => {}
                }
            }
        }
        if let Some(lease) = self.lease.take()
            && let Err(error) = lease.revoke().await
        {
            tracing::debug!(%error, "forecast_lease_not_revoked");
        }
    }

    /// The forecast of this moment; `None` if there is no model, or nothing to say where nothing was said.
    async fn forecast(&mut self, since: Duration) -> Option<Forecast> {
        let (layers, experts) = {
            let view = self.views.load();
            let model = view.model()?;
            (model.moe_layers(), model.experts)
        };
        let (outlook, horizon) = (Arc::clone(&self.outlook), self.horizon);
        let expected = tokio::task::spawn_blocking(move || {
            outlook.refit();
            let ms = |time: Duration| time.as_secs_f64() * 1000.0;
            outlook.expected(layers, experts, ms(horizon), ms(since))
        });
        let expected = expected.await.ok()?;
        self.metrics
            .expects(expected.rows, expected.known, self.outlook.kinds());
        let says = expected.known >= 1.0;
        let was = std::mem::replace(&mut self.says, says);
        (says || was).then(|| self.number(&expected, experts))
    }

    fn number(&mut self, expected: &Expected, experts: usize) -> Forecast {
        self.sequence += 1;
        let horizon = u64::try_from(self.horizon.as_millis()).unwrap_or(u64::MAX);
        let counts: Vec<Vec<f64>> = expected
            .counts
            .chunks(experts.max(1))
            .map(<[f64]>::to_vec)
            .collect();
        let confidence = expected.known / expected.rows.max(f64::MIN_POSITIVE);
        let mut forecast = Forecast::of(horizon, expected.known, confidence, &counts);
        forecast.sequence = self.sequence;
        forecast
    }

    async fn write(&mut self, forecast: &Forecast) -> Result<(), StoreError> {
        let lease = match &self.lease {
            Some(lease) => Arc::clone(lease),
            None => {
                let lease = self.coord.store().lease(LEASE_TTL).await?;
                self.lease.insert(lease).clone()
            }
        };
        self.coord.publish_forecast(forecast, lease.as_ref()).await
    }
}
