// Linear layers.
//
// With few rows weights are what is read: floor = 2 · n · k bytes / bandwidth, 2 · rows · n · k FLOP. A block has STAGES - 1 stages of
// 8 KB of weights under way. With many rows: floor = 2 · rows · n · k / (FLOP per second of mma.sync).
#include "lib/device.cuh"
#include "lib/gemm.cuh"

namespace {

template <class Shape>
__device__ inline void linear(const bf16* x, const bf16* w, const float* bias, float* out, uint32_t rows, uint32_t n,
                              uint32_t k) {
    SHARED(GemmShared<Shape>, shared);
    const uint32_t first_n = blockIdx.x * Shape::N, first_m = blockIdx.y * Shape::M;
    const auto w_line = [=](uint32_t i) -> const bf16* {
        return first_n + i < n ? w + static_cast<uint64_t>(first_n + i) * k : nullptr;
    };
    const auto x_line = [=](uint32_t i) -> const bf16* {
        return i < Shape::M && first_m + i < rows ? x + static_cast<uint64_t>(first_m + i) * k : nullptr;
    };
    GemmSums<Shape> sums;
    multiply_tile<Shape>(shared, w_line, x_line, k, sums);
    for_each_sum<Shape>(sums, [=](uint32_t i, uint32_t m, float sum) {
        const uint32_t output = first_n + i, row = first_m + m;
        if (output < n && row < rows)
            out[static_cast<uint64_t>(row) * n + output] = bias ? sum + bias[output] : sum;
    });
}

constexpr uint32_t SIDE = 32;

struct PlainShared {
    float x[SIDE][SIDE + 1], w[SIDE][SIDE + 1];
};

// Without tensor cores: one chain of fused multiply-adds per output, k ascending.
template <class Weight>
__device__ inline void plain(const float* x, const Weight* w, const float* bias, float* out, uint32_t rows, uint32_t n,
                             uint32_t k) {
    SHARED(PlainShared, shared);
    const uint32_t first_n = blockIdx.x * SIDE, first_m = blockIdx.y * SIDE;
    const uint32_t column = threadIdx.x % SIDE, line = threadIdx.x / SIDE;
    constexpr uint32_t LINES = 256 / SIDE, EACH = SIDE / LINES;
    float sums[EACH] = {};
    for (uint32_t at = 0; at < k; at += SIDE) {
        for (uint32_t i = line; i < SIDE; i += LINES) {
            const bool inside = at + column < k;
            const uint64_t m = first_m + i, o = first_n + i;
            shared.x[i][column] = inside && m < rows ? x[m * k + at + column] : 0.0f;
            shared.w[i][column] = inside && o < n ? widen(w[o * k + at + column]) : 0.0f;
        }
        __syncthreads();
        // Not a zero beyond the last input: it would meet a row that is not a number, or an infinite one.
        const uint32_t depth = k - at < SIDE ? k - at : SIDE;
        for (uint32_t i = 0; i < depth; ++i) {
#pragma unroll
            for (uint32_t r = 0; r < EACH; ++r)
                sums[r] = fmaf(shared.x[line + r * LINES][i], shared.w[column][i], sums[r]);
        }
        __syncthreads();
    }
    const uint32_t output = first_n + column;
#pragma unroll
    for (uint32_t r = 0; r < EACH; ++r) {
        const uint32_t row = first_m + line + r * LINES;
        if (row < rows && output < n)
            out[static_cast<uint64_t>(row) * n + output] = bias ? sums[r] + bias[output] : sums[r];
    }
}

} // namespace

extern "C" __global__ void __launch_bounds__(128)
    fg_gemm_bf16_m8(const bf16* x, const bf16* w, const float* bias, float* out, uint32_t rows, uint32_t n, uint32_t k) {
    linear<Rows8>(x, w, bias, out, rows, n, k);
}

extern "C" __global__ void __launch_bounds__(128)
    fg_gemm_bf16_m16(const bf16* x, const bf16* w, const float* bias, float* out, uint32_t rows, uint32_t n, uint32_t k) {
    linear<Rows16>(x, w, bias, out, rows, n, k);
}

extern "C" __global__ void __launch_bounds__(128)
    fg_gemm_bf16_m32(const bf16* x, const bf16* w, const float* bias, float* out, uint32_t rows, uint32_t n, uint32_t k) {
    linear<Rows32>(x, w, bias, out, rows, n, k);
}

extern "C" __global__ void __launch_bounds__(128)
    fg_gemm_bf16_m64(const bf16* x, const bf16* w, const float* bias, float* out, uint32_t rows, uint32_t n, uint32_t k) {
    linear<Rows64>(x, w, bias, out, rows, n, k);
}

extern "C" __global__ void __launch_bounds__(256)
    fg_gemm_bf16_m128(const bf16* x, const bf16* w, const float* bias, float* out, uint32_t rows, uint32_t n, uint32_t k) {
    linear<Rows128>(x, w, bias, out, rows, n, k);
}

// Float32 weights, for small models and routers; floor = 4 · n · k bytes / bandwidth, reached with few rows only.
extern "C" __global__ void __launch_bounds__(256)
    fg_gemm_f32(const float* x, const float* w, const float* bias, float* out, uint32_t rows, uint32_t n, uint32_t k) {
    plain(x, w, bias, out, rows, n, k);
}

// Float16 weights, widened: half the bytes of float32, and its arithmetic.
extern "C" __global__ void __launch_bounds__(256)
    fg_gemm_f16(const float* x, const Half* w, const float* bias, float* out, uint32_t rows, uint32_t n, uint32_t k) {
    plain(x, w, bias, out, rows, n, k);
}

FAMILY(gemm, ENTRY(fg_gemm_bf16_m8, 128), ENTRY(fg_gemm_bf16_m16, 128), ENTRY(fg_gemm_bf16_m32, 128),
       ENTRY(fg_gemm_bf16_m64, 128), ENTRY(fg_gemm_bf16_m128, 256), ENTRY(fg_gemm_f32, 256),
       ENTRY(fg_gemm_f16, 256))
