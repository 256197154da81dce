// A step's numbers, gathered from tables with a row a sequence. Range r of the step is tokens [starts[r], starts[r + 1]) of it, the last
// ones of contexts[r] that the sequence of row rows[r] has then.
#include <cstdint>
#include <cstring>

extern "C" void kvloom_gather_tokens(const int32_t* kept, int64_t stride, const int32_t* rows, const int32_t* starts,
                                     const int32_t* contexts, int64_t ranges, int64_t* values, int64_t* token_rows, int64_t* positions) {
    for (int64_t r = 0; r < ranges; r++) {
        int64_t row = rows[r], before = contexts[r] - starts[r + 1];  // position of a token less its place in the step
        for (int64_t t = starts[r]; t < starts[r + 1]; t++) {
            values[t] = kept[row * stride + before + t];
            token_rows[t] = row;
            positions[t] = before + t;
        }
    }
}

extern "C" void kvloom_gather_blocks(const int32_t* tables, int64_t stride, const int32_t* rows, const int32_t* contexts, int64_t ranges,
                                     const int64_t* token_rows, const int64_t* positions, int64_t tokens, int64_t block_tokens,
                                     int32_t* block_table, int64_t table_stride, int64_t columns, int64_t* slots) {
    for (int64_t r = 0; r < ranges; r++) {
        int64_t needed = (contexts[r] + block_tokens - 1) / block_tokens;
        int32_t* to = block_table + r * table_stride;
        memcpy(to, tables + rows[r] * stride, needed * sizeof(int32_t));
        memset(to + needed, 0, (columns - needed) * sizeof(int32_t));
    }
    uint32_t size = uint32_t(block_tokens);
    for (int64_t t = 0; t < tokens; t++) {
        uint32_t position = uint32_t(positions[t]);
        slots[t] = tables[token_rows[t] * stride + position / size] * block_tokens + position % size;
    }
}
