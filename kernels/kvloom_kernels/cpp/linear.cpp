// bfloat16 matrix product: x [M, K] times the rows of w [N, K], accumulated in float32. Needs AVX-512 BF16; else nothing is here.
//
// Weights stay as the checkpoint has them. Few rows: dot products along K, bound by reading w once. More rows: 32 rows of w at a time
// are transposed into a panel [K / 2][32][2] that fits the cache, and tiles of 12 x 32 results are computed from it. That saves keeping
// a second, packed copy of every weight, and from 16 rows on was never more than 4 % slower than torch (scripts/bench_kernels).
#include "common.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#include <vector>

namespace {

constexpr int PANEL = 32;
constexpr int TILE_ROWS = 12;  // 12 x 2 accumulators, 2 of w and 1 of x fill the 32 registers
constexpr int AHEAD = 16;      // rows of w that dot products fetch in advance
constexpr int DOT_ROWS = 6;    // up to here dot products win

inline __m512bh as_bf16(__m512i x) { return (__m512bh)x; }

// out[c][r] = in[r][c] for 16 x 16 32-bit elements.
inline void transpose16(__m512i* r) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

// Up to 32 rows of w into panel[K / 2][32][2]; rows beyond `count` and elements beyond K are 0.
void pack(const bf16* w, int64_t k, int64_t count, uint32_t* panel) {
    int64_t pairs = k / 2;
    for (int64_t p = 0; p < pairs; p += 16) {
        int left = int(pairs - p < 16 ? pairs - p : 16);
        __mmask16 mask = __mmask16((1u << left) - 1);
        for (int half = 0; half < 2; half++) {
            __m512i rows[16];
            for (int r = 0; r < 16; r++) {
                int64_t n = half * 16 + r;
                rows[r] = n < count ? _mm512_maskz_loadu_epi32(mask, (const uint32_t*)(w + n * k) + p) : _mm512_setzero_si512();
            }
            transpose16(rows);
            for (int c = 0; c < left; c++) _mm512_store_si512(panel + (p + c) * PANEL + half * 16, rows[c]);
        }
    }
}

inline void store_results(bf16* out, __m512 low, __m512 high, const bf16* bias, int64_t count) {
    __mmask32 mask = count >= PANEL ? 0xffffffffu : (1u << count) - 1;
    if (bias) {
        __m512i b = _mm512_maskz_loadu_epi16(mask, bias);
        low = _mm512_add_ps(low, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(b)), 16)));
        high = _mm512_add_ps(high, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(b, 1)), 16)));
    }
    _mm512_mask_storeu_epi16(out, mask, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

// R x 32 results. `ahead`: rows of w that the next panel is made of, fetched on the way; null when there is nothing to fetch.
template <int R>
void tile(const bf16* x, int64_t k, const uint32_t* panel, bf16* out, int64_t out_stride, const bf16* bias, int64_t count,
          const char* ahead) {
    __m512 low[R], high[R];
    for (int r = 0; r < R; r++) low[r] = high[r] = _mm512_setzero_ps();
    for (int64_t p = 0; p < k / 2; p++) {
        if (ahead) {  // 32 rows of k elements are k lines
            _mm_prefetch(ahead + p * 128, _MM_HINT_T1);
            _mm_prefetch(ahead + p * 128 + 64, _MM_HINT_T1);
        }
        __m512bh a = as_bf16(_mm512_load_si512(panel + p * PANEL)), b = as_bf16(_mm512_load_si512(panel + p * PANEL + 16));
        for (int r = 0; r < R; r++) {
            int32_t pair;
            std::memcpy(&pair, x + r * k + 2 * p, sizeof pair);
            __m512bh v = as_bf16(_mm512_set1_epi32(pair));
            low[r] = _mm512_dpbf16_ps(low[r], a, v);
            high[r] = _mm512_dpbf16_ps(high[r], b, v);
        }
    }
    for (int r = 0; r < R; r++) store_results(out + r * out_stride, low[r], high[r], bias, count);
}

typedef void (*Tile)(const bf16*, int64_t, const uint32_t*, bf16*, int64_t, const bf16*, int64_t, const char*);
constexpr Tile TILES[TILE_ROWS + 1] = {nullptr, tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>,
                                       tile<7>, tile<8>, tile<9>, tile<10>, tile<11>, tile<12>};

void by_panels(const bf16* x, const bf16* w, const bf16* bias, bf16* out, int64_t m, int64_t n, int64_t k, int threads) {
    int64_t panels = (n + PANEL - 1) / PANEL;
#pragma omp parallel num_threads(threads)
    {
        std::vector<uint32_t> memory(k / 2 * PANEL + 16);
        uint32_t* panel = (uint32_t*)(((uintptr_t)memory.data() + 63) / 64 * 64);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < panels; i++) {
            int64_t first = i * PANEL, count = n - first < PANEL ? n - first : PANEL;
            pack(w + first * k, k, count, panel);
            // Rows are spread evenly: 64 rows are 6 tiles of 10 or 11, not 5 of 12 and one of 4.
            int64_t tiles = (m + TILE_ROWS - 1) / TILE_ROWS;
            for (int64_t t = 0; t < tiles; t++) {
                int64_t row = m * t / tiles, rows = m * (t + 1) / tiles - row;
                const char* ahead = t == 0 && first + 2 * PANEL <= n ? (const char*)(w + (first + PANEL) * k) : nullptr;
                TILES[rows](x + row * k, k, panel, out + row * n + first, n, bias ? bias + first : nullptr, count, ahead);
            }
        }
    }
}

template <int R>
void dots(const bf16* x, const bf16* w, const bf16* bias, bf16* out, int64_t n, int64_t k, int threads) {
    constexpr int COLUMNS = R == 1 ? 8 : R == 2 ? 4 : 2;  // rows of w at a time: as many independent chains as the latency needs
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t first = 0; first < n; first += COLUMNS) {
        __m512 sum[R][COLUMNS];
        for (int r = 0; r < R; r++)
            for (int c = 0; c < COLUMNS; c++) sum[r][c] = _mm512_setzero_ps();
        int64_t last = n - 1;
        for (int64_t e = 0; e < k; e += 32) {
            __mmask32 mask = k - e >= 32 ? 0xffffffffu : (1u << (k - e)) - 1;
            __m512bh v[R];
            for (int r = 0; r < R; r++) v[r] = as_bf16(_mm512_maskz_loadu_epi16(mask, x + r * k + e));
            for (int c = 0; c < COLUMNS; c++) {
                int64_t row = first + c < last ? first + c : last;
                __m512bh a = as_bf16(_mm512_maskz_loadu_epi16(mask, w + row * k + e));
                _mm_prefetch((const char*)(w + (row + AHEAD) * k + e), _MM_HINT_T0);
                for (int r = 0; r < R; r++) sum[r][c] = _mm512_dpbf16_ps(sum[r][c], a, v[r]);
            }
        }
        for (int c = 0; c < COLUMNS && first + c < n; c++)
            for (int r = 0; r < R; r++) {
                float total = _mm512_reduce_add_ps(sum[r][c]) + (bias ? load1<bf16>(bias + first + c) : 0.0f);
                out[r * n + first + c].bits = narrow1(total);
            }
    }
}

}  // namespace

// 1 when kvloom_linear can be called here.
extern "C" int kvloom_has_linear() { return 1; }

// x [m, k], w [n, k], bias [n] or null -> out [m, n]; all bfloat16, k even.
extern "C" void kvloom_linear(const void* x, const void* w, const void* bias, void* out, int64_t m, int64_t n, int64_t k, int threads) {
    const bf16 *a = (const bf16*)x, *b = (const bf16*)w, *c = (const bf16*)bias;
    bf16* o = (bf16*)out;
    switch (m <= DOT_ROWS ? m : 0) {
        case 1: return dots<1>(a, b, c, o, n, k, threads);
        case 2: return dots<2>(a, b, c, o, n, k, threads);
        case 3: return dots<3>(a, b, c, o, n, k, threads);
        case 4: return dots<4>(a, b, c, o, n, k, threads);
        case 5: return dots<5>(a, b, c, o, n, k, threads);
        case 6: return dots<6>(a, b, c, o, n, k, threads);
        default: return by_panels(a, b, c, o, m, n, k, threads);
    }
}
#else
extern "C" int kvloom_has_linear() { return 0; }
extern "C" void kvloom_linear(const void*, const void*, const void*, void*, int64_t, int64_t, int64_t, int) {}
#endif
