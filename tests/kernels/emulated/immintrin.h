// Stands in for the compiler's header where a test compiles the kernels for a CPU that this one is not: every AVX-512, AVX-512-bf16 and
// AMX operation that they use, computed with AVX2. Slow, and strict where the CPU is: what is not aligned, and tiles that do not fit,
// end the process. AMX's sums are made in the order in which the CPU makes them; nothing is said of denormal numbers.
#pragma once

// The compiler's own header, for its types and for AVX2. It must not think that the CPU has what is emulated.
#pragma push_macro("__AVX512F__")
#pragma push_macro("__AVX512BF16__")
#pragma push_macro("__AMX_BF16__")
#undef __AVX512F__
#undef __AVX512BF16__
#undef __AMX_BF16__
#include_next <immintrin.h>
#pragma pop_macro("__AMX_BF16__")
#pragma pop_macro("__AVX512BF16__")
#pragma pop_macro("__AVX512F__")

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/syscall.h>
#include <unistd.h>

namespace emulated {

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

inline void must(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "emulated CPU: %s\n", what);
    std::abort();
}

inline void must_be_aligned(const void* p) { must(uintptr_t(p) % 64 == 0, "an aligned operation on memory that is not"); }

template <class F> inline Floats each(F f) {
    Floats out;
    for (int i = 0; i < 16; i++) out[i] = f(i);
    return out;
}

template <class F> inline uint16_t bits(F f) {
    uint16_t out = 0;
    for (int i = 0; i < 16; i++) out |= uint16_t(f(i)) << i;
    return out;
}

inline Floats fused(Floats a, Floats b, Floats sum) {
    __m256 halves[3][2];
    std::memcpy(halves[0], &a, 64);
    std::memcpy(halves[1], &b, 64);
    std::memcpy(halves[2], &sum, 64);
    for (int i = 0; i < 2; i++) halves[2][i] = _mm256_fmadd_ps(halves[0][i], halves[1][i], halves[2][i]);
    std::memcpy(&sum, halves[2], 64);
    return sum;
}

// The first and the second bfloat16 of each pair.
inline Floats even(Words pairs) { return (Floats)(pairs << 16); }
inline Floats odd(Words pairs) { return (Floats)(pairs & 0xffff0000u); }

inline Halves narrow(Floats x) {
    Words bits = (Words)x;
    Words out = x != x ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector(out, Halves);
}

struct Tiles {
    struct Shapes {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shapes;
    bool are_set = false;
    Words data[8][16];

    void set(const void* config) {
        std::memcpy(&shapes, config, sizeof shapes);
        must(shapes.palette == 1 && shapes.start_row == 0, "a palette that there is not");
        for (int i = 0; i < 8; i++) must(shapes.rows[i] <= 16 && shapes.row_bytes[i] <= 64, "a tile that is too large");
        std::memset(data, 0, sizeof data);
        are_set = true;
    }

    void check(int tile) { must(are_set && shapes.rows[tile] && shapes.row_bytes[tile], "a tile that has no shape"); }

    void zero(int tile) {
        check(tile);
        std::memset(data[tile], 0, sizeof data[tile]);
    }

    void load(int tile, const void* from, int64_t stride) {
        zero(tile);
        for (int r = 0; r < shapes.rows[tile]; r++) std::memcpy(&data[tile][r], (const char*)from + r * stride, shapes.row_bytes[tile]);
    }

    void store(int tile, void* to, int64_t stride) {
        check(tile);
        for (int r = 0; r < shapes.rows[tile]; r++) std::memcpy((char*)to + r * stride, &data[tile][r], shapes.row_bytes[tile]);
    }

    void multiply(int out, int a, int b) {
        check(out);
        check(a);
        check(b);
        int depth = shapes.row_bytes[a] / 4;
        must(shapes.rows[a] == shapes.rows[out] && shapes.row_bytes[b] == shapes.row_bytes[out] && shapes.rows[b] == depth,
             "tiles that cannot be multiplied");
        for (int m = 0; m < shapes.rows[out]; m++) {
            Floats first = {}, second = {};
            for (int k = 0; k < depth; k++) {
                Words pair = data[a][m][k] - Words{};
                first = fused(even(pair), even(data[b][k]), first);
                second = fused(odd(pair), odd(data[b][k]), second);
            }
            data[out][m] = (Words)((Floats)data[out][m] + (first + second));
        }
    }
};

inline thread_local Tiles tiles;

}  // namespace emulated

#define _mm512_max_ps(a, b) ((__m512)emulated::each([x = (__m512)(a), y = (__m512)(b)](int i) { return x[i] > y[i] ? x[i] : y[i]; }))
#define _mm512_sub_ps(a, b) ((__m512)((emulated::Floats)(a) - (emulated::Floats)(b)))
#define _mm512_roundscale_ps(a, how) ((__m512)emulated::each([x = (__m512)(a)](int i) { return std::nearbyint(x[i]); }))
#define _mm512_cmp_ps_mask(a, b, how)                                   \
    emulated::bits([x = (__m512)(a), y = (__m512)(b)](int i) {          \
        static_assert((how) == _CMP_NEQ_UQ, "this comparison alone");   \
        return x[i] != y[i];                                            \
    })
#define _mm512_maskz_scalef_ps(mask, a, n) \
    ((__m512)emulated::each([m = (mask), x = (__m512)(a), y = (__m512)(n)](int i) { return m >> i & 1 ? x[i] * std::exp2(std::floor(y[i])) : 0.0f; }))
#define _mm512_cvtepu16_epi32(a) ((__m512i)__builtin_convertvector((emulated::Halves)(a), emulated::Words))
#define _mm512_slli_epi32(a, n) ((__m512i)((emulated::Words)(a) << (n)))
#define _mm512_fmadd_ps(a, b, sum) ((__m512)emulated::fused((emulated::Floats)(a), (emulated::Floats)(b), (emulated::Floats)(sum)))
#define _mm512_cvtneps_pbh(a) ((__m256bh)emulated::narrow((emulated::Floats)(a)))
#define _mm512_test_epi32_mask(a, b) emulated::bits([x = (emulated::Ints)(a), y = (emulated::Ints)(b)](int i) { return (x[i] & y[i]) != 0; })
// The CPU's is as far off.
#define _mm512_rcp14_ps(a) ((__m512)emulated::each([x = (__m512)(a)](int i) { return 1.0f / x[i] * (1.0f + 0x1p-15f); }))
#define _mm512_set1_epi32(a) ((__m512i)((a) - emulated::Ints{}))
#define _mm512_loadu_si512(p) emulated_loadu(p)
#define _mm512_load_si512(p) (emulated::must_be_aligned(p), emulated_loadu(p))
#define _mm512_stream_ps(p, x) emulated_stream(p, x)
#define _mm512_stream_si512(p, x) emulated_stream(p, x)
#define _mm512_reduce_add_ps(a) emulated_folded(a, [](float x, float y) { return x + y; })
#define _mm512_reduce_max_ps(a) emulated_folded(a, [](float x, float y) { return x > y ? x : y; })
#define _mm512_dpbf16_ps(sum, a, b) emulated_dpbf16((emulated::Floats)(sum), (emulated::Words)(a), (emulated::Words)(b))

inline __m512i emulated_loadu(const void* p) {
    __m512i out;
    std::memcpy(&out, p, 64);
    return out;
}

template <class Vector> inline void emulated_stream(void* p, Vector x) {
    emulated::must_be_aligned(p);
    std::memcpy(p, &x, 64);
}

// Halves first, as the compiler's does.
template <class F> inline float emulated_folded(__m512 x, F f) {
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) x[i] = f(x[i], x[i + width]);
    return x[0];
}

inline __m512 emulated_dpbf16(emulated::Floats sum, emulated::Words a, emulated::Words b) {
    using namespace emulated;
    return (__m512)fused(even(a), even(b), fused(odd(a), odd(b), sum));
}

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) emulated::tiles.set(config)
#define _tile_release() (emulated::tiles.are_set = false)
#define _tile_zero(tile) emulated::tiles.zero(tile)
#define _tile_loadd(tile, from, stride) emulated::tiles.load(tile, from, stride)
#define _tile_stored(tile, to, stride) emulated::tiles.store(tile, to, stride)
#define _tile_dpbf16ps(out, a, b) emulated::tiles.multiply(out, a, b)

// The system need not be asked for tiles (other calls are made), and no register is as wide as a vector: `asm("" : "+v"(x))` cannot be.
#define syscall(number, ...) ((number) == SYS_arch_prctl ? 0L : syscall(number, __VA_ARGS__))
#define asm(...)
