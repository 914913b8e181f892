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

// Numbers between lo and hi as codes from 0 to top. The scale is that of the range as it reads back, so that the codes of what reads back have
// it, too: of all pairs of halves there is none where this takes a second round.
struct Affine {
    half scale, min;
    float inv, low, top;

    Affine(const Range & r, int bits) : min(float_to_half(r.low())), low(r.low()), top(float((1 << bits) - 1)) {
        set_scale(r.high());
        set_scale(back(r.high()));
    }
    int code(float x) const {
        const float v = std::nearbyint((x - low) * inv);
        return int(std::min(std::max(v, 0.0f), top));
    }
    float back(float x) const { return half_to_float(float_to_half(low + float(code(x)) * half_to_float(scale))); }

  private:
    void set_scale(float high) {
        scale = float_to_half((high - low) / top);
        const float s = half_to_float(scale);
        inv = s > 0 ? 1.0f / s : 0.0f;
    }
};

// --- keys -----------------------------------------------------------------------------------------------------

// The keys of a head, channel by channel.
struct Channels {
    half x[kMaxHeadSize][kPageCells];
    Range range[kMaxHeadSize][4];

    void read(const KeyFormat & f, const CellMask & valid) {
        for (int d = 0; d < f.head_size; ++d) {
            for (int g = 0; g < f.n_groups(); ++g) range[d][g] = Range();
            for (int t = 0; t < kPageCells; ++t) {
                if (valid.test(t)) range[d][t / f.group].add(half_to_float(x[d][t]));
            }
        }
    }
};

// Channels in the order of the record, and the bits at which each is rounded.
struct Choice {
    uint8_t order[kMaxHeadSize];
    uint8_t bits[kMaxHeadSize];
};

// Calls f(bits, channels) for every tier, the widest first.
template <class Function>
void by_tiers(const KeyFormat & f, Function && call) {
    call(16, f.n16);
    for (const Tier & tier : Tiers(f).tier) call(tier.bits, tier.count);
}

// The bits at which a channel seems to have been packed before, of those that the format has; 16 if it does not seem so. `whole`: every cell reads
// back as it is. `most`: half of a sample does, and no other bits suit more of it.
void own_bits(const KeyFormat & f, const Channels & page, const CellMask & valid, int d, uint8_t & whole, uint8_t & most) {
    const auto in_sample = [&](int t) { return t % 32 < 8 && valid.test(t); };
    int n_sample = 0, best = 0;
    for (int t = 0; t < kPageCells; ++t) n_sample += in_sample(t);
    whole = most = 16;
    for (int i = 3; i >= 0; --i) {
        const Tier tier = Tiers(f).tier[i];
        if (tier.count == 0) continue;
        bool all = true;
        int same = 0;
        for (int g = 0; g < f.n_groups(); ++g) {
            const Affine a(page.range[d][g], tier.bits);
            for (int t = g * f.group; t < (g + 1) * f.group; ++t) {
                if (!valid.test(t) || !(all || in_sample(t))) continue;
                const float x = half_to_float(page.x[d][t]);
                const bool back = a.back(x) == x;
                all = all && back;
                same += back && in_sample(t);
            }
        }
        if (all && whole == 16) whole = uint8_t(tier.bits);
        if (2 * same >= n_sample && same > best) best = same, most = uint8_t(tier.bits);
    }
}

// Deals the channels of a list to the tiers; those of a tier are put in the order of their index.
void deal(const KeyFormat & f, uint8_t * order, uint8_t * bits) {
    by_tiers(f, [&](int b, int n) {
        std::sort(order, order + n);
        for (int i = 0; i < n && bits; ++i) bits[order[i]] = uint8_t(b);
        order += n;
    });
}

// The tiers of rows that come from a record, if these do: nothing is lost then.
bool keep_tiers(const KeyFormat & f, const uint8_t * whole, Choice & choice) {
    const int n = f.head_size;
    for (int d = 0; d < n; ++d) choice.order[d] = uint8_t(d), choice.bits[d] = whole[d];
    std::sort(choice.order, choice.order + n, [&](int a, int b) { return whole[a] != whole[b] ? whole[a] > whole[b] : a < b; });
    bool fits = true;
    const uint8_t * order = choice.order;
    by_tiers(f, [&](int b, int count) {
        for (int i = 0; i < count; ++i) fits = fits && whole[*order++] <= b;
    });
    deal(f, choice.order, nullptr);
    return fits;
}

float salience(const KeyFormat & f, const Channels & page, int d, float importance) {
    float sum = 0;
    for (int g = 0; g < f.n_groups(); ++g) sum += page.range[d][g].high() - page.range[d][g].low();
    const float a = importance * sum;
    return a > 0 ? a : 0.0f;  // NaN sorts as 0: the order stays a permutation
}

Choice choose_tiers(const KeyFormat & f, const Channels & page, const CellMask & valid, const float * importance) {
    const int n = f.head_size;
    uint8_t whole[kMaxHeadSize], most[kMaxHeadSize];
    for (int d = 0; d < n; ++d) own_bits(f, page, valid, d, whole[d], most[d]);
    Choice choice;
    if (keep_tiers(f, whole, choice)) return choice;

    int known = 0;
    by_tiers(f, [&](int b, int count) {
        const int found = int(std::count(most, most + n, b));
        if (b < 16 && found <= count) known += found;
        if (found > count) std::replace(most, most + n, uint8_t(b), uint8_t(16));  // no record has so many
    });
    if (2 * known < f.n_coded()) std::fill(most, most + n, uint8_t(16));

    float a[kMaxHeadSize];
    uint8_t ranked[kMaxHeadSize], * next = ranked, * at = choice.order;
    for (int d = 0; d < n; ++d) a[d] = salience(f, page, d, importance[d]), ranked[d] = uint8_t(d);
    std::sort(ranked, ranked + n, [&](int i, int j) { return a[i] != a[j] ? a[i] > a[j] : i < j; });
    by_tiers(f, [&](int b, int count) {
        uint8_t * end = at + count;
        for (int d = 0; d < n; ++d) {
            if (b < 16 && most[d] == b) *at++ = uint8_t(d);
        }
        for (; at < end; ++next) {
            if (most[*next] == 16) *at++ = *next;
        }
    });
    deal(f, choice.order, choice.bits);
    return choice;
}

// The rows as they will read back.
void read_back(const KeyFormat & f, const CellMask & valid, const Choice & choice, Channels & page) {
    for (int d = 0; d < f.head_size; ++d) {
        for (int g = 0; g < f.n_groups() && choice.bits[d] < 16; ++g) {
            const Affine a(page.range[d][g], choice.bits[d]);
            for (int t = g * f.group; t < (g + 1) * f.group; ++t) {
                if (valid.test(t)) page.x[d][t] = float_to_half(a.back(half_to_float(page.x[d][t])));
            }
        }
    }
    page.read(f, valid);
}

void pack_keys(const KeyFormat & f, const half * rows, size_t stride, const CellMask & valid, const float * importance, uint8_t * record) {
    const int n = f.head_size, groups = f.n_groups();
    Channels page, back;
    for (int d = 0; d < n; ++d) {
        for (int t = 0; t < kPageCells; ++t) page.x[d][t] = valid.test(t) ? rows[t * stride + d] : half(0);
    }
    page.read(f, valid);
    Choice choice = choose_tiers(f, page, valid, importance);

    // A channel may come out so that fewer bits than its tier's would hold it. Then the page is packed once more, from the rows as they read back.
    back = page;
    read_back(f, valid, choice, back);
    const Choice again = choose_tiers(f, back, valid, importance);
    if (std::memcmp(choice.order, again.order, n) != 0 || std::memcmp(choice.bits, again.bits, n) != 0) {
        page = back;
        choice = again;
    }

    std::memset(record, 0, f.record_bytes());
    std::memcpy(record + f.offset_order(), choice.order, n);
    for (int r = 0; r < f.n16; ++r) {
        const int d = choice.order[r];
        for (int t = 0; t < kPageCells; ++t) {
            half x = page.x[d][t];
            if (choice.bits[d] < 16) x = float_to_half(Affine(page.range[d][t / f.group], choice.bits[d]).back(half_to_float(x)));
            store_half(record, size_t(r) * kPageCells + t, valid.test(t) ? x : half(0));
        }
    }
    int rank = f.n16;
    for (const Tier & tier : Tiers(f).tier) {
        for (int i = 0; i < tier.count; ++i, ++rank) {
            const int d = choice.order[rank];
            uint8_t * quad = record + tier.offset + i / 4 * quad_bytes(tier.bits);
            for (int g = 0; g < groups; ++g) {
                const Affine a(page.range[d][g], choice.bits[d]);
                store_half(record + f.offset_scale(), size_t(rank - f.n16) * groups + g, a.scale);
                store_half(record + f.offset_min(), size_t(rank - f.n16) * groups + g, a.min);
                for (int t = g * f.group; t < (g + 1) * f.group; ++t) {
                    if (valid.test(t)) put_key_code(quad, tier.bits, t, i % 4, a.code(half_to_float(page.x[d][t])));
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

uint8_t rotated_scale(const ValueFormat & f, const float * z) {
    if (f.bits == 8) {
        float top = 0;
        for (int d = 0; d < f.head_size; ++d) top = std::max(top, std::fabs(z[d]));
        return scale_byte(float_to_half(top / 127.5f), 0x7f);  // upwards: nothing is cut off
    }
    float s[8] = {};
    for (int d = 0; d < f.head_size; ++d) s[d % 8] += z[d] * z[d];
    const float sum = ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
    return scale_byte(float_to_half(std::sqrt(sum / float(f.head_size)) * gaussian_step(f.bits)), 0x40);
}

// --- rotated values that come from a record -------------------------------------------------------------------
// Every number of a row then lies in the middle of a step, but for the rounding of the row to halves.

// How far z is from the middle of its step, in 256ths of a step: -128 to 127.
constexpr int kPhases = 256;
int phase_of(float z, float inv) { return (int(std::floor(z * inv * float(kPhases))) & (kPhases - 1)) - kPhases / 2; }

// The scale that puts a row on the middles of its steps, judged by the first `dims`, as a byte; 0 if there is none. Rows from a record lie within
// an eighth of a step on the average, other rows a quarter. The first scale within a 64th is taken, beginning with the best scale of the row.
uint8_t kept_scale(const ValueFormat & f, const float * z, int dims) {
    const int guess = rotated_scale(f, z), above = scales_above(f.bits);
    float peak = 0;
    for (int d = 0; d < f.head_size; ++d) peak = std::max(peak, std::fabs(z[d]));
    int fewest = kPhases / 8 * dims, best = 0;
    for (int i = 1; i <= 2 * std::max(above, kScalesBelow) + 1 && fewest > kPhases / 64 * dims; ++i) {
        const int by = i % 2 ? -(i / 2) : i / 2, byte = guess + by;  // 0, 1, -1, 2, ...
        if (by < -kScalesBelow || by > above || byte <= 0 || byte > 0xf7) continue;
        const float inv = 1.0f / scale_of(uint8_t(byte));
        if (peak * inv > float(1 << (f.bits - 1))) continue;
        int off = 0;
        for (int d = 0; d < dims; ++d) off += std::abs(phase_of(z[d], inv));
        if (off < fewest) fewest = off, best = byte;
    }
    return uint8_t(best);
}

// A mean as a byte, 0 if it is smaller than `least` or no more than the sign of 0.
uint8_t large_mean_byte(float x, float least) {
    const uint8_t byte = mean_byte(x);
    return std::fabs(x) < least || byte == 0x80 ? 0 : byte;
}

// The rows without the means `near`: phases and scales of those that have a scale.
struct Phases {
    int n = 0;
    int8_t phase[kPageCells][kMaxHeadSize];
    float scale[kPageCells];
};

// How far dimension d would be from the middles of its steps with another mean, over all rows.
int off_with(const Phases & p, int d, float mean, float near) {
    int sum = 0;
    for (int i = 0; i < p.n; ++i) {
        const float away = std::min(std::max((mean - near) * (1.0f / p.scale[i]), -16384.0f), 16384.0f);
        const int moved = int(std::floor(away * float(kPhases) + 0.5f));
        sum += std::abs(((p.phase[i][d] - moved + kPhases / 2) & (kPhases - 1)) - kPhases / 2);
    }
    return sum;
}

// The means that put the rows on the middles of their steps: what the phases say, or, where that leaves them far off or is another byte, 0 or a neighbour of
// `near` in the list of bytes; where `near` is 0, `own` or a neighbour of it. Where several do, because they are whole steps apart, it is the one next to the
// rows' mean, `exact`.
void kept_means(const ValueFormat & f, const Phases & p, float least, const float * exact, const uint8_t * own, const uint8_t * near, uint8_t * means) {
    for (int d = 0; d < f.head_size; ++d) {
        const float was = mean_of(near[d]);
        float total = 0, weight = 0;  // least squares
        for (int i = 0; i < p.n; ++i) {
            const float w = 1.0f / p.scale[i];
            total += (float(p.phase[i][d]) + 0.5f) * w;
            weight += w * w;
        }
        means[d] = large_mean_byte(was + (weight > 0 ? total / (weight * float(kPhases)) : 0.0f), least * 0.5f);
        int fewest = off_with(p, d, mean_of(means[d]), was);
        if (fewest <= kPhases / 16 * p.n && (means[d] == near[d] || means[d] == 0)) continue;
        const int around = near[d] ? near[d] : own[d], sign = around & 0x80, magnitude = around & 0x7f;
        for (int byte : {sign | std::min(magnitude + 1, 0x7b), sign | std::max(magnitude - 1, 0), near[d] ? 0 : int(own[d]), 0}) {
            const int off = off_with(p, d, mean_of(uint8_t(byte)), was);
            const bool nearer = std::fabs(mean_of(uint8_t(byte)) - exact[d]) < std::fabs(mean_of(means[d]) - exact[d]);
            if (off < fewest - p.n || (nearer && off <= fewest + p.n)) fewest = off, means[d] = uint8_t(byte);
        }
    }
}

void rotated_row(const ValueFormat & f, const half * row, const uint8_t * means, float * z) {
    from_half(row, z, f.head_size);
    rotate(z, f.head_size, f.rotation_block());
    for (int d = 0; d < f.head_size; ++d) z[d] -= mean_of(means[d]);
}

// The means of the page's rows, rotated, as bytes, and whether the rows come from a record: then they are the means of that one.
bool rotated_means(const ValueFormat & f, const half * rows, size_t stride, const CellMask & valid, uint8_t * means) {
    const int n = f.head_size;
    float sum[kMaxHeadSize] = {}, square[kMaxHeadSize] = {}, lane[8] = {};
    int count = 0;
    for (int t = 0; t < kPageCells; ++t) {
        if (!valid.test(t)) continue;
        ++count;
        for (int d = 0; d < n; ++d) {
            const float x = half_to_float(rows[t * stride + d]);
            sum[d] += x;
            square[d] += x * x;
        }
    }
    count = std::max(count, 1);
    for (int d = 0; d < n; ++d) sum[d] /= float(count), lane[d % 8] += square[d];
    rotate(sum, n, f.rotation_block());
    const float squares = ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
    const float least = std::sqrt(squares / float(count * n)) * kLeastMean;
    uint8_t own[kMaxHeadSize], near[kMaxHeadSize];
    for (int d = 0; d < n; ++d) own[d] = mean_byte(sum[d]), means[d] = large_mean_byte(sum[d], least);
    // Small means are mostly 0. At 2 bits steps are so large that they may stay in, and need not be looked for.
    std::memcpy(near, f.bits > 2 ? means : own, n);
    if (f.bits == 2) std::memset(own, 0, n);

    float z[kMaxHeadSize];
    int looked = 0, kept = 0;
    for (int i = 0; i < kPageCells && looked < kSample; ++i) {
        const int t = i % 8 * 16 + i / 8;
        if (!valid.test(t)) continue;
        rotated_row(f, rows + t * stride, near, z);
        ++looked;
        kept += kept_scale(f, z, kSampleDims) > 0;
    }
    if (looked == 0 || 2 * kept < looked) return false;

    Phases p;
    for (int round = 0; round < kMeanRounds; ++round) {  // with better means, more rows find their scale
        p.n = 0;
        for (int t = 0; t < kPageCells; ++t) {
            if (!valid.test(t)) continue;
            rotated_row(f, rows + t * stride, near, z);
            const uint8_t s = kept_scale(f, z, n);
            if (s == 0) continue;
            p.scale[p.n] = scale_of(s);
            for (int d = 0; d < n; ++d) p.phase[p.n][d] = int8_t(phase_of(z[d], 1.0f / p.scale[p.n]));
            ++p.n;
        }
        kept_means(f, p, least, sum, own, near, means);
        if (std::memcmp(near, means, n) == 0) break;  // nothing would change any more
        std::memcpy(near, means, n);
    }
    return true;
}

void pack_values(const ValueFormat & f, const half * rows, size_t stride, const CellMask & valid, uint8_t * record) {
    const int n = f.head_size, groups = f.n_groups(), middle = 1 << (f.bits - 1);
    std::memset(record, 0, f.record_bytes());
    const bool from_record = f.rotated() && rotated_means(f, rows, stride, valid, record + f.offset_mean());
    for (int t = 0; t < kPageCells; ++t) {
        if (!valid.test(t)) continue;
        float y[kMaxHeadSize];
        if (f.rotated()) {
            rotated_row(f, rows + t * stride, record + f.offset_mean(), y);
            uint8_t s = from_record ? kept_scale(f, y, n) : 0;
            if (s == 0) s = rotated_scale(f, y);
            const float inv = s > 0 ? 1.0f / scale_of(s) : 0.0f;
            record[f.offset_scale() + t] = s;
            for (int d = 0; d < n; ++d) {
                const float v = std::floor(y[d] * inv);
                put_value_code(f, record, t, d, int(std::min(std::max(v, float(-middle)), float(middle - 1))) + middle);
            }
            continue;
        }
        from_half(rows + t * stride, y, n);
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
