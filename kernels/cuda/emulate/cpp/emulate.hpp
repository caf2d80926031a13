// CUDA's words on the CPU. A kernel's source is compiled as C++20 with this header; `block.cpp` runs the threads of its blocks.
//
// What it keeps of a card: blocks are independent; threads of a block meet only at barriers, at exchanges of a full warp and in
// shared memory, which is full of NaN when a block begins; asynchronous copies arrive when they are waited for, and what they
// will overwrite is NaN until then.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

struct dim3 {
    uint32_t x, y, z;
};

namespace emulate {

// Most threads of a block, and bytes of its shared memory.
constexpr uint32_t MOST_THREADS = 1024;
constexpr size_t SHARED_BYTES = 48 * 1024;
// Bytes that a lane gives to an exchange of its warp.
constexpr size_t LANE_BYTES = 64;

// What lanes of a warp do together. All lanes must do the same.
enum class Together : uint8_t { Nothing, Shuffle, Ballot, Sync, LoadMatrices, MultiplyAdd };

// Copies that a thread has begun, in groups.
struct Copies {
    struct Copy {
        void* to;
        const void* from;
    };
    std::vector<Copy> begun;
    // Where each group ends in `begun`.
    std::vector<size_t> groups;

    void arrive(size_t pending);
};

struct Thread {
    dim3 index;
    uint32_t lane;
    uint32_t warp;
    // Which of the warp's two exchange buffers comes next.
    uint32_t turn;
    Copies copies;
};

// The thread that runs, its block and its grid.
extern constinit thread_local Thread* current;
extern constinit thread_local dim3 block_index, block_size, grid_size;
inline Thread& self() { return *current; }

// Ends the launch: what a card would do is not defined.
[[noreturn]] void fault(const char* what);

void sync_block();

// Gives this lane's bytes to its warp and waits until all lanes have; the last one runs `last` over all of them first. Returns the
// bytes of lane 0, with those of the other lanes behind, valid until the lane's next exchange but one.
using Last = void (*)(uint8_t* lanes);
uint8_t* exchange(Together what, const void* bytes, size_t size, Last last = nullptr);

// The block's shared memory.
uint8_t* shared_memory();

template <class T> T& shared() {
    static_assert(sizeof(T) <= SHARED_BYTES, "more than 48 KB of static shared memory");
    static_assert(alignof(T) <= 128);
    uint8_t* memory = shared_memory();
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(memory + sizeof(T), SHARED_BYTES - sizeof(T));
#endif
    return *reinterpret_cast<T*>(memory);
}

template <class To, class From> To bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

inline uint16_t round_bf16(float x) {
    const uint32_t b = bits<uint32_t>(x);
    if (x != x) return static_cast<uint16_t>(b >> 16 | 0x40);
    return static_cast<uint16_t>((b + 0x7fff + (b >> 16 & 1)) >> 16);
}

void copy_async(void* to, const void* from, bool filled);
void copy_commit();
void copy_wait(int pending);
void load_matrices(uint32_t* out, const void* row, uint32_t count, bool transposed);
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <class T> T from_lane(T value, uint32_t lane) {
    static_assert(sizeof(T) <= LANE_BYTES);
    const uint8_t* lanes = exchange(Together::Shuffle, &value, sizeof(T));
    T out;
    std::memcpy(&out, lanes + lane * LANE_BYTES, sizeof(T));
    return out;
}

uint32_t ballot(bool vote);
// A mask other than that of all lanes, or a width other than the warp's, is a fault.
void full_mask(uint32_t mask);

// === launching ===

// A kernel: its name, the threads of its blocks, how it is called with pointers to its arguments, and their sizes.
struct Entry {
    const char* name;
    uint32_t threads;
    void (*call)(void* function, void** arguments);
    void* function;
    uint32_t count;
    const uint8_t* sizes;
};

template <class... A> struct Caller {
    static constexpr uint8_t sizes[sizeof...(A) + 1] = {sizeof(A)..., 0};

    template <size_t... I> static void with(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
        kernel(*static_cast<A*>(arguments[I])...);
    }

    static void call(void* function, void** arguments) {
        with(reinterpret_cast<void (*)(A...)>(function), arguments, std::index_sequence_for<A...>{});
    }
};

template <class... A> Entry entry(const char* name, uint32_t threads, void (*kernel)(A...)) {
    return {name, threads, &Caller<A...>::call, reinterpret_cast<void*>(kernel), sizeof...(A), Caller<A...>::sizes};
}

struct Family {
    const Entry* entries;
    size_t count;
};

// A kernel by its name, or null; and the kernel number `index`, or null behind the last.
const Entry* find(const char* name);
const Entry* nth(size_t index);

struct Launch {
    const Entry* entry;
    void** arguments;
    dim3 grid;
    dim3 block;
    // The order in which threads run where nothing else orders them.
    bool descending;
};

// Runs all blocks, one after the other. Returns false, with the reason in `why`, where a card would hang or do what is not
// defined.
bool run(const Launch& launch, std::string& why);

} // namespace emulate

#define SHARED(Type, name) Type& name = ::emulate::shared<Type>()
#define ENTRY(kernel, threads) ::emulate::entry(#kernel, threads, &kernel)
#define FAMILY(name, ...)                                                                                              \
    ::emulate::Family family_##name() {                                                                                \
        static const ::emulate::Entry entries[] = {__VA_ARGS__};                                                       \
        return {entries, sizeof(entries) / sizeof(entries[0])};                                                        \
    }

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)

#define threadIdx (::emulate::self().index)
#define blockIdx (::emulate::block_index)
#define blockDim (::emulate::block_size)
#define gridDim (::emulate::grid_size)

inline void __syncthreads() { ::emulate::sync_block(); }

inline void __syncwarp(uint32_t mask = 0xffffffffu) {
    ::emulate::full_mask(mask);
    ::emulate::exchange(::emulate::Together::Sync, nullptr, 0);
}

template <class T> T __shfl_xor_sync(uint32_t mask, T value, int step) {
    ::emulate::full_mask(mask);
    return ::emulate::from_lane(value, ::emulate::self().lane ^ static_cast<uint32_t>(step));
}

template <class T> T __shfl_sync(uint32_t mask, T value, int lane) {
    ::emulate::full_mask(mask);
    return ::emulate::from_lane(value, static_cast<uint32_t>(lane) % 32);
}

inline uint32_t __ballot_sync(uint32_t mask, bool vote) {
    ::emulate::full_mask(mask);
    return ::emulate::ballot(vote);
}

inline int __popc(uint32_t x) { return __builtin_popcount(x); }

template <class T> T atomicAdd(T* at, T value) { return __atomic_fetch_add(at, value, __ATOMIC_RELAXED); }
