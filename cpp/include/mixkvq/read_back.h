// What the rows of a page read back as when its heads are packed, without a cache: to measure formats with.
#pragma once

#include "mixkvq/kernels.h"
#include "mixkvq/page.h"

namespace mixkvq {

// Of one head; with neither its rows stay as they are.
struct HeadFormat {
    const KeyFormat *   keys = nullptr;
    const ValueFormat * values = nullptr;

    size_t record_bytes() const { return keys ? keys->record_bytes() : values ? values->record_bytes() : 0; }
};

// Scratch of one head: its rows in F16, then its record.
constexpr size_t half_bytes(int head_size) { return (sizeof(half) * kPageCells * head_size + kRecordAlign - 1) / kRecordAlign * kRecordAlign; }
inline size_t read_back_bytes(const HeadFormat & format, int head_size) { return half_bytes(head_size) + format.record_bytes(); }

// rows: finite, [n_heads][128][head_size]. importance: [n_heads][head_size], or nullptr where there are no keys. scratch: for each head so many bytes
// as the head that needs most, 64-byte aligned. The heads are divided among the threads.
void read_back(const Kernels & kernels, const HeadFormat * formats, int n_heads, int head_size, const float * rows, const float * importance,
               const CellMask & valid, int n_threads, uint8_t * scratch, size_t scratch_bytes, float * out);

}  // namespace mixkvq
