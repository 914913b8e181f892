// How far the predictions of some caches are from those of another one, token by token, from their logits.
//
// All sums are in float64. A divergence is off by at most 1e-13 times (1 + the largest |log p - log q| that counts): sums of non-negative terms are good
// to 1e-14 relative (an exponential to 1e-15, sums in 16 parts), and what cancels is as large as the logarithms. Probabilities below e^-708 of the
// largest count as 0.
#pragma once

#include <cstdint>

#include "mixkvq/kernels.h"

namespace mixkvq {

// Of one row of logits.
struct Prediction {
    double nll;   // -log p of the target; NaN if there is none
    double kld;   // sum of p (log p - log q) in nats, p the baseline's, at least 0; 0 for the baseline itself
    int    top;   // the first of the largest
};

// Logits that are no distribution: NaN, +inf, or nothing but -inf.
struct BadLogits {
    int cache = -1;  // -1: the baseline
    int row = -1;    // -1: all is well
    int token = 0;
};

// baseline and each of caches[0..n_caches) are n_rows rows of n_vocab > 0 logits. targets: a token of each row, or nullptr. `out` gets the baseline's
// n_rows predictions, then those of each cache. Returns the first logits in which something is wrong; `out` is then incomplete.
BadLogits compare_predictions(const Kernels & kernels, const float * baseline, const float * const * caches, int n_caches, int n_rows, int n_vocab,
                              const int32_t * targets, int n_threads, Prediction * out);

}  // namespace mixkvq
