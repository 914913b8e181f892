// The NEON kernels for every 64-bit ARM processor: table.h over the primitives of vec_neon.h. Built with -march=armv8-a.
#if MIXKVQ_HAVE_NEON

#include "vec_neon.h"

#include "pair.h"

#include "table.h"

namespace mixkvq {

const Kernels & neon_kernels() {
    static constexpr Kernels table = kernel_table(Isa::neon);
    return table;
}

}  // namespace mixkvq

#endif
