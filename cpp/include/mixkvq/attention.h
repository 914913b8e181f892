// Attention of a batch of queries over a pair of page stores.
#pragma once

#include <cstddef>
#include <vector>

#include "mixkvq/cache.h"

namespace mixkvq {

// Strides are in elements. Query head h reads key/value head h / (n_heads / heads of the store).
struct AttentionCall {
    const float * q = nullptr;
    size_t q_token = 0, q_head = 0, q_stream = 0;
    float * out = nullptr;
    size_t out_token = 0, out_head = 0, out_stream = 0;
    const half * mask = nullptr;  // [stream][head][token][cell], added to the scores; nullptr: every cell is seen
    size_t mask_token = 0, mask_head = 0, mask_stream = 0;
    const float * sinks = nullptr;  // a logit per query head that takes part in the softmax without a value

    int n_tokens = 0, n_heads = 0, n_streams = 1;
    int first_stream = 0;  // of the stores
    int n_kv = 0;          // cells of each stream, from the first
    float scale = 1, max_bias = 0, softcap = 0;

    // The mask of the first head, as it lies in host memory at `at`.
    MaskView view(const void * at) const { return {at, true, mask_token, mask_stream, n_tokens, n_streams, first_stream, n_kv}; }
};

// Buffers that calls share; they grow to the largest call and stay.
class AttentionWorkspace {
  public:
    ~AttentionWorkspace();
    float * get(size_t floats);

  private:
    float * data_ = nullptr;
    size_t capacity_ = 0;
};

// Reads the stores and counts the queries for I_d. The result does not depend on timing, only on n_threads.
void attention(const Kernels & kernels, PageStore & keys, PageStore & values, const AttentionCall & call, int n_threads,
               AttentionWorkspace & workspace);

}  // namespace mixkvq
