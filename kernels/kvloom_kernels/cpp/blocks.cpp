// Copies of whole KV blocks.
#include "team.h"
#include <cstring>

namespace {

struct Copies {
    char* const* tensors;       // [count], each blocks that lie one after the other
    const int64_t* block_bytes; // [count]
    const int64_t* pairs;       // [rows][source, target]
    int64_t count, rows;
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
