#include "mixkvq/read_back.h"

#include <cstring>

#include "parallel.h"

namespace mixkvq {

void read_back(const Kernels & kernels, const HeadFormat * formats, int n_heads, int head_size, const float * rows, const float * importance,
               const CellMask & valid, int n_threads, uint8_t * scratch, size_t scratch_bytes, float * out) {
    const int n = kPageCells * head_size;
    parallel_for(n_threads, n_heads, [&](int head, int) {
        const HeadFormat & format = formats[head];
        const float *      from = rows + size_t(head) * n;
        float *            to = out + size_t(head) * n;
        if (!format.keys && !format.values) {
            std::memcpy(to, from, sizeof(float) * n);
            return;
        }
        half *    tile = reinterpret_cast<half *>(scratch + head * scratch_bytes);
        uint8_t * record = scratch + head * scratch_bytes + half_bytes(head_size);
        kernels.to_half(from, tile, n);
        std::memset(record, 0, format.record_bytes());
        if (format.keys) {
            kernels.pack_keys(*format.keys, tile, head_size, valid, importance + size_t(head) * head_size, record);
            kernels.unpack_keys(*format.keys, record, tile, head_size);
        } else {
            kernels.pack_values(*format.values, tile, head_size, valid, record);
            kernels.unpack_values(*format.values, record, tile, head_size);
        }
        kernels.from_half(tile, to, n);
    });
}

}  // namespace mixkvq
