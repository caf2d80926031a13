//! Shares of copies by water-filling: exact minimisation over one expert at a time, in turn, until level.
//!
//! One routine (`pour.rs`), two callers. The planner solves shares from the prediction ([`solve()`]). A worker splits
//! the rows of a batch over the copies of each expert ([`Splitter`]), over the loads its peers last reported.
//!
//! Pouring one expert's rows onto its hosts, lowest level first, minimises the sum of squared loads over that
//! expert and never raises the highest load; the sum is convex and the blocks independent, so the sweeps
//! converge to its minimum (block coordinate descent: Tseng 2001), which for loads of this kind, a base polytope,
//! also has the least maximum (Fujishige 1980).

pub use crate::batch::{BATCH_SWEEPS, FEW_ROWS, SplitError, Splitter};
pub use crate::solve::{SOLVE_GAP, SOLVE_SWEEPS, Solved, balance, solve};
pub use crate::table::SplitTable;
