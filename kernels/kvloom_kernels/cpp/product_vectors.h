// Rows times two panels of a packed weight, by vector instructions. product_tiles.h has the same by AMX. What is multiplied with what is
// product.cpp's.
#pragma once
#include "common.h"
#include <array>
#include <type_traits>
#include <utility>

namespace {

constexpr int PANEL = LANES;
constexpr int STREAMED_ROWS = 4;    // up to here the weight is read faster than it is multiplied: fetch it in advance
constexpr int AHEAD_BYTES = 2048;

// Steps of elements of K that lie side by side.
template <class T> inline int64_t steps(int64_t k) { return (k + SIDE<T> - 1) / SIDE<T>; }
template <class T> inline int64_t panel_elements(int64_t k) { return steps<T>(k) * SIDE<T> * PANEL; }

// Rows that are multiplied.
template <class T> struct Rows {
    const T* x;
    int64_t stride, count, k;
};

// Two panels that they are multiplied with.
template <class T> struct Panels {
    const T *first, *second;
    int64_t feature;        // the first of `first`
    int64_t skipped_bytes;  // what lies between each of them and the one that is multiplied after it
};

// Where the results go. The lines are mostly in another core's cache: writing waits for each, unless it was asked for before.
struct Results {
    const char* first;
    int64_t stride_bytes;
    bool are_streamed;  // written past the caches

    void fetch(int64_t step, int64_t rows) const {
        constexpr int64_t AT_ONCE = 2;
        if (are_streamed) return;
        for (int64_t r = step * AT_ONCE; r < (step + 1) * AT_ONCE && r < rows; r++) __builtin_prefetch(first + r * stride_bytes, 1);
    }
};

template <int R> inline void put(float* out, const floats* low, const floats* high) {
    for (int r = 0; r < R; r++) {
        store<float>(out + 2 * r * PANEL, low[r]);
        store<float>(out + (2 * r + 1) * PANEL, high[r]);
    }
}

inline void fetch(const void* from, int64_t ahead_bytes) { __builtin_prefetch((const char*)from + ahead_bytes); }

#ifdef __AVX512BF16__
typedef bf16 Multiplied;  // what rows of bfloat16 are when they are multiplied
#else
typedef float Multiplied;
#endif

// Two panels' elements of the step at `first` and `second`, multiplied with those of R rows of x.
template <int R> inline void multiply(floats* low, floats* high, const float* x, int64_t x_stride, bool, const float* first, const float* second) {
    floats a = load<float>(first), b = load<float>(second);
    for (int r = 0; r < R; r++) {
        add_product(low[r], x[r * x_stride], a);
        add_product(high[r], x[r * x_stride], b);
    }
}

#ifdef __AVX512BF16__
// Two neighbours in K of a row of x; the one beyond K is 0.
inline uint32_t pair(const bf16* x, bool is_half) {
    if (is_half) return x->bits;
    uint32_t out;
    std::memcpy(&out, x, sizeof out);
    return out;
}

template <int R> inline void multiply(floats* low, floats* high, const bf16* x, int64_t x_stride, bool is_half, const bf16* first, const bf16* second) {
    __m512bh a = (__m512bh)_mm512_loadu_si512(first), b = (__m512bh)_mm512_loadu_si512(second);
    for (int r = 0; r < R; r++) {
        __m512bh v = (__m512bh)_mm512_set1_epi32(int(pair(x + r * x_stride, is_half)));
        low[r] = (floats)_mm512_dpbf16_ps((__m512)low[r], a, v);
        high[r] = (floats)_mm512_dpbf16_ps((__m512)high[r], b, v);
    }
}
#else
inline words read_words(const bf16* p) {
    words out;
    std::memcpy(&out, p, sizeof out);
    return out;
}

// The float32 counterpart: the weight is widened while it is read, x was before. What is beyond K is 0 in both.
template <int R> inline void multiply(floats* low, floats* high, const float* x, int64_t x_stride, bool, const bf16* first, const bf16* second) {
    words a = read_words(first), b = read_words(second);
    floats a_even = (floats)(a << 16), b_even = (floats)(b << 16), a_odd = (floats)(a & 0xffff0000u), b_odd = (floats)(b & 0xffff0000u);
    for (int r = 0; r < R; r++) {
        add_product(low[r], x[r * x_stride], a_even);
        add_product(high[r], x[r * x_stride], b_even);
        add_product(low[r], x[r * x_stride + 1], a_odd);
        add_product(high[r], x[r * x_stride + 1], b_odd);
    }
}
#endif

// out[r] = x[r] times two panels: [R][2][PANEL].
template <class X, class T, int R> void tile(const X* x, int64_t x_stride, int64_t k, const Panels<T>& panels, float* out) {
    floats low[R] = {}, high[R] = {};
    const T *first = panels.first, *second = panels.second;
    int64_t last = steps<T>(k) - 1;
    constexpr int64_t STEP = SIDE<T> * PANEL, AHEAD_STEPS = AHEAD_BYTES / (STEP * int64_t(sizeof(T)));
    for (int64_t i = 0; i < last; i++) {
        if (R <= STREAMED_ROWS) {
            int64_t ahead_bytes = i + AHEAD_STEPS <= last ? AHEAD_BYTES : AHEAD_BYTES + panels.skipped_bytes;
            fetch(first + i * STEP, ahead_bytes);
            fetch(second + i * STEP, ahead_bytes);
        }
        multiply<R>(low, high, x + i * SIDE<T>, x_stride, false, first + i * STEP, second + i * STEP);
    }
    multiply<R>(low, high, x + last * SIDE<T>, x_stride, k % SIDE<T> != 0, first + last * STEP, second + last * STEP);
    put<R>(out, low, high);
}

// Multiplies some rows with two panels by vector instructions.
template <class T> struct ByVectors {
    typedef std::conditional_t<sizeof(T) == 2, Multiplied, T> X;

    // Rows are spread evenly: 64 of them are 6 tiles of 10 or 11, not 5 of 12 and one of 4.
    static int64_t tiles(int64_t rows) { return (rows + MOST_ROWS - 1) / MOST_ROWS; }
    static int64_t first_row(int64_t tile, int64_t rows) { return rows * tile / tiles(rows); }
    // Registers: 12 x 2 sums, 2 of the weight and 1 of x of 32; 6 x 2 of 16, or 5 x 2 with a widened weight, which takes 4.
    static constexpr int64_t MOST_ROWS = LANES == 16 ? 12 : sizeof(T) == 2 ? 5 : 6;
    static constexpr bool IS_FAST = false;
    static int64_t steps_of(int64_t) { return 0; }

    template <class Between> void operator()(const Rows<X>& rows, const Panels<T>& panels, const Results&, float* sums, const Between&) {
        static constexpr auto TILES = tiles_of(std::make_integer_sequence<int, MOST_ROWS>{});
        TILES[rows.count - 1](rows.x, rows.stride, rows.k, panels, sums);
    }

private:
    typedef void Tile(const X*, int64_t, int64_t, const Panels<T>&, float*);
    template <int... R> static constexpr std::array<Tile*, MOST_ROWS> tiles_of(std::integer_sequence<int, R...>) { return {tile<X, T, R + 1>...}; }
};

}  // namespace
