// The kernel table: every routine an instruction set may accelerate. Buffers belong to the caller; kernels neither
// allocate nor keep state, and any number of threads may call them at once.
//
// Pack and unpack are byte-exact across implementations. Scores and weighted sums are not: their tolerance is stated
// in tests/native/test_kernels.cpp.
#pragma once

#include "mixkvq/isa.h"
#include "mixkvq/page.h"

namespace mixkvq {

using half = uint16_t;  // IEEE binary16 bits

struct Kernels {
    Isa isa;

    // Conversion of n numbers. to_half rounds to nearest even, clamps to +-65504 and turns NaN into 0.
    void (*to_half)(const float * src, half * dst, int n);
    void (*from_half)(const half * src, float * dst, int n);

    // One head of a page. `rows` is the first cell's head vector, `stride` the distance between cells in halfs.
    // `importance` is I_d, head_size floats (>= 0). `record` has record_bytes() bytes, 64-byte aligned.
    void (*pack_keys)(const KeyFormat & f, const half * rows, size_t stride, const CellMask & valid, const float * importance, uint8_t * record);
    void (*unpack_keys)(const KeyFormat & f, const uint8_t * record, half * rows, size_t stride);
    void (*pack_values)(const ValueFormat & f, const half * rows, size_t stride, const CellMask & valid, uint8_t * record);
    void (*unpack_values)(const ValueFormat & f, const uint8_t * record, half * rows, size_t stride);

    // scores[i * 128 + t] = <q_i, key t> for n queries q_i = q + i * head_size and the 128 cells of a page.
    // `scratch` has scratch_floats(head_size) floats, 64-byte aligned. `next` is the record of the same format that will be read after this
    // one, or nullptr: its bytes are fetched meanwhile.
    void (*scores_packed)(const KeyFormat & f, const uint8_t * record, const uint8_t * next, const float * q, int n, float * scores, float * scratch);
    // The same over F16 rows; only the first n_cells scores are written.
    void (*scores_half)(int head_size, const half * rows, size_t stride, int n_cells, const float * q, int n, float * scores, float * scratch);

    // acc[i * head_size + d] += sum over t of weight[i * 128 + t] * value(t, d), in the rotated basis if the format is
    // rotated (the caller applies `rotate` once at the end). Weights are >= 0.
    void (*values_packed)(const ValueFormat & f, const uint8_t * record, const uint8_t * next, const float * weight, int n, float * acc, float * scratch);
    void (*values_half)(int head_size, const half * rows, size_t stride, int n_cells, const float * weight, int n, float * acc, float * scratch);

    // Scores to logits, in place: x = x * scale, then softcap * tanh(x / softcap) if softcap > 0, then + slope * mask (slope > 0; -inf hides a
    // cell; nullptr: no mask). Returns the largest, -inf if there is none.
    float (*logits)(float * x, int n, float scale, float softcap, const float * mask, float slope);

    // x[0..n): in place exp(x[i] - max) (0 where x is -inf); returns the sum. max is finite.
    float (*exp_sum)(float * x, int n, float max);

    // Of logits, in float64 (mixkvq/divergence.h). `first_top`: the largest of n > 0 numbers and where it is first; a NaN counts as the largest.
    // `exp_wide`: y[i] = exp(x[i] - max), 0 below e^-708; returns the sum. `weighted_gap`: the sum of p[i] ((x[i] - x_max) - (y[i] - y_max)) where
    // p[i] > 0.
    float (*first_top)(const float * x, int n, int & where);
    double (*exp_wide)(const float * x, int n, float max, double * y);
    double (*weighted_gap)(const double * p, const float * x, float x_max, const float * y, float y_max, int n);

    // In place: x *= s, and the normalised Walsh-Hadamard transform of one head in blocks of `block`.
    void (*scale)(float * x, int n, float s);
    void (*rotate)(float * x, int head_size, int block);
};

// Scratch of one kernel call: a page tile of F32 and some room for tables.
constexpr size_t scratch_floats(int head_size) { return size_t(kPageCells) * head_size + 8192; }

// The table of an instruction set, or nullptr if it is not built in.
const Kernels * kernels_for(Isa isa);

}  // namespace mixkvq
