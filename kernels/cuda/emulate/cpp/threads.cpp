// Runs a block's threads as threads of the system, for ThreadSanitizer: what is not ordered by a barrier or an exchange is a data
// race that it sees. A fault ends the program.
#include "emulate.hpp"

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>

namespace emulate {

constinit thread_local Thread* current = nullptr;
constinit thread_local dim3 block_index{}, block_size{}, grid_size{};

namespace {

// Longer than any case takes.
constexpr std::chrono::seconds PATIENCE{60};

struct Barrier {
    std::mutex lock;
    std::condition_variable changed;
    uint32_t arrived = 0;
    uint64_t round = 0;
    Together what = Together::Nothing;

    template <class Final> void wait(uint32_t all, Together together, Final final) {
        std::unique_lock held(lock);
        if (arrived == 0) what = together;
        else if (what != together) fault("lanes of a warp do different things together");
        if (++arrived == all) {
            final();
            arrived = 0;
            ++round;
            changed.notify_all();
            return;
        }
        const uint64_t mine = round;
        if (!changed.wait_for(held, PATIENCE, [&] { return round != mine; })) fault("deadlock");
    }
};

struct Warp {
    Barrier barrier;
    alignas(16) uint8_t lanes[2][32 * LANE_BYTES];
};

uint32_t threads = 0;
Barrier barrier, between;
Warp warps[MOST_THREADS / 32];
alignas(128) uint8_t memory[SHARED_BYTES];
const char* kernel = "";

void thread_main(const Launch& launch, uint32_t number) {
    Thread thread{{number, 0, 0}, number % 32, number / 32, 0, {}};
    current = &thread;
    block_size = launch.block;
    grid_size = launch.grid;
    for (uint32_t z = 0; z < launch.grid.z; ++z)
        for (uint32_t y = 0; y < launch.grid.y; ++y)
            for (uint32_t x = 0; x < launch.grid.x; ++x) {
                between.wait(threads, Together::Sync, [] {
#if defined(__SANITIZE_ADDRESS__)
                    ASAN_UNPOISON_MEMORY_REGION(memory, SHARED_BYTES);
#endif
                    std::memset(memory, 0xff, SHARED_BYTES);
                });
                block_index = {x, y, z};
                launch.entry->call(launch.entry->function, launch.arguments);
                thread.copies.arrive(0);
                if (!thread.copies.begun.empty()) fault("a copy that was never committed");
            }
}

} // namespace

void fault(const char* what) {
    std::fprintf(stderr, "fault in %s: %s\n", kernel, what);
    std::_Exit(3);
}

void sync_block() {
    barrier.wait(threads, Together::Sync, [] {});
}

uint8_t* exchange(Together what, const void* bytes, size_t size, Last last) {
    Warp& warp = warps[current->warp];
    uint8_t* lanes = warp.lanes[current->turn];
    current->turn ^= 1;
    if (size > 0) std::memcpy(lanes + current->lane * LANE_BYTES, bytes, size);
    warp.barrier.wait(32, what, [&] {
        if (last) last(lanes);
    });
    return lanes;
}

uint8_t* shared_memory() { return memory; }

bool run(const Launch& launch, std::string&) {
    threads = launch.block.x;
    kernel = launch.entry->name;
    std::vector<std::thread> all;
    for (uint32_t i = 0; i < threads; ++i) all.emplace_back(thread_main, std::cref(launch), i);
    for (std::thread& thread : all) thread.join();
    return true;
}

} // namespace emulate
