//! foregate-worker

pub mod engine;
pub mod exchange;
pub mod fabric;
pub mod kv_cache;
pub mod load;
pub mod metrics;
pub mod residency;
pub mod sampler;
pub mod scheduler;
pub mod sequence;
