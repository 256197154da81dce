// What lies between matrix products: norms with the residual addition, gated activations, rotation and writing of the KV cache.
#include "common.h"
#include <cmath>
#include <initializer_list>

namespace {

// x / sqrt(mean(x^2) + eps) * weight over n elements; the quotient is rounded to T before it is multiplied, as models were trained.
template <class T> inline void normalise(const T* x, const T* weight, T* out, int64_t n, float eps) {
    f32x16 squares = {};
    for (int64_t i = 0; i < n; i += LANES) {
        f32x16 v = load_n<T>(x + i, int(n - i));
        squares += v * v;
    }
    float factor = 1.0f / std::sqrt(sum(squares) / float(n) + eps);
    for (int64_t i = 0; i < n; i += LANES) {
        int left = int(n - i);
        store_n<T>(out + i, rounded<T>(load_n<T>(x + i, left) * factor) * load_n<T>(weight + i, left), left);
    }
}

template <class T>
void norm_rows(const T* x, const T* residual, const T* weight, T* stream, T* out, int64_t rows, int64_t width, float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const T* row = x + r * width;
        if (residual) {
            T* total = stream + r * width;
            for (int64_t i = 0; i < width; i += LANES) {
                int left = int(width - i);
                store_n<T>(total + i, load_n<T>(row + i, left) + load_n<T>(residual + r * width + i, left), left);
            }
            row = total;
        }
        normalise<T>(row, weight, out + r * width, width, eps);
    }
}

template <class T> void silu_mul(const T* gate_up, T* out, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const T *gate = gate_up + 2 * r * width, *up = gate + width;
        for (int64_t i = 0; i < width; i += LANES) {
            int left = int(width - i);
            f32x16 g = load_n<T>(gate + i, left);
            f32x16 negative = -g;
            f32x16 power = exponential(negative > 88.0f ? splat(88.0f) : negative);
            power = negative > 88.0f ? splat(INFINITY) : power;
            store_n<T>(out + r * width + i, rounded<T>(g / (1.0f + power)) * load_n<T>(up + i, left), left);
        }
    }
}

// Element i of the rotated part is paired with element i + half.
template <class T> inline void rotate(T* head, const float* cosines, const float* sines, int64_t half) {
    for (int64_t i = 0; i < half; i += LANES) {
        int left = int(half - i);
        f32x16 a = load_n<T>(head + i, left), b = load_n<T>(head + half + i, left);
        f32x16 c = load_n<float>(cosines + i, left), s = load_n<float>(sines + i, left);
        store_n<T>(head + i, a * c - b * s, left);
        store_n<T>(head + half + i, b * c + a * s, left);
    }
}

template <class T> struct Heads {
    T* data;
    int64_t token_stride, count;
    const T* norm;
};

template <class T>
void norm_rope_write(Heads<T> q, Heads<T> k, const T* v, int64_t v_token_stride, int64_t tokens, int64_t dim, int64_t value_dim,
                     const float* table, const int64_t* positions, int64_t rotary_dim, float eps, T* k_cache, T* v_cache,
                     const int64_t* slots, int64_t block_tokens, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
        const float *cosines = table + positions[t] * rotary_dim, *sines = cosines + rotary_dim / 2;
        for (const Heads<T>& part : {q, k})
            for (int64_t h = 0; h < part.count; h++) {
                T* head = part.data + t * part.token_stride + h * dim;
                if (part.norm) normalise<T>(head, part.norm, head, dim, eps);
                rotate<T>(head, cosines, sines, rotary_dim / 2);
            }
        int64_t block = slots[t] / block_tokens, offset = slots[t] % block_tokens;
        for (int64_t h = 0; h < k.count; h++) {
            const T* head = k.data + t * k.token_stride + h * dim;
            T* keys = k_cache + (block * k.count + h) * dim * block_tokens + offset;
            for (int64_t d = 0; d < dim; d++) keys[d * block_tokens] = head[d];
            std::memcpy(v_cache + ((block * k.count + h) * block_tokens + offset) * value_dim, v + t * v_token_stride + h * value_dim,
                        value_dim * sizeof(T));
        }
    }
}

}  // namespace

// stream = residual + x (or nothing when residual is null), out = norm(stream or x) * weight; all [rows, width].
extern "C" void kvloom_rms_norm(const void* x, const void* residual, const void* weight, void* stream, void* out, int64_t rows,
                                int64_t width, float eps, int is_bf16, int threads) {
    if (is_bf16)
        norm_rows<bf16>((const bf16*)x, (const bf16*)residual, (const bf16*)weight, (bf16*)stream, (bf16*)out, rows, width, eps, threads);
    else
        norm_rows<float>((const float*)x, (const float*)residual, (const float*)weight, (float*)stream, (float*)out, rows, width, eps,
                         threads);
}

// gate_up [rows, 2 * width] -> silu(gate) * up [rows, width].
extern "C" void kvloom_silu_mul(const void* gate_up, void* out, int64_t rows, int64_t width, int is_bf16, int threads) {
    if (is_bf16)
        silu_mul<bf16>((const bf16*)gate_up, (bf16*)out, rows, width, threads);
    else
        silu_mul<float>((const float*)gate_up, (float*)out, rows, width, threads);
}

// Per-head norms (weights or null), rotation in place on q [T, heads, dim] and k [T, kv_heads, dim], then k and v to their slots.
extern "C" void kvloom_norm_rope_write(void* q, int64_t q_token_stride, int64_t heads, void* k, int64_t k_token_stride, const void* v,
                                       int64_t v_token_stride, int64_t kv_heads, int64_t tokens, int64_t dim, int64_t value_dim,
                                       const float* table, const int64_t* positions, int64_t rotary_dim, const void* q_norm,
                                       const void* k_norm, float eps, void* k_cache, void* v_cache, const int64_t* slots,
                                       int64_t block_tokens, int is_bf16, int threads) {
    if (is_bf16)
        norm_rope_write<bf16>({(bf16*)q, q_token_stride, heads, (const bf16*)q_norm}, {(bf16*)k, k_token_stride, kv_heads, (const bf16*)k_norm},
                              (const bf16*)v, v_token_stride, tokens, dim, value_dim, table, positions, rotary_dim, eps, (bf16*)k_cache,
                              (bf16*)v_cache, slots, block_tokens, threads);
    else
        norm_rope_write<float>({(float*)q, q_token_stride, heads, (const float*)q_norm},
                               {(float*)k, k_token_stride, kv_heads, (const float*)k_norm}, (const float*)v, v_token_stride, tokens, dim,
                               value_dim, table, positions, rotary_dim, eps, (float*)k_cache, (float*)v_cache, slots, block_tokens,
                               threads);
}
