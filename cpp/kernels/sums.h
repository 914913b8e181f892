// Values of a page times the weights of their tokens, in integers. Weights are rounded to a grid per page.
#pragma once

#include "conversion.h"
#include "scores.h"
#include "rotation.h"

namespace mixkvq {
namespace {

constexpr int kChunkTokens = 32;
constexpr int kChunks = kPageCells / kChunkTokens;

// Weights of a page for one query and one group of dimensions: weight times scale, rounded to integers. Beside 4 and 8 bits: 15
// bits of the page's largest. Beside 2 and 3 bits: 8 bits of the largest of 32 tokens, and what rounding left of a token is passed
// on to the token eight further, so that many small weights beside a large one keep their sum.
struct TokenWeights {
    int32_t wide[kPageCells / 4][2];  // even and odd pairs
    int32_t narrow[kPageCells / 4];
    float factor[kChunks], bias;      // value sum = sum over chunks of factor * integer sum, + bias
    float total;                      // of the weights as given, for the means
};

// `min` is null if the format is rotated. A register is eight tokens of one chunk and, in its other half, of the next.
template <bool wide>
__attribute__((noinline)) void fold_weights(const float * weight, const float * scale, const float * min, int bits, TokenWeights & w) {
    const float middle = 0.5f * float((1 << bits) - 1);
    constexpr float steps = wide ? 32767.0f : 255.0f;
    const auto load_both = [](const float * p) { return join(load(p), load(p + kChunkTokens)); };
    F2 folded[kChunks / 2][4], largest[kChunks / 2], bias = splat2(0.0f), all = splat2(0.0f);
    for (int c = 0; c < kChunks / 2; ++c) {
        for (int j = 0; j < 4; ++j) {
            const int t = 2 * c * kChunkTokens + j * kLanes;
            const F2 x = load_both(weight + t), y = mul(x, load_both(scale + t));
            all = add(all, x);
            largest[c] = j ? max(largest[c], y) : y;
            // Rotated codes lie around 0. Beside a minimum the middle code stands for something: its exact share, as for keys.
            if (min) bias = fma(x, load_both(min + t), fma(y, splat2(middle), bias));
            folded[c][j] = y;
        }
    }
    const float page_top = wide ? highest(max(largest[0], largest[1])) : 0.0f;
    for (int c = 0; c < kChunks / 2; ++c) {
        float grid[2];
        for (int j = 0; j < 2; ++j) {
            const float top = wide ? page_top : highest(j ? second(largest[c]) : first(largest[c]));
            w.factor[2 * c + j] = top * (1 / steps);
            grid[j] = top > 1e-30f ? steps / top : 0.0f;
        }
        const F2 grids = join(splat(grid[0]), splat(grid[1]));
        I2 x[4];
        F2 rest = splat2(0.0f);
        unroll<4>([&](auto j) {
            const F2 exact = fma(folded[c][j], grids, rest), r = mixkvq::min(round(exact), splat2(steps));
            rest = sub(exact, r);
            x[j] = to_int(r);
        });
        const F2 total = to_float(add(add(x[0], x[1]), add(x[2], x[3])));
        if (wide) {
            unroll<4>([&](auto j) { store_wide_weights(w.wide[c * 16 + 2 * j], w.wide[c * 16 + 8 + 2 * j], x[j]); });
        } else {
            store_narrow_weights(w.narrow + c * 16, x[0], x[1], x[2], x[3]);
        }
        const F2 factors = join(splat(w.factor[2 * c]), splat(w.factor[2 * c + 1]));
        bias = fma(total, mul(factors, splat2(-middle)), bias);
    }
    w.bias = sum(bias);
    w.total = sum(all);
}

// acc += the weighted sum of 16 * pairs dimensions from dimension d, or of eight.
template <int bits, int m, int pairs, bool both = true>
inline void add_values(const ValueFormat & f, const uint8_t * record, const float * means, int d, const TokenWeights * w, float * acc) {
    constexpr int low_bits = bits == 3 ? 2 : bits;
    const size_t row = size_t(4) * f.head_size;
    const uint8_t * low = record + 4 * d;
    const uint8_t * high = low + f.offset_high();
    F2 total[m][pairs];
    for (int p = 0; p < pairs; ++p) {
        const F2 mean = load2(means + d + p * kPair);
        for (int i = 0; i < m; ++i) total[i][p] = fma(mean, splat2(w[i].total), splat2(w[i].bias));
    }
    if constexpr (wide_weights(bits)) {
        WideSum2 sum[m][pairs];
        for (int i = 0; i < m; ++i) {
            for (int p = 0; p < pairs; ++p) sum[i][p] = wide_zero2();
        }
        for (int c = 0; c < kChunks; ++c, low += row * low_bits) {
            unroll<8>([&](auto k) {
                Wide2 codes[pairs];
                for (int p = 0; p < pairs; ++p) codes[p] = split(load_codes_beside<bits, k, both>(low + 64 * p, row, nullptr));
                for (int i = 0; i < m; ++i) {
                    const Weight even = weight_of(w[i].wide[c * 8 + k][0]), odd = weight_of(w[i].wide[c * 8 + k][1]);
                    for (int p = 0; p < pairs; ++p) sum[i][p] = dot_wide(sum[i][p], codes[p], even, odd);
                }
            });
        }
        for (int i = 0; i < m; ++i) {
            for (int p = 0; p < pairs; ++p) total[i][p] = fma(to_float(widen(sum[i][p])), splat2(w[i].factor[0]), total[i][p]);
        }
    } else {
        static_assert(narrow_limit(bits) / 2 >= 8, "a chunk fits a narrow sum");
        for (int c = 0; c < kChunks; ++c, low += row * low_bits, high += row) {
            Narrow2 sum[m][pairs];
            for (int i = 0; i < m; ++i) {
                for (int p = 0; p < pairs; ++p) sum[i][p] = narrow_zero2();
            }
            unroll<8>([&](auto k) {
                B2 codes[pairs];
                for (int p = 0; p < pairs; ++p) codes[p] = load_codes_beside<bits, k, both>(low + 64 * p, row, high + 64 * p);
                for (int i = 0; i < m; ++i) {
                    const Weight weight = weight_of(w[i].narrow[c * 8 + k]);
                    for (int p = 0; p < pairs; ++p) sum[i][p] = dot_unsigned(sum[i][p], codes[p], weight);
                }
            });
            for (int i = 0; i < m; ++i) {
                for (int p = 0; p < pairs; ++p) total[i][p] = fma(to_float(widen(sum[i][p])), splat2(w[i].factor[c]), total[i][p]);
            }
        }
    }
    for (int i = 0; i < m; ++i) {
        float * at = acc + i * f.head_size + d;
        if constexpr (!both) {
            store(at, add(load(at), mixkvq::first(total[i][0])));
            continue;
        }
        for (int p = 0; p < pairs; ++p) store(at + p * kPair, add(load2(at + p * kPair), total[i][p]));
    }
}

bool all_zero(const float * x, int n) {
    F top = splat(0.0f);
    for (int i = 0; i < n; i += kLanes) top = max(top, load(x + i));
    return !(highest(top) > 0);
}

void values_packed(const ValueFormat & f, const uint8_t * record, const uint8_t * next, const float * weight, int n, float * acc, float *) {
    if (all_zero(weight, n * kPageCells)) return;
    const int groups = f.n_groups(), width = f.rotated() ? f.head_size : f.group;
    float scale[kMaxHeadSize / 32][kPageCells], min[kMaxHeadSize / 32][kPageCells];
    float means[kMaxHeadSize + kLanes] = {};
    if (f.rotated()) {
        for (int t = 0; t < kPageCells; t += kLanes) store(scale[0] + t, load_byte_halves<kScaleShift>(record + f.offset_scale() + t));
        for (int d = 0; d < f.head_size; d += kLanes) store(means + d, load_byte_halves<kMeanShift>(record + f.offset_mean() + d));
    } else {
        read_by_group(record + f.offset_scale(), kPageCells, groups, scale[0]);
        read_by_group(record + f.offset_min(), kPageCells, groups, min[0]);
    }
    by_queries(n, [&](auto m, int first) {
        TokenWeights w[m];
        float * out = acc + size_t(first) * f.head_size;
        for (int g = 0; g < groups; ++g) {
            const int end = (g + 1) * width < f.head_size ? (g + 1) * width : f.head_size;
            with_bits(f.bits, [&](auto bits) {
                for (int i = 0; i < m; ++i) {
                    fold_weights<wide_weights(bits)>(weight + size_t(first + i) * kPageCells, scale[g], f.rotated() ? nullptr : min[g], bits, w[i]);
                }
                int d = g * width;
                for (; d + kPair * kValuePairs <= end; d += kPair * kValuePairs) {
                    if (first == 0) prefetch(next, f.record_bytes(), d / (kPair * kValuePairs), f.head_size / (kPair * kValuePairs));
                    add_values<bits, m, kValuePairs>(f, record, means, d, w, out);
                }
                if (kValuePairs > 1 && d + kPair <= end) add_values<bits, m, 1>(f, record, means, d, w, out), d += kPair;
                if (d < end) add_values<bits, m, 1, false>(f, record, means, d, w, out);
            });
        }
    });
}

// acc += rows [begin, end) times their weights, `blocks` times eight dimensions from dimension d.
template <int m, int blocks>
inline void add_rows(int head_size, const half * rows, size_t stride, int begin, int end, int d, const float * weight, float * acc) {
    F sum[m][blocks];
    for (int i = 0; i < m; ++i) {
        for (int b = 0; b < blocks; ++b) sum[i][b] = load(acc + i * head_size + d + b * kLanes);
    }
    for (int t = begin; t < end; ++t) {
        F x[blocks];
        for (int b = 0; b < blocks; ++b) x[b] = load_half(rows + t * stride + d + b * kLanes);
        for (int i = 0; i < m; ++i) {
            const F p = splat(weight[i * kPageCells + t]);
            for (int b = 0; b < blocks; ++b) sum[i][b] = fma(x[b], p, sum[i][b]);
        }
    }
    for (int i = 0; i < m; ++i) {
        for (int b = 0; b < blocks; ++b) store(acc + i * head_size + d + b * kLanes, sum[i][b]);
    }
}

void values_half(int head_size, const half * rows, size_t stride, int n_cells, const float * weight, int n, float * acc, float *) {
    constexpr int kRows = 16;  // rows that stay in the first-level cache while all their dimensions are done
    for (int begin = 0; begin < n_cells; begin += kRows) {
        const int end = begin + kRows < n_cells ? begin + kRows : n_cells;
        by_queries(n, [&](auto m, int first) {
            const float * w = weight + size_t(first) * kPageCells;
            float * out = acc + size_t(first) * head_size;
            int d = 0;
            for (; d + 2 * kLanes <= head_size; d += 2 * kLanes) add_rows<m, 2>(head_size, rows, stride, begin, end, d, w, out);
            if (d < head_size) add_rows<m, 1>(head_size, rows, stride, begin, end, d, w, out);
        });
    }
}

}  // namespace
}  // namespace mixkvq
