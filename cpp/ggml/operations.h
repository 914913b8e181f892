// What the operations of a graph are to the caches: how each is recognised, and the parts of it that do not depend on who computes it.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "buffer.h"
#include "mixkvq/attention.h"

namespace mixkvq::MIXKVQ_GLUE {

enum class Kind {
    view,    // computes nothing
    inner,   // for the inner backend, as it is
    write,   // rows into pages
    attend,
    shift,
    copies,  // for the inner backend, on copies of what is in a cache
};
Kind kind_of(const ggml_tensor * node);

bool is_view(ggml_op op);
// Whether `op` reads or writes a cache in our buffers of this type. Learns head sizes on the way.
bool touches_cache(const ggml_tensor * op, ggml_backend_buffer_type_t type);
// Learns from an operation how the cells of its cache tensors are divided into heads.
void learn_geometry(const ggml_tensor * op);

// ---- write ----

// Where the rows of a write go, by its indices on the host. False: there is no such cell.
bool find_cells(const CacheTensor & t, const ggml_tensor * op, const void * indices, std::vector<PageStore::Cell> & cells);
Rows rows_of(const ggml_tensor * write, bool on_host);

// ---- attention ----

bool can_attend(const CacheTensor * k, const CacheTensor * v, const ggml_tensor * op);
AttentionCall attention_call(const CacheTensor & k, const ggml_tensor * op);

// ---- context shift ----

// A part of a shift: the keys of one page.
struct PageShift {
    ggml_tensor keys, by, node;
};
// Calls run(part) for every page that is turned, with its rows unpacked, so that no more than a page is ever unpacked. `by` is what the positions are on
// the host; what is computed reads them where they are.
ggml_status shift_pages(CacheTensor & t, const ggml_tensor * op, const int32_t * by, int n_threads,
                        const std::function<ggml_status(PageShift &)> & run);

// ---- anything else: on copies ----

// What a tensor covers of a cache: whole cells, of all streams.
struct Span {
    CacheTensor * cache;
    size_t first, n;  // cells
    size_t skip;      // bytes of the first cell before the tensor

    explicit Span(const ggml_tensor * t);
    size_t bytes() const { return n * cache->row_bytes; }
    bool operator==(const Span & other) const { return cache == other.cache && first == other.first && n == other.n && skip == other.skip; }
};

// An operation whose tensors in caches have been replaced by stand-ins: plain ones by what is behind them, others by copies, whose data is yet to come.
struct OnCopies {
    struct Copy {
        ggml_tensor * tensor;
        Span span;
        int same;  // the copy that it shares, since an operation in place must see one and not two; or -1
    };
    ggml_tensor node, sources[GGML_MAX_SRC];
    std::vector<Copy> copies;
    CacheTensor * result = nullptr;  // where the first copy goes afterwards, if the node writes into a cache that is not plain

    explicit OnCopies(const ggml_tensor * op);  // refers to itself: not to be moved
    OnCopies(const OnCopies &) = delete;
    OnCopies & operator=(const OnCopies &) = delete;
};
// Says so, once, if it is attention of a form that the packed kernels do not serve.
void warn_unpacked(const ggml_tensor * op);
// Says so, once, if pages have been filled that nobody has read in a way that is known: they stay F16.
void warn_unread(const CacheTensor & tensor);
ggml_status run_node(ggml_backend_t backend, ggml_tensor * node);  // may return before it is done

}  // namespace mixkvq::MIXKVQ_GLUE
