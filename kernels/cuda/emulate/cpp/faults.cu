// Kernels that are wrong on purpose: what the emulation must say of them. No card ever sees this file.
#include "lib/device.cuh"
#include "lib/reduce.cuh"

namespace {

struct Row {
    float values[256];
};

} // namespace

// Half of the threads leave before a barrier.
extern "C" __global__ void fault_barrier(float* out) {
    if (threadIdx.x < 64) return;
    __syncthreads();
    out[threadIdx.x] = 0.0f;
}

// Half of a warp leaves before an exchange.
extern "C" __global__ void fault_lanes(float* out) {
    if (lane_id() < 16) return;
    out[threadIdx.x] = warp_sum(1.0f);
}

// Lanes of a warp at different exchanges.
extern "C" __global__ void fault_mixed(float* out) {
    if (lane_id() < 16) __syncwarp();
    else out[threadIdx.x] = static_cast<float>(__ballot_sync(ALL_LANES, true));
}

// Shared memory that nobody wrote.
extern "C" __global__ void fault_unwritten(float* out) {
    SHARED(Row, row);
    out[threadIdx.x] = row.values[threadIdx.x];
}

// A copy that is read before it has been waited for.
extern "C" __global__ void fault_early(const float* x, float* out) {
    SHARED(Row, row);
    if (threadIdx.x % 4 == 0) copy_async(&row.values[threadIdx.x], x + threadIdx.x, true);
    copy_commit();
    __syncthreads();
    out[threadIdx.x] = row.values[threadIdx.x];
    __syncthreads();
    copy_wait<0>();
}

// The next thread's value, without the barrier between writing and reading.
extern "C" __global__ void fault_race(const float* x, float* out) {
    SHARED(Row, row);
    row.values[threadIdx.x] = x[threadIdx.x];
    out[threadIdx.x] = row.values[(threadIdx.x + 1) % 128];
}

// One value behind the end of shared memory, and of `out`.
extern "C" __global__ void fault_beyond(float* out) {
    SHARED(Row, row);
    row.values[threadIdx.x + 129] = 0.0f;
    out[threadIdx.x + 1] = 0.0f;
}

FAMILY(faults, ENTRY(fault_barrier, 128), ENTRY(fault_lanes, 32), ENTRY(fault_mixed, 32), ENTRY(fault_unwritten, 128),
       ENTRY(fault_early, 128), ENTRY(fault_race, 128), ENTRY(fault_beyond, 128))
