// The cache of one tensor (the keys or the values of one layer): pages that are packed, or F16 while they are recent.
// Knows nothing of ggml. One thread at a time may change a store; kernels inside run on several.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "mixkvq/kernels.h"
#include "mixkvq/memory.h"

namespace mixkvq {

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

// Bytes that a store needs for its F16 pages and the records of all its pages.
size_t reserve_bytes(const StoreShape & shape, size_t records_per_page);

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
    struct Page {
        half *    rows = nullptr;    // F16, [128][row]; nullptr when packed or empty
        uint8_t * records = nullptr; // head records; nullptr unless packed
        CellMask  valid;
        uint64_t  written : 63;      // stream clock after the last write
        uint64_t  coded : 1;         // a codec has rewritten the rows: the page counts as packed
        Page() : written(0), coded(0) {}
        bool empty() const { return !rows && !records; }
        bool settled() const { return records || coded; }
    };

    // `memory` (zeroed, 64-byte aligned) holds what reserve_bytes says; it and the pool outlive the store.
    PageStore(const StoreShape & shape, const Kernels & kernels, uint8_t * memory, size_t memory_bytes, ScratchPool & pool);
    ~PageStore();

    // Pages go to the codec instead of being packed. Comes before set_formats, which then say the geometry only.
    void set_codec(PageCodec codec) { codec_ = std::move(codec); }
    bool has_codec() const { return bool(codec_); }

    // Until one of these is called every page stays F16. A format per head.
    void set_formats(std::vector<KeyFormat> formats, std::vector<float> query_prior);
    void set_formats(std::vector<ValueFormat> formats);
    bool configured() const { return configured_; }

    const StoreShape & shape() const { return shape_; }
    int n_heads() const { return n_heads_; }
    int head_size() const { return head_size_; }
    const KeyFormat & key_format(int head) const { return keys_[head]; }
    const ValueFormat & value_format(int head) const { return values_[head]; }
    const Page & page(int stream, int p) const { return pages_[size_t(stream) * shape_.n_pages() + p]; }
    const uint8_t * record(const Page & page, int head) const { return page.records + record_offset_[head]; }

    // Writes `n` rows of `row` numbers to consecutive cells. NaN becomes 0, infinity +-65504.
    void write(int stream, int cell, int n, const float * rows, size_t stride);
    void write(int stream, int cell, int n, const half * rows, size_t stride);
    // Cells read as zero afterwards and hold no token.
    void erase(int stream, int cell, int n);
    void read(int stream, int cell, int n, half * rows) const;
    // Rewrites a page in place: `edit` gets its F16 rows. A packed page is packed again at once (one that the codec refuses: by the next settle).
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

    // Adds queries to the statistics of a head: `n` vectors of head_size.
    void observe(int head, const float * q, size_t stride, int n);
    void end_observation();  // once per batch: lets old queries fade
    // Mean |q_d| per channel, [head][channel]; ones before any query without a prior.
    std::vector<float> importance() const {
        std::vector<float> mean;
        read_importance(mean);
        return mean;
    }
    // Mean |q_d| and mean q_d^2, [head][channel]; ones and false before any query.
    bool query_statistics(float * mean_abs, float * mean_sqr) const;

    bool same_layout(const PageStore & other) const;
    // Makes a stream equal to one of a store with the same layout (this one included); packed pages are copied as they are.
    void copy_stream(const PageStore & other, int from, int to);
    void clear();  // keeps the query statistics: they belong to the model

    size_t records_per_page() const { return records_bytes_; }
    size_t bytes_used() const;
    int pages_packed() const { return n_packed_; }
    int pages_half() const { return n_half_; }
    uint64_t pages_packed_ever() const { return packed_ever_; }
    // Bits per element that the codec counted, over all the pages it took; 0 before the first.
    double codec_bits() const { return packed_ever_ ? coded_bits_ / (double(packed_ever_) * kPageCells * shape_.row) : 0; }

  private:
    struct Place { int stream, page; };

    Page & at(int stream, int p) { return pages_[size_t(stream) * shape_.n_pages() + p]; }
    half * stage(int stream, int p);  // makes the page F16, one that may be written to, and returns its rows
    void recent(int stream, int p);   // the page is on the list of those in F16 from now on,
    void forget(int stream, int p);   // and no longer
    void drop_rows(Page & page, int stream, int p);
    void drop_records(Page & page);
    bool owns(const half * rows) const {
        const uint8_t * at = reinterpret_cast<const uint8_t *>(rows);
        return at >= memory_ && at < memory_ + memory_bytes_;
    }
    void come_home();
    void read_importance(std::vector<float> & mean) const;
    bool pack(const std::vector<Place> & places, int n_threads);
    bool code(Place place);
    void unpack(const Page & page, half * rows) const;
    template <class Row> void write_rows(int stream, int cell, int n, const Row * rows, size_t stride);
    template <class Format> void lay_out(const std::vector<Format> & formats);

    StoreShape shape_;
    const Kernels & k_;
    uint8_t * memory_;
    size_t memory_bytes_;
    ScratchPool & pool_;

    bool configured_ = false;
    int n_heads_ = 1, head_size_ = 0;
    std::vector<KeyFormat> keys_;
    std::vector<ValueFormat> values_;
    std::vector<size_t> record_offset_;
    size_t records_bytes_ = 0;

    std::vector<Page> pages_;
    std::vector<std::vector<int>> half_pages_;  // by stream: pages in F16
    std::vector<uint64_t> clock_;               // by stream: rows written
    std::vector<int> newest_;                   // by stream: the page written last, -1
    std::vector<uint8_t *> free_home_, free_records_;
    int n_packed_ = 0, n_half_ = 0;
    uint64_t packed_ever_ = 0;
    PageCodec codec_;
    double coded_bits_ = 0;

    std::vector<float> q_sum_, q_sqr_, q_prior_;

    // Kept between calls, so that a token allocates nothing.
    std::vector<Place> ready_, waiting_;
    std::vector<float> importance_;
    std::vector<float> codec_rows_;
    double q_count_ = 0, q_pending_ = 0;
};

}  // namespace mixkvq
