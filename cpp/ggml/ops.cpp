// The graph operations on cache tensors: write (SET_ROWS), attention (FLASH_ATTN_EXT), context shift (ROPE in place), and, for everything
// else, the inner backend on an F16 copy.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "glue.h"

namespace mixkvq::glue {

namespace {

constexpr const char * kTransposed = "flash attention is off, so llama.cpp stores the values transposed; turn flash attention on";
constexpr const char * kLatent = "the values are a part of the keys (latent attention)";

}  // namespace

// Learns from an operation how the cells of its cache tensors are divided into heads.
void learn_geometry(const ggml_tensor * op) {
    if (op->op == GGML_OP_FLASH_ATTN_EXT) {
        CacheTensor * k = cache_of(op->src[1]);
        CacheTensor * v = cache_of(op->src[2]);
        if (k && k == v) {
            k->make_plain(kLatent);
            return;
        }
        for (CacheTensor * t : {k, v}) {
            const ggml_tensor * view = t == k ? op->src[1] : op->src[2];
            if (t) t->decide(int(view->ne[0]), int(view->ne[2]));
        }
    } else if (op->op == GGML_OP_SET_ROWS) {
        CacheTensor * t = cache_of(op);
        if (t && op->ne[0] == 1 && t->row_bytes > 2) t->make_plain(kTransposed);
    } else if (op->op == GGML_OP_MUL_MAT) {
        CacheTensor * k = cache_of(op->src[0]);
        const ggml_tensor * view = op->src[0];
        if (k && !k->is_value && view->nb[1] == k->row_bytes && view->ne[0] * view->ne[2] * 2 == int64_t(k->row_bytes)) {
            k->decide(int(view->ne[0]), int(view->ne[2]));
        }
    } else if (op->op == GGML_OP_CONT) {
        // Attention with a bias per position (T5): the values of all cells, transposed for a matrix product.
        CacheTensor * v = cache_of(op->src[0]);
        const ggml_tensor * view = op->src[0];
        if (v && v->is_value && view->nb[0] == v->row_bytes && view->nb[1] == 2 && view->ne[1] * view->ne[2] * 2 == int64_t(v->row_bytes)) {
            v->decide(int(view->ne[1]), int(view->ne[2]));
        }
    } else if (op->op == GGML_OP_ROPE) {
        CacheTensor * k = cache_of(op->src[0]);
        if (k) k->decide(int(op->src[0]->nb[1] / 2), int(op->src[0]->ne[1]));
    }
}

// ---- write ----

int64_t index_at(const void * indices, const ggml_tensor * tensor, int64_t i) {
    const char * at = static_cast<const char *>(indices) + i * tensor->nb[0];
    return tensor->type == GGML_TYPE_I64 ? *reinterpret_cast<const int64_t *>(at) : *reinterpret_cast<const int32_t *>(at);
}

bool can_write_rows(const CacheTensor & t, const ggml_tensor * op) {
    return t.mode != CacheTensor::Mode::plain && size_t(op->ne[0]) * 2 == t.row_bytes && offset_in_cache(op) == 0 && op->src[0]->ne[2] == 1 &&
           op->src[0]->ne[3] == 1 && ggml_nelements(op) * 2 == int64_t(t.nominal_bytes);
}

static ggml_status write_rows(BackendContext & backend, CacheTensor & t, const ggml_tensor * op) {
    const ggml_tensor * rows = op->src[0];
    const int n_cells = t.store->shape().n_cells;
    const int64_t n_all = int64_t(n_cells) * t.store->shape().n_streams;
    if (!t.store->settle(backend.n_threads)) return GGML_STATUS_FAILED;  // normally nothing to do: the attention of the last batch did it
    backend.cells.clear();
    for (int64_t i = 0; i < rows->ne[1]; ++i) {
        const int64_t cell = index_at(op->src[1]->data, op->src[1], i);
        if (cell < 0 || cell >= n_all) return GGML_STATUS_FAILED;
        backend.cells.push_back({int(cell / n_cells), int(cell % n_cells)});
    }
    t.store->write(backend.cells.data(), int(backend.cells.size()), {rows->data, rows->nb[1], rows->type != GGML_TYPE_F32});
    return GGML_STATUS_SUCCESS;
}

// ---- attention ----

bool can_attend(const CacheTensor * k, const CacheTensor * v, const ggml_tensor * op) {
    if (!k || !v || k->mode != CacheTensor::Mode::packed || v->mode != CacheTensor::Mode::packed || k->n_heads != v->n_heads) return false;
    if (k->owner != v->owner || k->store->shape().n_pages() != v->store->shape().n_pages()) return false;
    const ggml_tensor * q = op->src[0];
    const ggml_tensor * mask = op->src[3];
    auto is_cache_view = [](const CacheTensor & t, const ggml_tensor * view) {
        const size_t stream_bytes = t.row_bytes * t.store->shape().n_cells;
        return view->nb[1] == t.row_bytes && view->nb[2] == size_t(2) * t.head_size && offset_in_cache(view) % stream_bytes == 0 &&
               (view->ne[3] == 1 || view->nb[3] == stream_bytes);
    };
    return is_cache_view(*k, op->src[1]) && is_cache_view(*v, op->src[2]) && offset_in_cache(op->src[1]) / k->row_bytes == offset_in_cache(op->src[2]) / v->row_bytes &&
           q->type == GGML_TYPE_F32 && op->type == GGML_TYPE_F32 && q->nb[0] == 4 && q->ne[2] % k->n_heads == 0 && q->ne[3] == op->src[1]->ne[3] &&
           (!mask || (mask->type == GGML_TYPE_F16 && (mask->ne[2] == 1 || mask->ne[2] == q->ne[2]) && (mask->ne[3] == 1 || mask->ne[3] == q->ne[3])));
}

AttentionCall attention_call(const CacheTensor & k, const ggml_tensor * op) {
    const ggml_tensor * q = op->src[0];
    const ggml_tensor * mask = op->src[3];
    AttentionCall c;
    c.q = static_cast<const float *>(q->data);
    c.q_token = q->nb[1] / 4, c.q_head = q->nb[2] / 4, c.q_stream = q->nb[3] / 4;
    c.out = static_cast<float *>(op->data);
    c.out_head = op->nb[1] / 4, c.out_token = op->nb[2] / 4, c.out_stream = op->nb[3] / 4;
    if (mask) {
        c.mask = static_cast<const half *>(mask->data);
        c.mask_token = mask->nb[1] / 2;
        c.mask_head = mask->ne[2] == 1 ? 0 : mask->nb[2] / 2;
        c.mask_stream = mask->ne[3] == 1 ? 0 : mask->nb[3] / 2;
    }
    c.sinks = op->src[4] ? static_cast<const float *>(op->src[4]->data) : nullptr;
    c.n_tokens = int(q->ne[1]);
    c.n_heads = int(q->ne[2]);
    c.n_streams = int(q->ne[3]);
    c.first_stream = int(offset_in_cache(op->src[1]) / (k.row_bytes * k.store->shape().n_cells));
    c.n_kv = int(op->src[1]->ne[1]);
    float params[3];
    std::memcpy(params, op->op_params, sizeof(params));
    c.scale = params[0], c.max_bias = params[1], c.softcap = params[2];
    return c;
}

void warn_unpacked(const CacheTensor & k) {
    warn_once("an attention of " + k.name + " has a form that the packed kernels do not serve; it is unpacked for every token");
}

namespace {

// After the attention of a batch its older pages can go, and the scratch that a long batch borrowed goes back to the system: next to the
// batch itself that costs nothing, and what stays allocated is what the cache needs. False: a codec failed.
bool settle_after(BackendContext & backend, CacheTensor * t) {
    if (!t || t->mode != CacheTensor::Mode::packed) return true;
    const bool taken = t->store->settle(backend.n_threads);
    t->owner->memory->trim();
    return taken;
}

// ---- anything else: the inner backend on F16 copies ----

}  // namespace

ggml_status run_node(ggml_backend_t backend, ggml_tensor * node) {
    ggml_init_params params = {ggml_graph_overhead_custom(4, false) + 1024, nullptr, true};
    ggml_context * ctx = ggml_init(params);
    if (!ctx) return GGML_STATUS_ALLOC_FAILED;
    ggml_cgraph * graph = ggml_new_graph_custom(ctx, 4, false);
    ggml_graph_add_node(graph, node);
    const ggml_status status = ggml_backend_graph_compute_async(backend, graph);
    ggml_free(ctx);
    return status;
}

namespace {

// A stand-in for a tensor in a cache, with real memory behind its data: the plain store itself, or a copy of the span that it covers.
struct StandIn {
    ggml_tensor tensor;
    Region copy;
    CacheTensor * cache = nullptr;
    size_t offset = 0;

    bool make(const ggml_tensor * t, bool fill) {
        tensor = *t;
        tensor.view_src = nullptr;
        tensor.view_offs = 0;
        tensor.buffer = nullptr;
        tensor.extra = nullptr;
        cache = cache_of(t);
        if (!cache) return true;
        offset = offset_in_cache(t);
        if (cache->mode == CacheTensor::Mode::plain) {
            tensor.data = cache->plain_data + offset;
            return true;
        }
        copy = Region(ggml_nbytes(t));
        if (!copy.data()) return false;
        if (fill) cache->read(offset, copy.data(), copy.size());
        tensor.data = copy.data();
        return true;
    }
};

ggml_status run_on_copies(BackendContext & backend, ggml_tensor * op) {
    StandIn sources[GGML_MAX_SRC];
    StandIn result;
    if (!result.make(op, /*fill=*/true)) return GGML_STATUS_ALLOC_FAILED;
    for (int i = 0; i < GGML_MAX_SRC; ++i) {
        const ggml_tensor * src = op->src[i];
        if (!src || !cache_of(src)) continue;
        // An operation in place must see one copy, not two.
        const bool same = cache_of(op) && src->data == op->data && result.copy.data();
        if (same) {
            sources[i].tensor = *src;
            sources[i].tensor.view_src = nullptr;
            sources[i].tensor.data = result.tensor.data;
        } else if (!sources[i].make(src, /*fill=*/true)) {
            return GGML_STATUS_ALLOC_FAILED;
        }
        result.tensor.src[i] = &sources[i].tensor;
    }
    const ggml_status status = run_node(backend.inner, &result.tensor);
    if (status == GGML_STATUS_SUCCESS && result.copy.data()) {
        result.cache->write(result.offset, result.copy.data(), result.copy.size(), backend.n_threads);
    }
    return status;
}

}  // namespace

// ---- context shift ----

bool is_shift(const CacheTensor & t, const ggml_tensor * op) {
    const ggml_tensor * k = op->src[0];
    return t.mode == CacheTensor::Mode::packed && op->op == GGML_OP_ROPE && op->data == k->data && op->src[1]->type == GGML_TYPE_I32 &&
           k->nb[2] == t.row_bytes && k->nb[1] == size_t(2) * t.head_size && k->ne[1] == t.n_heads && offset_in_cache(k) < t.row_bytes &&
           k->ne[2] == int64_t(t.store->shape().n_cells) * t.store->shape().n_streams && k->ne[3] == 1 && op->src[1]->ne[0] == k->ne[2];
}

// llama.cpp passes the parameters with which keys are turned when they come, and with YaRN these make them longer, too: a shift would do so again.
void keep_lengths(ggml_tensor & rope) {
    float freq_scale, ext_factor;
    std::memcpy(&freq_scale, rope.op_params + 6, sizeof(float));
    std::memcpy(&ext_factor, rope.op_params + 7, sizeof(float));
    const float attn_factor = ext_factor != 0 ? 1 / (1 + 0.1f * std::log(1 / freq_scale)) : 1.0f;
    std::memcpy(rope.op_params + 8, &attn_factor, sizeof(float));
}

// Turns the keys page by page, only where the shift is not zero, so that no more than a page is ever unpacked.
static ggml_status shift(BackendContext & backend, CacheTensor & t, ggml_tensor * op) {
    const StoreShape & shape = t.store->shape();
    const auto * by = static_cast<const int32_t *>(op->src[1]->data);
    const size_t skip = offset_in_cache(op->src[0]);
    ggml_status status = GGML_STATUS_SUCCESS;
    for (int s = 0; s < shape.n_streams && status == GGML_STATUS_SUCCESS; ++s) {
        for (int p = 0; p < shape.n_pages() && status == GGML_STATUS_SUCCESS; ++p) {
            const int cell = p * kPageCells, n = std::min(kPageCells, shape.n_cells - cell);
            const int32_t * page_by = by + size_t(s) * shape.n_cells + cell;
            if (std::all_of(page_by, page_by + n, [](int32_t x) { return x == 0; })) continue;
            t.store->edit_page(s, p, backend.n_threads, [&](half * rows) {
                ggml_tensor k = *op->src[0], positions = *op->src[1], node = *op;
                k.data = reinterpret_cast<char *>(rows) + skip;
                k.ne[2] = n;
                positions.data = const_cast<int32_t *>(page_by);
                positions.ne[0] = n;
                node.data = k.data;
                node.ne[2] = n;
                node.src[0] = &k;
                node.src[1] = &positions;
                k.view_src = node.view_src = nullptr;
                keep_lengths(node);
                status = run_node(backend.inner, &node);
            });
        }
    }
    return status;
}

bool is_view(ggml_op op) {
    return op == GGML_OP_NONE || op == GGML_OP_VIEW || op == GGML_OP_RESHAPE || op == GGML_OP_PERMUTE || op == GGML_OP_TRANSPOSE;
}

bool touches_cache(const ggml_tensor * op, ggml_backend_buffer_type_t type) {
    auto is_there = [&](const ggml_tensor * t) { return is_in_memory_of_llama(t) && root_of(t)->buffer->buft == type; };
    bool touches = is_there(op);
    for (int i = 0; i < GGML_MAX_SRC && !touches; ++i) touches = op->src[i] && is_there(op->src[i]);
    if (!touches || is_view(op->op)) return touches;
    take_dry(op);
    for (int i = 0; i < GGML_MAX_SRC && op->src[i]; ++i) take_dry(op->src[i]);
    learn_geometry(op);
    return true;
}

ggml_status compute(BackendContext & backend, ggml_tensor * op) {
    if (is_view(op->op) || !(op->flags & GGML_TENSOR_FLAG_COMPUTE) || ggml_is_empty(op)) return GGML_STATUS_SUCCESS;
    BufferLocks locks;
    locks.add(buffer_of(op));
    for (int i = 0; i < GGML_MAX_SRC; ++i) locks.add(op->src[i] ? buffer_of(op->src[i]) : nullptr);
    locks.lock();
    learn_geometry(op);
    CacheTensor * to = cache_of(op);
    if (to) {
        to->owner->touched = true;
    } else if (is_in_memory_of_llama(op)) {
        buffer_of(op)->touched = true;
    }
    if (op->op == GGML_OP_SET_ROWS && to && can_write_rows(*to, op)) return write_rows(backend, *to, op);
    if (op->op == GGML_OP_FLASH_ATTN_EXT) {
        CacheTensor * k = cache_of(op->src[1]);
        CacheTensor * v = cache_of(op->src[2]);
        ggml_status status = GGML_STATUS_SUCCESS;
        if (can_attend(k, v, op)) {
            k->owner->session->n_threads = backend.n_threads;
            attention(kernels(), *k->store, *v->store, attention_call(*k, op), backend.n_threads, backend.workspace);
        } else {
            if (k && v && (k->mode == CacheTensor::Mode::packed || v->mode == CacheTensor::Mode::packed)) {
                warn_unpacked(*k);
            }
            status = run_on_copies(backend, op);
        }
        const bool taken = settle_after(backend, k) && settle_after(backend, v);
        return taken ? status : GGML_STATUS_FAILED;
    }
    if (to && op->op == GGML_OP_ROPE && is_shift(*to, op)) return shift(backend, *to, op);
    return run_on_copies(backend, op);
}

}  // namespace mixkvq::glue
