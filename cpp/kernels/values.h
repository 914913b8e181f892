// Values: pages to records and back.
#pragma once

#include "codes.h"
#include "conversion.h"
#include "value_means.h"

namespace mixkvq {
namespace {

// Codes of one token, as integers.
void value_codes(const ValueFormat & f, const half * row, const Means & m, int t, uint8_t * record, I * code) {
    float y[kMaxHeadSize];
    if (f.rotated()) {
        rotated_row(f, row, m.mean, y);
        uint8_t s = !m.from_record ? 0 : m.has_scales ? m.scale[t] : kept_scale(f, y, f.head_size);
        if (s == 0) s = rotated_scale(f, y);
        record[f.offset_scale() + t] = s;
        const float middle = float(1 << (f.bits - 1));
        const F inv = splat(s > 0 ? 1.0f / float_of(half(s << kScaleShift)) : 0.0f);
        for (int d = 0; d < f.head_size; d += kLanes) {
            const F v = min(max(floor(mul(load(y + d), inv)), splat(-middle)), splat(middle - 1.0f));
            code[d / kLanes] = to_int(add(v, splat(middle)));
        }
    } else {
        from_half(row, y, f.head_size);
        const int groups = f.n_groups();
        float lo[kLanes] = {}, hi[kLanes] = {}, scale[kLanes], inv[kLanes];
        static_assert(kMaxHeadSize / 32 <= kLanes, "a lane per group");
        for (int g = 0; g < groups; ++g) {
            const int begin = g * f.group, end = begin + f.group < f.head_size ? begin + f.group : f.head_size;
            F a = load(y + begin), b = a;
            for (int d = begin + kLanes; d < end; d += kLanes) {
                a = min(a, load(y + d));
                b = max(b, load(y + d));
            }
            lo[g] = lowest(a) + 0.0f;  // -0 becomes +0
            hi[g] = highest(b) + 0.0f;
        }
        const float top = float((1 << f.bits) - 1);
        const Affine all(load(lo), load(hi), splat(top));
        store(scale, all.scale);
        store(inv, all.inv);
        half s[kLanes], m[kLanes];
        store_half(s, all.scale);
        store_half(m, all.lo);
        for (int d = 0; d < f.head_size; d += kLanes) {
            const int g = d / f.group;
            code[d / kLanes] = Affine(lo[g], scale[g], inv[g], top).codes(load(y + d));
        }
        std::memcpy(record + f.offset_scale() + size_t(t) * 2 * groups, s, 2 * groups);
        std::memcpy(record + f.offset_min() + size_t(t) * 2 * groups, m, 2 * groups);
    }
}

void pack_values(const ValueFormat & f, const half * rows, size_t stride, const CellMask & valid, uint8_t * record) {
    const int n = f.head_size;
    const size_t row = size_t(4) * n;
    Means means;
    std::memset(record + f.offset_scale(), 0, f.record_bytes() - f.offset_scale());
    if (f.rotated()) rotated_means(f, rows, stride, valid, record + f.offset_mean(), means);
    for (int chunk = 0; chunk < kPageCells / 32; ++chunk) {
        B joined[kMaxHeadSize / kLanes][8];
        for (int k = 0; k < 8; ++k) {
            I code[4][kMaxHeadSize / kLanes];
            for (int r = 0; r < 4; ++r) {
                const int t = chunk * 32 + k * 4 + r;
                if (valid.test(t)) {
                    value_codes(f, rows + t * stride, means, t, record, code[r]);
                } else {
                    for (int i = 0; i < n / kLanes; ++i) code[r][i] = zero_int();
                }
            }
            for (int i = 0; i < n / kLanes; ++i) joined[i][k] = join_bytes(code[0][i], code[1][i], code[2][i], code[3][i]);
        }
        with_bits(f.bits, [&](auto bits) {
            constexpr int low_bits = bits == 3 ? 2 : bits;
            uint8_t * low = record + chunk * row * low_bits;
            uint8_t * high = record + f.offset_high() + chunk * row;
            for (int i = 0; i < n / kLanes; ++i) store_codes<bits>(joined[i], low + 32 * i, row, high + 32 * i);
        });
    }
}

void unpack_values(const ValueFormat & f, const uint8_t * record, half * rows, size_t stride) {
    const int n = f.head_size, groups = f.n_groups();
    const size_t row = size_t(4) * n;
    const int width = f.rotated() ? n : f.group;
    const F middle = splat(0.5f - float(1 << (f.bits - 1)));
    float means[kMaxHeadSize];
    for (int d = 0; d < n && f.rotated(); d += kLanes) store(means + d, load_byte_halves<kMeanShift>(record + f.offset_mean() + d));
    with_bits(f.bits, [&](auto bits) {
        for (int chunk = 0; chunk < kPageCells / 32; ++chunk) {
            constexpr int low_bits = bits == 3 ? 2 : bits;
            const uint8_t * low = record + chunk * row * low_bits;
            const uint8_t * high = record + f.offset_high() + chunk * row;
            unroll<8>([&](auto k) {
                const int t = chunk * 32 + k * 4;
                half h[kMaxHeadSize / 32];
                float y[4][kMaxHeadSize], s[4][kMaxHeadSize / 32], m[4][kMaxHeadSize / 32];
                for (int r = 0; r < 4; ++r) {
                    if (f.rotated()) {
                        s[r][0] = float_of(half(record[f.offset_scale() + t + r] << kScaleShift));
                        continue;
                    }
                    std::memcpy(h, record + f.offset_scale() + size_t(t + r) * 2 * groups, 2 * groups);
                    from_half(h, s[r], groups);
                    std::memcpy(h, record + f.offset_min() + size_t(t + r) * 2 * groups, 2 * groups);
                    from_half(h, m[r], groups);
                }
                for (int d = 0; d < n; d += kLanes) {
                    const B codes = load_codes<bits, k>(low + 4 * d, row, high + 4 * d);
                    const int g = d / width;
                    unroll<4>([&](auto r) {
                        const F x = to_float(byte_of<r>(codes));
                        store(y[r] + d, f.rotated() ? add(load(means + d), mul(add(x, middle), splat(s[r][g])))
                                                    : add(splat(m[r][g]), mul(x, splat(s[r][g]))));
                    });
                }
                for (int r = 0; r < 4; ++r) {
                    if (f.rotated()) rotate(y[r], n, f.rotation_block());
                    for (int d = 0; d < n; d += kLanes) store_half(rows + (t + r) * stride + d, load(y[r] + d));
                }
            });
        }
    });
}

}  // namespace
}  // namespace mixkvq
