// pair.h for AVX-512: sixteen lanes are one register. Included after vec_avx2.h, in place of pair.h.
#pragma once

#include "codes.h"

namespace mixkvq {
namespace {

// 32 registers: eight sums for four queries, with codes, masks and a weight beside them.
constexpr int kScorePairs = 2;
constexpr int kValuePairs = 2;

using F2 = __m512;
using I2 = __m512i;
using B2 = __m512i;

inline F2 load2(const float * p) { return _mm512_loadu_ps(p); }
inline F2 load_half2(const uint16_t * p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))); }
inline void store(float * p, F2 x) { _mm512_storeu_ps(p, x); }
inline F2 splat2(float x) { return _mm512_set1_ps(x); }
inline F2 join(F a, F b) { return _mm512_insertf32x8(_mm512_castps256_ps512(a), b, 1); }
inline F2 twice(F x) { return _mm512_broadcast_f32x8(x); }
inline F2 quad(const float * p) {
    const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(p)), lanes);
}
inline F first(F2 x) { return _mm512_castps512_ps256(x); }
inline F second(F2 x) { return _mm512_extractf32x8_ps(x, 1); }
inline F2 add(F2 x, F2 y) { return _mm512_add_ps(x, y); }
inline I2 add(I2 x, I2 y) { return _mm512_add_epi32(x, y); }
inline F2 sub(F2 x, F2 y) { return _mm512_sub_ps(x, y); }
inline F2 mul(F2 x, F2 y) { return _mm512_mul_ps(x, y); }
inline F2 div(F2 x, F2 y) { return _mm512_div_ps(x, y); }
inline F2 fma(F2 x, F2 y, F2 z) { return _mm512_fmadd_ps(x, y, z); }
inline F2 min(F2 x, F2 y) { return _mm512_min_ps(x, y); }
inline F2 max(F2 x, F2 y) { return _mm512_max_ps(x, y); }
inline F2 abs(F2 x) { return _mm512_andnot_ps(_mm512_set1_ps(-0.0f), x); }
inline F2 round(F2 x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F2 exp2_whole(F2 n) { return _mm512_scalef_ps(_mm512_set1_ps(1.0f), n); }
inline F2 zero_below(F2 x, F2 probe, F2 limit) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(probe, limit, _CMP_GE_OQ), x); }
inline F2 with_sign(F2 x, F2 sign) { return _mm512_or_ps(abs(x), _mm512_and_ps(sign, _mm512_set1_ps(-0.0f))); }
inline I2 to_int(F2 x) { return _mm512_cvtps_epi32(x); }
inline F2 to_float(I2 x) { return _mm512_cvtepi32_ps(x); }
inline float sum(F2 x) { return sum(add(first(x), second(x))); }
inline float highest(F2 x) { return highest(max(first(x), second(x))); }

// --- codes ----------------------------------------------------------------------------------------------------

inline B2 load_64(const uint8_t * p) { return _mm512_loadu_si512(p); }
inline B2 load_twice(const uint8_t * p) { return _mm512_broadcast_i64x4(load_bytes(p)); }
// Bit by bit: (code & 3) | (top & 4).
inline B2 with_top(B2 code, B2 top) {
    return _mm512_ternarylogic_epi32(_mm512_and_si512(code, _mm512_set1_epi8(3)), top, _mm512_set1_epi8(4), 0xf8);
}
// A constant for each half.
template <int a, int b> inline __m512i words() { return _mm512_inserti64x4(_mm512_set1_epi16(a), _mm256_set1_epi16(b), 1); }
template <int a, int b> inline __m512i dwords() { return _mm512_inserti64x4(_mm512_set1_epi32(a), _mm256_set1_epi32(b), 1); }

// Code registers k and k + 1 of a chunk (keys, whose rows of 32 bytes are adjacent): the same bytes twice, each half with its own shift.
template <int bits, int k>
inline B2 load_codes_along(const uint8_t * low, size_t, const uint8_t * high) {
    static_assert(k % 2 == 0, "a pair");
    if constexpr (bits == 8) return load_64(low + k * 32);
    if constexpr (bits == 4) return _mm512_and_si512(_mm512_srlv_epi16(load_twice(low + k / 2 * 32), words<0, 4>()), _mm512_set1_epi8(15));
    const B2 code = _mm512_srlv_epi16(load_twice(low + k / 4 * 32), words<k % 4 * 2, k % 4 * 2 + 2>());
    if constexpr (bits == 2) return _mm512_and_si512(code, _mm512_set1_epi8(3));
    return with_top(code, _mm512_rorv_epi32(load_twice(high), dwords<(k + 30) % 32, (k + 31) % 32>()));
}

// Register k of sixteen dimensions (values), or of eight with zeros beside them.
template <bool both>
inline B2 load_beside(const uint8_t * p) {
    if constexpr (both) return load_64(p);
    return _mm512_zextsi256_si512(load_bytes(p));
}
template <int bits, int k, bool both>
inline B2 load_codes_beside(const uint8_t * low, size_t row, const uint8_t * high) {
    if constexpr (bits == 8) return load_beside<both>(low + k * row);
    if constexpr (bits == 4) return _mm512_and_si512(_mm512_srli_epi16(load_beside<both>(low + k / 2 * row), k % 2 * 4), _mm512_set1_epi8(15));
    const B2 code = _mm512_srli_epi16(load_beside<both>(low + k / 4 * row), k % 4 * 2);
    if constexpr (bits == 2) return _mm512_and_si512(code, _mm512_set1_epi8(3));
    return with_top(code, _mm512_ror_epi32(load_beside<both>(high), (k + 30) % 32));
}

// --- dot products: as in vec_avx2.h ---------------------------------------------------------------------------

using Weight = __m512i;
inline Weight weight_of(int32_t x) { return _mm512_set1_epi32(x); }

// Keys: one quad for four queries.
inline void store_narrow_weights(int32_t * w, I2 x) {
    const __m128i by_query = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(w), _mm_shuffle_epi8(_mm512_cvtepi32_epi8(x), by_query));
}
inline void store_wide_weights(int32_t * w, I2 x) {
    const __m256i by_query = _mm256_setr_epi16(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(w), _mm256_permutexvar_epi16(by_query, _mm512_cvtepi32_epi16(x)));
}
// Values: eight tokens each of two chunks; 32 tokens each of two chunks that follow each other.
inline void store_wide_weights(int32_t * v, int32_t * w, I2 x) {
    const __m256i pairs = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
    const __m256i y = _mm256_shuffle_epi8(_mm512_cvtepi32_epi16(x), pairs);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(v), _mm256_castsi256_si128(y));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(w), _mm256_extracti128_si256(y, 1));
}
inline void store_narrow_weights(int32_t * w, I2 a, I2 b, I2 c, I2 d) {
    const __m512i bytes = _mm512_packus_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
    const __m512i order = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    _mm512_storeu_si512(w, _mm512_permutexvar_epi32(order, bytes));
}

inline __m512i settled(__m512i x) {
    __asm__("" : "+v"(x));
    return x;
}

struct Narrow2 { __m512i sum; };
inline Narrow2 narrow_zero2() { return {_mm512_setzero_si512()}; }

struct Wide2 { __m512i even, odd; };
using WideSum2 = __m512i;
inline WideSum2 wide_zero2() { return _mm512_setzero_si512(); }
inline Wide2 split(B2 codes) { return {_mm512_and_si512(codes, _mm512_set1_epi16(255)), _mm512_srli_epi16(codes, 8)}; }
inline I2 widen(WideSum2 s) { return s; }

#if MIXKVQ_VNNI
inline Narrow2 dot_narrow(Narrow2 s, B2 codes, Weight w) { return {settled(_mm512_dpbusd_epi32(s.sum, codes, w))}; }
inline Narrow2 dot_unsigned(Narrow2 s, B2 codes, Weight w) { return {settled(_mm512_dpbusd_epi32(s.sum, w, codes))}; }
inline I2 widen(Narrow2 s) { return s.sum; }
inline WideSum2 dot_wide(WideSum2 s, Wide2 codes, Weight even, Weight odd) {
    return settled(_mm512_dpwssd_epi32(settled(_mm512_dpwssd_epi32(s, codes.even, even)), codes.odd, odd));
}
#else
inline Narrow2 dot_narrow(Narrow2 s, B2 codes, Weight w) { return {settled(_mm512_add_epi16(s.sum, _mm512_maddubs_epi16(codes, w)))}; }
inline Narrow2 dot_unsigned(Narrow2 s, B2 codes, Weight w) { return {settled(_mm512_add_epi16(s.sum, _mm512_maddubs_epi16(w, codes)))}; }
inline I2 widen(Narrow2 s) { return _mm512_madd_epi16(s.sum, _mm512_set1_epi16(1)); }
inline WideSum2 dot_wide(WideSum2 s, Wide2 codes, Weight even, Weight odd) {
    return settled(_mm512_add_epi32(s, _mm512_add_epi32(_mm512_madd_epi16(codes.even, even), _mm512_madd_epi16(codes.odd, odd))));
}
#endif

}  // namespace
}  // namespace mixkvq
