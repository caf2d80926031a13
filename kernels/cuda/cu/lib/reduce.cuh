// Sums and maxima over a warp and a block, in a fixed order.
#pragma once

#include "device.cuh"
#include "math.cuh"

__device__ inline float warp_sum(float x) {
    for (uint32_t step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, static_cast<int>(step));
    return x;
}

__device__ inline float warp_max(float x) {
    for (uint32_t step = WARP / 2; step > 0; step /= 2)
        x = greater(x, __shfl_xor_sync(ALL_LANES, x, static_cast<int>(step)));
    return x;
}

// What one reduction over a block needs of shared memory.
template <uint32_t THREADS> struct BlockPartials { float of_warp[THREADS / WARP]; };

// All threads get the sum: of each warp by its tree, then of the warps, ascending. The next use of `partials` must be after
// another barrier.
template <uint32_t THREADS> __device__ inline float block_sum(float x, BlockPartials<THREADS>& partials) {
    x = warp_sum(x);
    if (lane_id() == 0) partials.of_warp[warp_id()] = x;
    __syncthreads();
    float sum = 0.0f;
    for (uint32_t w = 0; w < THREADS / WARP; ++w) sum += partials.of_warp[w];
    return sum;
}

template <uint32_t THREADS> __device__ inline float block_max(float x, BlockPartials<THREADS>& partials) {
    x = warp_max(x);
    if (lane_id() == 0) partials.of_warp[warp_id()] = x;
    __syncthreads();
    float most = partials.of_warp[0];
    for (uint32_t w = 1; w < THREADS / WARP; ++w) most = greater(most, partials.of_warp[w]);
    return most;
}
