// One value in, one value out; and rows taken from a table.
//
// Memory-bound. Floor = bytes / bandwidth; bytes counted per value: add and silu_mul 12 (two read, one written), round_bf16 6,
// clamp, sigmoid_scale, gather and embed_f32 8, embed_bf16 and embed_f16 6. FLOP: 1 for add, about 25 for silu and sigmoid: far below the ridge.
#include "lib/device.cuh"
#include "lib/math.cuh"
#include "lib/vector.cuh"

namespace {

constexpr uint32_t THREADS = 256;

// Four values per thread and turn.
__device__ inline uint64_t first_of_thread() { return (static_cast<uint64_t>(blockIdx.x) * THREADS + threadIdx.x) * 4; }
__device__ inline uint64_t stride_of_grid() { return static_cast<uint64_t>(gridDim.x) * THREADS * 4; }

__device__ inline void copy_row(float* to, const float* from, uint32_t width) {
    for (uint32_t i = threadIdx.x * 4; i < width; i += THREADS * 4)
        store_four(to + i, load_four(from + i, width - i), width - i);
}

} // namespace

extern "C" __global__ void __launch_bounds__(256) fg_add(float* x, const float* y, uint64_t count) {
    for (uint64_t i = first_of_thread(); i < count; i += stride_of_grid()) {
        Four a = load_four(x + i, count - i);
        const Four b = load_four(y + i, count - i);
#pragma unroll
        for (uint32_t j = 0; j < 4; ++j) a.of[j] += b.of[j];
        store_four(x + i, a, count - i);
    }
}

extern "C" __global__ void __launch_bounds__(256) fg_silu_mul(float* gate, const float* up, uint64_t count) {
    for (uint64_t i = first_of_thread(); i < count; i += stride_of_grid()) {
        Four a = load_four(gate + i, count - i);
        const Four b = load_four(up + i, count - i);
#pragma unroll
        for (uint32_t j = 0; j < 4; ++j) a.of[j] = silu(a.of[j]) * b.of[j];
        store_four(gate + i, a, count - i);
    }
}

extern "C" __global__ void __launch_bounds__(256) fg_round_bf16(const float* x, bf16* out, uint64_t count) {
    for (uint64_t i = first_of_thread(); i < count; i += stride_of_grid())
        store_rounded(out + i, load_four(x + i, count - i), count - i);
}

// What is not a number stays so.
extern "C" __global__ void __launch_bounds__(256) fg_clamp(float* x, float limit, uint64_t count) {
    for (uint64_t i = first_of_thread(); i < count; i += stride_of_grid()) {
        Four a = load_four(x + i, count - i);
#pragma unroll
        for (uint32_t j = 0; j < 4; ++j) a.of[j] = a.of[j] > limit ? limit : a.of[j] < -limit ? -limit : a.of[j];
        store_four(x + i, a, count - i);
    }
}

extern "C" __global__ void __launch_bounds__(256) fg_sigmoid_scale(float* x, const float* logits, uint32_t width) {
    const float factor = sigmoid(logits[blockIdx.x]);
    float* row = x + static_cast<uint64_t>(blockIdx.x) * width;
    for (uint32_t i = threadIdx.x * 4; i < width; i += THREADS * 4) {
        Four a = load_four(row + i, width - i);
#pragma unroll
        for (uint32_t j = 0; j < 4; ++j) a.of[j] *= factor;
        store_four(row + i, a, width - i);
    }
}

extern "C" __global__ void __launch_bounds__(256)
    fg_gather_rows(const float* x, const uint32_t* row_index, float* out, uint32_t width) {
    copy_row(out + static_cast<uint64_t>(blockIdx.x) * width, x + static_cast<uint64_t>(row_index[blockIdx.x]) * width,
             width);
}

extern "C" __global__ void __launch_bounds__(256)
    fg_embed_bf16(const bf16* table, const uint32_t* ids, float* out, uint32_t width) {
    const bf16* from = table + static_cast<uint64_t>(ids[blockIdx.x]) * width;
    float* to = out + static_cast<uint64_t>(blockIdx.x) * width;
    for (uint32_t i = threadIdx.x; i < width; i += THREADS) to[i] = widen(from[i]);
}

extern "C" __global__ void __launch_bounds__(256)
    fg_embed_f16(const Half* table, const uint32_t* ids, float* out, uint32_t width) {
    const Half* from = table + static_cast<uint64_t>(ids[blockIdx.x]) * width;
    float* to = out + static_cast<uint64_t>(blockIdx.x) * width;
    for (uint32_t i = threadIdx.x; i < width; i += THREADS) to[i] = widen(from[i]);
}

extern "C" __global__ void __launch_bounds__(256)
    fg_embed_f32(const float* table, const uint32_t* ids, float* out, uint32_t width) {
    copy_row(out + static_cast<uint64_t>(blockIdx.x) * width, table + static_cast<uint64_t>(ids[blockIdx.x]) * width, width);
}

FAMILY(elementwise, ENTRY(fg_add, 256), ENTRY(fg_silu_mul, 256), ENTRY(fg_round_bf16, 256), ENTRY(fg_clamp, 256),
       ENTRY(fg_sigmoid_scale, 256), ENTRY(fg_gather_rows, 256), ENTRY(fg_embed_bf16, 256), ENTRY(fg_embed_f16, 256),
       ENTRY(fg_embed_f32, 256))
