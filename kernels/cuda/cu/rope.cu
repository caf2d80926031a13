// Rotary position embedding: angles, and the rotation with the norm and the clip before it.
//
// Memory-bound. Bytes per value of x: 4 read and 4 written from DRAM (further passes over a row hit L1), plus 4 of angles, shared by all
// heads of a row. FLOP per value: about 10. Floor = 8 bytes per value / bandwidth. Angles: 60 float64 operations per frequency, once a step.
#include "lib/device.cuh"
#include "lib/reduce.cuh"

namespace {

constexpr uint32_t THREADS = 256;
constexpr uint32_t WARPS = THREADS / WARP;

// Sine and cosine as kernels/src/cpu/rope.rs has them: the same float64 operations, so the same bits.
__device__ inline void sine_cosine(double angle, double& sine, double& cosine) {
    const double round = 6755399441055744.0;
    const double quadrant = (angle * 0.63661977236758134308 + round) - round;
    const double r = ((angle - quadrant * 1.5707963267341256) - quadrant * 6.077100506303966e-11) -
                     quadrant * 2.0222662487959506e-21;
    const double r2 = r * r;
    double sin = 1.0, cos = 1.0;
    for (int i = 9; i >= 1; --i) {
        const double even = 2.0 * i;
        sin = 1.0 - r2 / (even * (even + 1.0)) * sin;
        cos = 1.0 - r2 / ((even - 1.0) * even) * cos;
    }
    sin *= r;
    const uint32_t turn = static_cast<uint32_t>(static_cast<int64_t>(quadrant) & 3);
    sine = turn == 0 ? sin : turn == 1 ? cos : turn == 2 ? -sin : -cos;
    cosine = turn == 0 ? cos : turn == 1 ? -sin : turn == 2 ? -cos : sin;
}

// Keeps a NaN.
__device__ inline float clipped(float x, float clip) { return x > clip ? clip : x < -clip ? -clip : x; }

} // namespace

extern "C" __global__ void __launch_bounds__(128)
    fg_rope_angles(const uint32_t* positions, const float* inv_freq, float* cos, float* sin, uint32_t half) {
    const uint64_t start = static_cast<uint64_t>(blockIdx.x) * half;
    const float position = static_cast<float>(positions[blockIdx.x]);
    for (uint32_t i = threadIdx.x; i < half; i += 128) {
        double sine, cosine;
        sine_cosine(static_cast<double>(position * inv_freq[i]), sine, cosine);
        cos[start + i] = static_cast<float>(cosine);
        sin[start + i] = static_cast<float>(sine);
    }
}

extern "C" __global__ void __launch_bounds__(256)
    fg_rope(float* x, const float* norm_weight, uint32_t norm_width, float eps, float clip, const float* cos,
            const float* sin, uint32_t heads, uint32_t head_dim) {
    const uint32_t width = heads * head_dim, half = head_dim / 2;
    float* row = x + static_cast<uint64_t>(blockIdx.x) * width;
    cos += static_cast<uint64_t>(blockIdx.x) * half;
    sin += static_cast<uint64_t>(blockIdx.x) * half;
    if (norm_weight) {
        // A warp per part.
        const uint32_t parts = width / norm_width;
        for (uint32_t part = warp_id(); part < parts; part += WARPS) {
            float* values = row + part * norm_width;
            float squares = 0.0f;
            for (uint32_t i = lane_id(); i < norm_width; i += WARP) squares = fmaf(values[i], values[i], squares);
            const float root = sqrtf(warp_sum(squares) / static_cast<float>(norm_width) + eps);
            for (uint32_t i = lane_id(); i < norm_width; i += WARP) values[i] = norm_weight[i] * (values[i] / root);
        }
    }
    // The halves of a pair may have come from two warps.
    __syncthreads();
    for (uint32_t pair = threadIdx.x; pair < heads * half; pair += THREADS) {
        const uint32_t i = pair % half, at = pair / half * head_dim + i;
        float a = row[at], b = row[at + half];
        if (clip >= 0.0f) {
            a = clipped(a, clip);
            b = clipped(b, clip);
        }
        row[at] = fmaf(a, cos[i], -(b * sin[i]));
        row[at + half] = fmaf(b, cos[i], a * sin[i]);
    }
}

FAMILY(rope, ENTRY(fg_rope_angles, 128), ENTRY(fg_rope, 256))
