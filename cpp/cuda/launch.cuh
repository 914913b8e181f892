// Starting a kernel, and its shared memory of a size that the launch gives. tests/native/emulator has both for a machine without a GPU.
#pragma once

#include <cstddef>

#include <cuda_runtime.h>

#include "mixkvq/cuda.h"

#ifndef MIXKVQ_EMULATED

#define MIXKVQ_DYNAMIC_SHARED(name, alignment) extern __shared__ __align__(alignment) uint4 name[]

namespace mixkvq::cuda {

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, Stream stream, const Arguments &... arguments) {
    kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
}

}  // namespace mixkvq::cuda

#endif
