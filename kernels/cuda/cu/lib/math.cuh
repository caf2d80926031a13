// The exponential and what is made of it, by the operations of kernels/src/cpu/exp.rs; the same bits.
#pragma once

#include "device.cuh"

// exp(x) = 2^n · exp(r), n the integer nearest to x / ln 2, r = x - n ln 2 in two parts (Cody and Waite 1980), Taylor of
// degree 7. Exactly 0 for minus infinity, 1 for 0, NaN for NaN.
__device__ inline float exponential(float x) {
    const float round = 12582912.0f;
    x = -104.0f > x ? -104.0f : x;
    x = 89.0f < x ? 89.0f : x;
    const float t = fmaf(x, 1.44269504f, round);
    const float n = t - round;
    const float r = fmaf(n, 1.9046543e-9f, fmaf(n, -0.693147182f, x));
    float p = 1.0f / 5040.0f;
    p = fmaf(p, r, 1.0f / 720.0f);
    p = fmaf(p, r, 1.0f / 120.0f);
    p = fmaf(p, r, 1.0f / 24.0f);
    p = fmaf(p, r, 1.0f / 6.0f);
    p = fmaf(p, r, 0.5f);
    p = fmaf(p, r * r, r) + 1.0f;
    // 2^n in two factors, since 2^128 is no float32. The lowest bits of t are n.
    const int32_t whole = static_cast<int32_t>(bits_of(t)) - static_cast<int32_t>(bits_of(round));
    const int32_t first = whole >> 1;
    const float a = float_of(static_cast<uint32_t>(first + 127) << 23);
    const float b = float_of(static_cast<uint32_t>(whole - first + 127) << 23);
    return p * a * b;
}

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(0.0f - x)); }

__device__ inline float silu(float x) { return x / (1.0f + exponential(0.0f - x)); }

// The greater; a NaN loses.
__device__ inline float greater(float a, float b) { return b > a ? b : a; }
