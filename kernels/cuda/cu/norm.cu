// Root mean square norm of rows, with the residual addition before it.
//
// Memory-bound. Bytes per value: 4 read, 4 more for `add`, 4 written back to `x` with `add`, 4 or 2 written, 4 read again for the
// scaling (from L1 or L2: a row is at most a few tens of KB). FLOP per value: about 4. Floor = 12 to 16 bytes per value / bandwidth.
#include "lib/device.cuh"
#include "lib/reduce.cuh"
#include "lib/vector.cuh"

namespace {

constexpr uint32_t THREADS = 256;

struct NormShared {
    BlockPartials<THREADS> partials;
};

} // namespace

extern "C" __global__ void __launch_bounds__(256)
    fg_rms_norm(float* x, const float* add, const float* weight, float eps, float* out, bf16* out_bf16,
                uint32_t width) {
    SHARED(NormShared, shared);
    const uint64_t start = static_cast<uint64_t>(blockIdx.x) * width;
    // A thread reads again only what it wrote itself, so `out` may be `x`.
    float squares = 0.0f;
    for (uint32_t i = threadIdx.x * 4; i < width; i += THREADS * 4) {
        Four value = load_four(x + start + i, width - i);
        if (add) {
            const Four other = load_four(add + start + i, width - i);
#pragma unroll
            for (uint32_t j = 0; j < 4; ++j) value.of[j] += other.of[j];
            store_four(x + start + i, value, width - i);
        }
#pragma unroll
        for (uint32_t j = 0; j < 4; ++j) squares = fmaf(value.of[j], value.of[j], squares);
    }
    const float sum = block_sum<THREADS>(squares, shared.partials);
    const float root = sqrtf(sum / static_cast<float>(width) + eps);
    for (uint32_t i = threadIdx.x * 4; i < width; i += THREADS * 4) {
        Four value = load_four(x + start + i, width - i);
        const Four factor = load_four(weight + i, width - i);
#pragma unroll
        for (uint32_t j = 0; j < 4; ++j) value.of[j] = factor.of[j] * (value.of[j] / root);
        if (out) store_four(out + start + i, value, width - i);
        if (out_bf16) store_rounded(out_bf16 + start + i, value, width - i);
    }
}

FAMILY(norm, ENTRY(fg_rms_norm, 256))
