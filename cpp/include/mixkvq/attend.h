// Attention over pages: the online softmax that joins them, and the loop over an array of packed records.
#pragma once

#include "mixkvq/kernels.h"
#include "mixkvq/page.h"

namespace mixkvq {

// What happens between scores and weights. s = score * scale, then softcap * tanh(s / softcap) if softcap > 0, then slope * mask is added.
struct SoftmaxParams {
    float scale = 1.0f;
    float softcap = 0.0f;
    float slope = 1.0f;  // of ALiBi
};

// The running softmax of n queries. Start with max = -inf and sum = 0.
//
// Turns the scores of one page (scores[i * 128 + t], the first n_cells of them valid) into weights >= 0, in place; cells from n_cells to
// 128 get weight 0. mask[i * mask_stride + t] is what `slope` multiplies, -inf hides a cell; nullptr: nothing is hidden.
// factor[i] is what the accumulators of query i must be multiplied by before the page is added (1 in most pages).
// Returns false if the page has no weight for any query, because nothing of it is seen or its share is below what a float can tell: it can
// be left out.
bool softmax_page(const Kernels & kernels, const SoftmaxParams & params, float * scores, int n, int n_cells, const float * mask,
                  size_t mask_stride, float * max, float * sum, float * factor);

// Closes the softmax of one query: the factor that turns its accumulator into the output. `sink` is the logit of an attention sink without a
// value, or nullptr. 0 if the query saw no cell.
float softmax_close(float max, float sum, const float * sink);

// Attention of n queries over n_pages packed pages: q is [n][D], out is [n][Dv], mask is [n][n_pages * 128] or nullptr, sink is [n] or nullptr.
// k[p] and v[p] are records, 64-byte aligned. `scratch` has attend_scratch_floats() floats, 64-byte aligned.
size_t attend_scratch_floats(const KeyFormat & key_format, const ValueFormat & value_format, int n);
void   attend_records(const Kernels & kernels, const KeyFormat & key_format, const ValueFormat & value_format, const uint8_t * const * k,
                      const uint8_t * const * v, int n_pages, const float * q, int n, const float * mask, const SoftmaxParams & params,
                      const float * sink, float * out, float * scratch);

}  // namespace mixkvq
