// The entry point that ggml calls when it loads the library.

#include <cstring>
#include <exception>

#include "backends.h"
#include "border.h"
#include "device.h"
#include "session.h"

#if defined(_WIN32)
#include <intrin.h>
#define MIXKVQ_EXPORT extern "C" __declspec(dllexport)
#define MIXKVQ_RETURN_ADDRESS() _ReturnAddress()
#else
#define MIXKVQ_EXPORT extern "C" __attribute__((visibility("default")))
#define MIXKVQ_RETURN_ADDRESS() __builtin_return_address(0)
#endif

namespace mixkvq::glue {

namespace {

const char * get_name(ggml_backend_reg_t) { return "MIXKVQ"; }
size_t get_device_count(ggml_backend_reg_t) { return devices().size(); }
ggml_backend_dev_t get_device(ggml_backend_reg_t, size_t index) { return index < devices().size() ? &devices()[index]->ggml : nullptr; }

// Where the weights of a device's layers go: it computes whole graphs, but only the cache lies in buffers of its own.
ggml_backend_buffer_type_t * get_extra_buffer_types(ggml_backend_dev_t dev) {
    Device & device = *static_cast<Device *>(dev->context);
    return device.weights[0] ? device.weights : nullptr;
}

const mixkvq_backend_api * get_api() { return backend_api(); }

void * get_proc_address(ggml_backend_reg_t, const char * name) {
    if (!std::strcmp(name, "ggml_backend_set_n_threads")) return reinterpret_cast<void *>(set_n_threads);
    if (!std::strcmp(name, "ggml_backend_dev_get_extra_bufts") && devices().size() > 1) return reinterpret_cast<void *>(get_extra_buffer_types);
    if (!std::strcmp(name, "mixkvq_backend_api")) return const_cast<mixkvq_backend_api *>(get_api());
    return nullptr;
}

ggml_backend_reg registry = {kBackendApiVersion, {get_name, get_device_count, get_device, get_proc_address}, nullptr};

// Everything that can be wrong before a model is loaded, as one sentence; empty if nothing is.
std::string start(void * return_address) {
    const char * version = ggml_version();
    if (std::strncmp(version, kGgmlSupported, std::strlen(kGgmlSupported)) != 0) {
        return std::string("this library serves ggml ") + kGgmlSupported + "x and the process has ggml " + version +
               "; install llama-cpp-python==" + kLlamaCppPythonSupported + " or a mixkvq made for that ggml";
    }
    std::string error;
    if (find_inner_device(return_address, error) && init_kernels(error) && init_default_session(error)) init_devices(&registry);
    return error;
}

}  // namespace

}  // namespace mixkvq::glue

// nullptr, after a sentence on stderr, when the library cannot serve this process.
MIXKVQ_EXPORT ggml_backend_reg_t ggml_backend_init(void) {
    using namespace mixkvq::glue;
    void * const caller = MIXKVQ_RETURN_ADDRESS();
    return at_border("out of memory while the library started", static_cast<ggml_backend_reg_t>(nullptr), [&]() -> ggml_backend_reg_t {
        static const std::string error = start(caller);
        if (!error.empty()) {
            warn_once(error);
            return nullptr;
        }
        return &registry;
    });
}
