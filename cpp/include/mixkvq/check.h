// Checks of data that comes from outside. The kernels trust their input; whoever takes rows and records from a caller asks here first.
#pragma once

#include "mixkvq/kernels.h"
#include "mixkvq/page.h"

namespace mixkvq {

// The first valid cell and channel of F16 rows that is NaN or infinite; false if there is none.
bool find_non_finite(const half * rows, int head_size, size_t stride, const CellMask & valid, int & cell, int & channel);

// The first place in a key record's order that names a channel outside the head or one named before; -1 if there is none.
// Reading such a record would touch memory outside the rows.
int find_bad_channel(const KeyFormat & f, const uint8_t * record);

// The first channel whose importance is negative, NaN or infinite; -1 if there is none.
int find_bad_importance(const float * importance, int head_size);

}  // namespace mixkvq
