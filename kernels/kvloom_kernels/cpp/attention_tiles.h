// One round of attention by AMX. 16 keys of a block are the columns of a tile, as they lie; so are 16 columns of 16 values.
#pragma once
#include "attention_rounds.h"
#include "tiles.h"

#ifdef HAS_TILES
namespace {

class RoundByTiles {
public:
    static constexpr int64_t ROW_UNIT = TILE_ROWS_MOST;

    // Whether an attention's sizes are whole tiles.
    static bool takes(const Attend& s) { return s.dim % TILE_DEPTH == 0 && s.value_dim % LANES == 0 && may_use_tiles(); }

    void operator()(const Attend& s, Rows<bf16>& w, const Keys<bf16>* groups, int count, const int64_t* positions) {
        uint8_t rows = uint8_t(w.count < TILE_ROWS_MOST ? w.count : TILE_ROWS_MOST);
        shapes_.set({rows, rows, rows, rows, rows, 16, rows, 8}, {64, 64, 64, 64, 64, 64, 32, 64});
        for (int g = 0; g < count; g++) fetch_next(s, groups[g]);
        const bf16* values[GROUPS];
        for (int g = 0; g < count; g++) values[g] = whole_values(s, groups[g], g);
        for (int m = 0; m < w.count; m += TILE_ROWS_MOST) {
            scores_of(w, m, groups, count);
            for (int r = 0; r < rows && m + r < w.count; r++) {
                f32x16 p[GROUPS];
                for (int g = 0; g < count; g++) p[g] = load<float>(&scores_[r][g * LANES]);
                softmax_round<bf16>(s, w, m + r, p, groups, count, positions, factors_[r]);
            }
            float* out = w.out.data() + m * s.value_dim;
            for (int64_t column = 0; column < s.value_dim; column += 4 * LANES) {
                int64_t left = (s.value_dim - column) / LANES;
                if (left >= 4) add_values<4>(s, values, count, out + column, column);
                if (left == 3) add_values<3>(s, values, count, out + column, column);
                if (left == 2) add_values<2>(s, values, count, out + column, column);
                if (left == 1) add_values<1>(s, values, count, out + column, column);
            }
        }
    }

private:
    // Tiles 0 to 3 are sums, 4 and 5 queries and keys, 6 and 7 factors and values.
    static constexpr int64_t STEPS = TILE_DEPTH / 2;
    TileShapes shapes_;
    alignas(64) float scores_[TILE_ROWS_MOST][ROUND];
    alignas(64) uint32_t factors_[TILE_ROWS_MOST][ROUND / 2];
    std::vector<bf16> copies_[GROUPS];  // values of groups that are not read whole

    static void fetch_next(const Attend& s, const Keys<bf16>& k) {
        if (!k.next_keys) return;
        for (int64_t step = 0; step < s.dim / 2; step++) __builtin_prefetch(k.next_keys + step * k.stride);
        for (int64_t i = 0; i < LANES * s.value_dim; i += 32) __builtin_prefetch(k.next_values + i);
    }

    // The values of a group with nothing where nobody looks: 0 times what lies there may be no number.
    const bf16* whole_values(const Attend& s, const Keys<bf16>& k, int g) {
        if (k.from == 0 && k.to == LANES) return k.values;
        copies_[g].assign(LANES * s.value_dim, bf16{0});
        for (int i = k.from; i < k.to; i++)
            for (int64_t d = 0; d < s.value_dim; d++) {
                int64_t at = (i / 2 * s.value_dim + d) * 2 + i % 2;
                copies_[g][at] = k.values[at];
            }
        return copies_[g].data();
    }

    void scores_of(const Rows<bf16>& w, int m, const Keys<bf16>* groups, int count) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t i = 0; i < w.q_steps; i += STEPS) {
            _tile_loadd(4, w.q.data() + m * w.q_steps + i, w.q_steps * sizeof(uint32_t));
            add_scores<0>(groups, count, i);
            add_scores<1>(groups, count, i);
            add_scores<2>(groups, count, i);
            add_scores<3>(groups, count, i);
        }
        constexpr int64_t ROW_BYTES = sizeof scores_[0];
        _tile_stored(0, &scores_[0][0], ROW_BYTES);
        _tile_stored(1, &scores_[0][LANES], ROW_BYTES);
        _tile_stored(2, &scores_[0][2 * LANES], ROW_BYTES);
        _tile_stored(3, &scores_[0][3 * LANES], ROW_BYTES);
    }

    template <int G> static void add_scores(const Keys<bf16>* groups, int count, int64_t step) {
        if (G >= count) return;
        _tile_loadd(5, groups[G].keys + step * groups[G].stride, groups[G].stride * sizeof(bf16));
        multiply<G, 4, 5>();
    }

    template <int C> void add_values(const Attend& s, const bf16* const* values, int count, float* out, int64_t column) {
        int64_t out_bytes = s.value_dim * sizeof(float), row_bytes = s.value_dim * 2 * sizeof(bf16);
        _tile_loadd(0, out, out_bytes);
        if (C > 1) _tile_loadd(1, out + LANES, out_bytes);
        if (C > 2) _tile_loadd(2, out + 2 * LANES, out_bytes);
        if (C > 3) _tile_loadd(3, out + 3 * LANES, out_bytes);
        for (int g = 0; g < count; g++) {
            const bf16* v = values[g] + column * 2;
            _tile_loadd(6, &factors_[0][g * LANES / 2], sizeof factors_[0]);
            _tile_loadd(7, v, row_bytes);
            multiply<0, 6, 7>();
            if (C > 1) _tile_loadd(7, v + 2 * LANES, row_bytes);
            if (C > 1) multiply<1, 6, 7>();
            if (C > 2) _tile_loadd(7, v + 4 * LANES, row_bytes);
            if (C > 2) multiply<2, 6, 7>();
            if (C > 3) _tile_loadd(7, v + 6 * LANES, row_bytes);
            if (C > 3) multiply<3, 6, 7>();
        }
        _tile_stored(0, out, out_bytes);
        if (C > 1) _tile_stored(1, out + LANES, out_bytes);
        if (C > 2) _tile_stored(2, out + 2 * LANES, out_bytes);
        if (C > 3) _tile_stored(3, out + 3 * LANES, out_bytes);
    }

    // The compiler's intrinsic takes numbers, not constants that become such in a template.
    template <int OUT, int A, int B> static void multiply() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(OUT), "i"(A), "i"(B));
    }
};

}  // namespace
#endif
