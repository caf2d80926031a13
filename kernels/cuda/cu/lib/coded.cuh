// Weights that are codes with scales, in the canonical bytes of kernels/src/dtype.rs: rows of codes, scales, zero points.
#pragma once

#include "device.cuh"
#include "gemm.cuh"

// Numbers that stand for the formats in a launch.
enum Format : uint32_t { INT8 = 1, INT4 = 2, FP8 = 3, MXFP4 = 4 };

// e4m3 to bf16, exact (OCP 8-bit Floating Point Specification 1.0).
__device__ inline bf16 e4m3_to_bf16(uint32_t code) {
    const uint32_t sign = (code & 0x80) << 8, exponent = code >> 3 & 15, mantissa = code & 7;
    if ((code & 0x7f) == 0x7f) return static_cast<bf16>(sign | 0x7fc0);
    if (exponent == 0) return static_cast<bf16>(sign | bits_of(static_cast<float>(mantissa) / 512.0f) >> 16);
    return static_cast<bf16>(sign | (exponent + 120) << 7 | mantissa << 4);
}

// e2m1 to bf16, exact (OCP Microscaling Formats Specification 1.0).
__device__ inline bf16 e2m1_to_bf16(uint32_t code) {
    const uint32_t sign = (code & 8) << 12, exponent = code >> 1 & 3, mantissa = code & 1;
    if (exponent == 0) return static_cast<bf16>(sign | (mantissa ? 0x3f00 : 0));
    return static_cast<bf16>(sign | (exponent + 126) << 7 | mantissa << 6);
}

// e8m0: 2^(code - 127); 255 is no number.
__device__ inline float e8m0(uint32_t code) {
    return float_of(code == 0 ? 1u << 22 : code == 255 ? 0x7fc00000u : code << 23);
}

// A whole number of few bits to bf16, exact.
__device__ inline bf16 whole_to_bf16(int32_t x) { return static_cast<bf16>(bits_of(static_cast<float>(x)) >> 16); }

// A float32 wherever it stands: codes of an odd number come before it.
__device__ inline float float_at(const uint8_t* from) {
    if (reinterpret_cast<uintptr_t>(from) % 4 == 0) return *reinterpret_cast<const float*>(from);
    return float_of(from[0] | from[1] << 8 | from[2] << 16 | static_cast<uint32_t>(from[3]) << 24);
}

// Sizes of a matrix in a format. block_k is a multiple of 16, or at least k.
struct Coding {
    uint32_t format, block_n, block_k, n, k;

    __device__ bool four_bits() const { return format == INT4 || format == MXFP4; }
    __device__ uint32_t row_bytes() const { return four_bits() ? (k + 1) / 2 : k; }
    __device__ uint32_t groups() const { return block_k >= k ? 1 : (k + block_k - 1) / block_k; }
    __device__ uint64_t scale_index(uint32_t output, uint32_t group) const {
        return static_cast<uint64_t>(output / block_n) * groups() + group;
    }
    __device__ uint64_t code_bytes() const { return static_cast<uint64_t>(n) * row_bytes(); }

    __device__ float scale(const uint8_t* matrix, uint32_t output, uint32_t group) const {
        const uint8_t* scales = matrix + code_bytes();
        const uint64_t at = scale_index(output, group);
        return format == MXFP4 ? e8m0(scales[at]) : float_at(scales + at * 4);
    }
    // Of INT4 only.
    __device__ int32_t zero(const uint8_t* matrix, uint32_t output, uint32_t group) const {
        const uint64_t scales = static_cast<uint64_t>(n) * groups() * 4;
        return matrix[code_bytes() + scales + scale_index(output, group)];
    }

    // The number of a code, exact; `zero` counts for INT4.
    __device__ bf16 number(uint32_t code, int32_t zero) const {
        if (format == INT8) return whole_to_bf16(static_cast<int8_t>(code));
        if (format == INT4) return whole_to_bf16(static_cast<int32_t>(code) - zero);
        return format == FP8 ? e4m3_to_bf16(code) : e2m1_to_bf16(code);
    }
};

// Bytes of a line of raw codes in shared memory: 64 of 8 bits, and 16 more so that lines begin in different banks.
constexpr uint32_t RAW_LINE = 80;

template <class Shape> struct CodedShared {
    alignas(128) uint8_t raw[Shape::STAGES][Shape::N * RAW_LINE];
    alignas(128) bf16 x[Shape::STAGES][Shape::M * Shape::DEPTH];
    // The codes of one stage as bf16.
    alignas(128) bf16 w[Shape::N * Shape::DEPTH];
};

// Where a line of a tile comes from; `matrix` is null where there is none.
struct CodedLine {
    const uint8_t* matrix;
    uint32_t output;
};

// Brings the codes of one step: runs of 16 bytes, or, where rows are not whole runs, byte by byte. What is not there is zero.
template <class Shape, class W>
__device__ inline void bring_codes(uint8_t* raw, W w_line, const Coding& coding, uint32_t step) {
    const uint32_t bytes = coding.four_bits() ? Shape::DEPTH / 2 : Shape::DEPTH, runs = bytes / 16;
    for (uint32_t i = threadIdx.x; i < Shape::N * runs; i += Shape::THREADS) {
        const uint32_t line = i / runs, run = i % runs, at = step * bytes + run * 16;
        const CodedLine from = w_line(line);
        const bool filled = from.matrix != nullptr && at < coding.row_bytes();
        const uint64_t row = static_cast<uint64_t>(from.output) * coding.row_bytes();
        uint8_t* to = raw + line * RAW_LINE + run * 16;
        if (coding.row_bytes() % 16 == 0) {
            copy_async(to, filled ? from.matrix + row + at : nullptr, filled);
        } else {
            for (uint32_t j = 0; j < 16; ++j)
                to[j] = filled && at + j < coding.row_bytes() ? from.matrix[row + at + j] : static_cast<uint8_t>(0);
        }
    }
}

// Makes bf16 of the codes of a step, 8 at a time. Runs that are not there become zero; beyond the end of a row stand codes of 0, which
// meet inputs of 0.
template <class Shape, class W>
__device__ inline void widen_codes(CodedShared<Shape>& shared, W w_line, const Coding& coding, uint32_t step) {
    const uint8_t* raw = shared.raw[step % Shape::STAGES];
    for (uint32_t i = threadIdx.x; i < Shape::N * Shape::RUNS; i += Shape::THREADS) {
        const uint32_t line = i / Shape::RUNS, run = i % Shape::RUNS, at = step * Shape::DEPTH + run * 8;
        const CodedLine from = w_line(line);
        const bool there = from.matrix != nullptr && at < coding.k;
        const uint8_t* codes = raw + line * RAW_LINE + (coding.four_bits() ? run * 4 : run * 8);
        int32_t zero = 0;
        if (there && coding.format == INT4) zero = coding.zero(from.matrix, from.output, at / coding.block_k);
        bf16 out[8];
#pragma unroll
        for (uint32_t j = 0; j < 8; ++j) {
            const uint32_t code = coding.four_bits() ? codes[j / 2] >> (j % 2 * 4) & 15u : codes[j];
            out[j] = there ? coding.number(code, zero) : static_cast<bf16>(0);
        }
        uint32_t* to = reinterpret_cast<uint32_t*>(&shared.w[run_place<Shape>(line, run)]);
#pragma unroll
        for (uint32_t j = 0; j < 4; ++j) to[j] = out[2 * j] | static_cast<uint32_t>(out[2 * j + 1]) << 16;
    }
}

// total = fma(chain, scale, total), and the next chain begins.
template <class Shape, class W>
__device__ inline void fold(GemmSums<Shape>& totals, GemmSums<Shape>& chain, W w_line, const Coding& coding,
                            uint32_t group) {
    const uint32_t first = warp_id() * 16 + lane_id() / 4;
    float scales[2];
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
        const CodedLine from = w_line(first + half * 8);
        scales[half] = from.matrix ? coding.scale(from.matrix, from.output, group) : 0.0f;
    }
#pragma unroll
    for (uint32_t m = 0; m < Shape::FRAGMENTS_M; ++m)
#pragma unroll
        for (uint32_t i = 0; i < 4; ++i)
            totals.of[0][m][i] = fmaf(chain.of[0][m][i], scales[i / 2], totals.of[0][m][i]);
    clear<Shape>(chain);
}

// As multiply_tile, with codes for weights: `w_line(i)` gives line `i` of the tile.
template <class Shape, class W, class X>
__device__ inline void multiply_coded(CodedShared<Shape>& shared, W w_line, X x_line, const Coding& coding,
                                      GemmSums<Shape>& totals) {
    static_assert(Shape::FRAGMENTS_N == 1 && Shape::WARPS_M == 1);
    const bf16* x[Shape::X_RUNS];
#pragma unroll
    for (uint32_t i = 0; i < Shape::X_RUNS; ++i) x[i] = x_line(threadIdx.x / Shape::RUNS + i * Shape::LINES);
    GemmSums<Shape> chain;
    clear<Shape>(chain);
    clear<Shape>(totals);
    const auto bring = [&](uint32_t step) {
        bring_codes<Shape>(shared.raw[step % Shape::STAGES], w_line, coding, step);
        bring_inputs<Shape>(shared.x[step % Shape::STAGES], x, step, coding.k);
    };
    const uint32_t steps = (coding.k + Shape::DEPTH - 1) / Shape::DEPTH;
    for (uint32_t step = 0; step < Shape::STAGES - 1; ++step) {
        if (step < steps) bring(step);
        copy_commit();
    }
    for (uint32_t step = 0; step < steps; ++step) {
        copy_wait<Shape::STAGES - 2>();
        // The codes of this step are here, and all are done with the step before.
        __syncthreads();
        if (step + Shape::STAGES - 1 < steps) bring(step + Shape::STAGES - 1);
        copy_commit();
        widen_codes<Shape>(shared, w_line, coding, step);
        __syncthreads();
        for (uint32_t part = 0; part < Shape::DEPTH / 16; ++part) {
            const uint32_t begin = step * Shape::DEPTH + part * 16, end = begin + 16;
            if (begin >= coding.k) break;
            multiply_part<Shape>(shared.w, shared.x[step % Shape::STAGES], part, chain);
            if (end >= coding.k || (coding.block_k < coding.k && end % coding.block_k == 0))
                fold<Shape>(totals, chain, w_line, coding, coding.block_k >= coding.k ? 0 : begin / coding.block_k);
        }
    }
    copy_wait<0>();
    __syncthreads();
}

// 64 outputs a block, as many stages as 48 KB hold.
using Coded8 = GemmShape<4, 1, 1, 1, 64, 5>;
using Coded16 = GemmShape<4, 1, 1, 2, 64, 5>;
using Coded32 = GemmShape<4, 1, 1, 4, 64, 4>;
using Coded64 = GemmShape<4, 1, 1, 8, 64, 3>;
