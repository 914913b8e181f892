// The vector kernels, written once. An instruction set includes its primitives (vec_*.h), pairs of registers (pair.h or its own), then this
// file, and offers kernel_table().
//
// Pack and unpack give the bytes of scalar.cpp: the same operations in the same order, none fused. Attention does its sums in
// integers: queries and weights are rounded to a grid per page, so fine that the codes' own rounding stays far larger
// (tests/native/test_kernels.cpp measures by how much).
//
// No templates of the standard library with code in them here: they would be compiled for this instruction set and could be
// linked into code for lesser CPUs.
#pragma once

#include <cmath>
#include <cstring>

#include "codes.h"
#include "mixkvq/kernels.h"
#include "predictions.h"

namespace mixkvq {
namespace {

constexpr int kLanes = 8;
constexpr int kPair = 16;    // lanes of the inner loops
constexpr int kQueries = 4;  // queries that share one pass over the codes

// --- conversion -----------------------------------------------------------------------------------------------

void to_half(const float * src, half * dst, int n) {
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) store_half(dst + i, zero_nan(load(src + i)));
    if (i == n) return;
    float x[kLanes] = {};
    half h[kLanes];
    for (int j = i; j < n; ++j) x[j - i] = src[j];
    store_half(h, zero_nan(load(x)));
    for (int j = i; j < n; ++j) dst[j] = h[j - i];
}

void from_half(const half * src, float * dst, int n) {
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) store(dst + i, load_half(src + i));
    if (i == n) return;
    const int rest = n % kLanes;
    half h[kLanes] = {};
    float x[kLanes];
    for (int j = 0; j < rest; ++j) h[j] = src[i + j];
    store(x, load_half(h));
    for (int j = 0; j < rest; ++j) dst[i + j] = x[j];
}

// --- codes ----------------------------------------------------------------------------------------------------

// Calls f(integral constant bits) for run-time bits.
template <class Function>
inline void with_bits(int bits, Function && f) {
    switch (bits) {
        case 8: f(std::integral_constant<int, 8>()); break;
        case 4: f(std::integral_constant<int, 4>()); break;
        case 3: f(std::integral_constant<int, 3>()); break;
        case 2: f(std::integral_constant<int, 2>()); break;
    }
}

struct Tier {
    int bits, count;
    size_t offset;
};

struct Tiers {
    Tier tier[4];
    explicit Tiers(const KeyFormat & f)
        : tier{{8, f.n8, f.offset8()}, {4, f.n4, f.offset4()}, {3, f.n3, f.offset3()}, {2, f.n2, f.offset2()}} {}
};

// Scales and their inverses for eight ranges lo to hi, codes from 0 to top. The scale is that of the range as it reads back: see scalar.cpp.
struct Affine {
    F lo, top, scale, inv;

    Affine() = default;
    Affine(F lo, F hi, F top) : lo(lo), top(top) {
        set_scale(hi);
        set_scale(back(hi));
    }
    Affine(F lo, F scale, F inv, F top) : lo(lo), top(top), scale(scale), inv(inv) {}
    Affine(float lo, float scale, float inv, float top) : lo(splat(lo)), top(splat(top)), scale(splat(scale)), inv(splat(inv)) {}
    F steps(F x) const { return min(max(mul(sub(x, lo), inv), splat(0.0f)), top); }
    I codes(F x) const { return to_int(steps(x)); }
    F back(F x) const { return as_half(add(lo, mul(round(steps(x)), scale))); }

private:
    void set_scale(F high) {
        scale = as_half(div(sub(high, lo), top));
        inv = zero_below(div(splat(1.0f), scale), scale, splat(5.9604645e-8f));  // the smallest half
    }
};

// --- keys: pack and unpack ------------------------------------------------------------------------------------

// The first cell of a range that holds a token, or -1.
int first_valid(const CellMask & valid, int begin, int end) {
    for (int t = begin; t < end; ++t) {
        if (valid.test(t)) return t;
    }
    return -1;
}

// order[rank of d] = d, by falling salience, equal ones by rising index. n is a multiple of 8.
void sort_channels(const float * salience, int n, uint8_t * order) {
    for (int d = 0; d < n; ++d) {
        const F x = splat(salience[d]);
        const int own = d / kLanes * kLanes;
        I above = zero_int();
        for (int j = 0; j < own; j += kLanes) above = count_at_least(above, load(salience + j), x);
        for (int j = own + kLanes; j < n; j += kLanes) above = count_above(above, load(salience + j), x);
        int rank = sum(above);
        for (int j = own; j < own + kLanes; ++j) rank += j < d ? salience[j] >= salience[d] : salience[j] > salience[d];
        order[rank] = uint8_t(d);
    }
}

constexpr int kKeySample = 32;

// The keys of a head, channel by channel. A cell without a token repeats another of its group, so that ranges need no mask.
struct Channels {
    alignas(64) half x[kMaxHeadSize * kPageCells];
    float lo[4][kMaxHeadSize], hi[4][kMaxHeadSize];     // by group
    float scale[4][kMaxHeadSize], inv[4][kMaxHeadSize], top[kMaxHeadSize];
    uint8_t tier[kMaxHeadSize], bits[kMaxHeadSize];     // the tier of each channel, and the bits at which it is rounded
    I keep[kPageCells / 8];                             // all ones where a cell holds a token
    half sample[kKeySample][kMaxHeadSize];              // rows that are looked at first, `n_sample` of them
    uint8_t sample_group[kKeySample];
    int n_sample = 0;

    Affine affine(int d, int g) const { return Affine(lo[g][d], scale[g][d], inv[g][d], top[d]); }
    F load(int d, int k) const { return load_half(x + d * kPageCells + 8 * k); }
};

void read_channels(const KeyFormat & f, const half * rows, size_t stride, const CellMask & valid, Channels & c) {
    const int n = f.head_size;
    if (valid.full()) {
        for (int t = 0; t < kPageCells; t += 8) {
            for (int d = 0; d < n; d += 8) transpose_halves(rows + t * stride + d, stride, c.x + d * kPageCells + t, kPageCells);
        }
    } else {
        for (int t = 0; t < kPageCells; ++t) {
            const int g = t / f.group * f.group;
            const int from = valid.test(t) ? t : first_valid(valid, g, g + f.group);
            for (int d = 0; d < n; ++d) c.x[d * kPageCells + t] = from < 0 ? half(0) : rows[from * stride + d];
        }
    }
    for (int k = 0; k < kPageCells / 8; ++k) c.keep[k] = lanes_of(unsigned(valid.word[k / 8] >> (k % 8 * 8)) & 255);
    for (int t = 0; t < kPageCells; ++t) {
        if (t % 32 < 8 && valid.test(t)) {
            c.sample_group[c.n_sample] = uint8_t(t / f.group);
            std::memcpy(c.sample[c.n_sample++], rows + t * stride, n * sizeof(half));
        }
    }
}

void read_ranges(const KeyFormat & f, Channels & c) {
    for (int d = 0; d < f.head_size; ++d) {
        for (int g = 0; g < f.n_groups(); ++g) {
            F a = c.load(d, g * f.group / 8), b = a;
            for (int k = g * f.group / 8 + 1; k < (g + 1) * f.group / 8; ++k) {
                const F y = c.load(d, k);
                a = min(a, y);
                b = max(b, y);
            }
            c.lo[g][d] = lowest(a) + 0.0f;  // -0 becomes +0
            c.hi[g][d] = highest(b) + 0.0f;
        }
    }
}

// Calls f(bits, channels) for every tier, the widest first.
template <class Function>
inline void by_tiers(const KeyFormat & f, Function && call) {
    call(16, f.n16);
    call(8, f.n8);
    call(4, f.n4);
    call(3, f.n3);
    call(2, f.n2);
}

// The bits that the format has below 16, the narrowest first.
struct Widths {
    int n = 0, bits[4], count[4];

    explicit Widths(const KeyFormat & f) {
        for (int b : {2, 3, 4, 8}) {
            count[n] = b == 2 ? f.n2 : b == 3 ? f.n3 : b == 4 ? f.n4 : f.n8;
            if (count[n] > 0) bits[n++] = b;
        }
    }
};

// Eight channels side by side, each at its own scale by group.
struct Lanes {
    Affine by_group[4];
    int shift;  // of a token to its group

    const Affine & at(int t) const { return by_group[t >> shift]; }
};

template <class Make>
inline Lanes lanes_of_groups(const KeyFormat & f, Make && make) {
    Lanes lanes;
    lanes.shift = f.group == 32 ? 5 : f.group == 64 ? 6 : 7;
    for (int g = 0; g < f.n_groups(); ++g) lanes.by_group[g] = make(g);
    return lanes;
}

// As if channels between lo and hi had these bits.
inline Lanes trial(const KeyFormat & f, const float (&lo)[4][kMaxHeadSize], const float (&hi)[4][kMaxHeadSize], int d, int bits) {
    return lanes_of_groups(f, [&](int g) { return Affine(load(lo[g] + d), load(hi[g] + d), splat(float((1 << bits) - 1))); });
}

// Counts the lanes whose number reads back as it is.
inline I count_unchanged(I n, const Affine & a, F x) { return count_equal(n, a.back(x), x); }
inline int most_of(I n) { return int(highest(to_float(n))); }

// The bits at which channels seem to have been packed before, judged by half of a sample of their cells; 16 if it does not seem so. False as soon as
// too many of them are new: then the page is.
bool sampled_bits(const KeyFormat & f, const Channels & c, uint8_t * most) {
    const int n_sample = c.n_sample, half_of_it = (n_sample + 1) / 2;
    const Widths widths(f);
    int unknown = 0;
    for (int first = 0; first < f.head_size; first += 8) {
        float best[8] = {};
        Lanes lanes[4];
        I same[4];
        for (int w = 0; w < widths.n; ++w) lanes[w] = trial(f, c.lo, c.hi, first, widths.bits[w]), same[w] = zero_int();
        for (int d = first; d < first + 8; ++d) most[d] = 16;
        bool enough = true;
        for (int i = 0; i < n_sample && enough; ++i) {
            const F x = load_half(c.sample[i] + first);
            for (int w = 0; w < widths.n; ++w) same[w] = count_unchanged(same[w], lanes[w].by_group[c.sample_group[i]], x);
            if (i > half_of_it && i % 4 == 0) {  // in a page that is new hardly any cell is the same: the sample is not read to its end
                enough = false;
                for (int w = 0; w < widths.n; ++w) enough |= most_of(same[w]) + n_sample - i - 1 >= half_of_it;
            }
        }
        for (int w = 0; w < widths.n && enough; ++w) {
            float count[8];
            store(count, to_float(same[w]));
            for (int i = 0; i < 8; ++i) {
                if (count[i] >= float(half_of_it) && count[i] > best[i]) best[i] = count[i], most[first + i] = uint8_t(widths.bits[w]);
            }
        }
        for (int d = first; d < first + 8; ++d) unknown += most[d] == 16;
        if (n_sample > 0 && 2 * (f.head_size - unknown) < f.n_coded()) return false;
    }
    return true;
}

// The tiers of rows that come from a record, if these do: nothing is lost then.
bool keep_tiers(const KeyFormat & f, const half * rows, size_t stride, const CellMask & valid, Channels & c) {
    const int n = f.head_size;
    const Widths widths(f);
    int wide = 0;
    for (int first = 0; first < n; first += 8) {
        for (int d = first; d < first + 8; ++d) c.bits[d] = 16;
        bool found = false;
        for (int w = 0; w < widths.n && !found; ++w) {
            const int bits = widths.bits[w];
            const Lanes lanes = trial(f, c.lo, c.hi, first, bits);
            I same = splat_int(1);
            for (int t = 0; t < kPageCells; ++t) {
                if (t % 8 == 0 && most_of(same) == 0) break;
                if (valid.test(t)) same = bits_and(same, count_unchanged(zero_int(), lanes.at(t), load_half(rows + t * stride + first)));
            }
            float all[8];
            store(all, to_float(same));
            for (int i = 0; i < 8; ++i) {
                if (all[i] > 0 && c.bits[first + i] == 16) c.bits[first + i] = uint8_t(bits);
            }
            found = true;
            for (int d = first; d < first + 8; ++d) found = found && c.bits[d] < 16;
        }
        for (int d = first; d < first + 8; ++d) wide += c.bits[d] == 16;
        if (wide > f.n16) return false;
    }
    uint8_t at_rank[kMaxHeadSize], * rank = at_rank;
    by_tiers(f, [&](int bits, int count) {
        std::memset(rank, bits, count);
        rank += count;
    });
    bool fits = true;
    rank = at_rank;
    for (int bits : {16, 8, 4, 3, 2}) {
        for (int d = 0; d < n; ++d) {
            if (c.bits[d] != bits) continue;
            fits = fits && bits <= *rank;
            c.tier[d] = *rank++;
        }
    }
    return fits;
}

// Tiers by salience, but for channels that keep theirs: see scalar.cpp.
void choose_tiers(const KeyFormat & f, const float * importance, uint8_t * most, bool is_new, Channels & c) {
    const int n = f.head_size;
    float salience[kMaxHeadSize];
    for (int d = 0; d < n; ++d) {
        float ranges = 0;
        for (int g = 0; g < f.n_groups(); ++g) ranges += c.hi[g][d] - c.lo[g][d];
        const float s = importance[d] * ranges;
        salience[d] = s > 0 ? s : 0.0f;
    }
    uint8_t ranked[kMaxHeadSize];
    sort_channels(salience, n, ranked);

    const uint8_t * next = ranked;
    if (is_new) {
        by_tiers(f, [&](int bits, int count) {
            for (; count > 0; --count) c.tier[*next++] = uint8_t(bits);
        });
        std::memcpy(c.bits, c.tier, n);
        return;
    }
    int known = 0;
    const Widths widths(f);
    for (int w = 0; w < widths.n; ++w) {
        int found = 0;
        for (int d = 0; d < n; ++d) found += most[d] == widths.bits[w];
        if (found <= widths.count[w]) {
            known += found;
        } else {
            for (int d = 0; d < n; ++d) most[d] = most[d] == widths.bits[w] ? 16 : most[d];  // no record has so many
        }
    }
    if (2 * known < f.n_coded()) std::memset(most, 16, n);
    by_tiers(f, [&](int bits, int count) {
        for (int d = 0; d < n && bits < 16; ++d) {
            if (most[d] == bits) c.tier[d] = uint8_t(bits), --count;
        }
        for (; count > 0; ++next) {
            if (most[*next] == 16) c.tier[*next] = uint8_t(bits), --count;
        }
    });
    std::memcpy(c.bits, c.tier, n);
}

void set_scales(const KeyFormat & f, Channels & c) {
    for (int d = 0; d < f.head_size; ++d) c.top[d] = float((1 << (c.bits[d] < 8 ? c.bits[d] : 8)) - 1);
    for (int g = 0; g < f.n_groups(); ++g) {
        for (int d = 0; d < f.head_size; d += 8) {
            const Affine a(load(c.lo[g] + d), load(c.hi[g] + d), load(c.top + d));
            store(c.scale[g] + d, a.scale);
            store(c.inv[g] + d, a.inv);
        }
    }
}

// Eight cells of a channel as they read back.
inline F reads(const KeyFormat & f, const Channels & c, int d, int k) {
    const F x = c.load(d, k);
    return c.bits[d] == 16 ? x : c.affine(d, 8 * k / f.group).back(x);
}

// Eight channels from d on as they read back, those of the tier of 16 bits as they are.
struct ReadBack {
    Lanes lanes;
    F bits;
    bool any16;

    ReadBack(const KeyFormat & f, const Channels & c, int d)
        : lanes(lanes_of_groups(f, [&](int g) { return Affine(load(c.lo[g] + d), load(c.scale[g] + d), load(c.inv[g] + d), load(c.top + d)); })) {
        float b[8];
        for (int i = 0; i < 8; ++i) b[i] = float(c.bits[d + i]);
        bits = load(b);
        any16 = highest(bits) == 16;
    }
    F back(const Affine & a, F x) const {
        const F y = a.back(x);
        if (!any16) return y;
        return add(zero_below(x, bits, splat(16.0f)), zero_below(y, splat(8.0f), bits));
    }
};

// Whether a channel comes out so that fewer bits than its tier's would hold it.
bool any_narrower(const KeyFormat & f, const Channels & c, const half * rows, size_t stride, const CellMask & valid) {
    const Widths widths(f);
    for (int first = 0; first < f.head_size; first += 8) {
        unsigned wider[4] = {}, any = 0;  // channels whose tier has more bits
        for (int w = 0; w < widths.n; ++w) {
            for (int i = 0; i < 8; ++i) wider[w] |= unsigned(c.tier[first + i] > widths.bits[w]) << i;
            any |= wider[w];
        }
        if (any == 0) continue;
        const ReadBack own(f, c, first);
        float hi[4][8];  // as they read back
        for (int g = 0; g < f.n_groups(); ++g) store(hi[g], own.back(own.lanes.by_group[g], load(c.hi[g] + first)));
        Lanes lanes[4];
        I same[4];
        int n = 0;
        for (int w = 0; w < widths.n; ++w) {
            if (wider[w] == 0) continue;
            const F top = splat(float((1 << widths.bits[w]) - 1));
            lanes[n] = lanes_of_groups(f, [&](int g) { return Affine(load(c.lo[g] + first), load(hi[g]), top); });
            same[n++] = bits_and(lanes_of(wider[w]), splat_int(1));
        }
        const auto look = [&](int g, const half * row) {
            const F x = own.back(own.lanes.by_group[g], load_half(row + first));
            for (int i = 0; i < n; ++i) same[i] = bits_and(same[i], count_unchanged(zero_int(), lanes[i].by_group[g], x));
        };
        const auto alive = [&] {
            I sum = zero_int();
            for (int i = 0; i < n; ++i) sum = add(sum, same[i]);
            return most_of(sum) > 0;
        };
        int i = 0;
        while (i < c.n_sample) {  // nearly always four cells are enough
            look(c.sample_group[i], c.sample[i]);
            if (++i % 4 == 0 && !alive()) break;
        }
        for (int t = 0; t < kPageCells; ++t) {
            if (t % 8 == 0 && !alive()) break;
            if (valid.test(t)) look(t >> own.lanes.shift, rows + t * stride);
        }
        if (alive()) return true;
    }
    return false;
}

// The tiers and scales of the rows as they read back.
void pack_twice(const KeyFormat & f, const CellMask & valid, Channels & c) {
    const int n = f.head_size;
    alignas(64) half back[kMaxHeadSize * kPageCells];
    for (int d = 0; d < n; ++d) {
        for (int k = 0; k < kPageCells / 8; ++k) store_half(c.x + d * kPageCells + 8 * k, reads(f, c, d, k));
    }
    for (int t = 0; t < kPageCells; t += 8) {
        for (int d = 0; d < n; d += 8) transpose_halves(c.x + d * kPageCells + t, kPageCells, back + t * n + d, n);
    }
    read_ranges(f, c);
    keep_tiers(f, back, n, valid, c);
    set_scales(f, c);
}

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

// --- values: pack and unpack ----------------------------------------------------------------------------------

void scale(float * x, int n, float s) {
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) store(x + i, mul(load(x + i), splat(s)));
    for (; i < n; ++i) x[i] *= s;
}

// Distances 1, 2 and 4 lie inside a register (a block has at least eight lanes), the rest between registers.
void rotate(float * x, int head_size, int block) {
    // 1 / sqrt(block) in single precision: 1.0f / sqrtf(block).
    const float norm = block == 8 ? 1.0f / 2.82842708f : block == 16 ? 0.25f : block == 32 ? 1.0f / 5.65685415f
                     : block == 64 ? 0.125f : block == 128 ? 1.0f / 11.3137083f : 0.0625f;
    const F s = splat(norm);
    for (int i = 0; i < head_size; i += kLanes) {
        const F y = butterfly4(butterfly2(butterfly1(load(x + i))));
        store(x + i, block == kLanes ? mul(y, s) : y);
    }
    int h = kLanes;
    for (; 4 * h <= block; h *= 4) {  // two levels in one pass
        const bool last = 4 * h == block;
        for (int i = 0; i < head_size; i += 4 * h) {
            for (int j = i; j < i + h; j += kLanes) {
                const F a = load(x + j), b = load(x + j + h), c = load(x + j + 2 * h), d = load(x + j + 3 * h);
                const F p = add(a, b), q = sub(a, b), r = add(c, d), t = sub(c, d);
                const F w = add(p, r), y = add(q, t), u = sub(p, r), v = sub(q, t);
                store(x + j, last ? mul(w, s) : w);
                store(x + j + h, last ? mul(y, s) : y);
                store(x + j + 2 * h, last ? mul(u, s) : u);
                store(x + j + 3 * h, last ? mul(v, s) : v);
            }
        }
    }
    for (; h < block; h *= 2) {
        for (int i = 0; i < head_size; i += 2 * h) {
            for (int j = i; j < i + h; j += kLanes) {
                const F a = load(x + j), b = load(x + j + h);
                store(x + j, mul(add(a, b), s));
                store(x + j + h, mul(sub(a, b), s));
            }
        }
    }
}

// Means and scales of rotated values are halves cut down to a byte: scalar.cpp says how.
constexpr int kMeanShift = 8, kScaleShift = 7;

uint8_t scale_byte(float x, int rounding) {
    const int byte = (int(half_of(x)) + rounding) >> kScaleShift;
    return uint8_t(byte < 0xf7 ? byte : 0xf7);
}

// The sum of eight lanes in the order of the format, and a square root.
float sum_of_lanes(F x) {
    float l[kLanes];
    store(l, x);
    return ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7]));
}
float root(float x) {
    float l[kLanes] = {x};
    store(l, sqrt(load(l)));
    return l[0];
}

uint8_t rotated_scale(const ValueFormat & f, const float * y) {
    F s = splat(0.0f);
    if (f.bits == 8) {
        for (int d = 0; d < f.head_size; d += kLanes) s = max(s, abs(load(y + d)));
        return scale_byte(highest(s) / 127.5f, 0x7f);  // upwards: nothing is cut off
    }
    for (int d = 0; d < f.head_size; d += kLanes) s = add(s, mul(load(y + d), load(y + d)));
    return scale_byte(root(sum_of_lanes(s) / float(f.head_size)) * gaussian_step(f.bits), 0x40);
}

// --- rotated values that come from a record: see scalar.cpp ---------------------------------------------------

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

// How far eight dimensions would be from the middles of their steps with other means, over all rows.
void off_with(const Phases & p, int d, const uint8_t * bytes, F was, float * off) {
    F total = splat(0.0f);
    const F by = sub(load_byte_halves<kMeanShift>(bytes), was);
    for (int i = 0; i < p.n; ++i) {
        const F away = min(max(mul(by, splat(p.inv[i])), splat(-16384.0f)), splat(16384.0f));
        const F moved = floor(add(mul(away, splat(float(kPhases))), splat(0.5f)));
        const I x = add(to_int(sub(load_half(p.phase[i] + d), moved)), splat_int(kPhases / 2));
        total = add(total, abs(sub(to_float(bits_and(x, splat_int(kPhases - 1))), splat(float(kPhases / 2)))));
    }
    store(off, total);
}

void kept_means(const ValueFormat & f, const Phases & p, float least, const float * exact, const uint8_t * near, uint8_t * means) {
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
        off_with(p, d, means + d, was, fewest);
        bool settled[kLanes], all = true;
        for (int i = 0; i < kLanes; ++i) all &= settled[i] = fewest[i] <= float(kPhases / 16 * p.n) && (means[d + i] == near[d + i] || means[d + i] == 0);
        for (int other = 0; other < 3 && !all; ++other) {
            uint8_t bytes[kLanes] = {};
            for (int i = 0; i < kLanes && other < 2; ++i) {
                const int sign = near[d + i] & 0x80, magnitude = (near[d + i] & 0x7f) + (other == 0 ? 1 : -1);
                bytes[i] = uint8_t(sign | (magnitude < 0 ? 0 : magnitude > 0x7b ? 0x7b : magnitude));
            }
            off_with(p, d, bytes, was, off);
            float away[kLanes], best[kLanes];
            store(away, abs(sub(load_byte_halves<kMeanShift>(bytes), load(exact + d))));
            store(best, abs(sub(load_byte_halves<kMeanShift>(means + d), load(exact + d))));
            for (int i = 0; i < kLanes; ++i) {
                const bool better = off[i] < fewest[i] - float(p.n) || (away[i] < best[i] && off[i] <= fewest[i] + float(p.n));
                if (!settled[i] && better) fewest[i] = off[i], means[d + i] = bytes[i];
            }
        }
    }
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
    uint8_t near[kMaxHeadSize];
    float exact[kMaxHeadSize];
    for (int d = 0; d < n; d += kLanes) store_half(h + d, load(means + d)), store(exact + d, load(means + d));
    for (int d = 0; d < n; ++d) near[d] = mean_byte(h[d]), bytes[d] = large_mean_byte(means[d], h[d], least);

    float z[kMaxHeadSize];
    for (int d = 0; d < n; d += kLanes) store(means + d, load_byte_halves<kMeanShift>(near + d));
    const int n_sample = count < kSample ? count : kSample;
    int looked = 0, kept = 0;
    for (int i = 0; i < kPageCells && looked < n_sample && 2 * (kept + n_sample - looked) >= n_sample; ++i) {
        const int t = i % 8 * 16 + i / 8;
        if (!valid.test(t)) continue;
        rotated_row(f, rows + t * stride, means, z);
        ++looked;
        kept += kept_scale(f, z, kSampleDims) > 0;
    }
    m.from_record = looked > 0 && 2 * kept >= n_sample;
    Phases p;
    for (int round = 0; round < 2 && m.from_record && !m.has_scales; ++round) {  // with better means, more rows find their scale
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
        kept_means(f, p, least, exact, near, bytes);
        m.has_scales = std::memcmp(near, bytes, n) == 0;  // nothing would change in another round
        std::memcpy(near, bytes, n);
        for (int d = 0; d < n; d += kLanes) store(means + d, load_byte_halves<kMeanShift>(near + d));
    }
    for (int d = 0; d < n; d += kLanes) store(means + d, load_byte_halves<kMeanShift>(bytes + d));
}

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

// --- scores ---------------------------------------------------------------------------------------------------

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

// --- values: weighted sums ------------------------------------------------------------------------------------

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

// --- softmax --------------------------------------------------------------------------------------------------

inline F like(F, float x) { return splat(x); }
inline F2 like(F2, float x) { return splat2(x); }

// e^x: x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial for e^r. 0 below -87, where the result would be subnormal.
template <class T>
inline T exp(T x) {
    auto c = [&](float value) { return like(x, value); };
    const T y = min(max(x, c(-87.0f)), c(88.0f));
    const T n = round(mul(y, c(1.44269504f)));
    T r = fma(n, c(-0.693359375f), y);  // ln 2 in two parts, the first exact times n
    r = fma(n, c(2.12194440e-4f), r);
    T p = c(1.9875691500e-4f);
    p = fma(p, r, c(1.3981999507e-3f));
    p = fma(p, r, c(8.3334519073e-3f));
    p = fma(p, r, c(4.1665795894e-2f));
    p = fma(p, r, c(1.6666665459e-1f));
    p = fma(p, r, c(5.0000001201e-1f));
    p = add(fma(mul(r, r), p, r), c(1.0f));
    return zero_below(mul(p, exp2_whole(n)), x, c(-87.0f));
}

// tanh |x| = (1 - e) / (1 + e) with e = exp(-2 |x|).
template <class T>
inline T tanh(T x) {
    const T one = like(x, 1.0f), e = exp(mul(abs(x), like(x, -2.0f)));
    return with_sign(div(sub(one, e), add(one, e)), x);
}

float logits(float * x, int n, float scale, float softcap, const float * mask, float slope) {
    F2 top = splat2(-INFINITY);
    auto one = [&](F2 s, F2 bias) {
        s = mul(s, splat2(softcap > 0 ? scale / softcap : scale));
        if (softcap > 0) s = mul(tanh(s), splat2(softcap));
        return fma(bias, splat2(slope), s);
    };
    int i = 0;
    for (; i + kPair <= n; i += kPair) {
        const F2 s = one(load2(x + i), mask ? load2(mask + i) : splat2(0.0f));
        store(x + i, s);
        top = max(top, s);
    }
    if (i < n) {
        float s[kPair], bias[kPair];
        for (int j = 0; j < kPair; ++j) {
            s[j] = i + j < n ? x[i + j] : 0.0f;
            bias[j] = i + j >= n ? -INFINITY : mask ? mask[i + j] : 0.0f;
        }
        const F2 y = one(load2(s), load2(bias));
        store(s, y);
        top = max(top, y);
        for (int j = i; j < n; ++j) x[j] = s[j - i];
    }
    return highest(top);
}

float exp_sum(float * x, int n, float max) {
    F2 total = splat2(0.0f);
    int i = 0;
    for (; i + kPair <= n; i += kPair) {
        const F2 y = exp(sub(load2(x + i), splat2(max)));
        store(x + i, y);
        total = add(total, y);
    }
    if (i < n) {
        float rest[kPair];
        for (int j = 0; j < kPair; ++j) rest[j] = i + j < n ? x[i + j] : -INFINITY;
        const F2 y = exp(sub(load2(rest), splat2(max)));
        store(rest, y);
        total = add(total, y);
        for (int j = i; j < n; ++j) x[j] = rest[j - i];
    }
    return sum(total);
}

constexpr Kernels kernel_table(Isa isa) {
    return {
        isa,           to_half,     from_half,     pack_keys,   unpack_keys, pack_values, unpack_values,
        scores_packed, scores_half, values_packed, values_half, logits,      exp_sum,     first_top,   exp_wide,
        weighted_gap,  scale,       rotate,
    };
}

}  // namespace
}  // namespace mixkvq
