//! foregate-worker

pub mod kv_cache;
pub mod load;
pub mod sampler;
pub mod scheduler;
pub mod sequence;
