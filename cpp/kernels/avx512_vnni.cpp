// The AVX-512 kernels with the integer dot products of AVX512-VNNI. Built with -mavx512vnni besides the flags of avx512.cpp.
#if MIXKVQ_HAVE_AVX512_VNNI

#include "vec_avx2.h"

#include "pair_avx512.h"

#include "table.h"

namespace mixkvq {

const Kernels & avx512_vnni_kernels() {
    static constexpr Kernels table = kernel_table(Isa::avx512_vnni);
    return table;
}

}  // namespace mixkvq

#endif
