// Our devices: one for each of ggml's that we serve.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "abi.h"
#include "mixkvq/kernels.h"
#include "mixkvq/page_memory.h"

namespace mixkvq::MIXKVQ_GLUE {

class BufferMemory;

// One of our devices: one of ggml's with our cache.
struct Device {
    ggml_backend_device ggml = {};        // its context, and that of the buffer type, is this
    ggml_backend_buffer_type type = {};
    ggml_backend_dev_t inner = nullptr;   // ggml's
    ggml_backend_buffer_type_t weights[2] = {};  // where those of its layers go besides, and a null
    std::string name, description;
    // Memory for a buffer; nullptr: `error` says why.
    std::unique_ptr<BufferMemory> (*allocate)(Device & device, size_t size, std::string & error) = nullptr;
    size_t (*query_bytes)(const PageLayout & layout) = nullptr;  // of the query statistics of keys on it; nullptr: as HostMemory has them
};

// A GPU of ggml's that has no device of ours, and why.
struct LeftOut {
    std::string name, why;
};
const std::vector<LeftOut> & left_out();

ggml_backend_dev_t cpu_device();    // ours
ggml_backend_dev_t inner_device();  // ggml's CPU device
bool find_inner_devices(std::string & error);
void init_devices(ggml_backend_reg_t reg);
const std::vector<Device *> & devices();
const Kernels & kernels();
bool init_kernels(std::string & error);

}  // namespace mixkvq::MIXKVQ_GLUE
