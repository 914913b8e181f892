// Pages for tests of kernels: numbers of every kind, masks of valid cells, formats.
#pragma once

#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "mixkvq/kernels.h"

using namespace mixkvq;

inline std::mt19937 rng(20240607);
constexpr int kHeadSizes[] = {32, 40, 64, 72, 80, 96, 128, 192, 256};

inline float gauss() { return std::normal_distribution<float>()(rng); }
inline int below(int n) { return int(rng() % unsigned(n)); }

enum class Data { gaussian, outliers, zeros, constant, subnormal, extreme, ties, signed_zeros, count };

inline const char * data_name(Data d) {
    const char * names[] = {"gaussian", "outliers", "zeros", "constant", "subnormal", "extreme", "ties", "signed_zeros"};
    return names[int(d)];
}

inline std::vector<half> make_rows(const Kernels & k, Data data, int head_size, size_t stride) {
    std::vector<half> rows(kPageCells * stride, 0x7e00);  // NaN where a kernel must not look
    std::vector<float> offset(head_size), spread(head_size);
    for (int d = 0; d < head_size; ++d) {
        offset[d] = gauss();
        spread[d] = data == Data::outliers && below(8) == 0 ? 30.0f : std::exp(0.5f * gauss());
    }
    for (int t = 0; t < kPageCells; ++t) {
        for (int d = 0; d < head_size; ++d) {
            float x = 0;
            half h = 0;
            switch (data) {
                case Data::constant: x = offset[d]; break;
                case Data::subnormal: x = float(below(64) - 32) * 5.9604645e-8f; break;
                case Data::extreme: x = below(3) == 0 ? 65504.0f : below(2) ? -65504.0f : gauss(); break;
                case Data::ties: x = 0.5f * float(below(15) - 7); break;  // many equal salience values and half steps
                case Data::signed_zeros: x = below(2) ? 0.0f : -0.0f; break;
                case Data::zeros: break;
                default: x = offset[d] + spread[d] * gauss();
            }
            k.to_half(&x, &h, 1);
            rows[t * stride + d] = h;
        }
    }
    return rows;
}

inline CellMask make_mask(int kind) {
    CellMask m = CellMask::all();
    if (kind == 1) m = CellMask{{0x0123456789abcdefull, 0xfffull}};
    if (kind == 2) m = CellMask{{0, 0x80}};
    if (kind == 3) m = CellMask{};
    if (kind == 4) m = CellMask{{~uint64_t(0) << 1, ~uint64_t(0) >> 1}};
    return m;
}

inline std::vector<KeyFormat> key_formats(int d) {
    std::vector<KeyFormat> formats;
    auto form = [&](int n16, int n8, int n4, int n3, int group) {
        KeyFormat f;
        f.head_size = d;
        f.n16 = n16; f.n8 = n8; f.n4 = n4; f.n3 = n3; f.n2 = d - n16 - n8 - n4 - n3;
        f.group = group;
        formats.push_back(f);
    };
    for (int group : {32, 64, 128}) {
        form(0, 4, d / 16 * 4, 0, group);
        form(4, 4, 8, 4, group);
        form(8, 4, 0, d - 20, group);
    }
    form(d, 0, 0, 0, 128);
    form(0, d, 0, 0, 128);
    form(0, 0, d, 0, 32);
    form(0, 0, 0, d, 128);
    form(0, 0, 0, 0, 64);
    return formats;
}

inline std::vector<ValueFormat> value_formats(int d) {
    std::vector<ValueFormat> formats;
    for (int bits : {2, 3, 4, 8}) {
        for (int group : {0, 32, 64}) {
            ValueFormat f;
            f.head_size = d; f.bits = bits; f.group = group;
            formats.push_back(f);
        }
    }
    return formats;
}

inline std::string describe(const KeyFormat & f) {
    char s[120];
    std::snprintf(s, sizeof s, "D=%d tiers %d,%d,%d,%d,%d group %d", f.head_size, f.n16, f.n8, f.n4, f.n3, f.n2, f.group);
    return s;
}
inline std::string describe(const ValueFormat & f) {
    char s[80];
    std::snprintf(s, sizeof s, "Dv=%d bits %d group %d", f.head_size, f.bits, f.group);
    return s;
}
