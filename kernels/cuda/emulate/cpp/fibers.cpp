// Runs a block's threads as fibers of the calling thread, in one fixed order: fast and repeatable.
#include "emulate.hpp"

#include <sys/mman.h>

#include <memory>
#include <new>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulate {

constinit thread_local Thread* current = nullptr;
constinit thread_local dim3 block_index{}, block_size{}, grid_size{};

namespace {

constexpr size_t STACK_BYTES = 256 * 1024;
constexpr size_t GUARD_BYTES = 4096;

#if defined(__x86_64__)
// What a function must keep lies on the stack of who waits.
using Context = void*;
extern "C" void foregate_emulate_switch(void** from, void* to);
asm(R"(
.text
.globl foregate_emulate_switch
.type foregate_emulate_switch, @function
foregate_emulate_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size foregate_emulate_switch, .-foregate_emulate_switch
)");

void switch_to(Context& from, Context& to) { foregate_emulate_switch(&from, to); }

void prepare(Context& context, uint8_t* stack, void (*start)()) {
    // As if `start` had been called from nowhere: the stack is 8 off a multiple of 16.
    auto* top = reinterpret_cast<void**>(stack + STACK_BYTES) - 1;
    *top = nullptr;
    *--top = reinterpret_cast<void*>(start);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    context = top;
}
#else
using Context = ucontext_t;

void switch_to(Context& from, Context& to) { swapcontext(&from, &to); }

void prepare(Context& context, uint8_t* stack, void (*start)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = STACK_BYTES;
    context.uc_link = nullptr;
    makecontext(&context, start, 0);
}
#endif

struct Fiber {
    Context context;
    Thread thread;
};

struct Warp {
    // Lanes that may run, those that have come to an exchange, and which.
    uint32_t runnable = 0;
    uint32_t arrived = 0;
    Together what = Together::Nothing;
    alignas(16) uint8_t lanes[2][32 * LANE_BYTES];
};

// Stacks, each with a page below it that must not be touched.
struct Stacks {
    uint8_t* memory;
    static constexpr size_t EACH = STACK_BYTES + GUARD_BYTES;

    Stacks() {
        void* got = mmap(nullptr, EACH * MOST_THREADS, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (got == MAP_FAILED) throw std::bad_alloc();
        memory = static_cast<uint8_t*>(got);
        for (size_t i = 0; i < MOST_THREADS; ++i) mprotect(memory + i * EACH, GUARD_BYTES, PROT_NONE);
    }
    ~Stacks() { munmap(memory, EACH * MOST_THREADS); }
    uint8_t* of(size_t fiber) { return memory + fiber * EACH + GUARD_BYTES; }
};

struct Block {
    const Launch* launch = nullptr;
    uint32_t threads = 0;
    uint32_t at_barrier = 0;
    uint32_t ended = 0;
    std::string fault;
    Context scheduler;
    Stacks stacks;
    std::unique_ptr<Fiber[]> fibers{new Fiber[MOST_THREADS]};
    Warp warps[MOST_THREADS / 32];
    alignas(128) uint8_t shared[SHARED_BYTES];

    Fiber& running() { return fibers[current->warp * 32 + current->lane]; }
    void give_way() { switch_to(running().context, scheduler); }
    void begin(dim3 index);
    bool run();
    void run_warp(Warp& warp, uint32_t number);
};

thread_local std::unique_ptr<Block> owner;
constinit thread_local Block* block = nullptr;

void thread_main() {
    const Launch& launch = *block->launch;
    launch.entry->call(launch.entry->function, launch.arguments);
    current->copies.arrive(0);
    if (!current->copies.begun.empty()) fault("a copy that was never committed");
    ++block->ended;
    for (;;) block->give_way();
}

void Block::begin(dim3 index) {
    block_index = index;
    at_barrier = ended = 0;
    fault.clear();
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(shared, SHARED_BYTES);
#endif
    std::memset(shared, 0xff, SHARED_BYTES);
    for (uint32_t i = 0; i < threads; ++i) {
        Thread& thread = fibers[i].thread;
        thread.index = {i, 0, 0};
        thread.lane = i % 32;
        thread.warp = i / 32;
        thread.turn = 0;
        thread.copies.begun.clear();
        thread.copies.groups.clear();
#if defined(__SANITIZE_ADDRESS__)
        // A fiber never returns, so its last frames are still marked.
        ASAN_UNPOISON_MEMORY_REGION(stacks.of(i), STACK_BYTES);
#endif
        prepare(fibers[i].context, stacks.of(i), &thread_main);
    }
    for (uint32_t w = 0; w < threads / 32; ++w) {
        warps[w].runnable = 0xffffffffu;
        warps[w].arrived = 0;
        warps[w].what = Together::Nothing;
    }
}

void Block::run_warp(Warp& warp, uint32_t number) {
    while (warp.runnable && fault.empty()) {
        const int lane = launch->descending ? 31 - __builtin_clz(warp.runnable) : __builtin_ctz(warp.runnable);
        warp.runnable &= ~(1u << lane);
        Fiber& fiber = fibers[number * 32 + static_cast<uint32_t>(lane)];
        current = &fiber.thread;
        switch_to(scheduler, fiber.context);
    }
}

bool Block::run() {
    const uint32_t count = threads / 32;
    while (ended < threads) {
        for (uint32_t i = 0; i < count; ++i) {
            const uint32_t w = launch->descending ? count - 1 - i : i;
            run_warp(warps[w], w);
        }
        if (!fault.empty()) return false;
        if (at_barrier == threads) {
            at_barrier = 0;
            for (uint32_t w = 0; w < count; ++w) warps[w].runnable = 0xffffffffu;
        } else if (ended < threads) {
            const uint32_t apart = threads - at_barrier - ended;
            fault = "deadlock: of " + std::to_string(threads) + " threads " + std::to_string(at_barrier) +
                    " wait at __syncthreads, " + std::to_string(apart) + " for lanes of their warp, and " +
                    std::to_string(ended) + " have returned";
            return false;
        }
    }
    return true;
}

} // namespace

void fault(const char* what) {
    block->fault = what;
    for (;;) block->give_way();
}

void sync_block() {
    ++block->at_barrier;
    block->give_way();
}

uint8_t* exchange(Together what, const void* bytes, size_t size, Last last) {
    Warp& warp = block->warps[current->warp];
    uint8_t* lanes = warp.lanes[current->turn];
    current->turn ^= 1;
    if (size > 0) std::memcpy(lanes + current->lane * LANE_BYTES, bytes, size);
    if (warp.arrived == 0) warp.what = what;
    else if (warp.what != what) fault("lanes of a warp do different things together");
    if (++warp.arrived < 32) {
        block->give_way();
    } else {
        if (last) last(lanes);
        warp.arrived = 0;
        warp.runnable = ~(1u << current->lane);
    }
    return lanes;
}

uint8_t* shared_memory() { return block->shared; }

bool run(const Launch& launch, std::string& why) {
    if (!owner) owner = std::make_unique<Block>();
    block = owner.get();
    block->launch = &launch;
    block->threads = launch.block.x;
    block_size = launch.block;
    grid_size = launch.grid;
    for (uint32_t z = 0; z < launch.grid.z; ++z)
        for (uint32_t y = 0; y < launch.grid.y; ++y)
            for (uint32_t x = 0; x < launch.grid.x; ++x) {
                block->begin({x, y, z});
                if (block->run()) continue;
                why = "block (" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) +
                      "): " + block->fault;
                return false;
            }
    return true;
}

} // namespace emulate
