// What a cache may make of rows that it packs, from the page format alone (docs/format.md): no kernel takes part. The tolerances follow from
// the steps:
//   - a number coded from a range [lo, hi] in 2^b - 1 steps: half a step; the roundings to F16 of the scale (twice, by way of what hi reads back as) and of the
//     result: 1.5 * 2^-10 of the range, 1.25 * 2^-10 of the larger end, and top * 2^-23 where they are subnormal.
//   - a row of rotated values: the rotation keeps lengths, so the length of the error of a row is held against that of the errors of its rotated numbers: half a
//     step each, or, beyond the last code, what is missing; with half of 2^-10 of the row for the rounding to F16, and 1e-5 of it for sums in F32.
// Steps are those that the rows give. Where the record says which channel has how many bits, or how large a step is, that is checked against the rows as well:
// tiers fall with range times importance, means and scales are those of the rows but for their own rounding to a byte.
// Rows that came out of a record (`carried`) may keep its tiers and scales: then the bytes may lie as far from the rows' own as the format says.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "mixkvq/kernels.h"

namespace mixkvq {

struct Mismatch : std::runtime_error {
    using std::runtime_error::runtime_error;
};

#define EXPECT(condition, ...) \
    do {                       \
        if (!(condition)) mismatch(#condition, __VA_ARGS__); \
    } while (0)

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
[[noreturn]] inline void mismatch(const char * condition, const char * format, ...) {
    char line[400];
    va_list list;
    va_start(list, format);
    std::vsnprintf(line, sizeof(line), format, list);
    va_end(list);
    throw Mismatch(std::string(line) + " (" + condition + ")");
}

// Every half as a float.
inline float number(half h) {
    static const std::vector<float> table = [] {
        std::vector<float> x(65536);
        for (int i = 0; i < 65536; ++i) {
            const int exponent = i >> 10 & 31, mantissa = i & 1023;
            const double size = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
            x[i] = float(exponent == 31 ? (mantissa ? NAN : INFINITY) : size) * (i & 0x8000 ? -1.0f : 1.0f);
        }
        return x;
    }();
    return table[h];
}

// The worst error beside its tolerance, by what was packed or computed.
struct Worst {
    double keys = 0, grouped = 0, rotated = 0, attention = 0;
    void take(const Worst & other) {
        keys = std::max(keys, other.keys), grouped = std::max(grouped, other.grouped);
        rotated = std::max(rotated, other.rotated), attention = std::max(attention, other.attention);
    }
};

// One head of a page that has been packed: its rows before and what reads back, `stride` apart, and its record.
struct PackedHead {
    const half * before;
    const half * after;
    size_t stride;
    CellMask valid, carried;
    bool exact;  // all rows are a record's, and no cell is another: it must come out again
    const uint8_t * record;

    float from(int t, int d) const { return number(before[t * stride + d]); }
    float to(int t, int d) const { return number(after[t * stride + d]); }
    bool same(int t, int d) const { return ((before[t * stride + d] ^ after[t * stride + d]) & 0xffff) == 0 || from(t, d) == to(t, d); }
};

// The share of a step that attention's own rounding may be: what tests/native/test_kernels.cpp allows.
inline double attention_share(int bits) { return bits == 16 ? 0 : bits == 8 ? 0.5 : 0.15; }

struct Range {
    float lo = INFINITY, hi = -INFINITY;
    void take(float x) { lo = std::min(lo, x), hi = std::max(hi, x); }
    double size() const { return hi > lo ? double(hi) - lo : 0; }
    double tolerance(int bits) const {
        const double top = (1 << bits) - 1;
        return size() / top / 2 + 1.5 * std::ldexp(size(), -10) + 1.25 * std::ldexp(std::max(std::fabs(lo), std::fabs(hi)), -10) + std::ldexp(top, -23);
    }
};

// `steps` get the step of every channel and group times attention's share of it.
inline void check_keys(const KeyFormat & f, const PackedHead & x, const float * importance, float * steps, Worst & worst) {
    const uint8_t * order = x.record + f.offset_order();
    std::vector<bool> seen(f.head_size);
    std::vector<double> salience(f.head_size);
    double lowest = INFINITY;  // of the tiers above
    int place = 0, n_lower = 0;
    for (const auto & [bits, n] : {std::pair<int, int>{16, f.n16}, {8, f.n8}, {4, f.n4}, {3, f.n3}, {2, f.n2}}) {
        double lowest_here = INFINITY, highest_here = 0;
        for (int end = place + n; place < end; ++place) {
            const int d = order[place];
            EXPECT(d < f.head_size && !seen[d], "channel %d stands twice in the order of a record", d);
            seen[d] = true;
            for (int g = 0; g < f.n_groups(); ++g) {
                Range range;
                const int first = g * f.group, last = first + f.group;
                for (int t = first; t < last; ++t) {
                    if (x.valid.test(t)) range.take(x.from(t, d));
                }
                salience[d] += range.size();
                steps[d * f.n_groups() + g] = float(bits == 16 ? 0 : range.size() / ((1 << bits) - 1) * attention_share(bits));
                double error = 0;
                std::set<half> levels;
                for (int t = first; t < last; ++t) {
                    if (!x.valid.test(t)) continue;
                    EXPECT(!x.exact || x.same(t, d), "cell %d, channel %d: %g reads back as %g", t, d, x.from(t, d), x.to(t, d));
                    error = std::max(error, std::fabs(double(x.from(t, d)) - x.to(t, d)));
                    levels.insert(x.after[t * x.stride + d]);
                }
                if (error == 0) continue;
                // A channel that came out with fewer levels than its tier has may stand in a higher one afterwards.
                int least = bits;
                for (const auto & [b, n_there] : {std::pair<int, int>{8, f.n8}, {4, f.n4}, {3, f.n3}, {2, f.n2}}) {
                    if (n_there > 0 && b < least && int(levels.size()) <= 1 << b) least = b;
                }
                const double ratio = least == 16 ? INFINITY : error / range.tolerance(least);
                n_lower += least < bits;
                EXPECT(ratio <= 1, "channel %d at %d bits: an error of %g, and %g is half a step and the roundings", d, bits, error, range.tolerance(least));
                worst.keys = std::max(worst.keys, ratio);
            }
            salience[d] *= importance[d];
            lowest_here = std::min(lowest_here, salience[d]), highest_here = std::max(highest_here, salience[d]);
        }
        // Only where no row has been packed before: those may keep their tiers.
        const bool fresh = x.carried.empty() && x.valid.full() && n_lower == 0;
        EXPECT(!fresh || n == 0 || highest_here <= lowest * (1 + 1e-4), "a channel at %d bits has a salience of %g, one above of %g", bits, highest_here, lowest);
        if (n) lowest = std::min(lowest, lowest_here);
    }
}

// `steps` get the largest step of every token times attention's share of it.
inline void check_grouped(const ValueFormat & f, const PackedHead & x, float * steps, Worst & worst) {
    for (int t = 0; t < kPageCells; ++t) {
        steps[t] = 0;
        for (int g = 0; g < f.n_groups() && x.valid.test(t); ++g) {
            Range range;
            const int first = g * f.group, last = std::min(first + f.group, f.head_size);
            for (int d = first; d < last; ++d) range.take(x.from(t, d));
            steps[t] = std::max(steps[t], float(range.size() / ((1 << f.bits) - 1) * attention_share(f.bits)));
            for (int d = first; d < last; ++d) {
                EXPECT(!x.exact || x.same(t, d), "cell %d, dimension %d: %g reads back as %g", t, d, x.from(t, d), x.to(t, d));
                const double error = std::fabs(double(x.from(t, d)) - x.to(t, d)), ratio = error == 0 ? 0 : error / range.tolerance(f.bits);
                EXPECT(ratio <= 1, "cell %d, dimension %d: an error of %g, and %g is half a step and the roundings", t, d, error, range.tolerance(f.bits));
                worst.grouped = std::max(worst.grouped, ratio);
            }
        }
    }
}

inline void rotate(double * x, int n, int block) {
    for (int first = 0; first < n; first += block) {
        for (int h = 1; h < block; h *= 2) {
            for (int i = 0; i < block; ++i) {
                if (i & h) continue;
                double & a = x[first + i], & b = x[first + i + h];
                const double sum = a + b;
                b = a - b, a = sum;
            }
        }
    }
    for (int i = 0; i < n; ++i) x[i] /= std::sqrt(double(block));
}

// A row that is rotated, and the step that belongs to it: what the format would take, from the rows and not from the record.
struct RotatedRow {
    double size = 0;  // of the row
    double step = 0;
    std::vector<double> z;  // less the means
};

inline RotatedRow rotated_row(const ValueFormat & f, const PackedHead & x, int t, const double * means) {
    RotatedRow row;
    row.z.resize(f.head_size);
    double sum = 0, top = 0;
    for (int d = 0; d < f.head_size; ++d) row.z[d] = x.from(t, d), row.size += row.z[d] * row.z[d];
    rotate(row.z.data(), f.head_size, f.rotation_block());
    for (int d = 0; d < f.head_size; ++d) {
        row.z[d] -= means[d];
        sum += row.z[d] * row.z[d], top = std::max(top, std::fabs(row.z[d]));
    }
    row.size = std::sqrt(row.size);
    row.step = f.bits == 8 ? top / 127.5 : std::sqrt(sum / f.head_size) * gaussian_step(f.bits);
    return row;
}

inline void check_means(const ValueFormat & f, const PackedHead & x, const double * means) {
    std::vector<double> mean(f.head_size);
    double square = 0;
    int n = 0;
    for (int t = 0; t < kPageCells; ++t) {
        if (!x.valid.test(t)) continue;
        ++n;
        for (int d = 0; d < f.head_size; ++d) mean[d] += x.from(t, d), square += double(x.from(t, d)) * x.from(t, d);
    }
    for (double & m : mean) m /= n;
    rotate(mean.data(), f.head_size, f.rotation_block());
    const double limit = kLeastMean * std::sqrt(square / n / f.head_size);
    for (int d = 0; d < f.head_size; ++d) {
        const double error = std::fabs(means[d] - mean[d]), size = std::fabs(mean[d]);
        // A byte has two bits behind the leading one; means below the limit are 0.
        const bool is_rounded = error <= size / 8 * 1.001 + std::ldexp(1.0, -17) + 1e-5 * limit, is_cut = means[d] == 0 && size <= limit * 1.001;
        EXPECT(is_rounded || is_cut || size > 57344 * 0.9, "dimension %d: the mean of the rows is %g, the record's %g", d, mean[d], means[d]);
    }
}

// As check_grouped.
inline void check_rotated(const ValueFormat & f, const PackedHead & x, float * steps, Worst & worst) {
    std::vector<double> means(f.head_size);
    for (int d = 0; d < f.head_size; ++d) means[d] = number(half(x.record[f.offset_mean() + d] << 8));
    int n_valid = 0;
    for (int t = 0; t < kPageCells; ++t) n_valid += x.valid.test(t);
    const bool fresh = x.carried.empty() && n_valid >= 8;
    if (fresh) check_means(f, x, means.data());
    for (int t = 0; t < kPageCells; ++t) {
        steps[t] = 0;
        if (!x.valid.test(t)) continue;
        const RotatedRow row = rotated_row(f, x, t, means.data());
        const double step = number(half(x.record[f.offset_scale() + t] << 7));
        steps[t] = float(step * attention_share(f.bits));
        // Bytes have three bits behind the leading one: a sixteenth, upwards an eighth. Rows of a record keep a scale up to so many bytes away.
        const double below = fresh ? f.bits == 8 ? 0.999 : 0.9374 : std::exp2(-(kScalesBelow + 1) / 8.0) / 1.15;
        const double above = fresh ? f.bits == 8 ? 1.126 : 1.0626 : std::exp2((scales_above(f.bits) + 1) / 8.0) * 1.15;
        if (row.step > std::ldexp(1.0, -11) && row.step < 28000) {
            EXPECT(step >= below * row.step && step <= above * row.step, "cell %d: a step of %g, where the row's is %g", t, step, row.step);
        }
        const double half_codes = 1 << (f.bits - 1);
        double tolerance = 0, error = 0;
        for (int d = 0; d < f.head_size; ++d) {
            const double z = std::fabs(row.z[d]), e = z <= half_codes * step ? step / 2 : z - (half_codes - 0.5) * step;
            tolerance += e * e;
            error += std::pow(double(x.from(t, d)) - x.to(t, d), 2);
        }
        tolerance = std::sqrt(tolerance) + std::ldexp(row.size + std::sqrt(tolerance), -11) + 1e-5 * row.size + std::sqrt(double(f.head_size)) * std::ldexp(1.0, -25);
        const double ratio = error == 0 ? 0 : std::sqrt(error) / tolerance;
        EXPECT(ratio <= 1, "cell %d: an error of %g in all, and %g is what the steps give", t, std::sqrt(error), tolerance);
        worst.rotated = std::max(worst.rotated, ratio);
    }
}

}  // namespace mixkvq
