// Linear layers and experts whose weights are codes with scales: int8, int4, float8, MXFP4.
//
// Codes are brought as they are, made bf16 in shared memory without loss, and multiplied by tensor cores; inputs that share a scale are one
// chain. Floor with few rows: (bytes of codes + scales) / bandwidth: half (8 bits) or a quarter (4 bits) of bf16's, plus
// 4 bytes per scale. FLOP as for bf16, and about 10 integer operations per code and 64 outputs. A row of an embedding: its codes read, 4 bytes
// per value written.
#include "lib/coded.cuh"
#include "lib/device.cuh"
#include "lib/math.cuh"
#include "lib/work.cuh"

namespace {

__device__ inline const uint8_t* bytes_of(const uint64_t* addresses, uint32_t group) {
    return reinterpret_cast<const uint8_t*>(addresses[group]);
}

template <class Shape>
__device__ inline void linear(const bf16* x, const uint8_t* w, const Coding& coding, const float* bias, float* out,
                              uint32_t rows) {
    SHARED(CodedShared<Shape>, shared);
    const uint32_t first_n = blockIdx.x * Shape::N, first_m = blockIdx.y * Shape::M, n = coding.n, k = coding.k;
    const auto w_line = [=](uint32_t i) { return CodedLine{first_n + i < n ? w : nullptr, first_n + i}; };
    const auto x_line = [=](uint32_t i) -> const bf16* {
        return i < Shape::M && first_m + i < rows ? x + static_cast<uint64_t>(first_m + i) * k : nullptr;
    };
    GemmSums<Shape> sums;
    multiply_coded<Shape>(shared, w_line, x_line, coding, sums);
    for_each_sum<Shape>(sums, [=](uint32_t i, uint32_t m, float sum) {
        const uint32_t output = first_n + i, row = first_m + m;
        if (output < n && row < rows)
            out[static_cast<uint64_t>(row) * n + output] = bias ? sum + bias[output] : sum;
    });
}

template <class Shape>
__device__ inline void gate_up(const bf16* x, const uint32_t* row_of_slot, const uint64_t* gate, const uint64_t* up,
                               const Coding& coding, const Work& work, bf16* out) {
    SHARED(CodedShared<Shape>, shared);
    constexpr uint32_t N = Shape::N / 2;
    const uint32_t inner = coding.n, hidden = coding.k;
    const uint32_t tiles_n = (inner + N - 1) / N, pieces = *work.tile_count * tiles_n;
    for (uint32_t index = blockIdx.x; index < pieces; index += gridDim.x) {
        const Piece piece = piece_of<Shape>(work, index, tiles_n);
        const uint8_t *const g = bytes_of(gate, piece.group), *const u = bytes_of(up, piece.group);
        const auto w_line = [=](uint32_t i) {
            const uint32_t output = piece.output * N + i / 16 * 8 + i % 8;
            return CodedLine{output < inner ? (i / 8 % 2 ? u : g) : nullptr, output};
        };
        const auto x_line = [=](uint32_t i) -> const bf16* {
            const uint32_t slot = piece.first + i;
            if (i >= Shape::M || slot >= piece.end) return nullptr;
            return x + static_cast<uint64_t>(row_of_slot ? row_of_slot[slot] : slot) * hidden;
        };
        GemmSums<Shape> sums;
        multiply_coded<Shape>(shared, w_line, x_line, coding, sums);
        for_each_two<Shape>(sums, [=](uint32_t i, uint32_t m, float gated, float value) {
            const uint32_t output = piece.output * N + i, slot = piece.first + m;
            if (output < inner && slot < piece.end)
                out[static_cast<uint64_t>(slot) * inner + output] = round_bf16(silu(gated) * value);
        });
    }
}

template <class Shape>
__device__ inline void down_of(const bf16* x, const uint64_t* down, const Coding& coding, const Work& work,
                               float* out) {
    SHARED(CodedShared<Shape>, shared);
    const uint32_t hidden = coding.n, inner = coding.k;
    const uint32_t tiles_n = (hidden + Shape::N - 1) / Shape::N, pieces = *work.tile_count * tiles_n;
    for (uint32_t index = blockIdx.x; index < pieces; index += gridDim.x) {
        const Piece piece = piece_of<Shape>(work, index, tiles_n);
        const uint8_t* const w = bytes_of(down, piece.group);
        const auto w_line = [=](uint32_t i) {
            const uint32_t output = piece.output * Shape::N + i;
            return CodedLine{output < hidden ? w : nullptr, output};
        };
        const auto x_line = [=](uint32_t i) -> const bf16* {
            const uint32_t slot = piece.first + i;
            return i < Shape::M && slot < piece.end ? x + static_cast<uint64_t>(slot) * inner : nullptr;
        };
        GemmSums<Shape> sums;
        multiply_coded<Shape>(shared, w_line, x_line, coding, sums);
        for_each_sum<Shape>(sums, [=](uint32_t i, uint32_t m, float sum) {
            const uint32_t output = piece.output * Shape::N + i, slot = piece.first + m;
            if (output < hidden && slot < piece.end) out[static_cast<uint64_t>(slot) * hidden + output] = sum;
        });
    }
}

} // namespace

// Rows of an embedding of `n` rows that is the output projection too: each value is its code times its scale.
extern "C" __global__ void __launch_bounds__(256)
    fg_embed_coded(const uint8_t* table, uint32_t format, uint32_t block_n, uint32_t block_k, const uint32_t* ids,
                   float* out, uint32_t n, uint32_t width) {
    const Coding coding{format, block_n, block_k, n, width};
    const uint32_t id = ids[blockIdx.x];
    const uint8_t* codes = table + static_cast<uint64_t>(id) * coding.row_bytes();
    float* to = out + static_cast<uint64_t>(blockIdx.x) * width;
    for (uint32_t i = threadIdx.x; i < width; i += 256) {
        const uint32_t code = coding.four_bits() ? codes[i / 2] >> (i % 2 * 4) & 15u : codes[i];
        const uint32_t group = block_k >= width ? 0 : i / block_k;
        const int32_t zero = format == INT4 ? coding.zero(table, id, group) : 0;
        to[i] = widen(coding.number(code, zero)) * coding.scale(table, id, group);
    }
}

// Three entries per shape of tile.
#define CODED_KERNELS(rows_of_tile)                                                                                    \
    extern "C" __global__ void __launch_bounds__(128) fg_gemm_coded_m##rows_of_tile(                                   \
        const bf16* x, const uint8_t* w, uint32_t format, uint32_t block_n, uint32_t block_k, const float* bias,       \
        float* out, uint32_t rows, uint32_t n, uint32_t k) {                                                           \
        linear<Coded##rows_of_tile>(x, w, Coding{format, block_n, block_k, n, k}, bias, out, rows);                    \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(128) fg_moe_gate_up_coded_m##rows_of_tile(                            \
        const bf16* x, const uint32_t* row_of_slot, const uint64_t* gate, const uint64_t* up, uint32_t format,         \
        uint32_t block_n, uint32_t block_k, const uint32_t* offsets, const uint32_t* tile_group,                       \
        const uint32_t* tile_first, const uint32_t* tile_count, bf16* out, uint32_t inner, uint32_t hidden) {          \
        gate_up<Coded##rows_of_tile>(x, row_of_slot, gate, up, Coding{format, block_n, block_k, inner, hidden},        \
                                     Work{offsets, tile_group, tile_first, tile_count}, out);                          \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(128) fg_moe_down_coded_m##rows_of_tile(                               \
        const bf16* x, const uint64_t* down, uint32_t format, uint32_t block_n, uint32_t block_k,                      \
        const uint32_t* offsets, const uint32_t* tile_group, const uint32_t* tile_first, const uint32_t* tile_count,   \
        float* out, uint32_t hidden, uint32_t inner) {                                                                 \
        down_of<Coded##rows_of_tile>(x, down, Coding{format, block_n, block_k, hidden, inner},                         \
                                     Work{offsets, tile_group, tile_first, tile_count}, out);                          \
    }

CODED_KERNELS(8)
CODED_KERNELS(16)
CODED_KERNELS(32)
CODED_KERNELS(64)

FAMILY(coded, ENTRY(fg_gemm_coded_m8, 128), ENTRY(fg_gemm_coded_m16, 128), ENTRY(fg_gemm_coded_m32, 128),
       ENTRY(fg_gemm_coded_m64, 128), ENTRY(fg_moe_gate_up_coded_m8, 128), ENTRY(fg_moe_gate_up_coded_m16, 128),
       ENTRY(fg_moe_gate_up_coded_m32, 128), ENTRY(fg_moe_gate_up_coded_m64, 128), ENTRY(fg_moe_down_coded_m8, 128),
       ENTRY(fg_moe_down_coded_m16, 128), ENTRY(fg_moe_down_coded_m32, 128), ENTRY(fg_moe_down_coded_m64, 128),
       ENTRY(fg_embed_coded, 256))
