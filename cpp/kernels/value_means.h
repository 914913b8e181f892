// The means of rotated values, and the means and scales of rows that come from a record. See "Packing again" in docs/format.md, and scalar.cpp.
#pragma once

#include "rotation.h"

namespace mixkvq {
namespace {

constexpr int kPhases = 256;

// How far numbers are from the middles of their steps, in 256ths of a step.
inline F phases_of(F z, F inv) {
    const I cut = bits_and(to_int(floor(mul(z, mul(inv, splat(float(kPhases)))))), splat_int(kPhases - 1));
    return sub(to_float(cut), splat(float(kPhases / 2)));
}

uint8_t kept_scale(const ValueFormat & f, const float * z, int dims) {
    const int guess = rotated_scale(f, z), above = scales_above(f.bits), reach = above > kScalesBelow ? above : kScalesBelow;
    F top = splat(0.0f);
    for (int d = 0; d < f.head_size; d += kLanes) top = max(top, abs(load(z + d)));
    const float peak = highest(top);
    int fewest = kPhases / 8 * dims, best = 0;
    for (int i = 1; i <= 2 * reach + 1 && fewest > kPhases / 64 * dims; ++i) {
        const int by = i % 2 ? -(i / 2) : i / 2, byte = guess + by;  // 0, 1, -1, 2, ...
        if (by < -kScalesBelow || by > above || byte <= 0 || byte > 0xf7) continue;
        const float inv = 1.0f / float_of(half(byte << kScaleShift));
        if (peak * inv > float(1 << (f.bits - 1))) continue;
        int off = 0;  // a whole number: any order of the sum will do
        for (int d = 0; d < dims && off < fewest; d += 4 * kLanes) {
            F part = splat(0.0f);
            for (int i = d; i < d + 4 * kLanes && i < dims; i += kLanes) part = add(part, abs(phases_of(load(z + i), splat(inv))));
            off += int(sum(part));
        }
        if (off < fewest) fewest = off, best = byte;
    }
    return uint8_t(best);
}

uint8_t mean_byte(half h) {
    const int magnitude = ((h & 0x7fff) + 0x80) >> kMeanShift;
    return uint8_t((h & 0x8000) >> kMeanShift | (magnitude < 0x7b ? magnitude : 0x7b));
}
uint8_t large_mean_byte(float x, half h, float least) {
    const uint8_t byte = mean_byte(h);
    return std::fabs(x) < least || byte == 0x80 ? 0 : byte;
}

void rotated_row(const ValueFormat & f, const half * row, const float * means, float * z) {
    from_half(row, z, f.head_size);
    rotate(z, f.head_size, f.rotation_block());
    for (int d = 0; d < f.head_size; d += kLanes) store(z + d, sub(load(z + d), load(means + d)));
}

// The rows without the means `near`: phases, as halves, and inverse scales of those that have a scale.
struct Phases {
    int n = 0;
    half phase[kPageCells][kMaxHeadSize];
    float inv[kPageCells];
};

// How far eight dimensions would be from the middles of their steps with other means, over all rows; no further than until all of them are above `limit`.
void off_with(const Phases & p, int d, const uint8_t * bytes, F was, F limit, float * off) {
    constexpr int kRowsAtOnce = 16;
    F total = splat(0.0f);
    const F by = sub(load_byte_halves<kMeanShift>(bytes), was);
    for (int first = 0; first < p.n && highest(sub(limit, total)) >= 0; first += kRowsAtOnce) {
        for (int i = first; i < first + kRowsAtOnce && i < p.n; ++i) {
            const F away = min(max(mul(by, splat(p.inv[i])), splat(-16384.0f)), splat(16384.0f));
            const F moved = floor(add(mul(away, splat(float(kPhases))), splat(0.5f)));
            const I x = add(to_int(sub(load_half(p.phase[i] + d), moved)), splat_int(kPhases / 2));
            total = add(total, abs(sub(to_float(bits_and(x, splat_int(kPhases - 1))), splat(float(kPhases / 2)))));
        }
    }
    store(off, total);
}

int kept_means(const ValueFormat & f, const Phases & p, float least, const float * exact, const uint8_t * own, const uint8_t * near, uint8_t * means) {
    int sum_off = 0;
    float weight = 0;
    for (int i = 0; i < p.n; ++i) weight += p.inv[i] * p.inv[i];
    for (int d = 0; d < f.head_size; d += kLanes) {
        const F was = load_byte_halves<kMeanShift>(near + d);
        F total = splat(0.0f);
        for (int i = 0; i < p.n; ++i) total = add(total, mul(add(load_half(p.phase[i] + d), splat(0.5f)), splat(p.inv[i])));
        const F fitted = weight > 0 ? add(was, div(total, splat(weight * float(kPhases)))) : was;
        float x[kLanes], fewest[kLanes], off[kLanes];
        half h[kLanes];
        store(x, fitted);
        store_half(h, fitted);
        for (int i = 0; i < kLanes; ++i) means[d + i] = large_mean_byte(x[i], h[i], least * 0.5f);
        off_with(p, d, means + d, was, splat(float(kPhases * kPageCells)), fewest);
        bool settled[kLanes], all = true;
        for (int i = 0; i < kLanes; ++i) all &= settled[i] = fewest[i] <= float(kPhases / 16 * p.n) && (means[d + i] == near[d + i] || means[d + i] == 0);
        for (int other = 0; other < 2 * kMeanReach + 2 && !all; ++other) {
            uint8_t bytes[kLanes];
            for (int i = 0; i < kLanes; ++i) {
                bytes[i] = other_mean(near[d + i], own[d + i], other);
                if (std::fabs(float_of(half(bytes[i] << kMeanShift))) < least * 0.5f || bytes[i] == 0x80) bytes[i] = 0;
            }
            float limit[kLanes];  // above it a byte is not better; settled ones look for none
            for (int i = 0; i < kLanes; ++i) limit[i] = settled[i] ? -1.0f : fewest[i] + float(p.n / 4);
            off_with(p, d, bytes, was, load(limit), off);
            float away[kLanes], best[kLanes];
            store(away, abs(sub(load_byte_halves<kMeanShift>(bytes), load(exact + d))));
            store(best, abs(sub(load_byte_halves<kMeanShift>(means + d), load(exact + d))));
            for (int i = 0; i < kLanes; ++i) {
                const bool better = off[i] < fewest[i] - float(p.n / 4) || (away[i] < best[i] && off[i] <= fewest[i] + float(p.n / 4));
                if (!settled[i] && better) fewest[i] = off[i], means[d + i] = bytes[i];
            }
        }
        for (int i = 0; i < kLanes; ++i) sum_off += int(fewest[i]);
    }
    return sum_off;
}

// What rotated values are packed with.
struct Means {
    float mean[kMaxHeadSize];
    bool from_record = false;
    bool has_scales = false;     // kept_scale() of every row without these means:
    uint8_t scale[kPageCells];
};

// Sums of the valid rows and of their squares, for so many times eight dimensions.
template <int blocks>
void sum_rows(const half * rows, size_t stride, const CellMask & valid, float * total, float * square) {
    F s[blocks], q[blocks];
    for (int i = 0; i < blocks; ++i) s[i] = q[i] = splat(0.0f);
    for (int t = 0; t < kPageCells; ++t) {
        if (!valid.test(t)) continue;
        for (int i = 0; i < blocks; ++i) {
            const F x = load_half(rows + t * stride + i * kLanes);
            s[i] = add(s[i], x);
            q[i] = add(q[i], mul(x, x));
        }
    }
    for (int i = 0; i < blocks; ++i) store(total + i * kLanes, s[i]), store(square + i * kLanes, q[i]);
}

// The means of the page's rows, rotated, as bytes and as what these read back. If the rows come from a record they are the means of that one.
void rotated_means(const ValueFormat & f, const half * rows, size_t stride, const CellMask & valid, uint8_t * bytes, Means & m) {
    float * means = m.mean;
    const int n = f.head_size;
    float square[kMaxHeadSize];
    int count = 0;
    for (int t = 0; t < kPageCells; ++t) count += valid.test(t);
    for (int first = 0; first < n; first += 4 * kLanes) {  // the whole of a cache line, the sums in registers
        if (first + 4 * kLanes <= n) {
            sum_rows<4>(rows + first, stride, valid, means + first, square + first);
        } else {
            for (int d = first; d < n; d += kLanes) sum_rows<1>(rows + d, stride, valid, means + d, square + d);
        }
    }
    count = count > 0 ? count : 1;
    F squares = splat(0.0f);
    for (int d = 0; d < n; d += kLanes) {
        store(means + d, div(load(means + d), splat(float(count))));
        squares = add(squares, load(square + d));
    }
    const float least = root(sum_of_lanes(squares) / float(count * n)) * kLeastMean;
    rotate(means, n, f.rotation_block());
    half h[kMaxHeadSize];
    uint8_t own[kMaxHeadSize], near[kMaxHeadSize];
    float exact[kMaxHeadSize];
    for (int d = 0; d < n; d += kLanes) store_half(h + d, load(means + d)), store(exact + d, load(means + d));
    for (int d = 0; d < n; ++d) own[d] = mean_byte(h[d]), bytes[d] = large_mean_byte(means[d], h[d], least);
    std::memcpy(near, f.bits > 2 ? bytes : own, n);  // see scalar.cpp
    if (f.bits == 2) std::memset(own, 0, n);
    uint8_t large[kMaxHeadSize];
    std::memcpy(large, bytes, n);

    float z[kMaxHeadSize];
    for (int d = 0; d < n; d += kLanes) store(means + d, load_byte_halves<kMeanShift>(near + d));
    const int n_sample = count < kSample ? count : kSample;
    int looked = 0, kept = 0;
    for (int i = 0; i < kPageCells && looked < n_sample && 4 * (kept + n_sample - looked) >= n_sample; ++i) {
        const int t = i % 8 * 16 + i / 8;
        if (!valid.test(t)) continue;
        rotated_row(f, rows + t * stride, means, z);
        ++looked;
        kept += kept_scale(f, z, kSampleDims) > 0;
    }
    m.from_record = looked > 0 && 4 * kept >= n_sample;
    Phases p;
    int off = 0;
    for (int round = 0; round < kMeanRounds && m.from_record && !m.has_scales; ++round) {  // with better means, more rows find their scale
        p.n = 0;
        for (int t = 0; t < kPageCells; ++t) {
            if (!valid.test(t)) continue;
            rotated_row(f, rows + t * stride, means, z);
            const uint8_t s = m.scale[t] = kept_scale(f, z, n);
            if (s == 0) continue;
            p.inv[p.n] = 1.0f / float_of(half(s << kScaleShift));
            for (int d = 0; d < n; d += kLanes) store_half(p.phase[p.n] + d, phases_of(load(z + d), splat(p.inv[p.n])));
            ++p.n;
        }
        off = kept_means(f, p, least, exact, own, near, bytes);
        m.has_scales = std::memcmp(near, bytes, n) == 0;  // nothing would change in another round
        std::memcpy(near, bytes, n);
        for (int d = 0; d < n; d += kLanes) store(means + d, load_byte_halves<kMeanShift>(near + d));
    }
    if (m.from_record && (2 * p.n < count || off > kPhases / 16 * p.n * n)) {  // by chance
        std::memcpy(bytes, large, n);
        m.from_record = m.has_scales = false;
    }
    for (int d = 0; d < n; d += kLanes) store(means + d, load_byte_halves<kMeanShift>(bytes + d));
}

}  // namespace
}  // namespace mixkvq
