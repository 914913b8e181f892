// The AVX-512 kernels: table.h over the primitives of vec_avx2.h and pairs of their registers as one. Built with F, BW, DQ and VL besides the
// flags of AVX2.
#if MIXKVQ_HAVE_AVX512

#include "vec_avx2.h"

#include "pair_avx512.h"

#include "table.h"

namespace mixkvq {

const Kernels & avx512_kernels() {
    static constexpr Kernels table = kernel_table(Isa::avx512);
    return table;
}

}  // namespace mixkvq

#endif
