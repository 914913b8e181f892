// The primitives of table.h on the NEON of 64-bit ARM, with its byte dot products where the compiler's flags allow them. Included by neon.cpp
// and neon_dotprod.cpp only: its types stay in those files. vec_avx2.h is the model.
//
// Eight lanes are two registers: `a` holds lanes 0 to 3, `b` lanes 4 to 7.
#pragma once

#include <arm_neon.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace mixkvq {
namespace {

struct F { float32x4_t a, b; };
struct I { int32x4_t a, b; };
struct B { uint8x16_t a, b; };

// --- floats ---------------------------------------------------------------------------------------------------

inline F load(const float * p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
inline void store(float * p, F x) { vst1q_f32(p, x.a), vst1q_f32(p + 4, x.b); }
inline F splat(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
inline void store_low(float * p, F x) { vst1q_f32(p, x.a); }  // four lanes
inline F add(F x, F y) { return {vaddq_f32(x.a, y.a), vaddq_f32(x.b, y.b)}; }
inline F sub(F x, F y) { return {vsubq_f32(x.a, y.a), vsubq_f32(x.b, y.b)}; }
inline F mul(F x, F y) { return {vmulq_f32(x.a, y.a), vmulq_f32(x.b, y.b)}; }
inline F div(F x, F y) { return {vdivq_f32(x.a, y.a), vdivq_f32(x.b, y.b)}; }
inline F fma(F x, F y, F z) { return {vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b)}; }
inline F min(F x, F y) { return {vminq_f32(x.a, y.a), vminq_f32(x.b, y.b)}; }
inline F max(F x, F y) { return {vmaxq_f32(x.a, y.a), vmaxq_f32(x.b, y.b)}; }
inline F abs(F x) { return {vabsq_f32(x.a), vabsq_f32(x.b)}; }
inline F sqrt(F x) { return {vsqrtq_f32(x.a), vsqrtq_f32(x.b)}; }
inline F floor(F x) { return {vrndmq_f32(x.a), vrndmq_f32(x.b)}; }
inline F round(F x) { return {vrndnq_f32(x.a), vrndnq_f32(x.b)}; }
inline I to_int(F x) { return {vcvtnq_s32_f32(x.a), vcvtnq_s32_f32(x.b)}; }  // nearest even
inline F to_float(I x) { return {vcvtq_f32_s32(x.a), vcvtq_f32_s32(x.b)}; }

inline float32x4_t masked(float32x4_t x, uint32x4_t mask) { return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(x), mask)); }

// x where probe >= limit, else 0.
inline F zero_below(F x, F probe, F limit) { return {masked(x.a, vcgeq_f32(probe.a, limit.a)), masked(x.b, vcgeq_f32(probe.b, limit.b))}; }

// |x| with the sign of another.
inline F with_sign(F x, F sign) {
    const uint32x4_t bit = vdupq_n_u32(0x80000000u);
    return {vbslq_f32(bit, sign.a, x.a), vbslq_f32(bit, sign.b, x.b)};
}

// p[0] over four lanes, p[1] over the others; and the halves exchanged.
inline F pair(const float * p) { return {vld1q_dup_f32(p), vld1q_dup_f32(p + 1)}; }
inline F swap_halves(F x) { return {x.b, x.a}; }

inline float sum(F x) { return vaddvq_f32(vaddq_f32(x.a, x.b)); }
inline float lowest(F x) { return vminvq_f32(vminq_f32(x.a, x.b)); }
inline float highest(F x) { return vmaxvq_f32(vmaxq_f32(x.a, x.b)); }
// The four sums of four registers.
inline void sum4(F a, F b, F c, F d, float out[4]) {
    const float32x4_t ab = vpaddq_f32(vaddq_f32(a.a, a.b), vaddq_f32(b.a, b.b)), cd = vpaddq_f32(vaddq_f32(c.a, c.b), vaddq_f32(d.a, d.b));
    vst1q_f32(out, vpaddq_f32(ab, cd));
}
// Adds one in the lanes where a is above (at or above, equal to) x.
inline int32x4_t count(int32x4_t n, uint32x4_t mask) { return vsubq_s32(n, vreinterpretq_s32_u32(mask)); }
inline I count_above(I n, F a, F x) { return {count(n.a, vcgtq_f32(a.a, x.a)), count(n.b, vcgtq_f32(a.b, x.b))}; }
inline I count_at_least(I n, F a, F x) { return {count(n.a, vcgeq_f32(a.a, x.a)), count(n.b, vcgeq_f32(a.b, x.b))}; }
inline I count_equal(I n, F a, F x) { return {count(n.a, vceqq_f32(a.a, x.a)), count(n.b, vceqq_f32(a.b, x.b))}; }
inline int sum(I x) { return vaddvq_s32(vaddq_s32(x.a, x.b)); }

// dst[4 i + k] = lane i of the k-th register.
inline void store_interleaved(float * dst, F a, F b, F c, F d) {
    vst4q_f32(dst, (float32x4x4_t{{a.a, b.a, c.a, d.a}}));
    vst4q_f32(dst + 16, (float32x4x4_t{{a.b, b.b, c.b, d.b}}));
}

// One level of the Walsh-Hadamard transform among the lanes of a register: distance 1, 2 or 4. y - x is y + -x, bit for bit.
inline float32x4_t negate(float32x4_t x, uint32x4_t signs) { return vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(x), signs)); }
inline F butterfly1(F x) {
    const uint32x4_t odd = vreinterpretq_u32_u64(vdupq_n_u64(0x8000000000000000u));
    return {vaddq_f32(vrev64q_f32(x.a), negate(x.a, odd)), vaddq_f32(vrev64q_f32(x.b), negate(x.b, odd))};
}
inline F butterfly2(F x) {
    const uint32x4_t upper = vcombine_u32(vdup_n_u32(0), vdup_n_u32(0x80000000u));
    return {vaddq_f32(vextq_f32(x.a, x.a, 2), negate(x.a, upper)), vaddq_f32(vextq_f32(x.b, x.b, 2), negate(x.b, upper))};
}
inline F butterfly4(F x) { return {vaddq_f32(x.a, x.b), vsubq_f32(x.a, x.b)}; }

// 2^n for n as whole floats from -126 to 127.
inline float32x4_t exp2_whole(float32x4_t n) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23)); }
inline F exp2_whole(F n) { return {exp2_whole(n.a), exp2_whole(n.b)}; }

// --- halves ---------------------------------------------------------------------------------------------------

inline F load_half(const uint16_t * p) {
    const float16x8_t h = vreinterpretq_f16_u16(vld1q_u16(p));
    return {vcvt_f32_f16(vget_low_f16(h)), vcvt_high_f32_f16(h)};
}
// Eight halves that were cut down to a byte each.
template <int shift>
inline F load_byte_halves(const uint8_t * p) {
    const float16x8_t h = vreinterpretq_f16_u16(vshlq_n_u16(vmovl_u8(vld1_u8(p)), shift));
    return {vcvt_f32_f16(vget_low_f16(h)), vcvt_high_f32_f16(h)};
}
// Nearest even; clamps to +-65504.
inline void store_half(uint16_t * p, F x) {
    x = min(max(x, splat(-65504.0f)), splat(65504.0f));
    vst1q_u16(p, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(x.a), x.b)));
}
// As it reads back after store_half.
inline F as_half(F x) {
    x = min(max(x, splat(-65504.0f)), splat(65504.0f));
    return {vcvt_f32_f16(vcvt_f16_f32(x.a)), vcvt_f32_f16(vcvt_f16_f32(x.b))};
}
inline uint16_t half_of(float x) {  // no clamp
    const __fp16 h = __fp16(x);
    uint16_t bits;
    std::memcpy(&bits, &h, 2);
    return bits;
}
inline float float_of(uint16_t bits) {
    __fp16 h;
    std::memcpy(&h, &bits, 2);
    return float(h);
}
inline F zero_nan(F x) { return {masked(x.a, vceqq_f32(x.a, x.a)), masked(x.b, vceqq_f32(x.b, x.b))}; }

// Eight by eight halves, transposed.
inline void transpose_halves(const uint16_t * src, size_t src_stride, uint16_t * dst, size_t dst_stride) {
    uint16x8_t r[8], s[8];
    for (int i = 0; i < 8; ++i) r[i] = vld1q_u16(src + i * src_stride);
    for (int i = 0; i < 8; i += 2) {  // 2 x 2 blocks
        s[i] = vtrn1q_u16(r[i], r[i + 1]);
        s[i + 1] = vtrn2q_u16(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; ++i) {  // 4 x 4 blocks
        const uint32x4_t x = vreinterpretq_u32_u16(s[i & ~2]), y = vreinterpretq_u32_u16(s[i | 2]);
        r[i] = vreinterpretq_u16_u32(i & 2 ? vtrn2q_u32(x, y) : vtrn1q_u32(x, y));
    }
    for (int i = 0; i < 8; ++i) {
        const uint64x2_t x = vreinterpretq_u64_u16(r[i & 3]), y = vreinterpretq_u64_u16(r[i | 4]);
        vst1q_u16(dst + i * dst_stride, vreinterpretq_u16_u64(i & 4 ? vtrn2q_u64(x, y) : vtrn1q_u64(x, y)));
    }
}

// --- code bytes -----------------------------------------------------------------------------------------------

// Keeps the steps of a loop in their order: GCC would otherwise load and split the codes and weights of many steps ahead, and spill them.
template <class T>
inline T in_order(T x) {
#if !defined(__clang__)
    if constexpr (sizeof x == 16) {
        __asm__ volatile("" : "+w"(x));
    } else {
        __asm__ volatile("" : "+r"(x));
    }
#endif
    return x;
}

inline B load_bytes(const uint8_t * p) {
    p = in_order(p);
    return {vld1q_u8(p), vld1q_u8(p + 16)};
}
inline void store_bytes(uint8_t * p, B x) { vst1q_u8(p, x.a), vst1q_u8(p + 16, x.b); }
inline B zero_bytes() { return {vdupq_n_u8(0), vdupq_n_u8(0)}; }
inline B splat_byte(int x) { return {vdupq_n_u8(uint8_t(x)), vdupq_n_u8(uint8_t(x))}; }
inline B bits_and(B x, B y) { return {vandq_u8(x.a, y.a), vandq_u8(x.b, y.b)}; }
inline B bits_or(B x, B y) { return {vorrq_u8(x.a, y.a), vorrq_u8(x.b, y.b)}; }
template <int n>
inline B shift_right(B x) {
    if constexpr (n == 0) return x;
    else return {vshrq_n_u8(x.a, n), vshrq_n_u8(x.b, n)};
}
template <int n>
inline B shift_left(B x) { return {vshlq_n_u8(x.a, n), vshlq_n_u8(x.b, n)}; }

// Byte r of each 32-bit lane, and four integers of 0 to 255 as the bytes of a lane.
template <int r>
inline int32x4_t byte_of(uint8x16_t x) {
    uint32x4_t lanes = vreinterpretq_u32_u8(x);
    if constexpr (r > 0) lanes = vshrq_n_u32(lanes, 8 * r);
    return vreinterpretq_s32_u32(r < 3 ? vandq_u32(lanes, vdupq_n_u32(255)) : lanes);
}
template <int r>
inline I byte_of(B x) { return {byte_of<r>(x.a), byte_of<r>(x.b)}; }
// The low bytes of four integers.
inline int32x4_t join_bytes(int32x4_t a, int32x4_t b, int32x4_t c, int32x4_t d) {
    return vsliq_n_s32(vsliq_n_s32(vsliq_n_s32(a, b, 8), c, 16), d, 24);
}
inline B join_bytes(I a, I b, I c, I d) {
    return {vreinterpretq_u8_s32(join_bytes(a.a, b.a, c.a, d.a)), vreinterpretq_u8_s32(join_bytes(a.b, b.b, c.b, d.b))};
}
// All ones in lane i where bit i is set.
inline I lanes_of(unsigned bits) {
    const uint32_t one[8] = {1, 2, 4, 8, 16, 32, 64, 128};
    const uint32x4_t x = vdupq_n_u32(bits);
    return {vreinterpretq_s32_u32(vtstq_u32(x, vld1q_u32(one))), vreinterpretq_s32_u32(vtstq_u32(x, vld1q_u32(one + 4)))};
}

// --- integer dot products: 32-bit lanes of four products each ------------------------------------------------------

inline I zero_int() { return {vdupq_n_s32(0), vdupq_n_s32(0)}; }
inline I splat_int(int32_t x) {
    const int32x4_t lanes = in_order(vdupq_n_s32(x));
    return {lanes, lanes};
}
inline I add(I x, I y) { return {vaddq_s32(x.a, y.a), vaddq_s32(x.b, y.b)}; }
inline I bits_and(I x, I y) { return {vandq_s32(x.a, y.a), vandq_s32(x.b, y.b)}; }

// Bytes times bytes, for codes of 2 and 3 bits. A sum holds narrow_limit(bits) products of codes and weights of -127 to 127, and half as
// many with weights of 0 to 255, before it must be widened.
#if defined(__ARM_FEATURE_DOTPROD)
using Narrow = I;
constexpr int narrow_limit(int) { return 1 << 16; }
inline Narrow narrow_zero() { return zero_int(); }
inline int32x4_t dot_signed(int32x4_t s, uint8x16_t codes, int32x4_t w) { return vdotq_s32(s, vreinterpretq_s8_u8(codes), vreinterpretq_s8_s32(w)); }
inline int32x4_t dot_unsigned(int32x4_t s, uint8x16_t codes, int32x4_t w) {
    return vreinterpretq_s32_u32(vdotq_u32(vreinterpretq_u32_s32(s), codes, vreinterpretq_u8_s32(w)));
}
inline Narrow dot_narrow(Narrow s, B codes, I w) { return {dot_signed(s.a, codes.a, w.a), dot_signed(s.b, codes.b, w.b)}; }
inline Narrow dot_unsigned(Narrow s, B codes, I w) { return {dot_unsigned(s.a, codes.a, w.a), dot_unsigned(s.b, codes.b, w.b)}; }
inline I widen(const Narrow & s) { return {s.a, s.b}; }
#else
// Two 16-bit sums per lane, of two products each: at most 2 * 127 (2^bits - 1) a call. The codes are sorted into bytes 0 and 1 of all lanes and
// bytes 2 and 3, once for all queries: both then add to the same sums.
struct Narrow { int16x8_t a, b; };
constexpr int narrow_limit(int bits) { return bits == 3 ? 18 : 42; }
inline Narrow narrow_zero() { return {vdupq_n_s16(0), vdupq_n_s16(0)}; }
inline uint8x16_t front_bytes(uint8x16_t x, uint8x16_t y) {
    return vreinterpretq_u8_u16(vuzp1q_u16(vreinterpretq_u16_u8(x), vreinterpretq_u16_u8(y)));
}
inline uint8x16_t back_bytes(uint8x16_t x, uint8x16_t y) {
    return vreinterpretq_u8_u16(vuzp2q_u16(vreinterpretq_u16_u8(x), vreinterpretq_u16_u8(y)));
}
inline Narrow dot_narrow(Narrow s, B codes, I weights) {
    const int8x16_t x = vreinterpretq_s8_u8(front_bytes(codes.a, codes.b)), y = vreinterpretq_s8_u8(back_bytes(codes.a, codes.b));
    const uint8x16_t w = vreinterpretq_u8_s32(weights.a);
    const int8x16_t u = vreinterpretq_s8_u8(front_bytes(w, w)), v = vreinterpretq_s8_u8(back_bytes(w, w));
    s.a = vmlal_s8(vmlal_s8(s.a, vget_low_s8(x), vget_low_s8(u)), vget_low_s8(y), vget_low_s8(v));
    s.b = vmlal_high_s8(vmlal_high_s8(s.b, x, u), y, v);
    return s;
}
inline Narrow dot_unsigned(Narrow s, B codes, I weights) {
    const uint8x16_t x = front_bytes(codes.a, codes.b), y = back_bytes(codes.a, codes.b);
    const uint8x16_t w = vreinterpretq_u8_s32(weights.a), u = front_bytes(w, w), v = back_bytes(w, w);
    const uint16x8_t a = vreinterpretq_u16_s16(s.a), b = vreinterpretq_u16_s16(s.b);
    s.a = vreinterpretq_s16_u16(vmlal_u8(vmlal_u8(a, vget_low_u8(x), vget_low_u8(u)), vget_low_u8(y), vget_low_u8(v)));
    s.b = vreinterpretq_s16_u16(vmlal_high_u8(vmlal_high_u8(b, x, u), y, v));
    return s;
}
inline I widen(const Narrow & s) { return {vpaddlq_s16(s.a), vpaddlq_s16(s.b)}; }
#endif

// Bytes times 16-bit weights: the codes of byte r of all lanes in a register, so that each adds to the sums of its lanes at once. The weights
// are (0, 2) and (1, 3).
struct Wide { int16x8_t byte[4]; };
using WideSum = I;
inline WideSum wide_zero() { return zero_int(); }
inline Wide split(B codes) {
    const uint16x8_t even = vreinterpretq_u16_u8(vuzp1q_u8(codes.a, codes.b)), odd = vreinterpretq_u16_u8(vuzp2q_u8(codes.a, codes.b));
    const uint16x8_t low = vdupq_n_u16(255);
    return {{vreinterpretq_s16_u16(vandq_u16(even, low)), vreinterpretq_s16_u16(vandq_u16(odd, low)), vreinterpretq_s16_u16(vshrq_n_u16(even, 8)),
             vreinterpretq_s16_u16(vshrq_n_u16(odd, 8))}};
}
template <int lane>
inline WideSum multiply_add(WideSum s, int16x8_t codes, int32x4_t weights) {
    const int16x4_t w = vget_low_s16(vreinterpretq_s16_s32(weights));
    return {vmlal_lane_s16(s.a, vget_low_s16(codes), w, lane), vmlal_high_lane_s16(s.b, codes, w, lane)};
}
inline WideSum dot_wide(WideSum s, Wide codes, I even, I odd) {
    s = multiply_add<0>(s, codes.byte[0], even.a);
    s = multiply_add<0>(s, codes.byte[1], odd.a);
    s = multiply_add<1>(s, codes.byte[2], even.a);
    return multiply_add<1>(s, codes.byte[3], odd.a);
}
inline I total(const WideSum & s) { return {s.a, s.b}; }

// Weights of one key quad for four queries: a = channels 0 | 1, b = channels 2 | 3, four queries each.
inline void store_narrow_weights(int32_t * w, I a, I b) { vst1q_s32(w, join_bytes(a.a, a.b, b.a, b.b)); }
// w[0..3] even, w[4..7] odd.
inline void store_wide_weights(int32_t * w, I a, I b) {
    vst1q_s32(w, vsliq_n_s32(a.a, b.a, 16));
    vst1q_s32(w + 4, vsliq_n_s32(a.b, b.b, 16));
}
// Eight tokens' weights as two quads of (even, odd); 32 tokens' weights as bytes, 0 to 255.
inline void store_wide_weights(int32_t * w, I x) {
    const int64x2_t a = vreinterpretq_s64_s32(x.a), b = vreinterpretq_s64_s32(x.b);
    vst1q_s32(w, vsliq_n_s32(vreinterpretq_s32_s64(vtrn1q_s64(a, b)), vreinterpretq_s32_s64(vtrn2q_s64(a, b)), 16));
}
inline uint16x8_t low_halves(I x) { return vuzp1q_u16(vreinterpretq_u16_s32(x.a), vreinterpretq_u16_s32(x.b)); }
inline uint8x16_t low_bytes(I x, I y) { return vuzp1q_u8(vreinterpretq_u8_u16(low_halves(x)), vreinterpretq_u8_u16(low_halves(y))); }
inline void store_narrow_weights(int32_t * w, I a, I b, I c, I d) {
    vst1q_s32(w, vreinterpretq_s32_u8(low_bytes(a, b)));
    vst1q_s32(w + 4, vreinterpretq_s32_u8(low_bytes(c, d)));
}

}  // namespace
}  // namespace mixkvq
