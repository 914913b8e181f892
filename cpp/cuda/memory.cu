// Pages in GPU memory: what a page store asks of them, queued on one stream.

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <new>
#include <unordered_map>
#include <utility>
#include <vector>

#include <cuda_runtime.h>

#include "implied_edges.h"
#include "launch.cuh"
#include "mixkvq/cuda_memory.h"

namespace mixkvq::cuda {

namespace {

constexpr size_t kPartBytes = 256 * 1024;
constexpr size_t kReadOverBus = 4096;  // a list up to this long is not worth a copy: kernels read it where it is

struct TableEntry {
    int at;
    PageRef page;
};

__global__ void set_table_kernel(PageRef * table, const TableEntry * entries, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) table[entries[i].at] = entries[i].page;
}

void set_table(cudaStream_t stream, PageRef * table, const TableEntry * entries, int n) {
    launch(set_table_kernel, (n + 127) / 128, 128, 0, stream, table, entries, n);
}

// What was remembered, except q^2, of which the mean stays. The count is put back afterwards.
__global__ void recall_kernel(QuerySums now, const float * then, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float count = *now.count, count_then = then[n], abs = then[i];
    now.sqr[i] = count > 0 ? __fmul_rn(now.sqr[i], __fdiv_rn(count_then, count)) : 0.0f;
    now.abs[i] = abs;
    now.importance[i] = __fdiv_rn(abs, count_then);
}

void recall_sums(cudaStream_t stream, const QuerySums & now, const float * then, int n) {
    launch(recall_kernel, (n + 127) / 128, 128, 0, stream, now, then, n);
}

constexpr size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }
cudaStream_t stream_of(void * stream) { return static_cast<cudaStream_t>(stream); }
cudaEvent_t event_of(void * event) { return static_cast<cudaEvent_t>(event); }

}  // namespace

int device_of_bus(const char * pci_bus_id) {
    int device = -1;
    const bool found = cudaDeviceGetByPCIBusId(&device, pci_bus_id) == cudaSuccess;
    cudaGetLastError();
    return found ? device : -1;
}

Queue::Queue(int device) : device_(device) {
    int pools = 0;
    note(cudaSetDevice(device));
    for (void ** made : {&stream_, &side_}) {
        cudaStream_t stream = nullptr;
        note(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        *made = stream;
    }
    auto make_event = [&](void *& made) {
        cudaEvent_t event = nullptr;
        note(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
        made = event;
    };
    for (void ** made : {&mark_, &fork_, &join_}) make_event(*made);
    note(cudaDeviceGetAttribute(&pools, cudaDevAttrMemoryPoolsSupported, device));
    ordered_ = pools != 0;
    for (void *& done : part_done_) make_event(done);
    try {
        if (!error_.empty()) throw std::bad_alloc();
        make_ring(kPartBytes);
    } catch (...) {
        close();
        throw;
    }
}

Queue::~Queue() {
    synchronize();
    trim();
    close();
}

void Queue::close() {
    release(workspace_);
    release(counters_);
    free_ring();
    if (fetched_) cudaFreeHost(fetched_);
    for (void * done : part_done_) {
        if (done) cudaEventDestroy(event_of(done));
    }
    for (void * event : {mark_, fork_, join_}) {
        if (event) cudaEventDestroy(event_of(event));
    }
    for (void * stream : {stream_, side_}) {
        if (stream) cudaStreamDestroy(stream_of(stream));
    }
    cudaGetLastError();
}

Stream Queue::stream() {
    note(cudaSetDevice(device_));
    idle_ = false;
    return stream_;
}

Stream Queue::fork() {
    note(cudaEventRecord(event_of(fork_), stream_of(stream())));
    note(cudaStreamWaitEvent(stream_of(side_), event_of(fork_), 0));
    return side_;
}

void Queue::join() {
    note(cudaEventRecord(event_of(join_), stream_of(side_)));
    note(cudaStreamWaitEvent(stream_of(stream_), event_of(join_), 0));
}

void Queue::note(int code) {
    held_ |= holding_ && code != cudaSuccess;
    if (code != cudaSuccess && !holding_ && error_.empty()) error_ = std::string("the GPU failed: ") + cudaGetErrorString(cudaError_t(code));
}

void Queue::forget_foreign_error() {
    if (error_.empty()) cudaGetLastError();
}

bool Queue::recover() {
    cudaGetLastError();
    if (cudaStreamSynchronize(stream_of(stream())) != cudaSuccess) return false;
    error_.clear();
    if (counters_) note(cudaMemsetAsync(counters_, 0, n_counters_ * sizeof(uint32_t), stream_of(stream_)));
    return true;
}

void * Queue::mark() {
    note(cudaGetLastError());
    note(cudaEventRecord(event_of(mark_), stream_of(stream())));
    return mark_;
}

void Queue::wait_for(void * event) { note(cudaStreamWaitEvent(stream_of(stream()), event_of(event), 0)); }

void Queue::synchronize() {
    if (idle_) return;
    note(cudaGetLastError());
    note(cudaStreamSynchronize(stream_of(stream())));
    idle_ = true;
}

// --- arguments ----

void Queue::make_ring(size_t part_bytes) {
    void * ring = nullptr;
    const cudaError_t code = cudaHostAlloc(&ring, kParts * part_bytes, cudaHostAllocDefault);
    if (code != cudaSuccess) {
        cudaGetLastError();
        throw std::bad_alloc();
    }
    try {
        ring_copy_ = static_cast<uint8_t *>(allocate(kParts * part_bytes));
    } catch (...) {
        cudaFreeHost(ring);
        throw;
    }
    ring_ = static_cast<uint8_t *>(ring);
    part_bytes_ = part_bytes;
    used_ = 0;
}

void Queue::free_ring() {
    release(ring_copy_);
    if (ring_) cudaFreeHost(ring_);
    ring_ = ring_copy_ = nullptr;
    part_bytes_ = 0;
}

void * Queue::reserve(size_t bytes) {
    stream();
    bytes = aligned(bytes);
    if (bytes > part_bytes_) {
        synchronize();
        free_ring();
        make_ring(aligned(2 * bytes));
    }
    if (used_ + bytes > part_bytes_) {
        note(cudaEventRecord(event_of(part_done_[part_]), stream_of(stream_)));
        part_ = (part_ + 1) % kParts;
        note(cudaEventSynchronize(event_of(part_done_[part_])));
        used_ = 0;
    }
    reserved_ = bytes;
    return ring_ + part_ * part_bytes_ + used_;
}

const void * Queue::send() {
    const size_t at = part_ * part_bytes_ + used_;
    used_ += reserved_;
    if (reserved_ <= kReadOverBus) return ring_ + at;
    note(cudaMemcpyAsync(ring_copy_ + at, ring_ + at, reserved_, cudaMemcpyHostToDevice, stream_of(stream_)));
    return ring_copy_ + at;
}

template <class T> const T * Queue::send(const T * list, size_t n) {
    std::memcpy(reserve(n * sizeof(T)), list, n * sizeof(T));
    return static_cast<const T *>(send());
}

const uint8_t * Queue::fetch(const Piece * pieces, size_t n) {
    size_t bytes = 0;
    for (size_t i = 0; i < n; ++i) bytes += aligned(pieces[i].bytes);
    stream();
    if (bytes > fetched_bytes_) {
        if (fetched_) cudaFreeHost(fetched_);
        fetched_ = nullptr;
        fetched_bytes_ = 0;
        void * block = nullptr;
        if (cudaHostAlloc(&block, 2 * bytes, cudaHostAllocDefault) != cudaSuccess) {
            cudaGetLastError();
            throw std::bad_alloc();
        }
        fetched_ = static_cast<uint8_t *>(block);
        fetched_bytes_ = 2 * bytes;
    }
    uint8_t * to = fetched_;
    for (const Piece * p = pieces; p < pieces + n; to += aligned(p->bytes), ++p) {
        note(cudaMemcpyAsync(to, p->at, p->bytes, cudaMemcpyDefault, stream_of(stream_)));
    }
    synchronize();
    return fetched_;
}

// --- memory ----

void * Queue::allocate(size_t bytes) {
    void * block = nullptr;
    cudaStream_t on = stream_of(stream());
    const cudaError_t code = ordered_ ? cudaMallocAsync(&block, bytes, on) : cudaMalloc(&block, bytes);
    if (code == cudaSuccess) return block;
    cudaGetLastError();
    throw std::bad_alloc();
}

void Queue::release(void * block) {
    if (!block) return;
    cudaStream_t on = stream_of(stream());
    if (ordered_) {
        note(cudaFreeAsync(block, on));
    } else {
        note(cudaStreamSynchronize(on));
        note(cudaFree(block));
    }
}

void * Queue::workspace(size_t bytes) {
    if (bytes > workspace_bytes_) {
        release(workspace_);
        workspace_ = nullptr;
        workspace_bytes_ = 0;
        workspace_ = allocate(bytes);
        workspace_bytes_ = bytes;
        ++n_workspaces_;
    }
    return workspace_;
}

uint32_t * Queue::counters(size_t n) {
    if (n > n_counters_) {
        release(counters_);
        counters_ = nullptr;
        n_counters_ = 0;
        counters_ = static_cast<uint32_t *>(allocate(n * sizeof(uint32_t)));
        note(cudaMemsetAsync(counters_, 0, n * sizeof(uint32_t), stream_of(stream_)));
        n_counters_ = n;
        ++n_workspaces_;
    }
    return counters_;
}

void * Queue::get(size_t bytes) {
    auto & list = free_[bytes];
    if (!list.empty()) {
        void * block = list.back();
        list.pop_back();
        return block;
    }
    void * block = allocate(bytes);
    bytes_ += bytes;
    peak_ = std::max(peak_, bytes_);
    return block;
}

void Queue::trim() {
    for (auto & [bytes, list] : free_) {
        for (void * block : list) {
            release(block);
            bytes_ -= bytes;
        }
        list.clear();
    }
}

// --- recordings ----

namespace {

#if CUDART_VERSION >= 12030
// Whether a node is attention of few queries. Kernels of other libraries have no name here.
bool is_decoding(cudaGraphNode_t node) {
    cudaGraphNodeType type;
    cudaKernelNodeParams params = {};
    const char * name = nullptr;
    return cudaGraphNodeGetType(node, &type) == cudaSuccess && type == cudaGraphNodeTypeKernel &&
           cudaGraphKernelNodeGetParams(node, &params) == cudaSuccess && cudaFuncGetName(&name, params.func) == cudaSuccess && name &&
           std::strstr(name, "mixkvq") && std::strstr(name, "decode_kernel");
}
#endif

// Where streams wait for each other, a node is recorded as one that waits for the last of both, although the one has waited for the other before. A
// kernel with a single edge starts earlier. One that waits for the kernel before it in its own code may start as soon as that one's blocks all have:
// attention is let do so, as nothing it looks at before it waits is written by a graph. Where this fails the graph is only slower.
void let_start_early(cudaGraph_t graph) {
#if CUDART_VERSION >= 12030
#if CUDART_VERSION >= 13000
    const auto get_edges = cudaGraphGetEdges;
    const auto add_edges = cudaGraphAddDependencies;
    const auto remove_edges = cudaGraphRemoveDependencies;
#else
    const auto get_edges = cudaGraphGetEdges_v2;
    const auto add_edges = cudaGraphAddDependencies_v2;
    const auto remove_edges = cudaGraphRemoveDependencies_v2;
#endif
    size_t n = 0;
    get_edges(graph, nullptr, nullptr, nullptr, &n);
    std::vector<cudaGraphNode_t> from(n), to(n);
    std::vector<cudaGraphEdgeData> data(n);
    if (get_edges(graph, from.data(), to.data(), data.data(), &n) == cudaSuccess) {
        std::unordered_map<cudaGraphNode_t, int> numbers;
        const auto number_of = [&](cudaGraphNode_t node) { return numbers.emplace(node, int(numbers.size())).first->second; };
        std::vector<Edge> edges;
        for (size_t i = 0; i < n; ++i) edges.push_back({number_of(from[i]), number_of(to[i])});
        const std::vector<size_t> implied = implied_edges(int(numbers.size()), edges);
        for (const size_t i : implied) {
            remove_edges(graph, &from[i], &to[i], &data[i], 1);
            data[i].type = cudaGraphDependencyTypeDefault;
        }
        for (size_t i = 0; i < n; ++i) {
            if (data[i].type != cudaGraphDependencyTypeProgrammatic || !is_decoding(to[i])) continue;
            cudaGraphEdgeData begun = data[i];
            begun.from_port = cudaGraphKernelNodePortLaunchCompletion;
            if (remove_edges(graph, &from[i], &to[i], &data[i], 1) != cudaSuccess) continue;
            if (add_edges(graph, &from[i], &to[i], &begun, 1) != cudaSuccess) add_edges(graph, &from[i], &to[i], &data[i], 1);
        }
    }
    cudaGetLastError();
#endif
}

// Makes of a graph that has been instantiated another one, if they differ in numbers only: what is on its way to the GPU stays as it was.
bool update(cudaGraphExec_t exec, cudaGraph_t graph) {
    cudaGraphExecUpdateResultInfo result;
    const bool done = cudaGraphExecUpdate(exec, graph, &result) == cudaSuccess;
    cudaGetLastError();
    return done;
}

}  // namespace

Recording::Recording(std::shared_ptr<Queue> queue, size_t n_rows)
    : queue_(std::move(queue)), rows_(n_rows), rows_there_(static_cast<half **>(queue_->allocate(n_rows * sizeof(half *)))) {}

Recording::~Recording() {
    queue_->synchronize();
    if (graph_) cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph_));
    queue_->release(rows_there_);
}

void Recording::send() {
    const size_t bytes = rows_.size() * sizeof(half *);
    queue_->note(cudaMemcpyAsync(rows_there_, queue_->send(rows_.data(), rows_.size()), bytes, cudaMemcpyDefault, stream_of(queue_->stream())));
}

bool Recording::begin() {
    queue_->note(cudaGetLastError());
    queue_->recording_ = cudaStreamBeginCapture(stream_of(queue_->stream()), cudaStreamCaptureModeRelaxed) == cudaSuccess;
    if (!queue_->recording_) cudaGetLastError();
    return queue_->recording_;
}

bool Recording::end(Recording * older) {
    queue_->recording_ = false;
    cudaGraph_t graph = nullptr;
    auto exec = static_cast<cudaGraphExec_t>(std::exchange(graph_ || !older ? graph_ : older->graph_, nullptr));
    cudaError_t code = cudaStreamEndCapture(stream_of(queue_->stream()), &graph);
    if (code == cudaSuccess) {
        let_start_early(graph);
    }
    if (exec && (code != cudaSuccess || !update(exec, graph))) {
        cudaGraphExecDestroy(exec);
        exec = nullptr;
    }
    if (code == cudaSuccess && !exec) code = cudaGraphInstantiate(&exec, graph, 0);
    if (graph) cudaGraphDestroy(graph);
    if (code != cudaSuccess) cudaGetLastError();
    graph_ = exec;
    return code == cudaSuccess;
}

bool Recording::launch() {
    const cudaError_t code = cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph_), stream_of(queue_->stream()));
    if (code != cudaErrorMemoryAllocation) {
        queue_->note(code);
        return true;
    }
    cudaGetLastError();
    cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(std::exchange(graph_, nullptr)));
    return false;
}

}  // namespace mixkvq::cuda

namespace mixkvq {

namespace {

constexpr int kListed = 4096;     // pages or rows in one list
constexpr int kFewTokens = 64;
constexpr int kReadPages = 32;    // of a read to the host, at a time
constexpr float kQueryMemory = 8192;  // as in host memory: more query vectors than this fade

cudaStream_t on(cuda::Queue & queue) { return static_cast<cudaStream_t>(queue.stream()); }

cuda::KeyHead head_of(const KeyFormat & format, size_t offset) { return {format, uint32_t(offset)}; }
cuda::ValueHead head_of(const ValueFormat & format, size_t offset) { return {format, uint32_t(offset)}; }

// The heads as the kernels read them, to `to`.
template <class Format> void send_heads(cuda::Queue & queue, const std::vector<Format> & formats, const PageLayout & layout, void * to) {
    using Head = decltype(head_of(formats[0], 0));
    auto * heads = static_cast<Head *>(queue.reserve(formats.size() * sizeof(Head)));
    for (size_t h = 0; h < formats.size(); ++h) heads[h] = head_of(formats[h], layout.record_offset[h]);
    queue.note(cudaMemcpyAsync(to, queue.send(), formats.size() * sizeof(Head), cudaMemcpyDefault, on(queue)));
}

}  // namespace

CudaMemory::CudaMemory(std::shared_ptr<cuda::Queue> queue, int row, int n_pages) : queue_(std::move(queue)), row_(row), n_pages_(n_pages) {
    const size_t bytes = n_pages * sizeof(cuda::PageRef);
    table_ = static_cast<cuda::PageRef *>(queue_->allocate(bytes));
    queue_->note(cudaMemsetAsync(table_, 0, bytes, on(*queue_)));
}

CudaMemory::~CudaMemory() {
    queue_->release(table_);
    queue_->release(heads_);
    queue_->release(sums_);
}

void CudaMemory::recover() {
    queue_->note(cudaMemsetAsync(table_, 0, n_pages_ * sizeof(cuda::PageRef), on(*queue_)));
    if (layout_) set_layout(*layout_);
}

void CudaMemory::set_layout(const PageLayout & layout) {
    layout_ = &layout;
    queue_->release(std::exchange(heads_, nullptr));  // of an earlier call
    queue_->release(std::exchange(sums_, nullptr));
    if (layout.is_value()) {
        heads_ = queue_->allocate(layout.n_heads * sizeof(cuda::ValueHead));
        send_heads(*queue_, layout.values, layout, heads_);
        return;
    }
    heads_ = queue_->allocate(layout.n_heads * sizeof(cuda::KeyHead));
    send_heads(*queue_, layout.keys, layout, heads_);
    queue_->release(sums_);
    sums_ = nullptr;
    const size_t n = n_sums();
    sums_ = static_cast<float *>(queue_->allocate(query_bytes_of(layout)));
    auto * importance = static_cast<float *>(queue_->reserve(n * sizeof(float)));
    std::fill(importance, importance + n, 1.0f);
    if (!layout.query_prior.empty()) std::copy(layout.query_prior.begin(), layout.query_prior.end(), importance);
    queue_->note(cudaMemcpyAsync(prior(), queue_->send(), n * sizeof(float), cudaMemcpyDefault, on(*queue_)));
    for (int s = 0; s < layout.n_streams; ++s) forget_queries(s);
}

cuda::QuerySums CudaMemory::sums(int stream) const {
    float * at = sums_ + stream * sums_stride();
    const size_t n = n_sums();
    return {at, at + n, at + 2 * n, at + 3 * n, sums_stride()};
}

half * CudaMemory::get() {
    half * rows = static_cast<half *>(queue_->get(page_bytes()));
    zero(rows, kPageCells);
    return rows;
}

void CudaMemory::zero(half * rows, int n_rows) { queue_->note(cudaMemsetAsync(rows, 0, size_t(2) * n_rows * row_, on(*queue_))); }

void CudaMemory::copy_bytes(void * to, const void * from, size_t bytes) {
    queue_->note(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, on(*queue_)));
}

void CudaMemory::copy(half * to, const half * from) { copy_bytes(to, from, page_bytes()); }
void CudaMemory::copy_records(uint8_t * to, const uint8_t * from) { copy_bytes(to, from, layout_->record_bytes); }

static_assert(sizeof(PageJob) == sizeof(cuda::PageJob) && offsetof(PageJob, valid) == offsetof(cuda::PageJob, valid),
              "a list of one is a list of the other");

void CudaMemory::pack(int stream, const PageJob * jobs, int n, int) {
    for (; n > 0; jobs += kListed, n -= kListed) {
        const int m = std::min(n, kListed);
        const auto * list = reinterpret_cast<const cuda::PageJob *>(queue_->send(jobs, m));
        if (layout_->is_value()) {
            cuda::pack_values(queue_->stream(), static_cast<cuda::ValueHead *>(heads_), layout_->n_heads, layout_->head_size, row_, list, m);
        } else {
            cuda::pack_keys(queue_->stream(), static_cast<cuda::KeyHead *>(heads_), layout_->n_heads, layout_->head_size, row_, list, m,
                            sums(stream).importance);
        }
    }
}

void CudaMemory::unpack(const PageJob * jobs, int n, int) {
    for (; n > 0; jobs += kListed, n -= kListed) {
        const int m = std::min(n, kListed);
        const auto * list = reinterpret_cast<const cuda::PageJob *>(queue_->send(jobs, m));
        if (layout_->is_value()) {
            cuda::unpack_values(queue_->stream(), static_cast<cuda::ValueHead *>(heads_), layout_->n_heads, layout_->head_size, row_, list, m);
        } else {
            cuda::unpack_keys(queue_->stream(), static_cast<cuda::KeyHead *>(heads_), layout_->n_heads, layout_->head_size, row_, list, m);
        }
    }
}

void CudaMemory::write(half * const * to, int n, const Rows & from) {
    if (diverted_) {
        std::copy(to, to + n, diverted_);
        return;
    }
    const size_t row_bytes = size_t(row_) * (from.is_half ? sizeof(half) : sizeof(float));
    const auto * source = static_cast<const uint8_t *>(from.data);
    const int most = from.on_host ? int(std::max<size_t>(1, (128 << 10) / row_bytes)) : kListed;
    for (; n > 0; to += most, n -= most, source += most * from.stride) {
        const int m = std::min(n, most);
        if (!from.on_host) {
            cuda::write_rows(queue_->stream(), write_of({source, from.stride, from.is_half, false}, queue_->send(to, m), m));
            continue;
        }
        // The rows, and behind them where they go.
        const size_t list = cuda::aligned(m * row_bytes);
        auto * staged = static_cast<uint8_t *>(queue_->reserve(list + m * sizeof(half *)));
        for (int i = 0; i < m; ++i) std::memcpy(staged + i * row_bytes, source + i * from.stride, row_bytes);
        std::memcpy(staged + list, to, m * sizeof(half *));
        const auto * here = static_cast<const uint8_t *>(queue_->send());
        cuda::write_rows(queue_->stream(), write_of({here, row_bytes, from.is_half}, reinterpret_cast<half * const *>(here + list), m));
    }
}

void CudaMemory::read_here(const PageSpan * spans, int n, half * rows) {
    std::vector<PageJob> whole;
    for (const PageSpan * s = spans; s < spans + n; rows += size_t(s->n) * row_, ++s) {
        const size_t skip = size_t(s->cell) * row_, bytes = size_t(2) * s->n * row_;
        if (s->rows) {
            copy_bytes(rows, s->rows + skip, bytes);
        } else if (!s->records) {
            zero(rows, s->n);
        } else if (s->n == kPageCells) {
            whole.push_back({rows, const_cast<uint8_t *>(s->records), {}});
        } else {
            half * page = static_cast<half *>(queue_->get(page_bytes()));
            const PageJob job = {page, const_cast<uint8_t *>(s->records), {}};
            try {
                unpack(&job, 1, 1);
            } catch (...) {
                put(page);
                throw;
            }
            copy_bytes(rows, page + skip, bytes);
            put(page);
        }
    }
    unpack(whole.data(), int(whole.size()), 1);
}

void CudaMemory::read(const PageSpan * spans, int n, half * rows) {
    for (; n > 0; spans += kReadPages, n -= kReadPages) {
        const int m = std::min(n, kReadPages);
        size_t n_rows = 0;
        for (int i = 0; i < m; ++i) n_rows += spans[i].n;
        const size_t bytes = 2 * n_rows * row_;
        half * here = static_cast<half *>(queue_->workspace(bytes));
        read_here(spans, m, here);
        queue_->note(cudaMemcpyAsync(rows, here, bytes, cudaMemcpyDeviceToHost, on(*queue_)));
        queue_->synchronize();
        rows += n_rows * row_;
    }
}

void CudaMemory::get_records(const uint8_t * from, uint8_t * host) {
    queue_->note(cudaMemcpyAsync(host, from, layout_->record_bytes, cudaMemcpyDeviceToHost, on(*queue_)));
    queue_->synchronize();
}

void CudaMemory::set_records(uint8_t * to, const uint8_t * host) {
    queue_->note(cudaMemcpyAsync(to, host, layout_->record_bytes, cudaMemcpyHostToDevice, on(*queue_)));
    queue_->synchronize();  // the bytes belong to the caller
}

void CudaMemory::unpack_from(const uint8_t * host, half * host_rows) {
    auto * records = static_cast<uint8_t *>(queue_->get(layout_->record_bytes));
    set_records(records, host);
    const PageSpan span = {nullptr, records, 0, kPageCells};
    try {
        read(&span, 1, host_rows);
    } catch (...) {
        queue_->put(records, layout_->record_bytes);
        throw;
    }
    queue_->put(records, layout_->record_bytes);
}

void CudaMemory::observe(const Queries & q, int) { observe_on(queue_->stream(), q); }

cuda::Observation CudaMemory::observation(const Queries & q) {
    const int n_kv_heads = layout_->n_heads;
    return {sums(q.first_stream), q.q, q.token, q.head, q.stream, q.n_tokens, q.n_streams, n_kv_heads, q.n_heads / n_kv_heads, layout_->head_size, kQueryMemory};
}

bool CudaMemory::query_statistics(int stream, float * mean_abs, float * mean_sqr) {
    if (!layout_ || !sums_) return false;
    const size_t n = n_sums(), stride = sums_stride();
    const int first = std::max(stream, 0), n_streams = stream < 0 ? layout_->n_streams : 1;
    const cuda::Queue::Piece all = {sums_ + first * stride, n_streams * stride * sizeof(float)};
    const auto * sums = reinterpret_cast<const float *>(queue_->fetch(&all, 1));
    double count = 0;
    for (int s = 0; s < n_streams; ++s) count += sums[s * stride + 3 * n];
    for (size_t i = 0; i < n; ++i) {
        double abs = 0, sqr = 0;
        for (int s = 0; s < n_streams; ++s) abs += sums[s * stride + i], sqr += sums[s * stride + n + i];
        mean_abs[i] = count > 0 ? float(abs / count) : 1.0f;
        mean_sqr[i] = count > 0 ? float(sqr / count) : 1.0f;
    }
    return count > 0;
}

void CudaMemory::forget_queries(int stream) {
    const cuda::QuerySums all = sums(stream);
    queue_->note(cudaMemsetAsync(all.abs, 0, (3 * n_sums() + 4) * sizeof(float), on(*queue_)));
    copy_bytes(all.importance, prior(), n_sums() * sizeof(float));
}

void CudaMemory::mark_queries(int stream, int number) {
    const size_t n = n_sums();
    copy_bytes(mark(stream, number), sums(stream).abs, n * sizeof(float));
    copy_bytes(mark(stream, number) + n, sums(stream).count, sizeof(float));
}

void CudaMemory::recall_queries(int stream, int number) {
    const cuda::QuerySums now = sums(stream);
    const float * then = mark(stream, number);
    cuda::recall_sums(on(*queue_), now, then, int(n_sums()));
    copy_bytes(now.count, then + n_sums(), sizeof(float));
}

void CudaMemory::copy_queries(int to, PageMemory & other, int from) {
    copy_bytes(sums(to).abs, static_cast<CudaMemory &>(other).sums(from).abs, sums_stride() * sizeof(float));
}

QueryState CudaMemory::query_state(int stream, const std::vector<int> & marks) {
    const size_t n = n_sums();
    const cuda::Queue::Piece all = {sums(stream).abs, sums_stride() * sizeof(float)};
    const auto * at = reinterpret_cast<const float *>(queue_->fetch(&all, 1));
    QueryState state = {{at, at + n}, {at + n, at + 2 * n}, at[3 * n], {}};
    for (int number : marks) {
        const float * then = at + 3 * n + 4 + number * (n + 4);
        state.marks.push_back({number, {then, then + n}, then[n]});
    }
    return state;
}

void CudaMemory::restore_queries(int stream, const QueryState & state) {
    const size_t n = n_sums();
    forget_queries(stream);  // the importance before any query
    std::vector<float> all(sums_stride());
    std::copy(state.abs.begin(), state.abs.end(), all.begin());
    std::copy(state.sqr.begin(), state.sqr.end(), all.begin() + n);
    for (size_t i = 0; i < n && state.count > 0; ++i) all[2 * n + i] = state.abs[i] / float(state.count);
    all[3 * n] = float(state.count);
    for (const QueryState::Mark & mark : state.marks) {
        if (mark.number >= layout_->n_marks) continue;
        float * then = all.data() + 3 * n + 4 + mark.number * (n + 4);
        std::copy(mark.abs.begin(), mark.abs.end(), then);
        then[n] = float(mark.count);
    }
    const auto put = [&](size_t from, size_t end) {
        queue_->note(cudaMemcpyAsync(sums(stream).abs + from, all.data() + from, (end - from) * sizeof(float), cudaMemcpyHostToDevice, on(*queue_)));
    };
    put(0, 2 * n);
    put(state.count > 0 ? 2 * n : 3 * n, all.size());
    queue_->synchronize();
}


const cuda::PageRef * CudaMemory::table_of(PageStore & store) {
    const int n_pages = store.shape().n_pages();
    std::vector<cuda::TableEntry> moved;
    moved.reserve(store.moved().size());
    for (int i : store.moved()) {
        const PageStore::Page & page = store.page(i / n_pages, i % n_pages);
        moved.push_back({i, {page.records, page.rows}});
    }
    for (size_t i = 0; i < moved.size(); i += kListed) {
        const int m = int(std::min<size_t>(kListed, moved.size() - i));
        cuda::set_table(on(*queue_), table_, queue_->send(moved.data() + i, m), m);
    }
    store.moved_taken();
    return table_;
}

cuda::Attention prepare_attention(PageStore & keys, CudaMemory & key_memory, PageStore & values, CudaMemory & value_memory, const AttentionCall & c) {
    cuda::Attention a = {};
    a.q = c.q;
    a.q_token = c.q_token, a.q_head = c.q_head, a.q_stream = c.q_stream;
    a.out = c.out;
    a.out_token = c.out_token, a.out_head = c.out_head, a.out_stream = c.out_stream;
    a.mask = c.mask;
    a.mask_token = c.mask_token, a.mask_head = c.mask_head, a.mask_stream = c.mask_stream;
    a.sinks = c.sinks;
    a.n_tokens = c.n_tokens;
    a.n_heads = c.n_heads;
    a.n_kv_heads = keys.n_heads();
    a.n_streams = c.n_streams;
    a.n_kv = c.n_kv;
    a.head_size_k = keys.head_size();
    a.head_size_v = values.head_size();
    a.scale = c.scale, a.max_bias = c.max_bias, a.softcap = c.softcap;
    a.page_stride = keys.shape().n_pages();
    a.key_pages = key_memory.table_of(keys) + c.first_stream * a.page_stride;
    a.value_pages = value_memory.table_of(values) + c.first_stream * a.page_stride;
    a.key_heads = static_cast<const cuda::KeyHead *>(key_memory.heads_);
    a.value_heads = static_cast<const cuda::ValueHead *>(value_memory.heads_);
    a.row_k = keys.shape().row;
    a.row_v = values.shape().row;
    for (int h = 0; h < a.n_kv_heads; ++h) {
        a.most_n16 = std::max(a.most_n16, int(keys.key_format(h).n16));
        a.most_key_bytes = std::max(a.most_key_bytes, int(keys.key_format(h).record_bytes()));
        a.most_value_bytes = std::max(a.most_value_bytes, int(values.value_format(h).record_bytes()));
        a.any_grouped |= !values.value_format(h).rotated();
    }
    a.workspace = static_cast<float *>(key_memory.queue().workspace(cuda::attention_workspace(a) * sizeof(float)));
    a.arrivals = key_memory.queue().counters(cuda::attention_arrivals(a));
    return a;
}

void attention(PageStore & keys, CudaMemory & key_memory, PageStore & values, CudaMemory & value_memory, const AttentionCall & c,
               const cuda::RowWrite * writes) {
    cuda::Attention a = prepare_attention(keys, key_memory, values, value_memory, c);
    cuda::Queue & queue = key_memory.queue();
    const Queries queries = {c.q, c.q_token, c.q_head, c.q_stream, c.n_tokens, c.n_heads, c.n_streams, c.first_stream};
    if (writes) {
        cuda::attention(queue.stream(), a, {writes[0], writes[1], key_memory.observation(queries)});
    } else if (queue.recording() || c.n_tokens > kFewTokens) {
        // The two need not wait for each other; for a token that is queued by itself the events would take longer.
        key_memory.observe_on(queue.fork(), queries);
        cuda::attention(queue.stream(), a);
        queue.join();
    } else {
        keys.observe(queries, 1);
        cuda::attention(queue.stream(), a);
    }
}

}  // namespace mixkvq
