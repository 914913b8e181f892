// What ggml registers: the devices, and the functions that are asked for by name.

#include <cstring>

#include "backends.h"
#include "border.h"
#include "device.h"
#include "functions.h"
#include "session.h"

namespace mixkvq::MIXKVQ_GLUE {

namespace {

const char * get_name(ggml_backend_reg_t) { return "MIXKVQ"; }
size_t get_device_count(ggml_backend_reg_t) { return devices().size(); }
ggml_backend_dev_t get_device(ggml_backend_reg_t, size_t index) { return index < devices().size() ? &devices()[index]->ggml : nullptr; }

// Where the weights of a device's layers go: it computes whole graphs, but only the cache lies in buffers of its own.
ggml_backend_buffer_type_t * get_extra_buffer_types(ggml_backend_dev_t dev) {
    Device & device = *static_cast<Device *>(dev->context);
    return device.weights[0] ? device.weights : nullptr;
}

void * get_proc_address(ggml_backend_reg_t, const char * name) {
    if (!std::strcmp(name, "ggml_backend_set_n_threads")) return reinterpret_cast<void *>(set_n_threads);
    if (!std::strcmp(name, "ggml_backend_dev_get_extra_bufts") && devices().size() > 1) return reinterpret_cast<void *>(get_extra_buffer_types);
    if (!std::strcmp(name, "mixkvq_backend_api")) return const_cast<mixkvq_backend_api *>(backend_api());
    return nullptr;
}

ggml_backend_reg registry = {kBackendApiVersion, {get_name, get_device_count, get_device, get_proc_address}, nullptr};

}  // namespace

// Everything that can be wrong before a model is loaded is said here.
void * start(const GgmlLibrary & library, std::string & error) {
    if (!load_functions(library, error) || !check_layout(error)) return nullptr;
    if (!find_inner_devices(error) || !init_kernels(error) || !init_default_session(error)) return nullptr;
    init_devices(&registry);
    return &registry;
}

}  // namespace mixkvq::MIXKVQ_GLUE
