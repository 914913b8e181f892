// Scores: queries times the keys of a page, in integers. Queries are rounded to a grid per page.
#pragma once

#include "ranges.h"

namespace mixkvq {
namespace {

// Calls f(integral constant m, first query) for the n queries, m = 1 to 4 at a time.
template <class Function>
inline void by_queries(int n, Function && f) {
    int i = 0;
    for (; i + kQueries <= n; i += kQueries) f(std::integral_constant<int, 4>(), i);
    switch (n - i) {
        case 3: f(std::integral_constant<int, 3>(), i); break;
        case 2: f(std::integral_constant<int, 2>(), i); break;
        case 1: f(std::integral_constant<int, 1>(), i); break;
    }
}

// A section of scales or minima, which has the groups of a channel (a token) side by side: out[group * n + channel].
void read_by_group(const uint8_t * section, int n, int groups, float * out) {
    const half * h = reinterpret_cast<const half *>(section);
    if (groups == 1) return from_half(h, out, n);
    float x[4 * kMaxHeadSize];
    from_half(h, x, n * groups);
    auto deal = [&](auto step) {
        for (int r = 0; r < n; ++r) {
            for (int g = 0; g < step; ++g) out[g * n + r] = x[r * step + g];
        }
    };
    if (groups == 2) return deal(std::integral_constant<int, 2>());  // the compiler makes shuffles of a constant step
    if (groups == 4) return deal(std::integral_constant<int, 4>());
    deal(groups);
}

// Integer weights beside codes of these bits: 8 bits do for 2 and 3, whose own rounding is coarse; 4 and 8 get 16.
constexpr bool wide_weights(int bits) { return bits >= 4; }

// An index that GCC shall not compute eight at a time and take out of the register again.
inline size_t settled(size_t x) {
    __asm__("" : "+r"(x));
    return x;
}

// Channels that share a factor: all of a wide tier, 64 of a narrow one. Channels come sorted by salience, so the 64 are of a kind.
constexpr int kSegmentQuads = 16;
constexpr int segments(int channels) { return (channels / 4 + kSegmentQuads - 1) / kSegmentQuads; }
constexpr int kMaxSegments = 2 + segments(kMaxHeadSize) + 1;

// Four queries made ready for one group of tokens. Scale and minimum of a channel are folded into the query, which is then
// rounded to integers, with a factor per segment. `bias` has the share of the minima and, for what rounding took from the weights, that of the
// middle code: so the rounding error is weighed by the distance of a code from the middle one.
struct QueryWeights {
    int32_t wide[kMaxHeadSize / 4][2 * kQueries];  // 8- and 4-bit quads: even pairs of four queries, then odd pairs
    int32_t narrow[kMaxHeadSize / 4][kQueries];    // 3- and 2-bit quads
    float factor[kMaxSegments][kQueries];          // 8 bits, 4 bits, segments of 3 bits, segments of 2 bits
    float bias[kQueries];
};

// Calls f(segment, bits, first channel, end) for every segment.
template <class Function>
inline void by_segments(const KeyFormat & f, Function && call) {
    int segment = 0, begin = 0;
    for (const Tier & tier : Tiers(f).tier) {
        const int end = begin + tier.count;
        if (wide_weights(tier.bits)) {
            call(segment++, tier.bits, begin, end);
            begin = end;
        }
        for (; begin < end; begin += 4 * kSegmentQuads) {
            call(segment++, tier.bits, begin, begin + 4 * kSegmentQuads < end ? begin + 4 * kSegmentQuads : end);
        }
        begin = end;
    }
}

// `q` holds the queries' coded channels in the record's order, four queries side by side. A register is a quad of four queries.
void fold_queries(const KeyFormat & f, const float * q, const float * scale, const float * min, QueryWeights & w) {
    alignas(64) float folded[4 * kMaxHeadSize];
    F2 grid[kMaxSegments], middle[kMaxSegments], bias = splat2(0.0f);
    // All segments up to their grids, then all from there: the divisions of one pass beside the work on the next.
    by_segments(f, [&](int segment, int bits, int begin, int end) {
        F2 largest = splat2(0.0f), total = splat2(0.0f), share = splat2(0.0f);
        for (int r = begin; r < end; r += 4) {
            const F2 x = load2(q + 4 * r), y = mul(x, quad(scale + r));
            largest = max(largest, abs(y));
            total = add(total, y);
            share = fma(x, quad(min + r), share);
            store(folded + 4 * r, y);
        }
        F top = max(first(largest), second(largest));
        top = max(top, swap_halves(top));
        // A top so small that its inverse overflows is nothing beside any other term.
        const float steps = wide_weights(bits) ? 32767.0f : 127.0f, half_range = 0.5f * float((1 << bits) - 1);
        const F factor = mul(top, splat(1 / steps));
        grid[segment] = twice(zero_below(div(splat(steps), top), top, splat(1e-30f)));
        middle[segment] = twice(mul(factor, splat(half_range)));
        bias = add(bias, fma(total, splat2(half_range), share));
        store_low(w.factor[segment], factor);
    });
    int wide = 0, narrow = 0;
    by_segments(f, [&](int segment, int bits, int begin, int end) {
        I2 total = to_int(splat2(0.0f));
        auto weights = [&](int r) {
            const I2 x = to_int(mul(load2(folded + 4 * r), grid[segment]));
            total = add(total, x);
            return x;
        };
        if (wide_weights(bits)) {
            for (int r = begin; r < end; r += 4) store_wide_weights(w.wide[wide++], weights(r));
        } else {
            for (int r = begin; r < end; r += 4) store_narrow_weights(w.narrow[narrow++], weights(r));
        }
        // Codes count from 0, not from the middle: take the middle code's share of the integer sums off again.
        bias = sub(bias, mul(to_float(total), middle[segment]));
    });
    const F both = add(first(bias), second(bias));
    store_low(w.bias, add(both, swap_halves(both)));
}

// Adds one tier's share to the scores of 16 * pairs tokens, from register k of a chunk, for m queries.
template <int bits, int m, int k, int pairs>
inline __attribute__((always_inline)) void add_tier(const uint8_t * low, const uint8_t * high, int n_quads, const QueryWeights & w, int first_quad,
                                                    int segment, F2 (*score)[pairs]) {
    constexpr size_t quad_bytes = size_t(64) * bits;
    if constexpr (wide_weights(bits)) {
        WideSum2 sum[m][pairs];
        for (int i = 0; i < m; ++i) {
            for (int p = 0; p < pairs; ++p) sum[i][p] = wide_zero2();
        }
        for (int quad = 0; quad < n_quads; ++quad, low += quad_bytes) {
            Wide2 codes[pairs];
            unroll<pairs>([&](auto p) { codes[p] = split(load_codes_along<bits, k + 2 * p>(low, 32, high)); });
            const int32_t * weight = w.wide[first_quad + quad];
            for (int i = 0; i < m; ++i) {
                const Weight even = weight_of(weight[i]), odd = weight_of(weight[kQueries + i]);
                for (int p = 0; p < pairs; ++p) sum[i][p] = dot_wide(sum[i][p], codes[p], even, odd);
            }
        }
        for (int i = 0; i < m; ++i) {
            for (int p = 0; p < pairs; ++p) score[i][p] = fma(to_float(widen(sum[i][p])), splat2(w.factor[segment][i]), score[i][p]);
        }
    } else {
        static_assert(narrow_limit(bits) >= kSegmentQuads, "a segment fits a narrow sum");
        for (int quad = 0; quad < n_quads; ++segment) {
            Narrow2 sum[m][pairs];
            for (int i = 0; i < m; ++i) {
                for (int p = 0; p < pairs; ++p) sum[i][p] = narrow_zero2();
            }
            const int end = quad + kSegmentQuads < n_quads ? quad + kSegmentQuads : n_quads;
            for (; quad < end; ++quad, low += quad_bytes, high += quad_bytes) {
                B2 codes[pairs];
                unroll<pairs>([&](auto p) { codes[p] = load_codes_along<bits, k + 2 * p>(low, 32, high); });
                for (int i = 0; i < m; ++i) {
                    const Weight weight = weight_of(w.narrow[first_quad + quad][i]);
                    for (int p = 0; p < pairs; ++p) sum[i][p] = dot_narrow(sum[i][p], codes[p], weight);
                }
            }
            for (int i = 0; i < m; ++i) {
                for (int p = 0; p < pairs; ++p) score[i][p] = fma(to_float(widen(sum[i][p])), splat2(w.factor[segment][i]), score[i][p]);
            }
        }
    }
}

// Scores of the 16 * kScorePairs tokens from t = 64 chunk + 8 k.
template <int m, int k>
void score_tokens(const KeyFormat & f, const uint8_t * record, int chunk, const float * q16, const QueryWeights & w, float * scores) {
    constexpr int pairs = kScorePairs;
    const int t = 64 * chunk + 8 * k;
    F2 score[m][pairs];
    for (int i = 0; i < m; ++i) {
        for (int p = 0; p < pairs; ++p) score[i][p] = splat2(w.bias[i]);
    }
    const half * row = reinterpret_cast<const half *>(record) + t;
    for (int r = 0; r < f.n16; ++r, row += kPageCells) {
        for (int p = 0; p < pairs; ++p) {
            const F2 x = load_half2(row + p * kPair);
            for (int i = 0; i < m; ++i) score[i][p] = fma(x, splat2(q16[4 * r + i]), score[i][p]);
        }
    }
    const uint8_t * at3 = record + f.offset3() + 64 * chunk;
    const uint8_t * at2 = record + f.offset2() + 64 * chunk;
    if (f.n8 > 0) add_tier<8, m, k, pairs>(record + f.offset8() + 256 * chunk, nullptr, f.n8 / 4, w, 0, 0, score);
    if (f.n4 > 0) add_tier<4, m, k, pairs>(record + f.offset4() + 128 * chunk, nullptr, f.n4 / 4, w, f.n8 / 4, 1, score);
    if (f.n3 > 0) add_tier<3, m, k, pairs>(at3, at3 + 128 - 32 * chunk, f.n3 / 4, w, 0, 2, score);
    if (f.n2 > 0) add_tier<2, m, k, pairs>(at2, at2, f.n2 / 4, w, f.n3 / 4, 2 + segments(f.n3), score);
    for (int i = 0; i < m; ++i) {
        for (int p = 0; p < pairs; ++p) store(scores + i * kPageCells + t + p * kPair, score[i][p]);
    }
}

// Asks for part `step` of `steps` of the record that comes next, so that it is in the second-level cache when its turn comes.
inline void prefetch(const uint8_t * record, size_t bytes, int step, int steps) {
    if (!record) return;
    const size_t lines = (bytes + 63) / 64;
    const uint8_t * end = record + lines * (step + 1) / steps * 64;
    for (const uint8_t * at = record + lines * step / steps * 64; at < end; at += 64) __builtin_prefetch(at, 0, 2);
}

void scores_packed(const KeyFormat & f, const uint8_t * record, const uint8_t * next, const float * q, int n, float * scores, float *) {
    const uint8_t * order = record + f.offset_order();
    const int d = f.head_size;
    const int n_coded = f.n_coded();
    float scale[4 * kMaxHeadSize], min[4 * kMaxHeadSize];
    read_by_group(record + f.offset_scale(), n_coded, f.n_groups(), scale);
    read_by_group(record + f.offset_min(), n_coded, f.n_groups(), min);
    by_queries(n, [&](auto m, int first) {
        // The queries side by side, then in the record's order.
        alignas(64) float side[4 * kMaxHeadSize], sorted[4 * kMaxHeadSize];
        for (int j = 0; j < d; j += kLanes) {
            F x[kQueries];
            for (int i = 0; i < kQueries; ++i) x[i] = i < m ? load(q + size_t(first + i) * d + j) : splat(0.0f);
            store_interleaved(side + 4 * j, x[0], x[1], x[2], x[3]);
        }
        for (int r = 0; r < d; r += 4) {
            unroll<4>([&](auto i) { std::memcpy(sorted + 4 * (r + i), side + settled(size_t(4) * order[r + i]), 16); });
        }

        QueryWeights w;
        float * out = scores + size_t(first) * kPageCells;
        for (int g = 0; g < f.n_groups(); ++g) {
            fold_queries(f, sorted + 4 * f.n16, scale + g * n_coded, min + g * n_coded, w);
            for (int chunk = 0; chunk < 2; ++chunk) {
                unroll<4 / kScorePairs>([&](auto i) {
                    constexpr int k = 2 * kScorePairs * i;
                    const int t = 64 * chunk + 8 * k;
                    if (t < g * f.group || t >= (g + 1) * f.group) return;
                    if (first == 0) prefetch(next, f.record_bytes(), t / (kPair * kScorePairs), kPageCells / (kPair * kScorePairs));
                    score_tokens<m, k>(f, record, chunk, sorted, w, out);
                });
            }
        }
    });
}

void scores_half(int head_size, const half * rows, size_t stride, int n_cells, const float * q, int n, float * scores, float *) {
    by_queries(n, [&](auto m, int first) {
        const float * from = q + size_t(first) * head_size;
        float * out = scores + size_t(first) * kPageCells;
        for (int t = 0; t < n_cells; t += 2) {
            const half * a = rows + t * stride;
            const half * b = t + 1 < n_cells ? a + stride : a;
            F sum[kQueries][2];
            for (int i = 0; i < kQueries; ++i) sum[i][0] = sum[i][1] = splat(0.0f);
            for (int d = 0; d < head_size; d += kLanes) {
                const F x = load_half(a + d), y = load_half(b + d);
                for (int i = 0; i < m; ++i) {
                    const F w = load(from + i * head_size + d);
                    sum[i][0] = fma(x, w, sum[i][0]);
                    sum[i][1] = fma(y, w, sum[i][1]);
                }
            }
            float s[2][4];
            sum4(sum[0][0], sum[1][0], sum[2][0], sum[3][0], s[0]);
            sum4(sum[0][1], sum[1][1], sum[2][1], sum[3][1], s[1]);
            for (int i = 0; i < m; ++i) {
                out[i * kPageCells + t] = s[0][i];
                if (t + 1 < n_cells) out[i * kPageCells + t + 1] = s[1][i];
            }
        }
    });
}

}  // namespace
}  // namespace mixkvq
