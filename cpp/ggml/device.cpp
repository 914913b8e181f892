// The device that owns the cache. It claims only operations on cache tensors; weights and all else stay with ggml's CPU backend.

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#else
#include <dlfcn.h>
#endif

#include <cstdlib>
#include <new>

#include "glue.h"

namespace mixkvq::glue {

namespace {

ggml_backend_device device;
ggml_backend_dev_t inner = nullptr;
const Kernels * table = nullptr;

const char * get_name(ggml_backend_dev_t) { return "MIXKVQ-CPU"; }
const char * get_description(ggml_backend_dev_t) { return "CPU with a MixKVQ cache"; }
void get_memory(ggml_backend_dev_t, size_t * free, size_t * total) { ggml_backend_dev_memory(inner, free, total); }
// An integrated device: llama.cpp picks it by itself only where there is no discrete GPU.
enum ggml_backend_dev_type get_type(ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_IGPU; }

void get_props(ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
    *props = {};
    props->name = get_name(dev);
    props->description = get_description(dev);
    props->type = get_type(dev);
    get_memory(dev, &props->memory_free, &props->memory_total);
}

ggml_backend_t init_backend(ggml_backend_dev_t dev, const char *) { return make_backend(dev); }
ggml_backend_buffer_type_t get_buffer_type(ggml_backend_dev_t) { return cpu_buffer_type(); }

bool supports_op(ggml_backend_dev_t, const ggml_tensor * op) {
    try {
        if (!touches_cache(op)) return false;
    } catch (const std::bad_alloc &) {
        warn_once("out of memory for a cache that has to be stored plainly");
        return false;
    }
    return is_view(op->op) || ggml_backend_dev_supports_op(inner, op);
}

bool supports_buft(ggml_backend_dev_t, ggml_backend_buffer_type_t type) { return type == cpu_buffer_type() || ggml_backend_buft_is_host(type); }

// A function of the registry that is loading us. A process may hold two registries (copies of libggml under one SONAME), so the right one is
// found by the address that called ggml_backend_init, not by name.
void * registry_function(void * return_address, const char * name) {
#if defined(_WIN32)
    HMODULE module = nullptr;
    if (!GetModuleHandleExA(GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS | GET_MODULE_HANDLE_EX_FLAG_UNCHANGED_REFCOUNT,
                            static_cast<const char *>(return_address), &module)) {
        return nullptr;
    }
    return reinterpret_cast<void *>(GetProcAddress(module, name));
#else
    Dl_info info;
    if (!dladdr(return_address, &info) || !info.dli_fname) return nullptr;
    void * handle = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    void * function = handle ? dlsym(handle, name) : nullptr;
    if (handle) dlclose(handle);
    return function ? function : dlsym(RTLD_DEFAULT, name);
#endif
}

}  // namespace

ggml_backend_dev_t cpu_device() { return &device; }
ggml_backend_dev_t inner_device() { return inner; }

bool find_inner_device(void * return_address, std::string & error) {
    auto by_type = reinterpret_cast<decltype(&ggml_backend_dev_by_type)>(registry_function(return_address, "ggml_backend_dev_by_type"));
    inner = by_type ? by_type(GGML_BACKEND_DEVICE_TYPE_CPU) : nullptr;
    if (!inner) error = "ggml's CPU backend is not in the process that loads this library; load it before";
    return inner != nullptr;
}

void init_device(ggml_backend_reg_t reg) {
    device = {};
    device.iface.get_name = get_name;
    device.iface.get_description = get_description;
    device.iface.get_memory = get_memory;
    device.iface.get_type = get_type;
    device.iface.get_props = get_props;
    device.iface.init_backend = init_backend;
    device.iface.get_buffer_type = get_buffer_type;
    device.iface.supports_op = supports_op;
    device.iface.supports_buft = supports_buft;
    device.reg = reg;
}

const Kernels & kernels() { return *table; }

bool init_kernels(std::string & error) {
    table = kernels_for(select_isa(error));
    const char * wanted = std::getenv("MIXKVQ_ISA");
    const char * slow = wanted && *wanted ? nullptr : no_vector_kernels();
    if (slow) warn_once(slow);
    return error.empty() && table;
}

}  // namespace mixkvq::glue
