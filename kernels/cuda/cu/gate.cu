// Choice of experts: softmax over all, the most probable, their weights, and how often each expert was chosen.
//
// One warp per row. Bytes per row: 4 · experts read, 8 · top_k written. FLOP per row: about 25 · experts for the exponentials, and
// top_k passes over experts / 32 values per lane. Floor = rows · (4 · experts + 8 · top_k) bytes / bandwidth, below a launch's own time in decode.
#include "lib/device.cuh"
#include "lib/reduce.cuh"

namespace {

constexpr uint32_t ROWS = 4;
constexpr uint32_t MOST = 1024;

struct GateShared {
    float probability[ROWS][MOST];
    float weight[ROWS][MOST];
};

struct Candidate {
    float probability;
    uint32_t expert;

    // The greater probability, of equals the lower id. In a row of NaN, which has nothing else, only ids decide.
    __device__ bool behind(const Candidate& other) const {
        return other.probability > probability || (!(probability > other.probability) && other.expert < expert);
    }
};

} // namespace

extern "C" __global__ void __launch_bounds__(128)
    fg_gate(const float* logits, uint32_t rows, uint32_t experts, uint32_t top_k, uint32_t normalise,
            uint32_t* experts_out, float* weights_out, uint32_t* counts) {
    SHARED(GateShared, shared);
    const uint32_t lane = lane_id(), row = blockIdx.x * ROWS + warp_id();
    if (row >= rows) return; // a whole warp; no barrier of the block follows
    const float* x = logits + static_cast<uint64_t>(row) * experts;
    float* probability = shared.probability[warp_id()];
    float* weight = shared.weight[warp_id()];

    // Each lane keeps the experts that are its number mod 32.
    float most = -infinity();
    for (uint32_t e = lane; e < experts; e += WARP) most = greater(most, x[e]);
    most = warp_max(most);
    float sum = 0.0f;
    for (uint32_t e = lane; e < experts; e += WARP) {
        const float value = exponential(x[e] - most);
        probability[e] = value;
        sum += value;
    }
    sum = warp_sum(sum);
    for (uint32_t e = lane; e < experts; e += WARP) probability[e] /= sum;

    // Bit i: expert 32 i + lane is taken.
    uint32_t taken = 0;
    for (uint32_t choice = 0; choice < top_k; ++choice) {
        Candidate best{-infinity(), NONE};
        for (uint32_t e = lane; e < experts; e += WARP) {
            const Candidate mine{probability[e], e};
            if (!(taken >> (e / WARP) & 1) && best.behind(mine)) best = mine;
        }
        for (int step = WARP / 2; step > 0; step /= 2) {
            const Candidate other{__shfl_xor_sync(ALL_LANES, best.probability, step),
                                  __shfl_xor_sync(ALL_LANES, best.expert, step)};
            if (best.behind(other)) best = other;
        }
        if (best.expert % WARP == lane) taken |= 1u << (best.expert / WARP);
    }

    // Ascending by id: by i, then by lane.
    const uint64_t out = static_cast<uint64_t>(row) * top_k;
    uint32_t before = 0;
    for (uint32_t i = 0; i * WARP < experts; ++i) {
        const bool mine = taken >> i & 1;
        const uint32_t votes = __ballot_sync(ALL_LANES, mine);
        if (mine) {
            const uint32_t slot = before + static_cast<uint32_t>(__popc(votes & ((1u << lane) - 1)));
            const uint32_t expert = i * WARP + lane;
            experts_out[out + slot] = expert;
            weight[slot] = probability[expert];
            // A sum of integers has no order.
            if (counts) atomicAdd(&counts[expert], 1u);
        }
        before += static_cast<uint32_t>(__popc(votes));
    }
    __syncwarp();
    float total = 1.0f;
    if (normalise) {
        total = 0.0f;
        for (uint32_t slot = 0; slot < top_k; ++slot) total += weight[slot];
    }
    for (uint32_t slot = lane; slot < top_k; slot += WARP) weights_out[out + slot] = weight[slot] / total;
}

FAMILY(gate, ENTRY(fg_gate, 128))
