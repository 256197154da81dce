// Waiting for a word to change: a short while busily, then asleep. Who waits busily for long takes the core from others, and is set aside
// by the scheduler when its own work comes: a thread that slept is woken in 5 to 20 microseconds, one that spun beside a busy process waits
// for its next slice, 3 to 7 milliseconds.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <sched.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

class Bell {
public:
    // Returns when has_come() gives true. Who makes it true calls ring() afterwards. All of that has_come reads is sequentially consistent.
    template <class HasCome> void wait(const HasCome& has_come) {
        if (has_come()) return;
        Clock::time_point begun = Clock::now(), before = begun, now = begun;
        for (; now - begun < BUSY && now - before < SET_ASIDE; before = now, now = Clock::now())
            for (int spins = 0; spins < 32; spins++) {
                if (has_come()) return;
#if defined(__x86_64__)
                _mm_pause();
#endif
            }
        while (!has_come()) {
            uint32_t rung = rung_.load();
            sleepers_.fetch_add(1);
            if (has_come()) return;  // counted though awake: costs whoever rings one call in vain
            sleep(rung);
        }
    }

    // Wakes up to two sleepers; who is woken rings again when there is work for more, so that nobody has to wake them all.
    void ring() {
        int sleepers = sleepers_.load();
        while (sleepers > 0 && !sleepers_.compare_exchange_weak(sleepers, sleepers > 2 ? sleepers - 2 : 0)) {
        }
        if (sleepers == 0) return;
        rung_.fetch_add(1);  // who has counted himself and does not sleep yet, does not
        wake(2);
    }

private:
    using Clock = std::chrono::steady_clock;
    static constexpr std::chrono::microseconds BUSY{1000};     // as long as a decode step's Python takes
    static constexpr std::chrono::microseconds SET_ASIDE{200};  // without running: others want this core
    alignas(64) std::atomic<int> sleepers_{0};  // at least as many as sleep and were not woken
    std::atomic<uint32_t> rung_{0};

#ifdef __linux__
    void sleep(uint32_t rung) { syscall(SYS_futex, &rung_, FUTEX_WAIT_PRIVATE, rung, nullptr, nullptr, 0); }
    void wake(int most) { syscall(SYS_futex, &rung_, FUTEX_WAKE_PRIVATE, most, nullptr, nullptr, 0); }
#else
    void sleep(uint32_t) { sched_yield(); }
    void wake(int) {}
#endif
};
