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

    void operator()(const Attend& s, Queries<bf16>& w, const Keys<bf16>* groups, int count, const int64_t* positions) {
        int of_head = w.count / w.heads, rows = of_head < TILE_ROWS_MOST ? of_head : TILE_ROWS_MOST;
        uint8_t r = uint8_t(rows);
        shapes_.set({r, r, r, r, r, 16, r, 8}, {64, 64, 64, 64, 64, 64, 32, 64});
        for (int h = 0; h < w.heads; h++)
            for (int g = 0; g < count; g++) values_[h][g] = whole_values(s, groups[g], h, g);
        for (int m = 0; m < of_head; m += TILE_ROWS_MOST) {  // items of several heads have no more rows than a tile
            for (int g = 0; g < count; g += 4)
                for (int h = 0; h < w.heads; h++) scores_of(w, m, h, groups, g, count - g < 4 ? count - g : 4);
            if (m == 0)
                for (int g = 0; g < FETCHED_GROUPS && g < count; g++) fetch(groups[g].values, w.heads * LANES * s.value_dim);
            for (int h = 0; h < w.heads; h++)
                for (int i = 0; i < rows && m + i < of_head; i++)
                    softmax_round<bf16>(s, w, h * of_head + m + i, scores_[h * of_head + i], groups, count, positions, factors_[h * of_head + i]);
            for (int h = 0; h < w.heads; h++) add_values(s, w, m, h, groups, count);
        }
    }

private:
    // Tiles 0 to 3 are sums, 4 and 5 queries and keys, 6 and 7 factors and values. Rows of scores are not a power of two apart.
    static constexpr int64_t STEPS = TILE_DEPTH / 2, KEYS = GROUPS_AT_ONCE * LANES;
    static constexpr int FETCHED_GROUPS = 4;  // whose values are fetched while factors are made
    TileShapes shapes_;
    alignas(64) float scores_[TILE_ROWS_MOST][KEYS + LANES];
    alignas(64) uint32_t factors_[TILE_ROWS_MOST][KEYS / 2 + LANES];
    const bf16* values_[TILE_ROWS_MOST][GROUPS_AT_ONCE];  // by head
    std::vector<bf16> copies_[TILE_ROWS_MOST][GROUPS_AT_ONCE];  // values of groups that are not read whole

    // The values of a group with nothing where nobody looks: 0 times what lies there may be no number.
    const bf16* whole_values(const Attend& s, const Keys<bf16>& k, int h, int g) {
        const bf16* values = k.values + h * k.head_values;
        if (k.from == 0 && k.to == LANES) return values;
        int64_t pair = 2 * s.value_dim;
        copies_[h][g].assign(LANES / 2 * pair, bf16{0});
        bf16* to = copies_[h][g].data();
        for (int i = k.from; i < k.to; i++) {
            if (i % 2 == 0 && i + 1 < k.to) {
                std::memcpy(to + i / 2 * pair, values + i / 2 * pair, pair * sizeof(bf16));
                i++;
                continue;
            }
            for (int64_t d = 0; d < s.value_dim; d++) to[i / 2 * pair + 2 * d + i % 2] = values[i / 2 * pair + 2 * d + i % 2];
        }
        return to;
    }

    // Lines of the next elements, to the second cache: the first has no room for them.
    static void fetch(const bf16* p, int64_t elements) {
        for (int64_t i = 0; i < elements; i += 64 / int64_t(sizeof(bf16))) __builtin_prefetch(p + i, 0, 2);
    }

    // Of up to four groups of a head.
    void scores_of(const Queries<bf16>& w, int m, int h, const Keys<bf16>* groups, int g, int count) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        int first_row = h * (w.count / w.heads);
        const uint32_t* q = w.q.data() + (first_row + m) * w.q_steps;
        for (int64_t i = 0; i < w.q_steps; i += STEPS) {
            _tile_loadd(4, q + i, w.q_steps * sizeof(uint32_t));
            add_scores<0>(groups + g, h, count, i);
            add_scores<1>(groups + g, h, count, i);
            add_scores<2>(groups + g, h, count, i);
            add_scores<3>(groups + g, h, count, i);
        }
        constexpr int64_t ROW_BYTES = sizeof scores_[0];
        float* to = &scores_[first_row][g * LANES];
        _tile_stored(0, to, ROW_BYTES);
        if (count > 1) _tile_stored(1, to + LANES, ROW_BYTES);
        if (count > 2) _tile_stored(2, to + 2 * LANES, ROW_BYTES);
        if (count > 3) _tile_stored(3, to + 3 * LANES, ROW_BYTES);
    }

    template <int G> static void add_scores(const Keys<bf16>* groups, int h, int count, int64_t step) {
        if (G >= count) return;
        const Keys<bf16>& k = groups[G];
        _tile_loadd(5, k.keys + h * k.head_keys + step * k.stride, k.stride * sizeof(bf16));
        multiply_keys<G>();
    }

    // A round is a chunk: its sums begin at nothing.
    void add_values(const Attend& s, Queries<bf16>& w, int m, int h, const Keys<bf16>* groups, int count) const {
        int first_row = h * (w.count / w.heads);
        for (int64_t column = 0; column < s.value_dim; column += 4 * LANES) {
            Columns c{w.out.data() + (first_row + m) * s.value_dim + column, factors_[first_row], values_[h], column, s.value_dim};
            int64_t left = (s.value_dim - column) / LANES, others = m == 0 && h == 0 && column == 0 ? w.heads - 1 : 0;
            if (left >= 4) sum_up<4>(c, groups, count, others);
            if (left == 3) sum_up<3>(c, groups, count, others);
            if (left == 2) sum_up<2>(c, groups, count, others);
            if (left == 1) sum_up<1>(c, groups, count, others);
        }
    }

    struct Columns {
        float* out;
        const uint32_t* factors;
        const bf16* const* values;
        int64_t first, value_dim;
    };

    // C times 16 columns of the sums of 16 rows. Values of `others`, the next heads, are fetched: a block lies together.
    template <int C> static void sum_up(const Columns& c, const Keys<bf16>* groups, int count, int64_t others) {
        int64_t out_bytes = c.value_dim * sizeof(float), pair_bytes = c.value_dim * 2 * sizeof(bf16);
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int g = 0; g < count; g++) {
            const bf16* v = c.values[g] + c.first * 2;
            fetch(groups[g].values + LANES * c.value_dim, others * LANES * c.value_dim);
            _tile_loadd(6, c.factors + g * LANES / 2, sizeof factors_[0]);
            _tile_loadd(7, v, pair_bytes);
            multiply_values<0>();
            if (C > 1) _tile_loadd(7, v + 2 * LANES, pair_bytes);
            if (C > 1) multiply_values<1>();
            if (C > 2) _tile_loadd(7, v + 4 * LANES, pair_bytes);
            if (C > 2) multiply_values<2>();
            if (C > 3) _tile_loadd(7, v + 6 * LANES, pair_bytes);
            if (C > 3) multiply_values<3>();
        }
        _tile_stored(0, c.out, out_bytes);
        if (C > 1) _tile_stored(1, c.out + LANES, out_bytes);
        if (C > 2) _tile_stored(2, c.out + 2 * LANES, out_bytes);
        if (C > 3) _tile_stored(3, c.out + 3 * LANES, out_bytes);
    }

    // The compiler's intrinsic takes numbers, not constants that become such in a template.
    template <int OUT> static void multiply_keys() {
        if (OUT == 0) _tile_dpbf16ps(0, 4, 5);
        if (OUT == 1) _tile_dpbf16ps(1, 4, 5);
        if (OUT == 2) _tile_dpbf16ps(2, 4, 5);
        if (OUT == 3) _tile_dpbf16ps(3, 4, 5);
    }
    template <int OUT> static void multiply_values() {
        if (OUT == 0) _tile_dpbf16ps(0, 6, 7);
        if (OUT == 1) _tile_dpbf16ps(1, 6, 7);
        if (OUT == 2) _tile_dpbf16ps(2, 6, 7);
        if (OUT == 3) _tile_dpbf16ps(3, 6, 7);
    }
};

}  // namespace
#endif
