// Halves on the CPU, see cuda_runtime.h: rounded to nearest even after every operation, as the GPU does.
#pragma once

#include "cuda_runtime.h"

using __half = _Float16;
struct alignas(4) __half2 {
    __half x, y;
};

inline __half __float2half_rn(float x) { return __half(x); }
inline float __half2float(__half x) { return float(x); }
inline unsigned short __half_as_ushort(__half x) { return bits_of<unsigned short>(x); }
inline __half __ushort_as_half(unsigned short x) { return bits_of<__half>(x); }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __float2half2_rn(float x) { return {__half(x), __half(x)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline float2 __half22float2(__half2 x) { return {float(x.x), float(x.y)}; }
inline __half2 __hmul2(__half2 a, __half2 b) { return {__half(float(a.x) * float(b.x)), __half(float(a.y) * float(b.y))}; }
inline __half2 __hsub2(__half2 a, __half2 b) { return {__half(float(a.x) - float(b.x)), __half(float(a.y) - float(b.y))}; }
// A product of halves is exact in double, and so is the sum but for what no half could show.
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
    return {__half(double(a.x) * double(b.x) + double(c.x)), __half(double(a.y) * double(b.y) + double(c.y))};
}
inline __half2 __hmin2(__half2 a, __half2 b) { return {std::fmin(float(a.x), float(b.x)) == float(a.x) ? a.x : b.x, std::fmin(float(a.y), float(b.y)) == float(a.y) ? a.y : b.y}; }
inline __half2 __hmax2(__half2 a, __half2 b) { return {std::fmax(float(a.x), float(b.x)) == float(a.x) ? a.x : b.x, std::fmax(float(a.y), float(b.y)) == float(a.y) ? a.y : b.y}; }
