// One round of attention by AMX: 16 keys of a block are the columns of a tile, as they lie; so are 16 columns of 16 values. All scores
// of a round are made first, then all its factors, then the sums: each phase has much that does not wait for what is before it.
#pragma once
#include "attention_rounds.h"
#include "tiles.h"

#ifdef HAS_TILES
namespace {

class RoundByTiles {
public:
    static constexpr int GROUPS_AT_ONCE = 32;
    static constexpr int64_t ROW_UNIT = TILE_ROWS_MOST;

    // Whether an attention's sizes are whole tiles.
    static bool takes(const Attend& s) { return s.dim % TILE_DEPTH == 0 && s.value_dim % LANES == 0 && may_use_tiles(); }

    void operator()(const Attend& s, Rows<bf16>& w, const Keys<bf16>* groups, int count, const int64_t* positions) {
        uint8_t rows = uint8_t(w.count < TILE_ROWS_MOST ? w.count : TILE_ROWS_MOST);
        shapes_.set({rows, rows, rows, rows, rows, 16, rows, 8}, {64, 64, 64, 64, 64, 64, 32, 64});
        for (int g = 0; g < count; g++) values_[g] = whole_values(s, groups[g], g);
        for (int m = 0; m < w.count; m += TILE_ROWS_MOST) {
            for (int g = 0; g < count; g += 4) scores_of(s, w, m, groups, g, count - g < 4 ? count - g : 4);
            for (int r = 0; r < rows && m + r < w.count; r++)
                softmax_round<bf16>(s, w, m + r, scores_[r], groups, count, positions, factors_[r]);
            for (int64_t column = 0; column < s.value_dim; column += 4 * LANES) {
                float* out = w.out.data() + m * s.value_dim + column;
                int64_t left = (s.value_dim - column) / LANES;
                if (left >= 4) add_values<4>(s, count, out, column);
                if (left == 3) add_values<3>(s, count, out, column);
                if (left == 2) add_values<2>(s, count, out, column);
                if (left == 1) add_values<1>(s, count, out, column);
            }
        }
    }

private:
    // Tiles 0 to 3 are sums, 4 and 5 queries and keys, 6 and 7 factors and values. Rows of scores are not a power of two apart.
    static constexpr int64_t STEPS = TILE_DEPTH / 2, KEYS = GROUPS_AT_ONCE * LANES;
    TileShapes shapes_;
    alignas(64) float scores_[TILE_ROWS_MOST][KEYS + LANES];
    alignas(64) uint32_t factors_[TILE_ROWS_MOST][KEYS / 2 + LANES];
    const bf16* values_[GROUPS_AT_ONCE];
    std::vector<bf16> copies_[GROUPS_AT_ONCE];  // values of groups that are not read whole

    // The values of a group with nothing where nobody looks: 0 times what lies there may be no number.
    const bf16* whole_values(const Attend& s, const Keys<bf16>& k, int g) {
        if (k.from == 0 && k.to == LANES) return k.values;
        int64_t pair = 2 * s.value_dim;
        copies_[g].assign(LANES / 2 * pair, bf16{0});
        bf16* to = copies_[g].data();
        for (int i = k.from; i < k.to; i++) {
            if (i % 2 == 0 && i + 1 < k.to) {
                std::memcpy(to + i / 2 * pair, k.values + i / 2 * pair, pair * sizeof(bf16));
                i++;
                continue;
            }
            for (int64_t d = 0; d < s.value_dim; d++) to[i / 2 * pair + 2 * d + i % 2] = k.values[i / 2 * pair + 2 * d + i % 2];
        }
        return to;
    }

    // Of up to four groups. Their values are fetched meanwhile: tables jump about, and the hardware cannot guess what is read next.
    void scores_of(const Attend& s, const Rows<bf16>& w, int m, const Keys<bf16>* groups, int g, int count) {
        if (m == 0)
            for (int i = g; i < g + count; i++)
                for (int64_t d = 0; d < LANES * s.value_dim; d += 32) __builtin_prefetch(values_[i] + d);
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t i = 0; i < w.q_steps; i += STEPS) {
            _tile_loadd(4, w.q.data() + m * w.q_steps + i, w.q_steps * sizeof(uint32_t));
            add_scores<0>(groups + g, count, i);
            add_scores<1>(groups + g, count, i);
            add_scores<2>(groups + g, count, i);
            add_scores<3>(groups + g, count, i);
        }
        constexpr int64_t ROW_BYTES = sizeof scores_[0];
        float* to = &scores_[0][g * LANES];
        _tile_stored(0, to, ROW_BYTES);
        if (count > 1) _tile_stored(1, to + LANES, ROW_BYTES);
        if (count > 2) _tile_stored(2, to + 2 * LANES, ROW_BYTES);
        if (count > 3) _tile_stored(3, to + 3 * LANES, ROW_BYTES);
    }

    template <int G> static void add_scores(const Keys<bf16>* groups, int count, int64_t step) {
        if (G >= count) return;
        _tile_loadd(5, groups[G].keys + step * groups[G].stride, groups[G].stride * sizeof(bf16));
        multiply<G, 4, 5>();
    }

    // C times 16 columns of the sums of 16 rows.
    template <int C> void add_values(const Attend& s, int count, float* out, int64_t column) {
        int64_t out_bytes = s.value_dim * sizeof(float), pair_bytes = s.value_dim * 2 * sizeof(bf16);
        _tile_loadd(0, out, out_bytes);
        if (C > 1) _tile_loadd(1, out + LANES, out_bytes);
        if (C > 2) _tile_loadd(2, out + 2 * LANES, out_bytes);
        if (C > 3) _tile_loadd(3, out + 3 * LANES, out_bytes);
        for (int g = 0; g < count; g++) {
            const bf16* v = values_[g] + column * 2;
            _tile_loadd(6, &factors_[0][g * LANES / 2], sizeof factors_[0]);
            _tile_loadd(7, v, pair_bytes);
            multiply<0, 6, 7>();
            if (C > 1) _tile_loadd(7, v + 2 * LANES, pair_bytes);
            if (C > 1) multiply<1, 6, 7>();
            if (C > 2) _tile_loadd(7, v + 4 * LANES, pair_bytes);
            if (C > 2) multiply<2, 6, 7>();
            if (C > 3) _tile_loadd(7, v + 6 * LANES, pair_bytes);
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
