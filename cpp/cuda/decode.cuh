// Attention of few queries over long caches: decode.cu.
#pragma once

#include "mixkvq/cuda.h"

namespace mixkvq::cuda {

// Floats of workspace, or 0 if decode() does not serve a call: many rows, 16-bit channels, values that are not rotated, records that do not fit in
// shared memory.
size_t decode_workspace(const Attention & call);
// With `rows`: false, too, if those have to be written before.
bool decode(Stream stream, const Attention & call, const NewRows * rows = nullptr);

}  // namespace mixkvq::cuda
