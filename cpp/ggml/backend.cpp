#include <new>

#include "glue.h"

namespace mixkvq::glue {

ggml_guid backend_guid = {0x6d, 0x69, 0x78, 0x6b, 0x76, 0x71, 0x2d, 0x63, 0x70, 0x75, 0x2d, 0x67, 0x67, 0x6d, 0x6c, 0x01};

namespace {

BackendContext & get(ggml_backend_t backend) { return *static_cast<BackendContext *>(backend->context); }

const char * get_name(ggml_backend_t) { return "MIXKVQ-CPU"; }

void free_backend(ggml_backend_t backend) {
    ggml_backend_free(get(backend).inner);
    delete static_cast<BackendContext *>(backend->context);
    delete backend;
}

ggml_status graph_compute(ggml_backend_t backend, ggml_cgraph * graph) {
    try {
        for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
            const ggml_status status = compute(get(backend), ggml_graph_node(graph, i));
            if (status != GGML_STATUS_SUCCESS) return status;
        }
    } catch (const std::bad_alloc &) {
        warn_once("out of memory in the cache");
        return GGML_STATUS_ALLOC_FAILED;
    }
    return GGML_STATUS_SUCCESS;
}

}  // namespace

ggml_backend_t make_backend(ggml_backend_dev_t device) {
    ggml_backend_t inner = ggml_backend_dev_init(inner_device(), nullptr);
    if (!inner) return nullptr;
    auto * context = new BackendContext;
    context->inner = inner;
    auto * backend = new ggml_backend{};
    backend->guid = &backend_guid;
    backend->iface.get_name = get_name;
    backend->iface.free = free_backend;
    backend->iface.graph_compute = graph_compute;
    backend->device = device;
    backend->context = context;
    return backend;
}

void set_n_threads(ggml_backend_t backend, int n_threads) {
    if (backend->device != cpu_device()) return;
    BackendContext & context = get(backend);
    context.n_threads = n_threads;
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(inner_device());
    auto set_inner = reinterpret_cast<ggml_backend_set_n_threads_t>(ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads"));
    if (set_inner) set_inner(context.inner, n_threads);
}

}  // namespace mixkvq::glue
