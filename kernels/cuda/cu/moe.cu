// Experts: a product per (expert, its slots), for all experts at once.
//
// A grid of any size takes pieces of work by turns: (tile of slots, tile of outputs), outputs fastest. With few slots per
// expert weights are what is read: floor = 2 · (3 · inner · hidden) bytes per expert that has a slot / bandwidth. FLOP: 6 · slots · inner · hidden.
// Under about 180 slots per expert that is the floor on an H200; beyond it, FLOP are.
#include "lib/device.cuh"
#include "lib/gemm.cuh"
#include "lib/math.cuh"
#include "lib/work.cuh"

namespace {

__device__ inline const bf16* matrix(const uint64_t* addresses, uint32_t group) {
    return reinterpret_cast<const bf16*>(addresses[group]);
}

template <class Shape>
__device__ inline void gate_up(const bf16* x, const uint32_t* row_of_slot, const uint64_t* gate, const uint64_t* up,
                               const Work& work, bf16* out, uint32_t inner, uint32_t hidden) {
    SHARED(GemmShared<Shape>, shared);
    constexpr uint32_t N = Shape::N / 2;
    const uint32_t tiles_n = (inner + N - 1) / N, pieces = *work.tile_count * tiles_n;
    for (uint32_t index = blockIdx.x; index < pieces; index += gridDim.x) {
        const Piece piece = piece_of<Shape>(work, index, tiles_n);
        const bf16 *const g = matrix(gate, piece.group), *const u = matrix(up, piece.group);
        // Lines of the tile: 8 of gate, the same 8 of up.
        const auto w_line = [=](uint32_t i) -> const bf16* {
            const uint32_t output = piece.output * N + i / 16 * 8 + i % 8;
            return output < inner ? (i / 8 % 2 ? u : g) + static_cast<uint64_t>(output) * hidden : nullptr;
        };
        const auto x_line = [=](uint32_t i) -> const bf16* {
            const uint32_t slot = piece.first + i;
            if (i >= Shape::M || slot >= piece.end) return nullptr;
            return x + static_cast<uint64_t>(row_of_slot ? row_of_slot[slot] : slot) * hidden;
        };
        GemmSums<Shape> sums;
        multiply_tile<Shape>(shared, w_line, x_line, hidden, sums);
        for_each_two<Shape>(sums, [=](uint32_t i, uint32_t m, float gated, float value) {
            const uint32_t output = piece.output * N + i, slot = piece.first + m;
            if (output < inner && slot < piece.end)
                out[static_cast<uint64_t>(slot) * inner + output] = round_bf16(silu(gated) * value);
        });
    }
}

template <class Shape>
__device__ inline void down_of(const bf16* x, const uint64_t* down, const Work& work, float* out, uint32_t hidden,
                               uint32_t inner) {
    SHARED(GemmShared<Shape>, shared);
    const uint32_t tiles_n = (hidden + Shape::N - 1) / Shape::N, pieces = *work.tile_count * tiles_n;
    for (uint32_t index = blockIdx.x; index < pieces; index += gridDim.x) {
        const Piece piece = piece_of<Shape>(work, index, tiles_n);
        const bf16* const w = matrix(down, piece.group);
        const auto w_line = [=](uint32_t i) -> const bf16* {
            const uint32_t output = piece.output * Shape::N + i;
            return output < hidden ? w + static_cast<uint64_t>(output) * inner : nullptr;
        };
        const auto x_line = [=](uint32_t i) -> const bf16* {
            const uint32_t slot = piece.first + i;
            return i < Shape::M && slot < piece.end ? x + static_cast<uint64_t>(slot) * inner : nullptr;
        };
        GemmSums<Shape> sums;
        multiply_tile<Shape>(shared, w_line, x_line, inner, sums);
        for_each_sum<Shape>(sums, [=](uint32_t i, uint32_t m, float sum) {
            const uint32_t output = piece.output * Shape::N + i, slot = piece.first + m;
            if (output < hidden && slot < piece.end) out[static_cast<uint64_t>(slot) * hidden + output] = sum;
        });
    }
}

} // namespace

// One pair of entries per shape of tile.
#define EXPERT_KERNELS(rows, threads)                                                                                  \
    extern "C" __global__ void __launch_bounds__(threads) fg_moe_gate_up_bf16_m##rows(                                 \
        const bf16* x, const uint32_t* row_of_slot, const uint64_t* gate, const uint64_t* up,                          \
        const uint32_t* offsets, const uint32_t* tile_group, const uint32_t* tile_first, const uint32_t* tile_count,   \
        bf16* out, uint32_t inner, uint32_t hidden) {                                                                  \
        gate_up<Rows##rows>(x, row_of_slot, gate, up, Work{offsets, tile_group, tile_first, tile_count}, out, inner,   \
                            hidden);                                                                                   \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(threads) fg_moe_down_bf16_m##rows(                                    \
        const bf16* x, const uint64_t* down, const uint32_t* offsets, const uint32_t* tile_group,                      \
        const uint32_t* tile_first, const uint32_t* tile_count, float* out, uint32_t hidden, uint32_t inner) {         \
        down_of<Rows##rows>(x, down, Work{offsets, tile_group, tile_first, tile_count}, out, hidden, inner);           \
    }

EXPERT_KERNELS(8, 128)
EXPERT_KERNELS(16, 128)
EXPERT_KERNELS(32, 128)
EXPERT_KERNELS(64, 128)
EXPERT_KERNELS(128, 256)

FAMILY(moe, ENTRY(fg_moe_gate_up_bf16_m8, 128), ENTRY(fg_moe_gate_up_bf16_m16, 128),
       ENTRY(fg_moe_gate_up_bf16_m32, 128), ENTRY(fg_moe_gate_up_bf16_m64, 128), ENTRY(fg_moe_gate_up_bf16_m128, 256),
       ENTRY(fg_moe_down_bf16_m8, 128), ENTRY(fg_moe_down_bf16_m16, 128), ENTRY(fg_moe_down_bf16_m32, 128),
       ENTRY(fg_moe_down_bf16_m64, 128), ENTRY(fg_moe_down_bf16_m128, 256))
