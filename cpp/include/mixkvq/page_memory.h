// What can be done to the bytes of a store's pages, wherever they are. The store keeps the books: to it rows and records are addresses that it
// hands out, adds to and compares, but never follows.
//
// A memory on a device may put its work on a queue and return. Then everything takes effect in the order of the calls, also across memories that
// share a pool or copy from each other: a page that is put back, or whose records are freed, is handed out again while its last reader still waits
// in the queue. Lists and host rows belong to the caller and are gone after the call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "mixkvq/kernels.h"
#include "mixkvq/memory.h"
#include "mixkvq/state.h"

namespace mixkvq {

// How a cell divides into heads, and the records of a page among them: a format per head, of keys or of values.
struct PageLayout {
    int n_heads = 1, head_size = 0;
    int n_streams = 1, n_marks = 0;  // of the store: keys have query statistics for each stream, and remember some
    std::vector<KeyFormat> keys;
    std::vector<ValueFormat> values;
    std::vector<size_t> record_offset;  // by head, within the records of a page
    size_t record_bytes = 0;            // of a page; 0 if pages are never packed
    std::vector<float> query_prior;     // I_d before the first query, [head][channel]; empty: ones

    bool is_value() const { return !values.empty(); }
};

// A page to be packed (only its valid cells are looked at) or unpacked (all of its rows are written).
struct PageJob {
    half * rows;
    uint8_t * records;
    CellMask valid;
};

// Cells of one page: in F16 (`rows`, of the whole page), packed, or, if both are null, zeros.
struct PageSpan {
    const half * rows;
    const uint8_t * records;
    int cell, n;  // the first one within the page
};

// Rows to be stored, `stride` bytes apart.
struct Rows {
    const void * data;
    size_t stride;
    bool is_half;         // else float
    bool on_host = true;  // else where the pages are
};

// A batch of queries that reads a key store, strides in elements. Query head h reads head h / (n_heads / heads of the store).
struct Queries {
    const float * q;  // where the pages are
    size_t token, head, stream;
    int n_tokens, n_heads, n_streams;
    int first_stream = 0;  // of the store
};

class PageMemory {
  public:
    virtual ~PageMemory() = default;

    // Comes once, before anything is packed, unpacked or observed. `layout` outlives the memory's use.
    virtual void set_layout(const PageLayout & layout) = 0;

    // F16 pages beyond the store's own; zeroed. Throws std::bad_alloc.
    virtual half * get() = 0;
    virtual void put(half * rows) = 0;

    virtual void zero(half * rows, int n_rows) = 0;
    virtual void copy(half * to, const half * from) = 0;                   // a page in F16
    virtual void copy_records(uint8_t * to, const uint8_t * from) = 0;     // a packed page
    virtual void pack(int stream, const PageJob * jobs, int n, int n_threads) = 0;  // keys: by the I_d of that stream now
    virtual void unpack(const PageJob * jobs, int n, int n_threads) = 0;
    // Row i to to[i] (nullptr: skipped). NaN becomes 0, infinity +-65504.
    virtual void write(half * const * to, int n, const Rows & from) = 0;
    // The spans, one behind the other, as F16 rows in host memory, which hold them on return.
    virtual void read(const PageSpan * spans, int n, half * rows) = 0;

    // The records of a page to host memory, which holds them on return, and back; what records in host memory (aligned as records are) read back as.
    virtual void get_records(const uint8_t * from, uint8_t * host) = 0;
    virtual void set_records(uint8_t * to, const uint8_t * host) = 0;
    virtual void unpack_from(const uint8_t * host, half * host_rows) = 0;

    // Keys: counts queries for the I_d of their streams; once per batch, because old queries fade. What is not finite counts as 0.
    virtual void observe(const Queries & queries, int n_threads) = 0;
    // Mean |q_d| and mean q_d^2, [head][channel], on the host, of a stream or, at -1, of all; ones and false before any query.
    virtual bool query_statistics(int stream, float * mean_abs, float * mean_sqr) = 0;
    // The statistics of a stream begin anew; are remembered under a number below n_marks; are again what was remembered (of q^2 only the mean of now is
    // kept); become those of a stream of a memory of the same kind and layout, with what is remembered.
    virtual void forget_queries(int stream) = 0;
    virtual void mark_queries(int stream, int mark) = 0;
    virtual void recall_queries(int stream, int mark) = 0;
    virtual void copy_queries(int to, PageMemory & other, int from) = 0;
    // The statistics of a stream with what is remembered under these numbers; and back.
    virtual QueryState query_state(int stream, const std::vector<int> & marks) = 0;
    virtual void restore_queries(int stream, const QueryState & state) = 0;
    virtual size_t query_bytes() const = 0;
};

// Pages that the kernels of the CPU reach.
class HostMemory : public PageMemory {
  public:
    HostMemory(const Kernels & kernels, ScratchPool & pool, int row) : k_(kernels), pool_(pool), row_(row) {}

    void set_layout(const PageLayout & layout) override;
    half * get() override { return static_cast<half *>(pool_.get(page_bytes())); }
    void put(half * rows) override { pool_.put(rows, page_bytes()); }
    void zero(half * rows, int n_rows) override;
    void copy(half * to, const half * from) override;
    void copy_records(uint8_t * to, const uint8_t * from) override;
    void pack(int stream, const PageJob * jobs, int n, int n_threads) override;
    void unpack(const PageJob * jobs, int n, int n_threads) override;
    void write(half * const * to, int n, const Rows & from) override;
    void read(const PageSpan * spans, int n, half * rows) override;
    void get_records(const uint8_t * from, uint8_t * host) override { copy_records(host, from); }
    void set_records(uint8_t * to, const uint8_t * host) override { copy_records(to, host); }
    void unpack_from(const uint8_t * host, half * host_rows) override;
    void observe(const Queries & queries, int n_threads) override;
    bool query_statistics(int stream, float * mean_abs, float * mean_sqr) override;
    void forget_queries(int stream) override;
    void mark_queries(int stream, int mark) override;
    void recall_queries(int stream, int mark) override;
    void copy_queries(int to, PageMemory & other, int from) override;
    QueryState query_state(int stream, const std::vector<int> & marks) override;
    void restore_queries(int stream, const QueryState & state) override;
    size_t query_bytes() const override;

  private:
    struct Mark {
        std::vector<float> abs;
        double count = 0;
    };
    struct QuerySums {
        std::vector<float> abs, sqr;  // of |q_d| and q_d^2, [head][channel]
        double count = 0;             // of query vectors per head
        std::vector<Mark> marks;
    };

    size_t page_bytes() const { return size_t(2) * kPageCells * row_; }
    void unpack_head(int head, const uint8_t * records, half * rows) const;
    void read_importance(int stream);

    const Kernels & k_;
    ScratchPool & pool_;
    int row_;
    const PageLayout * layout_ = nullptr;
    std::vector<QuerySums> queries_;  // by stream
    std::vector<float> importance_;   // kept between calls, so that packing allocates nothing
};

}  // namespace mixkvq
