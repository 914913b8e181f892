#include "mixkvq/divergence.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "parallel.h"

namespace mixkvq {

namespace {

constexpr int kBlock = 1024;  // tokens whose probabilities stay in the first-level cache

struct Row {
    const float * x;
    float         max;
    double        sum = 0;  // of exp(x - max)
    double        gap = 0;  // sum of p ((b - b_max) - (x - max)), not yet over the sum of p

    double log_sum() const { return std::log(sum); }
};

// One row of the baseline and of `n` caches, n_rows rows apart in `out`; the first one that is no distribution, by its place (0: the baseline), or -1.
int compare_row(const Kernels & kernels, Row * rows, int n, int n_vocab, int target, Prediction * out, size_t step, int & token) {
    for (int k = 0; k <= n; ++k) {
        rows[k].max = kernels.first_top(rows[k].x, n_vocab, token);
        if (!std::isfinite(rows[k].max)) return k;
        out[k * step].top = token;
    }
    double p[kBlock], q[kBlock];
    for (int i = 0; i < n_vocab; i += kBlock) {
        const int m = std::min(kBlock, n_vocab - i);
        rows[0].sum += kernels.exp_wide(rows[0].x + i, m, rows[0].max, p);
        for (int k = 1; k <= n; ++k) {
            rows[k].sum += kernels.exp_wide(rows[k].x + i, m, rows[k].max, q);
            rows[k].gap += kernels.weighted_gap(p, rows[0].x + i, rows[0].max, rows[k].x + i, rows[k].max, m);
        }
    }
    for (int k = 0; k <= n; ++k) {
        Prediction & found = out[k * step];
        // Rounding can make the divergence of an (almost) equal pair a tiny negative number.
        found.kld = std::max(0.0, rows[k].gap / rows[0].sum - rows[0].log_sum() + rows[k].log_sum());
        found.nll = target < 0 ? std::numeric_limits<double>::quiet_NaN() : rows[k].log_sum() - (double(rows[k].x[target]) - double(rows[k].max));
    }
    return -1;
}

}  // namespace

BadLogits compare_predictions(const Kernels & kernels, const float * baseline, const float * const * caches, int n_caches, int n_rows, int n_vocab,
                              const int32_t * targets, int n_threads, Prediction * out) {
    std::atomic<int> first_bad{n_rows};
    std::vector<Row> rows(size_t(std::max(1, n_threads)) * (n_caches + 1));
    parallel_for(n_threads, n_rows, [&](int i, int thread) {
        Row * own = rows.data() + size_t(thread) * (n_caches + 1);
        own[0] = {baseline + size_t(i) * n_vocab, 0};
        for (int k = 0; k < n_caches; ++k) own[k + 1] = {caches[k] + size_t(i) * n_vocab, 0};
        int token = 0;
        if (compare_row(kernels, own, n_caches, n_vocab, targets ? targets[i] : -1, out + i, size_t(n_rows), token) < 0) return;
        for (int known = first_bad; i < known && !first_bad.compare_exchange_weak(known, i);) {}
    });
    BadLogits bad;
    if (first_bad < n_rows) {
        bad.row = first_bad;
        for (int k = n_caches - 1; k >= -1; --k) {
            int         token = 0;
            const float * x = (k < 0 ? baseline : caches[k]) + size_t(bad.row) * n_vocab;
            if (!std::isfinite(kernels.first_top(x, n_vocab, token))) bad.cache = k, bad.token = token;
        }
    }
    return bad;
}

}  // namespace mixkvq
