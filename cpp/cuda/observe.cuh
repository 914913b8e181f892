// Query statistics, for kernels of pack.cu and for the decoding kernel. Every sum is rounded as it is written here, whatever the compiler's flags are.
#pragma once

#include "mma.cuh"
#include "mixkvq/cuda.h"

namespace mixkvq::cuda {

struct Queries {
    const float * q;
    size_t token, head, stream;
    int n_tokens, group, n;  // n: query vectors per KV head
};

inline Queries queries_of(const Observation & o) {
    return {o.q, o.q_token, o.q_head, o.q_stream, o.n_tokens, o.group, o.n_tokens * o.n_streams * o.group};
}

// The query vectors of a KV head, `step` apart, channel d. Loads run ahead of the sums.
__device__ inline void add_queries(const Queries & c, int kv_head, int d, int first, int step, float & abs, float & sqr) {
    int token = first, head = 0, stream = 0;
    const float * q = c.q + size_t(kv_head) * c.group * c.head + d;
#pragma unroll 1
    for (int i = first; i < c.n;) {
        float x[8];
#pragma unroll
        for (int k = 0; k < 8; ++k, i += step, token += step) {
            for (; token >= c.n_tokens && i < c.n; token -= c.n_tokens) {
                if (++head == c.group) {
                    head = 0;
                    ++stream;
                }
            }
            x[k] = i < c.n ? q[token * c.token + head * c.head + stream * c.stream] : 0.0f;
        }
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            abs = __fadd_rn(abs, fabsf(x[k]));
            sqr = __fadd_rn(sqr, __fmul_rn(x[k], x[k]));
        }
    }
}

// All of them, in the same order, by less code.
__device__ inline void add_queries(const Queries & c, int kv_head, int d, float & abs, float & sqr) {
    const int n_streams = c.n / (c.n_tokens * c.group);
#pragma unroll 1
    for (int stream = 0; stream < n_streams; ++stream) {
#pragma unroll 1
        for (int head = 0; head < c.group; ++head) {
            const float * q = c.q + stream * c.stream + size_t(kv_head * c.group + head) * c.head + d;
#pragma unroll 1
            for (int token = 0; token < c.n_tokens; ++token) {
                const float x = q[token * c.token];
                abs = __fadd_rn(abs, fabsf(x));
                sqr = __fadd_rn(sqr, __fmul_rn(x, x));
            }
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

__device__ inline void add_sums(const QuerySums & sums, int at, float abs, float sqr, const Fading & fading) {
    abs = __fmul_rn(__fadd_rn(sums.abs[at], abs), fading.factor);
    sums.abs[at] = abs;
    sums.sqr[at] = __fmul_rn(__fadd_rn(sums.sqr[at], sqr), fading.factor);
    sums.importance[at] = __fdiv_rn(abs, fading.count);
}

}  // namespace mixkvq::cuda
