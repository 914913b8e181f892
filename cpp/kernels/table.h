// The vector kernels, written once: a file for each algorithm. An instruction set includes its primitives (vec_*.h), pairs of registers (pair.h or its
// own), then this file, and offers kernel_table().
//
// Pack and unpack give the bytes of scalar.cpp: the same operations in the same order, none fused. Attention does its sums in
// integers: queries and weights are rounded to a grid per page, so fine that the codes' own rounding stays far larger
// (tests/native/test_kernels.cpp measures by how much).
//
// No templates of the standard library with code in them here: they would be compiled for this instruction set and could be
// linked into code for lesser CPUs.
#pragma once

#include "conversion.h"
#include "keys.h"
#include "predictions.h"
#include "scores.h"
#include "softmax.h"
#include "sums.h"
#include "values.h"

namespace mixkvq {
namespace {

constexpr Kernels kernel_table(Isa isa) {
    return {
        isa,           to_half,     from_half,     pack_keys,   unpack_keys, pack_values, unpack_values,
        scores_packed, scores_half, values_packed, values_half, logits,      exp_sum,     first_top,   exp_wide,
        weighted_gap,  scale,       rotate,
    };
}

}  // namespace
}  // namespace mixkvq
