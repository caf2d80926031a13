// Keys and values of a step's rows into the paged cache.
//
// Memory-bound. Bytes per value: 4 read, 2 (bf16) or 4 (f32) written. Floor = rows · kv_heads · head_dim · 2 · 6 bytes / bandwidth.
#include "lib/device.cuh"
#include "lib/pages.cuh"

namespace {

constexpr uint32_t THREADS = 256;

__device__ inline void store(bf16* to, float x) { *to = round_bf16(x); }
__device__ inline void store(float* to, float x) { *to = x; }

template <class T>
__device__ inline void write(const float* k, const float* v, const uint32_t* positions,
                             const uint32_t* sequence_of_row, const uint32_t* tables, uint32_t table_stride, T* cache,
                             uint32_t layers, uint32_t layer, uint32_t page_tokens, uint32_t kv_heads,
                             uint32_t head_dim) {
    const uint32_t row = blockIdx.x, position = positions[row], width = kv_heads * head_dim;
    const uint64_t sequence = sequence_of_row[row], from = static_cast<uint64_t>(row) * width;
    const Pages pages{tables + sequence * table_stride, layers, layer, page_tokens, kv_heads, head_dim};
    for (uint32_t i = threadIdx.x; i < width; i += THREADS) {
        T* key = cache + pages.key(i / head_dim, position) + i % head_dim;
        store(key, k[from + i]);
        store(key + pages.to_value(), v[from + i]);
    }
}

} // namespace

extern "C" __global__ void __launch_bounds__(256)
    fg_kv_write_bf16(const float* k, const float* v, const uint32_t* positions, const uint32_t* sequence_of_row,
                     const uint32_t* tables, uint32_t table_stride, bf16* cache, uint32_t layers, uint32_t layer,
                     uint32_t page_tokens, uint32_t kv_heads, uint32_t head_dim) {
    write(k, v, positions, sequence_of_row, tables, table_stride, cache, layers, layer, page_tokens, kv_heads, head_dim);
}

extern "C" __global__ void __launch_bounds__(256)
    fg_kv_write_f32(const float* k, const float* v, const uint32_t* positions, const uint32_t* sequence_of_row,
                    const uint32_t* tables, uint32_t table_stride, float* cache, uint32_t layers, uint32_t layer,
                    uint32_t page_tokens, uint32_t kv_heads, uint32_t head_dim) {
    write(k, v, positions, sequence_of_row, tables, table_stride, cache, layers, layer, page_tokens, kv_heads, head_dim);
}

FAMILY(kv, ENTRY(fg_kv_write_bf16, 256), ENTRY(fg_kv_write_f32, 256))
