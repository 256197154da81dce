// One round of attention: some rows of queries against 64 keys of a paged cache, by vector instructions. attention_tiles.h has rounds of
// more keys by AMX. What is computed where is attention.cpp's.
#pragma once
#include "pairs.h"
#include <cmath>
#include <vector>

namespace {

constexpr int GROUPS = 4;  // 16 keys each, in one round
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

// 16 keys and their values, and which of them any row of the item sees.
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
template <class T> struct Rows {
    int count, heads;  // heads that the rows are of, each the same number
    int64_t q_steps;
    std::vector<typename Pairs<T>::Scalar> q;  // [rows][steps]
    std::vector<int64_t> first, last;
    std::vector<float> best, total, out;
    std::vector<float> all_best, all_total, all_out;
};

template <class T, int R> inline void scores_of(const Rows<T>& w, int m, const Keys<T>& k, f32x16* scores) {
    f32x16 even[R] = {}, odd[R] = {};  // two sums a row hide the latency of few rows
    const auto* q = w.q.data() + m * w.q_steps;
    int64_t i = 0;
    const T* next = m == 0 ? k.next_keys : nullptr;
    for (; i + 1 < w.q_steps; i += 2) {
        if (next) {
            __builtin_prefetch(next + i * k.stride);
            __builtin_prefetch(next + (i + 1) * k.stride);
        }
        for (int r = 0; r < R; r++) {
            Pairs<T>::multiply(even[r], q[r * w.q_steps + i], k.keys + i * k.stride);
            Pairs<T>::multiply(odd[r], q[r * w.q_steps + i + 1], k.keys + (i + 1) * k.stride);
        }
    }
    if (i < w.q_steps)
        for (int r = 0; r < R; r++) Pairs<T>::multiply(even[r], q[r * w.q_steps + i], k.keys + i * k.stride);
    for (int r = 0; r < R; r++) scores[r] = even[r] + odd[r];
}

// Weights of 16 keys as values take them, and what they are then.
inline f32x16 as_factors(f32x16 p, float* out) {
    store<float>(out, p);
    return p;
}
inline f32x16 as_factors(f32x16 p, uint32_t* out) {
    u16x16 bits = narrow(p);
    std::memcpy(out, &bits, sizeof bits);
    return widen(bits);
}

// out[column...] += factors times values, over one group; C vectors of the result at a time.
template <class T, int R, int C>
inline void add_values(const Attend& s, const typename Pairs<T>::Scalar (*factors)[GROUPS][LANES / Pairs<T>::SIDE], int g,
                       const Keys<T>& k, float* out, int64_t column, bool fetches) {
    constexpr int SIDE = Pairs<T>::SIDE;
    int64_t width = row_width(s);
    f32x16 sums[R][C];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) sums[r][c] = load<float>(out + r * width + column + c * LANES);
    for (int j = k.from / SIDE; j * SIDE < k.to; j++) {
        bool is_cut = j * SIDE < k.from || (j + 1) * SIDE > k.to;  // half of the pair is nobody's
        for (int c = 0; c < C; c++) {
            int64_t at = column + c * LANES;
            alignas(64) T v[LANES * SIDE] = {};
            const T* values = k.values + (j * s.value_dim + at) * SIDE;
            if (fetches) __builtin_prefetch(k.next_values + (j * s.value_dim + at) * SIDE);
            int count = s.value_dim - at < LANES ? int(s.value_dim - at) : LANES;
            if (is_cut || count < LANES) {
                int keep = j * SIDE < k.from ? 1 : 0;
                for (int i = 0; i < count; i++)
                    if (is_cut)
                        v[i * SIDE + keep] = values[i * SIDE + keep];
                    else
                        std::memcpy(v + i * SIDE, values + i * SIDE, SIDE * sizeof(T));
                values = v;
            }
            for (int r = 0; r < R; r++) Pairs<T>::multiply(sums[r][c], factors[r][g][j], values);
        }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) store<float>(out + r * width + column + c * LANES, sums[r][c]);
}

// e^(p - best): how much the values of 16 keys count; exactly 0 where p is NONE.
template <class T> inline f32x16 shares(f32x16 p, float best) { return p > NONE ? exponential(p - best) : f32x16{}; }
#ifdef __AVX512F__
// What is rounded to bfloat16 needs no more than a relative error of 3e-6.
template <> inline f32x16 shares<bf16>(f32x16 p, float best) {
    constexpr float LOG2_E = 1.44269504f, LEAST = -125.0f;  // no denormal numbers, which take a hundred times as long
    __m512 x = (__m512)((p - best) * LOG2_E);
    x = _mm512_max_ps((__m512)splat(LEAST), x);  // no number stays none
    __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    f32x16 r = (f32x16)_mm512_sub_ps(x, n), y = splat(9.58285e-3f);
    y = y * r + 5.590643e-2f;
    y = y * r + 2.4024099e-1f;
    y = y * r + 6.9312419e-1f;
    y = y * r + 1.0f;
    __mmask16 seen = _mm512_cmp_ps_mask((__m512)p, (__m512)splat(NONE), _CMP_NEQ_UQ);
    return (f32x16)_mm512_maskz_scalef_ps(seen, (__m512)y, n);
}
#endif

inline void cap(f32x16& x, float soft_cap) {
    for (int j = 0; j < LANES; j++) x[j] = soft_cap * std::tanh(x[j] / soft_cap);
}

// Scores of one row against a round's keys -> the factors of their values, and the row's sums made ready for them.
template <class T>
inline void softmax_round(const Attend& s, Rows<T>& w, int m, float* scores, const Keys<T>* groups, int count, const int64_t* positions,
                          typename Pairs<T>::Scalar* factors) {
    const f32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    f32x16 most = splat(NONE);
    for (int g = 0; g < count; g++) {
        f32x16 p = load<float>(scores + g * LANES) * s.scale;
        if (s.soft_cap > 0) cap(p, s.soft_cap);
        float from = float(w.first[m] - positions[g]), to = float(w.last[m] - positions[g]);
        to = to < float(groups[g].to) ? to : float(groups[g].to);
        if (from > 0 || to < LANES) p = (lane >= splat(from)) & (lane < splat(to)) ? p : splat(NONE);
        most = p > most ? p : most;
        store<float>(scores + g * LANES, p);
    }
    float before = w.best[m], best = largest(most);
    best = best > before ? best : before;
    f32x16 total = {};
    for (int g = 0; g < count; g++) {
        f32x16 p = load<float>(scores + g * LANES);
        total += as_factors(shares<T>(p, best), factors + g * (LANES / Pairs<T>::SIDE));
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

// Rows [m, m + R) of an item against the groups of one round, which begin at `positions`.
template <class T, int R>
void one_round(const Attend& s, Rows<T>& w, int m, const Keys<T>* groups, int count, const int64_t* positions) {
    f32x16 p[GROUPS][R];
    for (int g = 0; g < count; g++) scores_of<T, R>(w, m, groups[g], p[g]);
    typename Pairs<T>::Scalar factors[R][GROUPS][LANES / Pairs<T>::SIDE];
    for (int r = 0; r < R; r++) {
        alignas(64) float scores[GROUPS * LANES];
        for (int g = 0; g < count; g++) store<float>(scores + g * LANES, p[g][r]);
        softmax_round<T>(s, w, m + r, scores, groups, count, positions, factors[r][0]);
    }
    float* out = w.out.data() + m * row_width(s);
    for (int g = 0; g < count; g++) {
        int64_t column = 0;
        bool fetches = m == 0 && groups[g].next_values;
        for (; column + 4 * LANES <= s.value_dim; column += 4 * LANES) add_values<T, R, 4>(s, factors, g, groups[g], out, column, fetches);
        for (; column < s.value_dim; column += LANES) add_values<T, R, 1>(s, factors, g, groups[g], out, column, fetches);
    }
}

// All rows of an item against one round.
template <class T> struct RoundByVectors {
    static constexpr int GROUPS_AT_ONCE = GROUPS;
    static constexpr int64_t ROW_UNIT = 1;  // rows that the buffers are padded to

    void operator()(const Attend& s, Rows<T>& w, const Keys<T>* groups, int count, const int64_t* positions) {
        int rows = w.count / w.heads;
        head(s, w, 0, rows, groups, count, positions);
        Keys<T> of_head[GROUPS];
        for (int h = 1; h < w.heads; h++) {
            for (int g = 0; g < count; g++) of_head[g] = groups[g].of_head(h);
            head(s, w, h * rows, (h + 1) * rows, of_head, count, positions);
        }
    }

private:
    static void head(const Attend& s, Rows<T>& w, int m, int end, const Keys<T>* groups, int count, const int64_t* positions) {
        for (; m + 4 <= end; m += 4) one_round<T, 4>(s, w, m, groups, count, positions);
        if (end - m == 3) one_round<T, 3>(s, w, m, groups, count, positions);
        if (end - m == 2) one_round<T, 2>(s, w, m, groups, count, positions);
        if (end - m == 1) one_round<T, 1>(s, w, m, groups, count, positions);
    }
};

}  // namespace
