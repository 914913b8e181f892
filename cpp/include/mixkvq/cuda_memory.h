// Pages in the memory of an NVIDIA GPU. Free of CUDA's headers.
//
// Work is queued and takes effect in the order of the calls. What a caller passes (lists, rows on the host) is copied before a call returns. Where
// there is no memory left, std::bad_alloc is thrown; whatever else goes wrong is kept in Queue::error, and what comes after it is worth nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "mixkvq/attention.h"
#include "mixkvq/cache.h"
#include "mixkvq/cuda.h"
#include "mixkvq/page_memory.h"

namespace mixkvq::cuda {

// The number of the GPU with this PCI bus id; -1 if CUDA does not show it.
int device_of_bus(const char * pci_bus_id);

// What the memories that share a pool or copy from each other have in common: a stream, lists on their way to the GPU, pages beyond the stores' own.
// One thread at a time.
class Queue {
  public:
    explicit Queue(int device);
    ~Queue();
    Queue(const Queue &) = delete;
    Queue & operator=(const Queue &) = delete;

    // The stream, with its device made that of this thread.
    Stream stream();
    // Another one behind all that is queued so far; join: the first waits for it.
    Stream fork();
    void join();
    // An event (cudaEvent_t) behind all that is queued so far; it is the same one for each call.
    void * mark();
    // What is queued from now on waits for this event.
    void wait_for(void * event);
    void synchronize();
    // What went wrong first, or nullptr.
    const char * error() const { return error_.empty() ? nullptr : error_.c_str(); }
    void note(int code);  // a cudaError_t
    // What other work of this thread has left to be found is not this queue's. Before anything is queued.
    void forget_foreign_error();
    // Between the two nothing is noted; held: whether there was anything.
    void hold_errors() { holding_ = true, held_ = false; }
    bool held_errors() { return holding_ = false, held_; }
    // Nobody needs any more what has been queued so far. False: the GPU still fails.
    bool recover();

    // Room for the arguments of one kernel on the host, and, once they are there, where the GPU reads them.
    void * reserve(size_t bytes);
    const void * send();
    template <class T> const T * send(const T * list, size_t n);

    struct Piece {
        const void * at;
        size_t bytes;
    };
    // Pieces of GPU memory on the host, each one aligned to 64 bytes behind the one before. Waits; the next call takes the memory back.
    const uint8_t * fetch(const Piece * pieces, size_t n);

    // GPU memory that calls share; it grows to the largest and stays.
    void * workspace(size_t bytes);
    // The same for counters that are zero, and that every call leaves zero.
    uint32_t * counters(size_t n);
    uint64_t workspaces() const { return n_workspaces_; }  // how many there have been of both: they are others when this changes
    // Blocks of GPU memory, not zeroed.
    void * get(size_t bytes);
    void put(void * block, size_t bytes) { free_[bytes].push_back(block); }
    void trim();  // frees the blocks that nobody holds
    size_t bytes() const { return bytes_; }
    size_t bytes_peak() const { return peak_; }

    void * allocate(size_t bytes);
    void release(void * block);

    bool recording() const { return recording_; }

  private:
    friend class Recording;
    static constexpr int kParts = 4;

    void close();
    void make_ring(size_t part_bytes);
    void free_ring();

    int device_;
    void * stream_ = nullptr;
    void * side_ = nullptr;  // of fork
    void * mark_ = nullptr, * fork_ = nullptr, * join_ = nullptr;
    bool recording_ = false;
    bool idle_ = true;      // nothing has been queued since it was waited for
    bool ordered_ = false;  // memory is allocated and freed in the order of the stream
    std::string error_;
    bool holding_ = false, held_ = false;

    // A ring in parts: pinned memory and its copy on the GPU. An event guards a part until the work that reads it is done.
    uint8_t * ring_ = nullptr;
    uint8_t * ring_copy_ = nullptr;
    void * part_done_[kParts] = {};
    size_t part_bytes_ = 0, used_ = 0, reserved_ = 0;
    int part_ = 0;

    uint8_t * fetched_ = nullptr;
    size_t fetched_bytes_ = 0;
    void * workspace_ = nullptr;
    size_t workspace_bytes_ = 0;
    uint32_t * counters_ = nullptr;
    size_t n_counters_ = 0;
    uint64_t n_workspaces_ = 0;
    std::unordered_map<size_t, std::vector<void *>> free_;
    size_t bytes_ = 0, peak_ = 0;
};

// Work that is recorded once and launched again as one piece, a CUDA graph; only where rows are written to changes from time to time.
class Recording {
  public:
    Recording(std::shared_ptr<Queue> queue, size_t n_rows);
    ~Recording();
    Recording(const Recording &) = delete;
    Recording & operator=(const Recording &) = delete;

    Queue & queue() { return *queue_; }
    // Where the rows of the next launch go, to be filled before `send`; and the list as kernels read it.
    half ** rows() { return rows_.data(); }
    half * const * rows_there() const { return rows_there_; }
    void send();

    // Between the two, work on the queue, and on streams that wait for it and that it waits for in the end, is recorded and not done. False if it
    // cannot be recorded. older: a recording that is not needed any more, nullptr if there is none; that of nearly the same work becomes this one,
    // which takes a fraction of the time.
    bool begin();
    bool end(Recording * older);
    bool launch();  // false: there is no memory for it, and nothing has been queued; it has to be recorded again
    bool ready() const { return graph_ != nullptr; }

  private:
    std::shared_ptr<Queue> queue_;
    std::vector<half *> rows_;
    half ** rows_there_;
    void * graph_ = nullptr;  // cudaGraphExec_t
};

}  // namespace mixkvq::cuda

namespace mixkvq {

class CudaMemory final : public PageMemory {
  public:
    // The rows of a cell have `row` elements, the store `n_pages` pages in all.
    CudaMemory(std::shared_ptr<cuda::Queue> queue, int row, int n_pages);
    ~CudaMemory() override;

    void set_layout(const PageLayout & layout) override;
    half * get() override;
    void put(half * rows) override { queue_->put(rows, page_bytes()); }
    void zero(half * rows, int n_rows) override;
    void copy(half * to, const half * from) override;
    void copy_records(uint8_t * to, const uint8_t * from) override;
    void pack(int stream, const PageJob * jobs, int n, int n_threads) override;
    void unpack(const PageJob * jobs, int n, int n_threads) override;
    void write(half * const * to, int n, const Rows & from) override;
    void read(const PageSpan * spans, int n, half * rows) override;
    void get_records(const uint8_t * from, uint8_t * host) override;
    void set_records(uint8_t * to, const uint8_t * host) override;
    void unpack_from(const uint8_t * host, half * host_rows) override;
    void observe(const Queries & queries, int n_threads) override;
    bool query_statistics(int stream, float * mean_abs, float * mean_sqr) override;
    void forget_queries(int stream) override;
    void mark_queries(int stream, int mark) override;
    void recall_queries(int stream, int mark) override;
    void copy_queries(int to, PageMemory & other, int from) override;
    QueryState query_state(int stream, const std::vector<int> & marks) override;
    void restore_queries(int stream, const QueryState & state) override;
    size_t query_bytes() const override { return sums_ ? query_bytes_of(*layout_) : 0; }
    static size_t query_bytes_of(const PageLayout & layout) {  // of keys
        return sizeof(float) * (layout.n_streams * sums_stride(layout) + n_sums(layout));
    }
    void observe_on(cuda::Stream stream, const Queries & queries) { cuda::observe(stream, observation(queries)); }
    cuda::Observation observation(const Queries & queries);  // which is then to be done

    // As read, to GPU memory (16-byte aligned), and without waiting.
    void read_here(const PageSpan * spans, int n, half * rows);

    // While there is one, a write only says where its rows would go. write_of: what the kernel gets, with that list where it can read it.
    class Diversion {
      public:
        Diversion(CudaMemory & memory, half ** list) : memory_(memory) { memory_.diverted_ = list; }
        ~Diversion() { memory_.diverted_ = nullptr; }
        Diversion(const Diversion &) = delete;
        Diversion & operator=(const Diversion &) = delete;

      private:
        CudaMemory & memory_;
    };
    cuda::RowWrite write_of(const Rows & from, half * const * to, int n) const { return {from.data, from.is_half, from.stride, to, n, row_}; }

    // As attention reads it: where the pages are now.
    const cuda::PageRef * table_of(PageStore & store);

    cuda::Queue & queue() { return *queue_; }

    // After an error, with a store that has been cleared: what the kernels read is put there again.
    void recover();

  private:
    friend cuda::Attention prepare_attention(PageStore &, CudaMemory &, PageStore &, CudaMemory &, const AttentionCall &);

    size_t page_bytes() const { return size_t(2) * kPageCells * row_; }
    void copy_bytes(void * to, const void * from, size_t bytes);
    cuda::QuerySums sums(int stream) const;
    // Statistics of a stream, what is remembered of them (sums of |q_d| and the count), those of the next stream; behind the last one's the importance
    // before any query.
    static size_t n_sums(const PageLayout & layout) { return size_t(layout.n_heads) * layout.head_size; }
    static size_t sums_stride(const PageLayout & layout) { return 3 * n_sums(layout) + 4 + layout.n_marks * (n_sums(layout) + 4); }
    size_t n_sums() const { return n_sums(*layout_); }
    size_t sums_stride() const { return sums_stride(*layout_); }
    float * mark(int stream, int number) const { return sums_ + stream * sums_stride() + 3 * n_sums() + 4 + number * (n_sums() + 4); }
    float * prior() const { return sums_ + layout_->n_streams * sums_stride(); }

    std::shared_ptr<cuda::Queue> queue_;
    int row_, n_pages_;
    cuda::PageRef * table_ = nullptr;  // as attention reads it; follows the store's take_moved
    const PageLayout * layout_ = nullptr;
    void * heads_ = nullptr;           // KeyHead or ValueHead, by head
    float * sums_ = nullptr;           // keys: the arrays of QuerySums, one behind the other
    half ** diverted_ = nullptr;
};

// The call as the kernels get it, with the tables of now and a workspace.
cuda::Attention prepare_attention(PageStore & keys, CudaMemory & key_memory, PageStore & values, CudaMemory & value_memory, const AttentionCall & call);

// Attention of a batch over a pair of stores whose memories share a queue; the pointers of the call are the GPU's. Counts the queries for I_d.
// `writes`: rows of the keys and of the values, to be written before; or nullptr.
void attention(PageStore & keys, CudaMemory & key_memory, PageStore & values, CudaMemory & value_memory, const AttentionCall & call,
               const cuda::RowWrite * writes = nullptr);

}  // namespace mixkvq
