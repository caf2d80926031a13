//! Why the operator role ends.

/// Why the operator role ends.
#[derive(Debug, thiserror::Error)]
pub enum OperatorError {
    /// Two operators share one registry.
    #[error("the operator's metrics cannot be registered: {0}")]
    Metrics(#[from] prometheus::Error),
    /// There is no API server to talk to.
    #[error("no Kubernetes: {0}; run in a pod, or set KUBECONFIG")]
    Kubernetes(#[source] Box<kube::Error>),
    /// Another operator may lead by now, so this one must not go on.
    #[error("the lead is lost: the Lease could not be renewed in time")]
    LostLead,
}
