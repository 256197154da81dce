// Runs kernels one after the other, with threads of our own.
//
// A kernel is over when all of its items are done, not when all threads came: who is set aside by the scheduler, or not awake yet, and
// has begun no item is not waited for. For that, a thread enters a kernel before it looks at anything of it, and leaves it when no item is
// left; the last one to leave opens the next kernel, whoever it is. All of that is one word: the number of the kernel, counted through all
// runs and so never the same twice, how many threads may be in it (0 between runs), and how many are. A thread that comes too late finds
// another number in the word, and its compare-and-swap fails: it has touched nothing of the kernel it came for.
//
// The threads are not OpenMP's: those that torch came with wait for each other at the end of every region.
#include "bell.h"
#include "team.h"
#include <csignal>
#include <new>
#include <pthread.h>

namespace {

struct Word {
    static constexpr int BITS = 12;
    uint64_t bits;

    static Word of(uint64_t kernel, int most) { return {kernel << 2 * BITS | uint64_t(most) << BITS}; }
    uint64_t kernel() const { return bits >> 2 * BITS; }
    int most() const { return int(bits >> BITS & MASK); }
    int inside() const { return int(bits & MASK); }
    static constexpr uint64_t MASK = (1 << BITS) - 1;
};

class Pool {
public:
    // False: another thread is using it.
    bool run(const Call* calls, int64_t count, int threads) {
        if (is_taken_.exchange(true)) return false;
        while (helpers_ < threads - 1 && start_helper()) helpers_++;
        uint64_t first = read().kernel();
        calls_ = calls, first_ = first, end_ = first + uint64_t(count), size_ = threads;
        taken_[first & 1].value = 0;
        word_.value.store(Word::of(first, threads).bits);
        bell_.ring();
        work(first + uint64_t(count), caller_bell_);
        is_taken_.store(false);
        return true;
    }

private:
    struct alignas(64) Count {
        std::atomic<int64_t> value{0};
    };
    struct alignas(64) SharedWord {
        std::atomic<uint64_t> value{Word::of(1, 0).bits};
    };

    // The list that runs: written while nobody may enter, read by who has entered.
    alignas(64) const Call* calls_ = nullptr;
    uint64_t first_ = 0, end_ = 0;
    int size_ = 0, helpers_ = 0;
    std::atomic<bool> is_taken_{false};
    SharedWord word_;
    Count taken_[2];  // of every other kernel
    Bell bell_, caller_bell_;  // for helpers, and for the one who called: who waits for the end must not be passed over

    Word read() const { return {word_.value.load()}; }

    // Works on whatever can be entered, until the kernel `end` would be next.
    void work(uint64_t end, Bell& bell) {
        uint64_t left = 0;
        for (;;) {
            Word now;
            bell.wait([&] {
                now = read();
                return now.kernel() == end || (now.kernel() != left && now.inside() < now.most());
            });
            if (now.kernel() == end) return;
            if (!word_.value.compare_exchange_strong(now.bits, now.bits + 1)) continue;
            left = now.kernel();
            if (now.inside() + 1 < now.most()) bell_.ring();
            const Call& call = calls_[left - first_];
            call.kernel(call.arguments, Team{size_, &taken_[left & 1].value});
            leave(left);
        }
    }

    void leave(uint64_t kernel) {
        // What is next: the counter was last used two kernels ago, and is nobody's as long as this thread is inside.
        Word next = kernel + 1 == end_ ? Word::of(kernel + 1, 0) : Word::of(kernel + 1, size_);
        Word now = read();
        for (;;) {
            bool is_last = now.inside() == 1;
            if (is_last) taken_[(kernel + 1) & 1].value.store(0, std::memory_order_relaxed);
            if (word_.value.compare_exchange_weak(now.bits, is_last ? next.bits : now.bits - 1)) {
                if (!is_last) return;
                caller_bell_.ring();
                bell_.ring();
                return;
            }
        }
    }

    bool start_helper() {
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for threads that run Python
        pthread_t thread;
        bool is_started = pthread_create(&thread, nullptr, [](void* pool) -> void* {
            Pool& its_pool = *(Pool*)pool;
            its_pool.work(UINT64_MAX, its_pool.bell_);
            return nullptr;
        }, this) == 0;
        if (is_started) pthread_detach(thread);
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        return is_started;
    }
};

// Never destroyed: its threads wait in it while the process ends.
std::atomic<Pool*> the_pool{nullptr};
pthread_once_t once = PTHREAD_ONCE_INIT;

void new_pool() { the_pool = new Pool; }

Pool& pool() {
    pthread_once(&once, [] {
        new_pool();
        pthread_atfork(nullptr, nullptr, new_pool);  // a child has none of the threads
    });
    return *the_pool;
}

void run_alone(const Call* calls, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        std::atomic<int64_t> taken{0};
        calls[i].kernel(calls[i].arguments, Team{1, &taken});
    }
}

}  // namespace

extern "C" void kvloom_run(const Call* calls, int64_t count, int threads) {
    int most = threads < int(Word::MASK) ? threads : int(Word::MASK);
    if (most <= 1 || count == 0 || !pool().run(calls, count, most)) run_alone(calls, count);
}
