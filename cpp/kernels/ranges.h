// The tiers of a key record, and the rounding of a range of numbers to codes.
#pragma once

#include "codes.h"
#include "lanes.h"

namespace mixkvq {
namespace {

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

}  // namespace
}  // namespace mixkvq
