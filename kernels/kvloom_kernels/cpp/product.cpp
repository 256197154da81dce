// Matrix products of linear layers over packed weights, for any number of rows.
//
// A weight [N, K] is kept as panels of PANEL output features, so that every load of a product is one whole vector, read in the order in
// which it lies. bfloat16: [N / PANEL][K / 2][PANEL][2], two neighbours in K side by side, which is what AVX-512's bfloat16 product takes;
// float32: [N / PANEL][K][PANEL]. What is beyond N or K is 0. Each result is a sum over K in one order, whatever the number of rows,
// so a row's result does not depend on its neighbours.
//
// "Gated" weights hold two matrices of N / 2 features side by side, the gate and what it is multiplied with: each panel has half of its
// features from either, and the product can be activated before it is stored.
#include "common.h"
#include "team.h"
#include <cmath>

namespace {

#ifdef __AVX512F__
constexpr int HALF = 16, TILE_ROWS = 12;  // 12 x 2 accumulators, 2 of the weight and 1 of x in 32 registers
typedef f32x16 vec;
typedef u32x16 uvec;
#else
constexpr int HALF = 8, TILE_ROWS = 6;  // 6 x 2 accumulators, 2 of the weight and 1 of x in 16 registers of AVX2
typedef float vec __attribute__((vector_size(32)));
typedef uint32_t uvec __attribute__((vector_size(32)));
#endif
constexpr int PANEL = 2 * HALF;
constexpr int STREAMED_ROWS = 4;    // up to here the weight is read faster than it is multiplied: fetch it in advance
constexpr int AHEAD_BYTES = 2048;
constexpr int64_t PANELS_AT_ONCE = 2;

template <class V, class P> inline V read(const P* p) {
    V out;
    std::memcpy(&out, p, sizeof out);
    return out;
}
inline vec as_float(uvec bits) { return read<vec>(&bits); }

// Elements of K that lie side by side, and steps of such.
template <class T> constexpr int SIDE = sizeof(T) == 2 ? 2 : 1;
template <class T> inline int64_t steps(int64_t k) { return (k + SIDE<T> - 1) / SIDE<T>; }
template <class T> inline int64_t panel_elements(int64_t k) { return steps<T>(k) * SIDE<T> * PANEL; }

// out[r] = x[r] times the panel: [R][PANEL].
template <class T, int R> void tile(const T* x, int64_t x_stride, int64_t k, const T* panel, float* out);

template <int R> inline void put(float* out, const vec* low, const vec* high) {
    for (int r = 0; r < R; r++) {
        std::memcpy(out + r * PANEL, &low[r], sizeof low[r]);
        std::memcpy(out + r * PANEL + HALF, &high[r], sizeof high[r]);
    }
}

template <int R> inline void tile_of(const float* x, int64_t x_stride, int64_t k, const float* panel, float* out) {
    vec low[R] = {}, high[R] = {};
    for (int64_t i = 0; i < k; i++) {
        if (R <= STREAMED_ROWS) __builtin_prefetch((const char*)(panel + i * PANEL) + AHEAD_BYTES);
        if (R <= STREAMED_ROWS && PANEL * sizeof(float) > 64) __builtin_prefetch((const char*)(panel + i * PANEL) + AHEAD_BYTES + 64);
        vec a = read<vec>(panel + i * PANEL), b = read<vec>(panel + i * PANEL + HALF);
        for (int r = 0; r < R; r++) {
            low[r] += x[r * x_stride + i] * a;
            high[r] += x[r * x_stride + i] * b;
        }
    }
    put<R>(out, low, high);
}

// Two neighbours in K of a row of x; the one beyond K is 0.
inline uint32_t pair(const bf16* x, int64_t step, int64_t k) {
    if (2 * step + 1 < k) return read<uint32_t>(x + 2 * step);
    return x[2 * step].bits;
}

#ifdef __AVX512BF16__
template <int R> inline void multiply(vec* low, vec* high, const bf16* x, int64_t x_stride, int64_t step, int64_t k, bool is_last,
                                      const bf16* weights) {
    __m512bh a = (__m512bh)_mm512_loadu_si512(weights), b = (__m512bh)_mm512_loadu_si512(weights + PANEL);
    for (int r = 0; r < R; r++) {
        uint32_t bits = is_last ? pair(x + r * x_stride, step, k) : read<uint32_t>(x + r * x_stride + 2 * step);
        __m512bh v = (__m512bh)_mm512_set1_epi32(int(bits));
        low[r] = (vec)_mm512_dpbf16_ps((__m512)low[r], a, v);
        high[r] = (vec)_mm512_dpbf16_ps((__m512)high[r], b, v);
    }
}
#else
template <int R> inline void multiply(vec* low, vec* high, const bf16* x, int64_t x_stride, int64_t step, int64_t k, bool is_last,
                                      const bf16* weights) {
    uvec a = read<uvec>(weights), b = read<uvec>(weights + PANEL);
    vec a_even = as_float(a << 16), a_odd = as_float(a & 0xffff0000u), b_even = as_float(b << 16), b_odd = as_float(b & 0xffff0000u);
    for (int r = 0; r < R; r++) {
        uint32_t bits = is_last ? pair(x + r * x_stride, step, k) : read<uint32_t>(x + r * x_stride + 2 * step);
        uint32_t even_bits = bits << 16, odd_bits = bits & 0xffff0000u;
        float even = read<float>(&even_bits), odd = read<float>(&odd_bits);
        low[r] = low[r] + even * a_even + odd * a_odd;
        high[r] = high[r] + even * b_even + odd * b_odd;
    }
}
#endif

template <int R> inline void tile_of(const bf16* x, int64_t x_stride, int64_t k, const bf16* panel, float* out) {
    vec low[R] = {}, high[R] = {};
    int64_t last = steps<bf16>(k) - 1;
    for (int64_t i = 0; i < last; i++) {
        const bf16* weights = panel + i * 2 * PANEL;
        if (R <= STREAMED_ROWS) {
            __builtin_prefetch((const char*)weights + AHEAD_BYTES);
            if (PANEL * 4 > 64) __builtin_prefetch((const char*)weights + AHEAD_BYTES + 64);
        }
        multiply<R>(low, high, x, x_stride, i, k, false, weights);
    }
    multiply<R>(low, high, x, x_stride, last, k, true, panel + last * 2 * PANEL);
    put<R>(out, low, high);
}

template <class T, int R> void tile(const T* x, int64_t x_stride, int64_t k, const T* panel, float* out) {
    tile_of<R>(x, x_stride, k, panel, out);
}

template <class T> using Tile = void (*)(const T*, int64_t, int64_t, const T*, float*);
template <class T> inline Tile<T> tile_for(int64_t rows) {
    static constexpr Tile<T> TILES[] = {nullptr, tile<T, 1>, tile<T, 2>, tile<T, 3>, tile<T, 4>, tile<T, 5>, tile<T, 6>
#ifdef __AVX512F__
                                        , tile<T, 7>, tile<T, 8>, tile<T, 9>, tile<T, 10>, tile<T, 11>, tile<T, 12>
#endif
    };
    return TILES[rows];
}

enum Finish : int64_t { PLAIN = 0, SILU = 1, GELU = 2, GELU_TANH = 3 };

inline f32x16 activated(f32x16 x, int64_t finish) {
    if (finish == SILU) return silu(x);
    for (int i = 0; i < LANES; i++)
        x[i] = finish == GELU ? 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.70710678f))
                              : 0.5f * x[i] * (1.0f + std::tanh(0.79788456f * (x[i] + 0.044715f * x[i] * x[i] * x[i])));
    return x;
}

struct Product {
    const void *x, *weight, *bias;
    void* out;
    int64_t rows, n, k, x_stride, out_stride, is_bf16, is_gated, finish, is_widened;  // the last: float32 results of bfloat16
};

template <class T> inline void add_bias(float* sums, const T* bias, int64_t count) {
    for (int64_t i = 0; i < count; i++) sums[i] += load1<T>(bias + i);
}

template <class T> inline void put_n(T* out, const float* sums, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) store_n<T>(out + i, load_n<float>(sums + i, int(count - i)), int(count - i));
}

// Stores one row of a panel: features [first, first + PANEL) of a plain weight; of a gated one HALF of the gate and HALF of the other.
template <class T, class O> inline void store_row(const Product& p, O* out, float* sums, int64_t panel) {
    const T* bias = (const T*)p.bias;
    if (!p.is_gated) {
        int64_t first = panel * PANEL, count = p.n - first < PANEL ? p.n - first : PANEL;
        if (bias) add_bias<T>(sums, bias + first, count);
        return put_n<O>(out + first, sums, count);
    }
    int64_t width = p.n / 2, first = panel * HALF, count = width - first < HALF ? width - first : HALF;
    if (bias) {
        add_bias<T>(sums, bias + first, count);
        add_bias<T>(sums + HALF, bias + width + first, count);
    }
    if (p.finish == PLAIN) {
        put_n<O>(out + first, sums, count);
        return put_n<O>(out + width + first, sums + HALF, count);
    }
    f32x16 gate = rounded<T>(load_n<float>(sums, HALF)), up = rounded<T>(load_n<float>(sums + HALF, HALF));
    store_n<O>(out + first, rounded<T>(activated(gate, p.finish)) * up, int(count));
}

template <class T, class O> void product(const Product& p, const Team& team) {
    int64_t per_panel = p.is_gated ? HALF : PANEL, features = p.is_gated ? p.n / 2 : p.n;
    int64_t panels = (features + per_panel - 1) / per_panel, elements = panel_elements<T>(p.k);
    int64_t tiles = (p.rows + TILE_ROWS - 1) / TILE_ROWS;
    alignas(64) float sums[TILE_ROWS * PANEL];
    for (int64_t begin; (begin = team.take(PANELS_AT_ONCE)) < panels;)
        for (int64_t panel = begin; panel < begin + PANELS_AT_ONCE && panel < panels; panel++)
            for (int64_t t = 0; t < tiles; t++) {  // spread evenly: 64 rows are 6 tiles of 10 or 11, not 5 of 12 and one of 4
                int64_t row = p.rows * t / tiles, count = p.rows * (t + 1) / tiles - row;
                tile_for<T>(count)((const T*)p.x + row * p.x_stride, p.x_stride, p.k, (const T*)p.weight + panel * elements, sums);
                for (int64_t r = 0; r < count; r++)
                    store_row<T, O>(p, (O*)p.out + (row + r) * p.out_stride, sums + r * PANEL, panel);
            }
}

struct Packing {
    const void* weight;
    void* packed;
    int64_t n, k, is_bf16, is_gated, unpacks;
};

// Row of the weight that feature `i` of a panel is, or -1 beyond the last.
inline int64_t row_of(const Packing& p, int64_t panel, int64_t i) {
    if (!p.is_gated) return panel * PANEL + i < p.n ? panel * PANEL + i : -1;
    int64_t row = panel * HALF + i % HALF;
    return row >= p.n / 2 ? -1 : i < HALF ? row : p.n / 2 + row;
}

template <class T> void pack(const Packing& p, const Team& team) {
    int64_t per_panel = p.is_gated ? HALF : PANEL, features = p.is_gated ? p.n / 2 : p.n;
    int64_t panels = (features + per_panel - 1) / per_panel, elements = panel_elements<T>(p.k), side = SIDE<T>;
    for (int64_t panel = team.first(panels); panel < team.last(panels); panel++) {
        T* packed = (T*)p.packed + panel * elements;
        if (!p.unpacks) std::memset((void*)packed, 0, elements * sizeof(T));
        for (int64_t i = 0; i < PANEL; i++) {
            int64_t row = row_of(p, panel, i);
            if (row < 0) continue;
            T* plain = (T*)p.weight + row * p.k;
            for (int64_t j = 0; j < p.k; j++) {
                T& place = packed[(j / side * PANEL + i) * side + j % side];
                if (p.unpacks)
                    plain[j] = place;
                else
                    place = plain[j];
            }
        }
    }
}

struct Lookup {
    const int64_t* ids;
    const void* table;
    void* out;
    int64_t count, k, is_bf16, is_packed;
};

template <class T> void lookup(const Lookup& l, const Team& team) {
    int64_t side = SIDE<T>;
    for (int64_t i = team.first(l.count); i < team.last(l.count); i++) {
        T* to = (T*)l.out + i * l.k;
        if (!l.is_packed) {
            std::memcpy((void*)to, (const T*)l.table + l.ids[i] * l.k, l.k * sizeof(T));
            continue;
        }
        const T* from = (const T*)l.table + l.ids[i] / PANEL * panel_elements<T>(l.k) + l.ids[i] % PANEL * side;
        for (int64_t j = 0; j < l.k; j++) to[j] = from[j / side * PANEL * side + j % side];
    }
}

}  // namespace

// x [rows, k] times a packed weight of n features, bias [n] or null -> out: [rows, n], or [rows, n / 2] of a gated weight that is
// activated (`finish`), which is never widened.
extern "C" void kvloom_product(const void* arguments, const Team& team) {
    const Product& p = *(const Product*)arguments;
    if (!p.is_bf16) return product<float, float>(p, team);
    p.is_widened ? product<bf16, float>(p, team) : product<bf16, bf16>(p, team);
}

// weight [n, k] -> panels, or back.
extern "C" void kvloom_pack(const void* arguments, const Team& team) {
    const Packing& p = *(const Packing*)arguments;
    p.is_bf16 ? pack<bf16>(p, team) : pack<float>(p, team);
}

// Rows `ids` [count] of a weight, packed and not gated or as it was -> out [count, k].
extern "C" void kvloom_lookup(const void* arguments, const Team& team) {
    const Lookup& l = *(const Lookup*)arguments;
    l.is_bf16 ? lookup<bf16>(l, team) : lookup<float>(l, team);
}

// Elements that a packed weight takes.
extern "C" int64_t kvloom_packed_elements(int64_t n, int64_t k, int is_bf16, int is_gated) {
    int64_t per_panel = is_gated ? HALF : PANEL, features = is_gated ? n / 2 : n;
    return (features + per_panel - 1) / per_panel * (is_bf16 ? panel_elements<bf16>(k) : panel_elements<float>(k));
}

// 1 when bfloat16 is multiplied natively.
extern "C" int kvloom_has_native_bf16() {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}
