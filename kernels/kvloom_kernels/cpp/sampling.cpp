// Choosing from long vocabularies without sorting them: rows of float32 logits [rows, size].
#include "common.h"
#include <algorithm>
#include <cmath>
#include <vector>

namespace {

typedef double f64x16 __attribute__((vector_size(128)));

constexpr int BLOCK = 256;  // elements whose weights are summed before the running total moves on
constexpr int DIGITS = 11;  // bits of a key that are looked at in one pass; three passes see all 32
constexpr int BUCKETS = 1 << DIGITS;

// e^(x - best), 0 for what is out of reach: e^-87 is 1e-38 of the best.
inline f32x16 weights(const float* x, int n, float best) {
    f32x16 shifted = load_n<float>(x, n) - best;
    f32x16 w = exponential(shifted);
    const f32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return (shifted > -87.0f) & (lane < float(n)) ? w : f32x16{};
}

inline double block_sum(const float* x, int64_t n, float best) {
    f64x16 total = {};
    for (int64_t i = 0; i < n; i += LANES)
        total += __builtin_convertvector(weights(x + i, int(n - i < LANES ? n - i : LANES), best), f64x16);
    double sum = 0;
    for (int i = 0; i < LANES; i++) sum += total[i];
    return sum;
}

// Order-preserving integer of a float: larger floats have smaller keys.
inline uint32_t key_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits & 0x80000000u ? bits : ~(bits | 0x80000000u);
}

// The smallest logit that is kept: that of the token with which the mass of the best tokens reaches `wanted`.
float top_p_threshold(const float* x, int64_t size, float wanted) {
    float best = x[0];
    for (int64_t i = 1; i < size; i++) best = x[i] > best ? x[i] : best;
    std::vector<float> mass(size + LANES);
    std::vector<uint32_t> keys(size);
    double total = 0;
    for (int64_t i = 0; i < size; i += LANES) {
        int n = int(size - i < LANES ? size - i : LANES);
        f32x16 w = weights(x + i, n, best);
        store<float>(&mass[i], w);
        total += sum(w);
    }
    if (!(total > 0)) return best;  // nothing is allowed, or the row is broken: the sampler says so
    for (int64_t i = 0; i < size; i++) keys[i] = key_of(x[i]);
    double missing = wanted * total;
    std::vector<int32_t> alive;  // elements that share all digits chosen so far
    uint32_t chosen = 0;
    for (int shift = 32 - DIGITS, level = 0; level < 3; level++, shift = std::max(0, shift - DIGITS)) {
        double bucket[BUCKETS] = {};
        if (level == 0)
            for (int64_t i = 0; i < size; i++) bucket[keys[i] >> shift] += mass[i];
        else
            for (int32_t i : alive) bucket[(keys[i] >> shift) & (BUCKETS - 1)] += mass[i];
        int last = -1, b = 0;
        for (; b < BUCKETS; b++) {
            if (bucket[b] > 0) last = b;
            if (bucket[b] >= missing && bucket[b] > 0) break;
            missing -= bucket[b];
        }
        if (b == BUCKETS) b = last < 0 ? BUCKETS - 1 : last;  // rounding: everything is kept
        std::vector<int32_t> next;
        if (level == 0) {
            for (int64_t i = 0; i < size; i++)
                if (int(keys[i] >> shift) == b) next.push_back(int32_t(i));
        } else {
            for (int32_t i : alive)
                if (int((keys[i] >> shift) & (BUCKETS - 1)) == b) next.push_back(i);
        }
        alive.swap(next);
        chosen = keys[alive[0]];
        if (alive.size() == 1) break;
    }
    for (int32_t i : alive) chosen = std::max(chosen, keys[i]);
    for (int32_t i : alive)
        if (keys[i] == chosen) return x[i];
    return best;
}

}  // namespace

// Sets to minus infinity what is not among the best tokens whose probabilities add up to p[row]; ties with the last one stay.
extern "C" void kvloom_top_p(float* logits, const float* p, int64_t rows, int64_t size, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t r = 0; r < rows; r++) {
        float* x = logits + r * size;
        float threshold = top_p_threshold(x, size, p[r]);
        for (int64_t i = 0; i < size; i++) x[i] = x[i] >= threshold ? x[i] : -INFINITY;
    }
}

// The first token whose cumulative weight exceeds uniform[row] of the total; weights are e^(logit - best[row]).
extern "C" void kvloom_draw(const float* logits, const float* best, const double* uniform, int64_t* out, int64_t rows, int64_t size,
                            int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t r = 0; r < rows; r++) {
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
            f32x16 w = weights(x + first + i, int(std::min<int64_t>(LANES, n - i)), best[r]);
            for (int j = 0; j < LANES && !found; j++) {
                if (w[j] > 0) token = first + i + j;
                before += w[j];
                found = w[j] > 0 && before > target;
            }
        }
        out[r] = token;
    }
}
