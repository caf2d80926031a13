// A tile of a product with weights: sum[n][m] = Σ_k w[n][k] · x[m][k], bf16 operands, float32 sums.
//
// Weights are the first operand of the tensor core (16 outputs at a time) and inputs the second (8 rows at a time), so that one row
// costs an eighth of its instructions, not a sixteenth. Both come by asynchronous copies through STAGES buffers. An output's k
// ascends in steps of 16 into one accumulator, whatever the tile, so tiles of all shapes give the same bits.
#pragma once

#include "device.cuh"

// WARPS_N × WARPS_M warps, each with FRAGMENTS_N × 16 outputs and FRAGMENTS_M × 8 rows; DEPTH values of k per stage.
template <uint32_t WARPS_N_, uint32_t WARPS_M_, uint32_t FRAGMENTS_N_, uint32_t FRAGMENTS_M_, uint32_t DEPTH_,
          uint32_t STAGES_>
struct GemmShape {
    static constexpr uint32_t WARPS_N = WARPS_N_, WARPS_M = WARPS_M_;
    static constexpr uint32_t FRAGMENTS_N = FRAGMENTS_N_, FRAGMENTS_M = FRAGMENTS_M_;
    static constexpr uint32_t DEPTH = DEPTH_, STAGES = STAGES_;
    static constexpr uint32_t THREADS = WARPS_N * WARPS_M * WARP;
    static constexpr uint32_t N = WARPS_N * FRAGMENTS_N * 16, M = WARPS_M * FRAGMENTS_M * 8;
    // Runs of 8 values, 16 bytes: of a line of a stage, and of both operands that each thread brings.
    static constexpr uint32_t RUNS = DEPTH / 8;
    static constexpr uint32_t LINES = THREADS / RUNS;
    static constexpr uint32_t W_RUNS = N / LINES, X_RUNS = (M + LINES - 1) / LINES;
    static_assert(RUNS == 4 || RUNS == 8);
    static_assert(N % LINES == 0);
};

template <class Shape> struct GemmShared {
    alignas(128) bf16 w[Shape::STAGES][Shape::N * Shape::DEPTH];
    alignas(128) bf16 x[Shape::STAGES][Shape::M * Shape::DEPTH];
};

// Where a run of a line lies. Runs change places by line, so that eight lines' runs of one column of the matrix lie in all banks.
template <class Shape> __device__ inline uint32_t run_place(uint32_t line, uint32_t run) {
    const uint32_t turned = Shape::RUNS == 8 ? run ^ (line % 8) : run ^ (line / 2 % 4);
    return line * Shape::DEPTH + turned * 8;
}

// Brings a run; `row` is null where there is no such line. Rows whose length is no multiple of 8 are copied value by value.
__device__ inline void bring_run(bf16* to, const bf16* row, uint32_t at, uint32_t k) {
    if (k % 8 == 0) {
        const bool filled = row != nullptr && at < k;
        copy_async(to, filled ? row + at : row, filled);
    } else {
        for (uint32_t i = 0; i < 8; ++i) to[i] = row != nullptr && at + i < k ? row[at + i] : static_cast<bf16>(0);
    }
}

// What a thread accumulates. [n][m][i]: output `fragment n, row g (i < 2) or g + 8`, row `fragment m, column 2t + i % 2`.
template <class Shape> struct GemmSums {
    float of[Shape::FRAGMENTS_N][Shape::FRAGMENTS_M][4];
};

// Brings step `step` of the inputs to a stage. `x` are this thread's lines.
template <class Shape>
__device__ inline void bring_inputs(bf16* stage, const bf16* const (&x)[Shape::X_RUNS], uint32_t step, uint32_t k) {
    const uint32_t line = threadIdx.x / Shape::RUNS, run = threadIdx.x % Shape::RUNS;
#pragma unroll
    for (uint32_t i = 0; i < Shape::X_RUNS; ++i) {
        const uint32_t to = line + i * Shape::LINES;
        if (Shape::M % Shape::LINES == 0 || to < Shape::M)
            bring_run(stage + run_place<Shape>(to, run), x[i], step * Shape::DEPTH + run * 8, k);
    }
}

// Brings step `step` of both operands.
template <class Shape>
__device__ inline void bring_stage(GemmShared<Shape>& shared, const bf16* const (&w)[Shape::W_RUNS],
                                   const bf16* const (&x)[Shape::X_RUNS], uint32_t step, uint32_t k) {
    const uint32_t line = threadIdx.x / Shape::RUNS, run = threadIdx.x % Shape::RUNS;
    const uint32_t stage = step % Shape::STAGES, at = step * Shape::DEPTH + run * 8;
#pragma unroll
    for (uint32_t i = 0; i < Shape::W_RUNS; ++i)
        bring_run(&shared.w[stage][run_place<Shape>(line + i * Shape::LINES, run)], w[i], at, k);
    bring_inputs<Shape>(shared.x[stage], x, step, k);
}

// Multiplies 16 values of k: those from `16 part` on of a stage of both operands.
template <class Shape>
__device__ inline void multiply_part(const bf16* w, const bf16* x, uint32_t part, GemmSums<Shape>& sums) {
    const uint32_t first_n = warp_id() % Shape::WARPS_N * Shape::FRAGMENTS_N * 16;
    const uint32_t first_m = warp_id() / Shape::WARPS_N * Shape::FRAGMENTS_M * 8;
    const uint32_t lane = lane_id();
    uint32_t a[Shape::FRAGMENTS_N][4];
#pragma unroll
    for (uint32_t n = 0; n < Shape::FRAGMENTS_N; ++n)
        load_matrices(a[n], w + run_place<Shape>(first_n + n * 16 + lane % 16, part * 2 + lane / 16));
    uint32_t b[Shape::FRAGMENTS_M][2];
    if constexpr (Shape::FRAGMENTS_M == 1) {
        load_matrices(b[0], x + run_place<Shape>(first_m + lane % 8, part * 2 + lane / 8 % 2));
    } else {
#pragma unroll
        for (uint32_t m = 0; m < Shape::FRAGMENTS_M; m += 2) {
            uint32_t two[4];
            load_matrices(two, x + run_place<Shape>(first_m + m * 8 + lane / 16 * 8 + lane % 8, part * 2 + lane / 8 % 2));
            b[m][0] = two[0];
            b[m][1] = two[1];
            b[m + 1][0] = two[2];
            b[m + 1][1] = two[3];
        }
    }
#pragma unroll
    for (uint32_t n = 0; n < Shape::FRAGMENTS_N; ++n)
#pragma unroll
        for (uint32_t m = 0; m < Shape::FRAGMENTS_M; ++m) multiply_add(sums.of[n][m], a[n], b[m][0], b[m][1]);
}

template <class Shape> __device__ inline void clear(GemmSums<Shape>& sums) {
#pragma unroll
    for (uint32_t n = 0; n < Shape::FRAGMENTS_N; ++n)
#pragma unroll
        for (uint32_t m = 0; m < Shape::FRAGMENTS_M; ++m)
#pragma unroll
            for (uint32_t i = 0; i < 4; ++i) sums.of[n][m][i] = 0.0f;
}

// The whole product of a tile. `w_line(i)` and `x_line(i)` give line `i` of an operand, or null. Shared memory is free again when it
// returns.
template <class Shape, class W, class X>
__device__ inline void multiply_tile(GemmShared<Shape>& shared, W w_line, X x_line, uint32_t k,
                                     GemmSums<Shape>& sums) {
    const uint32_t line = threadIdx.x / Shape::RUNS;
    const bf16* w[Shape::W_RUNS];
    const bf16* x[Shape::X_RUNS];
#pragma unroll
    for (uint32_t i = 0; i < Shape::W_RUNS; ++i) w[i] = w_line(line + i * Shape::LINES);
#pragma unroll
    for (uint32_t i = 0; i < Shape::X_RUNS; ++i) x[i] = x_line(line + i * Shape::LINES);
    clear<Shape>(sums);
    const uint32_t steps = (k + Shape::DEPTH - 1) / Shape::DEPTH;
    for (uint32_t step = 0; step < Shape::STAGES - 1; ++step) {
        if (step < steps) bring_stage<Shape>(shared, w, x, step, k);
        copy_commit();
    }
    for (uint32_t step = 0; step < steps; ++step) {
        copy_wait<Shape::STAGES - 2>();
        // All threads' copies of this step are here, and all are done with the stage that is filled next.
        __syncthreads();
        if (step + Shape::STAGES - 1 < steps) bring_stage<Shape>(shared, w, x, step + Shape::STAGES - 1, k);
        copy_commit();
        const uint32_t stage = step % Shape::STAGES;
#pragma unroll
        for (uint32_t part = 0; part < Shape::DEPTH / 16; ++part)
            multiply_part<Shape>(shared.w[stage], shared.x[stage], part, sums);
    }
    copy_wait<0>();
    __syncthreads();
}

// Hands out this thread's sums with their places in the tile: `each(n, m, sum)`.
template <class Shape, class F> __device__ inline void for_each_sum(const GemmSums<Shape>& sums, F each) {
    const uint32_t group = lane_id() / 4, pair = lane_id() % 4 * 2;
    const uint32_t first_n = warp_id() % Shape::WARPS_N * Shape::FRAGMENTS_N * 16;
    const uint32_t first_m = warp_id() / Shape::WARPS_N * Shape::FRAGMENTS_M * 8;
#pragma unroll
    for (uint32_t n = 0; n < Shape::FRAGMENTS_N; ++n)
#pragma unroll
        for (uint32_t m = 0; m < Shape::FRAGMENTS_M; ++m)
#pragma unroll
            for (uint32_t i = 0; i < 4; ++i)
                each(first_n + n * 16 + group + i / 2 * 8, first_m + m * 8 + pair + i % 2, sums.of[n][m][i]);
}

// The same for a tile whose lines are 8 of one matrix and 8 of another by turns: `each(n, m, first, second)`, where `n` counts the
// outputs of one of them.
template <class Shape, class F> __device__ inline void for_each_two(const GemmSums<Shape>& sums, F each) {
    const uint32_t group = lane_id() / 4, pair = lane_id() % 4 * 2;
    const uint32_t first_n = warp_id() % Shape::WARPS_N * Shape::FRAGMENTS_N * 8;
    const uint32_t first_m = warp_id() / Shape::WARPS_N * Shape::FRAGMENTS_M * 8;
#pragma unroll
    for (uint32_t n = 0; n < Shape::FRAGMENTS_N; ++n)
#pragma unroll
        for (uint32_t m = 0; m < Shape::FRAGMENTS_M; ++m)
#pragma unroll
            for (uint32_t i = 0; i < 2; ++i)
                each(first_n + n * 8 + group, first_m + m * 8 + pair + i, sums.of[n][m][i], sums.of[n][m][i + 2]);
}

// Few rows: weights are streamed once, 64 outputs a block. Stages as many as 48 KB hold.
using Rows8 = GemmShape<4, 1, 1, 1, 64, 5>;
using Rows16 = GemmShape<4, 1, 1, 2, 64, 4>;
using Rows32 = GemmShape<4, 1, 1, 4, 64, 4>;
using Rows64 = GemmShape<4, 1, 1, 8, 64, 3>;
// Many rows: 128 × 128, each warp 32 × 64.
using Rows128 = GemmShape<4, 2, 2, 8, 32, 3>;
