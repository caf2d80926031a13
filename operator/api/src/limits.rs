//! Defaults and ranges of the manifest's numbers, once: validation checks them, the custom resource's schema
//! carries them.

/// A number of the manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit<T> {
    /// Path of the field, such as `spec.workers.count`.
    pub field: &'static str,
    /// What it is when the manifest does not say; `None` where its absence has a meaning of its own.
    pub default: Option<T>,
    /// Smallest value.
    pub low: T,
    /// Largest value.
    pub high: T,
}

/// A quantity of bytes, in Kubernetes' notation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuantityLimit {
    /// Path of the field.
    pub field: &'static str,
    /// What it is when the manifest does not say; `None` where its absence has a meaning of its own.
    pub default: Option<&'static str>,
    /// Smallest value.
    pub low: &'static str,
    /// Largest value.
    pub high: &'static str,
}

macro_rules! limits {
    ($($(#[$doc:meta])* $name:ident: $type:ty = $field:literal, $default:expr, $low:expr, $high:expr;)*) => {
        $(
            $(#[$doc])*
            pub const $name: Limit<$type> = Limit { field: $field, default: $default, low: $low, high: $high };
        )*

        /// Every number, for the schema.
        #[must_use]
        pub fn all() -> Vec<Limit<u64>> {
            vec![$(Limit {
                field: $name.field,
                default: $name.default.map(u64::from),
                low: u64::from($name.low),
                high: u64::from($name.high),
            }),*]
        }
    };
}

limits! {
    /// Longest sequence; absent: the model's own.
    MAX_MODEL_LEN: u32 = "spec.model.maxModelLen", None, 2, 1 << 24;
    /// Number of workers.
    COUNT: u32 = "spec.workers.count", Some(2), 1, 1024;
    /// Workers that take requests and hold no experts.
    ATTENTION_ONLY: u32 = "spec.workers.attentionOnly", Some(0), 0, 1023;
    /// Workers that hold experts and take no requests.
    EXPERT_ONLY: u32 = "spec.workers.expertOnly", Some(0), 0, 1023;
    /// Expert slots beyond ⌈experts / count⌉; absent: as many as link all ranks.
    REDUNDANT_SLOTS: u32 = "spec.workers.redundantSlots", None, 0, 4096;
    /// Compute threads; absent: a share of the machine.
    THREADS: u32 = "spec.workers.threads", None, 1, 1024;
    /// Sequences in a batch.
    MAX_NUM_SEQS: u32 = "spec.workers.maxNumSeqs", Some(64), 1, 4096;
    /// Tokens in a step.
    MAX_NUM_BATCHED_TOKENS: u32 = "spec.workers.maxNumBatchedTokens", Some(512), 1, 65_536;
    /// Sequences waiting in a worker.
    MAX_WAITING: u32 = "spec.workers.maxWaiting", Some(256), 1, 65_536;
    /// Milliseconds for which a waiting sequence may be overtaken.
    OVERTAKE_MS: u64 = "spec.workers.overtakeMs", Some(0), 0, 60_000;
    /// Tokens per KV page, a power of two.
    PAGE_TOKENS: u32 = "spec.workers.pageTokens", Some(16), 1, 256;
    /// Milliseconds after which a peer's rows count as late.
    EXCHANGE_DEADLINE_MS: u64 = "spec.workers.exchangeDeadlineMs", Some(2000), 10, 600_000;
    /// Gateways.
    GATEWAY_REPLICAS: u32 = "spec.gateway.replicas", Some(1), 1, 256;
    /// Requests in work.
    MAX_IN_FLIGHT: u32 = "spec.gateway.maxInFlight", Some(256), 1, 65_536;
    /// Requests waiting.
    MAX_QUEUED: u32 = "spec.gateway.maxQueued", Some(1024), 0, 1_000_000;
    /// Longest wait of a request in milliseconds.
    QUEUE_TIMEOUT_MS: u64 = "spec.gateway.queueTimeoutMs", Some(30_000), 1, 3_600_000;
    /// Longest life of a request in milliseconds.
    REQUEST_TIMEOUT_MS: u64 = "spec.gateway.requestTimeoutMs", Some(600_000), 1, 86_400_000;
    /// Requests of a tenant in a minute.
    REQUESTS_PER_MINUTE: u64 = "spec.gateway.traffic.requestsPerMinute", None, 1, 1_000_000_000;
    /// Tokens of a tenant in a minute.
    TOKENS_PER_MINUTE: u64 = "spec.gateway.traffic.tokensPerMinute", None, 1, 1_000_000_000_000;
    /// Requests of one tenant in a minute.
    TENANT_REQUESTS_PER_MINUTE: u64 = "spec.gateway.traffic.tenants[].requestsPerMinute", None, 1, 1_000_000_000;
    /// Tokens of one tenant in a minute.
    TENANT_TOKENS_PER_MINUTE: u64 = "spec.gateway.traffic.tenants[].tokensPerMinute", None, 1, 1_000_000_000_000;
    /// Share of a tenant.
    WEIGHT: u32 = "spec.gateway.traffic.tenants[].weight", Some(1), 1, 1000;
    /// Fewest gateways of the autoscaler.
    MIN_REPLICAS: u32 = "spec.gateway.autoscaling.minReplicas", Some(1), 1, 256;
    /// Most gateways of the autoscaler.
    MAX_REPLICAS: u32 = "spec.gateway.autoscaling.maxReplicas", Some(4), 1, 256;
    /// Use of the requested processor time that the autoscaler aims at, in percent.
    CPU_PERCENT: u32 = "spec.gateway.autoscaling.cpuPercent", Some(70), 1, 1000;
    /// Length of a load window in milliseconds.
    WINDOW_MS: u64 = "spec.balancing.windowMs", Some(2000), 50, 600_000;
    /// Copies to move per layer and window.
    MAX_MOVES_PER_LAYER: u32 = "spec.balancing.maxMovesPerLayer", Some(4), 0, 4096;
    /// Rows per layer below which a window says too little.
    MIN_ROWS: u64 = "spec.balancing.minRows", Some(256), 0, 1 << 40;
    /// Seconds until drift has eaten the advantage of a move.
    HORIZON_SECONDS: u32 = "spec.balancing.economy.horizonSeconds", Some(300), 1, 86_400;
    /// Part of a step's time that goes into balanced experts.
    EXPERTS_PERCENT: u32 = "spec.balancing.economy.expertsPercent", Some(50), 0, 100;
    /// Part of the speed that is lost while copies are on their way.
    SLOWDOWN_PERCENT: u32 = "spec.balancing.economy.slowdownPercent", Some(10), 0, 100;
}

/// Memory of the KV cache of a worker.
pub const KV_MEMORY: QuantityLimit = QuantityLimit {
    field: "spec.workers.kvMemory",
    default: Some("512Mi"),
    low: "64Ki",
    high: "16Ti",
};
/// Bytes of experts to move per window; absent: no limit.
pub const MAX_MOVE_BYTES: QuantityLimit = QuantityLimit {
    field: "spec.balancing.maxMoveBytes",
    default: None,
    low: "1Ki",
    high: "1Pi",
};
/// Bytes per second that a worker loads experts with; absent: as measured.
pub const BANDWIDTH: QuantityLimit = QuantityLimit {
    field: "spec.balancing.economy.bandwidth",
    default: None,
    low: "1Ki",
    high: "1Pi",
};
/// `spec.balancing.threshold`: what it is when the manifest does not say. It is above 0 and at most 1.
pub const THRESHOLD: f64 = 0.98;
/// Lowest and highest priority of a request.
pub const PRIORITY: (i64, i64) = (-1_000_000_000, 1_000_000_000);
/// Lowest priority that requests may have when the manifest does not say.
pub const MOST_URGENT_PRIORITY: i64 = 0;
/// Most tenants with rules of their own, and most objectives.
pub const MAX_TENANTS: usize = 64;
/// Longest name of a tenant in bytes.
pub const MAX_TENANT_NAME: usize = 128;
/// Longest model URI in bytes.
pub const MAX_URI: usize = 2048;
/// Longest name of a model in bytes.
pub const MAX_SERVED_NAME: usize = 256;
/// Most names of a model.
pub const MAX_SERVED_NAMES: usize = 64;
/// Longest failure domain in bytes.
pub const MAX_DOMAIN: usize = 253;
/// Longest name of a cluster: its objects add up to 12 characters and are DNS labels of at most 63.
pub const MAX_NAME: usize = 48;
/// What distinguishes failure domains of pods unless the manifest says otherwise: the machine.
pub const DOMAIN_LABEL: &str = "kubernetes.io/hostname";
/// Secret with the hub's token unless the manifest names another.
pub const TOKEN_SECRET: &str = "hf-token";
