// Query statistics, for kernels of pack.cu and for the decoding kernel. Every sum is rounded as it is written here, whatever the compiler's flags are.
#pragma once

#include "mma.cuh"
#include "mixkvq/cuda.h"

namespace mixkvq::cuda {

struct Queries {
    const float * q;
    size_t token, head, stream;
    int n_tokens, group, n_streams, n;  // n: query vectors per KV head and stream
};

inline Queries queries_of(const Observation & o) {
    return {o.q, o.q_token, o.q_head, o.q_stream, o.n_tokens, o.group, o.n_streams, o.n_streams > 0 ? o.n_tokens * o.group : 0};
}

// What a number of a query counts: one that is not finite would spoil its sum for good, and the square of one that no half can hold may be infinite.
__device__ inline float counted(float x) {
    const float magnitude = fabsf(x);
    return magnitude <= 3.402823466e38f ? fminf(magnitude, 65504.0f) : 0.0f;
}

// The query vectors of a KV head in a stream, `step` apart, channel d. Loads run ahead of the sums.
__device__ inline void add_queries(const Queries & c, int stream, int kv_head, int d, int first, int step, float & abs, float & sqr) {
    int token = first, head = 0;
    const float * q = c.q + stream * c.stream + size_t(kv_head) * c.group * c.head + d;
#pragma unroll 1
    for (int i = first; i < c.n;) {
        float x[8];
#pragma unroll
        for (int k = 0; k < 8; ++k, i += step, token += step) {
            for (; token >= c.n_tokens && i < c.n; token -= c.n_tokens) ++head;
            x[k] = i < c.n ? counted(q[token * c.token + head * c.head]) : 0.0f;
        }
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            abs = __fadd_rn(abs, x[k]);
            sqr = __fadd_rn(sqr, __fmul_rn(x[k], x[k]));
        }
    }
}

// All of them, in the same order, by less code.
__device__ inline void add_queries(const Queries & c, int stream, int kv_head, int d, float & abs, float & sqr) {
#pragma unroll 1
    for (int head = 0; head < c.group; ++head) {
        const float * q = c.q + stream * c.stream + size_t(kv_head * c.group + head) * c.head + d;
#pragma unroll 1
        for (int token = 0; token < c.n_tokens; ++token) {
            const float x = counted(q[token * c.token]);
            abs = __fadd_rn(abs, x);
            sqr = __fadd_rn(sqr, __fmul_rn(x, x));
        }
    }
}

// The new count, and by how much sums and count fade.
struct Fading {
    float count, factor = 1;

    __device__ Fading(float old, int n, float memory) : count(old + float(n)) {
        for (; count > memory && memory > 0; count *= 0.5f) factor *= 0.5f;
    }
};

// `at` with the distance of its stream.
__device__ inline void add_sums(const QuerySums & sums, size_t at, float abs, float sqr, const Fading & fading) {
    abs = __fmul_rn(__fadd_rn(sums.abs[at], abs), fading.factor);
    sums.abs[at] = abs;
    sums.sqr[at] = __fmul_rn(__fadd_rn(sums.sqr[at], sqr), fading.factor);
    sums.importance[at] = __fdiv_rn(abs, fading.count);
}

}  // namespace mixkvq::cuda
