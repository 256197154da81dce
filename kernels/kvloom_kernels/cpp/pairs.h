// Two elements side by side in one 32-bit lane, the unit in which bfloat16 is multiplied, and the float32 counterpart of one element.
// A factor is what one lane of all pairs of a vector is multiplied with.
#pragma once
#include "common.h"

template <class T> struct Pairs;

template <> struct Pairs<float> {
    typedef float Factor;
    typedef floats Read;
    static void get_all(const float* x, int64_t size, Factor* out) { std::memcpy(out, x, size * sizeof(float)); }
    static Read read(const float* b) { return load<float>(b); }
    static void multiply(floats& sum, Factor a, Read b) { add_product(sum, a, b); }
};

template <> struct Pairs<bf16> {
#ifdef __AVX512BF16__
    typedef uint32_t Factor;
    typedef words Read;
    // The elements of x; the one beyond `size` is 0.
    static void get_all(const bf16* x, int64_t size, Factor* out) {
        if (size % 2) out[size / 2] = 0;
        std::memcpy(out, x, size * sizeof(bf16));
    }
    // The pairs at b.
    static Read read(const bf16* b) {
        words out;
        std::memcpy(&out, b, sizeof out);
        return out;
    }
    // sum += a times pairs.
    static void multiply(floats& sum, Factor a, Read b) {
        sum = (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
    }
#else
    // float32, which is broadcast while it is read.
    struct Factor {
        float even, odd;
    };
    struct Read {
        floats even, odd;
    };
    static void get_all(const bf16* x, int64_t size, Factor* out) {
        if (size % 2) out[size / 2] = {0, 0};
        for (int64_t i = 0; i < size; i += LANES) store_n<float>((float*)out + i, load_n<bf16>(x + i, int(size - i)), int(size - i));
    }
    static Read read(const bf16* b) {
        words both;
        std::memcpy(&both, b, sizeof both);
        return {(floats)(both << 16), (floats)(both & 0xffff0000u)};
    }
    static void multiply(floats& sum, Factor a, Read b) {
        add_product(sum, a.even, b.even);
        add_product(sum, a.odd, b.odd);
    }
#endif
};
