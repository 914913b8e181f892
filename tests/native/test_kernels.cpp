// Every instruction set that this CPU supports against the scalar kernels.
//
// Pack and unpack: the same bytes. Scores and weighted sums are compared with exact sums over the decoded numbers, which is
// what the scalar kernels compute. Tolerances:
//   - F16 rows: float sums of up to 256 products, |error| <= 256 * 2^-24 * sum of |products|, in practice a tenth of it.
//   - Packed: the vector kernels round the folded query (the weights) to a grid and keep the middle code's share exact. What is left must stay far
//     below the rounding of the codes, whose variance is step^2 / 12 per number. The test takes the root mean square of the
//     added error over a page and all queries and divides it by that noise: at most 15 % beside 2 to 4 bits, half beside 8.
//   - exp_sum: 3e-7 relative (a polynomial good to 1 ulp, and the rounding of x - max); results below e^-87 may be 0.
//   - rotate, scale, to_half, from_half: the same bits.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "mixkvq/kernels.h"
#include "pages.h"

using namespace mixkvq;

namespace {

const int kQueryCounts[] = {1, 2, 3, 4, 5, 7, 8, 16, 33, 64};
const int kCellCounts[] = {1, 3, 31, 32, 33, 127, 128};

// 64-byte aligned memory with a guard behind it.
template <class T>
struct Aligned {
    std::vector<uint8_t> bytes;
    size_t n;
    explicit Aligned(size_t n) : bytes(n * sizeof(T) + 128, 0xa5), n(n) {}
    T * data() { return reinterpret_cast<T *>((reinterpret_cast<uintptr_t>(bytes.data()) + 63) / 64 * 64); }
    bool intact() { return *reinterpret_cast<uint8_t *>(data() + n) == 0xa5; }
};

// --- bytes ----------------------------------------------------------------------------------------------------

void test_conversion(const Kernels & a, const Kernels & b) {
    std::vector<float> x;
    for (uint64_t bits = 0; bits < (uint64_t(1) << 32); bits += 9973) {
        float f;
        const uint32_t u = uint32_t(bits);
        std::memcpy(&f, &u, 4);
        x.push_back(f);
    }
    for (uint32_t h = 0; h < 0x7c00; ++h) {  // every half, the tie above it and its neighbours
        half lo = half(h);
        float f;
        a.from_half(&lo, &f, 1);
        const float step = std::ldexp(1.0f, std::max(int(h >> 10), 1) - 25);
        for (float y : {f, f + step / 2, std::nextafter(f + step / 2, 1e9f), std::nextafter(f + step / 2, 0.0f)}) {
            x.push_back(y);
            x.push_back(-y);
        }
    }
    std::vector<half> ha(x.size()), hb(x.size());
    a.to_half(x.data(), ha.data(), int(x.size()));
    b.to_half(x.data(), hb.data(), int(x.size()));
    for (size_t i = 0; i < x.size(); ++i) CHECK(ha[i] == hb[i], "to_half(%a): %04x, %04x", x[i], ha[i], hb[i]);
    std::vector<float> fa(65536), fb(65536);
    std::vector<half> all;
    for (uint32_t h = 0; h < 65536; ++h) {
        if ((h & 0x7c00) != 0x7c00 || (h & 0x3ff) == 0) all.push_back(half(h));  // no NaN
    }
    a.from_half(all.data(), fa.data(), int(all.size()));
    b.from_half(all.data(), fb.data(), int(all.size()));
    CHECK(std::memcmp(fa.data(), fb.data(), all.size() * 4) == 0, "from_half");
    for (int n = 0; n < 20; ++n) {  // odd lengths write no further
        std::vector<half> h(24, 0x1234);
        b.to_half(x.data() + 1000, h.data(), n);
        CHECK(h[n] == 0x1234, "to_half of %d wrote %d", n, n + 1);
        std::vector<float> f(24, 7.0f);
        b.from_half(all.data() + 1000, f.data(), n);
        CHECK(f[n] == 7.0f, "from_half of %d wrote %d", n, n + 1);
    }
}

bool may_change(const KeyFormat &) { return false; }
bool may_change(const ValueFormat & f) { return f.rotated(); }
bool packs_to_itself(const KeyFormat &, Data, const CellMask &) { return true; }
// Rotated values: where the rows, rotated, are of many sizes and a few of them tell their means (docs/format.md).
bool packs_to_itself(const ValueFormat & f, Data data, const CellMask & valid) {
    int n = 0;
    for (int t = 0; t < kPageCells; ++t) n += valid.test(t);
    return !f.rotated() || data == Data::zeros || (data == Data::gaussian && (n >= 32 || n == 0));
}

// Pages of rotated values that were packed again, and those that gave another record: their means were whole steps apart.
int packed_again = 0, changed = 0;

// Whether the scalar kernels and the others agree.
// pack(kernels, format, rows, stride, valid, record, again): `again` where rows that were read back are packed once more.
template <class Format, class Pack, class Unpack>
void compare_records(const Kernels & a, const std::vector<const Kernels *> & others, const Format & f, Data data, int mask, Pack pack, Unpack unpack) {
    const size_t stride = f.head_size + (mask % 2 ? 0 : 24), bytes = f.record_bytes();
    const std::vector<half> rows = make_rows(a, data, f.head_size, stride);
    const CellMask valid = make_mask(mask);
    const std::string page = describe(f) + " " + data_name(data) + " mask " + std::to_string(mask);
    Aligned<uint8_t> ra(bytes), rb(bytes);
    pack(a, f, rows.data(), stride, valid, ra.data(), false);
    std::vector<half> ua(rows.size(), 0x1111);
    unpack(a, f, ra.data(), ua.data(), stride);
    for (const Kernels * b : others) {
        pack(*b, f, rows.data(), stride, valid, rb.data(), false);
        size_t at = std::mismatch(ra.data(), ra.data() + bytes, rb.data()).first - ra.data();
        CHECK(at == bytes, "%s %s: pack differs at byte %zu of %zu", isa_name(b->isa), page.c_str(), at, bytes);
        CHECK(rb.intact(), "%s %s: pack wrote past the record", isa_name(b->isa), page.c_str());
        std::vector<half> ub(rows.size(), 0x1111);
        unpack(*b, f, ra.data(), ub.data(), stride);
        at = std::mismatch(ua.begin(), ua.end(), ub.begin()).first - ua.begin();
        CHECK(at == ua.size(), "%s %s: unpack differs at cell %zu, dimension %zu", isa_name(b->isa), page.c_str(), at / stride, at % stride);
    }
    CHECK(std::none_of(ua.begin(), ua.end(), [](half h) { return (h & 0x7c00) == 0x7c00; }), "%s: unpack gave an infinity", page.c_str());

    // The same rows again, then with some of them written anew.
    const std::vector<uint8_t> first(ra.data(), ra.data() + bytes);
    for (int fresh : {0, 1, 20, 80}) {
        for (int t = 0; t < fresh; ++t) std::copy_n(&rows[t * stride], f.head_size, &ua[(t * 5 % kPageCells) * stride]);
        pack(a, f, ua.data(), stride, valid, ra.data(), true);
        for (const Kernels * b : others) {
            pack(*b, f, ua.data(), stride, valid, rb.data(), true);
            const size_t at = std::mismatch(ra.data(), ra.data() + bytes, rb.data()).first - ra.data();
            CHECK(at == bytes, "%s %s, %d new rows: packing again differs at byte %zu", isa_name(b->isa), page.c_str(), fresh, at);
        }
        if (fresh > 0 || !packs_to_itself(f, data, valid)) continue;
        const bool same = std::equal(first.begin(), first.end(), ra.data());
        if (may_change(f)) {
            ++packed_again, changed += !same;
        } else {
            CHECK(same, "%s: packing again gave another record", page.c_str());
        }
    }
}

void test_bytes(const Kernels & a, const std::vector<const Kernels *> & b) {
    for (int d : kHeadSizes) {
        std::vector<float> importance(d), others(d);
        for (int i = 0; i < d; ++i) importance[i] = i % 5 == 0 ? 1.0f : std::exp(gauss()), others[i] = std::exp(gauss());
        importance[3] = 0;
        importance[4] = std::numeric_limits<float>::quiet_NaN();
        for (int data = 0; data < int(Data::count); ++data) {
            const std::vector<float> equal(d, 1.0f);
            const float * weights = data % 2 ? equal.data() : importance.data();
            for (int mask = 0; mask < 5; ++mask) {
                for (const KeyFormat & f : key_formats(d)) {
                    CHECK(f.error() == nullptr, "%s: %s", describe(f).c_str(), f.error());
                    compare_records(a, b, f, Data(data), mask,
                        [&](const Kernels & k, const KeyFormat & f, const half * rows, size_t stride, const CellMask & valid, uint8_t * record, bool again) {
                            k.pack_keys(f, rows, stride, valid, again ? others.data() : weights, record);
                        },
                        [](const Kernels & k, const KeyFormat & f, const uint8_t * record, half * rows, size_t stride) { k.unpack_keys(f, record, rows, stride); });
                }
                for (const ValueFormat & f : value_formats(d)) {
                    CHECK(f.error() == nullptr, "%s: %s", describe(f).c_str(), f.error());
                    compare_records(a, b, f, Data(data), mask,
                        [](const Kernels & k, const ValueFormat & f, const half * rows, size_t stride, const CellMask & valid, uint8_t * record, bool) {
                            k.pack_values(f, rows, stride, valid, record);
                        },
                        [](const Kernels & k, const ValueFormat & f, const uint8_t * record, half * rows, size_t stride) { k.unpack_values(f, record, rows, stride); });
                }
            }
        }
    }
}

void test_rotate(const Kernels & a, const Kernels & b) {
    for (int d : kHeadSizes) {
        std::vector<float> x(d);
        for (float & v : x) v = gauss();
        std::vector<float> y = x, z = x;
        a.rotate(y.data(), d, d & -d);
        b.rotate(z.data(), d, d & -d);
        CHECK(std::memcmp(y.data(), z.data(), 4 * d) == 0, "rotate %d", d);
        b.rotate(z.data(), d, d & -d);  // its own inverse
        for (int i = 0; i < d; ++i) CHECK(std::fabs(z[i] - x[i]) < 1e-5f, "rotate %d twice: %g for %g", d, z[i], x[i]);
    }
    for (int n = 0; n < 40; ++n) {
        std::vector<float> x(41, 3.0f);
        b.scale(x.data(), n, 0.5f);
        for (int i = 0; i < 41; ++i) CHECK(x[i] == (i < n ? 1.5f : 3.0f), "scale %d at %d", n, i);
    }
}

// --- attention ------------------------------------------------------------------------------------------------

void test_exp(const Kernels & a, const Kernels & b) {
    for (int n : {0, 1, 3, 7, 8, 9, 31, 32, 33, 127, 128, 1000}) {
        std::vector<float> x(n + 1, 5.0f);
        const float max = 3.25f;
        for (int i = 0; i < n; ++i) x[i] = i % 7 == 3 ? -std::numeric_limits<float>::infinity() : max - std::fabs(float(i % 3 ? 4 : 30) * gauss());
        if (n > 1) x[1] = max;
        std::vector<float> y = x, z = x;
        const float sa = a.exp_sum(y.data(), n, max), sb = b.exp_sum(z.data(), n, max);
        for (int i = 0; i < n; ++i) {
            CHECK(std::fabs(y[i] - z[i]) <= 3e-7f * y[i] + 2e-38f, "exp(%g): %g, %g", x[i] - max, y[i], z[i]);
            CHECK(!std::isinf(x[i]) || z[i] == 0, "exp(-inf) = %g", z[i]);
        }
        CHECK(z[n] == 5.0f, "exp_sum of %d wrote %d", n, n + 1);
        CHECK(std::fabs(sa - sb) <= 1e-6f * sa, "sum of %d: %g, %g", n, sa, sb);
    }
}

// Against scalar. tanh as (1 - e) / (1 + e) is good to a rounding of 1, so to softcap * 2e-7.
void test_logits(const Kernels & a, const Kernels & b) {
    for (int n : {0, 1, 3, 7, 8, 9, 15, 16, 17, 31, 33, 127, 128}) {
        for (float softcap : {0.0f, 30.0f}) {
            for (int masks = 0; masks < 3; ++masks) {  // none, some cells hidden, all hidden
                std::vector<float> x(n + 1, 5.0f), mask(n + 1, 7.0f);
                for (int i = 0; i < n; ++i) {
                    x[i] = 40 * gauss();
                    mask[i] = masks == 2 || i % 3 == 1 ? -std::numeric_limits<float>::infinity() : gauss();
                }
                std::vector<float> y = x, z = x;
                const float ta = a.logits(y.data(), n, 0.3f, softcap, masks ? mask.data() : nullptr, 0.7f);
                const float tb = b.logits(z.data(), n, 0.3f, softcap, masks ? mask.data() : nullptr, 0.7f);
                auto same = [&](float p, float q) { return p == q || std::fabs(p - q) <= 2e-7f * (softcap + std::fabs(p)) + 1e-6f; };
                for (int i = 0; i < n; ++i) CHECK(same(y[i], z[i]), "logits of %d, softcap %g: %g, %g at %d", n, softcap, y[i], z[i], i);
                CHECK(same(ta, tb), "logits of %d, softcap %g: the largest is %g, %g", n, softcap, ta, tb);
                CHECK(z[n] == 5.0f, "logits of %d wrote %d", n, n + 1);
            }
        }
    }
}

void test_half_attention(const Kernels & a, const Kernels & b) {
    for (int d : kHeadSizes) {
        const size_t stride = d + 8;
        const std::vector<half> rows = make_rows(a, Data::outliers, d, stride);
        Aligned<float> scratch(scratch_floats(d));
        for (int n : kQueryCounts) {
            for (int cells : kCellCounts) {
                std::vector<float> q(n * d), weight(n * kPageCells);
                for (float & v : q) v = gauss();
                for (float & v : weight) v = std::exp(3 * gauss());
                std::vector<float> sa(n * kPageCells, 9.0f), sb = sa, size(n * kPageCells);
                a.scores_half(d, rows.data(), stride, cells, q.data(), n, sa.data(), scratch.data());
                b.scores_half(d, rows.data(), stride, cells, q.data(), n, sb.data(), scratch.data());
                std::vector<float> va(n * d, 0.25f), vb = va;
                a.values_half(d, rows.data(), stride, cells, weight.data(), n, va.data(), scratch.data());
                b.values_half(d, rows.data(), stride, cells, weight.data(), n, vb.data(), scratch.data());
                for (int i = 0; i < n; ++i) {
                    std::vector<float> magnitude(d, 0.25f);
                    for (int t = 0; t < kPageCells; ++t) {
                        float sum = 0;
                        for (int j = 0; j < d && t < cells; ++j) {
                            float x;
                            a.from_half(&rows[t * stride + j], &x, 1);
                            sum += std::fabs(q[i * d + j] * x);
                            magnitude[j] += std::fabs(weight[i * kPageCells + t] * x);
                        }
                        const float x = sa[i * kPageCells + t], y = sb[i * kPageCells + t];
                        CHECK(std::fabs(x - y) <= 2e-6f * sum, "scores_half D=%d n=%d cells=%d, query %d cell %d: %g, %g", d, n, cells, i, t, x, y);
                    }
                    for (int j = 0; j < d; ++j) {
                        const float x = va[i * d + j], y = vb[i * d + j];
                        CHECK(std::fabs(x - y) <= 2e-6f * magnitude[j], "values_half D=%d n=%d cells=%d, query %d dim %d: %g, %g", d, n, cells, i, j, x, y);
                    }
                }
            }
        }
    }
    }

// Worst ratio of the added error to the rounding noise of the codes, by bits.
struct Worst {
    double keys[17] = {}, values[17] = {};
};

// Root mean square over the page of (b's scores - exact scores), over the noise sqrt(sum q_d^2 step_d^2 / 12).
double score_ratio(const Kernels & a, const Kernels & b, const KeyFormat & f, const uint8_t * record, const std::vector<float> & q, int n) {
    const int d = f.head_size;
    Aligned<float> scratch(scratch_floats(d));
    std::vector<float> sa(n * kPageCells), sb(n * kPageCells + 1, 9.0f);
    a.scores_packed(f, record, nullptr, q.data(), n, sa.data(), scratch.data());
    b.scores_packed(f, record, nullptr, q.data(), n, sb.data(), scratch.data());
    CHECK(sb.back() == 9.0f, "scores_packed %s n=%d wrote too far", describe(f).c_str(), n);
    double worst = 0;
    for (int i = 0; i < n; ++i) {
        double noise = 0, added = 0, size = 0;
        for (int r = 0; r < d; ++r) {
            const double x = q[i * d + record[f.offset_order() + r]];
            size += std::fabs(x) * 30;
            if (r < f.n16) continue;
            for (int g = 0; g < f.n_groups(); ++g) {
                half h;
                float s;
                std::memcpy(&h, record + f.offset_scale() + 2 * ((r - f.n16) * f.n_groups() + g), 2);
                a.from_half(&h, &s, 1);
                noise += x * x * s * s / 12 / f.n_groups();
            }
        }
        for (int t = 0; t < kPageCells; ++t) {
            const double e = double(sa[i * kPageCells + t]) - double(sb[i * kPageCells + t]);
            CHECK(std::isfinite(sb[i * kPageCells + t]), "scores_packed %s n=%d: not finite", describe(f).c_str(), n);
            added += e * e / kPageCells;
        }
        // Plain float rounding is allowed beside it; keys are of the size of 30 here.
        const double float_noise = 1e-6 * size;
        worst = std::max(worst, std::sqrt(added) / (std::sqrt(noise) + float_noise));
    }
    return worst;
}

int format_bits(const KeyFormat & f) {  // the tier of a format with one tier only, else 0
    for (int bits : {16, 8, 4, 3, 2}) {
        const int n = bits == 16 ? f.n16 : bits == 8 ? f.n8 : bits == 4 ? f.n4 : bits == 3 ? f.n3 : f.n2;
        if (n == f.head_size) return bits;
    }
    return 0;
}

void test_packed_scores(const Kernels & a, const Kernels & b, Worst & worst) {
    for (int d : kHeadSizes) {
        const std::vector<float> importance(d, 1.0f);
        for (Data data : {Data::gaussian, Data::outliers}) {
            const std::vector<half> rows = make_rows(a, data, d, d);
            for (const KeyFormat & f : key_formats(d)) {
                Aligned<uint8_t> record(f.record_bytes());
                a.pack_keys(f, rows.data(), d, CellMask::all(), importance.data(), record.data());
                for (int n : kQueryCounts) {
                    std::vector<float> q(n * d);
                    for (float & v : q) v = gauss() * (below(16) ? 1.0f : 4.0f);
                    if (n > 2) std::fill(q.begin() + d, q.begin() + 2 * d, 0.0f);
                    const double ratio = score_ratio(a, b, f, record.data(), q, n);
                    const int bits = format_bits(f);
                    worst.keys[bits] = std::max(worst.keys[bits], ratio);
                    const double limit = bits == 8 ? 0.5 : 0.15;
                    CHECK(ratio <= limit, "scores_packed %s %s n=%d: added error %.3f of the codes' noise", describe(f).c_str(), data_name(data), n, ratio);
                }
            }
        }
    }
}

void test_packed_values(const Kernels & a, const Kernels & b, Worst & worst) {
    for (int d : kHeadSizes) {
        const std::vector<half> rows = make_rows(a, Data::gaussian, d, d);
        Aligned<float> scratch(scratch_floats(d));
        for (const ValueFormat & f : value_formats(d)) {
            Aligned<uint8_t> record(f.record_bytes());
            a.pack_values(f, rows.data(), d, CellMask::all(), record.data());
            std::vector<float> scale(kPageCells * f.n_groups());
            std::vector<half> scale_half(scale.size());
            for (size_t i = 0; i < scale.size(); ++i) {
                const uint8_t * at = record.data() + f.offset_scale();
                scale_half[i] = f.rotated() ? half(at[i] << 7) : half(at[2 * i] | at[2 * i + 1] << 8);
            }
            a.from_half(scale_half.data(), scale.data(), int(scale.size()));
            for (int n : kQueryCounts) {
                std::vector<float> weight(n * kPageCells);
                for (int i = 0; i < n; ++i) {  // flat, typical, and one token far above many small ones
                    for (int t = 0; t < kPageCells; ++t) {
                        float & w = weight[i * kPageCells + t];
                        w = i % 4 == 0 ? 1.0f : i % 4 == 1 ? std::exp(2 * gauss()) : i % 4 == 2 ? (t == 17 ? 1.0f : 0.003f) : t % 3 ? 0.0f : std::exp(4 * gauss());
                    }
                }
                if (n == 8) std::fill(weight.begin() + kPageCells, weight.begin() + 2 * kPageCells, 0.0f);
                std::vector<float> va(n * d, 1.0f), vb(n * d + 1, 1.0f);
                a.values_packed(f, record.data(), nullptr, weight.data(), n, va.data(), scratch.data());
                b.values_packed(f, record.data(), nullptr, weight.data(), n, vb.data(), scratch.data());
                CHECK(vb.back() == 1.0f, "values_packed %s n=%d wrote too far", describe(f).c_str(), n);
                for (int i = 0; i < n; ++i) {
                    double noise = 0, added = 0, size = 0;
                    for (int t = 0; t < kPageCells; ++t) {
                        const double w = weight[i * kPageCells + t];
                        size += w * w;
                        for (int g = 0; g < f.n_groups(); ++g) noise += std::pow(w * scale[t * f.n_groups() + g], 2) / 12 / f.n_groups();
                    }
                    for (int j = 0; j < d; ++j) added += std::pow(double(va[i * d + j]) - double(vb[i * d + j]), 2) / d;
                    const double ratio = std::sqrt(added) / (std::sqrt(noise) + 1e-5 * std::sqrt(size) + 1e-6);
                    worst.values[f.bits] = std::max(worst.values[f.bits], ratio);
                    CHECK(ratio <= (f.bits == 8 ? 0.5 : 0.15), "values_packed %s n=%d query %d: added error %.3f of the codes' noise", describe(f).c_str(), n, i, ratio);
                }
            }
        }
    }
}

// Numbers that leave no room for a grid: nothing may become infinite or NaN.
void test_extremes(const Kernels & a, const Kernels & b) {
    const int d = 128;
    const std::vector<float> importance(d, 1.0f);
    Aligned<float> scratch(scratch_floats(d));
    for (int data = 0; data < int(Data::count); ++data) {
        const std::vector<half> rows = make_rows(a, Data(data), d, d);
        for (const KeyFormat & f : key_formats(d)) {
            Aligned<uint8_t> record(f.record_bytes());
            a.pack_keys(f, rows.data(), d, make_mask(data % 5), importance.data(), record.data());
            for (float size : {0.0f, 1e-38f, 1e-20f, 1.0f, 1e6f}) {
                std::vector<float> q(4 * d), s(4 * kPageCells);
                for (float & v : q) v = size * gauss();
                b.scores_packed(f, record.data(), nullptr, q.data(), 4, s.data(), scratch.data());
                for (float v : s) CHECK(std::isfinite(v), "%s %s, queries of %g: %g", describe(f).c_str(), data_name(Data(data)), size, v);
            }
        }
        for (const ValueFormat & f : value_formats(d)) {
            Aligned<uint8_t> record(f.record_bytes());
            a.pack_values(f, rows.data(), d, make_mask(data % 5), record.data());
            for (float size : {0.0f, 1e-38f, 1e-20f, 1.0f}) {
                std::vector<float> w(4 * kPageCells), acc(4 * d);
                for (float & v : w) v = size * std::fabs(gauss());
                b.values_packed(f, record.data(), nullptr, w.data(), 4, acc.data(), scratch.data());
                for (float v : acc) CHECK(std::isfinite(v), "%s %s, weights of %g: %g", describe(f).c_str(), data_name(Data(data)), size, v);
            }
        }
    }
}

void test_formats() {
    CHECK(KeyFormat{}.error() != nullptr, "an empty key format");
    CHECK((KeyFormat{128, 0, 4, 40, 0, 84, 128}).error() == nullptr, "3-bit class keys");
    CHECK((KeyFormat{128, 0, 6, 38, 0, 84, 128}).error() != nullptr, "counts not in fours");
    CHECK((KeyFormat{128, 0, 4, 40, 0, 80, 128}).error() != nullptr, "counts that do not add up");
    CHECK((KeyFormat{128, 0, 4, 40, 0, 84, 16}).error() != nullptr, "group 16");
    CHECK((ValueFormat{128, 3, 0}).error() == nullptr, "3-bit values");
    CHECK((ValueFormat{128, 5, 0}).error() != nullptr, "5-bit values");
    CHECK((ValueFormat{100, 4, 0}).error() != nullptr, "head size 100");
    CHECK((ValueFormat{128, 4, 16}).error() != nullptr, "group 16");
}

void test_dispatch() {
    std::string error;
    const Isa chosen = select_isa(error);
    CHECK(error.empty() || chosen == Isa::scalar, "select_isa: %s", error.c_str());
    CHECK(isa_supported(chosen), "select_isa chose %s", isa_name(chosen));
    CHECK(kernels_for(chosen)->isa == chosen, "the table of %s is another's", isa_name(chosen));
#ifndef _WIN32
    setenv("MIXKVQ_ISA", "scalar", 1);
    CHECK(select_isa(error) == Isa::scalar && error.empty(), "MIXKVQ_ISA=scalar: %s", error.c_str());
    setenv("MIXKVQ_ISA", "mmx", 1);
    CHECK(select_isa(error) == Isa::scalar && error.find("mmx") != std::string::npos, "MIXKVQ_ISA=mmx: %s", error.c_str());
    unsetenv("MIXKVQ_ISA");
#endif
}

}  // namespace

int main() {
    test_formats();
    test_dispatch();
    const Kernels & scalar = *kernels_for(Isa::scalar);
    std::vector<const Kernels *> others;
    for (Isa isa : kIsas) {
        if (!isa_supported(isa)) continue;
        const Kernels & k = *kernels_for(isa);
        CHECK(k.isa == isa, "the table of %s", isa_name(isa));
        test_conversion(scalar, k);
        test_rotate(scalar, k);
        test_exp(scalar, k);
        test_logits(scalar, k);
        test_extremes(scalar, k);
        if (isa == Isa::scalar) continue;
        others.push_back(&k);
        test_half_attention(scalar, k);
        Worst worst;
        test_packed_scores(scalar, k, worst);
        test_packed_values(scalar, k, worst);
        std::printf("%s: worst added error over the codes' noise\n  keys   mixed %.4f", isa_name(isa), worst.keys[0]);
        for (int bits : {2, 3, 4, 8}) std::printf("  %d bits %.4f", bits, worst.keys[bits]);
        std::printf("\n  values             ");
        for (int bits : {2, 3, 4, 8}) std::printf("  %d bits %.4f", bits, worst.values[bits]);
        std::printf("\n");
    }
    test_bytes(scalar, others);
    std::printf("rotated values packed again: %d pages, %d with another record\n", packed_again, changed);
    CHECK(packed_again > 0 && 200 * changed <= packed_again, "%d of %d pages gave another record", changed, packed_again);
    return check_result();
}
