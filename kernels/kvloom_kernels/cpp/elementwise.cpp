// What lies between matrix products: norms with the residual addition, gated activations, rotation and writing of the KV cache.
#include "common.h"
#include "team.h"
#include <cmath>
#include <initializer_list>

namespace {

// x / sqrt(mean(x^2) + eps) * weight over n elements; the quotient is rounded to T before it is multiplied, as models were trained.
template <class T> inline void normalise(const T* x, const T* weight, T* out, int64_t n, float eps) {
    floats squares = {};
    for (int64_t i = 0; i < n; i += LANES) {
        floats v = load_n<T>(x + i, int(n - i));
        squares += v * v;
    }
    float factor = 1.0f / std::sqrt(sum(squares) / float(n) + eps);
    for (int64_t i = 0; i < n; i += LANES) {
        int left = int(n - i);
        store_n<T>(out + i, rounded<T>(load_n<T>(x + i, left) * factor) * load_n<T>(weight + i, left), left);
    }
}

struct Norm {
    const void *x, *residual, *weight;
    void *stream, *out;
    int64_t rows, width, is_bf16;
    float eps;
};

template <class T> void norm(const Norm& n, const Team& team) {
    team.each(n.rows, [&](int64_t r) {
        const T* row = (const T*)n.x + r * n.width;
        if (n.residual) {
            T* total = (T*)n.stream + r * n.width;
            for (int64_t i = 0; i < n.width; i += LANES) {
                int left = int(n.width - i);
                store_n<T>(total + i, load_n<T>(row + i, left) + load_n<T>((const T*)n.residual + r * n.width + i, left), left);
            }
            row = total;
        }
        normalise<T>(row, (const T*)n.weight, (T*)n.out + r * n.width, n.width, n.eps);
    });
}

struct Gated {
    const void* gate_up;
    void* out;
    int64_t rows, width, is_bf16, finish;
};

template <class T> void gated_mul(const Gated& g, const Team& team) {
    team.each(g.rows, [&](int64_t r) {
        const T *gate = (const T*)g.gate_up + 2 * r * g.width, *up = gate + g.width;
        for (int64_t i = 0; i < g.width; i += LANES) {
            int left = int(g.width - i);
            store_n<T>((T*)g.out + r * g.width + i, rounded<T>(activated(load_n<T>(gate + i, left), g.finish)) * load_n<T>(up + i, left), left);
        }
    });
}

// Element i of the rotated part is paired with element i + half.
template <class T> inline void rotate(T* head, const float* cosines, const float* sines, int64_t half) {
    for (int64_t i = 0; i < half; i += LANES) {
        int left = int(half - i);
        floats a = load_n<T>(head + i, left), b = load_n<T>(head + half + i, left);
        floats c = load_n<float>(cosines + i, left), s = load_n<float>(sines + i, left);
        store_n<T>(head + i, a * c - b * s, left);
        store_n<T>(head + half + i, b * c + a * s, left);
    }
}

struct Heads {
    void* data;
    const void* norm;
    int64_t stride, count;
};

struct Write {
    Heads q, k;
    const void* v;
    const float* table;
    const int64_t *positions, *slots;
    void *k_cache, *v_cache;
    int64_t v_stride, rows, dim, value_dim, rotary_dim, block_tokens, is_bf16;
    float eps;
};

// Where the cache keeps a token.
template <class T> struct Place {
    const Write& w;
    int64_t block, offset;

    Place(const Write& w, int64_t t) : w(w), block(w.slots[t] / w.block_tokens), offset(w.slots[t] % w.block_tokens) {}

    // Whether values of token t and of the one before, or after, lie side by side: the first of the two writes both.
    bool follows(int64_t t) const { return SIDE<T> == 2 && offset % 2 && t > 0 && w.slots[t - 1] + 1 == w.slots[t]; }
    bool is_followed(int64_t t) const {
        return SIDE<T> == 2 && offset % 2 == 0 && offset + 1 < w.block_tokens && t + 1 < w.rows && w.slots[t] + 1 == w.slots[t + 1];
    }

    T* keys(int64_t h) const {
        int64_t steps = (w.dim + SIDE<T> - 1) / SIDE<T>;
        return (T*)w.k_cache + (block * w.k.count + h) * steps * SIDE<T> * w.block_tokens + offset * SIDE<T>;
    }
    T* values(int64_t h) const {
        int64_t pairs = (w.block_tokens + SIDE<T> - 1) / SIDE<T>;
        return (T*)w.v_cache + (block * w.k.count + h) * pairs * SIDE<T> * w.value_dim + offset / SIDE<T> * w.value_dim * SIDE<T> + offset % SIDE<T>;
    }
};

template <class T> void write_keys(const Write& w, const Place<T>& place, int64_t t) {
    for (int64_t h = 0; h < w.k.count; h++) {
        const T* head = (const T*)w.k.data + t * w.k.stride + h * w.dim;
        T* to = place.keys(h);
        int64_t d = 0;
        for (; d + SIDE<T> <= w.dim; d += SIDE<T>) std::memcpy((void*)(to + d * w.block_tokens), head + d, SIDE<T> * sizeof(T));
        if (d < w.dim) to[d * w.block_tokens] = head[d];
    }
}

template <class T> void write_values(const Write& w, const Place<T>& place, int64_t t) {
    for (int64_t h = 0; h < w.k.count; h++) {
        const T* value = (const T*)w.v + t * w.v_stride + h * w.value_dim;
        T* to = place.values(h);
        for (int64_t d = 0; d < w.value_dim; d++) to[d * SIDE<T>] = value[d];
    }
}

// Those of two tokens that lie side by side.
inline void write_both(const Write& w, const Place<bf16>& place, int64_t t) {
    for (int64_t h = 0; h < w.k.count; h++) {
        const uint16_t *first = (const uint16_t*)w.v + t * w.v_stride + h * w.value_dim, *second = first + w.v_stride;
        uint32_t* to = (uint32_t*)place.values(h);
        for (int64_t d = 0; d < w.value_dim; d++) to[d] = first[d] | uint32_t(second[d]) << 16;
    }
}
inline void write_both(const Write&, const Place<float>&, int64_t) {}

template <class T> void norm_rope_write(const Write& w, const Team& team) {
    team.each(w.rows, [&](int64_t t) {
        const float *cosines = w.table + (w.rotary_dim ? w.positions[t] * w.rotary_dim : 0), *sines = cosines + w.rotary_dim / 2;
        for (const Heads* part : {&w.q, &w.k})
            for (int64_t h = 0; h < part->count; h++) {
                T* head = (T*)part->data + t * part->stride + h * w.dim;
                if (part->norm) normalise<T>(head, (const T*)part->norm, head, w.dim, w.eps);
                rotate<T>(head, cosines, sines, w.rotary_dim / 2);
            }
        Place<T> place(w, t);
        write_keys(w, place, t);
        if (place.follows(t)) return;
        place.is_followed(t) ? write_both(w, place, t) : write_values(w, place, t);
    });
}

}  // namespace

// stream = residual + x (or nothing when residual is null), out = norm(stream or x) * weight; all [rows, width].
extern "C" void kvloom_rms_norm(const void* arguments, const Team& team) {
    const Norm& n = *(const Norm*)arguments;
    n.is_bf16 ? norm<bf16>(n, team) : norm<float>(n, team);
}

// gate_up [rows, 2 * width] -> activation(gate) * up [rows, width].
extern "C" void kvloom_gated_mul(const void* arguments, const Team& team) {
    const Gated& g = *(const Gated*)arguments;
    g.is_bf16 ? gated_mul<bf16>(g, team) : gated_mul<float>(g, team);
}

// Per-head norms (weights or null), rotation in place on q [T, heads, dim] and k [T, kv_heads, dim], then k and v to their slots, in
// the layout of attention.cpp. A rotary_dim of 0 rotates nothing.
extern "C" void kvloom_norm_rope_write(const void* arguments, const Team& team) {
    const Write& w = *(const Write*)arguments;
    w.is_bf16 ? norm_rope_write<bf16>(w, team) : norm_rope_write<float>(w, team);
}
