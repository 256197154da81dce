// Rows times two panels of a packed weight by AMX, for k in whole tiles.
#pragma once
#include "product_vectors.h"
#include "tiles.h"

#ifdef HAS_TILES
namespace {

// Two tiles of rows and two panels at a time, so each tile that is loaded is used twice.
class ByTiles {
public:
    typedef bf16 X;
    static constexpr int64_t MOST_ROWS = 2 * TILE_ROWS_MOST;
    static int64_t tiles(int64_t rows) { return (rows + MOST_ROWS - 1) / MOST_ROWS; }
    static int64_t first_row(int64_t tile, int64_t rows) { return tile * MOST_ROWS < rows ? tile * MOST_ROWS : rows; }

    static constexpr bool IS_FAST = true;
    static int64_t steps_of(int64_t k) { return k / TILE_DEPTH; }

    // Calls `between` once for each step along k.
    template <class Between>
    void operator()(const Rows<bf16>& rows, const Panels<bf16>& panels, const Results& results, float* sums, const Between& between) {
        uint8_t above = uint8_t(rows.count < TILE_ROWS_MOST ? rows.count : TILE_ROWS_MOST), below = uint8_t(rows.count - above);
        uint8_t low = below ? below : above;
        shapes_.set({above, above, low, low, above, low, 16, 16});
        _tile_zero(0);
        _tile_zero(1);
        if (below) {
            _tile_zero(2);
            _tile_zero(3);
            multiply<true>(rows, panels, results, between);
            float* low_sums = sums + TILE_ROWS_MOST * 2 * PANEL;
            _tile_stored(2, low_sums, SUMS_BYTES);
            _tile_stored(3, low_sums + PANEL, SUMS_BYTES);
        } else {
            multiply<false>(rows, panels, results, between);
        }
        _tile_stored(0, sums, SUMS_BYTES);
        _tile_stored(1, sums + PANEL, SUMS_BYTES);
    }

private:
    static constexpr int64_t SUMS_BYTES = 2 * PANEL * sizeof(float), WEIGHT_BYTES = 2 * PANEL * sizeof(bf16);
    TileShapes shapes_;

    template <bool BELOW, class Between>
    void multiply(const Rows<bf16>& rows, const Panels<bf16>& panels, const Results& results, const Between& between) {
        int64_t x_bytes = rows.stride * sizeof(bf16);
        const bf16* x_below = rows.x + TILE_ROWS_MOST * rows.stride;
        for (int64_t i = 0; i < rows.k; i += TILE_DEPTH) {
            results.fetch(i / TILE_DEPTH, rows.count);
            _tile_loadd(6, panels.first + i * PANEL, WEIGHT_BYTES);
            _tile_loadd(7, panels.second + i * PANEL, WEIGHT_BYTES);
            _tile_loadd(4, rows.x + i, x_bytes);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if (BELOW) {
                _tile_loadd(5, x_below + i, x_bytes);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            between();
        }
    }
};

}  // namespace
#endif
