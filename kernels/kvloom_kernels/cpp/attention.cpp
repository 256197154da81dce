// Attention over a paged KV cache, decode and prompts alike.
//
// Keys of a block lie as [dim / side][block_tokens][side], values as [block_tokens / side][value_dim][side], where side is 2 for
// bfloat16 and 1 for float32: what one instruction multiplies lies together. One item is (row, kv head, some of the row's query
// tokens); all query heads that read the kv head are its M rows. Scores of 64 keys are made at a time, then one step of the online
// softmax (Milakov and Gimelshein, 2018). Rounds begin at multiples of 64 and every 512 keys are summed up for themselves and then
// folded in order, so a query's result does not depend on its neighbours, nor on how its context is shared out among threads. Slots
// that no query of the item sees are never multiplied, whatever they hold.
#include "pairs.h"
#include "team.h"
#include <cmath>
#include <vector>

namespace {

constexpr int MAX_ROWS = 64;   // query rows of an item: enough to use each key load, small enough for the first-level cache
constexpr int GROUPS = 4;      // 16 keys each, in one softmax round
constexpr int64_t ROUND = GROUPS * LANES;
constexpr int64_t CHUNK = 512;  // keys that are summed up for themselves; a multiple of ROUND
constexpr int MAX_SPLIT_ROWS = 16;
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

struct Item {
    int64_t row, kv_head, first_token, num_tokens;  // tokens of the row's range
};

// Key positions that a query at `position` sees: [first, last).
inline int64_t first_seen(const Attend& s, int64_t position) {
    return s.window && position - s.window + 1 > 0 ? position - s.window + 1 : 0;
}
inline int64_t last_seen(const Attend& s, int64_t position, int64_t context) {
    if (s.causal) return position + 1;
    return s.window && position + s.window < context ? position + s.window : context;
}

// 16 keys and their values, and which of them any row of the item sees.
template <class T> struct Keys {
    const T *keys, *values;
    int64_t stride;  // elements from one step of `keys` to the next
    int from, to;
    const T *next_keys, *next_values;  // what will be read one round later: fetched line by line meanwhile; or null
};

// An item's rows: what they are, and the sums of one chunk.
template <class T> struct Rows {
    int count;
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

// Weights of 16 keys as values take them, and their sum.
inline float as_factors(f32x16 p, float* out) {
    store<float>(out, p);
    return sum(p);
}
inline float as_factors(f32x16 p, uint32_t* out) {
    u16x16 bits = narrow(p);
    std::memcpy(out, &bits, sizeof bits);
    return sum(widen(bits));
}

// out[column...] += factors times values, over one group; C vectors of the result at a time.
template <class T, int R, int C>
inline void add_values(const Attend& s, const typename Pairs<T>::Scalar (*factors)[LANES / Pairs<T>::SIDE], const Keys<T>& k, float* out,
                       int64_t column, bool fetches) {
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
            for (int r = 0; r < R; r++) Pairs<T>::multiply(sums[r][c], factors[r][j], values);
        }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) store<float>(out + r * width + column + c * LANES, sums[r][c]);
}

inline void cap(f32x16& x, float soft_cap) {
    for (int j = 0; j < LANES; j++) x[j] = soft_cap * std::tanh(x[j] / soft_cap);
}

// Rows [m, m + R) of an item against the groups of one round, which begin at `positions`.
template <class T, int R>
void one_round(const Attend& s, Rows<T>& w, int m, const Keys<T>* groups, int count, const int64_t* positions) {
    f32x16 p[GROUPS][R] = {};
    const f32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int g = 0; g < count; g++) {
        scores_of<T, R>(w, m, groups[g], p[g]);
        for (int r = 0; r < R; r++) {
            p[g][r] *= s.scale;
            if (s.soft_cap > 0) cap(p[g][r], s.soft_cap);
            float from = float(w.first[m + r] - positions[g]), to = float(w.last[m + r] - positions[g]);
            to = to < float(groups[g].to) ? to : float(groups[g].to);
            if (from > 0 || to < LANES) p[g][r] = (lane >= splat(from)) & (lane < splat(to)) ? p[g][r] : splat(NONE);
        }
    }
    int64_t width = row_width(s);
    typename Pairs<T>::Scalar factors[GROUPS][R][LANES / Pairs<T>::SIDE];
    for (int r = 0; r < R; r++) {
        f32x16 most = p[0][r];
        for (int g = 1; g < count; g++) most = p[g][r] > most ? p[g][r] : most;
        float before = w.best[m + r], best = largest(most);
        best = best > before ? best : before;
        float total = 0;
        for (int g = 0; g < count; g++)
            total += as_factors(p[g][r] > NONE ? exponential(p[g][r] - best) : f32x16{}, factors[g][r]);
        if (best > before && before != NONE) {
            float shrink = std::exp(before - best), *out = w.out.data() + (m + r) * width;
            w.total[m + r] *= shrink;
            for (int64_t d = 0; d < width; d += LANES) store<float>(out + d, load<float>(out + d) * shrink);
        }
        w.best[m + r] = best;
        w.total[m + r] += total;
    }
    float* out = w.out.data() + m * width;
    for (int g = 0; g < count; g++) {
        int64_t column = 0;
        bool fetches = m == 0 && groups[g].next_values;
        for (; column + 4 * LANES <= s.value_dim; column += 4 * LANES) add_values<T, R, 4>(s, factors[g], groups[g], out, column, fetches);
        for (; column < s.value_dim; column += LANES) add_values<T, R, 1>(s, factors[g], groups[g], out, column, fetches);
    }
}

template <class T> void all_rows(const Attend& s, Rows<T>& w, const Keys<T>* groups, int count, const int64_t* positions) {
    int m = 0;
    for (; m + 4 <= w.count; m += 4) one_round<T, 4>(s, w, m, groups, count, positions);
    if (w.count - m == 3) one_round<T, 3>(s, w, m, groups, count, positions);
    if (w.count - m == 2) one_round<T, 2>(s, w, m, groups, count, positions);
    if (w.count - m == 1) one_round<T, 1>(s, w, m, groups, count, positions);
}

// Reads an item's blocks, 16 keys at a time.
template <class T> struct Cache {
    static constexpr int64_t SIDE = Pairs<T>::SIDE;
    const Attend& s;
    const int32_t* table;
    int64_t kv_head, key_elements, value_elements, group_elements;
    bool is_whole;
    std::vector<T> copies;  // groups that do not lie together in one block

    Cache(const Attend& s, int64_t row, int64_t kv_head) : s(s), table(s.tables + row * s.table_stride), kv_head(kv_head) {
        key_elements = whole(s.dim, SIDE) * s.block_tokens;
        value_elements = whole(s.block_tokens, SIDE) * s.value_dim;
        group_elements = (whole(s.dim, SIDE) + s.value_dim) * LANES;
        is_whole = s.block_tokens % LANES == 0;
        if (!is_whole) copies.resize(GROUPS * group_elements);
    }

    const T* keys(int64_t block) const { return (const T*)s.k_cache + (table[block] * s.kv_heads + kv_head) * key_elements; }
    const T* values(int64_t block) const { return (const T*)s.v_cache + (table[block] * s.kv_heads + kv_head) * value_elements; }

    // The group at `position`, a multiple of 16, of which [from, to) is read; the `place`-th of its round. Keys before `end` follow.
    Keys<T> group(int64_t position, int from, int to, int place, int64_t end) {
        if (!is_whole) return copied(position, from, to, copies.data() + place * group_elements);
        // The table jumps about: the hardware cannot guess what is read next.
        bool follows = position + ROUND < end;
        return {keys_at(position), values_at(position), s.block_tokens * SIDE, from, to,
                follows ? keys_at(position + ROUND) : nullptr, follows ? values_at(position + ROUND) : nullptr};
    }

    const T* keys_at(int64_t position) const { return keys(position / s.block_tokens) + position % s.block_tokens * SIDE; }
    const T* values_at(int64_t position) const { return values(position / s.block_tokens) + position % s.block_tokens * s.value_dim; }

    Keys<T> copied(int64_t position, int from, int to, T* to_keys) const {
        T* to_values = to_keys + whole(s.dim, SIDE) * LANES;
        std::memset((void*)to_keys, 0, group_elements * sizeof(T));
        for (int64_t i = from; i < to; i++) {
            int64_t block = (position + i) / s.block_tokens, offset = (position + i) % s.block_tokens;
            for (int64_t d = 0; d < s.dim; d++)
                to_keys[(d / SIDE * LANES + i) * SIDE + d % SIDE] = keys(block)[(d / SIDE * s.block_tokens + offset) * SIDE + d % SIDE];
            for (int64_t d = 0; d < s.value_dim; d++)
                to_values[(i / SIDE * s.value_dim + d) * SIDE + i % SIDE] =
                    values(block)[(offset / SIDE * s.value_dim + d) * SIDE + offset % SIDE];
        }
        return {to_keys, to_values, LANES * SIDE, from, to, nullptr, nullptr};
    }
};

// Sums of the keys [begin, end) of an item that its rows see; they lie in one chunk.
template <class T> void sum_chunk(const Attend& s, Rows<T>& w, Cache<T>& cache, int64_t begin, int64_t end) {
    w.best.assign(w.count, NONE);
    w.total.assign(w.count, 0.0f);
    w.out.assign(w.count * row_width(s), 0.0f);
    int64_t last = w.last[w.count - 1];
    begin = begin > w.first[0] ? begin : w.first[0];
    end = end < w.last[w.count - 1] ? end : w.last[w.count - 1];
    Keys<T> groups[GROUPS];
    int64_t positions[GROUPS];
    for (int64_t round = begin / ROUND * ROUND; round < end; round += ROUND) {
        int count = 0;
        for (int64_t position = round; position < round + ROUND && position < end; position += LANES) {
            if (position + LANES <= begin) continue;
            int from = int(begin > position ? begin - position : 0), to = int(end - position < LANES ? end - position : LANES);
            groups[count] = cache.group(position, from, to, count, last);
            positions[count++] = position;
        }
        all_rows<T>(s, w, groups, count, positions);
    }
}

// Folds the sums of a chunk into those of the chunks before it.
inline void fold(float& best, float& total, float* out, float chunk_best, float chunk_total, const float* chunk_out, int64_t width) {
    if (chunk_best == NONE) return;
    float most = best > chunk_best ? best : chunk_best;
    float old = best == NONE ? 0.0f : std::exp(best - most), fresh = std::exp(chunk_best - most);
    for (int64_t d = 0; d < width; d += LANES) store<float>(out + d, load<float>(out + d) * old + load<float>(chunk_out + d) * fresh);
    total = total * old + chunk_total * fresh;
    best = most;
}

template <class T> void put_row(const Attend& s, const Item& item, int m, float best, float total, const float* sums) {
    int64_t group = s.heads / s.kv_heads, token = item.first_token + m / group, head = item.kv_head * group + m % group;
    float factor = 1.0f;
    if (s.sinks) {
        float most = best > s.sinks[head] ? best : s.sinks[head];
        factor = std::exp(best - most);
        total = total * factor + std::exp(s.sinks[head] - most);
    }
    T* to = (T*)s.out + ((s.query_starts[item.row] + token) * s.heads + head) * s.value_dim;
    for (int64_t d = 0; d < s.value_dim; d += LANES)
        store_n<T>(to + d, load<float>(sums + d) * (factor / total), int(s.value_dim - d));
}

template <class T> void read_queries(const Attend& s, const Item& item, Rows<T>& w) {
    int64_t group = s.heads / s.kv_heads, start = s.query_starts[item.row], context = s.contexts[item.row];
    int64_t tokens = s.query_starts[item.row + 1] - start;
    w.count = int(item.num_tokens * group);
    w.q_steps = whole(s.dim, Pairs<T>::SIDE) / Pairs<T>::SIDE;
    w.q.resize(w.count * w.q_steps);
    w.first.resize(w.count);
    w.last.resize(w.count);
    for (int m = 0; m < w.count; m++) {
        int64_t token = item.first_token + m / group, head = item.kv_head * group + m % group;
        int64_t position = context - tokens + token;
        w.first[m] = first_seen(s, position);
        w.last[m] = last_seen(s, position, context);
        const T* from = (const T*)s.q + (start + token) * s.q_stride + head * s.dim;
        for (int64_t i = 0; i < w.q_steps; i++) w.q[m * w.q_steps + i] = Pairs<T>::get(from, i, s.dim);
    }
}

// One item from its first chunk to its last.
template <class T> void compute(const Attend& s, const Item& item, Rows<T>& w) {
    read_queries<T>(s, item, w);
    int64_t width = row_width(s), end = w.last[w.count - 1];
    w.all_best.assign(w.count, NONE);
    w.all_total.assign(w.count, 0.0f);
    w.all_out.assign(w.count * width, 0.0f);
    Cache<T> cache(s, item.row, item.kv_head);
    for (int64_t begin = w.first[0] / CHUNK * CHUNK; begin < end; begin += CHUNK) {
        sum_chunk<T>(s, w, cache, begin, begin + CHUNK);
        for (int m = 0; m < w.count; m++)
            fold(w.all_best[m], w.all_total[m], w.all_out.data() + m * width, w.best[m], w.total[m], w.out.data() + m * width, width);
    }
    for (int m = 0; m < w.count; m++) put_row<T>(s, item, m, w.all_best[m], w.all_total[m], w.all_out.data() + m * width);
}

struct Job {
    int64_t item, chunk;
};

// Where an item's chunks leave their sums: [chunks][rows][best, total, out], and how many are done.
struct Parts {
    std::atomic<int32_t>* done;
    float* sums;
    int64_t first_chunk, chunks, row_floats;
};

// One chunk of an item; whoever does the last one folds them all, in order.
template <class T> void compute_part(const Attend& s, const Item& item, const Parts& parts, int64_t chunk, Rows<T>& w) {
    read_queries<T>(s, item, w);
    Cache<T> cache(s, item.row, item.kv_head);
    sum_chunk<T>(s, w, cache, chunk * CHUNK, (chunk + 1) * CHUNK);
    int64_t width = row_width(s), size = w.count * parts.row_floats;
    float* mine = parts.sums + (chunk - parts.first_chunk) * size;
    for (int m = 0; m < w.count; m++) {
        mine[m * parts.row_floats] = w.best[m];
        mine[m * parts.row_floats + 1] = w.total[m];
        std::memcpy(mine + m * parts.row_floats + LANES, w.out.data() + m * width, width * sizeof(float));
    }
    if (parts.done->fetch_add(1, std::memory_order_acq_rel) + 1 < parts.chunks) return;
    parts.done->store(0, std::memory_order_relaxed);
    w.all_out.resize(width);
    for (int m = 0; m < w.count; m++) {
        float best = NONE, total = 0.0f;
        w.all_out.assign(width, 0.0f);
        for (int64_t c = 0; c < parts.chunks; c++) {
            const float* part = parts.sums + c * size + m * parts.row_floats;
            fold(best, total, w.all_out.data(), part[0], part[1], part + LANES, width);
        }
        put_row<T>(s, item, m, best, total, w.all_out.data());
    }
}

// The chunks that an item's rows see.
inline void chunks_of(const Attend& s, const Item& item, int64_t& first, int64_t& count) {
    int64_t context = s.contexts[item.row], tokens = s.query_starts[item.row + 1] - s.query_starts[item.row];
    int64_t position = context - tokens + item.first_token;
    first = first_seen(s, position) / CHUNK;
    count = (last_seen(s, position + item.num_tokens - 1, context) + CHUNK - 1) / CHUNK - first;
}

// Where each item's parts go, when there are too few items for the threads and room for the parts; else nothing.
inline std::vector<Parts> share_out(const Attend& s, const std::vector<Item>& items, int threads) {
    std::vector<Parts> parts;
    if (threads == 1 || int64_t(items.size()) >= 4 * threads) return parts;
    int64_t row_floats = LANES + row_width(s), used = 0, group = s.heads / s.kv_heads, header = whole(4 * threads * 4, 64);
    for (size_t i = 0; i < items.size(); i++) {
        Parts p{(std::atomic<int32_t>*)s.workspace + i, (float*)((char*)s.workspace + header) + used, 0, 0, row_floats};
        chunks_of(s, items[i], p.first_chunk, p.chunks);
        used += p.chunks * items[i].num_tokens * group * row_floats;
        if (items[i].num_tokens * group > MAX_SPLIT_ROWS || header + used * 4 > s.workspace_bytes) return {};
        parts.push_back(p);
    }
    return parts;
}

template <class T> void attend(const Attend& s, const Team& team) {
    std::vector<Item> items;
    int64_t group = s.heads / s.kv_heads, most = MAX_ROWS / group > 0 ? MAX_ROWS / group : 1;
    for (int64_t row = 0; row < s.rows; row++) {
        int64_t tokens = s.query_starts[row + 1] - s.query_starts[row];
        for (int64_t first = 0; first < tokens; first += most)
            for (int64_t head = 0; head < s.kv_heads; head++)
                items.push_back({row, head, first, tokens - first < most ? tokens - first : most});
    }
    std::vector<Parts> parts = share_out(s, items, team.size);
    std::vector<Job> jobs;
    for (size_t i = 0; i < parts.size(); i++)
        for (int64_t c = 0; c < parts[i].chunks; c++) jobs.push_back({int64_t(i), parts[i].first_chunk + c});
    Rows<T> w;
    int64_t total = parts.empty() ? items.size() : jobs.size();
    for (int64_t i; (i = team.take(1)) < total;)
        if (parts.empty())
            compute<T>(s, items[i], w);
        else
            compute_part<T>(s, items[jobs[i].item], parts[jobs[i].item], jobs[i].chunk, w);
}

}  // namespace

// q [T, heads, dim] with a token stride; caches as above, [N, kv_heads, ...]; tables [rows, table_stride]; query_starts [rows + 1];
// contexts [rows]; sinks [heads] or null; out [T, heads, value_dim]. window 0 and soft_cap 0 mean none.
extern "C" void kvloom_attend(const void* arguments, const Team& team) {
    const Attend& s = *(const Attend*)arguments;
    s.is_bf16 ? attend<bf16>(s, team) : attend<float>(s, team);
}
