//! Numbers on a processor: the operations a mixture-of-experts model is made of.
//!
//! An *op* is one method of the trait [`Ops`] with one argument struct. [`Cpu`] runs ops with the best
//! instruction path the processor has; [`Oracle`] runs the same ops by their readable definition with
//! float64 sums, to judge accuracy. A model walks on an [`Executor`], whose ops take views of values that stay
//! where they are computed: [`OnHost`] is a processor's, and hands every op on to its [`Ops`].
//!
//! **Determinism.** All arithmetic is float32. Each output element is defined by one fixed sequence of
//! operations (see the documentation of each op), so a result has the same bits on every instruction
//! path of one [`Arithmetic`], for every number of threads, and for a row alone or inside any batch.
//!
//! This crate takes sizes, slices and plain integers: it does not know that there is a cluster.
#![expect(
    unsafe_code,
    reason = "vector intrinsics, disjoint writes from several threads and mapped files need it"
)]

mod buffer;
mod check;
mod codes;
mod comm;
mod cpu;
mod dtype;
mod error;
mod executor;
mod kv;
mod matrix;
mod ops;
mod oracle;
mod place;
mod sample;
mod slab;

pub use buffer::MappedFile;
pub use comm::{Comm, CommFault, Comms, Seat};
pub use cpu::{
    Arithmetic, Cpu, Keep, Path, PathError, ReadThrough, SeatError, Seated, Seats, Share,
    UnknownPath, quantize,
};
pub use dtype::Dtype;
pub use error::{OpError, ShapeError};
pub use executor::{
    Clamp, Executor, ExpertLayer, ExpertParts, ExpertTable, Gather, OnHost, Placed, StepRows,
};
pub use kv::{KvCache, KvDtype, KvShape, PageMap};
pub use matrix::{Matrix, PANEL};
pub use ops::{
    Add, Attention, Combine, Embed, ExpertFfn, ExpertGroup, Gate, KvWrite, LogSoftmax, MatMul,
    Norm, Ops, RmsNorm, Rope, RopeTable, SigmoidScale, SiluMul,
};
pub use oracle::Oracle;
pub use place::{Anywhere, Array, Element, Extent, Host, Memory, Region, Span, View, ViewMut};
pub use sample::{argmax, top_n};
