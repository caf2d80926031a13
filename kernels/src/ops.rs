//! The list of operations: one method and one argument struct per op.
//!
//! Matrices of activations are row-major float32 values. Every method checks the sizes of its arguments and
//! every index it is given before it computes, and returns a [`ShapeError`](crate::ShapeError) instead of panicking.
//!
//! Those structs that a model's walk needs are generic over [`Memory`]: without a parameter their values are slices of
//! this process, which is what [`Ops`] takes; an [`Executor`](crate::Executor) takes them with views.

use crate::cpu::Seated;
use crate::error::OpError;
use crate::kv::{KvCache, PageMap};
use crate::matrix::Matrix;
use crate::place::{Host, Memory};

/// `out[r][n] = chain + bias[n]`, where chain is `acc = fma(x[r][k], w[n][k], acc)` from `acc = 0`.
///
/// For float32 and float16 weights `k` ascends. For bfloat16 weights `x` is rounded to bfloat16 first (nearest, ties to even), and
/// `k` runs 1, 0, 3, 2, …, with a zero beside a last odd one: the order of `vdpbf16ps` (Intel SDM, volume 2).
///
/// For weights that are codes with scales the inputs that share a scale are one such chain over the codes, which are
/// bfloat16 without loss; then `total = fma(chain, scale, total)` from `total = 0`, groups ascending, and
/// `out[r][n] = total + bias[n]`.
///
/// With [`Arithmetic::Tiles`](crate::Arithmetic::Tiles) a sum over rounded inputs is not a chain: inputs are taken in steps of
/// 32, the even and the odd ones of a step are a chain each from zero, and `acc = acc + (even + odd)`. Inputs that share a
/// scale are cut into runs of at most 256, from the first on, each such a sum from zero: `total = fma(run, scale, total)`.
#[derive(Debug)]
pub struct MatMul<'a, M: Memory = Host> {
    /// `rows × w.k()`.
    pub x: M::In<'a, f32>,
    /// Rows of `x` and `out`.
    pub rows: usize,
    /// The weight.
    pub w: &'a Matrix,
    /// `w.n()`, added after the chain.
    pub bias: Option<M::In<'a, f32>>,
    /// `rows × w.n()`.
    pub out: M::Out<'a, f32>,
}

/// `out[r] = table[ids[r]]`.
#[derive(Debug)]
pub struct Embed<'a, M: Memory = Host> {
    /// One output per token id.
    pub table: &'a Matrix,
    /// Token ids, one per row.
    pub ids: &'a [u32],
    /// `ids.len() × table.k()`.
    pub out: M::Out<'a, f32>,
}

/// `x += add`, then `out[r] = weight * (x[r] / sqrt(mean(x[r]²) + eps))`, in one pass over the memory. The sum of squares
/// runs in 16 lanes (lane = column mod 16, one fused multiply-add each, ascending) that are then added pairwise.
#[derive(Debug)]
pub struct RmsNorm<'a, M: Memory = Host> {
    /// `rows × width`; changed only if there is something to add.
    pub x: M::Out<'a, f32>,
    /// A residual branch, of the same size.
    pub add: Option<M::In<'a, f32>>,
    /// Rows; a norm per head has `rows × heads` of them.
    pub rows: usize,
    /// Width of a row.
    pub width: usize,
    /// `width`.
    pub weight: M::In<'a, f32>,
    /// Added to the mean of squares.
    pub eps: f32,
    /// `rows × width`.
    pub out: M::Out<'a, f32>,
}

/// Cosines and sines of the angles `position as f32 * inv_freq[i]` (product in float32), one row per
/// position. Built once per step and used by all layers.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RopeTable {
    pub(crate) half: usize,
    pub(crate) cos: Vec<f32>,
    pub(crate) sin: Vec<f32>,
}

impl RopeTable {
    /// Angles of a position: half a head's width.
    #[must_use]
    pub const fn half(&self) -> usize {
        self.half
    }

    /// `positions × half`.
    #[must_use]
    pub fn cos(&self) -> &[f32] {
        &self.cos
    }

    /// `positions × half`.
    #[must_use]
    pub fn sin(&self) -> &[f32] {
        &self.sin
    }
}

/// A norm within a row, as [`RmsNorm`] has it.
#[derive(Debug, Clone, Copy)]
pub struct Norm<'a, M: Memory = Host> {
    /// Its length is the width that is normalised: that of a head, or of a whole row.
    pub weight: M::In<'a, f32>,
    /// Added to the mean of squares.
    pub eps: f32,
}

/// Rotates pairs `(x[i], x[i + head_dim / 2])` of every head in place (the `rotate_half` layout), after a norm and a clip
/// if there are any. Each row is gone through while it is near.
#[derive(Debug)]
pub struct Rope<'a, M: Memory = Host> {
    /// `rows × heads × head_dim`, changed in place.
    pub x: M::Out<'a, f32>,
    /// Rows.
    pub rows: usize,
    /// Heads of a row.
    pub heads: usize,
    /// Width of a head: twice the frequencies of the table.
    pub head_dim: usize,
    /// Comes first.
    pub norm: Option<Norm<'a, M>>,
    /// Comes second: values are kept in `-clip..=clip`.
    pub clip: Option<f32>,
    /// One row of angles per row of `x`.
    pub table: &'a RopeTable,
}

/// Stores keys and values of each row at its position.
#[derive(Debug)]
pub struct KvWrite<'a, M: Memory = Host> {
    /// `rows × kv_heads × head_dim`.
    pub k: M::In<'a, f32>,
    /// `rows × kv_heads × head_dim`.
    pub v: M::In<'a, f32>,
    /// Position of each row in its sequence.
    pub positions: &'a [u32],
    /// Where each row's sequence lives.
    pub pages: PageMap<'a>,
    /// The cache.
    pub kv: &'a mut KvCache,
    /// Layer.
    pub layer: usize,
}

/// Causal attention of each row over keys `0..=position` of its sequence, grouped: query head `h` reads
/// key/value head `h / (heads / kv_heads)`.
///
/// Per query: keys in ascending blocks of 32 and splits of 512 (counted from position 0 of the sequence, whatever
/// the page size); a score is one chain of fused multiply-adds over the head's dimensions, times `scale`; online
/// softmax per block; each output dimension one chain over the keys of a split; splits are merged in ascending
/// order. With bfloat16 keys and values, queries and the numerators of probabilities are rounded to it, and chains
/// take pairs as in [`MatMul`]: dimensions `2i + 1` and `2i`, tokens `2j + 1` and `2j`.
#[derive(Debug)]
pub struct Attention<'a, M: Memory = Host> {
    /// `rows × heads × head_dim`.
    pub q: M::In<'a, f32>,
    /// Query heads, a multiple of the cache's `kv_heads`.
    pub heads: usize,
    /// Factor of every score, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// Position of each row in its sequence.
    pub positions: &'a [u32],
    /// Where each row's sequence lives.
    pub pages: PageMap<'a>,
    /// The cache, with keys and values of positions `0..=position` written.
    pub kv: &'a KvCache,
    /// Layer.
    pub layer: usize,
    /// `rows × heads × head_dim`.
    pub out: M::Out<'a, f32>,
}

/// Softmax over all experts, then the `top_k` most probable (of equals the lower id), ascending by id.
#[derive(Debug)]
pub struct Gate<'a, M: Memory = Host> {
    /// `rows × experts`.
    pub logits: M::In<'a, f32>,
    /// Rows.
    pub rows: usize,
    /// Experts.
    pub experts: usize,
    /// Chosen per row, `1..=experts`.
    pub top_k: usize,
    /// Divide the chosen weights by their sum.
    pub normalise: bool,
    /// `rows × top_k`, ascending within a row.
    pub out_experts: M::Out<'a, u32>,
    /// `rows × top_k`, in the order of `out_experts`.
    pub out_weights: M::Out<'a, f32>,
}

/// One expert and the rows that go through it.
#[derive(Debug, Clone, Copy)]
pub struct ExpertGroup<'a> {
    /// `inner × hidden`.
    pub gate: &'a Matrix,
    /// `inner × hidden`.
    pub up: &'a Matrix,
    /// `hidden × inner`.
    pub down: &'a Matrix,
    /// Row indices into `x`.
    pub rows: &'a [u32],
    /// Row of `out` that takes the first result; the others follow.
    pub out_offset: usize,
}

/// `out[offset + i] = down(silu(gate · x[rows[i]]) * (up · x[rows[i]]))` for every group, where each of
/// the three products is as in [`MatMul`].
#[derive(Debug)]
pub struct ExpertFfn<'a, M: Memory = Host> {
    /// Rows of `hidden`.
    pub x: M::In<'a, f32>,
    /// Width of a row.
    pub hidden: usize,
    /// Experts with their rows; their ranges of `out` are ascending and do not overlap.
    pub groups: &'a [ExpertGroup<'a>],
    /// Rows of `hidden`.
    pub out: M::Out<'a, f32>,
}

/// `out[r]`: `acc = fma(weight, part, acc)` over the row's parts in the given order, from `acc = 0`.
#[derive(Debug)]
pub struct Combine<'a> {
    /// `rows × top_k` rows of `width`; an empty one is left out of the sum.
    pub parts: &'a [&'a [f32]],
    /// `rows × top_k`.
    pub weights: &'a [f32],
    /// Parts of a row.
    pub top_k: usize,
    /// Width of a row.
    pub width: usize,
    /// `rows × width`.
    pub out: &'a mut [f32],
}

/// `x += y`.
#[derive(Debug)]
pub struct Add<'a, M: Memory = Host> {
    /// Changed in place.
    pub x: M::Out<'a, f32>,
    /// Same length.
    pub y: M::In<'a, f32>,
}

/// `gate = silu(gate) * up`.
#[derive(Debug)]
pub struct SiluMul<'a, M: Memory = Host> {
    /// Changed in place.
    pub gate: M::Out<'a, f32>,
    /// Same length.
    pub up: M::In<'a, f32>,
}

/// `x[r] *= sigmoid(logits[r])`.
#[derive(Debug)]
pub struct SigmoidScale<'a, M: Memory = Host> {
    /// `logits.len() × width`, changed in place.
    pub x: M::Out<'a, f32>,
    /// One per row.
    pub logits: M::In<'a, f32>,
    /// Width of a row.
    pub width: usize,
}

/// `out[r][i] = logits[r][i] - max(logits[r]) - ln(Σ exp(logits[r] - max))`.
#[derive(Debug)]
pub struct LogSoftmax<'a> {
    /// Rows of `width`.
    pub logits: &'a [f32],
    /// Width of a row.
    pub width: usize,
    /// Same size.
    pub out: &'a mut [f32],
}

/// What a model's forward pass is made of, over values of this process. On the processor all methods return an error
/// only when sizes or indices in their arguments do not fit each other; nothing is written then.
#[expect(
    clippy::missing_errors_doc,
    reason = "the one cause is stated above for all"
)]
pub trait Ops: Send + Sync {
    /// For a thread that will call often: binds it to where this executor's own threads are, until the guard is dropped.
    fn enter(&self) -> Seated {
        Seated::default()
    }
    /// Linear layer: see [`MatMul`].
    fn matmul(&self, op: MatMul<'_>) -> Result<(), OpError>;
    /// Rows of a table: see [`Embed`].
    fn embed(&self, op: Embed<'_>) -> Result<(), OpError>;
    /// Root mean square norm: see [`RmsNorm`].
    fn rms_norm(&self, op: RmsNorm<'_>) -> Result<(), OpError>;
    /// Rotary position embedding: see [`Rope`].
    fn rope(&self, op: Rope<'_>) -> Result<(), OpError>;
    /// Keys and values into the cache: see [`KvWrite`].
    fn kv_write(&self, op: KvWrite<'_>) -> Result<(), OpError>;
    /// Causal attention over the cache: see [`Attention`].
    fn attention(&self, op: Attention<'_>) -> Result<(), OpError>;
    /// Choice of experts: see [`Gate`].
    fn gate(&self, op: Gate<'_>) -> Result<(), OpError>;
    /// Gated feed-forward of several experts: see [`ExpertFfn`].
    fn expert_ffn(&self, op: ExpertFfn<'_>) -> Result<(), OpError>;
    /// Weighted sum of experts' results: see [`Combine`].
    fn combine(&self, op: Combine<'_>) -> Result<(), OpError>;
    /// Residual: see [`Add`].
    fn add(&self, op: Add<'_>) -> Result<(), OpError>;
    /// Gated activation: see [`SiluMul`].
    fn silu_mul(&self, op: SiluMul<'_>) -> Result<(), OpError>;
    /// A shared expert's gate: see [`SigmoidScale`].
    fn sigmoid_scale(&self, op: SigmoidScale<'_>) -> Result<(), OpError>;
    /// Log-probabilities: see [`LogSoftmax`].
    fn log_softmax(&self, op: LogSoftmax<'_>) -> Result<(), OpError>;
}
