// How kernels share work. Every kernel of a step is a function that does one thread's part; a list of them runs inside one parallel
// region, with a barrier after each, so that a step pays for waking the threads once and Python for one call.
#pragma once
#include <atomic>
#include <cstdint>

struct Team {
    int rank, size;
    std::atomic<int64_t>* taken;  // items of this kernel that somebody has begun; 0 at its start

    // This thread's part of n equal items.
    int64_t first(int64_t n) const { return n * rank / size; }
    int64_t last(int64_t n) const { return n * (rank + 1) / size; }

    // Begin of the next `count` items that nobody has begun, for items that take unequal time.
    int64_t take(int64_t count) const { return taken->fetch_add(count, std::memory_order_relaxed); }
};

typedef void (*Kernel)(const void* arguments, const Team& team);
