// The kernels on an NVIDIA GPU. Every function enqueues its work on a stream and returns at once; nothing is allocated and nothing waits.
// Pointers are device memory unless their name says host. Free of CUDA's headers, so that callers need no CUDA compiler.
//
// Pack and unpack give the bytes of cpp/kernels/scalar.cpp. Attention does not: its tolerance is stated in tests/native/test_cuda_attention.cpp.
// F16 pages are 16-byte aligned and their rows multiples of 8 halfs, records and record offsets multiples of 64 bytes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "mixkvq/kernels.h"
#include "mixkvq/page.h"

namespace mixkvq::cuda {

using Stream = void *;  // cudaStream_t

// The heads of a store: formats, and where each one's record lies among the records of a page. Arrays in device memory.
struct alignas(16) KeyHead {
    KeyFormat format;
    uint32_t record_offset;
};
struct alignas(16) ValueHead {
    ValueFormat format;
    uint32_t record_offset;
};

// A page as attention sees it: packed, in F16 (128 rows of `row` halfs), or, if both are null, empty. F16 pages are finite in every cell below n_kv,
// those that the mask hides too.
struct PageRef {
    const uint8_t * records;
    const half * rows;
};

// A page to be packed or unpacked. Records are 64-byte aligned.
struct PageJob {
    half * rows;
    uint8_t * records;
    CellMask valid;  // for packing
};

// nullptr, or a sentence that says why this GPU cannot be used (no driver, too old): call it before anything else.
const char * unavailable(int device = 0);

// Rows to F16 pages as the cache stores them: NaN becomes 0, infinity +-65504. Cell i goes to destination[i] (nullptr: skipped), a row of `row`
// halfs; source rows are `stride` bytes apart. A second write, to other cells, may come along.
struct RowWrite {
    const void * source;
    bool source_is_half;
    size_t stride;
    half * const * destination;
    int n, row;
};
void write_rows(Stream stream, const RowWrite & write, const RowWrite & second = {});

// All heads of all jobs. `importance` is I_d, [head][head size].
void pack_keys(Stream stream, const KeyHead * heads, int n_heads, int head_size, int row, const PageJob * jobs, int n_jobs, const float * importance);
void pack_values(Stream stream, const ValueHead * heads, int n_heads, int head_size, int row, const PageJob * jobs, int n_jobs);
void unpack_keys(Stream stream, const KeyHead * heads, int n_heads, int head_size, int row, const PageJob * jobs, int n_jobs);
void unpack_values(Stream stream, const ValueHead * heads, int n_heads, int head_size, int row, const PageJob * jobs, int n_jobs);

// The query statistics of a store: sums of |q_d| and q_d^2 by KV head and channel, and how many query vectors are in them, for each stream. What is
// not finite counts as 0, what is beyond +-65504 as that. `importance` becomes the mean |q_d|; while more than `memory` vectors are in the sums, all are
// halved before, so that old ones fade. A call without queries leaves it.
struct QuerySums {
    float * abs;         // [n_kv_heads][head_size]
    float * sqr;         // the same
    float * importance;  // the same
    float * count;       // one number: vectors per KV head
    size_t stream = 0;   // distance of the next stream's in each of these, in elements; the pointers are the first stream's of the queries
};
struct Observation {
    QuerySums sums;
    const float * q;
    size_t q_token, q_head, q_stream;  // strides in elements
    int n_tokens, n_streams, n_kv_heads, group, head_size;
    float memory;
};
void observe(Stream stream, const Observation & observation);
// What the tokens of a batch bring to a layer: as many rows of keys as of values, and their queries.
struct NewRows {
    RowWrite keys, values;
    Observation queries;
};
// One launch if the queries are few.
void write_and_observe(Stream stream, const NewRows & rows);

// Attention of a batch of queries. Strides are in elements. Query head h reads KV head h / (n_heads / n_kv_heads).
struct Attention {
    const float * q;  // 16-byte aligned, as `out` is
    size_t q_token, q_head, q_stream;
    float * out;
    size_t out_token, out_head, out_stream;
    const half * mask;  // [stream][head][token][cell], added to the scores; nullptr: every cell of [0, n_kv) that its page has is seen
    size_t mask_token, mask_head, mask_stream;
    const float * sinks;  // a logit per query head that takes part in the softmax without a value; or nullptr

    int n_tokens, n_heads, n_kv_heads, n_streams, n_kv;
    int head_size_k, head_size_v;
    float scale, max_bias, softcap;

    const PageRef * key_pages;    // [stream][page], page_stride apart from stream to stream; cells [0, n_kv) lie in pages 0 to (n_kv - 1) / 128
    const PageRef * value_pages;
    size_t page_stride;
    const KeyHead * key_heads;
    const ValueHead * value_heads;
    int row_k, row_v;  // halfs of a cell in an F16 page

    // Of the formats, for choosing a kernel and reserving shared memory; host side.
    int most_n16;       // of any key head
    bool any_grouped;   // some value head is not rotated
    int most_key_bytes, most_value_bytes;  // of any head's record

    size_t unpacked_bytes;  // room for unpacked pages where there are many queries; 0: 64 MiB. A page of all heads and streams fits in any case.

    float * workspace;    // attention_workspace() floats, 16-byte aligned
    uint32_t * arrivals;  // attention_arrivals() counters, zero before a call and after it
};

// Floats of workspace that a call needs, at most. Looks at everything but pointers other than that of the mask.
size_t attention_workspace(const Attention & call);
size_t attention_arrivals(const Attention & call);
void attention(Stream stream, const Attention & call);
// The same after write_and_observe(rows), whose pages attention reads. Queries and rows may come from the kernel before this call in the stream, but
// nothing else: what does not need them may start while that one runs.
void attention(Stream stream, const Attention & call, const NewRows & rows);

}  // namespace mixkvq::cuda
