//! Why the operator role ends.

/// Why the operator role ends.
#[derive(Debug, thiserror::Error)]
pub enum OperatorError {
    /// Two operators share one registry.
    #[error("the operator's metrics cannot be registered: {0}")]
    Metrics(#[from] prometheus::Error),
}
