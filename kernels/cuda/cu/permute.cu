// From chosen experts to slots in the order of experts, and back to rows.
//
// Integers except for combine. Floors: offsets and tiles read a few KB: a launch's own time. permute reads the list of choices once per
// expert, 4 · choices · groups bytes out of L2. combine: 4 · top_k · width bytes read and 4 · width written per row, 2 · top_k · width FLOP;
// floor = rows · width · 4 · (top_k + 1) bytes / bandwidth.
#include "lib/device.cuh"
#include "lib/vector.cuh"

namespace {

constexpr uint32_t THREADS = 256;
constexpr uint32_t WARPS = THREADS / WARP;

struct ScanShared {
    uint32_t of_warp[WARPS];
};

// The sum of `x` over the threads before this one; `total` is that of all. May be called again at once.
__device__ inline uint32_t sum_before(uint32_t x, uint32_t& total, ScanShared& shared) {
    uint32_t sum = x;
    for (uint32_t step = 1; step < WARP; step *= 2) {
        const uint32_t other = __shfl_sync(ALL_LANES, sum, static_cast<int>((lane_id() - step) % WARP));
        if (lane_id() >= step) sum += other;
    }
    if (lane_id() == WARP - 1) shared.of_warp[warp_id()] = sum;
    __syncthreads();
    uint32_t before = 0;
    total = 0;
    for (uint32_t w = 0; w < WARPS; ++w) {
        if (w < warp_id()) before += shared.of_warp[w];
        total += shared.of_warp[w];
    }
    __syncthreads();
    return before + sum - x;
}

} // namespace

// Counts are integers: their sum has no order.
extern "C" __global__ void __launch_bounds__(256)
    fg_expert_counts(const uint32_t* experts, uint32_t choices, uint32_t* counts, uint32_t groups) {
    for (uint32_t choice = blockIdx.x * THREADS + threadIdx.x; choice < choices; choice += gridDim.x * THREADS) {
        const uint32_t expert = experts[choice];
        if (expert < groups) atomicAdd(&counts[expert], 1u);
    }
}

extern "C" __global__ void __launch_bounds__(256)
    fg_expert_offsets(const uint32_t* counts, uint32_t groups, uint32_t* offsets) {
    SHARED(ScanShared, shared);
    uint32_t start = 0;
    for (uint32_t first = 0; first < groups; first += THREADS) {
        const uint32_t group = first + threadIdx.x;
        uint32_t total;
        const uint32_t before = sum_before(group < groups ? counts[group] : 0, total, shared);
        if (group < groups) offsets[group] = start + before;
        start += total;
    }
    if (threadIdx.x == 0) offsets[groups] = start;
}

extern "C" __global__ void __launch_bounds__(256)
    fg_permute(const uint32_t* experts, uint32_t choices, uint32_t top_k, const uint32_t* offsets,
               uint32_t* row_of_slot, uint32_t* slot_of_choice) {
    SHARED(ScanShared, shared);
    const uint32_t group = blockIdx.x;
    uint32_t start = offsets[group];
    for (uint32_t first = 0; first < choices; first += THREADS) {
        const uint32_t choice = first + threadIdx.x;
        const bool mine = choice < choices && experts[choice] == group;
        uint32_t total;
        const uint32_t slot = start + sum_before(mine, total, shared);
        if (mine) {
            row_of_slot[slot] = choice / top_k;
            slot_of_choice[choice] = slot;
        }
        start += total;
    }
}

extern "C" __global__ void __launch_bounds__(256)
    fg_tiles(const uint32_t* offsets, uint32_t groups, uint32_t tile_rows, uint32_t* tile_group, uint32_t* tile_first,
             uint32_t* tile_count) {
    SHARED(ScanShared, shared);
    uint32_t start = 0;
    for (uint32_t first = 0; first < groups; first += THREADS) {
        const uint32_t group = first + threadIdx.x;
        const uint32_t slot = group < groups ? offsets[group] : 0;
        const uint32_t slots = group < groups ? offsets[group + 1] - slot : 0;
        const uint32_t tiles = (slots + tile_rows - 1) / tile_rows;
        uint32_t total;
        const uint32_t tile = start + sum_before(tiles, total, shared);
        for (uint32_t i = 0; i < tiles; ++i) {
            tile_group[tile + i] = group;
            tile_first[tile + i] = slot + i * tile_rows;
        }
        start += total;
    }
    if (threadIdx.x == 0) *tile_count = start;
}

extern "C" __global__ void __launch_bounds__(256)
    fg_combine(const float* parts, const uint32_t* slot_of_choice, const float* weights, uint32_t top_k,
               uint32_t width, float* out) {
    const uint64_t first = static_cast<uint64_t>(blockIdx.x) * top_k;
    float* row = out + static_cast<uint64_t>(blockIdx.x) * width;
    for (uint32_t i = threadIdx.x * 4; i < width; i += THREADS * 4) {
        Four sum{};
        for (uint32_t choice = 0; choice < top_k; ++choice) {
            const uint32_t slot = slot_of_choice[first + choice];
            if (slot == NONE) continue;
            const float weight = weights[first + choice];
            const Four part = load_four(parts + static_cast<uint64_t>(slot) * width + i, width - i);
#pragma unroll
            for (uint32_t j = 0; j < 4; ++j) sum.of[j] = fmaf(weight, part.of[j], sum.of[j]);
        }
        store_four(row + i, sum, width - i);
    }
}

FAMILY(permute, ENTRY(fg_expert_counts, 256), ENTRY(fg_expert_offsets, 256), ENTRY(fg_permute, 256), ENTRY(fg_tiles, 256),
       ENTRY(fg_combine, 256))
