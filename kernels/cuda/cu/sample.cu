// Log-probabilities, and the greatest logit.
//
// Memory-bound. log_softmax: 4 bytes read three times (twice from L2, a row of 150k logits is 600 KB) and 4 written per value; argmax: 4 read.
// Floor = rows · width · 8 (4 for argmax) bytes / bandwidth; with few rows few multiprocessors work, so a row's own time
// counts: 600 KB by one of them.
#include "lib/device.cuh"
#include "lib/reduce.cuh"

namespace {

constexpr uint32_t THREADS = 256;
constexpr uint32_t WARPS = THREADS / WARP;

struct SoftmaxShared {
    BlockPartials<THREADS> most, sum;
};

struct Best {
    float value;
    uint32_t index;

    // A greater value, of equals the lower index.
    __device__ bool behind(const Best& other) const {
        return other.value > value || (other.value == value && other.index < index);
    }
};

struct ArgmaxShared {
    Best of_warp[WARPS];
};

} // namespace

extern "C" __global__ void __launch_bounds__(256) fg_log_softmax(const float* logits, float* out, uint32_t width) {
    SHARED(SoftmaxShared, shared);
    const uint64_t start = static_cast<uint64_t>(blockIdx.x) * width;
    float most = -infinity();
    for (uint32_t i = threadIdx.x; i < width; i += THREADS) most = greater(most, logits[start + i]);
    most = block_max<THREADS>(most, shared.most);
    float sum = 0.0f;
    for (uint32_t i = threadIdx.x; i < width; i += THREADS) sum += exponential(logits[start + i] - most);
    sum = block_sum<THREADS>(sum, shared.sum);
    const float log_sum = logf(sum);
    for (uint32_t i = threadIdx.x; i < width; i += THREADS) out[start + i] = (logits[start + i] - most) - log_sum;
}

extern "C" __global__ void __launch_bounds__(256) fg_argmax(const float* logits, uint32_t* out, uint32_t width) {
    SHARED(ArgmaxShared, shared);
    const float* row = logits + static_cast<uint64_t>(blockIdx.x) * width;
    // Index 0 of minus infinity is what a row without a number gives.
    Best best{-infinity(), width};
    for (uint32_t i = threadIdx.x; i < width; i += THREADS) {
        const Best mine{row[i], i};
        if (best.behind(mine)) best = mine;
    }
    for (int step = WARP / 2; step > 0; step /= 2) {
        const Best other{__shfl_xor_sync(ALL_LANES, best.value, step), __shfl_xor_sync(ALL_LANES, best.index, step)};
        if (best.behind(other)) best = other;
    }
    if (lane_id() == 0) shared.of_warp[warp_id()] = best;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (uint32_t w = 1; w < WARPS; ++w)
        if (best.behind(shared.of_warp[w])) best = shared.of_warp[w];
    out[blockIdx.x] = best.index < width ? best.index : 0;
}

FAMILY(sample, ENTRY(fg_log_softmax, 256), ENTRY(fg_argmax, 256))
