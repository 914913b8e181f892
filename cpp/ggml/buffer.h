// Buffers of our devices, and the cache tensors in them.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "abi.h"
#include "device.h"
#include "mixkvq/cache.h"
#include "notes.h"
#include "session.h"

namespace mixkvq::MIXKVQ_GLUE {

struct CacheTensor;

// What is behind a buffer: memory of its device, the F16 pages beyond those that cache tensors own, and how both are reached.
class BufferMemory {
  public:
    virtual ~BufferMemory() = default;
    virtual uint8_t * base() const = 0;
    virtual bool is_zero() const = 0;  // of fresh memory
    virtual const char * isa() const = 0;

    virtual std::unique_ptr<PageMemory> pages(const StoreShape & shape) = 0;
    virtual bool has_queue() const { return false; }  // of its own: it cannot be read along with others
    virtual void trim() = 0;  // frees the pages that nobody holds
    virtual size_t scratch_bytes() const = 0;
    virtual size_t scratch_bytes_peak() const = 0;

    virtual uint8_t * allocate(size_t bytes) = 0;  // more of it, zeroed, for as long as the buffer lives; throws std::bad_alloc
    virtual void set(uint8_t * to, const void * from, size_t bytes) = 0;
    virtual void get(void * to, const uint8_t * from, size_t bytes) const = 0;
    virtual void fill(uint8_t * at, uint8_t value, size_t bytes) = 0;
    virtual void zero_all() = 0;  // nobody needs the contents any more
    virtual void recover(std::vector<std::unique_ptr<CacheTensor>> &) {}  // all tensors have been cleared: what failed before does not matter any more
    // For tensors that are as ggml lays them out: prepares one, copies one to another.
    virtual ggml_status init(ggml_tensor *) { return GGML_STATUS_SUCCESS; }
    virtual bool copy(const ggml_tensor *, ggml_tensor *) { return false; }
};

// How often a cache tensor has changed its mode, of all there are: what was found out about operations on them holds until it changes.
extern std::atomic<uint64_t> mode_changes;

// A key or value tensor of llama.cpp's cache. Its `data` is a name: byte offsets from it, by the strides of its nominal
// type, say which cell and head is meant.
struct CacheTensor {
    enum class Mode {
        undecided,  // nobody has read it yet, so its head size is not known; everything stays F16
        packed,
        plain,      // kept as llama.cpp lays it out
    };

    Buffer * owner = nullptr;
    std::string name;
    int layer = 0;
    bool is_value = false;
    size_t nominal_bytes = 0;
    size_t row_bytes = 0;
    size_t region_bytes = 0;
    size_t unused_bytes = 0;  // of memory that is taken and that nothing is in
    Mode mode = Mode::undecided;
    const char * reason = "";  // why it is plain; lives as long as the process
    int head_size = 0, n_heads = 0;
    std::unique_ptr<PageStore> store;
    uint8_t * plain_data = nullptr;

    // The first reader says how a cell is divided into heads.
    void decide(int head_size, int n_heads);
    void move_to_larger_region(size_t bytes);
    void make_plain(const std::string & reason, const std::string & topic = "");
    // Calls f(stream, first cell, cells, bytes from the start) for the rows of a range of whole ones; for others not at all.
    template <class F> void each_stream(size_t offset, size_t size, F && f) const {
        if (mode != Mode::packed || offset % row_bytes || size % row_bytes) return;
        const size_t n_cells = store->shape().n_cells;
        for (size_t cell = offset / row_bytes, end = cell + size / row_bytes, n; cell < end; cell += n) {
            n = std::min(end - cell, n_cells - cell % n_cells);
            f(int(cell / n_cells), int(cell % n_cells), int(n), cell * row_bytes - offset);
        }
    }
    // Byte ranges in nominal layout.
    void read(size_t offset, void * data, size_t size) const;
    void write(size_t offset, const void * data, size_t size, int n_threads);
    void erase(size_t offset, size_t size);
    void clear();
};

struct Buffer : std::enable_shared_from_this<Buffer> {
    // Whoever reads or changes what is in here, or the books of its pages, holds it: a program may ask for figures while another thread decodes.
    std::recursive_mutex mutex;
    Device * device = nullptr;
    std::unique_ptr<BufferMemory> memory;
    size_t size = 0;
    std::vector<std::unique_ptr<CacheTensor>> tensors;
    std::vector<std::pair<void *, size_t>> direct;  // tensors of llama.cpp's memory that are no key or value cache
    bool touched = false;
    std::shared_ptr<Session> session;
    Notes notes;
    size_t more = 0;   // bytes allocated beside `size`, for tensors that turned out to be plain
    bool dry = false;  // of a dry run: sizes without memory
};

// Several buffers that are held at once; in the order of their addresses, so that no two threads wait for each other.
class BufferLocks {
  public:
    void add(Buffer * buffer) {
        if (buffer) buffers_.push_back(buffer);
    }
    void lock() {
        std::sort(buffers_.begin(), buffers_.end());
        buffers_.erase(std::unique(buffers_.begin(), buffers_.end()), buffers_.end());
#ifndef MIXKVQ_WITHOUT_LOCKS  // as `make tsan` builds it to be told of it
        for (Buffer * buffer : buffers_) locks_.emplace_back(buffer->mutex);
#endif
    }

  private:
    std::vector<Buffer *> buffers_;
    std::vector<std::unique_lock<std::recursive_mutex>> locks_;
};

void init_buffer_type(Device & device);
// Takes a cache tensor of a dry run (llama.cpp's no_alloc) into the books of this thread's session.
void take_dry(const ggml_tensor * tensor);
const ggml_tensor * root_of(const ggml_tensor * tensor);
CacheTensor * cache_of(const ggml_tensor * tensor);  // nullptr unless the tensor is (a view of) a cache tensor
Buffer * buffer_of(const ggml_tensor * tensor);  // nullptr unless it is in one of our buffers
bool is_split(const ggml_tensor * op);           // of a model whose tensors ggml divides between devices (-sm tensor)
bool is_in_memory_of_llama(const ggml_tensor * tensor);  // a tensor of llama.cpp's memory (cache_*) in one of our buffers
size_t offset_in_cache(const ggml_tensor * tensor);

}  // namespace mixkvq::MIXKVQ_GLUE
