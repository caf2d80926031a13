// CUDA's words, on a card and on the CPU, and every instruction that CUDA C++ has no word for. Each of those is one named
// function with a twin in plain C++; kernels contain no assembly.
#pragma once

#include <stdint.h>

#ifdef FOREGATE_EMULATE
#include "emulate.hpp"
#else
#include <float.h>
#include <math.h>
// The block's shared memory: one struct per kernel, at most 48 KB.
#define SHARED(Type, name) __shared__ Type name
// The list of a family's kernels, which the emulation needs.
#define FAMILY(name, ...)
#define ENTRY(kernel, threads)
#endif

constexpr uint32_t WARP = 32;
constexpr uint32_t ALL_LANES = 0xffffffffu;
constexpr uint32_t NONE = 0xffffffffu;

using bf16 = uint16_t;

__device__ inline uint32_t lane_id() { return threadIdx.x % WARP; }
__device__ inline uint32_t warp_id() { return threadIdx.x / WARP; }

__device__ inline float infinity() { return INFINITY; }

__device__ inline uint32_t bits_of(float x) {
#ifdef FOREGATE_EMULATE
    return emulate::bits<uint32_t>(x);
#else
    return __float_as_uint(x);
#endif
}

__device__ inline float float_of(uint32_t bits) {
#ifdef FOREGATE_EMULATE
    return emulate::bits<float>(bits);
#else
    return __uint_as_float(bits);
#endif
}

__device__ inline float widen(bf16 x) { return float_of(static_cast<uint32_t>(x) << 16); }

// An IEEE half.
struct Half {
    uint16_t bits;
};

// Exact, also below 2^-14: what is multiplied there is a float32 that is not normal, by 2^112.
__device__ inline float widen(Half x) {
    const uint32_t sign = (x.bits & 0x8000u) << 16, size = x.bits & 0x7fffu;
    if (size >= 0x7c00u) return float_of(sign | 0x7f800000u | (size & 0x3ffu) << 13);
    return float_of(sign | size << 13) * float_of(0x77800000u);
}

__device__ inline float widen(float x) { return x; }

// Two floats to bf16, nearest, ties to even; `low` goes to the lower half.
__device__ inline uint32_t round_pair(float low, float high) {
#ifdef FOREGATE_EMULATE
    return emulate::round_bf16(low) | static_cast<uint32_t>(emulate::round_bf16(high)) << 16;
#else
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#endif
}

__device__ inline bf16 round_bf16(float x) { return static_cast<bf16>(round_pair(x, 0.0f)); }

// === asynchronous copies from global to shared memory ===

// Starts to copy 16 bytes, both ends aligned to 16; with `filled` false the 16 bytes become zero and nothing is read.
__device__ inline void copy_async(void* to, const void* from, bool filled) {
#ifdef FOREGATE_EMULATE
    emulate::copy_async(to, from, filled);
#else
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    const uint32_t bytes = filled ? 16u : 0u;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
#endif
}

// Ends a group of this thread's copies.
__device__ inline void copy_commit() {
#ifdef FOREGATE_EMULATE
    emulate::copy_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most PENDING of this thread's groups are under way.
template <int PENDING> __device__ inline void copy_wait() {
#ifdef FOREGATE_EMULATE
    emulate::copy_wait(PENDING);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// === matrix fragments ===

// Four 8×8 matrices of bf16 out of shared memory: lane `8i + j` names row `j` of matrix `i` (16 bytes, aligned). Lane `l` gets
// elements `2(l % 4)` and one more of row `l / 4` of each.
__device__ inline void load_matrices(uint32_t (&out)[4], const void* row) {
#ifdef FOREGATE_EMULATE
    emulate::load_matrices(out, row, 4, false);
#else
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
#endif
}

// Two of them; lanes from 16 on name nothing.
__device__ inline void load_matrices(uint32_t (&out)[2], const void* row) {
#ifdef FOREGATE_EMULATE
    emulate::load_matrices(out, row, 2, false);
#else
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(address)
                 : "memory");
#endif
}

// Four matrices, each transposed: lane `l` gets rows `2(l % 4)` and one more of column `l / 4`.
__device__ inline void load_transposed(uint32_t (&out)[4], const void* row) {
#ifdef FOREGATE_EMULATE
    emulate::load_matrices(out, row, 4, true);
#else
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
#endif
}

// sum[16][8] += a[16][16] · b[16][8], bf16 operands, float32 sums (PTX ISA, mma.m16n8k16). With g = lane / 4, t = lane % 4:
// a: rows g, g + 8, g, g + 8 at columns 2t, 2t, 2t + 8, 2t + 8; b: column g, rows 2t and 2t + 8; sum: row g, columns 2t and
// 2t + 1, then row g + 8.
__device__ inline void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef FOREGATE_EMULATE
    emulate::multiply_add(sum, a, b0, b1);
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}
