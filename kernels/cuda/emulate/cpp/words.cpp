// What lanes of a warp do together, and asynchronous copies.
#include "emulate.hpp"

namespace emulate {

void full_mask(uint32_t mask) {
    if (mask != 0xffffffffu) fault("a mask that is not that of all lanes");
}

uint32_t ballot(bool vote) {
    const uint8_t mine = vote;
    const uint8_t* lanes = exchange(Together::Ballot, &mine, 1);
    uint32_t votes = 0;
    for (uint32_t lane = 0; lane < 32; ++lane) votes |= static_cast<uint32_t>(lanes[lane * LANE_BYTES]) << lane;
    return votes;
}

void load_matrices(uint32_t* out, const void* row, uint32_t count, bool transposed) {
    if (self().lane < count * 8 && reinterpret_cast<uintptr_t>(row) % 16 != 0) fault("a matrix row that is not aligned");
    const uint8_t* lanes = exchange(Together::LoadMatrices, &row, sizeof(row));
    const uint32_t group = self().lane / 4, pair = self().lane % 4;
    const auto row_of = [&](uint32_t lane) {
        const uint16_t* at;
        std::memcpy(&at, lanes + lane * LANE_BYTES, sizeof(at));
        return at;
    };
    for (uint32_t i = 0; i < count; ++i) {
        if (transposed) {
            const uint32_t low = row_of(i * 8 + 2 * pair)[group], high = row_of(i * 8 + 2 * pair + 1)[group];
            out[i] = low | high << 16;
        } else {
            std::memcpy(&out[i], row_of(i * 8 + group) + 2 * pair, 4);
        }
    }
}

namespace {

struct Fragments {
    uint32_t a[4];
    uint32_t b[2];
    float sum[4];
};

float half(uint32_t pair, uint32_t which) { return bits<float>(which ? pair & 0xffff0000u : pair << 16); }

// The whole product, by the lane that came last: k ascending.
void product(uint8_t* lanes) {
    float a[16][16], b[16][8], sum[16][8];
    for (uint32_t lane = 0; lane < 32; ++lane) {
        Fragments f;
        std::memcpy(&f, lanes + lane * LANE_BYTES, sizeof(f));
        const uint32_t g = lane / 4, t = lane % 4;
        for (uint32_t h = 0; h < 2; ++h) {
            for (uint32_t i = 0; i < 4; ++i) a[g + i % 2 * 8][2 * t + i / 2 * 8 + h] = half(f.a[i], h);
            for (uint32_t i = 0; i < 2; ++i) b[2 * t + i * 8 + h][g] = half(f.b[i], h);
            for (uint32_t i = 0; i < 2; ++i) sum[g + i * 8][2 * t + h] = f.sum[2 * i + h];
        }
    }
    for (uint32_t row = 0; row < 16; ++row)
        for (uint32_t k = 0; k < 16; ++k)
            // A product of two bf16 is exact in float32, so this is one fused multiply-add.
            for (uint32_t column = 0; column < 8; ++column) sum[row][column] += a[row][k] * b[k][column];
    for (uint32_t lane = 0; lane < 32; ++lane) {
        const uint32_t g = lane / 4, t = lane % 4;
        const float out[4] = {sum[g][2 * t], sum[g][2 * t + 1], sum[g + 8][2 * t], sum[g + 8][2 * t + 1]};
        std::memcpy(lanes + lane * LANE_BYTES, out, sizeof(out));
    }
}

} // namespace

void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const Fragments mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}, {sum[0], sum[1], sum[2], sum[3]}};
    const uint8_t* lanes = exchange(Together::MultiplyAdd, &mine, sizeof(mine), &product);
    std::memcpy(sum, lanes + self().lane * LANE_BYTES, sizeof(sum));
}

void copy_async(void* to, const void* from, bool filled) {
    if (reinterpret_cast<uintptr_t>(to) % 16 != 0) fault("a copy to memory that is not aligned");
    if (filled && reinterpret_cast<uintptr_t>(from) % 16 != 0) fault("a copy from memory that is not aligned");
    // Nobody may read this before the copy has been waited for.
    std::memset(to, 0xff, 16);
    self().copies.begun.push_back({to, filled ? from : nullptr});
}

void copy_commit() {
    Copies& copies = self().copies;
    copies.groups.push_back(copies.begun.size());
}

void Copies::arrive(size_t pending) {
    if (groups.size() <= pending) return;
    const size_t over = groups.size() - pending, end = groups[over - 1];
    for (size_t i = 0; i < end; ++i) {
        if (begun[i].from) std::memcpy(begun[i].to, begun[i].from, 16);
        else std::memset(begun[i].to, 0, 16);
    }
    begun.erase(begun.begin(), begun.begin() + static_cast<ptrdiff_t>(end));
    groups.erase(groups.begin(), groups.begin() + static_cast<ptrdiff_t>(over));
    for (size_t& group : groups) group -= end;
}

void copy_wait(int pending) { self().copies.arrive(static_cast<size_t>(pending)); }

} // namespace emulate
