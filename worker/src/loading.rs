//! How far a worker's start has come, in bytes: its dense weights, then the experts of its first placement.

use std::fmt;
use std::sync::Arc;

use crate::metrics::WorkerMetrics;

/// Bytes of weights in memory, of those that a worker loads before it serves.
///
/// As long as no placement is known, the total counts as many experts as the worker has slots for; with the
/// placement it becomes exact, and may fall.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// So far.
    pub done: u64,
    /// In all.
    pub total: u64,
}

/// Receives progress; called from several threads, must not wait.
pub type ProgressSink = Arc<dyn Fn(Progress) + Send + Sync>;

/// Tells whoever watches: the sink and the gauge.
#[derive(Clone)]
pub(crate) struct Loading {
    sink: ProgressSink,
    metrics: Arc<WorkerMetrics>,
}

impl fmt::Debug for Loading {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Loading")
    }
}

impl Loading {
    pub(crate) fn new(sink: ProgressSink, metrics: Arc<WorkerMetrics>) -> Self {
        Self { sink, metrics }
    }

    pub(crate) fn tell(&self, done: u64, total: u64) {
        self.metrics.loading(done as f64 / total.max(1) as f64);
        (self.sink)(Progress { done, total });
    }
}
