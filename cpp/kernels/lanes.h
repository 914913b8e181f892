// What the vector kernels share. Included after the primitives of an instruction set.
#pragma once

#include <cmath>
#include <cstring>

#include "mixkvq/kernels.h"

namespace mixkvq {
namespace {

constexpr int kLanes = 8;
constexpr int kPair = 16;    // lanes of the inner loops
constexpr int kQueries = 4;  // queries that share one pass over the codes

}  // namespace
}  // namespace mixkvq
