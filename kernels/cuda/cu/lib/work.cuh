// What a grid over experts takes by turns: (tile of slots, tile of outputs), outputs fastest.
#pragma once

#include "device.cuh"

// The lists of the permutation.
struct Work {
    const uint32_t* offsets;
    const uint32_t* tile_group;
    const uint32_t* tile_first;
    const uint32_t* tile_count;
};

// A tile's slots and its expert.
struct Piece {
    uint32_t group, first, end, output;
};

template <class Shape> __device__ inline Piece piece_of(const Work& work, uint32_t index, uint32_t tiles_n) {
    const uint32_t tile = index / tiles_n, group = work.tile_group[tile], first = work.tile_first[tile];
    const uint32_t last = work.offsets[group + 1];
    return {group, first, last - first < Shape::M ? last : first + Shape::M, index % tiles_n};
}
