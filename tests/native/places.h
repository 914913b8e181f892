// Where the pages of a store under test are: in the host's memory, in a GPU's, or "far": in a memory that behaves like a device. Its addresses cannot be read
// or written (the bytes lie elsewhere), and it puts off all work until somebody reads: a store that followed an address, or counted on work being done, would
// crash or differ. With MIXKVQ_TEST_CUDA there is a GPU, a real one or an emulated one.
#pragma once

#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <vector>

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#else
#include <sys/mman.h>
#endif

#include "check.h"
#include "mixkvq/cache.h"
#ifdef MIXKVQ_TEST_CUDA
#include <cuda_runtime.h>

#include "mixkvq/cuda.h"
#include "mixkvq/cuda_memory.h"
#endif

using namespace mixkvq;

// Addresses that nobody may follow.
class Names {
  public:
    explicit Names(size_t bytes) : bytes_(bytes) {
#if defined(_WIN32)
        base_ = static_cast<uint8_t *>(VirtualAlloc(nullptr, bytes, MEM_RESERVE, PAGE_NOACCESS));
#else
        void * p = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        base_ = p == MAP_FAILED ? nullptr : static_cast<uint8_t *>(p);
#endif
    }
    ~Names() {
#if defined(_WIN32)
        VirtualFree(base_, 0, MEM_RELEASE);
#else
        munmap(base_, bytes_);
#endif
    }
    Names(const Names &) = delete;
    uint8_t * base() const { return base_; }

  private:
    uint8_t * base_;
    size_t bytes_;
};

class FarMemory final : public PageMemory {
  public:
    static constexpr int kPoolPages = 64;

    FarMemory(int row, size_t region_bytes)
        : row_(row), page_bytes_(size_t(2) * kPageCells * row), region_bytes_(region_bytes), bytes_(region_bytes + kPoolPages * page_bytes_),
          names_(bytes_), bytes_of_(bytes_), host_(*kernels_for(Isa::scalar), unused_, row) {
        for (int i = kPoolPages; i-- > 0;) free_.push_back(reinterpret_cast<half *>(names_.base() + region_bytes + i * page_bytes_));
        std::memset(bytes_of_.data(), 0xa5, bytes_);  // nothing is zero that nobody has zeroed
    }
    uint8_t * region() const { return names_.base(); }
    int held() const { return kPoolPages - int(free_.size()); }
    int gets_left = 1 << 30;  // before memory runs out
    int n_unpacked = 0;

    void later(std::function<void()> work) { queue_.push_back(std::move(work)); }
    void finish() {
        for (auto & work : queue_) work();
        queue_.clear();
    }
    // Where the bytes of an address are.
    template <class T> T * bytes(T * address) {
        const size_t offset = size_t(reinterpret_cast<const uint8_t *>(address) - names_.base());
        CHECK(offset < bytes_, "an address of nothing");
        return reinterpret_cast<T *>(bytes_of_.data() + offset);
    }

    void set_layout(const PageLayout & layout) override { host_.set_layout(layout); }
    half * get() override {
        if (gets_left-- <= 0 || free_.empty()) throw std::bad_alloc();
        half * rows = free_.back();
        free_.pop_back();
        zero(rows, kPageCells);
        return rows;
    }
    void put(half * rows) override {
        CHECK(rows >= reinterpret_cast<half *>(names_.base() + region_bytes_), "a page of the store's own is put into the pool");
        later([=] { std::memset(bytes(rows), 0xa5, page_bytes_); });
        free_.push_back(rows);
    }
    void zero(half * rows, int n) override { later([=] { host_.zero(bytes(rows), n); }); }
    void copy(half * to, const half * from) override { later([=] { host_.copy(bytes(to), bytes(from)); }); }
    void copy_records(uint8_t * to, const uint8_t * from) override { later([=] { host_.copy_records(bytes(to), bytes(from)); }); }
    void pack(int stream, const PageJob * jobs, int n, int) override {
        later([this, stream, list = std::vector<PageJob>(jobs, jobs + n)] {
            const std::vector<PageJob> near = translated(list);
            host_.pack(stream, near.data(), int(near.size()), 1);
        });
    }
    void unpack(const PageJob * jobs, int n, int) override {
        n_unpacked += n;
        later([this, list = std::vector<PageJob>(jobs, jobs + n)] {
            const std::vector<PageJob> near = translated(list);
            host_.unpack(near.data(), int(near.size()), 1);
        });
    }
    void write(half * const * to, int n, const Rows & from) override {
        const auto * source = static_cast<const uint8_t *>(from.data);
        const size_t last = size_t(row_) * (from.is_half ? 2 : 4);
        std::vector<uint8_t> rows(n * from.stride + last);
        for (int i = 0; i < n; ++i) std::memcpy(rows.data() + i * from.stride, source + i * from.stride, last);
        later([this, list = std::vector<half *>(to, to + n), rows = std::move(rows), stride = from.stride, is_half = from.is_half] {
            std::vector<half *> near;
            for (half * p : list) near.push_back(p ? bytes(p) : nullptr);
            host_.write(near.data(), int(near.size()), {rows.data(), stride, is_half});
        });
    }
    void get_records(const uint8_t * from, uint8_t * host) override {
        finish();
        host_.get_records(bytes(from), host);
    }
    void set_records(uint8_t * to, const uint8_t * host) override {
        finish();
        host_.set_records(bytes(to), host);
    }
    void unpack_from(const uint8_t * host, half * host_rows) override { host_.unpack_from(host, host_rows); }
    void read(const PageSpan * spans, int n, half * rows) override {
        finish();
        std::vector<PageSpan> near(spans, spans + n);
        for (PageSpan & s : near) {
            CHECK(!s.rows || !s.records, "a page is packed or in F16");
            if (s.rows) s.rows = bytes(s.rows);
            if (s.records) s.records = bytes(s.records);
        }
        host_.read(near.data(), n, rows);
    }
    void observe(const Queries & queries, int) override {
        finish();
        host_.observe(queries, 1);
    }
    bool query_statistics(int stream, float * mean_abs, float * mean_sqr) override {
        finish();
        return host_.query_statistics(stream, mean_abs, mean_sqr);
    }
    void forget_queries(int stream) override {
        finish();
        host_.forget_queries(stream);
    }
    void mark_queries(int stream, int mark) override {
        finish();
        host_.mark_queries(stream, mark);
    }
    void recall_queries(int stream, int mark) override {
        finish();
        host_.recall_queries(stream, mark);
    }
    void copy_queries(int to, PageMemory & other, int from) override {
        finish();
        host_.copy_queries(to, static_cast<FarMemory &>(other).host_, from);
    }
    QueryState query_state(int stream, const std::vector<int> & marks) override {
        finish();
        return host_.query_state(stream, marks);
    }
    void restore_queries(int stream, const QueryState & state) override {
        finish();
        host_.restore_queries(stream, state);
    }
    size_t query_bytes() const override { return host_.query_bytes(); }

  private:
    std::vector<PageJob> translated(std::vector<PageJob> jobs) {
        for (PageJob & job : jobs) job.rows = bytes(job.rows), job.records = bytes(job.records);
        return jobs;
    }

    int row_;
    size_t page_bytes_, region_bytes_, bytes_;
    Names names_;
    Region bytes_of_;
    ScratchPool unused_;
    HostMemory host_;
    std::vector<half *> free_;
    std::vector<std::function<void()>> queue_;
};

enum class Where { host, far, gpu };

// The memory of a test's stores, which must be gone before it.
class Place {
  public:
    using Wrap = std::function<std::unique_ptr<PageMemory>(std::unique_ptr<PageMemory>)>;  // something around a memory

    Place(Where where, const Kernels & kernels) : where(where), kernels_(kernels) {
#ifdef MIXKVQ_TEST_CUDA
        if (where == Where::gpu) queue = std::make_shared<cuda::Queue>(0);
#endif
    }
    Place(const Place &) = delete;
#ifdef MIXKVQ_TEST_CUDA
    ~Place() {
        for (void * region : gpu_regions_) queue->release(region);
    }
#endif

    std::unique_ptr<PageStore> store(const StoreShape & shape, size_t bytes, const Wrap & wrap = {}) {
        std::unique_ptr<PageMemory> memory;
        uint8_t * at = nullptr;
#ifdef MIXKVQ_TEST_CUDA
        if (where == Where::gpu) {
            gpu_regions_.push_back(queue->allocate(bytes));
            at = static_cast<uint8_t *>(gpu_regions_.back());
            auto made = std::make_unique<CudaMemory>(queue, shape.row, shape.n_streams * shape.n_pages());
            gpu.push_back(made.get());
            memory = std::move(made);
        }
#endif
        if (where == Where::far) {
            auto made = std::make_unique<FarMemory>(shape.row, bytes);
            far = made.get();
            at = far->region();
            memory = std::move(made);
        } else if (where == Where::host) {
            regions_.emplace_back(bytes);
            at = regions_.back().data();
            memory = std::make_unique<HostMemory>(kernels_, pool, shape.row);
        }
        return std::make_unique<PageStore>(shape, wrap ? wrap(std::move(memory)) : std::move(memory), at, bytes);
    }

    // Does `work` to n halfs in a page; far: when their turn comes.
    template <class Work> void edit(half * rows, int n, Work && work) {
        if (where == Where::far) far->later([=, memory = far] { work(memory->bytes(rows)); });
        if (where == Where::host) work(rows);
#ifdef MIXKVQ_TEST_CUDA
        if (where == Where::gpu) {
            std::vector<half> here(n);
            queue->synchronize();
            cudaMemcpy(here.data(), rows, 2 * n, cudaMemcpyDeviceToHost);
            work(here.data());
            cudaMemcpy(rows, here.data(), 2 * n, cudaMemcpyHostToDevice);
            cudaDeviceSynchronize();
        }
#else
        (void) n;
#endif
    }

    // A list where the pages are, for as long as this lives.
    template <class T> class There {
      public:
        There(Place & place, const std::vector<T> & list) : place_(place), at_(const_cast<T *>(list.data())) {
#ifdef MIXKVQ_TEST_CUDA
            if (place_.where != Where::gpu) return;
            void * copy = nullptr;
            cudaMalloc(&copy, list.size() * sizeof(T) + 16);
            cudaMemcpy(copy, list.data(), list.size() * sizeof(T), cudaMemcpyHostToDevice);
            at_ = static_cast<T *>(copy);
#endif
        }
        ~There() {
#ifdef MIXKVQ_TEST_CUDA
            if (place_.where != Where::gpu) return;
            place_.queue->synchronize();
            cudaFree(at_);
#endif
        }
        There(const There &) = delete;
        T * data() const { return at_; }
        // What has become of it; `list` is the one that it was made of.
        void fetch(std::vector<T> & list) const {
#ifdef MIXKVQ_TEST_CUDA
            if (place_.where != Where::gpu) return;
            place_.queue->synchronize();
            cudaMemcpy(list.data(), at_, list.size() * sizeof(T), cudaMemcpyDeviceToHost);
#else
            (void) list;
#endif
        }

      private:
        Place & place_;
        T * at_;
    };

    const Where where;
    ScratchPool pool;          // host
    FarMemory * far = nullptr; // of the latest store
#ifdef MIXKVQ_TEST_CUDA
    std::shared_ptr<cuda::Queue> queue;
    std::vector<CudaMemory *> gpu;  // by store
#endif

  private:
    const Kernels & kernels_;
    std::vector<Region> regions_;
    std::vector<void *> gpu_regions_;
};
