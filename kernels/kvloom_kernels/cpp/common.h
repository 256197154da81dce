// What every kernel shares: vectors of the width that the CPU has (GCC's portable ones), bfloat16, exp.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

// Wider ones than the CPU's own are no use: compilers take comparisons and conversions of those apart element by element.
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

struct bf16 {
    uint16_t bits;
};

// Elements that lie side by side in one 32-bit lane, the unit in which they are multiplied.
template <class T> constexpr int SIDE = 4 / sizeof(T);

inline floats splat(float x) { return x - floats{}; }

// 0, 1, 2 ... in the lanes.
inline floats counted() {
    floats out;
    for (int i = 0; i < LANES; i++) out[i] = float(i);
    return out;
}

inline floats widen(halves bits) {
#ifdef __AVX512F__
    return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)bits), 16);
#endif
    words wide = __builtin_convertvector(bits, words) << 16;
    floats out;
    std::memcpy(&out, &wide, sizeof out);
    return out;
}

// sum += a * b, rounded once. Compilers fuse some sums and not others, and then results depend on how many rows are computed together.
inline void add_product(floats& sum, floats a, floats b) {
#if defined(__AVX512F__)
    sum = (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__AVX2__) && defined(__FMA__)
    sum = (floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
    sum += a * b;
#endif
}
inline void add_product(floats& sum, float a, floats b) { add_product(sum, splat(a), b); }

// What is read once: compilers would read it again for each use, where an instruction can.
inline floats in_register(floats x) {
#if defined(__x86_64__)
    asm("" : "+v"(x));
#endif
    return x;
}

// Round to nearest even; NaN stays NaN.
inline halves narrow(floats x) {
#ifdef __AVX512BF16__
    return (halves)_mm512_cvtneps_pbh((__m512)x);
#endif
    words bits;
    std::memcpy(&bits, &x, sizeof bits);
    words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    words out = x != x ? (bits >> 16) | 0x40 : rounded;
#if defined(__AVX2__) && !defined(__AVX512F__)
    __m256i both = _mm256_packus_epi32((__m256i)out, (__m256i)out);
    return (halves)_mm256_castsi256_si128(_mm256_permute4x64_epi64(both, 0x08));
#else
    return __builtin_convertvector(out, halves);
#endif
}

template <class T> floats load(const T* p);
template <> inline floats load<float>(const float* p) {
    floats out;
    std::memcpy(&out, p, sizeof out);
    return out;
}
template <> inline floats load<bf16>(const bf16* p) {
    halves bits;
    std::memcpy(&bits, p, sizeof bits);
    return widen(bits);
}

template <class T> void store(T* p, floats x);
template <> inline void store<float>(float* p, floats x) { std::memcpy(p, &x, sizeof x); }
template <> inline void store<bf16>(bf16* p, floats x) {
    halves bits = narrow(x);
    std::memcpy(p, &bits, sizeof bits);
}

// x as it is once it was stored as T.
template <class T> floats rounded(floats x);
template <> inline floats rounded<float>(floats x) { return x; }
template <> inline floats rounded<bf16>(floats x) { return widen(narrow(x)); }

// The first n lanes; the others are 0.
template <class T> inline floats load_n(const T* p, int n) {
    if (n >= LANES) return load<T>(p);
    T part[LANES] = {};
    std::memcpy(part, p, n * sizeof(T));
    return load<T>(part);
}
template <class T> inline void store_n(T* p, floats x, int n) {
    if (n >= LANES) return store<T>(p, x);
    T part[LANES];
    store<T>(part, x);
    std::memcpy(p, part, n * sizeof(T));
}

template <class T> float load1(const T* p);
template <> inline float load1<float>(const float* p) { return *p; }
template <> inline float load1<bf16>(const bf16* p) {
    uint32_t bits = uint32_t(p->bits) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

template <class T> void store1(T* p, float x);
template <> inline void store1<float>(float* p, float x) { *p = x; }
template <> inline void store1<bf16>(bf16* p, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    p->bits = x != x ? uint16_t((bits >> 16) | 0x40) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#ifdef __AVX512F__
inline float sum(floats x) { return _mm512_reduce_add_ps((__m512)x); }
inline float largest(floats x) { return _mm512_reduce_max_ps((__m512)x); }
#elif defined(__AVX2__)
// op(the two halves), then of halves of those, to the end.
template <class Op> inline float folded(floats x, Op op) {
    __m128 y = op(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    y = op(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(op(y, _mm_movehdup_ps(y)));
}
inline float sum(floats x) {
    return folded(x, [](__m128 a, __m128 b) { return _mm_add_ps(a, b); });
}
inline float largest(floats x) {
    return folded(x, [](__m128 a, __m128 b) { return _mm_max_ps(a, b); });
}
#else
inline float sum(floats x) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}
inline float largest(floats x) {
    float best = x[0];
    for (int i = 1; i < LANES; i++) best = x[i] > best ? x[i] : best;
    return best;
}
#endif

// A bit for each lane of a comparison that holds.
inline uint32_t bits_of(ints holds) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)holds, (__m512i)holds);
#elif defined(__AVX2__)
    return uint32_t(_mm256_movemask_ps((__m256)holds));
#else
    uint32_t out = 0;
    for (int i = 0; i < LANES; i++) out |= uint32_t(holds[i] != 0) << i;
    return out;
#endif
}

// e^x for x <= 88, relative error below 2e-7; below -87 it gives 1e-38. NaN stays NaN.
inline floats exponential(floats x) {
    x = x < -87.0f ? splat(-87.0f) : x;
    floats n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    floats y = splat(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    ints power = (__builtin_convertvector(n, ints) + 127) << 23;
    floats scale;
    std::memcpy(&scale, &power, sizeof scale);
    return y * scale;
}

// 1 / x for x from 1 to 1e38, relative error below 2e-7. NaN stays NaN.
inline floats reciprocal(floats x) {
#ifdef __AVX512F__
    floats y = (floats)_mm512_rcp14_ps((__m512)x);
    return y + y * (1.0f - x * y);  // a division takes as long as all of the rest of what follows
#else
    return 1.0f / x;
#endif
}

// 1 / (1 + e^-x).
inline floats sigmoid(floats x) {
    floats share = reciprocal(1.0f + exponential(x < -88.0f ? splat(88.0f) : -x));
    return x < -88.0f ? floats{} : share;
}

// What a gated activation does to the gate. Numbers as in activation.py.
enum Finish : int64_t { PLAIN = 0, SILU = 1, GELU = 2, GELU_TANH = 3 };

inline floats activated(floats x, int64_t finish) {
    if (finish == SILU) return x * sigmoid(x);
    if (finish == GELU_TANH) return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x));  // (1 + tanh(y)) / 2 = sigmoid(2 y)
    for (int i = 0; i < LANES; i++) x[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.70710678f));
    return x;
}
