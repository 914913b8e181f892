// The page format: geometry of key and value records. docs/format.md is the specification.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define MIXKVQ_BOTH __host__ __device__  // for kernels on GPUs as well
#else
#define MIXKVQ_BOTH
#endif

namespace mixkvq {

constexpr int kPageCells   = 128;  // cells per page
constexpr int kMinHeadSize = 32;
constexpr int kMaxHeadSize = 256;
constexpr int kRecordAlign = 64;
constexpr int kFormatVersion = 3;

// A key format: how many channels of a head sit in each tier.
struct KeyFormat {
    int head_size = 0;  // D
    int n16 = 0, n8 = 0, n4 = 0, n3 = 0, n2 = 0;
    int group = kPageCells;  // tokens per scale and minimum: 32, 64 or 128

    MIXKVQ_BOTH int n_groups() const { return group == 128 ? 1 : group == 64 ? 2 : 4; }
    MIXKVQ_BOTH int n_coded() const { return head_size - n16; }

    MIXKVQ_BOTH size_t offset16() const { return 0; }
    MIXKVQ_BOTH size_t offset8() const { return size_t(256) * n16; }
    MIXKVQ_BOTH size_t offset4() const { return offset8() + size_t(128) * n8; }
    MIXKVQ_BOTH size_t offset3() const { return offset4() + size_t(64) * n4; }
    MIXKVQ_BOTH size_t offset2() const { return offset3() + size_t(48) * n3; }
    MIXKVQ_BOTH size_t offset_scale() const { return offset2() + size_t(32) * n2; }
    MIXKVQ_BOTH size_t offset_min() const { return offset_scale() + size_t(2) * n_coded() * n_groups(); }
    MIXKVQ_BOTH size_t offset_order() const { return offset_min() + size_t(2) * n_coded() * n_groups(); }
    MIXKVQ_BOTH size_t record_bytes() const { return (offset_order() + head_size + kRecordAlign - 1) / kRecordAlign * kRecordAlign; }

    // nullptr if the format is one this version serves, else what is wrong with it.
    const char * error() const;
};

// A value format. group 0: rotated, a mean per dimension and a scale per token; 32 or 64: minimum and scale per group of dimensions.
struct ValueFormat {
    int head_size = 0;  // Dv
    int bits = 0;       // 2, 3, 4 or 8
    int group = 0;

    MIXKVQ_BOTH bool rotated() const { return group == 0; }
    MIXKVQ_BOTH int n_groups() const { return group == 0 ? 1 : (head_size + group - 1) / group; }
    // Size of a Walsh-Hadamard block: the largest power of two that divides the head size.
    MIXKVQ_BOTH int rotation_block() const { return head_size & -head_size; }

    MIXKVQ_BOTH size_t offset_high() const { return size_t(32) * head_size; }  // 3 bits only: the plane of top bits
    MIXKVQ_BOTH size_t offset_scale() const { return size_t(16) * head_size * bits; }
    MIXKVQ_BOTH size_t offset_mean() const { return offset_scale() + kPageCells; }                             // rotated
    MIXKVQ_BOTH size_t offset_min() const { return offset_scale() + size_t(2) * kPageCells * n_groups(); }  // grouped
    MIXKVQ_BOTH size_t record_bytes() const {
        const size_t end = rotated() ? offset_mean() + head_size : offset_min() + size_t(2) * kPageCells * n_groups();
        return (end + kRecordAlign - 1) / kRecordAlign * kRecordAlign;
    }

    const char * error() const;
};

// Best uniform step for a unit Gaussian at 2, 3 and 4 bits.
MIXKVQ_BOTH inline float gaussian_step(int bits) { return bits == 2 ? 0.9957f : bits == 3 ? 0.5860f : 0.3352f; }

// How rotated rows that come from a record are told from others: docs/format.md.
constexpr float kLeastMean = 0.0625f;              // smaller means, beside the root mean square of the rows, are 0
constexpr int kSample = 8, kSampleDims = 32;       // rows of a page that are looked at first, and how far
constexpr int kMeanRounds = 4;                     // with which the means of a record are looked for
constexpr int kScalesBelow = 5;                    // bytes below and above the best scale of a row between which its own must lie
MIXKVQ_BOTH inline int scales_above(int bits) { return bits == 2 ? 9 : bits == 3 ? 15 : bits == 4 ? 21 : 2; }

// Which of the 128 cells of a page hold a token.
struct CellMask {
    uint64_t word[2] = {0, 0};

    MIXKVQ_BOTH bool test(int i) const { return (word[i >> 6] >> (i & 63)) & 1; }
    void set(int i) { word[i >> 6] |= uint64_t(1) << (i & 63); }
    MIXKVQ_BOTH bool full() const { return (word[0] & word[1]) == ~uint64_t(0); }
    MIXKVQ_BOTH bool empty() const { return (word[0] | word[1]) == 0; }
    static CellMask all() { return CellMask{{~uint64_t(0), ~uint64_t(0)}}; }
};

}  // namespace mixkvq
