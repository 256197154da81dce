// AMX: a unit beside the vector registers that multiplies a tile of 16 x 32 bfloat16 with one of 32 x 16, at several times the rate of
// AVX-512. The second factor lies in pairs, as packed weights and blocks of keys do. Tiles of fewer rows take less time and no more
// memory, and a row's result is the same in all of them.
#pragma once
#include "common.h"
#if defined(__AMX_BF16__) && defined(__linux__)
#define HAS_TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

constexpr int TILE_ROWS_MOST = 16, TILE_DEPTH = 32;  // rows of a tile; elements of a row that it multiplies at once

#ifdef HAS_TILES

// The kernel of the system saves tiles only for a process that asked for them. Asked once, for all threads.
inline bool may_use_tiles() {
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    static const bool granted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    return granted;
}

// The rows and bytes of a row of each of the eight tiles, until the end of the scope. Setting them clears the tiles.
class TileShapes {
public:
    ~TileShapes() {
        if (is_set_) _tile_release();
    }

    void set(const uint8_t (&rows)[8], const uint8_t (&row_bytes)[8] = {64, 64, 64, 64, 64, 64, 64, 64}) {
        if (is_set_ && std::memcmp(rows, shapes_.rows, sizeof rows) == 0) return;  // one user asks for one set of row_bytes
        for (int i = 0; i < 8; i++) {
            shapes_.rows[i] = rows[i];
            shapes_.row_bytes[i] = row_bytes[i];
        }
        _tile_loadconfig(&shapes_);
        is_set_ = true;
    }

private:
    struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
    } shapes_;
    bool is_set_ = false;
};

#else
inline bool may_use_tiles() { return false; }
#endif
