// Attention of many queries: what attention.cu asks of prefill.cu, and what both ask of it.
#pragma once

#include "attention_common.cuh"

namespace mixkvq::cuda {

// Floats of workspace for this way of computing the call; 0 if it is not the one to take.
size_t prefill_workspace(const Attention & call);
// False, with nothing done, where prefill_workspace() is 0.
bool prefill(cudaStream_t stream, const Attention & call);

// Fills cut.sight.
void find_sight(cudaStream_t stream, const Attention & call, const Cut & cut);
// The softmax over all splits of a tile, to call.out.
void join_splits(cudaStream_t stream, const Attention & call, const Cut & cut);

__host__ __device__ inline int n_masks(const Attention & call) { return call.mask && call.mask_head ? call.n_kv_heads : 1; }

}  // namespace mixkvq::cuda
