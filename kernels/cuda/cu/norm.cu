// Root mean square norm of rows, with the residual addition before it.
//
// Memory-bound. Bytes per value: 4 read, 4 more for `add`, 4 written back to `x` with `add`, 4 or 2 written, 4 read again for the
// scaling (from L1 or L2: a row is at most a few tens of KB). FLOP per value: about 4. Floor = 12 to 16 bytes per value / bandwidth.
#include "lib/device.cuh"
#include "lib/reduce.cuh"

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
    // A thread reads again only what it wrote itself.
    float squares = 0.0f;
    for (uint32_t i = threadIdx.x; i < width; i += THREADS) {
        float value = x[start + i];
        if (add) {
            value += add[start + i];
            x[start + i] = value;
        }
        squares = fmaf(value, value, squares);
    }
    const float sum = block_sum<THREADS>(squares, shared.partials);
    const float root = sqrtf(sum / static_cast<float>(width) + eps);
    for (uint32_t i = threadIdx.x; i < width; i += THREADS) {
        const float value = weight[i] * (x[start + i] / root);
        if (out) out[start + i] = value;
        if (out_bf16) out_bf16[start + i] = round_bf16(value);
    }
}

FAMILY(norm, ENTRY(fg_rms_norm, 256))
