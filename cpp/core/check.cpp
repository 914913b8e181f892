#include "mixkvq/check.h"

#include <cmath>

namespace mixkvq {

bool find_non_finite(const half * rows, int head_size, size_t stride, const CellMask & valid, int & cell, int & channel) {
    constexpr half kExponent = 0x7c00;
    for (int t = 0; t < kPageCells; ++t) {
        if (!valid.test(t)) continue;
        for (int d = 0; d < head_size; ++d) {
            if ((rows[t * stride + d] & kExponent) != kExponent) continue;
            cell = t;
            channel = d;
            return true;
        }
    }
    return false;
}

int find_bad_channel(const KeyFormat & f, const uint8_t * record) {
    const uint8_t * order = record + f.offset_order();
    bool            seen[256] = {};
    for (int i = 0; i < f.head_size; ++i) {
        if (order[i] >= f.head_size || seen[order[i]]) return i;
        seen[order[i]] = true;
    }
    return -1;
}

int find_bad_importance(const float * importance, int head_size) {
    for (int d = 0; d < head_size; ++d) {
        if (!(importance[d] >= 0) || std::isinf(importance[d])) return d;
    }
    return -1;
}

}  // namespace mixkvq
