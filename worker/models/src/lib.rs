//! `foregate-models`: forward passes. Experts are reached through the trait [`experts::Experts`].

pub mod experts;
