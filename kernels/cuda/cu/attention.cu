// Causal attention over a paged cache, for prefill and decode, by splits of 512 keys.
//
// A block has one tile of rows of one sequence, one head of the cache and one split; the tile's queries are the rows times the query
// heads that share the head. Every query goes through the same blocks of 32 keys in the same order, whatever else is in its tile, so
// prefill and decode give the same bits. Splits are counted from position 0 and merged in ascending order.
//
// Decode reads keys and values once: floor = 2 · 2 · kv_heads · head_dim · context bytes per sequence and layer / bandwidth; FLOP: 4 · heads ·
// head_dim · context, or 16 rows of a fragment for less than 16 queries of a tile. Prefill: 4 · heads · head_dim · Σ context FLOP / (FLOP per second of
// mma.sync), keys read once per tile and 64 queries.
#include "lib/device.cuh"
#include "lib/pages.cuh"
#include "lib/reduce.cuh"

namespace {

constexpr uint32_t BLOCK = 32;  // keys of a step
constexpr uint32_t SPLIT = 512; // keys of a split

struct Problem {
    const float* q;
    const uint32_t* positions;
    const uint32_t* sequence_of_row;
    const uint32_t* tables;
    uint32_t table_stride;
    const uint32_t* tile_first;
    const uint32_t* tile_rows;
    uint32_t layers, layer, page_tokens, heads, kv_heads, head_dim;
    float scale;
    uint32_t splits;
    float* part_out;
    float* part_max;
    float* part_sum;
    float* out;
};

// A tile, its head and its split.
struct Tile {
    uint32_t first_row, queries, group, head, first_key, end_key, last_position;

    __device__ uint32_t row(uint32_t query) const { return first_row + query / group; }
    __device__ uint32_t query_head(uint32_t query) const { return head * group + query % group; }
};

__device__ inline Tile tile_of(const Problem& p) {
    const uint32_t first = p.tile_first[blockIdx.x], rows = p.tile_rows[blockIdx.x], group = p.heads / p.kv_heads;
    const uint32_t last = p.positions[first + rows - 1], from = blockIdx.z * SPLIT;
    return {first, rows * group, group, blockIdx.y, from, last + 1 - from < SPLIT ? last + 1 : from + SPLIT, last};
}

__device__ inline Pages pages_of(const Problem& p, const Tile& tile) {
    const uint64_t sequence = p.sequence_of_row[tile.first_row];
    return {p.tables + sequence * p.table_stride, p.layers, p.layer, p.page_tokens, p.kv_heads, p.head_dim};
}

// Where a query's numbers of one split go.
__device__ inline uint64_t part_of(const Problem& p, const Tile& tile, uint32_t query) {
    return (static_cast<uint64_t>(tile.row(query)) * p.heads + tile.query_head(query)) * p.splits + blockIdx.z;
}

__device__ inline uint64_t query_start(const Problem& p, const Tile& tile, uint32_t query) {
    return (static_cast<uint64_t>(tile.row(query)) * p.heads + tile.query_head(query)) * p.head_dim;
}

// What a maximum stands for in exponents: a query that has seen nothing has none.
__device__ inline float base_of(float most) { return most == -infinity() ? 0.0f : most; }

// === bfloat16, by tensor cores ===

// Heads up to DIM, WARPS warps of 16 queries, STAGES blocks of keys and values in shared memory.
template <uint32_t DIM, uint32_t WARPS, uint32_t STAGES> struct AttentionShared {
    alignas(128) bf16 q[WARPS * 16 * DIM];
    alignas(128) bf16 k[STAGES][BLOCK * DIM];
    alignas(128) bf16 v[STAGES][BLOCK * DIM];
};

// Where run `run` (8 values) of a line lies: eight lines' runs of one column are in all banks.
template <uint32_t DIM> __device__ inline uint32_t run_at(uint32_t line, uint32_t run) {
    return line * DIM + (run ^ (line % 8)) * 8;
}

// Brings one run of a key or value; what is not there is zero.
__device__ inline void bring(bf16* to, const bf16* from, bool there, uint32_t dim, uint32_t head_dim) {
    if (head_dim % 8 == 0) {
        copy_async(to, from, there && dim < head_dim);
    } else {
        for (uint32_t i = 0; i < 8; ++i) to[i] = there && dim + i < head_dim ? from[i] : static_cast<bf16>(0);
    }
}

template <uint32_t DIM, uint32_t WARPS, uint32_t STAGES>
__device__ inline void bring_block(AttentionShared<DIM, WARPS, STAGES>& shared, uint32_t stage, const bf16* cache,
                                   const Pages& pages, const Tile& tile, uint32_t first_key) {
    constexpr uint32_t RUNS = DIM / 8, THREADS = WARPS * WARP;
    for (uint32_t i = threadIdx.x; i < BLOCK * RUNS; i += THREADS) {
        const uint32_t line = i / RUNS, run = i % RUNS, position = first_key + line;
        const bool there = position < tile.end_key;
        // What is not there is not looked up either: its page may not exist.
        const bf16* key = cache + (there ? pages.key(tile.head, position) : 0) + (run * 8 < pages.head_dim ? run * 8 : 0);
        bring(&shared.k[stage][run_at<DIM>(line, run)], key, there, run * 8, pages.head_dim);
        bring(&shared.v[stage][run_at<DIM>(line, run)], key + pages.to_value(), there, run * 8, pages.head_dim);
    }
}

template <uint32_t DIM, uint32_t WARPS, uint32_t STAGES>
__device__ inline void bring_queries(AttentionShared<DIM, WARPS, STAGES>& shared, const Problem& p, const Tile& tile) {
    for (uint32_t i = threadIdx.x; i < WARPS * 16 * DIM / 2; i += WARPS * WARP) {
        const uint32_t query = i / (DIM / 2), dim = i % (DIM / 2) * 2;
        float low = 0.0f, high = 0.0f;
        if (query < tile.queries) {
            const float* from = p.q + query_start(p, tile, query);
            if (dim < p.head_dim) low = from[dim];
            if (dim + 1 < p.head_dim) high = from[dim + 1];
        }
        const uint32_t pair = round_pair(low, high);
        bf16* to = &shared.q[run_at<DIM>(query, dim / 8) + dim % 8];
        to[0] = static_cast<bf16>(pair);
        to[1] = static_cast<bf16>(pair >> 16);
    }
}

// What a lane keeps of its queries `g` and `g + 8`.
template <uint32_t DIM> struct Running {
    float most[2], sum[2];
    float out[DIM / 8][4];
};

// scores[n][i]: of query g (i < 2) or g + 8, and key 8 n + 2 t + i % 2.
template <uint32_t DIM>
__device__ inline void score(float (&scores)[BLOCK / 8][4], const bf16* q, const bf16* k) {
    const uint32_t lane = lane_id();
#pragma unroll
    for (uint32_t n = 0; n < BLOCK / 8; ++n)
#pragma unroll
        for (uint32_t i = 0; i < 4; ++i) scores[n][i] = 0.0f;
#pragma unroll
    for (uint32_t part = 0; part < DIM / 16; ++part) {
        uint32_t a[4];
        load_matrices(a, q + run_at<DIM>(warp_id() * 16 + lane % 16, part * 2 + lane / 16));
#pragma unroll
        for (uint32_t n = 0; n < BLOCK / 8; n += 2) {
            uint32_t b[4];
            load_matrices(b, k + run_at<DIM>(n * 8 + lane / 16 * 8 + lane % 8, part * 2 + lane / 8 % 2));
            multiply_add(scores[n], a, b[0], b[1]);
            multiply_add(scores[n + 1], a, b[2], b[3]);
        }
    }
}

// Online softmax: scores become numerators, and what was summed so far is brought to the new maximum.
template <uint32_t DIM>
__device__ inline void soften(float (&scores)[BLOCK / 8][4], Running<DIM>& running, const uint32_t (&position)[2],
                              uint32_t first_key, float scale) {
    const uint32_t pair = lane_id() % 4 * 2;
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
        float most = running.most[half];
#pragma unroll
        for (uint32_t n = 0; n < BLOCK / 8; ++n)
#pragma unroll
            for (uint32_t i = 0; i < 2; ++i) {
                float& s = scores[n][half * 2 + i];
                // Position + 1: 0 sees nothing.
                s = first_key + n * 8 + pair + i < position[half] ? s * scale : -infinity();
                most = greater(most, s);
            }
        most = greater(most, __shfl_xor_sync(ALL_LANES, most, 1));
        most = greater(most, __shfl_xor_sync(ALL_LANES, most, 2));
        const float base = base_of(most), shrink = exponential(running.most[half] - base);
        float sum = 0.0f;
#pragma unroll
        for (uint32_t n = 0; n < BLOCK / 8; ++n)
#pragma unroll
            for (uint32_t i = 0; i < 2; ++i) {
                float& s = scores[n][half * 2 + i];
                s = exponential(s - base);
                sum += s;
            }
        sum += __shfl_xor_sync(ALL_LANES, sum, 1);
        sum += __shfl_xor_sync(ALL_LANES, sum, 2);
        running.sum[half] = fmaf(running.sum[half], shrink, sum);
        running.most[half] = most;
#pragma unroll
        for (uint32_t n = 0; n < DIM / 8; ++n) {
            running.out[n][half * 2] *= shrink;
            running.out[n][half * 2 + 1] *= shrink;
        }
    }
}

// out += numerators · values.
template <uint32_t DIM>
__device__ inline void weigh(const float (&scores)[BLOCK / 8][4], Running<DIM>& running, const bf16* v) {
    const uint32_t lane = lane_id();
#pragma unroll
    for (uint32_t part = 0; part < BLOCK / 16; ++part) {
        const float(&low)[4] = scores[part * 2];
        const float(&high)[4] = scores[part * 2 + 1];
        const uint32_t a[4] = {round_pair(low[0], low[1]), round_pair(low[2], low[3]), round_pair(high[0], high[1]),
                               round_pair(high[2], high[3])};
#pragma unroll
        for (uint32_t n = 0; n < DIM / 8; n += 2) {
            uint32_t b[4];
            load_transposed(b, v + run_at<DIM>(part * 16 + lane % 16, n + lane / 16));
            multiply_add(running.out[n], a, b[0], b[1]);
            multiply_add(running.out[n + 1], a, b[2], b[3]);
        }
    }
}

template <uint32_t DIM>
__device__ inline void write_queries(const Problem& p, const Tile& tile, const Running<DIM>& running) {
    const uint32_t pair = lane_id() % 4 * 2;
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
        const uint32_t query = warp_id() * 16 + lane_id() / 4 + half * 8;
        if (query >= tile.queries) continue;
        const bool whole = p.splits == 1;
        const uint64_t part = part_of(p, tile, query);
        float* to = whole ? p.out + query_start(p, tile, query) : p.part_out + part * p.head_dim;
        if (!whole && pair == 0) {
            p.part_max[part] = running.most[half];
            p.part_sum[part] = running.sum[half];
        }
#pragma unroll
        for (uint32_t n = 0; n < DIM / 8; ++n)
#pragma unroll
            for (uint32_t i = 0; i < 2; ++i) {
                const uint32_t dim = n * 8 + pair + i;
                const float value = running.out[n][half * 2 + i];
                if (dim < p.head_dim) to[dim] = whole ? value / running.sum[half] : value;
            }
    }
}

template <uint32_t DIM, uint32_t WARPS, uint32_t STAGES>
__device__ inline void attend(const Problem& p, const bf16* cache) {
    using Shared = AttentionShared<DIM, WARPS, STAGES>;
    SHARED(Shared, shared);
    const Tile tile = tile_of(p);
    if (tile.first_key > tile.last_position) return; // the whole block: the tile is in earlier splits
    const Pages pages = pages_of(p, tile);
    bring_queries(shared, p, tile);

    Running<DIM> running;
    uint32_t position[2];
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
        const uint32_t query = warp_id() * 16 + lane_id() / 4 + half * 8;
        position[half] = query < tile.queries ? p.positions[tile.row(query)] + 1 : 0;
        running.most[half] = -infinity();
        running.sum[half] = 0.0f;
    }
#pragma unroll
    for (uint32_t n = 0; n < DIM / 8; ++n)
#pragma unroll
        for (uint32_t i = 0; i < 4; ++i) running.out[n][i] = 0.0f;

    const bool busy = warp_id() * 16 < tile.queries; // a whole warp
    const uint32_t blocks = (tile.end_key - tile.first_key + BLOCK - 1) / BLOCK;
    for (uint32_t ahead = 0; ahead + 1 < STAGES; ++ahead) {
        if (ahead < blocks) bring_block(shared, ahead, cache, pages, tile, tile.first_key + ahead * BLOCK);
        copy_commit();
    }
    for (uint32_t block = 0; block < blocks; ++block) {
        const uint32_t next = block + STAGES - 1, stage = block % STAGES;
        // All are done with the stage that is filled next (and, the first time, queries are there).
        __syncthreads();
        if (next < blocks) bring_block(shared, next % STAGES, cache, pages, tile, tile.first_key + next * BLOCK);
        copy_commit();
        copy_wait<STAGES - 1>();
        __syncthreads();
        if (!busy) continue;
        const uint32_t first_key = tile.first_key + block * BLOCK;
        float scores[BLOCK / 8][4];
        score<DIM>(scores, shared.q, shared.k[stage]);
        soften<DIM>(scores, running, position, first_key, p.scale);
        weigh<DIM>(scores, running, shared.v[stage]);
    }
    copy_wait<0>();
    write_queries<DIM>(p, tile, running);
}

// === float32, without tensor cores: a warp per query, a lane per key, then a lane per dimension ===

constexpr uint32_t PLAIN_WARPS = 4;
constexpr uint32_t PLAIN_DIMS = 256 / WARP;

__device__ inline void attend_plain(const Problem& p, const float* cache) {
    const Tile tile = tile_of(p);
    if (tile.first_key > tile.last_position) return;
    const Pages pages = pages_of(p, tile);
    const uint32_t lane = lane_id();
    for (uint32_t query = warp_id(); query < tile.queries; query += PLAIN_WARPS) {
        const float* q = p.q + query_start(p, tile, query);
        const uint32_t seen = p.positions[tile.row(query)] + 1;
        const uint32_t end = seen < tile.end_key ? seen : tile.end_key;
        float most = -infinity(), sum = 0.0f, out[PLAIN_DIMS] = {};
        for (uint32_t first = tile.first_key; first < end; first += BLOCK) {
            float mine = -infinity();
            uint64_t key = 0;
            if (first + lane < end) {
                key = pages.key(tile.head, first + lane);
                float dot = 0.0f;
#pragma unroll 1 // more would spill
                for (uint32_t d = 0; d < p.head_dim; ++d) dot = fmaf(q[d], cache[key + d], dot);
                mine = dot * p.scale;
            }
            const float now = greater(most, warp_max(mine)), base = base_of(now);
            const float shrink = exponential(most - base), numerator = exponential(mine - base);
            sum = fmaf(sum, shrink, warp_sum(numerator));
            most = now;
#pragma unroll
            for (uint32_t i = 0; i < PLAIN_DIMS; ++i) out[i] *= shrink;
            const uint32_t keys = end - first < BLOCK ? end - first : BLOCK;
#pragma unroll 1
            for (uint32_t j = 0; j < keys; ++j) {
                const float weight = __shfl_sync(ALL_LANES, numerator, static_cast<int>(j));
                const uint64_t value = __shfl_sync(ALL_LANES, key, static_cast<int>(j)) + pages.to_value();
#pragma unroll
                for (uint32_t i = 0; i < PLAIN_DIMS; ++i) {
                    const uint32_t d = i * WARP + lane;
                    if (d < p.head_dim) out[i] = fmaf(weight, cache[value + d], out[i]);
                }
            }
        }
        const bool whole = p.splits == 1;
        const uint64_t part = part_of(p, tile, query);
        float* to = whole ? p.out + query_start(p, tile, query) : p.part_out + part * p.head_dim;
        if (!whole && lane == 0) {
            p.part_max[part] = most;
            p.part_sum[part] = sum;
        }
        const float divisor = whole ? sum : 1.0f;
#pragma unroll
        for (uint32_t i = 0; i < PLAIN_DIMS; ++i) {
            const uint32_t d = i * WARP + lane;
            if (d < p.head_dim) to[d] = out[i] / divisor;
        }
    }
}

} // namespace

#define ATTENTION_PARAMETERS(T)                                                                                        \
    const float *q, const T *cache, const uint32_t *positions, const uint32_t *sequence_of_row,                        \
        const uint32_t *tables, uint32_t table_stride, const uint32_t *tile_first, const uint32_t *tile_rows,          \
        uint32_t layers, uint32_t layer, uint32_t page_tokens, uint32_t heads, uint32_t kv_heads, uint32_t head_dim,   \
        float scale, uint32_t splits, float *part_out, float *part_max, float *part_sum, float *out

#define ATTENTION_PROBLEM                                                                                              \
    Problem {                                                                                                          \
        q, positions, sequence_of_row, tables, table_stride, tile_first, tile_rows, layers, layer, page_tokens, heads, \
            kv_heads, head_dim, scale, splits, part_out, part_max, part_sum, out                                       \
    }

extern "C" __global__ void __launch_bounds__(128) fg_attention_bf16_d64(ATTENTION_PARAMETERS(bf16)) {
    attend<64, 4, 4>(ATTENTION_PROBLEM, cache);
}

extern "C" __global__ void __launch_bounds__(128) fg_attention_bf16_d128(ATTENTION_PARAMETERS(bf16)) {
    attend<128, 4, 2>(ATTENTION_PROBLEM, cache);
}

extern "C" __global__ void __launch_bounds__(64) fg_attention_bf16_d256(ATTENTION_PARAMETERS(bf16)) {
    attend<256, 2, 1>(ATTENTION_PROBLEM, cache);
}

extern "C" __global__ void __launch_bounds__(128) fg_attention_f32(ATTENTION_PARAMETERS(float)) {
    attend_plain(ATTENTION_PROBLEM, cache);
}

// Splits of one query, ascending; each thread has dimensions of its own.
extern "C" __global__ void __launch_bounds__(128)
    fg_attention_merge(const float* part_out, const float* part_max, const float* part_sum, const uint32_t* positions,
                       float* out, uint32_t heads, uint32_t head_dim, uint32_t splits) {
    const uint64_t query = static_cast<uint64_t>(blockIdx.x) * heads + blockIdx.y, first = query * splits;
    const uint32_t count = positions[blockIdx.x] / SPLIT + 1;
    for (uint32_t d = threadIdx.x; d < head_dim; d += 128) {
        float most = part_max[first], sum = part_sum[first], value = part_out[first * head_dim + d];
        for (uint64_t part = first + 1; part < first + count; ++part) {
            const float now = greater(most, part_max[part]), base = base_of(now);
            const float old = exponential(most - base), add = exponential(part_max[part] - base);
            sum = fmaf(sum, old, part_sum[part] * add);
            value = fmaf(value, old, part_out[part * head_dim + d] * add);
            most = now;
        }
        out[query * head_dim + d] = value / sum;
    }
}

FAMILY(attention, ENTRY(fg_attention_bf16_d64, 128), ENTRY(fg_attention_bf16_d128, 128),
       ENTRY(fg_attention_bf16_d256, 64), ENTRY(fg_attention_f32, 128), ENTRY(fg_attention_merge, 128))
