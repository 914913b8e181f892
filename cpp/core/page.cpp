#include "mixkvq/page.h"

#include <initializer_list>

namespace mixkvq {

static bool served_head_size(int n) { return n >= kMinHeadSize && n <= kMaxHeadSize && n % 8 == 0; }

const char * KeyFormat::error() const {
    if (!served_head_size(head_size)) return "the key head size must be a multiple of 8 from 32 to 256";
    for (int n : {n16, n8, n4, n3, n2}) {
        if (n < 0 || n > head_size) return "a tier's channel count must lie between 0 and the key head size";
        if (n % 4 != 0) return "a tier's channel count must be a multiple of 4";
    }
    if (n16 + n8 + n4 + n3 + n2 != head_size) return "the tiers' channel counts must add up to the key head size";
    if (group != 32 && group != 64 && group != 128) return "the key group must be 32, 64 or 128 tokens";
    return nullptr;
}

const char * ValueFormat::error() const {
    if (!served_head_size(head_size)) return "the value head size must be a multiple of 8 from 32 to 256";
    if (bits != 2 && bits != 3 && bits != 4 && bits != 8) return "value bits must be 2, 3, 4 or 8";
    if (group != 0 && group != 32 && group != 64) return "the value group must be 0 (rotated), 32 or 64 dimensions";
    return nullptr;
}

}  // namespace mixkvq
