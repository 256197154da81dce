// Two elements side by side in one 32-bit lane, the unit in which bfloat16 is multiplied, and the float32 counterpart of one element.
#pragma once
#include "common.h"

template <class T> struct Pairs;

template <> struct Pairs<float> {
    static constexpr int SIDE = 1;
    typedef float Scalar;
    static Scalar get(const float* x, int64_t step, int64_t) { return x[step]; }
    static void multiply(f32x16& sum, Scalar a, const float* b) { sum += a * load<float>(b); }
    static void multiply_n(f32x16& sum, Scalar a, const float* b, int n) { sum += a * load_n<float>(b, n); }
};

template <> struct Pairs<bf16> {
    static constexpr int SIDE = 2;
    typedef uint32_t Scalar;
    // Elements 2 * step and 2 * step + 1 of x; the one at `size` or beyond is 0.
    static Scalar get(const bf16* x, int64_t step, int64_t size) {
        if (2 * step + 1 >= size) return x[2 * step].bits;
        uint32_t out;
        std::memcpy(&out, x + 2 * step, sizeof out);
        return out;
    }
    static void multiply_bits(f32x16& sum, Scalar a, u32x16 b) {
#ifdef __AVX512BF16__
        sum = (f32x16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
#else
        uint32_t even_bits = a << 16, odd_bits = a & 0xffff0000u;
        float even, odd;
        std::memcpy(&even, &even_bits, sizeof even);
        std::memcpy(&odd, &odd_bits, sizeof odd);
        u32x16 even_b = b << 16, odd_b = b & 0xffff0000u;
        f32x16 x, y;
        std::memcpy(&x, &even_b, sizeof x);
        std::memcpy(&y, &odd_b, sizeof y);
        sum = sum + even * x + odd * y;
#endif
    }
    // sum += a times the 16 pairs at b.
    static void multiply(f32x16& sum, Scalar a, const bf16* b) {
        u32x16 bits;
        std::memcpy(&bits, b, sizeof bits);
        multiply_bits(sum, a, bits);
    }
    static void multiply_n(f32x16& sum, Scalar a, const bf16* b, int n) {
        if (n >= LANES) return multiply(sum, a, b);
        u32x16 bits = {};
        std::memcpy(&bits, b, n * sizeof(uint32_t));
        multiply_bits(sum, a, bits);
    }
};
