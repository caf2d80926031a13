//! foregate-checkpoint
