// How kernels share work. Every kernel of a step is a function that does items of its work until none is left; any number of threads may
// be in it at once, from one on, and which thread does which item changes nothing in the results. step.cpp runs lists of them.
#pragma once
#include <atomic>
#include <cstdint>

struct Team {
    int size;                     // threads that may take part
    std::atomic<int64_t>* taken;  // items of this kernel that somebody has begun; 0 at its start

    // Begin of the next `count` items that nobody has begun.
    int64_t take(int64_t count) const { return taken->fetch_add(count, std::memory_order_relaxed); }

    // Calls work(first, last) for pieces of n small equal items, which together are all: so large that taking one costs little, so small
    // that nobody waits for long.
    template <class Work> void each_some(int64_t n, const Work& work) const {
        constexpr int64_t PIECES = 8;  // a thread
        int64_t count = n / (PIECES * size) > 0 ? n / (PIECES * size) : 1;
        for (int64_t first; (first = take(count)) < n;) work(first, first + count < n ? first + count : n);
    }

    // Calls work(i) for each of n small equal items.
    template <class Work> void each(int64_t n, const Work& work) const {
        each_some(n, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; i++) work(i);
        });
    }
};

typedef void (*Kernel)(const void* arguments, const Team& team);

struct Call {
    Kernel kernel;
    const void* arguments;
};

// Runs kernels one after the other, each when the one before it is done, with up to so many threads.
extern "C" void kvloom_run(const Call* calls, int64_t count, int threads);

// Runs a kernel that is made where it is called: work(team) does items until none is left, in up to so many threads.
template <class Work> void in_team(int threads, const Work& work) {
    Call call{[](const void* arguments, const Team& team) { (*(const Work*)arguments)(team); }, &work};
    kvloom_run(&call, 1, threads);
}

// Calls work(i) for each of n large items.
template <class Work> void for_all(int64_t n, int threads, const Work& work) {
    in_team(threads, [&](const Team& team) {
        for (int64_t i; (i = team.take(1)) < n;) work(i);
    });
}
