// Matrix products of linear layers over packed weights, for any number of rows.
//
// A weight [N, K] is kept as panels of PANEL output features, so that every load of a product is one whole vector, read in the order in
// which it lies. bfloat16: [N / PANEL][K / 2][PANEL][2], two neighbours in K side by side, which is what AVX-512's bfloat16 product takes;
// float32: [N / PANEL][K][PANEL]. What is beyond N or K is 0. A panel takes the memory of its rows, so most weights are packed where
// they lie. Two panels are multiplied at a time, by vector instructions or, where the CPU has them, by AMX tiles: 16 steps of a panel of
// bfloat16 are one tile, as they lie. Each result is a sum over K in one order, whatever the number of rows, so a row's result
// does not depend on its neighbours.
//
// A "gated" product multiplies with two halves of a weight's features, the gate and what it is multiplied with, and activates the gate.
#include "product_tiles.h"
#include "product_vectors.h"
#include "team.h"
#include <algorithm>
#include <type_traits>
#include <vector>

namespace {

constexpr int64_t BLOCK_BYTES = 512 * 1024;  // of rows that are multiplied with all panels before the next ones
constexpr int64_t STREAMED_BYTES = 8 * 1024 * 1024;
constexpr int64_t RUN_BYTES = 192 * 1024;  // of a weight that few rows read: memory is read faster in long runs
constexpr int64_t LEAST_RUNS = 4;          // of a thread, so that none waits long for another

struct Product {
    const void *x, *weight, *bias;
    void* out;
    int64_t rows, n, k, x_stride, out_stride, is_bf16, finish, is_widened;  // the last: float32 results of bfloat16
};

template <class T> inline void add_bias(float* sums, const T* bias, int64_t count) {
    for (int64_t i = 0; i < count; i++) sums[i] += load1<T>(bias + i);
}

template <class T> inline void put_n(T* out, const float* sums, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) store_n<T>(out + i, load_n<float>(sums + i, int(count - i)), int(count - i));
}

// The features at a panel.
inline int64_t count_at(int64_t first, int64_t n) { return n - first < PANEL ? n - first : PANEL; }

template <class T, class O> inline void store_panel(const Product& p, O* out, float* sums, int64_t first) {
    if (first >= p.n) return;
    if (p.bias) add_bias<T>(sums, (const T*)p.bias + first, count_at(first, p.n));
    put_n<O>(out + first, sums, count_at(first, p.n));
}

// Two panels of whole lines past the caches.
inline void stream_pair(float* out, const float* sums) {
#ifdef __AVX512F__
    _mm512_stream_ps(out, (__m512)load<float>(sums));
    _mm512_stream_ps(out + PANEL, (__m512)load<float>(sums + PANEL));
#endif
}
inline void stream_pair(bf16* out, const float* sums) {
#ifdef __AVX512F__
    alignas(64) bf16 line[2 * PANEL];
    store<bf16>(line, load<float>(sums));
    store<bf16>(line + PANEL, load<float>(sums + PANEL));
    _mm512_stream_si512((__m512i*)out, _mm512_load_si512(line));
#endif
}

// One row of two panels side by side.
template <class T, class O> inline void store_pair(const Product& p, O* out, float* sums, int64_t first, bool is_streamed) {
    if (first + 2 * PANEL <= p.n && !p.bias) {
        if (is_streamed && reinterpret_cast<uintptr_t>(out + first) % 64 == 0) return stream_pair(out + first, sums);
        for (int64_t i = 0; i < 2 * PANEL; i += LANES) store<O>(out + first + i, load<float>(sums + i));
        return;
    }
    store_panel<T, O>(p, out, sums, first);
    store_panel<T, O>(p, out, sums + PANEL, first + PANEL);
}

// One row of a gated product: `sums` are of PANEL features of the gate, and of those that it is multiplied with.
template <class T, class O> inline void store_gated(const Product& p, O* out, float* sums, int64_t first) {
    int64_t width = p.n / 2, count = count_at(first, width);
    if (p.bias) {
        add_bias<T>(sums, (const T*)p.bias + first, count);
        add_bias<T>(sums + PANEL, (const T*)p.bias + width + first, count);
    }
    floats gate = rounded<T>(load<float>(sums)), up = rounded<T>(load<float>(sums + PANEL));
    store_n<O>(out + first, rounded<T>(activated(gate, p.finish)) * up, int(count));
}

// Sums that were made and are not stored yet: that is done a few rows at a time, while a unit of its own makes the next ones.
template <class T, class O> class Pending {
public:
    Pending(const Product& p, bool are_streamed) : p_(p), are_streamed_(are_streamed) {}

    void set(float* sums, O* to, int64_t count, int64_t first) {
        sums_ = sums, to_ = to, count_ = count, first_ = first, row_ = 0;
    }

    void store(int64_t rows) {
        for (; rows && row_ < count_; rows--, row_++) {
            float* sums = sums_ + 2 * row_ * PANEL;
            if (p_.finish)
                store_gated<T, O>(p_, to_ + row_ * p_.out_stride, sums, first_);
            else
                store_pair<T, O>(p_, to_ + row_ * p_.out_stride, sums, first_, are_streamed_);
        }
    }

    void store_all() { store(count_); }

private:
    const Product& p_;
    bool are_streamed_;
    float* sums_ = nullptr;
    O* to_ = nullptr;
    int64_t count_ = 0, first_ = 0, row_ = 0;
};

// Panels that are multiplied next: they are fetched at an even pace meanwhile, so that memory does not rest while tiles are multiplied.
class Ahead {
public:
    // Both panels of `bytes` within so many calls of `fetch`.
    void set(const void* first, const void* second, int64_t bytes, int64_t calls) {
        first_ = (const char*)first, second_ = (const char*)second, bytes_ = bytes, at_ = 0;
        at_once_ = (bytes + calls - 1) / calls;
    }

    void fetch() {
        for (int64_t end = at_ + at_once_ < bytes_ ? at_ + at_once_ : bytes_; at_ < end; at_ += LINE_BYTES) {
            __builtin_prefetch(first_ + at_, 0, 2);
            __builtin_prefetch(second_ + at_, 0, 2);
        }
    }

private:
    static constexpr int64_t LINE_BYTES = 64;
    const char *first_ = nullptr, *second_ = nullptr;
    int64_t bytes_ = 0, at_ = 0, at_once_ = 0;
};

// Results that are too many for the caches would only take the place of what is read again: logits, and whatever is made faster than
// memory could give each line before it is written.
template <class T, class O, class Multiply> bool are_streamed(const Product& p) {
#ifdef __AVX512F__
    bool are_logits = !std::is_same<T, O>::value, are_many = Multiply::IS_FAST && p.rows * p.n * int64_t(sizeof(O)) > STREAMED_BYTES;
    return !p.finish && (are_logits || are_many);
#else
    return false;
#endif
}

// Rows as they are multiplied: where they lie, or a widened copy, of some of them at a time.
template <class T, class X> class Input {
public:
    explicit Input(const Product& p) : p_(p), stride_(std::is_same<T, X>::value ? p.x_stride : steps<bf16>(p.k) * SIDE<bf16>) {}

    // The rows [begin, end) are used next.
    void set(int64_t begin, int64_t end) {
        if (std::is_same<T, X>::value || begin == begin_) return;
        begin_ = begin;
        widened_.resize(std::max<size_t>(widened_.size(), (end - begin) * stride_ + LANES));
        for (int64_t r = begin; r < end; r++) {
            float* to = widened_.data() + (r - begin) * stride_;
            for (int64_t i = 0; i < p_.k; i += LANES) store<float>(to + i, load_n<T>((const T*)p_.x + r * p_.x_stride + i, int(p_.k - i)));
        }
    }

    Rows<X> rows(int64_t first, int64_t count) const {
        const X* x = std::is_same<T, X>::value ? (const X*)p_.x + first * p_.x_stride : (const X*)widened_.data() + (first - begin_) * stride_;
        return {x, stride_, count, p_.k};
    }

private:
    const Product& p_;
    int64_t stride_, begin_ = -1;
    static thread_local std::vector<float> widened_;  // kept: fresh memory of this size costs as much as widening
};
template <class T, class X> thread_local std::vector<float> Input<T, X>::widened_;

// Results of one thread.
template <class T, class O, class Multiply> class Multiplication {
public:
    explicit Multiplication(const Product& p) : p_(p), are_streamed_(are_streamed<T, O, Multiply>(p)), input_(p), pending_(p, are_streamed_) {}

    ~Multiplication() {
        pending_.store_all();
#ifdef __AVX512F__
        if (are_streamed_) _mm_sfence();
#endif
    }

    // One pair of panels times the rows [begin, end); then comes `next`, or none if it is negative.
    void panels_times(int64_t pair, int64_t begin, int64_t end, int64_t next) {
        Panels<T> panels = panels_of(pair);
        input_.set(begin, end);
        int64_t tiles = Multiply::tiles(end - begin), steps = tiles * Multiply::steps_of(p_.k);
        if (next >= 0 && steps) {
            Panels<T> follow = panels_of(next);
            ahead_.set(follow.first, follow.second, panel_elements<T>(p_.k) * sizeof(T), steps);
        }
        for (int64_t t = 0; t < tiles; t++) {
            int64_t row = begin + Multiply::first_row(t, end - begin), count = begin + Multiply::first_row(t + 1, end - begin) - row;
            O* to = (O*)p_.out + row * p_.out_stride;
            Results results{(const char*)(to + panels.feature), p_.out_stride * int64_t(sizeof(O)), are_streamed_};
            float* sums = sums_[turn_ = 1 - turn_];
            multiply_(input_.rows(row, count), panels, results, sums, [&] {
                pending_.store(2);
                ahead_.fetch();
            });
            pending_.store_all();
            pending_.set(sums, to, count, panels.feature);
        }
    }

private:
    // Neighbours, or the same place of either half.
    Panels<T> panels_of(int64_t pair) const {
        int64_t count = (p_.n + PANEL - 1) / PANEL, elements = panel_elements<T>(p_.k);
        int64_t one = p_.finish ? pair : 2 * pair, other = p_.finish ? count / 2 + pair : 2 * pair + 1;
        if (other >= count) other = one;  // its sums are not stored
        int64_t skipped_bytes = p_.finish ? 0 : elements * int64_t(sizeof(T));
        return {(const T*)p_.weight + one * elements, (const T*)p_.weight + other * elements, one * PANEL, skipped_bytes};
    }

    const Product& p_;
    const bool are_streamed_;
    Multiply multiply_;
    Input<T, typename Multiply::X> input_;
    Pending<T, O> pending_;
    Ahead ahead_;
    alignas(64) float sums_[2][Multiply::MOST_ROWS * 2 * PANEL];
    int turn_ = 0;
};

template <class T, class O, class Multiply> void product(const Product& p, const Team& team) {
    int64_t pairs = ((p.finish ? p.n / 2 : (p.n + 1) / 2) + PANEL - 1) / PANEL;
    // Every pair reads all rows of a block: they stay in this core's cache.
    int64_t most = BLOCK_BYTES / int64_t(p.k * sizeof(typename Multiply::X)) / Multiply::MOST_ROWS * Multiply::MOST_ROWS;
    if (most == 0) most = Multiply::MOST_ROWS;
    int64_t blocks = (p.rows + most - 1) / most;
    Multiplication<T, O, Multiply> multiplication(p);
    // Pairs whose results share a line are one thread's: or else two cores would take it from each other row by row.
    int64_t pair_bytes = (p.finish ? 1 : 2) * PANEL * int64_t(sizeof(O)), run = pair_bytes < 64 ? 64 / pair_bytes : 1;
    if (!Multiply::IS_FAST && p.rows <= STREAMED_ROWS) {
        int64_t weight_bytes = 2 * panel_elements<T>(p.k) * int64_t(sizeof(T));
        run = std::max(run, std::min(RUN_BYTES / weight_bytes, pairs / (LEAST_RUNS * team.size)));
    }
    int64_t total = blocks * pairs, next = team.take(run);
    auto following = [&](int64_t i) { return (i + 1) % run ? i + 1 : team.take(run); };
    for (int64_t i; (i = next) < total;) {
        next = following(i);
        int64_t begin = i / pairs * most, end = begin + most < p.rows ? begin + most : p.rows;
        multiplication.panels_times(i % pairs, begin, end, next < total ? next % pairs : -1);
    }
}

template <class O> void product_of_bf16(const Product& p, const Team& team) {
#ifdef HAS_TILES
    if (p.k % TILE_DEPTH == 0 && may_use_tiles()) return product<bf16, O, ByTiles>(p, team);
#endif
    product<bf16, O, ByVectors<bf16>>(p, team);
}

struct Packing {
    const void* weight;
    void* packed;  // may be the same memory, where the weight is whole panels and k whole steps
    int64_t rows, k, is_bf16, unpacks;
};

template <class T> void pack(const Packing& p, const Team& team) {
    int64_t panels = (p.rows + PANEL - 1) / PANEL, elements = panel_elements<T>(p.k), side = SIDE<T>;
    std::vector<T> copy(elements);
    team.each(panels, [&](int64_t panel) {
        T *packed = (T*)p.packed + panel * elements, *plain = (T*)p.weight + panel * PANEL * p.k;
        int64_t count = count_at(panel * PANEL, p.rows);
        if (p.unpacks)
            std::memcpy((void*)copy.data(), packed, elements * sizeof(T));
        else
            std::memset((void*)copy.data(), 0, elements * sizeof(T));
        for (int64_t i = 0; i < count; i++)
            for (int64_t j = 0; j < p.k; j++) {
                T& place = copy[(j / side * PANEL + i) * side + j % side];
                if (p.unpacks)
                    plain[i * p.k + j] = place;
                else
                    place = plain[i * p.k + j];
            }
        if (!p.unpacks) std::memcpy((void*)packed, copy.data(), elements * sizeof(T));
    });
}

struct Lookup {
    const int64_t* ids;
    const void* table;
    void* out;
    int64_t rows, k, is_bf16, is_packed;
};

template <class T> void lookup(const Lookup& l, const Team& team) {
    int64_t side = SIDE<T>;
    team.each(l.rows, [&](int64_t i) {
        T* to = (T*)l.out + i * l.k;
        if (!l.is_packed) {
            std::memcpy((void*)to, (const T*)l.table + l.ids[i] * l.k, l.k * sizeof(T));
            return;
        }
        const T* from = (const T*)l.table + l.ids[i] / PANEL * panel_elements<T>(l.k) + l.ids[i] % PANEL * side;
        for (int64_t j = 0; j < l.k; j++) to[j] = from[j / side * PANEL * side + j % side];
    });
}

}  // namespace

// x [rows, k] times a packed weight of n features, bias [n] or null -> out [rows, n]; with a `finish` the product is gated, n / 2 whole
// panels, and out [rows, n / 2].
extern "C" void kvloom_product(const void* arguments, const Team& team) {
    const Product& p = *(const Product*)arguments;
    if (!p.is_bf16) return product<float, float, ByVectors<float>>(p, team);
    p.is_widened ? product_of_bf16<float>(p, team) : product_of_bf16<bf16>(p, team);
}

// weight [rows, k] -> panels, or back.
extern "C" void kvloom_pack(const void* arguments, const Team& team) {
    const Packing& p = *(const Packing*)arguments;
    p.is_bf16 ? pack<bf16>(p, team) : pack<float>(p, team);
}

// Rows `ids` [rows] of a weight, packed or as it was -> out [rows, k].
extern "C" void kvloom_lookup(const void* arguments, const Team& team) {
    const Lookup& l = *(const Lookup*)arguments;
    l.is_bf16 ? lookup<bf16>(l, team) : lookup<float>(l, team);
}

// Elements that a packed weight takes.
extern "C" int64_t kvloom_packed_elements(int64_t n, int64_t k, int is_bf16) {
    return (n + PANEL - 1) / PANEL * (is_bf16 ? panel_elements<bf16>(k) : panel_elements<float>(k));
}

// Features of a panel: a gated product needs halves of whole panels.
extern "C" int kvloom_panel_features() { return PANEL; }

// How bfloat16 is multiplied: 0 widened to float32, 1 by vector instructions of its own, 2 by tiles.
extern "C" int kvloom_bf16_products() {
    if (may_use_tiles()) return 2;
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}
