#include "glue.h"

namespace mixkvq::glue {

ggml_cgraph slice_of(const ggml_cgraph & graph, int first, int end) {
    ggml_cgraph slice = graph;
    slice.nodes += first;
    slice.n_nodes = end - first;
    slice.size = slice.n_leafs = 0;
    slice.grads = slice.grad_accs = slice.leafs = nullptr;
    slice.uid = 0;
    return slice;
}

ggml_guid backend_guid = {0x6d, 0x69, 0x78, 0x6b, 0x76, 0x71, 0x2d, 0x63, 0x70, 0x75, 0x2d, 0x67, 0x67, 0x6d, 0x6c, 0x01};

namespace {

BackendContext & get(ggml_backend_t backend) { return *static_cast<BackendContext *>(backend->context); }

const char * get_name(ggml_backend_t) { return "MIXKVQ-CPU"; }

void free_backend(ggml_backend_t backend) {
    at_border("out of memory while a context was freed", [&] {
        ggml_backend_free(get(backend).inner);
        delete static_cast<BackendContext *>(backend->context);
        delete backend;
    });
}

// Nodes that touch no cache go to the inner backend together, as they are: there are some in a model that ggml divides between devices (-sm tensor).
ggml_status graph_compute(ggml_backend_t backend, ggml_cgraph * graph) {
    try {
        ggml_status status = GGML_STATUS_SUCCESS;
        const int n = graph->n_nodes;
        for (int i = 0; i < n && status == GGML_STATUS_SUCCESS;) {
            int end = i;
            while (end < n && !touches_cache(graph->nodes[end], &static_cast<Device *>(backend->device->context)->type)) ++end;
            if (end == i) {
                status = compute(get(backend), graph->nodes[i++]);
                continue;
            }
            ggml_cgraph slice = slice_of(*graph, i, end);
            status = ggml_backend_graph_compute(get(backend).inner, &slice);
            i = end;
        }
        return status;
    } catch (...) {
        return say_exception("out of memory in the cache");
    }
}

}  // namespace

ggml_backend_t make_backend(ggml_backend_dev_t device) {
    begin_context();
    auto context = std::make_unique<BackendContext>();
    auto backend = std::make_unique<ggml_backend>();
    context->inner = ggml_backend_dev_init(inner_device(), nullptr);
    if (!context->inner) return nullptr;
    backend->guid = &backend_guid;
    backend->iface.get_name = get_name;
    backend->iface.free = free_backend;
    backend->iface.graph_compute = graph_compute;
    backend->device = device;
    backend->context = context.release();
    return backend.release();
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
