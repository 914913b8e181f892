// F16 numbers from F32 and back.
#pragma once

#include "lanes.h"

namespace mixkvq {
namespace {

void to_half(const float * src, half * dst, int n) {
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) store_half(dst + i, zero_nan(load(src + i)));
    if (i == n) return;
    float x[kLanes] = {};
    half h[kLanes];
    for (int j = i; j < n; ++j) x[j - i] = src[j];
    store_half(h, zero_nan(load(x)));
    for (int j = i; j < n; ++j) dst[j] = h[j - i];
}

void from_half(const half * src, float * dst, int n) {
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) store(dst + i, load_half(src + i));
    if (i == n) return;
    const int rest = n % kLanes;
    half h[kLanes] = {};
    float x[kLanes];
    for (int j = 0; j < rest; ++j) h[j] = src[i + j];
    store(x, load_half(h));
    for (int j = 0; j < rest; ++j) dst[i + j] = x[j];
}

}  // namespace
}  // namespace mixkvq
