// The backend of the CPU. Nodes that touch no cache go to the inner backend together, as they are; the others are done one by one.

#include <mutex>

#include "backends.h"
#include "border.h"
#include "operations.h"

namespace mixkvq::MIXKVQ_GLUE {

ggml_cgraph slice_of(const ggml_cgraph & graph, int first, int end) {
    ggml_cgraph slice = graph;
    slice.nodes += first;
    slice.n_nodes = end - first;
    slice.size = slice.n_leafs = 0;
    slice.grads = slice.grad_accs = slice.leafs = nullptr;
    set_uid(slice, 0);
    return slice;
}

ggml_guid backend_guid = {0x6d, 0x69, 0x78, 0x6b, 0x76, 0x71, 0x2d, 0x63, 0x70, 0x75, 0x2d, 0x67, 0x67, 0x6d, 0x6c, 0x01};

namespace {

struct BackendContext {
    ggml_backend_t inner = nullptr;
    int n_threads = 1;
    AttentionWorkspace workspace;
    std::vector<PageStore::Cell> cells;  // of a write
};

BackendContext & get(ggml_backend_t backend) { return *static_cast<BackendContext *>(backend->context); }

const char * get_name(ggml_backend_t) { return "MIXKVQ-CPU"; }

void free_backend(ggml_backend_t backend) {
    at_border("out of memory while a context was freed", [&] {
        ggml_backend_free(get(backend).inner);
        delete static_cast<BackendContext *>(backend->context);
        delete backend;
    });
}

ggml_status write_rows(BackendContext & backend, CacheTensor & t, const ggml_tensor * op) {
    if (!t.store->settle(backend.n_threads)) return GGML_STATUS_FAILED;  // normally nothing to do: the attention of the last batch did it
    if (!find_cells(t, op, op->src[1]->data, backend.cells)) return GGML_STATUS_FAILED;
    t.store->write(backend.cells.data(), int(backend.cells.size()), rows_of(op, /*on_host=*/true));
    warn_unread(t);
    return GGML_STATUS_SUCCESS;
}

void attend(BackendContext & backend, CacheTensor & k, CacheTensor & v, const ggml_tensor * op) {
    k.owner->session->n_threads = backend.n_threads;
    attention(kernels(), *k.store, *v.store, attention_call(k, op), backend.n_threads, backend.workspace);
}

// After the attention of a batch its older pages can go, and the scratch that a long batch borrowed goes back to the system: next to the
// batch itself that costs nothing, and what stays allocated is what the cache needs. False: a codec failed.
bool settle_after(BackendContext & backend, CacheTensor * t) {
    if (!t || t->mode != CacheTensor::Mode::packed) return true;
    const bool taken = t->store->settle(backend.n_threads);
    t->owner->memory->trim();
    return taken;
}

ggml_status shift(BackendContext & backend, CacheTensor & t, const ggml_tensor * op) {
    const auto * by = static_cast<const int32_t *>(op->src[1]->data);
    return shift_pages(t, op, by, backend.n_threads, [&](PageShift & part) { return run_node(backend.inner, &part.node); });
}

ggml_status run_on_copies(BackendContext & backend, const ggml_tensor * op) {
    OnCopies on(op);
    std::vector<Region> regions;
    regions.reserve(on.copies.size());
    for (OnCopies::Copy & copy : on.copies) {
        if (copy.same < 0) {
            const Span & span = copy.span;
            regions.emplace_back(span.bytes());
            if (!regions.back().data()) return GGML_STATUS_ALLOC_FAILED;
            span.cache->read(span.first * span.cache->row_bytes, regions.back().data(), span.bytes());
        }
        copy.tensor->data = (copy.same < 0 ? regions.back() : regions[copy.same]).data() + copy.span.skip;
    }
    const ggml_status status = run_node(backend.inner, &on.node);
    if (status != GGML_STATUS_SUCCESS || !on.result) return status;
    on.result->write(offset_in_cache(op), on.node.data, ggml_nbytes(op), backend.n_threads);
    return status;
}

ggml_status compute(BackendContext & backend, ggml_tensor * op) {
    BufferLocks locks;
    locks.add(buffer_of(op));
    for (int i = 0; i < GGML_MAX_SRC; ++i) locks.add(op->src[i] ? buffer_of(op->src[i]) : nullptr);
    locks.lock();
    learn_geometry(op);
    const Kind kind = kind_of(op);
    if (kind == Kind::view) return GGML_STATUS_SUCCESS;
    CacheTensor * to = cache_of(op);
    if (to || is_in_memory_of_llama(op)) buffer_of(op)->touched = true;
    if (kind == Kind::write) return write_rows(backend, *to, op);
    if (kind == Kind::shift) return shift(backend, *to, op);
    CacheTensor * k = op->op == GGML_OP_FLASH_ATTN_EXT ? cache_of(op->src[1]) : nullptr;
    CacheTensor * v = op->op == GGML_OP_FLASH_ATTN_EXT ? cache_of(op->src[2]) : nullptr;
    ggml_status status = GGML_STATUS_SUCCESS;
    if (kind == Kind::attend) {
        attend(backend, *k, *v, op);
    } else {
        warn_unpacked(op);
        status = run_on_copies(backend, op);
    }
    const bool taken = settle_after(backend, k) && settle_after(backend, v);
    return taken ? status : GGML_STATUS_FAILED;
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

}  // namespace mixkvq::MIXKVQ_GLUE
