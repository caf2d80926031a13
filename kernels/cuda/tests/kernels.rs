//! The CUDA kernels, run on the CPU, against the float64 oracle of their ops.
//!
//! Every launch runs twice, with threads in ascending and in descending order, and must leave the same bytes. With
//! `FOREGATE_CUDA_RECORD` set to a folder, small launches are written there, for `make sanitize` to run again.
#![expect(
    unsafe_code,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "launching is unsafe; a test's sizes are small, and what fails there is the test"
)]

#[path = "kernels/attention.rs"]
mod attention;
#[path = "kernels/call.rs"]
mod call;
#[path = "kernels/coded.rs"]
mod coded;
#[path = "kernels/elementwise.rs"]
mod elementwise;
#[path = "kernels/faults.rs"]
mod faults;
#[path = "kernels/gate.rs"]
mod gate;
#[path = "kernels/gemm.rs"]
mod gemm;
#[path = "kernels/moe.rs"]
mod moe;
#[path = "kernels/norm.rs"]
mod norm;
#[path = "kernels/numbers.rs"]
mod numbers;
#[path = "kernels/rope.rs"]
mod rope;
#[path = "kernels/sample.rs"]
mod sample;
#[path = "kernels/table.rs"]
mod table;
