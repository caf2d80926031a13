//! The kernels as structs: parameters by name, in the order of the table in `README.md`, with the grid and the block
//! that the table wants. What a device would not survive is checked before it is launched.

use foregate_kernels::OpError;

use crate::driver::{Arg, Driver, DriverError, Launch};

/// Address of a device; null where the table allows it.
pub(crate) type Address = u64;

/// No address.
pub(crate) const NULL: Address = 0;

/// Most blocks along y and z.
const MOST_YZ: u32 = 65_535;
/// Most blocks along x.
const MOST_X: u32 = 0x7fff_ffff;

/// Turns a failure of the driver into that of an op.
pub(crate) fn failed(op: &'static str) -> impl Fn(DriverError) -> OpError {
    move |error| OpError::Device {
        op,
        call: error.call,
        code: error.code,
        text: error.text,
    }
}

/// Refuses grids that no device takes, and blocks of no threads; runs the kernel otherwise. No row, no launch.
pub(crate) fn launch(
    driver: &dyn Driver,
    op: &'static str,
    launch: &Launch<'_>,
) -> Result<(), OpError> {
    let [x, y, z] = launch.grid;
    if x == 0 || y == 0 || z == 0 {
        return Ok(());
    }
    if x > MOST_X || y > MOST_YZ || z > MOST_YZ {
        return Err(OpError::Unsupported {
            op,
            what: format!(
                "{} in a grid of {x} × {y} × {z} blocks, the device takes at most {MOST_X} × {MOST_YZ} × {MOST_YZ}: \
                 make the batch smaller (spec.workers.maxNumBatchedTokens)",
                launch.symbol
            ),
        });
    }
    driver.launch(launch).map_err(failed(op))
}

/// A size as kernels take it.
///
/// # Errors
/// When it does not fit 32 bits.
pub(crate) fn size(op: &'static str, what: &str, value: usize) -> Result<u32, OpError> {
    u32::try_from(value).map_err(|_| OpError::Unsupported {
        op,
        what: format!("{what} of {value} does not fit 32 bits"),
    })
}

macro_rules! kernels {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $type:ty),* $(,)? })*) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Clone, Copy)]
            pub(crate) struct $name {
                $(pub(crate) $field: $type),*
            }

            impl $name {
                /// Runs it under `symbol`.
                pub(crate) fn run(
                    self,
                    driver: &dyn Driver,
                    (op, symbol): (&'static str, &'static str),
                    grid: [u32; 3],
                    block: u32,
                ) -> Result<(), OpError> {
                    let args = [$(Arg::from(self.$field)),*];
                    launch(driver, op, &Launch { symbol, grid, block, args: &args })
                }
            }
        )*
    };
}

kernels! {
    /// `fg_add`, `fg_silu_mul`: `x` is changed.
    Pairwise { x: Address, y: Address, count: u64 }
    /// `fg_clamp`.
    ClampTo { x: Address, limit: f32, count: u64 }
    /// `fg_sigmoid_scale`.
    SigmoidScaled { x: Address, logits: Address, width: u32 }
    /// `fg_round_bf16`.
    Rounded { x: Address, out: Address, count: u64 }
    /// `fg_gather_rows`, `fg_embed_…`.
    Rows { table: Address, ids: Address, out: Address, width: u32 }
    /// `fg_rms_norm`.
    Normed {
        x: Address, add: Address, weight: Address, eps: f32, out: Address, out_bf16: Address, width: u32,
    }
    /// `fg_rope`.
    Rotated {
        x: Address, norm_weight: Address, norm_width: u32, eps: f32, clip: f32, cos: Address, sin: Address,
        heads: u32, head_dim: u32,
    }
    /// `fg_kv_write_…`.
    KvWritten {
        k: Address, v: Address, positions: Address, sequence_of_row: Address, tables: Address,
        table_stride: u32, cache: Address, layers: u32, layer: u32, page_tokens: u32, kv_heads: u32,
        head_dim: u32,
    }
    /// `fg_attention_…`.
    Attended {
        q: Address, cache: Address, positions: Address, sequence_of_row: Address, tables: Address,
        table_stride: u32, tile_first: Address, tile_rows: Address, layers: u32, layer: u32,
        page_tokens: u32, heads: u32, kv_heads: u32, head_dim: u32, scale: f32, splits: u32,
        part_out: Address, part_max: Address, part_sum: Address, out: Address,
    }
    /// `fg_attention_merge`.
    Merged {
        part_out: Address, part_max: Address, part_sum: Address, positions: Address, out: Address,
        heads: u32, head_dim: u32, splits: u32,
    }
    /// `fg_gate`.
    Chosen {
        logits: Address, rows: u32, experts: u32, top_k: u32, normalise: u32, experts_out: Address,
        weights_out: Address, counts: Address,
    }
    /// `fg_expert_counts`.
    Counted { experts: Address, choices: u32, counts: Address, groups: u32 }
    /// `fg_expert_offsets`.
    Offsets { counts: Address, groups: u32, offsets: Address }
    /// `fg_permute`.
    Permuted {
        experts: Address, choices: u32, top_k: u32, offsets: Address, row_of_slot: Address,
        slot_of_choice: Address,
    }
    /// `fg_tiles`.
    Tiles {
        offsets: Address, groups: u32, tile_rows: u32, tile_group: Address, tile_first: Address,
        tile_count: Address,
    }
    /// `fg_combine`.
    Combined {
        parts: Address, slot_of_choice: Address, weights: Address, top_k: u32, width: u32, out: Address,
    }
    /// `fg_gemm_bf16_…`, `fg_gemm_f32`, `fg_gemm_f16`.
    Product { x: Address, w: Address, bias: Address, out: Address, rows: u32, n: u32, k: u32 }
    /// `fg_gemm_coded_…`.
    CodedProduct {
        x: Address, w: Address, format: u32, block_n: u32, block_k: u32, bias: Address, out: Address, rows: u32,
        n: u32, k: u32,
    }
    /// `fg_embed_coded`.
    CodedRows {
        table: Address, format: u32, block_n: u32, block_k: u32, ids: Address, out: Address, n: u32, width: u32,
    }
    /// `fg_moe_gate_up_bf16_…`.
    GateUp {
        x: Address, row_of_slot: Address, gate: Address, up: Address, offsets: Address,
        tile_group: Address, tile_first: Address, tile_count: Address, out: Address, inner: u32,
        hidden: u32,
    }
    /// `fg_moe_gate_up_coded_…`.
    CodedGateUp {
        x: Address, row_of_slot: Address, gate: Address, up: Address, format: u32, block_n: u32, block_k: u32,
        offsets: Address, tile_group: Address, tile_first: Address, tile_count: Address, out: Address,
        inner: u32, hidden: u32,
    }
    /// `fg_moe_down_coded_…`.
    CodedDown {
        x: Address, down: Address, format: u32, block_n: u32, block_k: u32, offsets: Address,
        tile_group: Address, tile_first: Address, tile_count: Address, out: Address, hidden: u32, inner: u32,
    }
    /// `fg_moe_down_bf16_…`.
    Down {
        x: Address, down: Address, offsets: Address, tile_group: Address, tile_first: Address,
        tile_count: Address, out: Address, hidden: u32, inner: u32,
    }
    /// `fg_log_softmax`.
    LogSoftmaxed { logits: Address, out: Address, width: u32 }
}
