// The kernels as plain C++: the oracle every vector path is tested against, and what runs where there is none.
// docs/format.md in code: read the two side by side. Compile with -ffp-contract=off, or the bytes change.
#include "mixkvq/kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace mixkvq {
namespace {

// --- IEEE half ------------------------------------------------------------------------------------------------

float half_to_float(half h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16;
    const uint32_t exponent = (h >> 10) & 31, mantissa = h & 0x3ff;
    if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24, exact
        const float magnitude = float(mantissa) * 5.9604644775390625e-8f;
        return sign ? -magnitude : magnitude;
    }
    const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | (mantissa << 13);
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// Nearest, ties to even; clamps to +-65504; NaN becomes 0.
half float_to_half(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const half sign = half((bits >> 16) & 0x8000);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return 0;
    if (bits >= 0x477fe000u) return half(sign | 0x7bff);  // 65504 and above
    int shift = 13;
    uint32_t mantissa = bits, base = 0x38000000u;  // 112 << 23: the exponents' difference in bias
    if (bits < 0x38800000u) {                      // below 2^-14: a subnormal half counts units of 2^-24
        const int exponent = int(bits >> 23);
        shift = 126 - exponent;
        if (shift > 24) return sign;  // below 2^-25
        mantissa = (bits & 0x7fffffu) | 0x800000u;
        base = 0;
    }
    const uint32_t half_unit = 1u << (shift - 1), odd = (mantissa >> shift) & 1;
    return half(sign | ((mantissa - base + half_unit - 1 + odd) >> shift));
}

void to_half(const float * src, half * dst, int n) {
    for (int i = 0; i < n; ++i) dst[i] = float_to_half(src[i]);
}

void from_half(const half * src, float * dst, int n) {
    for (int i = 0; i < n; ++i) dst[i] = half_to_float(src[i]);
}

void store_half(uint8_t * section, size_t index, half h) {
    section[2 * index] = uint8_t(h);
    section[2 * index + 1] = uint8_t(h >> 8);
}

half load_half(const uint8_t * section, size_t index) {
    return half(section[2 * index] | section[2 * index + 1] << 8);
}

// Rotated values keep their means and scales in a byte: the upper byte of a half (5 bits of exponent, 2 of mantissa), and a positive half
// without its sign and its last seven bits (5 and 3).
uint8_t mean_byte(float x) {
    const half h = float_to_half(x);
    return uint8_t((h & 0x8000) >> 8 | std::min(((h & 0x7fff) + 0x80) >> 8, 0x7b));
}
float mean_of(uint8_t byte) { return half_to_float(half(byte << 8)); }

uint8_t scale_byte(half h, int rounding) { return uint8_t(std::min((h + rounding) >> 7, 0xf7)); }
float scale_of(uint8_t byte) { return half_to_float(half(byte << 7)); }

// --- places of codes ------------------------------------------------------------------------------------------

// Codes of one key quad; `r` is the channel within the quad, `t` the token.
void put_key_code(uint8_t * quad, int bits, int t, int r, int code) {
    const int lane = 4 * (t % 8) + r;
    switch (bits) {
        case 8: quad[4 * t + r] = uint8_t(code); break;
        case 4: quad[32 * (t / 16) + lane] |= uint8_t(code << 4 * (t / 8 % 2)); break;
        case 3: quad[128 + 32 * (t / 64) + lane] |= uint8_t((code >> 2) << (t / 8 % 8)); code &= 3; [[fallthrough]];
        case 2: quad[32 * (t / 32) + lane] |= uint8_t(code << 2 * (t / 8 % 4)); break;
    }
}

int get_key_code(const uint8_t * quad, int bits, int t, int r) {
    const int lane = 4 * (t % 8) + r;
    if (bits == 8) return quad[4 * t + r];
    if (bits == 4) return (quad[32 * (t / 16) + lane] >> 4 * (t / 8 % 2)) & 15;
    int code = (quad[32 * (t / 32) + lane] >> 2 * (t / 8 % 4)) & 3;
    if (bits == 3) code |= ((quad[128 + 32 * (t / 64) + lane] >> (t / 8 % 8)) & 1) << 2;
    return code;
}

// Codes of a value record.
void put_value_code(const ValueFormat & f, uint8_t * record, int t, int d, int code) {
    const int row = 4 * f.head_size, lane = 4 * d + t % 4;
    switch (f.bits) {
        case 8: record[t / 4 * row + lane] = uint8_t(code); break;
        case 4: record[t / 8 * row + lane] |= uint8_t(code << 4 * (t / 4 % 2)); break;
        case 3: record[f.offset_high() + t / 32 * row + lane] |= uint8_t((code >> 2) << (t / 4 % 8)); code &= 3; [[fallthrough]];
        case 2: record[t / 16 * row + lane] |= uint8_t(code << 2 * (t / 4 % 4)); break;
    }
}

int get_value_code(const ValueFormat & f, const uint8_t * record, int t, int d) {
    const int row = 4 * f.head_size, lane = 4 * d + t % 4;
    if (f.bits == 8) return record[t / 4 * row + lane];
    if (f.bits == 4) return (record[t / 8 * row + lane] >> 4 * (t / 4 % 2)) & 15;
    int code = (record[t / 16 * row + lane] >> 2 * (t / 4 % 4)) & 3;
    if (f.bits == 3) code |= ((record[f.offset_high() + t / 32 * row + lane] >> (t / 4 % 8)) & 1) << 2;
    return code;
}

// The coded tiers of a key record in the order of their sections.
struct Tier {
    int bits, count;
    size_t offset;
};

struct Tiers {
    Tier tier[4];
    explicit Tiers(const KeyFormat & f)
        : tier{{8, f.n8, f.offset8()}, {4, f.n4, f.offset4()}, {3, f.n3, f.offset3()}, {2, f.n2, f.offset2()}} {}
};

size_t quad_bytes(int bits) { return size_t(64) * bits; }

// --- minimum and scale ----------------------------------------------------------------------------------------

struct Range {
    float lo = 0, hi = 0;
    bool any = false;

    void add(float x) {
        lo = any ? std::min(lo, x) : x;
        hi = any ? std::max(hi, x) : x;
        any = true;
    }
    // A zero is +0 whatever its sign in the rows, so that the order of the comparisons does not show in the bytes.
    float low() const { return lo + 0.0f; }
    float high() const { return hi + 0.0f; }
};

struct Affine {
    half scale, min;
    float inv;
    int top;

    Affine(const Range & r, int bits) : top((1 << bits) - 1) {
        scale = float_to_half((r.high() - r.low()) / float(top));
        min = float_to_half(r.low());
        const float s = half_to_float(scale);
        inv = s > 0 ? 1.0f / s : 0.0f;
    }
    int code(float x) const {
        const float v = std::nearbyint((x - half_to_float(min)) * inv);
        return int(std::min(std::max(v, 0.0f), float(top)));
    }
};

// --- keys -----------------------------------------------------------------------------------------------------

void pack_keys(const KeyFormat & f, const half * rows, size_t stride, const CellMask & valid, const float * importance, uint8_t * record) {
    const int n = f.head_size, groups = f.n_groups();
    std::memset(record, 0, f.record_bytes());

    Range range[kMaxHeadSize][4];
    float salience[kMaxHeadSize];
    uint8_t order[kMaxHeadSize];
    for (int d = 0; d < n; ++d) {
        float sum = 0;
        for (int g = 0; g < groups; ++g) {
            for (int t = g * f.group; t < (g + 1) * f.group; ++t) {
                if (valid.test(t)) range[d][g].add(half_to_float(rows[t * stride + d]));
            }
            sum += range[d][g].high() - range[d][g].low();
        }
        const float a = importance[d] * sum;
        salience[d] = a > 0 ? a : 0.0f;  // NaN sorts as 0: the order stays a permutation
        order[d] = uint8_t(d);
    }
    std::sort(order, order + n, [&](int a, int b) { return salience[a] != salience[b] ? salience[a] > salience[b] : a < b; });
    std::memcpy(record + f.offset_order(), order, n);

    for (int r = 0; r < f.n16; ++r) {
        for (int t = 0; t < kPageCells; ++t) {
            store_half(record, size_t(r) * kPageCells + t, valid.test(t) ? rows[t * stride + order[r]] : half(0));
        }
    }
    int rank = f.n16;
    for (const Tier & tier : Tiers(f).tier) {
        for (int i = 0; i < tier.count; ++i, ++rank) {
            const int d = order[rank];
            uint8_t * quad = record + tier.offset + i / 4 * quad_bytes(tier.bits);
            for (int g = 0; g < groups; ++g) {
                const Affine a(range[d][g], tier.bits);
                store_half(record + f.offset_scale(), size_t(rank - f.n16) * groups + g, a.scale);
                store_half(record + f.offset_min(), size_t(rank - f.n16) * groups + g, a.min);
                for (int t = g * f.group; t < (g + 1) * f.group; ++t) {
                    if (valid.test(t)) put_key_code(quad, tier.bits, t, i % 4, a.code(half_to_float(rows[t * stride + d])));
                }
            }
        }
    }
}

// Calls put(channel, token, value) for every number of a record.
template <class Put>
void decode_keys(const KeyFormat & f, const uint8_t * record, Put put) {
    const uint8_t * order = record + f.offset_order();
    const int groups = f.n_groups();
    for (int r = 0; r < f.n16; ++r) {
        for (int t = 0; t < kPageCells; ++t) put(order[r], t, half_to_float(load_half(record, size_t(r) * kPageCells + t)));
    }
    int rank = f.n16;
    for (const Tier & tier : Tiers(f).tier) {
        for (int i = 0; i < tier.count; ++i, ++rank) {
            const uint8_t * quad = record + tier.offset + i / 4 * quad_bytes(tier.bits);
            for (int g = 0; g < groups; ++g) {
                const size_t at = size_t(rank - f.n16) * groups + g;
                const float scale = half_to_float(load_half(record + f.offset_scale(), at));
                const float min = half_to_float(load_half(record + f.offset_min(), at));
                for (int t = g * f.group; t < (g + 1) * f.group; ++t) {
                    put(order[rank], t, min + float(get_key_code(quad, tier.bits, t, i % 4)) * scale);
                }
            }
        }
    }
}

void unpack_keys(const KeyFormat & f, const uint8_t * record, half * rows, size_t stride) {
    decode_keys(f, record, [&](int d, int t, float x) { rows[t * stride + d] = float_to_half(x); });
}

// --- values ---------------------------------------------------------------------------------------------------

void scale(float * x, int n, float s) {
    for (int i = 0; i < n; ++i) x[i] *= s;
}

void rotate(float * x, int head_size, int block) {
    for (int h = 1; h < block; h *= 2) {
        for (int i = 0; i < head_size; i += 2 * h) {
            for (int j = i; j < i + h; ++j) {
                const float a = x[j], b = x[j + h];
                x[j] = a + b;
                x[j + h] = a - b;
            }
        }
    }
    scale(x, head_size, 1.0f / std::sqrt(float(block)));
}

// The means of the page's rows, rotated, as bytes.
void rotated_means(const ValueFormat & f, const half * rows, size_t stride, const CellMask & valid, uint8_t * means) {
    float sum[kMaxHeadSize] = {};
    int count = 0;
    for (int t = 0; t < kPageCells; ++t) {
        if (!valid.test(t)) continue;
        ++count;
        for (int d = 0; d < f.head_size; ++d) sum[d] += half_to_float(rows[t * stride + d]);
    }
    for (int d = 0; d < f.head_size && count > 0; ++d) sum[d] /= float(count);
    rotate(sum, f.head_size, f.rotation_block());
    for (int d = 0; d < f.head_size; ++d) means[d] = mean_byte(sum[d]);
}

uint8_t rotated_scale(const ValueFormat & f, const float * y) {
    if (f.bits == 8) {
        float top = 0;
        for (int d = 0; d < f.head_size; ++d) top = std::max(top, std::fabs(y[d]));
        return scale_byte(float_to_half(top / 127.5f), 0x7f);  // upwards: nothing is cut off
    }
    float s[8] = {};
    for (int d = 0; d < f.head_size; ++d) s[d % 8] += y[d] * y[d];
    const float sum = ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
    return scale_byte(float_to_half(std::sqrt(sum / float(f.head_size)) * gaussian_step(f.bits)), 0x40);
}

void pack_values(const ValueFormat & f, const half * rows, size_t stride, const CellMask & valid, uint8_t * record) {
    const int n = f.head_size, groups = f.n_groups(), middle = 1 << (f.bits - 1);
    std::memset(record, 0, f.record_bytes());
    if (f.rotated()) rotated_means(f, rows, stride, valid, record + f.offset_mean());
    for (int t = 0; t < kPageCells; ++t) {
        if (!valid.test(t)) continue;
        float y[kMaxHeadSize];
        from_half(rows + t * stride, y, n);
        if (f.rotated()) {
            rotate(y, n, f.rotation_block());
            for (int d = 0; d < n; ++d) y[d] -= mean_of(record[f.offset_mean() + d]);
            const uint8_t s = rotated_scale(f, y);
            const float inv = s > 0 ? 1.0f / scale_of(s) : 0.0f;
            record[f.offset_scale() + t] = s;
            for (int d = 0; d < n; ++d) {
                const float v = std::floor(y[d] * inv);
                put_value_code(f, record, t, d, int(std::min(std::max(v, float(-middle)), float(middle - 1))) + middle);
            }
            continue;
        }
        for (int g = 0; g < groups; ++g) {
            const int end = std::min((g + 1) * f.group, n);
            Range range;
            for (int d = g * f.group; d < end; ++d) range.add(y[d]);
            const Affine a(range, f.bits);
            store_half(record + f.offset_scale(), size_t(t) * groups + g, a.scale);
            store_half(record + f.offset_min(), size_t(t) * groups + g, a.min);
            for (int d = g * f.group; d < end; ++d) put_value_code(f, record, t, d, a.code(y[d]));
        }
    }
}

// One token, in the rotated basis if the format is rotated.
void decode_value(const ValueFormat & f, const uint8_t * record, int t, float * y) {
    for (int d = 0; d < f.head_size; ++d) {
        const float code = float(get_value_code(f, record, t, d));
        if (f.rotated()) {
            y[d] = mean_of(record[f.offset_mean() + d]) + (code + 0.5f - float(1 << (f.bits - 1))) * scale_of(record[f.offset_scale() + t]);
        } else {
            const size_t at = size_t(t) * f.n_groups() + d / f.group;
            y[d] = half_to_float(load_half(record + f.offset_min(), at)) + code * half_to_float(load_half(record + f.offset_scale(), at));
        }
    }
}

void unpack_values(const ValueFormat & f, const uint8_t * record, half * rows, size_t stride) {
    for (int t = 0; t < kPageCells; ++t) {
        float y[kMaxHeadSize];
        decode_value(f, record, t, y);
        if (f.rotated()) rotate(y, f.head_size, f.rotation_block());
        to_half(y, rows + t * stride, f.head_size);
    }
}

// --- attention ------------------------------------------------------------------------------------------------

void scores_packed(const KeyFormat & f, const uint8_t * record, const uint8_t *, const float * q, int n, float * scores, float * scratch) {
    decode_keys(f, record, [&](int d, int t, float x) { scratch[d * kPageCells + t] = x; });
    for (int i = 0; i < n; ++i) {
        double sum[kPageCells] = {};
        for (int d = 0; d < f.head_size; ++d) {
            const double w = q[i * f.head_size + d];
            for (int t = 0; t < kPageCells; ++t) sum[t] += w * double(scratch[d * kPageCells + t]);
        }
        for (int t = 0; t < kPageCells; ++t) scores[i * kPageCells + t] = float(sum[t]);
    }
}

void scores_half(int head_size, const half * rows, size_t stride, int n_cells, const float * q, int n, float * scores, float *) {
    for (int t = 0; t < n_cells; ++t) {
        float x[kMaxHeadSize];
        from_half(rows + t * stride, x, head_size);
        for (int i = 0; i < n; ++i) {
            double sum = 0;
            for (int d = 0; d < head_size; ++d) sum += double(q[i * head_size + d]) * double(x[d]);
            scores[i * kPageCells + t] = float(sum);
        }
    }
}

// acc += sum over tokens of weight * tile row, for one query.
void add_weighted(const float * tile, int head_size, int n_cells, const float * weight, float * acc) {
    double sum[kMaxHeadSize] = {};
    for (int t = 0; t < n_cells; ++t) {
        const double w = weight[t];
        if (w == 0) continue;
        for (int d = 0; d < head_size; ++d) sum[d] += w * double(tile[t * head_size + d]);
    }
    for (int d = 0; d < head_size; ++d) acc[d] += float(sum[d]);
}

void values_packed(const ValueFormat & f, const uint8_t * record, const uint8_t *, const float * weight, int n, float * acc, float * scratch) {
    for (int t = 0; t < kPageCells; ++t) decode_value(f, record, t, scratch + t * f.head_size);
    for (int i = 0; i < n; ++i) add_weighted(scratch, f.head_size, kPageCells, weight + i * kPageCells, acc + i * f.head_size);
}

void values_half(int head_size, const half * rows, size_t stride, int n_cells, const float * weight, int n, float * acc, float * scratch) {
    for (int t = 0; t < n_cells; ++t) from_half(rows + t * stride, scratch + t * head_size, head_size);
    for (int i = 0; i < n; ++i) add_weighted(scratch, head_size, n_cells, weight + i * kPageCells, acc + i * head_size);
}

float logits(float * x, int n, float scale, float softcap, const float * mask, float slope) {
    float top = -INFINITY;
    for (int i = 0; i < n; ++i) {
        x[i] = softcap > 0 ? softcap * std::tanh(x[i] * (scale / softcap)) : x[i] * scale;
        if (mask) x[i] += slope * mask[i];
        top = std::max(top, x[i]);
    }
    return top;
}

float exp_sum(float * x, int n, float max) {
    double sum = 0;
    for (int i = 0; i < n; ++i) {
        x[i] = std::exp(x[i] - max);
        sum += double(x[i]);
    }
    return float(sum);
}

float first_top(const float * x, int n, int & where) {
    where = 0;
    for (int i = 0; i < n; ++i) {
        if (std::isnan(x[i])) {
            where = i;
            break;
        }
        if (x[i] > x[where]) where = i;
    }
    return x[where];
}

double exp_wide(const float * x, int n, float max, double * y) {
    double sum = 0;
    for (int i = 0; i < n; ++i) {
        const double gap = double(x[i]) - double(max);
        y[i] = gap < -708.0 ? 0.0 : std::exp(gap);
        sum += y[i];
    }
    return sum;
}

double weighted_gap(const double * p, const float * x, float x_max, const float * y, float y_max, int n) {
    double sum = 0;
    for (int i = 0; i < n; ++i) {
        if (p[i] > 0) sum += p[i] * ((double(x[i]) - double(x_max)) - (double(y[i]) - double(y_max)));
    }
    return sum;
}

}  // namespace

const Kernels & scalar_kernels() {
    static const Kernels table = {
        Isa::scalar,   to_half,     from_half,     pack_keys,   unpack_keys, pack_values, unpack_values,
        scores_packed, scores_half, values_packed, values_half, logits,      exp_sum,     first_top,   exp_wide,
        weighted_gap,  scale,       rotate,
    };
    return table;
}

}  // namespace mixkvq
