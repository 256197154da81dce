// Runs kernels one after the other in one parallel region.
#include "team.h"
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

struct Call {
    Kernel kernel;
    const void* arguments;
};

struct alignas(64) Counter {
    std::atomic<int64_t> value{0};
};

void run(const Call* calls, int64_t count, int rank, int size, Counter* counters) {
    for (int64_t i = 0; i < count; i++) {
        calls[i].kernel(calls[i].arguments, Team{rank, size, &counters[i & 1].value});
        if (size == 1) {
            counters[i & 1].value = 0;
            continue;
        }
        // The other counter was last used before the barrier that is behind us, and next after the one ahead.
        if (rank == 0) counters[(i + 1) & 1].value.store(0, std::memory_order_relaxed);
#pragma omp barrier
    }
}

}  // namespace

extern "C" void kvloom_run(const Call* calls, int64_t count, int threads) {
    Counter counters[2];
    if (threads == 1) return run(calls, count, 0, 1, counters);
#pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
        run(calls, count, omp_get_thread_num(), omp_get_num_threads(), counters);
#else
        run(calls, count, 0, 1, counters);
#endif
    }
}
