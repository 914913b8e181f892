// The cache of one tensor (the keys or the values of one layer): pages that are packed, or F16 while they are recent.
// Knows nothing of ggml. One thread at a time may change a store; kernels inside run on several.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "mixkvq/history.h"
#include "mixkvq/page_memory.h"
#include "mixkvq/state.h"

namespace mixkvq {

// What there is to know of a stream that its rows do not say.
struct StreamNotes {
    HistoryState history;
    QueryState queries;  // of keys that are packed or go to a codec
    size_t bytes() const;
};

struct StoreShape {
    bool is_value = false;
    int row = 0;        // elements of a cell: heads * head size
    int n_cells = 0;    // per stream
    int n_streams = 1;
    int window = 128;   // recent cells kept in F16
    int sinks = 128;    // first cells kept in F16, rounded up to pages

    int n_pages() const { return (n_cells + kPageCells - 1) / kPageCells; }
    int sink_pages() const;
    int home_pages() const;     // F16 pages a stream owns: sinks, window and the page being filled
    int record_pages() const;   // packed pages a stream can hold: all but the sinks and the page being filled
    size_t page_bytes() const { return size_t(2) * kPageCells * row; }
};

// Bytes of addresses that a store needs for its F16 pages and the records of all its pages.
size_t reserve_bytes(const StoreShape & shape, size_t records_per_page);
// Of these, what is in memory once all cells have been filled in order: pages of the window are not packed.
size_t filled_bytes(const StoreShape & shape, size_t records_per_page);

// A page that settles, as a codec gets it: see mixkvq_page in backend_api.h.
struct CodecPage {
    int stream, first_cell;
    CellMask valid;
    const float * rows;            // [head][cell][channel]
    const float * q_abs, * q_sqr;  // keys: [head][channel]; values: nullptr
};

// Takes the place of packing, to try other formats: fills `rows` (zeros before, same shape) with what would be read back, and `bits` of the whole
// page. False: the page stays as it is.
using PageCodec = std::function<bool(const CodecPage & page, float * rows, double & bits)>;

class PageStore {
  public:
    // Rows and records are addresses in the page memory: only who knows that it is the host's may follow them.
    struct Page {
        half *    rows = nullptr;    // F16, [128][row]; nullptr when packed or empty
        uint8_t * records = nullptr; // head records; nullptr unless packed
        CellMask  valid;
        uint64_t  written : 62;      // stream clock after the last write
        uint64_t  coded : 1;         // a codec has rewritten the rows: the page counts as packed
        uint64_t  moved : 1;         // on the list of take_moved
        Page() : written(0), coded(0), moved(0) {}
        bool empty() const { return !rows && !records; }
        bool settled() const { return records || coded; }
    };

    struct Cell {
        int stream, cell;
    };

    // `region` (64-byte aligned, an address in `memory`) holds what reserve_bytes says and outlives the store.
    PageStore(const StoreShape & shape, std::unique_ptr<PageMemory> memory, uint8_t * region, size_t region_bytes);
    // The same in host memory; the pool outlives the store.
    PageStore(const StoreShape & shape, const Kernels & kernels, uint8_t * region, size_t region_bytes, ScratchPool & pool);
    PageStore(const PageStore &) = delete;
    PageStore & operator=(const PageStore &) = delete;
    ~PageStore();

    // Pages go to the codec instead of being packed. Comes before set_formats, which then say the geometry only. The codec works on the host; the
    // kernels convert for it.
    void set_codec(PageCodec codec, const Kernels & kernels = *kernels_for(Isa::scalar)) {
        codec_ = std::move(codec);
        codec_kernels_ = &kernels;
    }
    bool has_codec() const { return bool(codec_); }

    // Until one of these is called every page stays F16. A format per head.
    void set_formats(std::vector<KeyFormat> formats, std::vector<float> query_prior);
    void set_formats(std::vector<ValueFormat> formats);
    bool configured() const { return configured_; }

    const StoreShape & shape() const { return shape_; }
    int n_heads() const { return layout_.n_heads; }
    int head_size() const { return layout_.head_size; }
    const KeyFormat & key_format(int head) const { return layout_.keys[head]; }
    const ValueFormat & value_format(int head) const { return layout_.values[head]; }
    const Page & page(int stream, int p) const { return pages_[size_t(stream) * shape_.n_pages() + p]; }
    const uint8_t * record(const Page & page, int head) const { return page.records + layout_.record_offset[head]; }

    // Pages whose rows or records are not where they were at the last call: f(stream, page), each once. For a page table that is kept elsewhere.
    // Where f throws, they all come again.
    template <class F> void take_moved(F && f) {
        for (int i : moved_) f(i / shape_.n_pages(), i % shape_.n_pages());
        moved_taken();
    }
    // In two steps: what has moved, stream * pages + page, and that it is known.
    const std::vector<int> & moved() const { return moved_; }
    void moved_taken() {
        for (int i : moved_) pages_[i].moved = 0;
        moved_.clear();
    }

    // Writes rows of `row` numbers, one to each cell (no cell twice). NaN becomes 0, infinity +-65504.
    void write(const Cell * cells, int n, const Rows & rows);
    // The same to consecutive cells, `stride` in elements.
    void write(int stream, int cell, int n, const float * rows, size_t stride);
    void write(int stream, int cell, int n, const half * rows, size_t stride);
    // Cells read as zero afterwards and hold no token.
    void erase(int stream, int cell, int n);
    void read(int stream, int cell, int n, half * rows) const;
    // Rewrites a page in place: `edit` gets the address of its F16 rows; on a device it only has to queue its work behind the memory's. A packed
    // page is packed again at once (one that the codec refuses: by the next settle).
    template <class Edit> void edit_page(int stream, int p, int n_threads, Edit && edit) {
        if (this->page(stream, p).empty()) return;
        const bool packed = this->page(stream, p).settled();
        half * rows = stage(stream, p);
        edit(rows);
        if (packed) pack({{stream, p}}, n_threads);
    }

    // Packs what is full and older than the window, and, if more F16 pages are in use than a stream owns, the least
    // recently written ones early. Call after the attention that reads the last written cells. False: the codec refused a page, which stays F16.
    bool settle(int n_threads);

    // What the batch that was written last sees. Comes between its rows and its attention, before observe: a stream that has been emptied or rewound
    // gets the statistics that belong to what is left, and each sequence in it a window.
    void look(const MaskView & view);
    // Statistics are never put back: they follow all queries that a stream has ever had.
    void keep_statistics(bool keep) { keep_statistics_ = keep; }
    // Adds a batch of queries to the statistics of the keys.
    void observe(const Queries & queries, int n_threads) { memory_->observe(queries, n_threads); }
    // Mean |q_d| per channel of a stream, [head][channel]; ones before any query without a prior.
    std::vector<float> importance(int stream = 0) const;
    // Mean |q_d| and mean q_d^2, [head][channel], of a stream or of all; ones and false before any query.
    bool query_statistics(float * mean_abs, float * mean_sqr, int stream = -1) const { return memory_->query_statistics(stream, mean_abs, mean_sqr); }

    bool same_layout(const PageStore & other) const;
    // Makes a stream equal to one of a store with the same layout (this one included), with its statistics; packed pages are copied as they are.
    void copy_stream(const PageStore & other, int from, int to);
    void clear();

    // Packed states, in state.cpp. What a stream holds, as far as pages hold one of the `live` cells; with `shared`, other cells of these pages belong
    // to somebody else and are no part of it.
    void save_stream(int stream, const CellRuns & live, bool shared, StateWriter & out) const;
    // A stream as it was saved by a store of these formats. nullptr, or what is wrong with it; then `in` does not matter any more.
    const char * parse_stream(StateReader & in, StreamState & state) const;
    // The cells of `moves`, each once, become what they were in the state; those that are whole pages in the same order keep their records. alone: nothing
    // else in the stream is needed, and it gets the state's statistics; if all cells stay where they were it goes on as the saved one would have. A page
    // that comes to be where its records are already stays as it is. Throws std::bad_alloc.
    void load_stream(int stream, const StreamState & state, const std::vector<CellMove> & moves, bool alone, int n_threads);

    StreamNotes notes(int stream) const;
    // Rows are about to be written to these cells by somebody who does not say whose they are. If they take the place of tokens of every sequence that is
    // known in the stream, these are forgotten, with the statistics. Whether nothing is known of the stream then.
    bool forget_replaced(int stream, int cell, int n);
    // The rows of which this was noted have been written to the cells of `moves`, in order. alone: as for load_stream.
    void recall(int stream, const StreamNotes & notes, const std::vector<CellMove> & moves, bool alone);

    PageMemory & memory() const { return *memory_; }
    size_t records_per_page() const { return layout_.record_bytes; }
    size_t table_bytes() const;  // of the books and the query statistics
    size_t bytes_used() const;
    int pages_packed() const { return n_packed_; }
    int pages_half() const { return n_half_; }
    uint64_t pages_packed_ever() const { return packed_ever_; }
    // Bits per element that the codec counted, over all the pages it took; 0 before the first.
    double codec_bits() const { return packed_ever_ ? coded_bits_ / (double(packed_ever_) * kPageCells * shape_.row) : 0; }

  private:
    struct Place { int stream, page; };

    Page & at(int stream, int p) { return pages_[size_t(stream) * shape_.n_pages() + p]; }
    // Makes the page F16, one that may be written to, and returns its rows. With keep_records they hold nothing of a packed page's, which keeps its
    // records: the caller drops or unpacks them.
    half * stage(int stream, int p, bool keep_records = false);
    half * take_rows();               // of nobody; throws std::bad_alloc
    void give_rows(half * rows);
    void recent(int stream, int p);   // the page is on the list of those in F16 from now on,
    void forget(int stream, int p);   // and no longer
    void mark_moved(int stream, int p);
    void take_record(int stream, int p);
    void drop_rows(int stream, int p);
    void lose_rows(int stream, int p);
    void drop_records(int stream, int p);
    void drop(int stream, int p);
    bool owns(const half * rows) const {
        const uint8_t * at = reinterpret_cast<const uint8_t *>(rows);
        return at >= region_ && at < region_ + region_bytes_;
    }
    void come_home();
    void begin_anew(int stream);      // the statistics, and what is known of sequences
    bool pack(const std::vector<Place> & places, int n_threads);
    void pack_some(const Place * places, int n, int n_threads);
    bool code(Place place);
    void load_whole(int stream, const StreamState & state);
    void take_sequences(int stream, const HistoryState & history, const std::vector<CellMove> & moves);
    void load_page(int stream, int p, const StreamState::Page & from, const CellMask & valid, uint64_t written);
    void load_rows(int stream, int p, const StreamState & state, const int * sources, uint64_t written);
    bool has_record(int stream, int p, const StreamState::Page & from) const;
    void rows_of(const StreamState::Page & from, half * rows) const;
    template <class Cells> void write_cells(Cells && cells, int n, const Rows & rows);
    template <class Format> void lay_out(const std::vector<Format> & formats);

    StoreShape shape_;
    std::unique_ptr<PageMemory> memory_;
    uint8_t * region_;
    size_t region_bytes_;

    bool configured_ = false;
    bool calm_ = false;  // no page has been staged or dropped since the last settle, so that another has nothing to do
    std::vector<Page> pages_;
    std::vector<std::vector<int>> half_pages_;  // by stream: pages in F16
    std::vector<uint64_t> clock_;               // by stream: rows written
    std::vector<int> newest_;                   // by stream: the page written last, -1
    std::vector<History> histories_;            // by stream
    bool keep_statistics_ = false;
    std::vector<uint8_t *> free_home_, free_records_;
    int n_packed_ = 0, n_half_ = 0;
    uint64_t packed_ever_ = 0;
    std::vector<int> moved_;                    // stream * n_pages + page

    PageLayout layout_;
    PageCodec codec_;
    const Kernels * codec_kernels_ = nullptr;
    double coded_bits_ = 0;

    // Kept between calls, so that a token allocates nothing.
    std::vector<Place> ready_, waiting_, overwritten_;
    std::vector<PageJob> jobs_;
    std::vector<half> codec_half_;
    std::vector<float> codec_rows_;
};

}  // namespace mixkvq
