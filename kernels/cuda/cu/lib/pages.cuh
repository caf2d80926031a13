// Where keys and values lie: [pages][layers][2][kv_heads][page_tokens][head_dim], keys before values.
#pragma once

#include "device.cuh"

struct Pages {
    const uint32_t* table; // of one sequence
    uint32_t layers, layer, page_tokens, kv_heads, head_dim;

    // First element of the key of a head at a position.
    __device__ uint64_t key(uint32_t head, uint32_t position) const {
        const uint64_t page = table[position / page_tokens];
        const uint64_t line = (page * layers + layer) * 2 * kv_heads + head;
        return (line * page_tokens + position % page_tokens) * head_dim;
    }

    // From a key to its value.
    __device__ uint64_t to_value() const { return static_cast<uint64_t>(kv_heads) * page_tokens * head_dim; }
};
