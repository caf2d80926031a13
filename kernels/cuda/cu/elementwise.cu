// One value in, one value out; and rows taken from a table.
//
// Memory-bound. Floor = bytes / bandwidth; bytes counted per value: add and silu_mul 12 (two read, one written), round_bf16 6,
// sigmoid_scale, gather and embed_f32 8, embed_bf16 6. FLOP: 1 for add, about 25 for silu and sigmoid: far below the ridge.
#include "lib/device.cuh"
#include "lib/math.cuh"

namespace {

constexpr uint32_t THREADS = 256;

__device__ inline uint64_t first_of_thread() { return static_cast<uint64_t>(blockIdx.x) * THREADS + threadIdx.x; }
__device__ inline uint64_t threads_of_grid() { return static_cast<uint64_t>(gridDim.x) * THREADS; }

} // namespace

extern "C" __global__ void __launch_bounds__(256) fg_add(float* x, const float* y, uint64_t count) {
    for (uint64_t i = first_of_thread(); i < count; i += threads_of_grid()) x[i] += y[i];
}

extern "C" __global__ void __launch_bounds__(256) fg_silu_mul(float* gate, const float* up, uint64_t count) {
    for (uint64_t i = first_of_thread(); i < count; i += threads_of_grid()) gate[i] = silu(gate[i]) * up[i];
}

extern "C" __global__ void __launch_bounds__(256) fg_round_bf16(const float* x, bf16* out, uint64_t count) {
    for (uint64_t i = first_of_thread(); i < count; i += threads_of_grid()) out[i] = round_bf16(x[i]);
}

extern "C" __global__ void __launch_bounds__(256) fg_sigmoid_scale(float* x, const float* logits, uint32_t width) {
    const float factor = sigmoid(logits[blockIdx.x]);
    float* row = x + static_cast<uint64_t>(blockIdx.x) * width;
    for (uint32_t i = threadIdx.x; i < width; i += THREADS) row[i] *= factor;
}

extern "C" __global__ void __launch_bounds__(256)
    fg_gather_rows(const float* x, const uint32_t* row_index, float* out, uint32_t width) {
    const float* from = x + static_cast<uint64_t>(row_index[blockIdx.x]) * width;
    float* to = out + static_cast<uint64_t>(blockIdx.x) * width;
    for (uint32_t i = threadIdx.x; i < width; i += THREADS) to[i] = from[i];
}

extern "C" __global__ void __launch_bounds__(256)
    fg_embed_bf16(const bf16* table, const uint32_t* ids, float* out, uint32_t width) {
    const bf16* from = table + static_cast<uint64_t>(ids[blockIdx.x]) * width;
    float* to = out + static_cast<uint64_t>(blockIdx.x) * width;
    for (uint32_t i = threadIdx.x; i < width; i += THREADS) to[i] = widen(from[i]);
}

extern "C" __global__ void __launch_bounds__(256)
    fg_embed_f32(const float* table, const uint32_t* ids, float* out, uint32_t width) {
    const float* from = table + static_cast<uint64_t>(ids[blockIdx.x]) * width;
    float* to = out + static_cast<uint64_t>(blockIdx.x) * width;
    for (uint32_t i = threadIdx.x; i < width; i += THREADS) to[i] = from[i];
}

FAMILY(elementwise, ENTRY(fg_add, 256), ENTRY(fg_silu_mul, 256), ENTRY(fg_round_bf16, 256),
       ENTRY(fg_sigmoid_scale, 256), ENTRY(fg_gather_rows, 256), ENTRY(fg_embed_bf16, 256), ENTRY(fg_embed_f32, 256))
