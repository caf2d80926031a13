// The table of kernels, and the C interface of a launch.
#include "emulate.hpp"

#include <cstdio>

// One per file of cu/.
#define FAMILIES(each)                                                                                                 \
    each(attention) each(coded) each(elementwise) each(faults) each(gate) each(gemm) each(kv) each(moe) each(norm) each(permute) each(rope)      \
        each(sample)

#define DECLARE(name) emulate::Family family_##name();
FAMILIES(DECLARE)

namespace emulate {

namespace {

#define CALL(name) family_##name(),
const Family* families() {
    static const Family all[] = {FAMILIES(CALL) {nullptr, 0}};
    return all;
}

bool refuse(char* why, size_t room, const std::string& text) {
    std::snprintf(why, room, "%s", text.c_str());
    return false;
}

} // namespace

const Entry* nth(size_t index) {
    for (const Family* family = families(); family->entries; ++family) {
        if (index < family->count) return &family->entries[index];
        index -= family->count;
    }
    return nullptr;
}

const Entry* find(const char* name) {
    for (size_t i = 0; const Entry* entry = nth(i); ++i)
        if (std::strcmp(entry->name, name) == 0) return entry;
    return nullptr;
}

} // namespace emulate

extern "C" bool foregate_emulate_symbol(size_t index, const char** name, uint32_t* threads, uint32_t* count,
                                        const uint8_t** sizes) {
    const emulate::Entry* entry = emulate::nth(index);
    if (!entry) return false;
    *name = entry->name;
    *threads = entry->threads;
    *count = entry->count;
    *sizes = entry->sizes;
    return true;
}

extern "C" bool foregate_emulate_launch(const char* name, const uint32_t* grid, const uint32_t* block,
                                        uint32_t shared_bytes, void** arguments, uint32_t count, bool descending,
                                        char* why, size_t room) {
    const emulate::Entry* entry = emulate::find(name);
    if (!entry) return emulate::refuse(why, room, "no kernel of that name");
    if (count != entry->count)
        return emulate::refuse(why, room,
                               "takes " + std::to_string(entry->count) + " arguments, got " + std::to_string(count));
    if (block[0] != entry->threads || block[1] != 1 || block[2] != 1)
        return emulate::refuse(why, room, "its blocks have " + std::to_string(entry->threads) + " threads, got " +
                                              std::to_string(block[0]) + " × " + std::to_string(block[1]) + " × " +
                                              std::to_string(block[2]));
    if (shared_bytes != 0) return emulate::refuse(why, room, "has no dynamic shared memory");
    if (grid[0] == 0 || grid[1] == 0 || grid[2] == 0 || grid[0] > 0x7fffffffu || grid[1] > 65535 || grid[2] > 65535)
        return emulate::refuse(why, room, "a grid that no card takes");
    const emulate::Launch launch{entry,
                                 arguments,
                                 {grid[0], grid[1], grid[2]},
                                 {block[0], 1, 1},
                                 descending};
    std::string reason;
    return emulate::run(launch, reason) || emulate::refuse(why, room, reason);
}
