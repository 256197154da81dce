// Attention over a step's own keys and values: nothing is stored, every query sees tokens of its own row only.
//
// One work item is (row, kv head, some of the row's query tokens). Lanes are queries, 16 in some vectors: a key or value element is multiplied
// with all of them at once, and the softmax over the keys needs no sums across lanes. The scores of 16 queries against all their keys lie in one
// buffer: largest, exponentials, sum, and the division at the end. Keys and values are copied once an item, side by side as float32:
// where they come from, heads lie so far apart that they would push each other out of the cache.
#include "common.h"
#include "team.h"
#include <cmath>
#include <vector>

namespace {

constexpr int64_t ITEM_TOKENS = 256;  // query tokens of an item: the copy is paid for, and long rows are still divided
constexpr int QUERIES = 16, VECTORS = QUERIES / LANES;
constexpr int SUMS = 8 / VECTORS;  // keys, or elements of a value, at a time: as many independent sums as the latency needs
constexpr int64_t NO_WINDOW = INT32_MAX / 2;

struct Shape {
    int64_t heads, kv_heads, dim, value_dim, window;
    float scale, soft_cap;
    int causal;
};

template <class T> struct Heads {
    T* data;
    int64_t token_stride;
};

struct Item {
    int64_t row, kv_head, first, last;  // query tokens [first, last) of the row
};

struct Work {
    std::vector<float> keys, values, queries, scores, results;  // results: [value_dim][QUERIES]
};

inline int64_t whole(int64_t elements) { return (elements + LANES - 1) / LANES * LANES; }

// Keys that the query at `position` of a row of `tokens` tokens sees: [first_seen, last_seen).
inline int64_t first_seen(const Shape& s, int64_t position) { return position - s.window + 1 > 0 ? position - s.window + 1 : 0; }
inline int64_t last_seen(const Shape& s, int64_t position, int64_t tokens) {
    int64_t last = s.causal ? position + 1 : position + s.window;
    return last < tokens ? last : tokens;
}

// Tokens [from, to) of one head as float32, [token][dim rounded up to whole vectors].
template <class T> void copy_head(std::vector<float>& out, Heads<const T> x, int64_t dim, int64_t from, int64_t to) {
    int64_t width = whole(dim);
    out.resize((to - from) * width);
    for (int64_t t = from; t < to; t++)
        for (int64_t d = 0; d < dim; d += LANES)
            store<float>(&out[(t - from) * width + d], load_n<T>(x.data + t * x.token_stride + d, int(dim - d)));
}

// scores[j][query] = keys[j] . query for N keys; queries are [dim][QUERIES].
template <int N> __attribute__((noinline)) void dots(const float* queries, int64_t dim, const float* keys, int64_t width, float* scores) {
    floats sums[N][VECTORS] = {}, q[VECTORS];
    for (int64_t d = 0; d < dim; d++) {
        for (int v = 0; v < VECTORS; v++) q[v] = in_register(load<float>(queries + d * QUERIES + v * LANES));
        for (int j = 0; j < N; j++)
            for (int v = 0; v < VECTORS; v++) add_product(sums[j][v], keys[j * width + d], q[v]);
    }
    for (int j = 0; j < N; j++)
        for (int v = 0; v < VECTORS; v++) store<float>(scores + j * QUERIES + v * LANES, sums[j][v]);
}

// Scores [count][QUERIES] of a vector of queries to weights e^(score - largest); of lane i the keys [first[i], last[i]) are seen, others
// get 0. Sums by lane.
inline floats weigh(const Shape& s, float* scores, int64_t count, ints first, ints last, bool all_seen) {
    floats most = splat(-INFINITY), total = {};
    for (int32_t j = 0; j < count; j++) {
        floats x = load<float>(scores + j * QUERIES);
        if (s.soft_cap > 0)
            for (int i = 0; i < LANES; i++) x[i] = s.soft_cap * std::tanh(x[i] / s.soft_cap);
        if (!all_seen) x = (first <= j) & (last > j) ? x : splat(-INFINITY);
        if (s.soft_cap > 0 || !all_seen) store<float>(scores + j * QUERIES, x);
        most = x > most ? x : most;
    }
    for (int64_t j = 0; j < count; j++) {
        floats x = load<float>(scores + j * QUERIES), weight = exponential(x - most);
        if (!all_seen) weight = x == -INFINITY ? floats{} : weight;
        store<float>(scores + j * QUERIES, weight);
        total += weight;
    }
    return total;
}

// Elements [column, column + SUMS) of the results of all queries, [SUMS][QUERIES]: sum of weights[j][query] * values[j] over the keys.
__attribute__((noinline)) void add_values(const float* weights, int64_t count, const float* values, int64_t width, const floats* totals, float* out) {
    floats sums[SUMS][VECTORS] = {}, weight[VECTORS];
    for (int64_t j = 0; j < count; j++) {
        for (int v = 0; v < VECTORS; v++) weight[v] = in_register(load<float>(weights + j * QUERIES + v * LANES));
        for (int d = 0; d < SUMS; d++)
            for (int v = 0; v < VECTORS; v++) add_product(sums[d][v], values[j * width + d], weight[v]);
    }
    for (int d = 0; d < SUMS; d++)
        for (int v = 0; v < VECTORS; v++) store<float>(out + d * QUERIES + v * LANES, sums[d][v] / totals[v]);
}

// One item. q, k, v and out begin at the row's first token and at the heads that belong to the item's kv head; the row has `tokens`.
template <class T>
void compute(const Shape& s, const Item& item, Work& w, Heads<const T> q, Heads<const T> k, Heads<const T> v, int64_t tokens,
             Heads<T> out) {
    int64_t group = s.heads / s.kv_heads, rows = (item.last - item.first) * group;
    int64_t width = whole(s.dim), value_width = whole(s.value_dim);
    int64_t begin = first_seen(s, item.first), end = last_seen(s, item.last - 1, tokens);
    copy_head<T>(w.keys, k, s.dim, begin, end);
    copy_head<T>(w.values, v, s.value_dim, begin, end);
    w.queries.resize(width * QUERIES);
    w.results.resize(value_width * QUERIES);
    w.scores.resize((end - begin) * QUERIES);
    for (int64_t m = 0; m < rows; m += QUERIES) {  // (token, head) pairs
        int count = int(rows - m < QUERIES ? rows - m : QUERIES);
        auto token = [&](int i) { return item.first + (m + (i < count ? i : count - 1)) / group; };  // missing lanes repeat the last
        auto head = [&](int i) { return (m + (i < count ? i : count - 1)) % group; };
        for (int i = 0; i < QUERIES; i++)
            for (int64_t d = 0; d < s.dim; d++)
                w.queries[d * QUERIES + i] = load1<T>(q.data + token(i) * q.token_stride + head(i) * s.dim + d) * s.scale;
        int64_t from = first_seen(s, token(0)), to = last_seen(s, token(count - 1), tokens);  // both grow with the token
        const float *keys = &w.keys[(from - begin) * width], *values = &w.values[(from - begin) * value_width];
        int64_t j = 0;
        for (; j + SUMS <= to - from; j += SUMS) dots<SUMS>(w.queries.data(), s.dim, keys + j * width, width, &w.scores[j * QUERIES]);
        for (; j < to - from; j++) dots<1>(w.queries.data(), s.dim, keys + j * width, width, &w.scores[j * QUERIES]);
        floats totals[VECTORS];
        for (int v = 0; v < VECTORS; v++) {
            ints first, last;
            bool all_seen = true;
            for (int i = 0; i < LANES; i++) {
                first[i] = int32_t(first_seen(s, token(v * LANES + i)) - from);
                last[i] = int32_t(last_seen(s, token(v * LANES + i), tokens) - from);
                all_seen &= first[i] == 0 && last[i] == to - from;
            }
            totals[v] = weigh(s, w.scores.data() + v * LANES, to - from, first, last, all_seen);
        }
        for (int64_t d = 0; d < s.value_dim; d += SUMS)
            add_values(w.scores.data(), to - from, values + d, value_width, totals, &w.results[d * QUERIES]);
        for (int i = 0; i < count; i++) {
            T* to = out.data + token(i) * out.token_stride + head(i) * s.value_dim;
            for (int64_t d = 0; d < s.value_dim; d++) store1<T>(to + d, w.results[d * QUERIES + i]);
        }
    }
}

template <class T>
void attend_tokens(const Shape& s, Heads<const T> q, Heads<const T> k, Heads<const T> v, const int32_t* starts, int64_t rows,
                   Heads<T> out, int threads) {
    std::vector<Item> items;
    int64_t group = s.heads / s.kv_heads;
    for (int64_t row = 0; row < rows; row++) {
        int64_t tokens = starts[row + 1] - starts[row];
        for (int64_t first = 0; first < tokens; first += ITEM_TOKENS)
            for (int64_t head = 0; head < s.kv_heads; head++)
                items.push_back({row, head, first, tokens - first < ITEM_TOKENS ? tokens : first + ITEM_TOKENS});
    }
    in_team(threads, [&](const Team& team) {
        Work w;
        for (int64_t i; (i = team.take(1)) < int64_t(items.size());) {
            int64_t start = starts[items[i].row], tokens = starts[items[i].row + 1] - start, head = items[i].kv_head;
            auto part = [&](auto x, int64_t first_head, int64_t dim) {
                x.data += start * x.token_stride + first_head * dim;
                return x;
            };
            compute<T>(s, items[i], w, part(q, head * group, s.dim), part(k, head, s.dim), part(v, head, s.value_dim), tokens,
                       part(out, head * group, s.value_dim));
        }
    });
}

}  // namespace

// q [T, heads, dim], k [T, kv_heads, dim], v [T, kv_heads, value_dim], each with a token stride; starts [rows + 1]; out [T, heads,
// value_dim]. window 0 and soft_cap 0 mean none. is_bf16 chooses bfloat16 or float32 for all four.
extern "C" void kvloom_attend_tokens(const void* q, int64_t q_token_stride, const void* k, int64_t k_token_stride, const void* v,
                                     int64_t v_token_stride, const int32_t* starts, int64_t rows, int64_t heads, int64_t kv_heads,
                                     int64_t dim, int64_t value_dim, int64_t window, float scale, float soft_cap, int causal, void* out,
                                     int is_bf16, int threads) {
    Shape s{heads, kv_heads, dim, value_dim, window ? window : NO_WINDOW, scale, soft_cap, causal};
    int64_t out_stride = heads * value_dim;
    if (is_bf16)
        attend_tokens<bf16>(s, {(const bf16*)q, q_token_stride}, {(const bf16*)k, k_token_stride}, {(const bf16*)v, v_token_stride},
                            starts, rows, {(bf16*)out, out_stride}, threads);
    else
        attend_tokens<float>(s, {(const float*)q, q_token_stride}, {(const float*)k, k_token_stride}, {(const float*)v, v_token_stride},
                             starts, rows, {(float*)out, out_stride}, threads);
}
