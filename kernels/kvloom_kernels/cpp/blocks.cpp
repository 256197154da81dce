// Copies of whole KV blocks, and the first use of their memory.
#include "team.h"
#include <cstring>

namespace {

struct Copies {
    char* const* tensors;       // [count], each blocks that lie one after the other
    const int64_t* block_bytes; // [count]
    const int64_t* pairs;       // [rows][source, target]
    int64_t count, rows;
};

struct Pieces {
    char* const* starts;
    const int64_t* bytes;
    int64_t rows, page_bytes;
};

}  // namespace

// In each tensor all copies, in their order: a copy may read what an earlier one wrote.
extern "C" void kvloom_copy_blocks(const void* arguments, const Team& team) {
    const Copies& c = *(const Copies*)arguments;
    team.each(c.count, [&](int64_t t) {
        for (int64_t i = 0; i < c.rows; i++) {
            int64_t source = c.pairs[2 * i], target = c.pairs[2 * i + 1];
            std::memmove(c.tensors[t] + target * c.block_bytes[t], c.tensors[t] + source * c.block_bytes[t], c.block_bytes[t]);
        }
    });
}

// A zero in each page: the system gives memory with its first use, which takes a thread longer than all that it then computes with it.
extern "C" void kvloom_touch(const void* arguments, const Team& team) {
    const Pieces& p = *(const Pieces*)arguments;
    for (int64_t i; (i = team.take(1)) < p.rows;)
        for (int64_t at = 0; at < p.bytes[i]; at += p.page_bytes) p.starts[i][at] = 0;
}
