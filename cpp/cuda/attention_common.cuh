// What the attention kernels share: how a call is cut, formats on the device, the softmax's ends.
#pragma once

#include "mixkvq/cuda.h"
#include "mma.cuh"
#include "record.cuh"

namespace mixkvq::cuda {

// The current GPU, as plans ask for it.
struct Gpu {
    int device, n_sms;
    int shared;  // bytes that a block may have; an SM has one KiB more, and each block takes one
    int most_blocks(int bytes) const { return (shared + 1024) / (bytes + 1024); }
};
Gpu current_gpu();  // MIXKVQ_CUDA_SHARED=99: as one whose blocks get that many KiB

// A row is a query vector: row r of a KV head is token r / group, head r % group of its group. A tile is `rows` of them that share one pass over
// the pages; a split is a range of pages. Every (stream, KV head, tile, split) is a block.
struct Cut {
    int group, n_pages;
    int rows, n_tiles, n_splits, pages_per_split;
    float * partial;  // [block][rows * Dv accumulators, rows maxima, rows sums]; prefill: if n_splits > 1
    uint8_t * sight;  // prefill: [stream][KV head or 1][tile][page]
};

// What a tile sees of a page. Packed pages are joined first: their sums are in the rotated basis until all are in.
enum Sight : uint8_t { kUnseen, kPackedOpen, kPackedMasked, kHalfOpen, kHalfMasked };

__host__ __device__ inline size_t partial_floats(const Cut & cut, int dv) { return size_t(cut.rows) * (dv + 2); }

// A row's query, mask, head.
struct RowPlace {
    int token, head;  // head: of all query heads

    __device__ RowPlace(int token, int head) : token(token), head(head) {}
    __device__ RowPlace(const Cut & cut, int kv, int row) : token(row / cut.group), head(kv * cut.group + row % cut.group) {}
};

// n strides, below 2^32 each: in one instruction.
__device__ __forceinline__ size_t ahead(int n, size_t stride) { return uint64_t(uint32_t(n)) * uint32_t(stride); }

__device__ __forceinline__ const float * query_of(const Attention & call, int stream, const RowPlace & at) {
    return call.q + ahead(stream, call.q_stream) + ahead(at.head, call.q_head) + ahead(at.token, call.q_token);
}
__device__ __forceinline__ const __half * mask_of(const Attention & call, int stream, const RowPlace & at) {
    return reinterpret_cast<const __half *>(call.mask) + stream * call.mask_stream + ahead(at.head, call.mask_head) + ahead(at.token, call.mask_token);
}

// ALiBi: the factor of the mask for a head, 1 without a bias. What is rare is no part of a kernel's code, most of which is fetched for one use.
__device__ __noinline__ inline float alibi_slope(float max_bias, int n_heads, int head) {
    int power = 1;
    while (2 * power <= n_heads) power *= 2;
    if (head < power) return powf(exp2f(-max_bias / power), float(head + 1));
    return powf(exp2f(-max_bias / 2 / power), float(2 * (head - power) + 1));
}
__device__ inline float alibi_slope(const Attention & call, int head) {
    return call.max_bias > 0 ? alibi_slope(call.max_bias, call.n_heads, head) : 1.0f;
}

// Power of two e such that |x| < 2^e for all x up to `top`, within what a float can hold in both directions.
__device__ __forceinline__ int exponent_above(float top) { return max(-100, min(((__float_as_int(top) >> 23) & 255) - 126, 120)); }

// The soft cap of a logit in units of log2.
__device__ __forceinline__ float capped(const Attention & call, float logit2) {
    return call.softcap * kLog2E * tanhf(logit2 / (call.softcap * kLog2E));
}

__device__ __noinline__ inline float close_with_sink(float max, float sum, float sink) {
    const float s = sink * kLog2E;
    if (s <= max) return 1.0f / (sum + exp2_of(s - max));
    const float shrink = exp2_of(max - s);
    return shrink / (sum * shrink + 1.0f);
}
// The factor of a row's accumulators, of weights 2^(z - max): sinks and empty rows included. Maxima and logits in units of log2.
__device__ __forceinline__ float close_softmax(float max, float sum, const float * sink) {
    if (sink) return close_with_sink(max, sum, *sink);
    return sum > 0 ? reciprocal(sum) : 0.0f;
}

}  // namespace mixkvq::cuda
