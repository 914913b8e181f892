#include "mixkvq/attend.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace mixkvq {

namespace {

constexpr float kHidden = -std::numeric_limits<float>::infinity();
constexpr float kNegligible = 25;  // a page of weights below e^-25 of the largest is 1.8e-9 of the sum at most

// Floats of a scratch section, rounded up so that the next section is aligned too.
constexpr size_t padded(size_t n) { return (n + 15) / 16 * 16; }

bool hidden(const float * mask, int n, size_t stride) {
    for (int i = 0; i < n; ++i) {
        const float * row = mask + i * stride;
        if (std::any_of(row, row + kPageCells, [](float m) { return m != kHidden; })) return false;
    }
    return true;
}

}  // namespace

bool softmax_page(const Kernels & kernels, const SoftmaxParams & params, float * scores, int n, int n_cells, const float * mask,
                  size_t mask_stride, float * max, float * sum, float * factor) {
    bool seen = false;
    for (int i = 0; i < n; ++i) {
        float * s = scores + size_t(i) * kPageCells;
        const float page_max = kernels.logits(s, n_cells, params.scale, params.softcap, mask ? mask + i * mask_stride : nullptr, params.slope);
        std::fill(s + n_cells, s + kPageCells, 0.0f);
        factor[i] = 1.0f;
        if (page_max == kHidden || page_max < max[i] - kNegligible) {
            std::fill(s, s + n_cells, 0.0f);
            continue;
        }
        seen = true;
        if (page_max > max[i]) {
            factor[i] = max[i] == kHidden ? 0.0f : std::exp(max[i] - page_max);
            max[i] = page_max;
        }
        sum[i] = sum[i] * factor[i] + kernels.exp_sum(s, n_cells, max[i]);
    }
    return seen;
}

float softmax_close(float max, float sum, const float * sink) {
    if (sink && *sink > max) {
        const float shrink = std::exp(max - *sink);
        return shrink / (sum * shrink + 1.0f);
    }
    if (sink) sum += std::exp(*sink - max);
    return sum > 0 ? 1.0f / sum : 0.0f;
}

size_t attend_scratch_floats(const KeyFormat & key_format, const ValueFormat & value_format, int n) {
    return scratch_floats(std::max(key_format.head_size, value_format.head_size)) + size_t(n) * kPageCells + 3 * padded(n);
}

void attend_records(const Kernels & kernels, const KeyFormat & key_format, const ValueFormat & value_format, const uint8_t * const * k,
                    const uint8_t * const * v, int n_pages, const float * q, int n, const float * mask, const SoftmaxParams & params,
                    const float * sink, float * out, float * scratch) {
    if (n == 0) return;
    const int dv = value_format.head_size;
    float *   scores = scratch;
    float *   max = scores + size_t(n) * kPageCells;
    float *   sum = max + padded(n);
    float *   factor = sum + padded(n);
    float *   kernel_scratch = factor + padded(n);

    std::fill(max, max + n, kHidden);
    std::fill(sum, sum + n, 0.0f);
    std::fill(out, out + size_t(n) * dv, 0.0f);

    const size_t mask_stride = size_t(n_pages) * kPageCells;
    for (int p = 0; p < n_pages; ++p) {
        const float * page_mask = mask ? mask + size_t(p) * kPageCells : nullptr;
        if (page_mask && hidden(page_mask, n, mask_stride)) continue;
        const bool more = p + 1 < n_pages;
        kernels.scores_packed(key_format, k[p], more ? k[p + 1] : nullptr, q, n, scores, kernel_scratch);
        if (!softmax_page(kernels, params, scores, n, kPageCells, page_mask, mask_stride, max, sum, factor)) continue;
        for (int i = 0; i < n; ++i) {
            if (factor[i] != 1.0f) kernels.scale(out + size_t(i) * dv, dv, factor[i]);
        }
        kernels.values_packed(value_format, v[p], more ? v[p + 1] : nullptr, scores, n, out, kernel_scratch);
    }

    for (int i = 0; i < n; ++i) {
        float * head = out + size_t(i) * dv;
        if (value_format.rotated()) kernels.rotate(head, dv, value_format.rotation_block());
        kernels.scale(head, dv, softmax_close(max[i], sum[i], sink ? sink + i : nullptr));
    }
}

}  // namespace mixkvq
