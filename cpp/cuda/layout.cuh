// Which lane of a warp reads which codes, and which tokens and dimensions its tensor-core fragments then hold. Free of CUDA's headers: plain C++
// can run these functions, and tests/native/test_cuda_attention.cpp does, against the scalar kernels.
//
// Fragments (PTX ISA), lane = 4 * n8 + j. mma.m16n8k16 on halves: A holds rows n8 and n8 + 8 and columns 2j, 2j + 1, 2j + 8, 2j + 9; B the same four
// as its rows, column n8; C rows n8 and n8 + 8, columns 2j and 2j + 1. On bytes (m16n8k32) a register holds columns 4j to 4j + 3, or 16 more; C is the
// same. The order of the columns of A is free as long as the rows of B have the same.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MIXKVQ_BOTH __host__ __device__ __forceinline__
#else
#define MIXKVQ_BOTH inline
#endif

namespace mixkvq::cuda {

// Four codes of three bits, a byte each: the lower two bits at `shift`, the top bit above them in `top`.
MIXKVQ_BOTH uint32_t with_top(uint32_t low, uint32_t top, int shift) {
    return ((low & 0x03030303u << shift) | (top & ~(0x03030303u << shift))) & 0x07070707u << shift;
}

// 16 codes that lie together: four bytes (channels of a quad, or tokens of a quad) at four places s.
template <int bits>
struct Codes {
    static constexpr int kWords = bits == 8 ? 4 : bits == 2 ? 1 : 2;
    uint32_t word[kWords];  // 3 bits: low plane, plane of top bits (shifted so that the lowest four bits of a byte are those of s = 0 to 3)

    // The four bytes of place s as integer tensor cores read them. Those of odd places are kTimes times as large: that spares shifts.
    static constexpr int kTimes = bits == 8 ? 1 : 4;
    MIXKVQ_BOTH uint32_t bytes(int s) const {
        if (bits == 8) return word[s % kWords];
        if (bits == 4) return s % 2 ? (word[s / 2 % kWords] >> 2) & 0x3c3c3c3cu : word[s / 2 % kWords] & 0x0f0f0f0fu;
        const uint32_t low = s < 2 ? word[0] : word[0] >> 4, shift = s % 2 ? 2 : 0;
        if (bits == 2) return low & 0x03030303u << shift;
        const uint32_t top = s == 2 ? word[kWords - 1] : s == 0 ? word[kWords - 1] << 2 : s == 1 ? word[kWords - 1] << 3 : word[kWords - 1] << 1;
        return with_top(low, top, shift);
    }
    // Bytes 0 and 2, and 1 and 3, in the lowest bits of halves: as such a code is a subnormal, code * 2^-24, which tensor cores multiply exactly.
    MIXKVQ_BOTH void plain(int s, uint32_t & even, uint32_t & odd) const {
        const uint32_t v = at(s), mask = ((1u << bits) - 1) * 0x00010001u;
        even = v & mask;
        odd = (v >> 8) & mask;
    }

private:
    MIXKVQ_BOTH uint32_t at(int s) const {
        if (bits == 8) return word[s % kWords];
        if (bits == 4) return word[s / 2 % kWords] >> 4 * (s % 2);
        const uint32_t low = word[0] >> 2 * s;
        if (bits == 2) return low;
        const uint32_t top = s < 2 ? word[kWords - 1] << (2 - s) : word[kWords - 1] >> (s - 2);
        return (low & 0x03030303u) | (top & ~0x03030303u);
    }
};

// --- keys, decoding -------------------------------------------------------------------------------------------
// A lane reads 16 bytes at a time of the quad 4 * step + j: words i = 0 to 3, tokens key_token(n8, i, s).

MIXKVQ_BOTH int key_token(int n8, int i, int s) { return 32 * (n8 >> 1) + 8 * s + 4 * (n8 & 1) + i; }

// Which 16 bytes of a quad are word w of the Codes of i = 0 to 3.
MIXKVQ_BOTH int key_chunk(int bits, int n8, int w) {
    switch (bits) {
        case 8: return 8 * (n8 >> 1) + 2 * w + (n8 & 1);
        case 4: return 4 * (n8 >> 1) + 2 * w + (n8 & 1);
        case 3: return w == 0 ? n8 : 8 + 2 * (n8 >> 2) + (n8 & 1);
        default: return n8;
    }
}
MIXKVQ_BOTH int key_top_shift(int n8) { return 4 * ((n8 >> 1) & 1); }

// --- values, decoding -----------------------------------------------------------------------------------------
// A lane reads the words of dimensions value_dim(n8, b, 0) to (.., 3) for the 16 tokens value_token(j, c, s, byte).

MIXKVQ_BOTH int value_token(int j, int c, int s, int byte) { return 32 * j + 16 * c + 4 * s + byte; }
MIXKVQ_BOTH int value_dim(int n8, int b, int i) { return 32 * b + 4 * n8 + i; }

// The row of words (Dv words each) that is word w of the Codes; of 3 bits the second word lies in the plane of top bits, shifted by 4c.
MIXKVQ_BOTH int value_row(int bits, int j, int c, int w) {
    const int run = 2 * j + c;
    switch (bits) {
        case 8: return 4 * run + w;
        case 4: return 2 * run + w;
        case 3: return w == 0 ? run : j;
        default: return run;
    }
}

// --- decoding, what goes from scores to weights ---------------------------------------------------------------
// A number x of 16 bits is two signed bytes, 256 high + low, in columns 2q and 2q + 1 of B: query q's. A lane has scores of query j; it writes the
// weights of four tokens key_token(n8, 0..3, s) as a word of high and a word of low bytes, and reads word s of the run of 16 bytes that has
// its column n8 of tokens value_token(j, s >> 1, 2 * (s & 1) + odd, 0..3). Runs are exchanged within 128 bytes for the sake of the banks.

MIXKVQ_BOTH int weight_run_written(int n8, int j, int low) { return (8 * n8 + 2 * j + low) ^ n8; }
MIXKVQ_BOTH int weight_run_read(int n8, int j, int odd) { return (16 * j + 8 * odd + n8) ^ (2 * j + odd); }

// --- tiles of 64 tokens, prefill ------------------------------------------------------------------------------
// Keys and values stand in shared memory dimension by dimension; tokens in an order in which four that come from one word are neighbours.

constexpr int kTileCells = 64;

MIXKVQ_BOTH int tile_token(int column) { return (column & 32) + 8 * (column & 3) + ((column >> 2) & 7); }
MIXKVQ_BOTH int tile_column(int token) { return (token & 32) + 4 * (token & 7) + ((token >> 3) & 3); }

}  // namespace mixkvq::cuda
