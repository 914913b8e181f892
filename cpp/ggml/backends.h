// Backends on our devices: that of the CPU, and, where there is a CUDA compiler, that of GPUs.
#pragma once

#include <memory>
#include <vector>

#include "buffer.h"

namespace mixkvq {
class CudaMemory;
namespace cuda {
class Queue;
}
}  // namespace mixkvq

namespace mixkvq::MIXKVQ_GLUE {

// Some nodes of a graph, which a backend can tell apart and fuse like the graph itself.
ggml_cgraph slice_of(const ggml_cgraph & graph, int first, int end);

// ---- cpu_backend.cpp ----

extern ggml_guid backend_guid;
ggml_backend_t make_backend(ggml_backend_dev_t device);
void set_n_threads(ggml_backend_t backend, int n_threads);

// ---- cuda_device.cpp, cuda_backend.cpp ----

#if defined(MIXKVQ_HAVE_CUDA)
// A device for each GPU that ggml and we can use.
std::vector<std::unique_ptr<Device>> find_cuda_devices(std::vector<LeftOut> & left_out);
ggml_backend_t make_cuda_backend(ggml_backend_dev_t device);
// ggml's backends on this device, of whatever context, are not freed while one of ours records.
void guard_recordings(ggml_backend_dev_t inner);
ggml_backend_buffer_t inner_buffer(const Buffer & buffer);
std::shared_ptr<cuda::Queue> queue_of(const Buffer & buffer);
CudaMemory & cuda_memory(const CacheTensor & tensor);  // of the store of a tensor that is on a GPU
// The bytes of a tensor that the host has set and that nothing computed by the device can have changed; else nullptr.
const uint8_t * written_by_host(const ggml_tensor * tensor);
void has_computed(ggml_backend_dev_t device);
#endif

}  // namespace mixkvq::MIXKVQ_GLUE
