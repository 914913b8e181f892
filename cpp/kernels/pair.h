// Two registers as one, the unit of the inner loops of table.h, for an instruction set whose registers have eight lanes. Included after its
// vec_*.h; a set with sixteen lanes brings its own.
#pragma once

#include "codes.h"

namespace mixkvq {
namespace {

constexpr int kScorePairs = 1;  // pairs of tokens that a pass over the keys sums up at once
constexpr int kValuePairs = 1;  // pairs of dimensions that a pass over the values sums up at once

struct F2 { F a, b; };
struct I2 { I a, b; };
struct B2 { B a, b; };

inline F2 load2(const float * p) { return {load(p), load(p + 8)}; }
inline F2 load_half2(const uint16_t * p) { return {load_half(p), load_half(p + 8)}; }
inline void store(float * p, F2 x) { store(p, x.a), store(p + 8, x.b); }
inline F2 splat2(float x) { return {splat(x), splat(x)}; }
inline F2 join(F a, F b) { return {a, b}; }
inline F2 twice(F x) { return {x, x}; }
inline F2 quad(const float * p) { return {pair(p), pair(p + 2)}; }  // each of four numbers over four lanes
inline F first(F2 x) { return x.a; }
inline F second(F2 x) { return x.b; }
inline F2 add(F2 x, F2 y) { return {add(x.a, y.a), add(x.b, y.b)}; }
inline I2 add(I2 x, I2 y) { return {add(x.a, y.a), add(x.b, y.b)}; }
inline F2 sub(F2 x, F2 y) { return {sub(x.a, y.a), sub(x.b, y.b)}; }
inline F2 mul(F2 x, F2 y) { return {mul(x.a, y.a), mul(x.b, y.b)}; }
inline F2 div(F2 x, F2 y) { return {div(x.a, y.a), div(x.b, y.b)}; }
inline F2 fma(F2 x, F2 y, F2 z) { return {fma(x.a, y.a, z.a), fma(x.b, y.b, z.b)}; }
inline F2 min(F2 x, F2 y) { return {min(x.a, y.a), min(x.b, y.b)}; }
inline F2 max(F2 x, F2 y) { return {max(x.a, y.a), max(x.b, y.b)}; }
inline F2 abs(F2 x) { return {abs(x.a), abs(x.b)}; }
inline F2 round(F2 x) { return {round(x.a), round(x.b)}; }
inline F2 exp2_whole(F2 n) { return {exp2_whole(n.a), exp2_whole(n.b)}; }
inline F2 zero_below(F2 x, F2 probe, F2 limit) { return {zero_below(x.a, probe.a, limit.a), zero_below(x.b, probe.b, limit.b)}; }
inline F2 with_sign(F2 x, F2 sign) { return {with_sign(x.a, sign.a), with_sign(x.b, sign.b)}; }
inline I2 to_int(F2 x) { return {to_int(x.a), to_int(x.b)}; }
inline F2 to_float(I2 x) { return {to_float(x.a), to_float(x.b)}; }
inline float sum(F2 x) { return sum(add(x.a, x.b)); }
inline float highest(F2 x) { return highest(max(x.a, x.b)); }

// Code registers k and k + 1 of a chunk (keys); register k of sixteen dimensions (values), or of eight with zeros beside them.
template <int bits, int k>
inline B2 load_codes_along(const uint8_t * low, size_t row, const uint8_t * high) {
    return {load_codes<bits, k>(low, row, high), load_codes<bits, k + 1>(low, row, high)};
}
template <int bits, int k, bool both>
inline B2 load_codes_beside(const uint8_t * low, size_t row, const uint8_t * high) {
    return {load_codes<bits, k>(low, row, high), both ? load_codes<bits, k>(low + 32, row, high + 32) : zero_bytes()};
}

using Weight = I;
inline Weight weight_of(int32_t x) { return splat_int(x); }

// Keys: one quad for four queries. Values: eight tokens each of two chunks; 32 tokens each of two chunks that follow each other.
inline void store_narrow_weights(int32_t * w, I2 x) { store_narrow_weights(w, x.a, x.b); }
inline void store_wide_weights(int32_t * w, I2 x) { store_wide_weights(w, x.a, x.b); }
inline void store_wide_weights(int32_t * v, int32_t * w, I2 x) { store_wide_weights(v, x.a), store_wide_weights(w, x.b); }
inline void store_narrow_weights(int32_t * w, I2 a, I2 b, I2 c, I2 d) {
    store_narrow_weights(w, a.a, b.a, c.a, d.a);
    store_narrow_weights(w + 8, a.b, b.b, c.b, d.b);
}

struct Narrow2 { Narrow a, b; };
inline Narrow2 narrow_zero2() { return {narrow_zero(), narrow_zero()}; }
inline Narrow2 dot_narrow(Narrow2 s, B2 codes, Weight w) { return {dot_narrow(s.a, codes.a, w), dot_narrow(s.b, codes.b, w)}; }
inline Narrow2 dot_unsigned(Narrow2 s, B2 codes, Weight w) { return {dot_unsigned(s.a, codes.a, w), dot_unsigned(s.b, codes.b, w)}; }
inline I2 widen(Narrow2 s) { return {widen(s.a), widen(s.b)}; }

struct Wide2 { Wide a, b; };
struct WideSum2 { WideSum a, b; };
inline WideSum2 wide_zero2() { return {wide_zero(), wide_zero()}; }
inline Wide2 split(B2 codes) { return {split(codes.a), split(codes.b)}; }
inline WideSum2 dot_wide(WideSum2 s, Wide2 codes, Weight even, Weight odd) {
    return {dot_wide(s.a, codes.a, even, odd), dot_wide(s.b, codes.b, even, odd)};
}
inline I2 widen(WideSum2 s) { return {total(s.a), total(s.b)}; }

}  // namespace
}  // namespace mixkvq
