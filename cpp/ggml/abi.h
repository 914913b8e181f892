// What this library knows of ggml: its structs and functions, declared by us, so that no header or library of ggml is needed to build it. The structs have
// the layout MIXKVQ_ABI of layouts.h; tests/native/abi_offsets.cpp compares them with ggml's own where its source tree is at hand. Numbers of operations and
// types, which change between versions, and functions are looked up by name in the ggml that loads the library: functions.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

#include "layouts.h"

#if !defined(MIXKVQ_ABI) || !defined(MIXKVQ_GLUE)
#error "MIXKVQ_ABI and MIXKVQ_GLUE say for which layout this is compiled"
#endif

// All of it in the namespace of the layout: types of one name with several layouts must not meet.
namespace mixkvq::MIXKVQ_GLUE {

// ---- ggml.h ----

constexpr int GGML_MAX_DIMS = 4, GGML_MAX_SRC = 10, GGML_MAX_OP_PARAMS = 64, GGML_MAX_NAME = 64;
constexpr int32_t GGML_TENSOR_FLAG_COMPUTE = 16;

enum ggml_type : int {};
enum ggml_op : int {};
enum ggml_status : int { GGML_STATUS_ALLOC_FAILED = -2, GGML_STATUS_FAILED = -1, GGML_STATUS_SUCCESS = 0 };

struct ggml_context;
struct ggml_backend_buffer;

struct ggml_tensor {
    ggml_type type;
    ggml_backend_buffer * buffer;
    int64_t ne[GGML_MAX_DIMS];
    size_t nb[GGML_MAX_DIMS];
    ggml_op op;
    int32_t op_params[GGML_MAX_OP_PARAMS / sizeof(int32_t)];
    int32_t flags;
    ggml_tensor * src[GGML_MAX_SRC];
    ggml_tensor * view_src;
    size_t view_offs;
    void * data;
    char name[GGML_MAX_NAME];
    void * extra;
    char padding[8];
};

struct ggml_init_params {
    size_t mem_size;
    void * mem_buffer;
    bool no_alloc;
};

using ggml_guid = uint8_t[16];
using ggml_guid_t = ggml_guid *;

// ---- gguf.h ----

struct gguf_context;
enum gguf_type : int { GGUF_TYPE_UINT32 = 4, GGUF_TYPE_INT32 = 5, GGUF_TYPE_FLOAT32 = 6, GGUF_TYPE_ARRAY = 9 };
struct gguf_init_params {
    bool no_alloc;
    ggml_context ** ctx;
};

// ---- ggml-backend.h ----

using ggml_backend_buffer_type_t = struct ggml_backend_buffer_type *;
using ggml_backend_buffer_t = struct ggml_backend_buffer *;
using ggml_backend_event_t = struct ggml_backend_event *;
using ggml_backend_t = struct ggml_backend *;
using ggml_backend_graph_plan_t = void *;
using ggml_backend_reg_t = struct ggml_backend_reg *;
using ggml_backend_dev_t = struct ggml_backend_device *;
struct ggml_cgraph;

enum ggml_backend_buffer_usage : int { GGML_BACKEND_BUFFER_USAGE_ANY = 0 };
enum ggml_backend_dev_type : int {
    GGML_BACKEND_DEVICE_TYPE_CPU,
    GGML_BACKEND_DEVICE_TYPE_GPU,
    GGML_BACKEND_DEVICE_TYPE_IGPU,
    GGML_BACKEND_DEVICE_TYPE_ACCEL,
    GGML_BACKEND_DEVICE_TYPE_META,
};

struct ggml_backend_dev_caps {
    bool async;
    bool host_buffer;
    bool buffer_from_host_ptr;
    bool events;
    bool mmap_support;  // since 2026; before, a byte that nobody reads
};

struct ggml_backend_dev_props {
    const char * name;
    const char * description;
    size_t memory_free;
    size_t memory_total;
    enum ggml_backend_dev_type type;
    const char * device_id;
    ggml_backend_dev_caps caps;
};

using ggml_backend_set_n_threads_t = void (*)(ggml_backend_t, int n_threads);

// ---- ggml-backend-impl.h ----

struct ggml_backend_buffer_type_i {
    const char * (*get_name)(ggml_backend_buffer_type_t);
    ggml_backend_buffer_t (*alloc_buffer)(ggml_backend_buffer_type_t, size_t size);
#if MIXKVQ_ABI >= 3
    ggml_backend_buffer_t (*alloc_buffer_n)(ggml_backend_buffer_type_t, ggml_tensor **, int n);  // optional
#endif
    size_t (*get_alignment)(ggml_backend_buffer_type_t);
    size_t (*get_max_size)(ggml_backend_buffer_type_t);                             // optional
    size_t (*get_alloc_size)(ggml_backend_buffer_type_t, const ggml_tensor *);      // optional
#if MIXKVQ_ABI >= 3
    size_t (*get_alloc_size_n)(ggml_backend_buffer_type_t, ggml_tensor **, int n);  // optional
#endif
    bool (*is_host)(ggml_backend_buffer_type_t);                                    // optional
};

struct ggml_backend_buffer_type {
    ggml_backend_buffer_type_i iface;
    ggml_backend_dev_t device;
    void * context;
};

struct ggml_backend_buffer_i {
    void (*free_buffer)(ggml_backend_buffer_t);
    void * (*get_base)(ggml_backend_buffer_t);
    ggml_status (*init_tensor)(ggml_backend_buffer_t, ggml_tensor *);
    void (*memset_tensor)(ggml_backend_buffer_t, ggml_tensor *, uint8_t value, size_t offset, size_t size);
    void (*set_tensor)(ggml_backend_buffer_t, ggml_tensor *, const void * data, size_t offset, size_t size);
    void (*get_tensor)(ggml_backend_buffer_t, const ggml_tensor *, void * data, size_t offset, size_t size);
#if MIXKVQ_ABI >= 2
    void (*set_tensor_2d)(ggml_backend_buffer_t, ggml_tensor *, const void *, size_t, size_t, size_t, size_t, size_t);  // optional
    void (*get_tensor_2d)(ggml_backend_buffer_t, const ggml_tensor *, void *, size_t, size_t, size_t, size_t, size_t);  // optional
#endif
    bool (*cpy_tensor)(ggml_backend_buffer_t, const ggml_tensor * src, ggml_tensor * dst);  // dst is in the buffer
    void (*clear)(ggml_backend_buffer_t, uint8_t value);
    void (*reset)(ggml_backend_buffer_t);
};

struct ggml_backend_buffer {
    ggml_backend_buffer_i iface;
    ggml_backend_buffer_type_t buft;
    void * context;
    size_t size;
    ggml_backend_buffer_usage usage;
};

struct ggml_backend_graph_optimize_params;

struct ggml_backend_i {
    const char * (*get_name)(ggml_backend_t);
    void (*free)(ggml_backend_t);
    void (*set_tensor_async)(ggml_backend_t, ggml_tensor *, const void *, size_t, size_t);
    void (*get_tensor_async)(ggml_backend_t, const ggml_tensor *, void *, size_t, size_t);
#if MIXKVQ_ABI >= 2
    void (*set_tensor_2d_async)(ggml_backend_t, ggml_tensor *, const void *, size_t, size_t, size_t, size_t, size_t);
    void (*get_tensor_2d_async)(ggml_backend_t, const ggml_tensor *, void *, size_t, size_t, size_t, size_t, size_t);
#endif
    bool (*cpy_tensor_async)(ggml_backend_t from, ggml_backend_t to, const ggml_tensor *, ggml_tensor *);
    void (*synchronize)(ggml_backend_t);
    ggml_backend_graph_plan_t (*graph_plan_create)(ggml_backend_t, const ggml_cgraph *);
    void (*graph_plan_free)(ggml_backend_t, ggml_backend_graph_plan_t);
    void (*graph_plan_update)(ggml_backend_t, ggml_backend_graph_plan_t, const ggml_cgraph *);
    ggml_status (*graph_plan_compute)(ggml_backend_t, ggml_backend_graph_plan_t);
    ggml_status (*graph_compute)(ggml_backend_t, ggml_cgraph *);
    void (*event_record)(ggml_backend_t, ggml_backend_event_t);
    void (*event_wait)(ggml_backend_t, ggml_backend_event_t);
    // The parameters are there since 0.23. An older ggml passes none: then the third argument has no value, and is handed on to who does not look at it.
    void (*graph_optimize)(ggml_backend_t, ggml_cgraph *, ggml_backend_graph_optimize_params *);
};

struct ggml_backend {
    ggml_guid_t guid;
    ggml_backend_i iface;
    ggml_backend_dev_t device;
    void * context;
};

struct ggml_backend_device_i {
    const char * (*get_name)(ggml_backend_dev_t);
    const char * (*get_description)(ggml_backend_dev_t);
    void (*get_memory)(ggml_backend_dev_t, size_t * free, size_t * total);
    enum ggml_backend_dev_type (*get_type)(ggml_backend_dev_t);
    void (*get_props)(ggml_backend_dev_t, ggml_backend_dev_props *);
    ggml_backend_t (*init_backend)(ggml_backend_dev_t, const char * params);
    ggml_backend_buffer_type_t (*get_buffer_type)(ggml_backend_dev_t);
    ggml_backend_buffer_type_t (*get_host_buffer_type)(ggml_backend_dev_t);                        // optional
    ggml_backend_buffer_t (*buffer_from_host_ptr)(ggml_backend_dev_t, void *, size_t, size_t);     // optional
    bool (*supports_op)(ggml_backend_dev_t, const ggml_tensor *);
    bool (*supports_buft)(ggml_backend_dev_t, ggml_backend_buffer_type_t);
    bool (*offload_op)(ggml_backend_dev_t, const ggml_tensor *);                                   // optional
    ggml_backend_event_t (*event_new)(ggml_backend_dev_t);                                         // optional
    void (*event_free)(ggml_backend_dev_t, ggml_backend_event_t);                                  // optional
    void (*event_synchronize)(ggml_backend_dev_t, ggml_backend_event_t);                           // optional
};

struct ggml_backend_device {
    ggml_backend_device_i iface;
    ggml_backend_reg_t reg;
    void * context;
};

struct ggml_backend_reg_i {
    const char * (*get_name)(ggml_backend_reg_t);
    size_t (*get_device_count)(ggml_backend_reg_t);
    ggml_backend_dev_t (*get_device)(ggml_backend_reg_t, size_t index);
    void * (*get_proc_address)(ggml_backend_reg_t, const char * name);
};

struct ggml_backend_reg {
    int api_version;
    ggml_backend_reg_i iface;
    void * context;
};

struct ggml_backend_event {
    ggml_backend_dev_t device;
    void * context;
};

// Of the graph, too: a part of one that still knows how often each result is used is one that a backend can fuse.
struct ggml_hash_set {
    size_t size;
    uint32_t * used;
    ggml_tensor ** keys;
};

struct ggml_cgraph {
    int size;
    int n_nodes;
    int n_leafs;
    ggml_tensor ** nodes;
    ggml_tensor ** grads;
    ggml_tensor ** grad_accs;
    ggml_tensor ** leafs;
    int32_t * use_counts;
    ggml_hash_set visited_hash_set;
    int order;     // an enum
#if MIXKVQ_ABI >= 2
    uint64_t uid;  // equal for graphs that are the same; 0: not known
#endif
};

// Equal for graphs that are the same; 0: not known.
inline uint64_t uid_of([[maybe_unused]] const ggml_cgraph & graph) {
#if MIXKVQ_ABI >= 2
    return graph.uid;
#else
    return 0;
#endif
}
inline void set_uid([[maybe_unused]] ggml_cgraph & graph, [[maybe_unused]] uint64_t uid) {
#if MIXKVQ_ABI >= 2
    graph.uid = uid;
#endif
}

// ---- what the tables above are, by number of functions and by place ----

constexpr size_t kWord = sizeof(void *);
constexpr int kBackendApiVersion = MIXKVQ_ABI >= 3 ? 3 : 2;
static_assert(sizeof(ggml_backend_buffer_type_i) == (MIXKVQ_ABI >= 3 ? 8 : 6) * kWord, "buffer types of this layout");
static_assert(sizeof(ggml_backend_buffer_i) == (MIXKVQ_ABI >= 2 ? 11 : 9) * kWord, "buffers of this layout");
static_assert(sizeof(ggml_backend_i) == (MIXKVQ_ABI >= 2 ? 16 : 14) * kWord, "backends of this layout");
static_assert(sizeof(ggml_backend_device_i) == 15 * kWord, "devices of this layout");
static_assert(sizeof(ggml_backend_reg_i) == 4 * kWord, "registries of this layout");
static_assert(offsetof(ggml_backend_reg, iface) == kWord, "registries of this layout");
static_assert(kWord != 8 || sizeof(ggml_tensor) == 336, "tensors of this layout");
static_assert(kWord != 8 || sizeof(ggml_backend_dev_props) == 56, "properties of this layout");
static_assert(kWord != 8 || sizeof(ggml_cgraph) == (MIXKVQ_ABI >= 2 ? 96 : 88), "graphs of this layout");

// ---- functions, and numbers by name ----

// X(result, name, arguments). All layouts have them.
#define MIXKVQ_GGML_FUNCTIONS(X)                                                                                              \
    X(ggml_context *, ggml_init, (ggml_init_params))                                                                          \
    X(void, ggml_free, (ggml_context *))                                                                                      \
    X(const char *, ggml_op_name, (ggml_op))                                                                                  \
    X(const char *, ggml_type_name, (ggml_type))                                                                              \
    X(bool, ggml_is_quantized, (ggml_type))                                                                                   \
    X(bool, ggml_is_empty, (const ggml_tensor *))                                                                             \
    X(size_t, ggml_nbytes, (const ggml_tensor *))                                                                             \
    X(int64_t, ggml_nelements, (const ggml_tensor *))                                                                         \
    X(size_t, ggml_graph_overhead_custom, (size_t, bool))                                                                     \
    X(ggml_cgraph *, ggml_new_graph_custom, (ggml_context *, size_t, bool))                                                   \
    X(void, ggml_graph_add_node, (ggml_cgraph *, ggml_tensor *))                                                              \
    X(const char *, ggml_backend_buft_name, (ggml_backend_buffer_type_t))                                                     \
    X(ggml_backend_buffer_t, ggml_backend_buft_alloc_buffer, (ggml_backend_buffer_type_t, size_t))                            \
    X(size_t, ggml_backend_buft_get_alignment, (ggml_backend_buffer_type_t))                                                  \
    X(size_t, ggml_backend_buft_get_max_size, (ggml_backend_buffer_type_t))                                                   \
    X(size_t, ggml_backend_buft_get_alloc_size, (ggml_backend_buffer_type_t, const ggml_tensor *))                            \
    X(bool, ggml_backend_buft_is_host, (ggml_backend_buffer_type_t))                                                          \
    X(ggml_backend_dev_t, ggml_backend_buft_get_device, (ggml_backend_buffer_type_t))                                         \
    X(ggml_backend_buffer_t, ggml_backend_buffer_init, (ggml_backend_buffer_type_t, ggml_backend_buffer_i, void *, size_t))   \
    X(void, ggml_backend_buffer_free, (ggml_backend_buffer_t))                                                                \
    X(void *, ggml_backend_buffer_get_base, (ggml_backend_buffer_t))                                                          \
    X(size_t, ggml_backend_buffer_get_size, (ggml_backend_buffer_t))                                                          \
    X(ggml_backend_buffer_type_t, ggml_backend_buffer_get_type, (ggml_backend_buffer_t))                                      \
    X(void, ggml_backend_buffer_clear, (ggml_backend_buffer_t, uint8_t))                                                      \
    X(void, ggml_backend_buffer_reset, (ggml_backend_buffer_t))                                                               \
    X(const char *, ggml_backend_name, (ggml_backend_t))                                                                      \
    X(void, ggml_backend_free, (ggml_backend_t))                                                                              \
    X(ggml_backend_dev_t, ggml_backend_get_device, (ggml_backend_t))                                                          \
    X(void, ggml_backend_synchronize, (ggml_backend_t))                                                                       \
    X(ggml_status, ggml_backend_graph_compute, (ggml_backend_t, ggml_cgraph *))                                               \
    X(ggml_status, ggml_backend_graph_compute_async, (ggml_backend_t, ggml_cgraph *))                                         \
    X(ggml_backend_event_t, ggml_backend_event_new, (ggml_backend_dev_t))                                                     \
    X(void, ggml_backend_event_free, (ggml_backend_event_t))                                                                  \
    X(void, ggml_backend_event_record, (ggml_backend_event_t, ggml_backend_t))                                                \
    X(void, ggml_backend_event_synchronize, (ggml_backend_event_t))                                                           \
    X(void, ggml_backend_event_wait, (ggml_backend_t, ggml_backend_event_t))                                                  \
    X(size_t, ggml_backend_dev_count, ())                                                                                     \
    X(ggml_backend_dev_t, ggml_backend_dev_get, (size_t))                                                                     \
    X(ggml_backend_dev_t, ggml_backend_dev_by_type, (enum ggml_backend_dev_type))                                             \
    X(const char *, ggml_backend_dev_name, (ggml_backend_dev_t))                                                              \
    X(const char *, ggml_backend_dev_description, (ggml_backend_dev_t))                                                       \
    X(void, ggml_backend_dev_memory, (ggml_backend_dev_t, size_t *, size_t *))                                                \
    X(enum ggml_backend_dev_type, ggml_backend_dev_type, (ggml_backend_dev_t))                                                \
    X(void, ggml_backend_dev_get_props, (ggml_backend_dev_t, ggml_backend_dev_props *))                                       \
    X(ggml_backend_reg_t, ggml_backend_dev_backend_reg, (ggml_backend_dev_t))                                                 \
    X(ggml_backend_t, ggml_backend_dev_init, (ggml_backend_dev_t, const char *))                                              \
    X(ggml_backend_buffer_type_t, ggml_backend_dev_buffer_type, (ggml_backend_dev_t))                                         \
    X(ggml_backend_buffer_type_t, ggml_backend_dev_host_buffer_type, (ggml_backend_dev_t))                                    \
    X(bool, ggml_backend_dev_supports_op, (ggml_backend_dev_t, const ggml_tensor *))                                          \
    X(bool, ggml_backend_dev_supports_buft, (ggml_backend_dev_t, ggml_backend_buffer_type_t))                                 \
    X(bool, ggml_backend_dev_offload_op, (ggml_backend_dev_t, const ggml_tensor *))                                           \
    X(const char *, ggml_backend_reg_name, (ggml_backend_reg_t))                                                              \
    X(void *, ggml_backend_reg_get_proc_address, (ggml_backend_reg_t, const char *))                                          \
    X(gguf_context *, gguf_init_from_file, (const char *, gguf_init_params))                                                  \
    X(void, gguf_free, (gguf_context *))                                                                                      \
    X(int64_t, gguf_find_key, (const gguf_context *, const char *))                                                           \
    X(gguf_type, gguf_get_kv_type, (const gguf_context *, int64_t))                                                           \
    X(gguf_type, gguf_get_arr_type, (const gguf_context *, int64_t))                                                          \
    X(uint32_t, gguf_get_val_u32, (const gguf_context *, int64_t))                                                            \
    X(int32_t, gguf_get_val_i32, (const gguf_context *, int64_t))                                                             \
    X(size_t, gguf_get_arr_n, (const gguf_context *, int64_t))                                                                \
    X(const void *, gguf_get_arr_data, (const gguf_context *, int64_t))                                                       \
    X(int64_t, gguf_find_tensor, (const gguf_context *, const char *))                                                        \
    X(size_t, gguf_get_data_offset, (const gguf_context *))                                                                   \
    X(size_t, gguf_get_tensor_offset, (const gguf_context *, int64_t))                                                        \
    X(size_t, gguf_get_tensor_size, (const gguf_context *, int64_t))                                                          \
    X(ggml_type, gguf_get_tensor_type, (const gguf_context *, int64_t))

#define MIXKVQ_DECLARE(result, name, arguments) extern result(*name) arguments;
MIXKVQ_GGML_FUNCTIONS(MIXKVQ_DECLARE)
#undef MIXKVQ_DECLARE

// X(name, what ggml_op_name or ggml_type_name says)
#define MIXKVQ_GGML_OPS(X)                                                                                                          \
    X(NONE) X(CONT) X(FLASH_ATTN_EXT) X(MUL_MAT) X(MUL_MAT_ID) X(PERMUTE) X(RESHAPE) X(ROPE) X(SET_ROWS) X(TRANSPOSE) X(VIEW)
#define MIXKVQ_GGML_TYPES(X) X(F32, "f32") X(F16, "f16") X(I8, "i8") X(I32, "i32") X(I64, "i64")

#define MIXKVQ_DECLARE(name) extern ggml_op GGML_OP_##name;
MIXKVQ_GGML_OPS(MIXKVQ_DECLARE)
#undef MIXKVQ_DECLARE
#define MIXKVQ_DECLARE(name, text) extern ggml_type GGML_TYPE_##name;
MIXKVQ_GGML_TYPES(MIXKVQ_DECLARE)
#undef MIXKVQ_DECLARE

extern bool has_compute_flag;  // nodes that are to be computed have GGML_TENSOR_FLAG_COMPUTE; before 2026-01-30 all were
extern bool asserts_sizes;     // this build of ggml ends the process where a buffer type asks for less than a tensor's nominal size

}  // namespace mixkvq::MIXKVQ_GLUE
