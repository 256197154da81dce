// Forbidding tokens by bitmasks: logits [rows, size], one mask of 32-bit words for each of some rows.
#include "common.h"
#include "team.h"
#include <cmath>

namespace {

inline void forbid(float* p) { *p = -INFINITY; }
inline void forbid(bf16* p) { p->bits = 0xff80; }

template <class T> void masked_row(T* x, const uint32_t* mask, int64_t size) {
    for (int64_t first = 0; first < size; first += 32) {
        uint32_t banned = ~mask[first / 32];
        int n = size - first < 32 ? int(size - first) : 32;
        if (banned == UINT32_MAX) {  // the common case: whole words are forbidden
            for (int i = 0; i < n; i++) forbid(x + first + i);
            continue;
        }
        for (; banned; banned &= banned - 1) {
            int i = __builtin_ctz(banned);
            if (i >= n) break;
            forbid(x + first + i);
        }
    }
}

template <class T>
void masked_rows(T* logits, int64_t stride, const uint32_t* masks, const int64_t* rows, int64_t count, int64_t size, int threads) {
    int64_t words = (size + 31) / 32;
    for_all(count, threads, [&](int64_t g) { masked_row(logits + rows[g] * stride, masks + g * words, size); });
}

}  // namespace

extern "C" void kvloom_apply_bitmask(void* logits, int64_t stride, const uint32_t* masks, const int64_t* rows, int64_t count,
                                     int64_t size, int is_bf16, int threads) {
    if (is_bf16)
        masked_rows((bf16*)logits, stride, masks, rows, count, size, threads);
    else
        masked_rows((float*)logits, stride, masks, rows, count, size, threads);
}
