// What every kernel shares: 16-lane vectors (GCC's portable ones: AVX-512, AVX2 or NEON, as -march says), bfloat16, exp.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

constexpr int LANES = 16;

struct bf16 {
    uint16_t bits;
};

inline f32x16 splat(float x) { return x - f32x16{}; }

inline f32x16 widen(u16x16 bits) {
#ifdef __AVX512F__
    return (f32x16)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)bits), 16);
#endif
    u32x16 wide = __builtin_convertvector(bits, u32x16) << 16;
    f32x16 out;
    std::memcpy(&out, &wide, sizeof out);
    return out;
}

// Round to nearest even; NaN stays NaN.
inline u16x16 narrow(f32x16 x) {
#ifdef __AVX512BF16__
    return (u16x16)_mm512_cvtneps_pbh((__m512)x);
#endif
    u32x16 bits;
    std::memcpy(&bits, &x, sizeof bits);
    u32x16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    u32x16 quiet = (bits >> 16) | 0x40;
    u32x16 nan = (u32x16)(x != x);
    return __builtin_convertvector((nan & quiet) | (~nan & rounded), u16x16);
}

template <class T> f32x16 load(const T* p);
template <> inline f32x16 load<float>(const float* p) {
    f32x16 out;
    std::memcpy(&out, p, sizeof out);
    return out;
}
template <> inline f32x16 load<bf16>(const bf16* p) {
    u16x16 bits;
    std::memcpy(&bits, p, sizeof bits);
    return widen(bits);
}

template <class T> void store(T* p, f32x16 x);
template <> inline void store<float>(float* p, f32x16 x) { std::memcpy(p, &x, sizeof x); }
template <> inline void store<bf16>(bf16* p, f32x16 x) {
    u16x16 bits = narrow(x);
    std::memcpy(p, &bits, sizeof bits);
}

// x as it is once it was stored as T.
template <class T> f32x16 rounded(f32x16 x);
template <> inline f32x16 rounded<float>(f32x16 x) { return x; }
template <> inline f32x16 rounded<bf16>(f32x16 x) { return widen(narrow(x)); }

// The first n lanes; the others are 0.
template <class T> inline f32x16 load_n(const T* p, int n) {
    if (n >= LANES) return load<T>(p);
    T part[LANES] = {};
    std::memcpy(part, p, n * sizeof(T));
    return load<T>(part);
}
template <class T> inline void store_n(T* p, f32x16 x, int n) {
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

inline uint16_t narrow1(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return x != x ? uint16_t((bits >> 16) | 0x40) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#ifdef __AVX512F__
inline float sum(f32x16 x) { return _mm512_reduce_add_ps((__m512)x); }
inline float largest(f32x16 x) { return _mm512_reduce_max_ps((__m512)x); }
#else
inline float sum(f32x16 x) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}
inline float largest(f32x16 x) {
    float best = x[0];
    for (int i = 1; i < LANES; i++) best = x[i] > best ? x[i] : best;
    return best;
}
#endif

// e^x for x <= 88, relative error below 2e-7; below -87 it gives 1e-38. NaN stays NaN.
inline f32x16 exponential(f32x16 x) {
    x = x < -87.0f ? splat(-87.0f) : x;
    f32x16 n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    f32x16 r = x - n * 0.693359375f + n * 2.12194440e-4f;
    f32x16 y = splat(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    i32x16 power = (__builtin_convertvector(n, i32x16) + 127) << 23;
    f32x16 scale;
    std::memcpy(&scale, &power, sizeof scale);
    return y * scale;
}

// 1 / x for x from 1 to 1e38, relative error below 2e-7. NaN stays NaN.
inline f32x16 reciprocal(f32x16 x) {
#ifdef __AVX512F__
    f32x16 y = (f32x16)_mm512_rcp14_ps((__m512)x);
    return y + y * (1.0f - x * y);  // a division takes as long as all of the rest of what follows
#else
    return 1.0f / x;
#endif
}

// x / (1 + e^-x).
inline f32x16 silu(f32x16 x) {
    f32x16 share = reciprocal(1.0f + exponential(x < -88.0f ? splat(88.0f) : -x));
    return x * (x < -88.0f ? f32x16{} : share);
}

// What a gated activation does to the gate. Numbers as in activation.py.
enum Finish : int64_t { PLAIN = 0, SILU = 1, GELU = 2, GELU_TANH = 3 };

inline f32x16 activated(f32x16 x, int64_t finish) {
    if (finish == SILU) return silu(x);
    for (int i = 0; i < LANES; i++)
        x[i] = finish == GELU ? 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.70710678f))
                              : 0.5f * x[i] * (1.0f + std::tanh(0.79788456f * (x[i] + 0.044715f * x[i] * x[i] * x[i])));
    return x;
}
