// Softmax: logits with their mask, exponentials and their sum.
#pragma once

#include "lanes.h"

namespace mixkvq {
namespace {

inline F like(F, float x) { return splat(x); }
inline F2 like(F2, float x) { return splat2(x); }

// e^x: x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial for e^r. 0 below -87, where the result would be subnormal.
template <class T>
inline T exp(T x) {
    auto c = [&](float value) { return like(x, value); };
    const T y = min(max(x, c(-87.0f)), c(88.0f));
    const T n = round(mul(y, c(1.44269504f)));
    T r = fma(n, c(-0.693359375f), y);  // ln 2 in two parts, the first exact times n
    r = fma(n, c(2.12194440e-4f), r);
    T p = c(1.9875691500e-4f);
    p = fma(p, r, c(1.3981999507e-3f));
    p = fma(p, r, c(8.3334519073e-3f));
    p = fma(p, r, c(4.1665795894e-2f));
    p = fma(p, r, c(1.6666665459e-1f));
    p = fma(p, r, c(5.0000001201e-1f));
    p = add(fma(mul(r, r), p, r), c(1.0f));
    return zero_below(mul(p, exp2_whole(n)), x, c(-87.0f));
}

// tanh |x| = (1 - e) / (1 + e) with e = exp(-2 |x|).
template <class T>
inline T tanh(T x) {
    const T one = like(x, 1.0f), e = exp(mul(abs(x), like(x, -2.0f)));
    return with_sign(div(sub(one, e), add(one, e)), x);
}

float logits(float * x, int n, float scale, float softcap, const float * mask, float slope) {
    F2 top = splat2(-INFINITY);
    auto one = [&](F2 s, F2 bias) {
        s = mul(s, splat2(softcap > 0 ? scale / softcap : scale));
        if (softcap > 0) s = mul(tanh(s), splat2(softcap));
        return fma(bias, splat2(slope), s);
    };
    int i = 0;
    for (; i + kPair <= n; i += kPair) {
        const F2 s = one(load2(x + i), mask ? load2(mask + i) : splat2(0.0f));
        store(x + i, s);
        top = max(top, s);
    }
    if (i < n) {
        float s[kPair], bias[kPair];
        for (int j = 0; j < kPair; ++j) {
            s[j] = i + j < n ? x[i + j] : 0.0f;
            bias[j] = i + j >= n ? -INFINITY : mask ? mask[i + j] : 0.0f;
        }
        const F2 y = one(load2(s), load2(bias));
        store(s, y);
        top = max(top, y);
        for (int j = i; j < n; ++j) x[j] = s[j - i];
    }
    return highest(top);
}

float exp_sum(float * x, int n, float max) {
    F2 total = splat2(0.0f);
    int i = 0;
    for (; i + kPair <= n; i += kPair) {
        const F2 y = exp(sub(load2(x + i), splat2(max)));
        store(x + i, y);
        total = add(total, y);
    }
    if (i < n) {
        float rest[kPair];
        for (int j = 0; j < kPair; ++j) rest[j] = i + j < n ? x[i + j] : -INFINITY;
        const F2 y = exp(sub(load2(rest), splat2(max)));
        store(rest, y);
        total = add(total, y);
        for (int j = i; j < n; ++j) x[j] = rest[j - i];
    }
    return sum(total);
}

}  // namespace
}  // namespace mixkvq
