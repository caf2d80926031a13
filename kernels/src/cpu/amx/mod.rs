//! Intel AMX: products of bfloat16 tiles.
//!
//! The arithmetic is another than that of the vector paths: `TDPBF16PS` takes 32 inputs at a time, sums the even and the
//! odd ones apart and adds both sums to the element. So results differ from one chain in their last bits, and the members
//! of a cluster must agree (docs/adr/0009-amx.md).
//!
//! [`unit`] says what a tile unit can do, [`hardware`] does it with the instructions, [`software`] in plain Rust by
//! Intel's definition; [`product`] is the one loop over both.

#[cfg(target_arch = "x86_64")]
mod available;
#[cfg(target_arch = "x86_64")]
mod hardware;
mod product;
mod software;
mod unit;

#[cfg(target_arch = "x86_64")]
pub(super) use available::usable;
#[cfg(target_arch = "x86_64")]
pub(super) use hardware::Hardware;
pub(super) use product::{Inputs, ROWS, Session, Weights};
pub(super) use software::Software;
