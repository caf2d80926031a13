//! Metrics that are copied when somebody looks, whoever it is: `/metrics`, or what pushes the registry.

use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use prometheus::Registry;
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;

/// A registry inside the registry, brought up to date before it is read.
#[derive(Clone)]
pub(super) struct Scraped(Arc<Inner>);

struct Inner {
    registry: Registry,
    refresh: OnceLock<Box<dyn Fn() + Send + Sync>>,
    /// One look at a time: a second one would see gauges that the first has just emptied.
    turn: Mutex<()>,
}

impl fmt::Debug for Scraped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Scraped").field(&self.0.registry).finish()
    }
}

impl Scraped {
    /// What `inner` gathers becomes part of what `outer` gathers.
    ///
    /// # Errors
    /// `outer` has one already.
    pub(super) fn register(
        outer: &Registry,
        inner: Registry,
    ) -> Result<Self, prometheus::Error> {
        let scraped = Self(Arc::new(Inner {
            registry: inner,
            refresh: OnceLock::new(),
            turn: Mutex::default(),
        }));
        outer.register(Box::new(scraped.clone()))?;
        Ok(scraped)
    }

    /// Has `refresh` called before each look. The first one set stays.
    pub(super) fn refresh_with(&self, refresh: impl Fn() + Send + Sync + 'static) {
        self.0.refresh.get_or_init(|| Box::new(refresh));
    }
}

impl Collector for Scraped {
    /// None of its own: the inner registry has checked its names.
    fn desc(&self) -> Vec<&Desc> {
        Vec::new()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let _turn = self.0.turn.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(refresh) = self.0.refresh.get() {
            refresh();
        }
        self.0.registry.gather()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_brings_it_up_to_date() {
        let (outer, inner) = (Registry::new(), Registry::new());
        let looks = prometheus::IntGauge::new("looks", "help").unwrap();
        inner.register(Box::new(looks.clone())).unwrap();
        let scraped = Scraped::register(&outer, inner).unwrap();
        let value = || outer.gather()[0].get_metric()[0].get_gauge().get_value();
        assert_eq!(value(), 0.0);
        scraped.refresh_with(move || looks.inc());
        assert_eq!([value(), value()], [1.0, 2.0]);
        assert!(Scraped::register(&outer, Registry::new()).is_err());
    }
}
