// The rotation of values and the best scale of a rotated row.
#pragma once

#include "lanes.h"

namespace mixkvq {
namespace {

void scale(float * x, int n, float s) {
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) store(x + i, mul(load(x + i), splat(s)));
    for (; i < n; ++i) x[i] *= s;
}

// Distances 1, 2 and 4 lie inside a register (a block has at least eight lanes), the rest between registers.
void rotate(float * x, int head_size, int block) {
    // 1 / sqrt(block) in single precision: 1.0f / sqrtf(block).
    const float norm = block == 8 ? 1.0f / 2.82842708f : block == 16 ? 0.25f : block == 32 ? 1.0f / 5.65685415f
                     : block == 64 ? 0.125f : block == 128 ? 1.0f / 11.3137083f : 0.0625f;
    const F s = splat(norm);
    for (int i = 0; i < head_size; i += kLanes) {
        const F y = butterfly4(butterfly2(butterfly1(load(x + i))));
        store(x + i, block == kLanes ? mul(y, s) : y);
    }
    int h = kLanes;
    for (; 4 * h <= block; h *= 4) {  // two levels in one pass
        const bool last = 4 * h == block;
        for (int i = 0; i < head_size; i += 4 * h) {
            for (int j = i; j < i + h; j += kLanes) {
                const F a = load(x + j), b = load(x + j + h), c = load(x + j + 2 * h), d = load(x + j + 3 * h);
                const F p = add(a, b), q = sub(a, b), r = add(c, d), t = sub(c, d);
                const F w = add(p, r), y = add(q, t), u = sub(p, r), v = sub(q, t);
                store(x + j, last ? mul(w, s) : w);
                store(x + j + h, last ? mul(y, s) : y);
                store(x + j + 2 * h, last ? mul(u, s) : u);
                store(x + j + 3 * h, last ? mul(v, s) : v);
            }
        }
    }
    for (; h < block; h *= 2) {
        for (int i = 0; i < head_size; i += 2 * h) {
            for (int j = i; j < i + h; j += kLanes) {
                const F a = load(x + j), b = load(x + j + h);
                store(x + j, mul(add(a, b), s));
                store(x + j + h, mul(sub(a, b), s));
            }
        }
    }
}

// Means and scales of rotated values are halves cut down to a byte: scalar.cpp says how.
constexpr int kMeanShift = 8, kScaleShift = 7;

uint8_t scale_byte(float x, int rounding) {
    const int byte = (int(half_of(x)) + rounding) >> kScaleShift;
    return uint8_t(byte < 0xf7 ? byte : 0xf7);
}

// The sum of eight lanes in the order of the format, and a square root.
float sum_of_lanes(F x) {
    float l[kLanes];
    store(l, x);
    return ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7]));
}
float root(float x) {
    float l[kLanes] = {x};
    store(l, sqrt(load(l)));
    return l[0];
}

uint8_t rotated_scale(const ValueFormat & f, const float * y) {
    F s = splat(0.0f);
    if (f.bits == 8) {
        for (int d = 0; d < f.head_size; d += kLanes) s = max(s, abs(load(y + d)));
        return scale_byte(highest(s) / 127.5f, 0x7f);  // upwards: nothing is cut off
    }
    for (int d = 0; d < f.head_size; d += kLanes) s = add(s, mul(load(y + d), load(y + d)));
    return scale_byte(root(sum_of_lanes(s) / float(f.head_size)) * gaussian_step(f.bits), 0x40);
}

}  // namespace
}  // namespace mixkvq
