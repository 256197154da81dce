// Attention over a paged KV cache, decode and prompts alike.
//
// One work item is (row, kv head, some of the row's query tokens); all query heads that read the kv head are its M rows. Keys are
// read 16 positions at a time: lanes are key positions for the scores and elements of a value head for the result. Softmax is
// computed on the way (Milakov and Gimelshein, 2018). Slots that no query of the item sees are never multiplied, whatever they hold.
#include "common.h"
#include <cmath>
#include <vector>

namespace {

constexpr int MAX_ROWS = 64;  // query rows of an item: enough to use each key load, small enough for the first-level cache
constexpr float NONE = -INFINITY;

struct Shape {
    int64_t heads, kv_heads, dim, value_dim, block_tokens, window;
    float scale, soft_cap;
    int causal;
};

// Elements of one result row: whole vectors.
inline int64_t row_width(int64_t value_dim) { return (value_dim + LANES - 1) / LANES * LANES; }

struct Item {
    int64_t row, kv_head, first_token, num_tokens;  // tokens of the row's range
};

// Key positions that a query at `position` sees: [first, last).
inline int64_t first_seen(const Shape& s, int64_t position) {
    return s.window && position - s.window + 1 > 0 ? position - s.window + 1 : 0;
}
inline int64_t last_seen(const Shape& s, int64_t position, int64_t context) {
    if (s.causal) return position + 1;
    return s.window && position + s.window < context ? position + s.window : context;
}

struct Work {
    std::vector<float> q, out, best, total;
    std::vector<int64_t> first, last;
};

// R rows of scores against 16 keys stored [dim][stride]. Two accumulators a row hide the latency of small R.
template <class T, int R>
inline void dot(const float* q, int64_t q_stride, const T* keys, int64_t stride, int64_t dim, f32x16* s) {
    f32x16 even[R] = {}, odd[R] = {};
    int64_t d = 0;
    for (; d + 1 < dim; d += 2) {
        f32x16 k0 = load<T>(keys + d * stride), k1 = load<T>(keys + (d + 1) * stride);
        for (int r = 0; r < R; r++) {
            even[r] += q[r * q_stride + d] * k0;
            odd[r] += q[r * q_stride + d + 1] * k1;
        }
    }
    if (d < dim) {
        f32x16 k0 = load<T>(keys + d * stride);
        for (int r = 0; r < R; r++) even[r] += q[r * q_stride + d] * k0;
    }
    for (int r = 0; r < R; r++) s[r] = even[r] + odd[r];
}

// out[r] += p[r][j] * values[j] for j in [from, to); values stored [16][value_dim].
template <class T, int R, int C>
inline void add_values(const f32x16* p, const T* values, int64_t value_dim, int from, int to, float* out, int64_t column) {
    f32x16 sum[R][C];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) sum[r][c] = load<float>(out + r * row_width(value_dim) + column + c * LANES);
    for (int j = from; j < to; j++) {
        f32x16 v[C];
        for (int c = 0; c < C; c++) {
            int64_t at = column + c * LANES;
            v[c] = load_n<T>(values + j * value_dim + at, C > 1 ? LANES : int(value_dim - at));
        }
        for (int r = 0; r < R; r++)
            for (int c = 0; c < C; c++) sum[r][c] += p[r][j] * v[c];
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) store<float>(out + r * row_width(value_dim) + column + c * LANES, sum[r][c]);
}

// Rows [m, m + R) of an item against up to 16 keys from `position` on.
template <class T, int R>
void rows_against_keys(const Shape& s, Work& w, int m, const T* keys, int64_t key_stride, const T* values, int64_t position,
                       int count) {
    int64_t from = position + count, to = position;
    for (int r = 0; r < R; r++) {
        from = w.first[m + r] < from ? w.first[m + r] : from;
        to = w.last[m + r] > to ? w.last[m + r] : to;
    }
    from = from < position ? position : from;
    to = to > position + count ? position + count : to;
    if (from >= to) return;
    f32x16 p[R];
    dot<T, R>(w.q.data() + m * s.dim, s.dim, keys, key_stride, s.dim, p);
    const f32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    int64_t width = row_width(s.value_dim);
    for (int r = 0; r < R; r++) {
        if (s.soft_cap > 0)
            for (int j = 0; j < LANES; j++) p[r][j] = s.soft_cap * std::tanh(p[r][j] / s.soft_cap);
        i32x16 seen = (lane >= splat(float(w.first[m + r] - position))) & (lane < splat(float(w.last[m + r] - position))) &
                      (lane < splat(float(count)));
        p[r] = seen ? p[r] : splat(NONE);
        float before = w.best[m + r], best = largest(p[r]);
        best = best > before ? best : before;
        if (best == NONE) {  // nothing seen so far
            p[r] = f32x16{};
            continue;
        }
        if (best > before) {
            float shrink = before == NONE ? 0.0f : std::exp(before - best);
            w.total[m + r] *= shrink;
            float* out = w.out.data() + (m + r) * width;
            for (int64_t d = 0; d < width; d += LANES) store<float>(out + d, load<float>(out + d) * shrink);
            w.best[m + r] = best;
        }
        p[r] = seen ? exponential(p[r] - best) : f32x16{};
        w.total[m + r] += sum(p[r]);
    }
    float* out = w.out.data() + m * width;
    int a = int(from - position), b = int(to - position);
    int64_t column = 0;
    for (; column + 4 * LANES <= s.value_dim; column += 4 * LANES)
        add_values<T, R, 4>(p, values, s.value_dim, a, b, out, column);
    for (; column < s.value_dim; column += LANES) add_values<T, R, 1>(p, values, s.value_dim, a, b, out, column);
}

template <class T>
void all_rows(const Shape& s, Work& w, int rows, const T* keys, int64_t key_stride, const T* values, int64_t position, int count) {
    int m = 0;
    for (; m + 4 <= rows; m += 4) rows_against_keys<T, 4>(s, w, m, keys, key_stride, values, position, count);
    if (rows - m == 3) rows_against_keys<T, 3>(s, w, m, keys, key_stride, values, position, count);
    if (rows - m == 2) rows_against_keys<T, 2>(s, w, m, keys, key_stride, values, position, count);
    if (rows - m == 1) rows_against_keys<T, 1>(s, w, m, keys, key_stride, values, position, count);
}

template <class T> inline void prefetch(const T* p, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(p + i);
}

// One item. Arguments as in `attend` below.
template <class T>
void compute(const Shape& s, const Item& item, Work& w, const T* q, int64_t q_token_stride, const T* k_cache, const T* v_cache,
             const int32_t* table, int64_t query_start, int64_t query_tokens, int64_t context, const float* sinks, T* out) {
    int64_t group = s.heads / s.kv_heads, width = row_width(s.value_dim);
    int rows = int(item.num_tokens * group);
    w.q.resize(rows * s.dim);
    w.out.assign(rows * width, 0.0f);
    w.best.assign(rows, NONE);
    w.total.assign(rows, 0.0f);
    w.first.resize(rows);
    w.last.resize(rows);
    for (int m = 0; m < rows; m++) {
        int64_t token = item.first_token + m / group, head = item.kv_head * group + m % group;
        int64_t position = context - query_tokens + token;
        w.first[m] = first_seen(s, position);
        w.last[m] = last_seen(s, position, context);
        const T* from = q + (query_start + token) * q_token_stride + head * s.dim;
        for (int64_t d = 0; d < s.dim; d++) w.q[m * s.dim + d] = load1<T>(from + d) * s.scale;
    }
    int64_t block_keys = s.dim * s.block_tokens, block_values = s.value_dim * s.block_tokens;
    std::vector<T> padded;
    if (s.block_tokens % LANES) padded.assign(s.dim * LANES, T{});
    for (int64_t block = w.first[0] / s.block_tokens; block * s.block_tokens < w.last[rows - 1]; block++) {
        const T* keys = k_cache + (table[block] * s.kv_heads + item.kv_head) * block_keys;
        const T* values = v_cache + (table[block] * s.kv_heads + item.kv_head) * block_values;
        if ((block + 1) * s.block_tokens < w.last[rows - 1]) {  // the table jumps about: the hardware cannot guess the next block
            prefetch(k_cache + (table[block + 1] * s.kv_heads + item.kv_head) * block_keys, block_keys);
            prefetch(v_cache + (table[block + 1] * s.kv_heads + item.kv_head) * block_values, block_values);
        }
        for (int64_t offset = 0; offset < s.block_tokens; offset += LANES) {
            int64_t position = block * s.block_tokens + offset;
            int count = int(s.block_tokens - offset < LANES ? s.block_tokens - offset : LANES);
            if (position + count <= w.first[0] || position >= w.last[rows - 1]) continue;
            const T* part = keys + offset;
            int64_t stride = s.block_tokens;
            if (s.block_tokens % LANES) {  // a 16-lane load would run over the end of the block
                for (int64_t d = 0; d < s.dim; d++) std::memcpy(&padded[d * LANES], keys + d * s.block_tokens + offset, count * sizeof(T));
                part = padded.data();
                stride = LANES;
            }
            all_rows<T>(s, w, rows, part, stride, values + offset * s.value_dim, position, count);
        }
    }
    for (int m = 0; m < rows; m++) {
        int64_t token = item.first_token + m / group, head = item.kv_head * group + m % group;
        float total = w.total[m], factor = 1.0f;
        if (sinks) {
            float best = w.best[m] > sinks[head] ? w.best[m] : sinks[head];
            factor = std::exp(w.best[m] - best);
            total = total * factor + std::exp(sinks[head] - best);
        }
        T* to = out + ((query_start + token) * s.heads + head) * s.value_dim;
        for (int64_t d = 0; d < s.value_dim; d += LANES)
            store_n<T>(to + d, load<float>(w.out.data() + m * width + d) * (factor / total), int(s.value_dim - d));
    }
}

template <class T>
void attend_all(const Shape& s, const T* q, int64_t q_token_stride, const T* k_cache, const T* v_cache, const int32_t* tables,
                int64_t table_stride, const int32_t* query_starts, const int32_t* contexts, int64_t rows, const float* sinks, T* out,
                int threads) {
    std::vector<Item> items;
    int64_t group = s.heads / s.kv_heads, most = MAX_ROWS / group > 0 ? MAX_ROWS / group : 1;
    for (int64_t row = 0; row < rows; row++) {
        int64_t tokens = query_starts[row + 1] - query_starts[row];
        for (int64_t first = 0; first < tokens; first += most)
            for (int64_t head = 0; head < s.kv_heads; head++)
                items.push_back({row, head, first, tokens - first < most ? tokens - first : most});
    }
#pragma omp parallel num_threads(threads)
    {
        Work w;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < int64_t(items.size()); i++) {
            int64_t row = items[i].row;
            compute<T>(s, items[i], w, q, q_token_stride, k_cache, v_cache, tables + row * table_stride, query_starts[row],
                       query_starts[row + 1] - query_starts[row], contexts[row], sinks, out);
        }
    }
}

}  // namespace

// q [T, heads, dim] with a token stride; k_cache [N, kv_heads, dim, block_tokens]; v_cache [N, kv_heads, block_tokens, value_dim];
// tables [rows, table_stride]; query_starts [rows + 1]; contexts [rows]; sinks [heads] or null; out [T, heads, value_dim].
// window 0 and soft_cap 0 mean none. is_bf16 chooses bfloat16 or float32 for q, caches and out.
extern "C" void kvloom_attend(const void* q, int64_t q_token_stride, const void* k_cache, const void* v_cache, const int32_t* tables,
                              int64_t table_stride, const int32_t* query_starts, const int32_t* contexts, int64_t rows,
                              int64_t heads, int64_t kv_heads, int64_t dim, int64_t value_dim, int64_t block_tokens, int64_t window,
                              float scale, float soft_cap, int causal, const float* sinks, void* out, int is_bf16, int threads) {
    Shape s{heads, kv_heads, dim, value_dim, block_tokens, window, scale, soft_cap, causal};
    if (is_bf16)
        attend_all<bf16>(s, (const bf16*)q, q_token_stride, (const bf16*)k_cache, (const bf16*)v_cache, tables, table_stride,
                         query_starts, contexts, rows, sinks, (bf16*)out, threads);
    else
        attend_all<float>(s, (const float*)q, q_token_stride, (const float*)k_cache, (const float*)v_cache, tables, table_stride,
                          query_starts, contexts, rows, sinks, (float*)out, threads);
}
