// Writes (SET_ROWS), attention (FLASH_ATTN_EXT), context shift (ROPE in place), and everything else, on copies.

#include "operations.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "border.h"

namespace mixkvq::MIXKVQ_GLUE {

namespace {

constexpr const char * kTransposed = "flash attention is off, so llama.cpp stores the values transposed; turn flash attention on";
constexpr const char * kLatent = "the values are a part of the keys (latent attention)";

bool is_packed(const CacheTensor & t) { return t.mode != CacheTensor::Mode::plain; }
// A plain tensor whose data is where llama.cpp put it.
bool is_as_it_is(const CacheTensor & t) {
    const uint8_t * base = t.owner->memory->base();
    return !is_packed(t) && t.plain_data >= base && t.plain_data < base + t.owner->size;
}

int64_t index_at(const void * indices, const ggml_tensor * tensor, int64_t i) {
    const char * at = static_cast<const char *>(indices) + i * tensor->nb[0];
    return tensor->type == GGML_TYPE_I64 ? *reinterpret_cast<const int64_t *>(at) : *reinterpret_cast<const int32_t *>(at);
}

bool can_write_rows(const CacheTensor & t, const ggml_tensor * op) {
    return t.mode != CacheTensor::Mode::plain && size_t(op->ne[0]) * 2 == t.row_bytes && offset_in_cache(op) == 0 && op->src[0]->ne[2] == 1 &&
           op->src[0]->ne[3] == 1 && ggml_nelements(op) * 2 == int64_t(t.nominal_bytes);
}

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

}  // namespace

bool is_view(ggml_op op) {
    return op == GGML_OP_NONE || op == GGML_OP_VIEW || op == GGML_OP_RESHAPE || op == GGML_OP_PERMUTE || op == GGML_OP_TRANSPOSE;
}

Kind kind_of(const ggml_tensor * node) {
    if (is_view(node->op) || (has_compute_flag && !(node->flags & GGML_TENSOR_FLAG_COMPUTE)) || ggml_is_empty(node)) return Kind::view;
    CacheTensor * to = cache_of(node);
    bool any = to && !is_as_it_is(*to);
    for (int i = 0; i < GGML_MAX_SRC && !any; ++i) {
        const CacheTensor * t = node->src[i] ? cache_of(node->src[i]) : nullptr;
        any = t && !is_as_it_is(*t);
    }
    if (!any) return Kind::inner;
    if (node->op == GGML_OP_SET_ROWS && to && can_write_rows(*to, node)) return Kind::write;
    if (to && is_shift(*to, node)) return Kind::shift;
    if (node->op == GGML_OP_FLASH_ATTN_EXT && can_attend(cache_of(node->src[1]), cache_of(node->src[2]), node)) return Kind::attend;
    return Kind::copies;
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

bool find_cells(const CacheTensor & t, const ggml_tensor * op, const void * indices, std::vector<PageStore::Cell> & cells) {
    const int n_cells = t.store->shape().n_cells;
    const int64_t n_all = int64_t(n_cells) * t.store->shape().n_streams;
    cells.clear();
    for (int64_t i = 0; i < op->src[0]->ne[1]; ++i) {
        const int64_t cell = index_at(indices, op->src[1], i);
        if (cell < 0 || cell >= n_all) return false;
        cells.push_back({int(cell / n_cells), int(cell % n_cells)});
    }
    return true;
}

Rows rows_of(const ggml_tensor * write, bool on_host) {
    const ggml_tensor * rows = write->src[0];
    return {rows->data, rows->nb[1], rows->type != GGML_TYPE_F32, on_host};
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

// ---- context shift ----

ggml_status shift_pages(CacheTensor & t, const ggml_tensor * op, const int32_t * by, int n_threads,
                        const std::function<ggml_status(PageShift &)> & run) {
    const StoreShape & shape = t.store->shape();
    ggml_status status = GGML_STATUS_SUCCESS;
    for (int i = 0; i < shape.n_streams * shape.n_pages() && status == GGML_STATUS_SUCCESS; ++i) {
        const int s = i / shape.n_pages(), p = i % shape.n_pages(), cell = p * kPageCells, n = std::min(kPageCells, shape.n_cells - cell);
        const size_t at = size_t(s) * shape.n_cells + cell;
        if (std::all_of(by + at, by + at + n, [](int32_t x) { return x == 0; })) continue;
        t.store->edit_page(s, p, n_threads, [&](half * rows) {
            PageShift part = {*op->src[0], *op->src[1], *op};
            part.keys.data = part.node.data = reinterpret_cast<char *>(rows) + offset_in_cache(op->src[0]);
            part.by.data = static_cast<int32_t *>(op->src[1]->data) + at;
            part.keys.ne[2] = part.node.ne[2] = part.by.ne[0] = n;
            part.keys.view_src = part.node.view_src = part.by.view_src = nullptr;
            part.by.buffer = root_of(op->src[1])->buffer;
            part.node.src[0] = &part.keys;
            part.node.src[1] = &part.by;
            keep_lengths(part.node);
            status = run(part);
        });
    }
    return status;
}

// ---- anything else: on copies ----

Span::Span(const ggml_tensor * t) : cache(cache_of(t)) {
    const size_t offset = offset_in_cache(t), row = cache->row_bytes;
    first = offset / row;
    skip = offset % row;
    n = (skip + ggml_nbytes(t) + row - 1) / row;
}

OnCopies::OnCopies(const ggml_tensor * op) : node(*op) {
    const auto stand_in = [&](const ggml_tensor * t, ggml_tensor & with) {
        CacheTensor * cache = cache_of(t);
        with = *t;
        with.view_src = nullptr;
        with.view_offs = 0;
        with.buffer = nullptr;
        with.extra = nullptr;
        if (!is_packed(*cache)) {
            with.data = cache->plain_data + offset_in_cache(t);
            return;
        }
        Copy copy = {&with, Span(t), -1};
        if (result && !copies.empty() && copies[0].span == copy.span) copy.same = 0;
        copies.push_back(copy);
    };
    if (CacheTensor * to = cache_of(op)) {
        stand_in(op, node);
        if (is_packed(*to)) result = to;
    }
    for (int i = 0; i < GGML_MAX_SRC; ++i) {
        if (!op->src[i] || !cache_of(op->src[i])) continue;
        stand_in(op->src[i], sources[i]);
        node.src[i] = &sources[i];
    }
}

void warn_unpacked(const ggml_tensor * op) {
    const CacheTensor * k = op->op == GGML_OP_FLASH_ATTN_EXT ? cache_of(op->src[1]) : nullptr;
    const CacheTensor * v = k ? cache_of(op->src[2]) : nullptr;
    if (!v || (k->mode != CacheTensor::Mode::packed && v->mode != CacheTensor::Mode::packed)) return;
    warn_once("an attention of " + k->name + " has a form that the packed kernels do not serve; it is unpacked for every token");
}

void warn_unread(const CacheTensor & t) {
    if (t.mode != CacheTensor::Mode::undecided) return;
    const StoreShape & shape = t.store->shape();
    const int kept = (shape.sinks + kPageCells - 1) / kPageCells + (shape.window + kPageCells - 1) / kPageCells + 1;
    if (t.store->pages_half() <= kept) return;
    warn_once("the cache is not packed: nothing reads " + t.name + " in a way that MixKVQ knows; llama.cpp may be newer than this MixKVQ", "unread");
}

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

}  // namespace mixkvq::MIXKVQ_GLUE
