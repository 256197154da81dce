// Lists of tiny kernels, each of which reads what the one before it wrote, by threads that come and go: compiled with step.cpp and the
// thread sanitizer. Fails when an item is done twice, not at all, or before the kernel before it was over; also when callers meet.
#include "team.h"
#include <cstdio>
#include <thread>
#include <vector>

namespace {

struct Adding {
    const int64_t* from;
    int64_t* to;
    int64_t n;
};

// Plain memory on purpose: the sanitizer sees every access that no order was given to.
void add_one(const void* arguments, const Team& team) {
    const Adding& a = *(const Adding*)arguments;
    team.each(a.n, [&](int64_t i) { a.to[i] += a.from[a.n - 1 - i] + 1; });
}

// `kernels` below 90: the sums grow like Fibonacci's. Every list has its own memory, freed when it is over: a thread that comes too late would read it.
bool one_run(int64_t kernels, int64_t n, int threads) {
    std::vector<int64_t> first(n, 0), second(n, 0);
    std::vector<Adding> arguments;
    for (int64_t k = 0; k < kernels; k++) arguments.push_back(k % 2 ? Adding{second.data(), first.data(), n} : Adding{first.data(), second.data(), n});
    std::vector<Call> calls;
    for (const Adding& a : arguments) calls.push_back({add_one, &a});
    kvloom_run(calls.data(), kernels, threads);
    int64_t first_is = 0, second_is = 0;
    for (int64_t k = 0; k < kernels; k++) {
        int64_t &to = k % 2 ? first_is : second_is, from = k % 2 ? second_is : first_is;
        to += from + 1;
    }
    for (int64_t i = 0; i < n; i++)
        if (first[i] != first_is || second[i] != second_is) return false;
    return true;
}

}  // namespace

int main() {
    std::atomic<int> wrong{0};
    std::atomic<bool> is_over{false};
    std::vector<std::thread> neighbours;  // that take cores away
    for (unsigned i = 0; i < std::thread::hardware_concurrency(); i++)
        neighbours.emplace_back([&] {
            while (!is_over) {
            }
        });
    auto caller = [&](int runs) {
        for (int r = 0; r < runs; r++)
            if (!one_run(1 + r % 59, 1 + r * 7 % 40, 2 + r % 3)) wrong++;
    };
    std::thread other(caller, 1500);
    caller(3000);
    other.join();
    for (int r = 0; r < 20; r++) {  // long enough for the others to fall asleep between runs
        std::this_thread::sleep_for(std::chrono::milliseconds(3));
        caller(5);
    }
    is_over = true;
    for (std::thread& thread : neighbours) thread.join();
    std::printf("%d wrong\n", int(wrong));
    return wrong != 0;
}
