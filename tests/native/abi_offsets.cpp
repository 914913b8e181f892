// Prints the layout of every struct that cpp/ggml/abi.h declares, and the types of its functions: "struct member offset size type". Compiled against abi.h,
// with MIXKVQ_GGML_OWN_HEADER against ggml's own headers instead, with MIXKVQ_GGML_PUBLIC_HEADER against those that it installs, which have less;
// tests/python/test_abi.py compares. Not a test by itself.
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <typeinfo>

#include <cxxabi.h>

#include "../../cpp/ggml/abi.h"

#if defined(MIXKVQ_GGML_OWN_HEADER)
#include "ggml-backend-impl.h"
#include "ggml-impl.h"
#include "gguf.h"
constexpr int kBackendApiVersion = GGML_BACKEND_API_VERSION;
void ggml_abort(const char *, int, const char *, ...) { std::abort(); }  // functions of the headers name it
#define MIXKVQ_POINTER(function) decltype(&function)
#elif defined(MIXKVQ_GGML_PUBLIC_HEADER)
#include "ggml-backend.h"
#include "ggml.h"
#include "gguf.h"
#define MIXKVQ_POINTER(function) decltype(&function)
#else
using namespace mixkvq::MIXKVQ_GLUE;
#define MIXKVQ_POINTER(function) decltype(function)
#endif

// The name of a type, without the namespace of ours.
static std::string name_of(const std::type_info & type) {
    std::string name = abi::__cxa_demangle(type.name(), nullptr, nullptr, nullptr);
    for (size_t at; (at = name.find("mixkvq::glue_")) != std::string::npos;) name.erase(at, sizeof("mixkvq::glue_a::") - 1);
    return name;
}

#define SIZE(type) std::printf("%s sizeof 0 %zu\n", #type, sizeof(type))
#define PLACE(type, member) std::printf("%s %s %zu %zu\n", #type, #member, offsetof(type, member), sizeof(static_cast<type *>(nullptr)->member))
#define MEMBER(type, member)                                                                                                       \
    std::printf("%s %s %zu %zu %s\n", #type, #member, offsetof(type, member), sizeof(static_cast<type *>(nullptr)->member), \
                name_of(typeid(decltype(type::member))).c_str())
#define NUMBER(name) std::printf("%s number %d\n", #name, int(name))
#define FUNCTION(result, name, arguments) std::printf("function %s %s\n", #name, name_of(typeid(MIXKVQ_POINTER(name))).c_str());

int main() {
    SIZE(ggml_tensor);
    MEMBER(ggml_tensor, type);
    MEMBER(ggml_tensor, buffer);
    MEMBER(ggml_tensor, ne);
    MEMBER(ggml_tensor, nb);
    MEMBER(ggml_tensor, op);
    MEMBER(ggml_tensor, op_params);
    MEMBER(ggml_tensor, flags);
    MEMBER(ggml_tensor, src);
    MEMBER(ggml_tensor, view_src);
    MEMBER(ggml_tensor, view_offs);
    MEMBER(ggml_tensor, data);
    MEMBER(ggml_tensor, name);
    MEMBER(ggml_tensor, extra);
    MEMBER(ggml_tensor, padding);

    SIZE(ggml_init_params);
    MEMBER(ggml_init_params, mem_size);
    MEMBER(ggml_init_params, mem_buffer);
    MEMBER(ggml_init_params, no_alloc);

    SIZE(gguf_init_params);
    MEMBER(gguf_init_params, no_alloc);
    MEMBER(gguf_init_params, ctx);

    MEMBER(ggml_backend_dev_caps, async);
    MEMBER(ggml_backend_dev_caps, host_buffer);
    MEMBER(ggml_backend_dev_caps, buffer_from_host_ptr);
    MEMBER(ggml_backend_dev_caps, events);

    SIZE(ggml_backend_dev_props);
    MEMBER(ggml_backend_dev_props, name);
    MEMBER(ggml_backend_dev_props, description);
    MEMBER(ggml_backend_dev_props, memory_free);
    MEMBER(ggml_backend_dev_props, memory_total);
    MEMBER(ggml_backend_dev_props, type);
    MEMBER(ggml_backend_dev_props, device_id);
    std::printf("ggml_backend_dev_props caps %zu\n", offsetof(ggml_backend_dev_props, caps));  // four flags, then five: within the same bytes

    NUMBER(GGML_STATUS_ALLOC_FAILED);
    NUMBER(GGML_STATUS_FAILED);
    NUMBER(GGML_STATUS_SUCCESS);
    NUMBER(GGUF_TYPE_UINT32);
    NUMBER(GGUF_TYPE_INT32);
    NUMBER(GGUF_TYPE_FLOAT32);
    NUMBER(GGUF_TYPE_ARRAY);
    NUMBER(GGML_BACKEND_BUFFER_USAGE_ANY);
    NUMBER(GGML_BACKEND_DEVICE_TYPE_CPU);
    NUMBER(GGML_BACKEND_DEVICE_TYPE_GPU);
    NUMBER(GGML_BACKEND_DEVICE_TYPE_IGPU);
    NUMBER(GGML_BACKEND_DEVICE_TYPE_ACCEL);

#if defined(MIXKVQ_GGML_PUBLIC_HEADER)
#define ggml_backend_buffer_init ggml_backend_buffer_free  // not in the headers that are installed
#endif
    MIXKVQ_GGML_FUNCTIONS(FUNCTION)

#if !defined(MIXKVQ_GGML_PUBLIC_HEADER)
    std::printf("api version 0 %d\n", kBackendApiVersion);

    SIZE(ggml_backend_buffer_type_i);
    MEMBER(ggml_backend_buffer_type_i, get_name);
    MEMBER(ggml_backend_buffer_type_i, alloc_buffer);
#if MIXKVQ_ABI >= 3
    MEMBER(ggml_backend_buffer_type_i, alloc_buffer_n);
#endif
    MEMBER(ggml_backend_buffer_type_i, get_alignment);
    MEMBER(ggml_backend_buffer_type_i, get_max_size);
    MEMBER(ggml_backend_buffer_type_i, get_alloc_size);
#if MIXKVQ_ABI >= 3
    MEMBER(ggml_backend_buffer_type_i, get_alloc_size_n);
#endif
    MEMBER(ggml_backend_buffer_type_i, is_host);

    SIZE(ggml_backend_buffer_type);
    MEMBER(ggml_backend_buffer_type, iface);
    MEMBER(ggml_backend_buffer_type, device);
    MEMBER(ggml_backend_buffer_type, context);

    SIZE(ggml_backend_buffer_i);
    MEMBER(ggml_backend_buffer_i, free_buffer);
    MEMBER(ggml_backend_buffer_i, get_base);
    MEMBER(ggml_backend_buffer_i, init_tensor);
    MEMBER(ggml_backend_buffer_i, memset_tensor);
    MEMBER(ggml_backend_buffer_i, set_tensor);
    MEMBER(ggml_backend_buffer_i, get_tensor);
#if MIXKVQ_ABI >= 2
    MEMBER(ggml_backend_buffer_i, set_tensor_2d);
    MEMBER(ggml_backend_buffer_i, get_tensor_2d);
#endif
    MEMBER(ggml_backend_buffer_i, cpy_tensor);
    MEMBER(ggml_backend_buffer_i, clear);
    MEMBER(ggml_backend_buffer_i, reset);

    SIZE(ggml_backend_buffer);
    MEMBER(ggml_backend_buffer, iface);
    MEMBER(ggml_backend_buffer, buft);
    MEMBER(ggml_backend_buffer, context);
    MEMBER(ggml_backend_buffer, size);
    MEMBER(ggml_backend_buffer, usage);

    SIZE(ggml_backend_i);
    MEMBER(ggml_backend_i, get_name);
    MEMBER(ggml_backend_i, free);
    MEMBER(ggml_backend_i, set_tensor_async);
    MEMBER(ggml_backend_i, get_tensor_async);
#if MIXKVQ_ABI >= 2
    MEMBER(ggml_backend_i, set_tensor_2d_async);
    MEMBER(ggml_backend_i, get_tensor_2d_async);
#endif
    MEMBER(ggml_backend_i, cpy_tensor_async);
    MEMBER(ggml_backend_i, synchronize);
    MEMBER(ggml_backend_i, graph_plan_create);
    MEMBER(ggml_backend_i, graph_plan_free);
    MEMBER(ggml_backend_i, graph_plan_update);
    MEMBER(ggml_backend_i, graph_plan_compute);
    MEMBER(ggml_backend_i, graph_compute);
    MEMBER(ggml_backend_i, event_record);
    MEMBER(ggml_backend_i, event_wait);
    PLACE(ggml_backend_i, graph_optimize);  // two arguments before 0.23, then three

    SIZE(ggml_backend);
    MEMBER(ggml_backend, guid);
    MEMBER(ggml_backend, iface);
    MEMBER(ggml_backend, device);
    MEMBER(ggml_backend, context);

    SIZE(ggml_backend_device_i);
    MEMBER(ggml_backend_device_i, get_name);
    MEMBER(ggml_backend_device_i, get_description);
    MEMBER(ggml_backend_device_i, get_memory);
    MEMBER(ggml_backend_device_i, get_type);
    MEMBER(ggml_backend_device_i, get_props);
    MEMBER(ggml_backend_device_i, init_backend);
    MEMBER(ggml_backend_device_i, get_buffer_type);
    MEMBER(ggml_backend_device_i, get_host_buffer_type);
    MEMBER(ggml_backend_device_i, buffer_from_host_ptr);
    MEMBER(ggml_backend_device_i, supports_op);
    MEMBER(ggml_backend_device_i, supports_buft);
    MEMBER(ggml_backend_device_i, offload_op);
    MEMBER(ggml_backend_device_i, event_new);
    MEMBER(ggml_backend_device_i, event_free);
    MEMBER(ggml_backend_device_i, event_synchronize);

    SIZE(ggml_backend_device);
    MEMBER(ggml_backend_device, iface);
    MEMBER(ggml_backend_device, reg);
    MEMBER(ggml_backend_device, context);

    SIZE(ggml_backend_reg_i);
    MEMBER(ggml_backend_reg_i, get_name);
    MEMBER(ggml_backend_reg_i, get_device_count);
    MEMBER(ggml_backend_reg_i, get_device);
    MEMBER(ggml_backend_reg_i, get_proc_address);

    SIZE(ggml_backend_reg);
    MEMBER(ggml_backend_reg, api_version);
    MEMBER(ggml_backend_reg, iface);
    MEMBER(ggml_backend_reg, context);

    SIZE(ggml_backend_event);
    MEMBER(ggml_backend_event, device);
    MEMBER(ggml_backend_event, context);

    SIZE(ggml_hash_set);
    MEMBER(ggml_hash_set, size);
    MEMBER(ggml_hash_set, used);
    MEMBER(ggml_hash_set, keys);

    SIZE(ggml_cgraph);
    MEMBER(ggml_cgraph, size);
    MEMBER(ggml_cgraph, n_nodes);
    MEMBER(ggml_cgraph, n_leafs);
    MEMBER(ggml_cgraph, nodes);
    MEMBER(ggml_cgraph, grads);
    MEMBER(ggml_cgraph, grad_accs);
    MEMBER(ggml_cgraph, leafs);
    MEMBER(ggml_cgraph, use_counts);
    MEMBER(ggml_cgraph, visited_hash_set);
    PLACE(ggml_cgraph, order);  // an enum
#if MIXKVQ_ABI >= 2
    MEMBER(ggml_cgraph, uid);
#endif
#endif
    return 0;
}
