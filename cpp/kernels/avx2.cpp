// The AVX2 kernels: table.h over the primitives of vec_avx2.h. Built with -mavx2 -mfma -mf16c.
#if MIXKVQ_HAVE_AVX2

#include "vec_avx2.h"

#include "pair.h"

#include "table.h"

namespace mixkvq {

const Kernels & avx2_kernels() {
    static constexpr Kernels table = kernel_table(Isa::avx2);
    return table;
}

}  // namespace mixkvq

#endif
