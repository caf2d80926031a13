//! foregate-harness
