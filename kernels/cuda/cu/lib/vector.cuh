// Four float32 at a time: one access of 16 bytes where address and count allow it, else up to four of 4.
#pragma once

#include "device.cuh"

struct alignas(16) Four {
    float of[4];
};

__device__ inline bool on_16(const void* a) { return reinterpret_cast<uintptr_t>(a) % 16 == 0; }

// Values `from[0 .. 4)`, as far as there are `left`; beyond them zero.
__device__ inline Four load_four(const float* from, uint64_t left) {
    if (left >= 4 && on_16(from)) return *reinterpret_cast<const Four*>(from);
    Four four{};
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i)
        if (i < left) four.of[i] = from[i];
    return four;
}

__device__ inline void store_four(float* to, const Four& four, uint64_t left) {
    if (left >= 4 && on_16(to)) {
        *reinterpret_cast<Four*>(to) = four;
        return;
    }
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i)
        if (i < left) to[i] = four.of[i];
}

struct alignas(8) FourHalves {
    uint32_t pairs[2];
};

// Rounded to bf16.
__device__ inline void store_rounded(bf16* to, const Four& four, uint64_t left) {
    const FourHalves halves{{round_pair(four.of[0], four.of[1]), round_pair(four.of[2], four.of[3])}};
    if (left >= 4 && reinterpret_cast<uintptr_t>(to) % 8 == 0) {
        *reinterpret_cast<FourHalves*>(to) = halves;
        return;
    }
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i)
        if (i < left) to[i] = static_cast<bf16>(halves.pairs[i / 2] >> (i % 2 * 16));
}
