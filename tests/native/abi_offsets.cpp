// Prints the layout of every struct that cpp/ggml/abi.h declares: "struct member offset size". Compiled against abi.h, or with
// MIXKVQ_GGML_OWN_HEADER against ggml's own header; tests/python/test_abi.py compares the two. Not a test by itself.
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <type_traits>

#if defined(MIXKVQ_GGML_OWN_HEADER)
#include "ggml-backend-impl.h"
#include "ggml-impl.h"
constexpr int kBackendApiVersion = GGML_BACKEND_API_VERSION;
void ggml_abort(const char *, int, const char *, ...) { std::abort(); }  // functions of the headers name it
#else
#include "../../cpp/ggml/abi.h"
#endif

#define SIZE(type) std::printf("%s sizeof 0 %zu\n", #type, sizeof(type))
#define MEMBER(type, member) std::printf("%s %s %zu %zu\n", #type, #member, offsetof(type, member), sizeof(static_cast<type *>(nullptr)->member))

// A function pointer with the same arguments and result as `like`; the compiler says so if it has others.
#define SIGNATURE(type, member, ...) static_assert(std::is_same<decltype(type::member), __VA_ARGS__>::value, #type "." #member)

using Buft = ggml_backend_buffer_type_t;
using Buffer = ggml_backend_buffer_t;
using Dev = ggml_backend_dev_t;
using Backend = ggml_backend_t;
using Event = ggml_backend_event_t;
using Plan = ggml_backend_graph_plan_t;
using Reg = ggml_backend_reg_t;
using Tensor = ggml_tensor;

SIGNATURE(ggml_backend_buffer_type_i, get_name, const char * (*)(Buft));
SIGNATURE(ggml_backend_buffer_type_i, alloc_buffer, Buffer (*)(Buft, size_t));
SIGNATURE(ggml_backend_buffer_type_i, get_alignment, size_t (*)(Buft));
SIGNATURE(ggml_backend_buffer_type_i, get_max_size, size_t (*)(Buft));
SIGNATURE(ggml_backend_buffer_type_i, get_alloc_size, size_t (*)(Buft, const Tensor *));
SIGNATURE(ggml_backend_buffer_type_i, is_host, bool (*)(Buft));
SIGNATURE(ggml_backend_buffer_i, free_buffer, void (*)(Buffer));
SIGNATURE(ggml_backend_buffer_i, get_base, void * (*)(Buffer));
SIGNATURE(ggml_backend_buffer_i, init_tensor, ggml_status (*)(Buffer, Tensor *));
SIGNATURE(ggml_backend_buffer_i, memset_tensor, void (*)(Buffer, Tensor *, uint8_t, size_t, size_t));
SIGNATURE(ggml_backend_buffer_i, set_tensor, void (*)(Buffer, Tensor *, const void *, size_t, size_t));
SIGNATURE(ggml_backend_buffer_i, get_tensor, void (*)(Buffer, const Tensor *, void *, size_t, size_t));
SIGNATURE(ggml_backend_buffer_i, set_tensor_2d, void (*)(Buffer, Tensor *, const void *, size_t, size_t, size_t, size_t, size_t));
SIGNATURE(ggml_backend_buffer_i, get_tensor_2d, void (*)(Buffer, const Tensor *, void *, size_t, size_t, size_t, size_t, size_t));
SIGNATURE(ggml_backend_buffer_i, cpy_tensor, bool (*)(Buffer, const Tensor *, Tensor *));
SIGNATURE(ggml_backend_buffer_i, clear, void (*)(Buffer, uint8_t));
SIGNATURE(ggml_backend_buffer_i, reset, void (*)(Buffer));
SIGNATURE(ggml_backend_i, get_name, const char * (*)(Backend));
SIGNATURE(ggml_backend_i, free, void (*)(Backend));
SIGNATURE(ggml_backend_i, set_tensor_async, void (*)(Backend, Tensor *, const void *, size_t, size_t));
SIGNATURE(ggml_backend_i, cpy_tensor_async, bool (*)(Backend, Backend, const Tensor *, Tensor *));
SIGNATURE(ggml_backend_i, synchronize, void (*)(Backend));
SIGNATURE(ggml_backend_i, graph_plan_create, Plan (*)(Backend, const ggml_cgraph *));
SIGNATURE(ggml_backend_i, graph_compute, ggml_status (*)(Backend, ggml_cgraph *));
SIGNATURE(ggml_backend_device_i, get_name, const char * (*)(Dev));
SIGNATURE(ggml_backend_device_i, get_description, const char * (*)(Dev));
SIGNATURE(ggml_backend_device_i, get_memory, void (*)(Dev, size_t *, size_t *));
SIGNATURE(ggml_backend_device_i, get_type, enum ggml_backend_dev_type (*)(Dev));
SIGNATURE(ggml_backend_device_i, get_props, void (*)(Dev, ggml_backend_dev_props *));
SIGNATURE(ggml_backend_device_i, init_backend, Backend (*)(Dev, const char *));
SIGNATURE(ggml_backend_device_i, get_buffer_type, Buft (*)(Dev));
SIGNATURE(ggml_backend_device_i, supports_op, bool (*)(Dev, const Tensor *));
SIGNATURE(ggml_backend_device_i, supports_buft, bool (*)(Dev, Buft));
SIGNATURE(ggml_backend_device_i, event_new, Event (*)(Dev));
SIGNATURE(ggml_backend_reg_i, get_name, const char * (*)(Reg));
SIGNATURE(ggml_backend_reg_i, get_device_count, size_t (*)(Reg));
SIGNATURE(ggml_backend_reg_i, get_device, Dev (*)(Reg, size_t));
SIGNATURE(ggml_backend_reg_i, get_proc_address, void * (*)(Reg, const char *));
static_assert(std::is_same<decltype(&ggml_backend_buffer_init), Buffer (*)(Buft, ggml_backend_buffer_i, void *, size_t)>::value, "ggml_backend_buffer_init");

int main() {
    std::printf("api version 0 %d\n", kBackendApiVersion);

    SIZE(ggml_backend_buffer_type_i);
    MEMBER(ggml_backend_buffer_type_i, get_name);
    MEMBER(ggml_backend_buffer_type_i, alloc_buffer);
    MEMBER(ggml_backend_buffer_type_i, get_alignment);
    MEMBER(ggml_backend_buffer_type_i, get_max_size);
    MEMBER(ggml_backend_buffer_type_i, get_alloc_size);
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
    MEMBER(ggml_backend_buffer_i, set_tensor_2d);
    MEMBER(ggml_backend_buffer_i, get_tensor_2d);
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
    MEMBER(ggml_backend_i, set_tensor_2d_async);
    MEMBER(ggml_backend_i, get_tensor_2d_async);
    MEMBER(ggml_backend_i, cpy_tensor_async);
    MEMBER(ggml_backend_i, synchronize);
    MEMBER(ggml_backend_i, graph_plan_create);
    MEMBER(ggml_backend_i, graph_plan_free);
    MEMBER(ggml_backend_i, graph_plan_update);
    MEMBER(ggml_backend_i, graph_plan_compute);
    MEMBER(ggml_backend_i, graph_compute);
    MEMBER(ggml_backend_i, event_record);
    MEMBER(ggml_backend_i, event_wait);
    MEMBER(ggml_backend_i, graph_optimize);

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
    MEMBER(ggml_cgraph, order);
    MEMBER(ggml_cgraph, uid);
    return 0;
}
