// Choosing from long vocabularies without sorting them, and the log-probabilities of what was chosen: rows of logits [rows, size].
#include "common.h"
#include "team.h"
#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

namespace {

constexpr int BLOCK = 256;  // elements whose weights are summed before the running total moves on; skipped when none is large enough
constexpr int CUTS = 8;     // thresholds that one pass over a row compares with
const floats LANE = counted();

// The first n lanes; the others are minus infinity.
template <class T> inline floats load_or_lowest(const T* p, int64_t n) {
    if (n >= LANES) return load<T>(p);
    return LANE < float(n) ? load_n<T>(p, int(n)) : splat(-INFINITY);
}

// e^(x - best), 0 for what is out of reach: e^-87 is 1e-38 of the best.
inline floats weights(const float* x, int64_t n, float best) {
    floats shifted = load_or_lowest<float>(x, n) - best;
    return shifted > -87.0f ? exponential(shifted) : floats{};
}

// Of a block: few enough for sums in float32.
inline double block_sum(const float* x, int64_t n, float best) {
    floats total = {};
    for (int64_t i = 0; i < n; i += LANES) total += weights(x + i, n - i, best);
    return sum(total);
}

// Order-preserving integer of a float: larger floats have smaller keys.
inline uint32_t key_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits & 0x80000000u ? bits : ~(bits | 0x80000000u);
}
inline float logit_of(uint32_t key) {
    uint32_t bits = key & 0x80000000u ? key : ~(key | 0x80000000u);
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

// NaN if there is one. Integers, because compilers vectorize their minimum everywhere.
float largest_or_nan(const float* x, int64_t size) {
    uint32_t smallest = UINT32_MAX;
    int nan = 0;
    for (int64_t i = 0; i < size; i++) {
        uint32_t key = key_of(x[i]);
        smallest = key < smallest ? key : smallest;
        nan |= x[i] != x[i];
    }
    return nan ? NAN : logit_of(smallest);
}

// The largest and where it stands first, in one pass over the row; NaN if there is one.
void find_best(const float* x, int64_t size, float& best, int64_t& at) {
    constexpr int64_t PIECE = 2048;
    best = -INFINITY, at = 0;
    for (int64_t begin = 0; begin < size; begin += PIECE) {
        float here = largest_or_nan(x + begin, std::min<int64_t>(PIECE, size - begin));
        if (here <= best) continue;
        best = here, at = begin;
        if (here != here) return;
    }
    while (x[at] != best) at++;
}

// sums[k]: of the masses that are at least cuts[k]; mass_at(i) gives those from i on, a whole vector.
template <class MassAt> inline void sums_from(int64_t size, const float* cuts, double* sums, const MassAt& mass_at) {
    for (int k = 0; k < CUTS; k++) sums[k] = 0;
    for (int64_t block = 0; block < size; block += BLOCK * 4) {  // few enough for sums in float32
        floats part[CUTS] = {};
        for (int64_t i = block; i < size && i < block + BLOCK * 4; i += LANES) {
            floats m = mass_at(i);
            for (int k = 0; k < CUTS; k++) part[k] += (floats)((ints)m & (m >= cuts[k]));
        }
        for (int k = 0; k < CUTS; k++) sums[k] += sum(part[k]);
    }
}

// Largest masses first, their sum reaches `wanted` in [low, high); `above` is the sum of those that are at least `high`.
struct Reached {
    float low = 0, high = 2;  // the best has mass 1
    double above = 0;

    // What sums from falling cuts say; whether one of them is low enough.
    bool narrow(double wanted, const float* cuts, const double* sums) {
        for (int k = 0; k < CUTS; k++) {
            if (sums[k] >= wanted) {
                low = cuts[k];
                return true;
            }
            high = cuts[k], above = sums[k];
        }
        return false;
    }

    // The same by looking at CUTS masses below `from`, each `ratio` times the one before.
    bool narrow(double wanted, const float* mass, int64_t size, float from, float ratio) {
        float cuts[CUTS];
        double sums[CUTS];
        for (int k = 0; k < CUTS; k++) cuts[k] = from *= ratio;
        sums_from(size, cuts, sums, [&](int64_t i) { return load<float>(mass + i); });
        return narrow(wanted, cuts, sums);
    }
};

struct Item {
    uint32_t key;
    float mass;
};

// The key with which the masses of the smallest keys reach `missing`: quickselect by weight.
uint32_t key_that_reaches(std::vector<Item>& items, double missing) {
    auto first = items.begin(), last = items.end();
    while (true) {
        uint32_t a = first->key, b = (first + (last - first) / 2)->key, c = (last - 1)->key;
        uint32_t pivot = std::max(std::min(a, b), std::min(std::max(a, b), c));
        auto equal = std::partition(first, last, [=](const Item& i) { return i.key < pivot; });
        auto larger = std::partition(equal, last, [=](const Item& i) { return i.key == pivot; });
        double less = 0, same = 0;
        for (auto i = first; i != equal; i++) less += i->mass;
        for (auto i = equal; i != larger; i++) same += i->mass;
        if (equal != first && less >= missing) last = equal;
        else if (less + same >= missing || larger == last) return pivot;
        else missing -= less + same, first = larger;
    }
}

// Those in [low, high), unless they are more than `most`; whether they are not.
bool collect(const float* x, const float* mass, int64_t size, const Reached& range, int64_t most, std::vector<Item>& items) {
    items.clear();
    for (int64_t i = 0; i < size; i += LANES) {
        floats m = load<float>(mass + i);
        for (uint32_t chosen = bits_of((m >= range.low) & (m < range.high) & (m > 0.0f)); chosen; chosen &= chosen - 1) {
            int64_t at = i + __builtin_ctz(chosen);
            items.push_back({key_of(x[at]), mass[at]});
        }
        if (int64_t(items.size()) > most) return false;
    }
    return true;
}

// The smallest logit that is kept: that of the token with which the mass of the best tokens reaches `share`. NaN if a logit is.
// The pass that makes the masses says where about, another one where more closely if there are many; few elements are left to choose among.
float top_p_threshold(const float* x, int64_t size, float share) {
    static thread_local std::vector<float> mass;  // kept: fresh memory of this size costs as much as a pass over it
    static thread_local std::vector<Item> items;
    constexpr int64_t FEW = 2048;  // as quickly sorted out as passed over
    mass.resize(std::max<size_t>(mass.size(), size + LANES));
    float best = largest_or_nan(x, size), cuts[CUTS];
    if (best != best) return best;
    double sums[CUTS];
    for (int k = 0; k < CUTS; k++) cuts[k] = k ? cuts[k - 1] / 4 : 0.25f;
    cuts[CUTS - 1] = 0;
    sums_from(size, cuts, sums, [&](int64_t i) {
        floats m = weights(x + i, size - i, best);
        store<float>(&mass[i], m);
        return m;
    });
    double total = sums[CUTS - 1], wanted = share * total;
    if (!(total > 0)) return best;  // nothing is allowed, or the row is broken: the sampler says so
    if (share >= 1) return -INFINITY;  // 1, or what was rounded to it
    Reached range;
    bool found = range.narrow(wanted, cuts, sums) && range.low > 0;
    for (float from = range.high; !found && from > 1e-37f; from = range.high) found = range.narrow(wanted, mass.data(), size, from, 0.25f);
    if (!found) return -INFINITY;  // almost 1: rounded, the masses do not add up to it
    for (int64_t most = FEW; !collect(x, mass.data(), size, range, most, items); most = size) {
        float from = std::min(range.high, 1.0f);
        range.narrow(wanted, mass.data(), size, from, std::pow(range.low / from, 1.0f / CUTS));
    }
    return items.empty() ? best : logit_of(key_that_reaches(items, wanted - range.above));
}

// NaN is passed over.
template <class T> inline float block_largest(const T* x, int64_t n) {
    floats best = splat(-INFINITY);
    for (int64_t i = 0; i < n; i += LANES) {
        floats next = load_or_lowest<T>(x + i, n - i);
        best = next > best ? next : best;
    }
    return largest(best);
}

// Sum of e^(x - best). A lane adds 16 numbers in float32, an error below 1e-6; what is out of reach counts as 1e-38. NaN if a logit is.
template <class T> inline float block_weight(const T* x, int64_t n, float best) {
    floats total = {};
    for (int64_t i = 0; i < n; i += LANES) total += exponential(load_or_lowest<T>(x + i, n - i) - best);
    return sum(total);
}

template <class T> inline int64_t block_larger(const T* x, int64_t n, float than) {
    ints counts = {};
    for (int64_t i = 0; i < n; i += LANES) counts -= load_or_lowest<T>(x + i, n - i) > than;  // true is -1
    int64_t total = 0;
    for (int i = 0; i < LANES; i++) total += counts[i];
    return total;
}

// The k best of what is offered in the order of token ids: best first, among ties the lower id first.
class Best {
  public:
    // `floor`: k of those to come are at least as large.
    Best(int64_t k, float floor) : k_(size_t(k)), floor_(floor) { list_.reserve(k_ + 1); }

    bool takes(float x) const { return list_.size() < k_ ? x >= floor_ : k_ > 0 && x > list_.back().logit; }

    template <class T> void offer_block(const T* x, int64_t n, int64_t first) {
        for (int64_t i = 0; i < n; i += LANES) {
            floats next = load_or_lowest<T>(x + i, n - i);
            if (!takes(largest(next))) continue;
            for (int j = 0; j < LANES && i + j < n; j++)
                if (takes(load1<T>(x + i + j))) insert(load1<T>(x + i + j), first + i + j);
        }
    }

    // As if the first k tokens were the best ones.
    void give_up() {
        list_.clear();
        for (size_t i = 0; i < k_; i++) list_.push_back({NAN, int64_t(i)});
    }

    struct Entry {
        float logit;
        int64_t token;
    };
    const std::vector<Entry>& list() const { return list_; }

  private:
    void insert(float x, int64_t token) {
        if (list_.size() == k_) list_.pop_back();
        size_t at = list_.size();
        list_.push_back({x, token});
        for (; at > 0 && list_[at - 1].logit < x; at--) list_[at] = list_[at - 1];
        list_[at] = {x, token};
    }

    size_t k_;
    float floor_;
    std::vector<Entry> list_;
};

// The k-th largest: as many logits are at least that large. Minus infinity if there are fewer than k.
float kth_largest(std::vector<float> values, int64_t k) {
    if (k <= 0 || int64_t(values.size()) < k) return -INFINITY;
    std::nth_element(values.begin(), values.begin() + (k - 1), values.end(), std::greater<float>());
    return values[k - 1];
}

// One row of `kvloom_token_logprobs`: its blocks' maxima first, then the rest of the work where they say there is some.
template <class T>
void token_logprobs(const T* x, int64_t size, int64_t chosen, int64_t k, int64_t* token_ids, float* logprobs, int64_t* ranks) {
    std::vector<float> maxima;
    maxima.reserve((size + BLOCK - 1) / BLOCK);
    for (int64_t i = 0; i < size; i += BLOCK) maxima.push_back(block_largest(x + i, std::min<int64_t>(BLOCK, size - i)));
    float largest_logit = *std::max_element(maxima.begin(), maxima.end()), chosen_logit = load1<T>(x + chosen);
    Best best(k, kth_largest(maxima, k));
    double total = 0;
    int64_t larger = 0;
    for (int64_t i = 0, block = 0; i < size; i += BLOCK, block++) {
        int64_t n = std::min<int64_t>(BLOCK, size - i);
        total += block_weight(x + i, n, largest_logit);
        if (maxima[block] > chosen_logit) larger += block_larger(x + i, n, chosen_logit);
        if (best.takes(maxima[block])) best.offer_block(x + i, n, i);
    }
    if (total != total) best.give_up();
    double log_total = double(largest_logit) + std::log(total);
    token_ids[0] = chosen;
    logprobs[0] = float(chosen_logit - log_total);
    ranks[0] = larger + 1;
    for (int64_t i = 1; i <= k; i++) {
        token_ids[i] = best.list()[i - 1].token;
        logprobs[i] = float(best.list()[i - 1].logit - log_total);
        ranks[i] = i;
    }
}

template <class T>
void token_logprobs_rows(const T* logits, int64_t stride, const int64_t* chosen, int64_t k, int64_t* token_ids, float* logprobs,
                         int64_t* ranks, int64_t rows, int64_t size, int threads) {
    for_all(rows, threads, [&](int64_t r) {
        int64_t at = r * (1 + k);
        token_logprobs<T>(logits + r * stride, size, chosen[r], k, token_ids + at, logprobs + at, ranks + at);
    });
}

}  // namespace

// Sets to minus infinity what is not among the best tokens whose probabilities add up to p[row]; ties with the last one stay.
// A row with a NaN stays as it is.
extern "C" void kvloom_top_p(float* logits, const float* p, int64_t rows, int64_t size, int threads) {
    for_all(rows, threads, [&](int64_t r) {
        float* x = logits + r * size;
        float threshold = top_p_threshold(x, size, p[r]);
        for (int64_t i = 0; i < size; i++) x[i] = x[i] < threshold ? -INFINITY : x[i];
    });
}

// Each row by a number of its own.
extern "C" void kvloom_divide(float* logits, const float* by, int64_t rows, int64_t size, int threads) {
    for_all(rows, threads, [&](int64_t r) {
        float *x = logits + r * size, divisor = by[r];
        for (int64_t i = 0; i < size; i++) x[i] /= divisor;
    });
}

// The largest of each row and where it stands first; a row with NaN has NaN.
extern "C" void kvloom_best(const float* logits, float* best, int64_t* out, int64_t rows, int64_t size, int threads) {
    for_all(rows, threads, [&](int64_t r) { find_best(logits + r * size, size, best[r], out[r]); });
}

// The first token whose cumulative weight exceeds uniform[row] of the total; weights are e^(logit - best[row]).
extern "C" void kvloom_draw(const float* logits, const float* best, const double* uniform, int64_t* out, int64_t rows, int64_t size,
                            int threads) {
    for_all(rows, threads, [&](int64_t r) {
        const float* x = logits + r * size;
        std::vector<double> sums;
        double total = 0;
        for (int64_t i = 0; i < size; i += BLOCK) {
            sums.push_back(block_sum(x + i, std::min<int64_t>(BLOCK, size - i), best[r]));
            total += sums.back();
        }
        double target = uniform[r] * total, before = 0;
        size_t block = 0;
        while (block + 1 < sums.size() && before + sums[block] <= target) before += sums[block++];
        while (block > 0 && sums[block] == 0) before -= sums[--block];  // rounding at the very end: go back to what has weight
        int64_t first = int64_t(block) * BLOCK, n = std::min<int64_t>(BLOCK, size - first), token = first;
        bool found = false;
        for (int64_t i = 0; i < n && !found; i += LANES) {
            floats w = weights(x + first + i, n - i, best[r]);
            for (int j = 0; j < LANES && !found; j++) {
                if (w[j] > 0) token = first + i + j;
                before += w[j];
                found = w[j] > 0 && before > target;
            }
        }
        out[r] = token;
    });
}

// Log-probability and rank of chosen[row] and of the k best tokens of each row: outputs [rows, 1 + k], the chosen one first.
// `stride` is the distance of rows in elements; 0 <= chosen[row] < size, k <= size. NaN in a row: its log-probabilities are NaN.
extern "C" void kvloom_token_logprobs(const void* logits, int64_t stride, const int64_t* chosen, int64_t k, int64_t* token_ids,
                                      float* logprobs, int64_t* ranks, int64_t rows, int64_t size, int is_bf16, int threads) {
    if (is_bf16)
        token_logprobs_rows((const bf16*)logits, stride, chosen, k, token_ids, logprobs, ranks, rows, size, threads);
    else
        token_logprobs_rows((const float*)logits, stride, chosen, k, token_ids, logprobs, ranks, rows, size, threads);
}
