// The entry point that ggml calls when it loads the library.

#include <cstring>
#include <exception>

#include "glue.h"

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

ggml_backend_reg registry;

const char * get_name(ggml_backend_reg_t) { return "MIXKVQ"; }
size_t get_device_count(ggml_backend_reg_t) { return 1; }
ggml_backend_dev_t get_device(ggml_backend_reg_t, size_t index) { return index == 0 ? cpu_device() : nullptr; }

const mixkvq_backend_api * get_api() { return backend_api(); }

void * get_proc_address(ggml_backend_reg_t, const char * name) {
    if (!std::strcmp(name, "ggml_backend_set_n_threads")) return reinterpret_cast<void *>(set_n_threads);
    if (!std::strcmp(name, "mixkvq_backend_api")) return const_cast<mixkvq_backend_api *>(get_api());
    return nullptr;
}

// Everything that can be wrong before a model is loaded, as one sentence; empty if nothing is.
std::string start(void * return_address) {
    const char * version = ggml_version();
    if (std::strncmp(version, kGgmlSupported, std::strlen(kGgmlSupported)) != 0) {
        return std::string("this library serves ggml ") + kGgmlSupported + "x and the process has ggml " + version +
               "; install llama-cpp-python==" + kLlamaCppPythonSupported + " or a mixkvq made for that ggml";
    }
    std::string error;
    try {
        if (find_inner_device(return_address, error) && init_kernels(error)) init_default_session(error);
    } catch (const std::exception & e) {
        return std::string("this library cannot start: ") + e.what();
    }
    return error;
}

}  // namespace

}  // namespace mixkvq::glue

// nullptr, after a sentence on stderr, when the library cannot serve this process.
MIXKVQ_EXPORT ggml_backend_reg_t ggml_backend_init(void) {
    using namespace mixkvq::glue;
    static const std::string error = start(MIXKVQ_RETURN_ADDRESS());
    if (!error.empty()) {
        warn_once(error);
        return nullptr;
    }
    init_device(&registry);
    registry.api_version = kBackendApiVersion;
    registry.iface = {get_name, get_device_count, get_device, get_proc_address};
    return &registry;
}
