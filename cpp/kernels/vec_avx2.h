// The primitives of table.h on AVX2 with FMA and F16C, and with VNNI where the compiler's flags allow it. Included by the avx2*.cpp and
// avx512*.cpp only: its types stay in those files.
//
// A register is 32 bytes: eight floats (F), eight 32-bit integers (I) or 32 code bytes (B). Eight lanes is the unit of the page
// format, so every instruction set offers these same shapes; a narrower one splits them.
#pragma once

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
#pragma GCC diagnostic ignored "-Wuninitialized"  // of GCC's own _mm512_undefined_ps
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace mixkvq {
namespace {

using F = __m256;
using I = __m256i;
using B = __m256i;

// --- floats ---------------------------------------------------------------------------------------------------

inline F load(const float * p) { return _mm256_loadu_ps(p); }
inline void store(float * p, F x) { _mm256_storeu_ps(p, x); }
inline F splat(float x) { return _mm256_set1_ps(x); }
inline void store_low(float * p, F x) { _mm_storeu_ps(p, _mm256_castps256_ps128(x)); }  // four lanes
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F div(F a, F b) { return _mm256_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F min(F a, F b) { return _mm256_min_ps(a, b); }
inline F max(F a, F b) { return _mm256_max_ps(a, b); }
inline F abs(F x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
inline F sqrt(F x) { return _mm256_sqrt_ps(x); }
inline F floor(F x) { return _mm256_floor_ps(x); }
inline F round(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline I to_int(F x) { return _mm256_cvtps_epi32(x); }  // nearest even
inline F to_float(I x) { return _mm256_cvtepi32_ps(x); }
// x where probe >= limit, else 0.
inline F zero_below(F x, F probe, F limit) { return _mm256_and_ps(x, _mm256_cmp_ps(probe, limit, _CMP_GE_OQ)); }

// |x| with the sign of another.
inline F with_sign(F x, F sign) { return _mm256_or_ps(abs(x), _mm256_and_ps(sign, _mm256_set1_ps(-0.0f))); }

// p[0] over four lanes, p[1] over the others; and the halves exchanged.
inline F pair(const float * p) {
    long long both;
    std::memcpy(&both, p, 8);
    return _mm256_permutevar_ps(_mm256_castsi256_ps(_mm256_set1_epi64x(both)), _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
}
inline F swap_halves(F x) { return _mm256_permute2f128_ps(x, x, 1); }

inline float sum(F x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float lowest(F x) {
    __m128 s = _mm_min_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_min_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_min_ss(s, _mm_movehdup_ps(s)));
}
inline float highest(F x) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
// The four sums of four registers.
inline void sum4(F a, F b, F c, F d, float out[4]) {
    const F s = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}
// Adds one in the lanes where a is above (at or above, equal to) x.
inline I count_above(I n, F a, F x) { return _mm256_sub_epi32(n, _mm256_castps_si256(_mm256_cmp_ps(a, x, _CMP_GT_OQ))); }
inline I count_at_least(I n, F a, F x) { return _mm256_sub_epi32(n, _mm256_castps_si256(_mm256_cmp_ps(a, x, _CMP_GE_OQ))); }
inline I count_equal(I n, F a, F x) { return _mm256_sub_epi32(n, _mm256_castps_si256(_mm256_cmp_ps(a, x, _CMP_EQ_OQ))); }
inline int sum(I x) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

// dst[4 i + k] = lane i of the k-th register.
inline void store_interleaved(float * dst, F a, F b, F c, F d) {
    const F ab0 = _mm256_unpacklo_ps(a, b), ab1 = _mm256_unpackhi_ps(a, b);
    const F cd0 = _mm256_unpacklo_ps(c, d), cd1 = _mm256_unpackhi_ps(c, d);
    const F r0 = _mm256_shuffle_ps(ab0, cd0, 0x44), r1 = _mm256_shuffle_ps(ab0, cd0, 0xee);
    const F r2 = _mm256_shuffle_ps(ab1, cd1, 0x44), r3 = _mm256_shuffle_ps(ab1, cd1, 0xee);
    store(dst, _mm256_permute2f128_ps(r0, r1, 0x20));
    store(dst + 8, _mm256_permute2f128_ps(r2, r3, 0x20));
    store(dst + 16, _mm256_permute2f128_ps(r0, r1, 0x31));
    store(dst + 24, _mm256_permute2f128_ps(r2, r3, 0x31));
}

// One level of the Walsh-Hadamard transform among the lanes of a register: distance 1, 2 or 4.
inline F butterfly1(F x) {
    const F y = _mm256_permute_ps(x, 0xb1);
    return _mm256_blend_ps(_mm256_add_ps(x, y), _mm256_sub_ps(y, x), 0xaa);
}
inline F butterfly2(F x) {
    const F y = _mm256_permute_ps(x, 0x4e);
    return _mm256_blend_ps(_mm256_add_ps(x, y), _mm256_sub_ps(y, x), 0xcc);
}
inline F butterfly4(F x) {
    const F y = swap_halves(x);
    return _mm256_blend_ps(_mm256_add_ps(x, y), _mm256_sub_ps(y, x), 0xf0);
}

// 2^n for n as whole floats from -126 to 127.
inline F exp2_whole(F n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}

// --- halves ---------------------------------------------------------------------------------------------------

inline F load_half(const uint16_t * p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))); }
// Eight halves that were cut down to a byte each.
template <int shift>
inline F load_byte_halves(const uint8_t * p) {
    return _mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p))), shift));
}
// Nearest even; clamps to +-65504.
inline void store_half(uint16_t * p, F x) {
    x = _mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(-65504.0f)), _mm256_set1_ps(65504.0f));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// As it reads back after store_half.
inline F as_half(F x) {
    x = _mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(-65504.0f)), _mm256_set1_ps(65504.0f));
    return _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline uint16_t half_of(float x) { return uint16_t(_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(x), _MM_FROUND_TO_NEAREST_INT))); }  // no clamp
inline float float_of(uint16_t h) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h))); }
inline F zero_nan(F x) { return _mm256_and_ps(x, _mm256_cmp_ps(x, x, _CMP_ORD_Q)); }

// Eight by eight halves, transposed.
inline void transpose_halves(const uint16_t * src, size_t src_stride, uint16_t * dst, size_t dst_stride) {
    __m128i r[8], s[8];
    for (int i = 0; i < 8; ++i) r[i] = _mm_loadu_si128(reinterpret_cast<const __m128i *>(src + i * src_stride));
    for (int i = 0; i < 4; ++i) {
        s[2 * i] = _mm_unpacklo_epi16(r[2 * i], r[2 * i + 1]);
        s[2 * i + 1] = _mm_unpackhi_epi16(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
        r[4 * i] = _mm_unpacklo_epi32(s[4 * i], s[4 * i + 2]);
        r[4 * i + 1] = _mm_unpackhi_epi32(s[4 * i], s[4 * i + 2]);
        r[4 * i + 2] = _mm_unpacklo_epi32(s[4 * i + 1], s[4 * i + 3]);
        r[4 * i + 3] = _mm_unpackhi_epi32(s[4 * i + 1], s[4 * i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        _mm_storeu_si128(reinterpret_cast<__m128i *>(dst + (2 * i) * dst_stride), _mm_unpacklo_epi64(r[i], r[4 + i]));
        _mm_storeu_si128(reinterpret_cast<__m128i *>(dst + (2 * i + 1) * dst_stride), _mm_unpackhi_epi64(r[i], r[4 + i]));
    }
}

// --- code bytes -----------------------------------------------------------------------------------------------

inline B load_bytes(const uint8_t * p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)); }
inline void store_bytes(uint8_t * p, B x) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), x); }
inline B zero_bytes() { return _mm256_setzero_si256(); }
inline B splat_byte(int x) { return _mm256_set1_epi8(char(x)); }
inline B bits_and(B a, B b) { return _mm256_and_si256(a, b); }
inline B bits_or(B a, B b) { return _mm256_or_si256(a, b); }
// Shifts may carry bits across bytes: mask first or after.
template <int n> inline B shift_right(B x) { return _mm256_srli_epi16(x, n); }
template <int n> inline B shift_left(B x) { return _mm256_slli_epi16(x, n); }

// Byte r of each 32-bit lane, and four integers of 0 to 255 as the bytes of a lane.
template <int r> inline I byte_of(B x) { return _mm256_and_si256(_mm256_srli_epi32(x, 8 * r), _mm256_set1_epi32(255)); }
inline B join_bytes(I a, I b, I c, I d) {
    return _mm256_or_si256(_mm256_or_si256(a, _mm256_slli_epi32(b, 8)), _mm256_or_si256(_mm256_slli_epi32(c, 16), _mm256_slli_epi32(d, 24)));
}
// All ones in lane i where bit i is set.
inline I lanes_of(unsigned bits) {
    const I one = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(bits)), one), one);
}

// --- integer dot products: 32-bit lanes of four products each ------------------------------------------------------

inline I zero_int() { return _mm256_setzero_si256(); }
inline I splat_int(int32_t x) { return _mm256_set1_epi32(x); }

// Ends an expression: GCC would otherwise compute all products of a loop before it adds any, and spill the sums.
inline __m256i settled(__m256i x) {
    __asm__("" : "+v"(x));
    return x;
}

inline I add(I a, I b) { return _mm256_add_epi32(a, b); }

#if defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__))
#define MIXKVQ_VNNI 1
inline I dot_bytes(I s, I u, I i) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return settled(_mm256_dpbusd_epi32(s, u, i));
#else
    return settled(_mm256_dpbusd_avx_epi32(s, u, i));
#endif
}
inline I dot_words(I s, I a, I b) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return settled(_mm256_dpwssd_epi32(s, a, b));
#else
    return settled(_mm256_dpwssd_avx_epi32(s, a, b));
#endif
}
#endif

// Bytes times bytes, for codes of 2 and 3 bits. A sum holds narrow_limit(bits) products of codes and weights of -127 to 127, and half as
// many with weights of 0 to 255, before it must be widened. Without VNNI: 16-bit sums of two products of at most 127 (2^bits - 1).
using Narrow = __m256i;
inline Narrow narrow_zero() { return _mm256_setzero_si256(); }
#if MIXKVQ_VNNI
constexpr int narrow_limit(int) { return 1 << 16; }
inline Narrow dot_narrow(Narrow s, B codes, I weights) { return dot_bytes(s, codes, weights); }
inline Narrow dot_unsigned(Narrow s, B codes, I weights) { return dot_bytes(s, weights, codes); }
inline I widen(Narrow s) { return s; }
#else
constexpr int narrow_limit(int bits) { return bits == 3 ? 18 : 42; }
inline Narrow dot_narrow(Narrow s, B codes, I weights) { return settled(_mm256_add_epi16(s, _mm256_maddubs_epi16(codes, weights))); }
inline Narrow dot_unsigned(Narrow s, B codes, I weights) { return settled(_mm256_add_epi16(s, _mm256_maddubs_epi16(weights, codes))); }
inline I widen(Narrow s) { return _mm256_madd_epi16(s, _mm256_set1_epi16(1)); }
#endif

// Bytes times 16-bit weights: the codes split into even and odd bytes, the weights as (0, 2) and (1, 3).
struct Wide { __m256i even, odd; };
using WideSum = __m256i;
inline WideSum wide_zero() { return _mm256_setzero_si256(); }
inline Wide split(B codes) { return {_mm256_and_si256(codes, _mm256_set1_epi16(255)), _mm256_srli_epi16(codes, 8)}; }
inline WideSum dot_wide(WideSum s, Wide codes, I even, I odd) {
#if MIXKVQ_VNNI
    return dot_words(dot_words(s, codes.even, even), codes.odd, odd);
#else
    return settled(_mm256_add_epi32(s, _mm256_add_epi32(_mm256_madd_epi16(codes.even, even), _mm256_madd_epi16(codes.odd, odd))));
#endif
}
inline I total(WideSum s) { return s; }

// Weights of one key quad for four queries: a = channels 0 | 1, b = channels 2 | 3, four queries each.
inline void store_narrow_weights(int32_t * w, I a, I b) {
    const I byte = _mm256_set1_epi32(255);
    const I e = _mm256_or_si256(_mm256_and_si256(a, byte), _mm256_slli_epi32(_mm256_and_si256(b, byte), 16));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(w),
                     _mm_or_si128(_mm256_castsi256_si128(e), _mm_slli_epi32(_mm256_extracti128_si256(e, 1), 8)));
}
// w[0..3] even, w[4..7] odd.
inline void store_wide_weights(int32_t * w, I a, I b) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(w), _mm256_blend_epi16(a, _mm256_slli_epi32(b, 16), 0xaa));
}
// Eight tokens' weights as two quads of (even, odd); 32 tokens' weights as bytes, 0 to 255.
inline void store_wide_weights(int32_t * w, I x) {
    const I e = _mm256_blend_epi16(x, _mm256_slli_epi32(_mm256_shuffle_epi32(x, 0x4e), 16), 0xaa);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(w), _mm256_castsi256_si128(_mm256_permute4x64_epi64(e, 0x08)));
}
inline void store_narrow_weights(int32_t * w, I a, I b, I c, I d) {
    const I bytes = _mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(w), _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
}

}  // namespace
}  // namespace mixkvq
