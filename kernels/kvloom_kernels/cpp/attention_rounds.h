// One round of attention: some rows of queries against 64 keys of a paged cache, by vector instructions. attention_tiles.h has rounds of
// more keys by AMX. What is computed where is attention.cpp's.
#pragma once
#include "pairs.h"
#include <cmath>
#include <vector>

namespace {

constexpr int GROUPS = 64 / LANES;  // LANES keys each, in one round
constexpr float NONE = -INFINITY;

struct Attend {
    const void *q, *k_cache, *v_cache;
    const int32_t *tables, *query_starts, *contexts;
    const float* sinks;
    void* out;
    void* workspace;  // zeroed once; `workspace_bytes` of it
    int64_t workspace_bytes, q_stride, table_stride, rows, heads, kv_heads, dim, value_dim, block_tokens, window, causal, is_bf16;
    float scale, soft_cap;
};

inline int64_t whole(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
inline int64_t row_width(const Attend& s) { return whole(s.value_dim, LANES); }

// LANES keys and their values, and which of them any row of the item sees.
template <class T> struct Keys {
    const T *keys, *values;
    int64_t stride;  // elements from one step of `keys` to the next
    int64_t head_keys, head_values;  // elements from one head to the next, where an item has several
    int from, to;
    const T *next_keys, *next_values;  // what will be read one round later: fetched line by line meanwhile; or null

    Keys of_head(int h) const {
        Keys out = *this;
        out.keys += h * head_keys, out.values += h * head_values;
        if (next_keys) out.next_keys += h * head_keys, out.next_values += h * head_values;
        return out;
    }
};

// An item's rows: what they are, and the sums of one chunk.
template <class T> struct Queries {
    int count, heads;  // heads that the rows are of, each the same number
    int64_t q_steps;
    std::vector<typename Pairs<T>::Factor> q;  // [rows][steps]
    std::vector<int64_t> first, last;
    std::vector<float> best, total, out;
    std::vector<float> all_best, all_total, all_out;
};

// sums[r][n] += the factor of row r times what was read for n. Row by row: what was read stays in registers, a factor is needed once.
template <class T, int R, int N>
inline void multiply_all(floats (&sums)[R][N], const typename Pairs<T>::Factor* factors, int64_t row_factors, const typename Pairs<T>::Read (&read)[N]) {
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) Pairs<T>::multiply(sums[r][n], factors[r * row_factors], read[n]);
}

// Scores of R rows against each key of G groups, the first of which is the `place`-th of its round. Whatever R and G are, a score is one sum.
template <class T, int R, int G>
inline void scores_of(const Queries<T>& w, int m, const Keys<T>* groups, int place, bool fetches, float (*scores)[GROUPS * LANES]) {
    floats sums[R][G] = {};
    const auto* q = w.q.data() + m * w.q_steps;
    for (int64_t i = 0; i < w.q_steps; i++) {
        typename Pairs<T>::Read keys[G];
        for (int g = 0; g < G; g++) {
            if (fetches) __builtin_prefetch(groups[g].next_keys + i * groups[g].stride);
            keys[g] = Pairs<T>::read(groups[g].keys + i * groups[g].stride);
        }
        multiply_all<T, R, G>(sums, q + i, w.q_steps, keys);
    }
    for (int r = 0; r < R; r++)
        for (int g = 0; g < G; g++) store<float>(scores[r] + (place + g) * LANES, sums[r][g]);
}

// Weights of LANES keys as values take them, and what they are then.
inline floats as_factors(floats p, void* out) {
    store<float>((float*)out, p);
    return p;
}
#ifdef __AVX512BF16__
inline floats as_factors(floats p, uint32_t* out) {
    halves bits = narrow(p);
    std::memcpy(out, &bits, sizeof bits);
    return widen(bits);
}
#endif

// `count` columns of the values of a step; of a pair of keys only one if `only` says which.
template <class T> inline typename Pairs<T>::Read some_values(const T* values, int count, int only) {
    alignas(64) T v[LANES * SIDE<T>] = {};
    for (int i = 0; i < count; i++)
        for (int side = 0; side < SIDE<T>; side++)
            if (only < 0 || only == side) v[i * SIDE<T> + side] = values[i * SIDE<T> + side];
    return Pairs<T>::read(v);
}

// out[column...] += factors times values, over one group; C vectors of the result at a time.
template <class T, int R, int C>
inline void add_values(const Attend& s, const typename Pairs<T>::Factor (*factors)[GROUPS][LANES / SIDE<T>], int g,
                       const Keys<T>& k, float* out, int64_t column, bool fetches) {
    constexpr int ROW_FACTORS = GROUPS * LANES / SIDE<T>;
    int64_t width = row_width(s);
    bool is_narrow = C == 1 && s.value_dim - column < LANES;
    floats sums[R][C];
    typename Pairs<T>::Read read[C];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) sums[r][c] = load<float>(out + r * width + column + c * LANES);
    auto at = [&](const T* values, int j, int c) { return values + (j * s.value_dim + column + c * LANES) * SIDE<T>; };
    auto add_some = [&](int j, int only) {
        for (int c = 0; c < C; c++) read[c] = some_values(at(k.values, j, c), is_narrow ? int(s.value_dim - column) : LANES, only);
        multiply_all<T, R, C>(sums, &factors[0][g][j], ROW_FACTORS, read);
    };
    int j = k.from / SIDE<T>, end = k.to / SIDE<T>;
    if (j * SIDE<T> < k.from) add_some(j++, 1);  // the other key of the pair is nobody's
    for (; j < end; j++) {
        if (is_narrow) {
            add_some(j, -1);
            continue;
        }
        for (int c = 0; c < C; c++) {
            if (fetches) __builtin_prefetch(at(k.next_values, j, c));
            read[c] = Pairs<T>::read(at(k.values, j, c));
        }
        multiply_all<T, R, C>(sums, &factors[0][g][j], ROW_FACTORS, read);
    }
    if (j * SIDE<T> < k.to) add_some(j, 0);
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) store<float>(out + r * width + column + c * LANES, sums[r][c]);
}

// e^(p - best): how much the values of LANES keys count; exactly 0 where p is NONE.
template <class T> inline floats shares(floats p, float best) { return p > NONE ? exponential(p - best) : floats{}; }
#ifdef __AVX512F__
// What is rounded to bfloat16 needs no more than a relative error of 3e-6.
template <> inline floats shares<bf16>(floats p, float best) {
    constexpr float LOG2_E = 1.44269504f, LEAST = -125.0f;  // no denormal numbers, which take a hundred times as long
    __m512 x = (__m512)((p - best) * LOG2_E);
    x = _mm512_max_ps((__m512)splat(LEAST), x);  // no number stays none
    __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    floats r = (floats)_mm512_sub_ps(x, n), y = splat(9.58285e-3f);
    y = y * r + 5.590643e-2f;
    y = y * r + 2.4024099e-1f;
    y = y * r + 6.9312419e-1f;
    y = y * r + 1.0f;
    __mmask16 seen = _mm512_cmp_ps_mask((__m512)p, (__m512)splat(NONE), _CMP_NEQ_UQ);
    return (floats)_mm512_maskz_scalef_ps(seen, (__m512)y, n);
}
#endif

inline void cap(floats& x, float soft_cap) {
    for (int j = 0; j < LANES; j++) x[j] = soft_cap * std::tanh(x[j] / soft_cap);
}

// Scores of one row against a round's keys -> the factors of their values, and the row's sums made ready for them.
template <class T>
inline void softmax_round(const Attend& s, Queries<T>& w, int m, float* scores, const Keys<T>* groups, int count, const int64_t* positions,
                          typename Pairs<T>::Factor* factors) {
    const floats lane = counted();
    floats most = splat(NONE);
    for (int g = 0; g < count; g++) {
        floats p = load<float>(scores + g * LANES) * s.scale;
        if (s.soft_cap > 0) cap(p, s.soft_cap);
        float from = float(w.first[m] - positions[g]), to = float(w.last[m] - positions[g]);
        to = to < float(groups[g].to) ? to : float(groups[g].to);
        if (from > 0 || to < LANES) p = (lane >= splat(from)) & (lane < splat(to)) ? p : splat(NONE);
        most = p > most ? p : most;
        store<float>(scores + g * LANES, p);
    }
    float before = w.best[m], best = largest(most);
    best = best > before ? best : before;
    floats total = {};
    for (int g = 0; g < count; g++) {
        floats p = load<float>(scores + g * LANES);
        total += as_factors(shares<T>(p, best), factors + g * (LANES / SIDE<T>));
    }
    if (best > before && before != NONE) {
        int64_t width = row_width(s);
        float shrink = std::exp(before - best), *out = w.out.data() + m * width;
        w.total[m] *= shrink;
        for (int64_t d = 0; d < width; d += LANES) store<float>(out + d, load<float>(out + d) * shrink);
    }
    w.best[m] = best;
    w.total[m] += sum(total);
}

// Rows [m, m + R) of an item against the groups of one round, which begin at `positions`. Whoever is the first with them fetches what
// comes one round later.
template <class T, int R>
void one_round(const Attend& s, Queries<T>& w, int m, const Keys<T>* groups, int count, const int64_t* positions, bool is_first) {
    alignas(64) float scores[R][GROUPS * LANES];
    constexpr int G = R < 3 ? 4 : 2;  // as many sums as hide the latency of each
    int g = 0;
    for (; g + G <= count; g += G) scores_of<T, R, G>(w, m, groups + g, g, is_first && groups[g + G - 1].next_keys, scores);
    for (; g < count; g++) scores_of<T, R, 1>(w, m, groups + g, g, is_first && groups[g].next_keys, scores);
    typename Pairs<T>::Factor factors[R][GROUPS][LANES / SIDE<T>];
    for (int r = 0; r < R; r++) softmax_round<T>(s, w, m + r, scores[r], groups, count, positions, factors[r][0]);
    constexpr int C = LANES == 16 || R == 1 ? 4 : 2;  // as many sums as there are registers for
    float* out = w.out.data() + m * row_width(s);
    for (g = 0; g < count; g++) {
        int64_t column = 0;
        bool fetches = is_first && groups[g].next_values;
        for (; column + C * LANES <= s.value_dim; column += C * LANES) add_values<T, R, C>(s, factors, g, groups[g], out, column, fetches);
        for (; column < s.value_dim; column += LANES) add_values<T, R, 1>(s, factors, g, groups[g], out, column, fetches);
    }
}

// All rows of an item against one round.
template <class T> struct RoundByVectors {
    static constexpr int GROUPS_AT_ONCE = GROUPS;
    static constexpr int64_t ROW_UNIT = 1;  // rows that the buffers are padded to

    void operator()(const Attend& s, Queries<T>& w, const Keys<T>* groups, int count, const int64_t* positions) {
        int rows = w.count / w.heads;
        head(s, w, 0, rows, groups, count, positions);
        Keys<T> of_head[GROUPS];
        for (int h = 1; h < w.heads; h++) {
            for (int g = 0; g < count; g++) of_head[g] = groups[g].of_head(h);
            head(s, w, h * rows, (h + 1) * rows, of_head, count, positions);
        }
    }

private:
    static void head(const Attend& s, Queries<T>& w, int m, int end, const Keys<T>* groups, int count, const int64_t* positions) {
        int first = m;
        for (; m + 4 <= end; m += 4) one_round<T, 4>(s, w, m, groups, count, positions, m == first);
        if (end - m == 3) one_round<T, 3>(s, w, m, groups, count, positions, m == first);
        if (end - m == 2) one_round<T, 2>(s, w, m, groups, count, positions, m == first);
        if (end - m == 1) one_round<T, 1>(s, w, m, groups, count, positions, m == first);
    }
};

}  // namespace
