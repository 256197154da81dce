// Attention over a paged KV cache, decode and prompts alike.
//
// Keys of a block lie as [dim / side][block_tokens][side], values as [block_tokens / side][value_dim][side], where side is 2 for
// bfloat16 and 1 for float32: what one instruction multiplies lies together. One item is (row, kv head, some of the row's query
// tokens); all query heads that read the kv head are its M rows. The scores of a round, 64 keys or with AMX 512, are made at a time,
// then one step of the online softmax (Milakov and Gimelshein, 2018). Rounds begin at multiples of their length, and every 512 keys are
// summed up for themselves and then folded in order, so a query's result does not depend on its neighbours, nor on how its context is
// shared out among threads. What lies in slots that no query of the item sees does not count, not even if it is no number.
#include "attention_rounds.h"
#include "attention_tiles.h"
#include "team.h"

namespace {

constexpr int MAX_ROWS = 64;   // query rows of an item: enough to use each key load, small enough for the first-level cache
constexpr int64_t CHUNK = 512;  // keys that are summed up for themselves; some whole rounds
constexpr int MAX_SPLIT_ROWS = 16;
#ifdef HAS_TILES
static_assert(RoundByTiles::GROUPS_AT_ONCE * LANES == CHUNK, "its sums begin at nothing in each round");
#endif

struct Item {
    int64_t row, kv_head, num_heads, first_token, num_tokens;  // kv heads, and tokens of the row's range
};

// Key positions that a query at `position` sees: [first, last).
inline int64_t first_seen(const Attend& s, int64_t position) {
    return s.window && position - s.window + 1 > 0 ? position - s.window + 1 : 0;
}
inline int64_t last_seen(const Attend& s, int64_t position, int64_t context) {
    if (s.causal) return position + 1;
    return s.window && position + s.window < context ? position + s.window : context;
}

// Reads an item's blocks, LANES keys at a time.
template <class T, class Round> struct Cache {
    static constexpr int64_t ROUND = Round::GROUPS_AT_ONCE * LANES;
    const Attend& s;
    const int32_t* table;
    int64_t kv_head, key_elements, value_elements, group_elements;
    bool is_whole;
    std::vector<T> copies;  // groups that do not lie together in one block

    Cache(const Attend& s, int64_t row, int64_t kv_head) : s(s), table(s.tables + row * s.table_stride), kv_head(kv_head) {
        key_elements = whole(s.dim, SIDE<T>) * s.block_tokens;
        value_elements = whole(s.block_tokens, SIDE<T>) * s.value_dim;
        group_elements = (whole(s.dim, SIDE<T>) + s.value_dim) * LANES;
        is_whole = s.block_tokens % LANES == 0;
        if (!is_whole) copies.resize(Round::GROUPS_AT_ONCE * group_elements);
    }

    const T* keys(int64_t block) const { return (const T*)s.k_cache + (table[block] * s.kv_heads + kv_head) * key_elements; }
    const T* values(int64_t block) const { return (const T*)s.v_cache + (table[block] * s.kv_heads + kv_head) * value_elements; }

    // The group at `position`, a multiple of LANES, of which [from, to) is read; the `place`-th of its round. Keys before `end` follow.
    Keys<T> group(int64_t position, int from, int to, int place, int64_t end) {
        if (!is_whole) return copied(position, from, to, copies.data() + place * group_elements);
        // The table jumps about: the hardware cannot guess what is read next.
        bool follows = position + ROUND < end;
        return {keys_at(position), values_at(position), s.block_tokens * SIDE<T>, key_elements, value_elements, from, to,
                follows ? keys_at(position + ROUND) : nullptr, follows ? values_at(position + ROUND) : nullptr};
    }

    const T* keys_at(int64_t position) const { return keys(position / s.block_tokens) + position % s.block_tokens * SIDE<T>; }
    const T* values_at(int64_t position) const { return values(position / s.block_tokens) + position % s.block_tokens * s.value_dim; }

    Keys<T> copied(int64_t position, int from, int to, T* to_keys) const {
        T* to_values = to_keys + whole(s.dim, SIDE<T>) * LANES;
        std::memset((void*)to_keys, 0, group_elements * sizeof(T));
        for (int64_t i = from; i < to; i++) {
            int64_t block = (position + i) / s.block_tokens, offset = (position + i) % s.block_tokens;
            for (int64_t d = 0; d < s.dim; d++)
                to_keys[(d / SIDE<T> * LANES + i) * SIDE<T> + d % SIDE<T>] = keys(block)[(d / SIDE<T> * s.block_tokens + offset) * SIDE<T> + d % SIDE<T>];
            for (int64_t d = 0; d < s.value_dim; d++)
                to_values[(i / SIDE<T> * s.value_dim + d) * SIDE<T> + i % SIDE<T>] =
                    values(block)[(offset / SIDE<T> * s.value_dim + d) * SIDE<T> + offset % SIDE<T>];
        }
        return {to_keys, to_values, LANES * SIDE<T>, 0, 0, from, to, nullptr, nullptr};
    }
};

// Sums of the keys [begin, end) of an item that its rows see; they lie in one chunk.
template <class T, class Round> void sum_chunk(const Attend& s, Queries<T>& w, Round& one_round, Cache<T, Round>& cache, int64_t begin, int64_t end) {
    w.best.assign(w.count, NONE);
    w.total.assign(w.count, 0.0f);
    w.out.assign(whole(w.count, Round::ROW_UNIT) * row_width(s), 0.0f);
    int64_t last = w.last[w.count - 1];
    begin = begin > w.first[0] ? begin : w.first[0];
    end = end < w.last[w.count - 1] ? end : w.last[w.count - 1];
    constexpr int64_t ROUND = Cache<T, Round>::ROUND;
    static_assert(CHUNK % ROUND == 0);
    Keys<T> groups[Round::GROUPS_AT_ONCE];
    int64_t positions[Round::GROUPS_AT_ONCE];
    for (int64_t round = begin / ROUND * ROUND; round < end; round += ROUND) {
        int count = 0;
        for (int64_t position = round; position < round + ROUND && position < end; position += LANES) {
            if (position + LANES <= begin) continue;
            int from = int(begin > position ? begin - position : 0), to = int(end - position < LANES ? end - position : LANES);
            groups[count] = cache.group(position, from, to, count, last);
            positions[count++] = position;
        }
        one_round(s, w, groups, count, positions);
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

// Calls each(m, token, head) for the rows of an item: those of its first head, token by token, then those of the next.
template <class Each> inline void for_rows(const Attend& s, const Item& item, Each each) {
    int64_t group = s.heads / s.kv_heads;
    int m = 0;
    for (int64_t kv_head = item.kv_head; kv_head < item.kv_head + item.num_heads; kv_head++)
        for (int64_t token = item.first_token; token < item.first_token + item.num_tokens; token++)
            for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) each(m++, token, head);
}

template <class T> void put_row(const Attend& s, const Item& item, int64_t token, int64_t head, float best, float total, const float* sums) {
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

template <class T> void read_queries(const Attend& s, const Item& item, int64_t row_unit, Queries<T>& w) {
    int64_t start = s.query_starts[item.row], context = s.contexts[item.row];
    int64_t tokens = s.query_starts[item.row + 1] - start;
    w.heads = int(item.num_heads);
    w.count = int(item.num_heads * item.num_tokens * (s.heads / s.kv_heads));
    w.q_steps = whole(s.dim, SIDE<T>) / SIDE<T>;
    w.q.resize(whole(w.count, row_unit) * w.q_steps);
    w.first.resize(w.count);
    w.last.resize(w.count);
    for_rows(s, item, [&](int m, int64_t token, int64_t head) {
        int64_t position = context - tokens + token;
        w.first[m] = first_seen(s, position);
        w.last[m] = last_seen(s, position, context);
        const T* from = (const T*)s.q + (start + token) * s.q_stride + head * s.dim;
        auto* to = w.q.data() + m * w.q_steps;
        Pairs<T>::get_all(from, s.dim, to);
    });
}

// One item from its first chunk to its last.
template <class T, class Round> void compute(const Attend& s, const Item& item, Queries<T>& w, Round& round) {
    read_queries<T>(s, item, Round::ROW_UNIT, w);
    int64_t width = row_width(s), begin = w.first[0] / CHUNK * CHUNK, end = w.last[w.count - 1];
    Cache<T, Round> cache(s, item.row, item.kv_head);
    if (begin + CHUNK >= end) {
        sum_chunk(s, w, round, cache, begin, begin + CHUNK);
        for_rows(s, item, [&](int m, int64_t token, int64_t head) {
            put_row<T>(s, item, token, head, w.best[m], w.total[m], w.out.data() + m * width);
        });
        return;
    }
    w.all_best.assign(w.count, NONE);
    w.all_total.assign(w.count, 0.0f);
    w.all_out.assign(w.count * width, 0.0f);
    for (; begin < end; begin += CHUNK) {
        sum_chunk(s, w, round, cache, begin, begin + CHUNK);
        for (int m = 0; m < w.count; m++)
            fold(w.all_best[m], w.all_total[m], w.all_out.data() + m * width, w.best[m], w.total[m], w.out.data() + m * width, width);
    }
    for_rows(s, item, [&](int m, int64_t token, int64_t head) {
        put_row<T>(s, item, token, head, w.all_best[m], w.all_total[m], w.all_out.data() + m * width);
    });
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
template <class T, class Round>
void compute_part(const Attend& s, const Item& item, const Parts& parts, int64_t chunk, Queries<T>& w, Round& round) {
    read_queries<T>(s, item, Round::ROW_UNIT, w);
    Cache<T, Round> cache(s, item.row, item.kv_head);
    sum_chunk(s, w, round, cache, chunk * CHUNK, (chunk + 1) * CHUNK);
    int64_t width = row_width(s), size = w.count * parts.row_floats;
    float* mine = parts.sums + (chunk - parts.first_chunk) * size;
    for (int m = 0; m < w.count; m++) {
        mine[m * parts.row_floats] = w.best[m];
        mine[m * parts.row_floats + 1] = w.total[m];
        std::memcpy(mine + m * parts.row_floats + LANES, w.out.data() + m * width, width * sizeof(float));
    }
    if (parts.done->fetch_add(1, std::memory_order_acq_rel) + 1 < parts.chunks) return;
    parts.done->store(0, std::memory_order_relaxed);
    for_rows(s, item, [&](int m, int64_t token, int64_t head) {
        float best = NONE, total = 0.0f;
        w.all_out.assign(width, 0.0f);
        for (int64_t c = 0; c < parts.chunks; c++) {
            const float* part = parts.sums + c * size + m * parts.row_floats;
            fold(best, total, w.all_out.data(), part[0], part[1], part + LANES, width);
        }
        put_row<T>(s, item, token, head, best, total, w.all_out.data());
    });
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
        used += p.chunks * items[i].num_heads * items[i].num_tokens * group * row_floats;
        if (items[i].num_tokens * group > MAX_SPLIT_ROWS || header + used * 4 > s.workspace_bytes) return {};
        parts.push_back(p);
    }
    return parts;
}

// Heads that one item reads. Those of a block lie side by side, and memory is read the faster the more lies together: rows of one token
// take as many as there are rows in a tile, unless that leaves too few items, or too few parts of them, for the threads.
inline int64_t heads_at_once(const Attend& s, int threads) {
    int64_t most = MAX_SPLIT_ROWS / (s.heads / s.kv_heads), chunks = 0;
    if (s.block_tokens % LANES || most < 2) return 1;
    for (int64_t row = 0; row < s.rows; row++) {
        int64_t tokens = s.query_starts[row + 1] - s.query_starts[row], first, count;
        if (tokens > 1) return 1;
        if (!tokens) continue;
        chunks_of(s, {row, 0, 1, 0, 1}, first, count);
        chunks += count;
    }
    int64_t items = (s.kv_heads + most - 1) / most;  // of a row
    return chunks * items < 4 * threads ? 1 : (s.kv_heads + items - 1) / items;
}

template <class T, class Round> void attend(const Attend& s, const Team& team) {
    std::vector<Item> items;
    int64_t group = s.heads / s.kv_heads, most = MAX_ROWS / group > 0 ? MAX_ROWS / group : 1, heads = heads_at_once(s, team.size);
    for (int64_t row = 0; row < s.rows; row++) {
        int64_t tokens = s.query_starts[row + 1] - s.query_starts[row];
        for (int64_t first = 0; first < tokens; first += most)
            for (int64_t head = 0; head < s.kv_heads; head += heads)
                items.push_back({row, head, s.kv_heads - head < heads ? s.kv_heads - head : heads, first,
                                 tokens - first < most ? tokens - first : most});
    }
    std::vector<Parts> parts = share_out(s, items, team.size);
    std::vector<Job> jobs;
    for (size_t i = 0; i < parts.size(); i++)
        for (int64_t c = 0; c < parts[i].chunks; c++) jobs.push_back({int64_t(i), parts[i].first_chunk + c});
    Queries<T> w;
    Round round;
    int64_t total = parts.empty() ? items.size() : jobs.size();
    for (int64_t i; (i = team.take(1)) < total;)
        if (parts.empty())
            compute(s, items[i], w, round);
        else
            compute_part(s, items[jobs[i].item], parts[jobs[i].item], jobs[i].chunk, w, round);
}

}  // namespace

// q [T, heads, dim] with a token stride; caches as above, [N, kv_heads, ...]; tables [rows, table_stride]; query_starts [rows + 1];
// contexts [rows]; sinks [heads] or null; out [T, heads, value_dim]. window 0 and soft_cap 0 mean none.
extern "C" void kvloom_attend(const void* arguments, const Team& team) {
    const Attend& s = *(const Attend*)arguments;
    if (!s.is_bf16) return attend<float, RoundByVectors<float>>(s, team);
#ifdef HAS_TILES
    if (RoundByTiles::takes(s)) return attend<bf16, RoundByTiles>(s, team);
#endif
    attend<bf16, RoundByVectors<bf16>>(s, team);
}
