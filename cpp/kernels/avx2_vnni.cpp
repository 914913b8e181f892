// The AVX2 kernels with the integer dot products of AVX-VNNI: laptop processors without AVX-512. Built with -mavxvnni besides the flags of AVX2.
#if MIXKVQ_HAVE_AVX2_VNNI

#include "vec_avx2.h"

#include "pair.h"

#include "table.h"

namespace mixkvq {

const Kernels & avx2_vnni_kernels() {
    static constexpr Kernels table = kernel_table(Isa::avx2_vnni);
    return table;
}

}  // namespace mixkvq

#endif
