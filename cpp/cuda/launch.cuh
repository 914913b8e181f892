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

// Whether the code of a kernel that the GPU runs has wait_for_kernel_before().
template <class... Parameters>
bool can_start_early(void (*kernel)(Parameters...)) {
    cudaFuncAttributes attributes = {};
    return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
}

// The kernel may start while the last blocks of the one before it in the stream still run; only for kernels that can_start_early().
template <class... Parameters, class... Arguments>
void launch_early(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, Stream stream, const Arguments &... arguments) {
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &early;
    config.numAttrs = 1;
    cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace mixkvq::cuda

#endif
