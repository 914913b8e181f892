// The NEON kernels with byte dot products: most 64-bit ARM processors since 2018. Built with -march=armv8.2-a+dotprod.
#if MIXKVQ_HAVE_NEON_DOTPROD

#include "vec_neon.h"

#include "pair.h"

#include "table.h"

namespace mixkvq {

const Kernels & neon_dotprod_kernels() {
    static constexpr Kernels table = kernel_table(Isa::neon_dotprod);
    return table;
}

}  // namespace mixkvq

#endif
