//! foregate-worker
