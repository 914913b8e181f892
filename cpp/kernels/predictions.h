// Kernels in float64 for the comparison of predictions, in the vector types of GCC and Clang. Part of table.h: compiled once for each instruction set.
//
// Element i belongs to sum i mod kSums, whatever the width of a register, and no operation is fused: all instruction sets give the same bits.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "mixkvq/kernels.h"

namespace mixkvq {
namespace {

#if defined(__AVX512F__)
constexpr int kDoubles = 8;
#elif defined(__AVX2__)
constexpr int kDoubles = 4;
#else
constexpr int kDoubles = 2;
#endif
constexpr int kSums = 16;
constexpr int kParts = kSums / kDoubles;
constexpr int kFloats = 2 * kDoubles;

typedef double  Doubles __attribute__((vector_size(8 * kDoubles)));
typedef int64_t DoubleBits __attribute__((vector_size(8 * kDoubles)));
typedef float   HalfFloats __attribute__((vector_size(4 * kDoubles)));
typedef float   Floats __attribute__((vector_size(4 * kFloats)));
typedef int32_t FloatBits __attribute__((vector_size(4 * kFloats)));

constexpr double kLeast = -708.0;  // above it e^x is no subnormal number

template <class V, class T>
inline V read(const T * p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline Doubles wide(const float * p) { return __builtin_convertvector(read<HalfFloats>(p), Doubles); }

// e^x for x <= 0: x = n ln 2 + r with |r| <= ln 2 / 2, the Taylor series of e^r up to r^12 (the rest is below 2e-16), in even and odd powers.
inline Doubles exp_of(Doubles x) {
    const Doubles y = x > kLeast ? x : (Doubles{} + kLeast);
    const Doubles shifted = y * 1.4426950408889634 + 6755399441055744.0;  // 1.5 * 2^52: n stands in the low bits
    const Doubles n = shifted - 6755399441055744.0;
    const Doubles r = (y - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;  // ln 2 in two parts, the first exact times n
    const Doubles s = r * r;
    Doubles even = s * (1.0 / 479001600) + 1.0 / 3628800, odd = s * (1.0 / 39916800) + 1.0 / 362880;
    even = even * s + 1.0 / 40320, odd = odd * s + 1.0 / 5040;
    even = even * s + 1.0 / 720, odd = odd * s + 1.0 / 120;
    even = even * s + 1.0 / 24, odd = odd * s + 1.0 / 6;
    even = even * s + 0.5, odd = odd * s + 1.0;
    const Doubles p = (even * s + odd * r) + 1.0;
    DoubleBits bits, scale;
    std::memcpy(&bits, &p, sizeof bits);
    std::memcpy(&scale, &shifted, sizeof scale);
    bits += scale << 52;
    Doubles result;
    std::memcpy(&result, &bits, sizeof result);
    return x >= kLeast ? result : Doubles{};
}

inline double total(const Doubles (&sums)[kParts]) {
    double all[kSums], sum = 0;
    std::memcpy(all, sums, sizeof all);
    for (double x : all) sum += x;
    return sum;
}

double exp_wide(const float * x, int n, float max, double * y) {
    Doubles sums[kParts] = {};
    int i = 0;
    for (; i + kSums <= n; i += kSums) {
        for (int k = 0; k < kParts; ++k) {
            const Doubles e = exp_of(wide(x + i + k * kDoubles) - double(max));
            std::memcpy(y + i + k * kDoubles, &e, sizeof e);
            sums[k] += e;
        }
    }
    if (i < n) {
        float rest[kSums];
        double all[kSums];
        for (int j = 0; j < kSums; ++j) rest[j] = i + j < n ? x[i + j] : -INFINITY;
        for (int k = 0; k < kParts; ++k) {
            const Doubles e = exp_of(wide(rest + k * kDoubles) - double(max));
            std::memcpy(all + k * kDoubles, &e, sizeof e);
            sums[k] += e;
        }
        for (int j = i; j < n; ++j) y[j] = all[j - i];
    }
    return total(sums);
}

double weighted_gap(const double * p, const float * x, float x_max, const float * y, float y_max, int n) {
    Doubles sums[kParts] = {};
    auto add = [&](const double * p, const float * x, const float * y) {
        for (int k = 0; k < kParts; ++k) {
            const Doubles w = read<Doubles>(p + k * kDoubles);
            const Doubles gap = (wide(x + k * kDoubles) - double(x_max)) - (wide(y + k * kDoubles) - double(y_max));
            sums[k] += w > 0 ? w * gap : Doubles{};
        }
    };
    int i = 0;
    for (; i + kSums <= n; i += kSums) add(p + i, x + i, y + i);
    if (i < n) {
        double w[kSums] = {};
        float a[kSums] = {}, b[kSums] = {};
        for (int j = i; j < n; ++j) w[j - i] = p[j], a[j - i] = x[j], b[j - i] = y[j];
        add(w, a, b);
    }
    return total(sums);
}

float first_top(const float * x, int n, int & where) {
    constexpr int kBlock = 32 * kFloats;  // in which the first of the largest is looked for
    where = 0;
    float top = x[0];
    int i = 0;
    for (; i + kBlock <= n; i += kBlock) {
        Floats best[2] = {read<Floats>(x + i), read<Floats>(x + i + kFloats)};
        FloatBits nan = (best[0] != best[0]) | (best[1] != best[1]);
        for (int j = 2 * kFloats; j < kBlock; j += 2 * kFloats) {
            for (int k = 0; k < 2; ++k) {
                const Floats v = read<Floats>(x + i + j + k * kFloats);
                best[k] = v > best[k] ? v : best[k];
                nan |= v != v;
            }
        }
        float all[2 * kFloats];
        int32_t any[kFloats], bad = 0;
        std::memcpy(all, best, sizeof all);
        std::memcpy(any, &nan, sizeof any);
        for (int32_t each : any) bad |= each;
        bool better = bad != 0 || i == 0;
        for (float each : all) better |= each > top;
        if (!better) continue;
        for (int j = i; j < i + kBlock; ++j) {
            if (x[j] != x[j]) return where = j, x[j];
            if (x[j] > top) top = x[j], where = j;
        }
    }
    for (; i < n; ++i) {
        if (x[i] != x[i]) return where = i, x[i];
        if (x[i] > top) top = x[i], where = i;
    }
    return top;
}

}  // namespace
}  // namespace mixkvq
