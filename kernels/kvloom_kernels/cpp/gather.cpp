// A step's numbers, gathered from tables with a row a sequence. Range r of the step is tokens [starts[r], starts[r + 1]) of it, the last
// ones of contexts[r] that the sequence of row rows[r] has then.
#include <cstdint>
#include <cstring>

namespace {

struct Ranges {
    const int32_t *rows, *starts, *contexts;
    int64_t count;

    // Calls f(row, token of the step, position of the first, tokens) for each range.
    template <class F> void each(F f) const {
        for (int64_t r = 0; r < count; r++) {
            int64_t tokens = starts[r + 1] - starts[r];
            f(int64_t(rows[r]), int64_t(starts[r]), contexts[r] - tokens, tokens);
        }
    }
};

}  // namespace

extern "C" void kvloom_gather_tokens(const int32_t* kept, int64_t stride, const int32_t* rows, const int32_t* starts,
                                     const int32_t* contexts, int64_t ranges, int64_t* values, int64_t* positions) {
    Ranges{rows, starts, contexts, ranges}.each([&](int64_t row, int64_t first, int64_t position, int64_t tokens) {
        const int32_t* from = kept + row * stride + position;
        for (int64_t t = 0; t < tokens; t++) {
            values[first + t] = from[t];
            positions[first + t] = position + t;
        }
    });
}

extern "C" void kvloom_gather_blocks(const int32_t* tables, int64_t stride, const int32_t* rows, const int32_t* starts,
                                     const int32_t* contexts, int64_t ranges, int64_t block_tokens, int32_t* block_table,
                                     int64_t table_stride, int64_t columns, int64_t* slots) {
    for (int64_t r = 0; r < ranges; r++) {
        int64_t needed = (contexts[r] + block_tokens - 1) / block_tokens;
        int32_t* to = block_table + r * table_stride;
        memcpy(to, tables + rows[r] * stride, needed * sizeof(int32_t));
        memset(to + needed, 0, (columns - needed) * sizeof(int32_t));
    }
    Ranges{rows, starts, contexts, ranges}.each([&](int64_t row, int64_t first, int64_t position, int64_t tokens) {
        const int32_t* table = tables + row * stride;
        for (int64_t t = 0, block = position / block_tokens, offset = position % block_tokens; t < tokens; t++) {
            slots[first + t] = table[block] * block_tokens + offset;
            if (++offset == block_tokens) block++, offset = 0;
        }
    });
}
