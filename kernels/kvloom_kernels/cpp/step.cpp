// Runs kernels one after the other in one parallel region.
#include "team.h"
#include <sched.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

struct Call {
    Kernel kernel;
    const void* arguments;
};

struct alignas(64) Counter {
    std::atomic<int64_t> value{0};
};

// Everybody waits for everybody, without ever sleeping: OpenMP's barrier goes to sleep after a while, and on a machine with other work
// being woken takes milliseconds, at each of a step's hundreds of kernels. Who waits long lets others run on this core instead.
class Barrier {
public:
    void wait(int size) {
        int64_t phase = phase_.value.load(std::memory_order_relaxed);
        if (arrived_.value.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
            arrived_.value.store(0, std::memory_order_relaxed);
            phase_.value.store(phase + 1, std::memory_order_release);
            return;
        }
        for (int spins = 1; phase_.value.load(std::memory_order_acquire) == phase; spins++) {
            if (spins % SPINS == 0) sched_yield();
#if defined(__x86_64__)
            _mm_pause();
#endif
        }
    }

private:
    static constexpr int SPINS = 1024;  // some 40 microseconds
    Counter arrived_, phase_;
};

struct Shared {
    Counter counters[2];
    Barrier barrier;
};

void run(const Call* calls, int64_t count, int rank, int size, Shared& shared) {
    for (int64_t i = 0; i < count; i++) {
        auto& taken = shared.counters[i & 1].value;
        calls[i].kernel(calls[i].arguments, Team{rank, size, &taken});
        if (size == 1) {
            taken = 0;
            continue;
        }
        // The other counter was last used before the barrier that is behind us, and next after the one ahead.
        if (rank == 0) shared.counters[(i + 1) & 1].value.store(0, std::memory_order_relaxed);
        if (i + 1 < count) shared.barrier.wait(size);
    }
}

}  // namespace

extern "C" void kvloom_run(const Call* calls, int64_t count, int threads) {
    Shared shared;
    if (threads == 1) return run(calls, count, 0, 1, shared);
#pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
        run(calls, count, omp_get_thread_num(), omp_get_num_threads(), shared);
#else
        run(calls, count, 0, 1, shared);
#endif
    }
}
