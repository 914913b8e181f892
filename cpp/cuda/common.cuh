// What the device code of pack.cu shares with whoever reads or writes records on the GPU: halves, bytes of means and scales, places of codes.
// The same numbers as cpp/kernels/scalar.cpp, the same layout as cpp/include/mixkvq/page.h.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "mixkvq/cuda.h"
#include "record.cuh"

namespace mixkvq::cuda {

// --- numbers --------------------------------------------------------------------------------------------------

__device__ inline float half_to_float(half h) { return __half2float(__ushort_as_half(h)); }

// Nearest, ties to even; clamps to +-65504; NaN becomes 0.
__device__ inline half float_to_half(float x) {
    return x == x ? __half_as_ushort(__float2half_rn(fminf(fmaxf(x, -65504.0f), 65504.0f))) : half(0);
}

// The mean of a rotated dimension: the upper byte of a half.
__device__ inline uint8_t mean_byte(float x) {
    const int h = float_to_half(x);
    return uint8_t((h & 0x8000) >> 8 | min(((h & 0x7fff) + 0x80) >> 8, 0x7b));
}
__device__ inline float mean_of(uint8_t byte) { return half_to_float(half(byte << 8)); }

// The scale of a rotated token: a positive half without its sign and its last seven bits.
__device__ inline uint8_t scale_byte(float x, int rounding) { return uint8_t(min((float_to_half(x) + rounding) >> 7, 0xf7)); }
__device__ inline float scale_of(uint8_t byte) { return half_to_float(half(byte << 7)); }

// --- layout ---------------------------------------------------------------------------------------------------

// Bits of the i-th quad of coded channels, and where its codes are.
struct KeyQuad {
    int bits;
    uint32_t offset;

    __device__ KeyQuad(const KeyFormat & f, int i) : bits(8), offset(f.offset8()) {
        const int quads[3] = {f.n8 / 4, f.n4 / 4, f.n3 / 4};
        const int next[3] = {4, 3, 2};
        for (int tier = 0; tier < 3 && i >= quads[tier]; ++tier) {
            i -= quads[tier];
            offset += 64 * bits * quads[tier];
            bits = next[tier];
        }
        offset += 64 * bits * i;
    }
};

// --- codes ----------------------------------------------------------------------------------------------------

// A word holds the codes of a key quad at one token, or of a value dimension at four tokens, a byte each. Eight words make a chunk: tokens
// t, t + 8, ... of 64 for keys (`row` = 8 words), token quads of 32 tokens for values (`row` = a word per dimension). `high` is the
// chunk's word of top bits, for 3 bits only. As in cpp/kernels/codes.h.
__device__ inline int low_bits(int bits) { return bits == 3 ? 2 : bits; }

__device__ inline void store_codes(int bits, const uint32_t (&code)[8], uint32_t * low, int row, uint32_t * high) {
    if (bits == 8) {
#pragma unroll
        for (int k = 0; k < 8; ++k) low[k * row] = code[k];
    } else if (bits == 4) {
#pragma unroll
        for (int k = 0; k < 8; k += 2) low[k / 2 * row] = code[k] | code[k + 1] << 4;
    } else {
        const uint32_t two = 0x03030303u;
#pragma unroll
        for (int k = 0; k < 8; k += 4) {
            low[k / 4 * row] = (code[k] & two) | (code[k + 1] & two) << 2 | (code[k + 2] & two) << 4 | (code[k + 3] & two) << 6;
        }
        if (bits == 3) {
            uint32_t top = 0;
#pragma unroll
            for (int k = 0; k < 8; ++k) top |= (code[k] >> 2 & 0x01010101u) << k;
            *high = top;
        }
    }
}

__device__ inline uint32_t load_codes(int bits, int k, const uint32_t * low, int row, const uint32_t * high) {
    if (bits == 8) return low[k * row];
    if (bits == 4) return low[k / 2 * row] >> k % 2 * 4 & 0x0f0f0f0fu;
    const uint32_t code = low[k / 4 * row] >> k % 4 * 2 & 0x03030303u;
    return bits == 2 ? code : code | (*high >> k & 0x01010101u) << 2;
}

}  // namespace mixkvq::cuda
