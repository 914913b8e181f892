// Keys: pages to records and back.
#pragma once

#include "key_tiers.h"

namespace mixkvq {
namespace {

void pack_keys(const KeyFormat & f, const half * rows, size_t stride, const CellMask & valid, const float * importance, uint8_t * record) {
    const int n = f.head_size, groups = f.n_groups();
    Channels c;
    read_channels(f, rows, stride, valid, c);
    read_ranges(f, c);
    uint8_t most[kMaxHeadSize];
    const bool is_new = !sampled_bits(f, c, most);
    if (!is_new && keep_tiers(f, rows, stride, valid, c)) {
        set_scales(f, c);
    } else {
        choose_tiers(f, importance, most, is_new, c);
        set_scales(f, c);
        if (any_narrower(f, c, rows, stride, valid)) {  // then the page is packed once more, from the rows as they read back
            pack_twice(f, valid, c);
        }
    }

    uint8_t order[kMaxHeadSize + 1], * place = order;
    by_tiers(f, [&](int bits, int count) {
        if (count == 0) return;
        for (int d = 0; d < n; ++d) {
            *place = uint8_t(d);
            place += c.tier[d] == bits;
        }
    });
    std::memcpy(record + f.offset_order(), order, n);
    std::memset(record + f.offset_order() + n, 0, f.record_bytes() - f.offset_order() - n);
    for (int r = 0; r < f.n16; ++r) {
        half row[kPageCells];
        for (int k = 0; k < kPageCells / 8; ++k) store_half(row + 8 * k, reads(f, c, order[r], k));
        for (int t = 0; t < kPageCells && !valid.full(); ++t) row[t] = valid.test(t) ? row[t] : half(0);
        std::memcpy(record + size_t(r) * sizeof row, row, sizeof row);
    }

    int rank = f.n16;
    for (const Tier & tier : Tiers(f).tier) {
        with_bits(tier.bits, [&](auto bits) {
            for (int quad = 0; quad < tier.count / 4; ++quad, rank += 4) {
                I code[4][kPageCells / 8];
                for (int r = 0; r < 4; ++r) {
                    const int d = order[rank + r];
                    for (int g = 0; g < groups; ++g) {
                        const Affine a = c.affine(d, g);
                        const size_t at = 2 * (size_t(rank + r - f.n16) * groups + g);
                        const half scale = half_of(c.scale[g][d]), min = half_of(c.lo[g][d]);
                        std::memcpy(record + f.offset_scale() + at, &scale, 2);
                        std::memcpy(record + f.offset_min() + at, &min, 2);
                        for (int k = g * f.group / 8; k < (g + 1) * f.group / 8; ++k) code[r][k] = bits_and(a.codes(c.load(d, k)), c.keep[k]);
                    }
                }
                uint8_t * at = record + tier.offset + quad * size_t(64 * bits);
                for (int chunk = 0; chunk < 2; ++chunk) {
                    B joined[8];
                    for (int k = 0; k < 8; ++k) {
                        const int i = chunk * 8 + k;
                        joined[k] = join_bytes(code[0][i], code[1][i], code[2][i], code[3][i]);
                    }
                    constexpr int low_bits = bits == 3 ? 2 : bits;
                    store_codes<bits>(joined, at + chunk * 32 * low_bits, 32, at + 128 + chunk * 32);
                }
            }
        });
    }
}

void unpack_keys(const KeyFormat & f, const uint8_t * record, half * rows, size_t stride) {
    alignas(64) half tile[kMaxHeadSize * kPageCells];  // channel-major
    const uint8_t * order = record + f.offset_order();
    const int groups = f.n_groups();
    for (int r = 0; r < f.n16; ++r) std::memcpy(tile + order[r] * kPageCells, record + size_t(r) * 2 * kPageCells, 2 * kPageCells);

    int rank = f.n16;
    for (const Tier & tier : Tiers(f).tier) {
        with_bits(tier.bits, [&](auto bits) {
            for (int quad = 0; quad < tier.count / 4; ++quad, rank += 4) {
                float scale[4][4], min[4][4];
                for (int r = 0; r < 4; ++r) {
                    const size_t at = 2 * size_t(rank + r - f.n16) * groups;
                    half h[4];
                    std::memcpy(h, record + f.offset_scale() + at, 2 * groups);
                    from_half(h, scale[r], groups);
                    std::memcpy(h, record + f.offset_min() + at, 2 * groups);
                    from_half(h, min[r], groups);
                }
                const uint8_t * at = record + tier.offset + quad * size_t(64 * bits);
                for (int chunk = 0; chunk < 2; ++chunk) {
                    unroll<8>([&](auto k) {
                        constexpr int low_bits = bits == 3 ? 2 : bits;
                        const B codes = load_codes<bits, k>(at + chunk * 32 * low_bits, 32, at + 128 + chunk * 32);
                        const int t = chunk * 64 + k * 8, g = t / f.group;
                        unroll<4>([&](auto r) {
                            const F x = add(splat(min[r][g]), mul(to_float(byte_of<r>(codes)), splat(scale[r][g])));
                            store_half(tile + order[rank + r] * kPageCells + t, x);
                        });
                    });
                }
            }
        });
    }
    for (int t = 0; t < kPageCells; t += 8) {
        for (int d = 0; d < f.head_size; d += 8) transpose_halves(tile + d * kPageCells + t, kPageCells, rows + t * stride + d, stride);
    }
}

}  // namespace
}  // namespace mixkvq
