// The choice of tiers: which channels of a page of keys get how many bits. See "Tiers" and "Packing again" in docs/format.md.
#pragma once

#include "ranges.h"

namespace mixkvq {
namespace {

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

}  // namespace
}  // namespace mixkvq
