// The backend of a CUDA device. A graph is cut at the operations on caches: what lies between them goes to the inner backend as it is, the operations
// go to the queue of their cache, and events keep the two in order. The graph of a token comes again and again: it is recorded, with what the inner
// backend does in between, and then costs one launch.

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdlib>
#include <list>
#include <new>
#include <numeric>
#include <shared_mutex>
#include <utility>

#include "backends.h"
#include "border.h"
#include "mixkvq/cuda_memory.h"
#include "operations.h"

namespace mixkvq::MIXKVQ_GLUE {

namespace {

constexpr size_t kGraphs = 4;        // that are remembered
constexpr int64_t kRowsOfToken = 64; // a graph that writes more rows at a time is not recorded
constexpr int kPause = 256;          // graphs, before another try where nothing could be recorded
constexpr int kLaunches = 8;         // after so many, a graph like the recorded one is recorded when it first comes

// While one thread records, no other may free a handle of cuBLAS, as the end of one of ggml's backends does: CUDA then ends the recording, and ggml the
// process. ggml keeps such frees apart from recordings of its own and does not know ours, so its devices make backends that wait for them.
std::shared_mutex recording_mutex;
std::atomic<decltype(ggml_backend_device_i::init_backend)> inner_init{nullptr};  // ggml's, the same for all its devices
std::atomic<decltype(ggml_backend_i::free)> inner_free{nullptr};

void free_inner(ggml_backend_t backend) {
    const std::unique_lock<std::shared_mutex> lock(recording_mutex);
    inner_free.load()(backend);
}

ggml_backend_t init_inner(ggml_backend_dev_t device, const char * params) {
    ggml_backend_t backend = inner_init.load()(device, params);
    if (!backend) return nullptr;
    inner_free = backend->iface.free;
    backend->iface.free = free_inner;
    return backend;
}

// Index lists of a graph on the host.
struct Indices {
    const void * at;  // on the GPU
    std::vector<uint8_t> bytes;
};

// What a graph is. One that comes again, token by token, is looked at once.
struct Graph {
    uint64_t uid = 0, mode_changes = 0;
    const ggml_tensor * first = nullptr;  // node: llama.cpp builds the next graph in the place of the last one
    std::vector<Kind> kinds;              // by node
    std::vector<Buffer *> buffers;        // of the caches
    bool any_cache = false;
    size_t n_rows = 0;        // that it writes, if it can be recorded, else 0
    bool is_batch = false;    // it writes too many
    std::unique_ptr<cuda::Recording> recording;
    uint64_t workspaces = 0;  // of the recording's queue, when it was made
    int n_launches = 0;
};

struct CudaContext {
    ggml_backend_t inner = nullptr;
    ggml_backend_event_t inner_done = nullptr;
    ggml_backend_event queue_done = {};
    bool inner_has_more = true;  // work that no queue of ours waits for
    std::vector<std::weak_ptr<Buffer>> buffers;      // that graphs have used
    std::vector<PageStore::Cell> cells;              // of a write
    std::vector<Indices> indices;

    std::list<Graph> graphs;  // the last ones, the latest first
    const bool may_record = std::getenv("GGML_CUDA_DISABLE_GRAPHS") == nullptr;
    int pause = 0;  // graphs that are not recorded
    ggml_tensor filler = {};
    std::vector<ggml_tensor *> nodes;  // of a slice
};

CudaContext & get(ggml_backend_t backend) { return *static_cast<CudaContext *>(backend->context); }

bool is_input(const ggml_tensor * t) { return root_of(t)->op == GGML_OP_NONE; }

// Whether the inner backend computes a node without waiting for the GPU: only then it can be recorded. The one that may wait is a product with chosen
// matrices, unless they are quantised and there is one token.
bool never_waits(const ggml_tensor * node) {
    return node->op != GGML_OP_MUL_MAT_ID || (ggml_is_quantized(node->src[0]->type) && node->src[1]->type == GGML_TYPE_F32 && node->ne[2] == 1);
}

class Run {
  public:
    Run(CudaContext & context, ggml_cgraph * graph) : c_(context), graph_(graph) {}
    ggml_status operator()();

  private:
    void classify();
    ggml_status enqueue();
    bool is_worth_recording() const;
    ggml_status replay();
    bool record();
    cuda::Queue & use(const CacheTensor & t);
    void used(const CacheTensor & t, const std::shared_ptr<cuda::Queue> & queue);
    void after_inner(cuda::Queue & queue);
    void to_inner();
    ggml_status flush();
    bool settle();
    void fetch_inputs();
    const uint8_t * indices_of(const ggml_tensor * tensor, cuda::Queue & queue);
    void fetch(const std::vector<const ggml_tensor *> & tensors, cuda::Queue & queue);
    ggml_status write(CacheTensor & t, const ggml_tensor * op);
    void launch_writes();
    void look(CacheTensor & k, CacheTensor & v, const ggml_tensor * op);
    void attend(CacheTensor & k, CacheTensor & v, const ggml_tensor * op);
    ggml_status shift(CacheTensor & t, const ggml_tensor * op);
    ggml_status on_copies(const ggml_tensor * op);

    CudaContext & c_;
    ggml_cgraph * graph_;
    Graph * known_ = nullptr;
    bool is_again_ = false;                // the graph is the same as the last time
    bool books_done_ = false;              // what is queued changes no page store, because that has been done beforehand
    bool together_ = true;                 // attention may write the rows that have been put off
    size_t n_written_ = 0;                 // rows, since then
    CacheTensor * written_[2] = {};        // what is put off until attention comes: one launch does both
    cuda::RowWrite writes_[2] = {};
    int n_writes_ = 0;
    int first_ = -1, end_ = 0;             // nodes that the inner backend has not been given yet
    bool inner_ahead_ = true;              // it has work that the queue does not wait for,
    cuda::Queue * queue_ = nullptr;        // and this queue work that it does not wait for
    std::vector<CacheTensor *> attended_;  // to be settled
    std::vector<std::shared_ptr<cuda::Queue>> used_;
    std::vector<Buffer *> buffers_;
};

void Run::used(const CacheTensor & t, const std::shared_ptr<cuda::Queue> & queue) {
    if (std::find(used_.begin(), used_.end(), queue) != used_.end()) return;
    used_.push_back(queue);
    buffers_.push_back(t.owner);
    queue->forget_foreign_error();
    const auto buffer = t.owner->shared_from_this();
    auto & known = c_.buffers;
    known.erase(std::remove_if(known.begin(), known.end(), [&](auto & weak) { return weak.expired() || weak.lock() == buffer; }), known.end());
    known.push_back(buffer);
    inner_ahead_ = true;
}

void Run::after_inner(cuda::Queue & queue) {
    ggml_backend_event_record(c_.inner_done, c_.inner);
    queue.wait_for(c_.inner_done->context);
}

// The queue of a cache, behind all that the inner backend has been given.
cuda::Queue & Run::use(const CacheTensor & t) {
    const auto shared = queue_of(*t.owner);
    cuda::Queue * queue = shared.get();
    if (queue_ && queue_ != queue) to_inner();
    used(t, shared);
    if (inner_ahead_ || queue_ != queue) {
        after_inner(*queue);
        inner_ahead_ = false;
    }
    queue_ = queue;
    return *queue;
}

// The inner backend waits for the queue.
void Run::to_inner() {
    if (!queue_) return;
    c_.queue_done.context = queue_->mark();
    ggml_backend_event_wait(c_.inner, &c_.queue_done);
    queue_ = nullptr;
    inner_ahead_ = true;
}

// Gives the inner backend what has gathered for it.
ggml_status Run::flush() {
    if (first_ < 0) return GGML_STATUS_SUCCESS;
    to_inner();
    ggml_cgraph slice = slice_of(*graph_, first_, end_);
    const uint64_t most = uint64_t(1) << 20;
    const uint64_t uid = uid_of(*graph_);
    const bool known = uid && uid < 4 * most && uint64_t(graph_->n_nodes) < most;
    set_uid(slice, known ? (uid * most + first_) * most + end_ : 0);
    if (books_done_ || known_->is_batch || (c_.may_record && known_->n_rows > 0)) {
        // A CUDA graph of its own would not fit into ours, and as soon as it has made some, every kernel of ours starts 0.3 us later. It makes none of a
        // graph that it has not seen: this one begins with another node each time.
        ++c_.filler.ne[0];
        c_.nodes.assign(1, &c_.filler);
        c_.nodes.insert(c_.nodes.end(), slice.nodes, slice.nodes + slice.n_nodes);
        slice.nodes = c_.nodes.data();
        ++slice.n_nodes;
        set_uid(slice, 0);
    }
    first_ = -1;
    inner_ahead_ = true;
    const ggml_status status = ggml_backend_graph_compute_async(c_.inner, &slice);
    if (status != GGML_STATUS_SUCCESS || books_done_) return status;
    return settle() ? status : GGML_STATUS_FAILED;
}

// After the attention of a batch its older pages can go. The inner backend does not wait for that.
bool Run::settle() {
    const bool taken = std::all_of(attended_.begin(), attended_.end(), [](CacheTensor * t) { return t->store->settle(1); });
    attended_.clear();
    return taken;
}

void Run::fetch(const std::vector<const ggml_tensor *> & tensors, cuda::Queue & queue) {
    std::vector<cuda::Queue::Piece> pieces;
    for (const ggml_tensor * t : tensors) pieces.push_back({t->data, ggml_nbytes(t)});
    const uint8_t * from = queue.fetch(pieces.data(), pieces.size());
    for (const ggml_tensor * t : tensors) {
        c_.indices.push_back({t->data, {from, from + ggml_nbytes(t)}});
        from += (ggml_nbytes(t) + 63) / 64 * 64;
    }
}

// Lists that are inputs of the graph have been set before it, mostly by the host, whose bytes are remembered. Others come all at once, before anything
// is computed: nothing is waited for later, and nothing has taken their place yet.
void Run::fetch_inputs() {
    std::vector<const ggml_tensor *> wanted;
    const CacheTensor * cache = nullptr;
    c_.indices.clear();
    for (int i = 0; i < graph_->n_nodes; ++i) {
        if (known_->kinds[i] != Kind::write && known_->kinds[i] != Kind::shift) continue;
        const ggml_tensor * t = graph_->nodes[i]->src[1];
        auto is_same = [&](const ggml_tensor * other) { return other->data == t->data && ggml_nbytes(other) >= ggml_nbytes(t); };
        auto has_it = [&](const Indices & known) { return known.at == t->data && known.bytes.size() >= ggml_nbytes(t); };
        if (!is_input(t) || std::any_of(wanted.begin(), wanted.end(), is_same) || std::any_of(c_.indices.begin(), c_.indices.end(), has_it)) continue;
        if (const uint8_t * bytes = written_by_host(t)) {
            c_.indices.push_back({t->data, {bytes, bytes + ggml_nbytes(t)}});
            continue;
        }
        wanted.push_back(t);
        cache = cache_of(graph_->nodes[i]);
    }
    if (cache) fetch(wanted, *queue_of(*cache->owner));
}

// The list on the host. `queue` waits for the inner backend, in case that computes it.
const uint8_t * Run::indices_of(const ggml_tensor * tensor, cuda::Queue & queue) {
    auto is_it = [&](const Indices & i) { return i.at == tensor->data && i.bytes.size() >= ggml_nbytes(tensor); };
    if (!is_input(tensor)) {
        c_.indices.erase(std::remove_if(c_.indices.begin(), c_.indices.end(), is_it), c_.indices.end());
        fetch({tensor}, queue);
    }
    return std::find_if(c_.indices.begin(), c_.indices.end(), is_it)->bytes.data();
}

ggml_status Run::write(CacheTensor & t, const ggml_tensor * op) {
    if (n_writes_ == 2 || (n_writes_ == 1 && written_[0]->owner != t.owner)) launch_writes();
    cuda::Queue & queue = use(t);
    if (books_done_) {
        const int n = int(op->src[0]->ne[1]);
        written_[n_writes_] = &t;
        writes_[n_writes_++] = cuda_memory(t).write_of(rows_of(op, /*on_host=*/false), known_->recording->rows_there() + n_written_, n);
        n_written_ += n;
        return GGML_STATUS_SUCCESS;
    }
    if (!t.store->settle(1)) return GGML_STATUS_FAILED;  // normally nothing to do
    if (!find_cells(t, op, indices_of(op->src[1], queue), c_.cells)) return GGML_STATUS_FAILED;
    t.store->write(c_.cells.data(), int(c_.cells.size()), rows_of(op, /*on_host=*/false));
    warn_unread(t);
    return GGML_STATUS_SUCCESS;
}

void Run::launch_writes() {
    if (n_writes_ == 0) return;
    cuda::write_rows(use(*written_[0]).stream(), writes_[0], n_writes_ == 2 ? writes_[1] : cuda::RowWrite{});
    n_writes_ = 0;
}

// The masks that the host has set tell the stores what has become of their streams. One that comes another way, or is too long to be remembered, does not.
void Run::look(CacheTensor & k, CacheTensor & v, const ggml_tensor * op) {
    const ggml_tensor * mask = op->src[3];
    const uint8_t * at = mask && is_input(mask) ? written_by_host(mask) : nullptr;
    if (mask && !at) return;
    const MaskView view = attention_call(k, op).view(at);
    k.store->look(view);
    v.store->look(view);
}

void Run::attend(CacheTensor & k, CacheTensor & v, const ggml_tensor * op) {
    // A mask that the graph computes may come from the kernel just before, which attention with rows does not wait for in everything.
    const bool is_mask_there = !op->src[3] || is_input(op->src[3]);
    const bool are_ours = n_writes_ == 2 && std::min(written_[0], written_[1]) == std::min(&k, &v) && std::max(written_[0], written_[1]) == std::max(&k, &v);
    const bool together = together_ && is_mask_there && are_ours;
    if (!together) launch_writes();
    use(k);
    if (!books_done_) look(k, v, op);
    if (together && written_[0] != &k) std::swap(writes_[0], writes_[1]);
    attention(*k.store, cuda_memory(k), *v.store, cuda_memory(v), attention_call(k, op), together ? writes_ : nullptr);
    n_writes_ = 0;
}

ggml_status Run::shift(CacheTensor & t, const ggml_tensor * op) {
    const auto * by = reinterpret_cast<const int32_t *>(indices_of(op->src[1], use(t)));
    return shift_pages(t, op, by, 1, [&](PageShift & part) {
        part.keys.buffer = part.node.buffer = inner_buffer(*t.owner);
        to_inner();
        const ggml_status status = run_node(c_.inner, &part.node);
        use(t);
        return status;
    });
}

// Copies cells of a cache, on the GPU.
void read_here(const Span & span, half * to) {
    const CacheTensor & cache = *span.cache;
    const size_t n_cells = cache.store->shape().n_cells;
    std::vector<PageSpan> pages;
    for (size_t i = span.first; i < span.first + span.n;) {
        const size_t cell = i % n_cells, in_page = cell % kPageCells;
        const size_t m = std::min({span.first + span.n - i, kPageCells - in_page, n_cells - cell});
        const PageStore::Page & page = cache.store->page(int(i / n_cells), int(cell / kPageCells));
        pages.push_back({page.rows, page.records, int(in_page), int(m)});
        i += m;
    }
    cuda_memory(cache).read_here(pages.data(), int(pages.size()), to);
}

ggml_status Run::on_copies(const ggml_tensor * op) {
    OnCopies on(op);
    if (const CacheTensor * to = cache_of(op)) on.node.buffer = inner_buffer(*to->owner);
    for (int i = 0; i < GGML_MAX_SRC; ++i) {
        const CacheTensor * from = op->src[i] ? cache_of(op->src[i]) : nullptr;
        if (from) on.sources[i].buffer = inner_buffer(*from->owner);
    }
    to_inner();
    if (!on.copies.empty()) {
        const auto aligned = [](const Span & span) { return (span.bytes() + 255) / 256 * 256; };
        const CacheTensor & first = *on.copies[0].span.cache;
        size_t bytes = 0;
        for (const OnCopies::Copy & copy : on.copies) bytes += aligned(copy.span);
        auto * at = static_cast<uint8_t *>(use(first).workspace(bytes));
        for (OnCopies::Copy & copy : on.copies) {
            if (copy.span.cache->owner != first.owner) {
                warn_once("an operation on two caches of different buffers cannot be computed on the GPU");
                return GGML_STATUS_FAILED;
            }
            if (copy.same >= 0) {
                copy.tensor->data = on.copies[copy.same].tensor->data;
                continue;
            }
            read_here(copy.span, reinterpret_cast<half *>(at));
            copy.tensor->data = at + copy.span.skip;
            at += aligned(copy.span);
        }
        to_inner();
    }
    const ggml_status status = run_node(c_.inner, &on.node);
    inner_ahead_ = true;
    if (status != GGML_STATUS_SUCCESS || !on.result) return status;
    std::vector<uint8_t> bytes(ggml_nbytes(op));
    ggml_backend_synchronize(c_.inner);
    on.result->owner->memory->get(bytes.data(), static_cast<uint8_t *>(on.node.data), bytes.size());
    on.result->write(offset_in_cache(op), bytes.data(), bytes.size(), 1);
    return status;
}

// What the nodes are: `known_`.
void Run::classify() {
    const size_t n = graph_->n_nodes;
    auto & graphs = c_.graphs;
    const uint64_t uid = uid_of(*graph_);
    auto is_it = [&](const Graph & g) { return uid && g.uid == uid && g.kinds.size() == n && g.mode_changes == mode_changes; };
    const auto found = std::find_if(graphs.begin(), graphs.end(), is_it);
    if (found != graphs.end()) {
        is_again_ = true;
        graphs.splice(graphs.begin(), graphs, found);
        known_ = &graphs.front();
        return;
    }
    for (size_t i = 0; i < n; ++i) {
        if (!is_view(graph_->nodes[i]->op)) learn_geometry(graph_->nodes[i]);
    }
    graphs.remove_if([](const Graph & g) { return g.uid == 0; });  // nobody finds it again
    while (graphs.size() >= kGraphs) graphs.pop_back();
    graphs.emplace_front();
    known_ = &graphs.front();
    known_->uid = uid;
    known_->first = graph_->nodes[0];
    known_->mode_changes = mode_changes;
    bool can_record = uid != 0;
    for (size_t i = 0; i < n; ++i) {
        const ggml_tensor * node = graph_->nodes[i];
        const Kind kind = kind_of(node);
        known_->kinds.push_back(kind);
        for (int j = -1; j < GGML_MAX_SRC && kind != Kind::view && kind != Kind::inner; ++j) {
            const ggml_tensor * t = j < 0 ? node : node->src[j];
            const CacheTensor * cache = t ? cache_of(t) : nullptr;
            auto & buffers = known_->buffers;
            if (cache && std::find(buffers.begin(), buffers.end(), cache->owner) == buffers.end()) buffers.push_back(cache->owner);
        }
        known_->any_cache |= kind != Kind::view && kind != Kind::inner;
        if (kind == Kind::write) {
            known_->n_rows += node->src[0]->ne[1];
            known_->is_batch |= node->src[0]->ne[1] > kRowsOfToken;
            can_record &= is_input(node->src[1]) && !known_->is_batch;
        } else {
            can_record &= kind == Kind::view || kind == Kind::attend || (kind == Kind::inner && never_waits(node));
        }
    }
    if (!can_record) known_->n_rows = 0;
}

// What comes for the second time will come again. So will, after many of its kind, a graph that comes for the first time: they change with the length
// of the context.
bool Run::is_worth_recording() const {
    if (c_.pause > 0 && c_.pause--) return false;
    if (!c_.may_record || known_->n_rows == 0) return false;
    return is_again_ || std::any_of(c_.graphs.begin(), c_.graphs.end(), [&](const Graph & g) {
               return g.n_launches >= kLaunches && g.kinds.size() == known_->kinds.size() && g.n_rows == known_->n_rows;
           });
}

// Queues the nodes, one after the other.
ggml_status Run::enqueue() {
    ggml_status status = GGML_STATUS_SUCCESS;
    for (int i = 0; i < graph_->n_nodes && status == GGML_STATUS_SUCCESS; ++i) {
        ggml_tensor * node = graph_->nodes[i];
        const Kind kind = known_->kinds[i];
        if (kind == Kind::view) continue;
        if (kind != Kind::write && kind != Kind::attend) launch_writes();
        if (kind == Kind::inner) {
            if (first_ < 0) first_ = i;
            end_ = i + 1;
            continue;
        }
        status = flush();
        if (status != GGML_STATUS_SUCCESS) break;
        if (kind == Kind::write) {
            status = write(*cache_of(node), node);
        } else if (kind == Kind::shift) {
            status = shift(*cache_of(node), node);
        } else {
            CacheTensor * k = node->op == GGML_OP_FLASH_ATTN_EXT ? cache_of(node->src[1]) : nullptr;
            CacheTensor * v = k ? cache_of(node->src[2]) : nullptr;
            if (kind == Kind::attend) {
                attend(*k, *v, node);
            } else {
                warn_unpacked(node);
                status = on_copies(node);
            }
            for (CacheTensor * t : {k, v}) {
                if (t && t->mode == CacheTensor::Mode::packed && !books_done_) attended_.push_back(t);
            }
        }
    }
    launch_writes();
    if (status == GGML_STATUS_SUCCESS) status = flush();
    to_inner();
    return status;
}

// A graph of writes and attentions as a recording. What changes with every token, the books of the pages and the packing of what has become old, comes
// before and after.
ggml_status Run::replay() {
    const auto each = [&](Kind kind, auto && f) {
        for (int i = 0; i < graph_->n_nodes; ++i) {
            if (known_->kinds[i] == kind) f(graph_->nodes[i]);
        }
    };
    each(Kind::write, [&](ggml_tensor * node) { used(*cache_of(node), queue_of(*cache_of(node)->owner)); });
    each(Kind::attend, [&](ggml_tensor * node) { used(*cache_of(node->src[1]), queue_of(*cache_of(node->src[1])->owner)); });
    auto & recording = known_->recording;
    if (!recording) recording = std::make_unique<cuda::Recording>(used_[0], known_->n_rows);
    cuda::Queue & queue = recording->queue();

    bool is_right = true;
    half ** rows = recording->rows();
    struct Reach {
        const CacheTensor * cache;
        int first_stream, last_stream, last_cell;
    };
    std::vector<Reach> reaches;  // of the writes
    each(Kind::write, [&](ggml_tensor * node) {
        CacheTensor & t = *cache_of(node);
        is_right = is_right && t.store->settle(1) && find_cells(t, node, indices_of(node->src[1], queue), c_.cells);
        if (!is_right) return;
        const CudaMemory::Diversion diversion(cuda_memory(t), rows);
        t.store->write(c_.cells.data(), int(c_.cells.size()), rows_of(node, /*on_host=*/false));
        rows += c_.cells.size();
        Reach reach = {&t, INT_MAX, 0, 0};
        for (const PageStore::Cell & c : c_.cells) {
            reach = {&t, std::min(reach.first_stream, c.stream), std::max(reach.last_stream, c.stream), std::max(reach.last_cell, c.cell)};
        }
        reaches.push_back(reach);
    });
    if (!is_right) return GGML_STATUS_FAILED;
    const auto count_workspaces = [&] {
        return std::accumulate(used_.begin(), used_.end(), uint64_t(0), [](uint64_t n, const auto & queue) { return n + queue->workspaces(); });
    };
    const bool is_recorded = recording->ready() && known_->workspaces == count_workspaces();
    each(Kind::attend, [&](ggml_tensor * node) {
        CacheTensor * k = cache_of(node->src[1]), * v = cache_of(node->src[2]);
        look(*k, *v, node);
        cuda_memory(*k).table_of(*k->store);
        cuda_memory(*v).table_of(*v->store);
        if (!is_recorded) prepare_attention(*k->store, cuda_memory(*k), *v->store, cuda_memory(*v), attention_call(*k, node));
        attended_.insert(attended_.end(), {k, v});
        // Attention writes what it sees.
        const AttentionCall call = attention_call(*k, node);
        together_ = together_ && std::all_of(reaches.begin(), reaches.end(), [&](const Reach & r) {
            return (r.cache != k && r.cache != v) ||
                   (r.first_stream >= call.first_stream && r.last_stream < call.first_stream + call.n_streams && r.last_cell < call.n_kv);
        });
    });
    recording->send();
    for (const auto & other : used_) {
        if (other.get() != &queue) queue.wait_for(other->mark());
    }
    if (std::exchange(c_.inner_has_more, false)) after_inner(queue);

    books_done_ = true;
    const bool tried = together_;
    if (tried && (is_recorded || record()) && recording->launch()) {
        known_->workspaces = count_workspaces();
        c_.inner_has_more = !is_recorded;
        ++known_->n_launches;
    } else {
        c_.inner_has_more = true;
        if (tried) c_.pause = kPause;  // whatever the reason is, the next graph may have it too
        const ggml_status status = enqueue();
        if (status != GGML_STATUS_SUCCESS) return status;
        after_inner(queue);
    }
    queue_ = &queue;
    void * const done = queue.mark();
    for (const auto & other : used_) {
        if (other.get() != &queue) other->wait_for(done);
    }
    to_inner();
    return GGML_STATUS_SUCCESS;
}

bool Run::record() {
    const std::shared_lock<std::shared_mutex> lock(recording_mutex);
    cuda::Queue & queue = known_->recording->queue();
    if (!known_->recording->begin()) return false;
    for (const auto & used : used_) used->hold_errors();  // nothing is done yet: what goes wrong ends the recording only
    queue_ = &queue;
    to_inner();  // so that what the inner backend does is recorded, too
    n_written_ = 0;
    const bool queued = enqueue() == GGML_STATUS_SUCCESS;
    after_inner(queue);
    // A longer context: the same work with other numbers.
    const auto older = std::find_if(c_.graphs.begin(), c_.graphs.end(), [&](const Graph & g) {
        return &g != known_ && g.recording && g.recording->ready() && g.first == known_->first && g.kinds == known_->kinds && g.n_rows == known_->n_rows;
    });
    const bool recorded = known_->recording->end(older == c_.graphs.end() ? nullptr : older->recording.get());
    bool failed = false;
    for (const auto & used : used_) failed |= used->held_errors();
    n_written_ = 0;
    queue_ = nullptr;
    return queued && recorded && !failed;
}

ggml_status Run::operator()() {
    classify();
    const bool recorded = known_->any_cache && is_worth_recording();
    c_.inner_has_more |= !recorded;
    if (!known_->any_cache) return ggml_backend_graph_compute_async(c_.inner, graph_);
    BufferLocks locks;
    for (Buffer * buffer : known_->buffers) locks.add(buffer);
    locks.lock();

    fetch_inputs();
    ggml_status status = recorded ? replay() : enqueue();
    if (!settle()) status = GGML_STATUS_FAILED;
    for (Buffer * buffer : buffers_) buffer->memory->trim();
    for (const auto & queue : used_) {
        if (!queue->error()) continue;
        warn_once(queue->error());
        status = GGML_STATUS_FAILED;
    }
    return status;
}

// ---- the backend ----

ggml_guid guid = {0x6d, 0x69, 0x78, 0x6b, 0x76, 0x71, 0x2d, 0x63, 0x75, 0x64, 0x61, 0x67, 0x67, 0x6d, 0x6c, 0x01};

const char * get_name(ggml_backend_t backend) { return ggml_backend_dev_name(backend->device); }

void synchronize(ggml_backend_t backend) {
    if (std::exchange(get(backend).inner_has_more, false)) ggml_backend_synchronize(get(backend).inner);
    at_border("out of memory while a GPU was waited for", [&] {
        for (const auto & weak : get(backend).buffers) {
            const auto buffer = weak.lock();
            if (!buffer) continue;
            std::lock_guard<std::recursive_mutex> lock(buffer->mutex);
            queue_of(*buffer)->synchronize();
        }
    });
}

// Behind the graph, for which the inner backend waits: the program need not be there when it is done.
void get_tensor_async(ggml_backend_t backend, const ggml_tensor * t, void * data, size_t offset, size_t size) {
    CudaContext & c = get(backend);
    const ggml_tensor * root = root_of(t);
    ggml_tensor plain = *t;
    plain.view_src = nullptr;
    plain.buffer = root->buffer;
    if (const Buffer * ours = buffer_of(t)) plain.buffer = inner_buffer(*ours);
    if (cache_of(t) || !plain.buffer || plain.buffer->buft != ggml_backend_dev_buffer_type(c.inner->device) || !c.inner->iface.get_tensor_async) {
        synchronize(backend);
        root->buffer->iface.get_tensor(root->buffer, t, data, offset, size);
        return;
    }
    c.inner->iface.get_tensor_async(c.inner, &plain, data, offset, size);
    c.inner_has_more = true;
}

void free_backend(ggml_backend_t backend) {
    synchronize(backend);
    at_border("out of memory while a context was freed", [&] {
        CudaContext & context = get(backend);
        ggml_backend_event_free(context.inner_done);
        ggml_backend_free(context.inner);
        delete &context;
        delete backend;
    });
}

ggml_status graph_compute(ggml_backend_t backend, ggml_cgraph * graph) {
    ggml_status status = GGML_STATUS_FAILED;
    try {
        status = Run(get(backend), graph)();
    } catch (...) {
        status = say_exception("out of GPU memory in the cache");
    }
    has_computed(backend->device);
    return status;
}

// What the inner backend says before memory is laid out: which results have to stay for operations that it fuses. If it would also spread the graph
// over streams, it is not asked: it could not join them where we cut.
void graph_optimize(ggml_backend_t backend, ggml_cgraph * graph, ggml_backend_graph_optimize_params * params) {
    static const char * const streams = std::getenv("GGML_CUDA_GRAPH_OPT");
    ggml_backend_t inner = get(backend).inner;
    if (inner->iface.graph_optimize && (!streams || std::atoi(streams) != 1)) inner->iface.graph_optimize(inner, graph, params);
}

void event_record(ggml_backend_t backend, ggml_backend_event_t event) { ggml_backend_event_record(event, get(backend).inner); }
void event_wait(ggml_backend_t backend, ggml_backend_event_t event) {
    get(backend).inner_has_more = true;
    ggml_backend_event_wait(get(backend).inner, event);
}

}  // namespace

void guard_recordings(ggml_backend_dev_t inner) {
    if (inner->iface.init_backend == init_inner) return;
    inner_init = inner->iface.init_backend;
    inner->iface.init_backend = init_inner;
}

ggml_backend_t make_cuda_backend(ggml_backend_dev_t device) {
    begin_context();
    ggml_backend_dev_t inner_device = static_cast<Device *>(device->context)->inner;
    auto context = std::make_unique<CudaContext>();
    auto backend = std::make_unique<ggml_backend>();
    ggml_backend_t inner = ggml_backend_dev_init(inner_device, nullptr);
    if (!inner) return nullptr;
    ggml_backend_event_t inner_done = ggml_backend_event_new(inner_device);
    if (!inner_done) {
        ggml_backend_free(inner);
        warn_once("this build of ggml has no events for CUDA, which a cache on the GPU needs; use the device MIXKVQ-CPU");
        return nullptr;
    }
    context->inner = inner;
    context->inner_done = inner_done;
    context->queue_done.device = inner_device;
    backend->guid = &guid;
    backend->iface.get_name = get_name;
    backend->iface.free = free_backend;
    backend->iface.get_tensor_async = get_tensor_async;
    backend->iface.synchronize = synchronize;
    backend->iface.graph_compute = graph_compute;
    backend->iface.event_record = event_record;
    backend->iface.event_wait = event_wait;
    backend->iface.graph_optimize = graph_optimize;
    backend->device = device;
    backend->context = context.release();
    return backend.release();
}

}  // namespace mixkvq::MIXKVQ_GLUE
