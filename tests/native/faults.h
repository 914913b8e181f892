// A page memory that does one thing wrong, to see that the soak notices. What is around it is the product as it is.
#pragma once

#include <cstring>
#include <unordered_set>
#include <utility>
#include <vector>

#include "mixkvq/page_memory.h"

namespace mixkvq {

enum class Fault {
    none,
    wrong_page_copied,      // the records of another page
    wrong_rows_copied,      // an F16 page is copied but for its last row
    stale_record,           // a page is not packed: its record is that of before
    wrong_scale,            // a bit of a scale is another
    mask_off_by_one,        // a page is packed as if the cell behind each valid one were valid
    row_lost,               // a row that is written over another one does not arrive
    erased_row_stays,       // zero does nothing to single rows
    row_not_unpacked,       // the last row of an unpacked page
    not_a_number_stays,     // what is not finite is stored as it is
    restored_record_wrong,  // a bit of a record that comes from a state
    statistics_stay,        // the query statistics of a stream that begins anew
    statistics_not_recalled,
    statistics_not_copied,
    statistics_not_restored,
    statistics_of_first,    // queries of a stream count for the first one
    count
};

inline const char * name_of(Fault fault) {
    const char * names[] = {"none", "wrong-page-copied", "wrong-rows-copied", "stale-record", "wrong-scale", "mask-off-by-one", "row-lost", "erased-row-stays",
                            "row-not-unpacked", "not-a-number-stays", "restored-record-wrong", "statistics-stay", "statistics-not-recalled", "statistics-not-copied",
                            "statistics-not-restored", "statistics-of-first"};
    static_assert(sizeof(names) / sizeof(names[0]) == size_t(Fault::count), "a name for each");
    return names[int(fault)];
}

class FaultyMemory final : public PageMemory {
  public:
    FaultyMemory(std::unique_ptr<PageMemory> inner, Fault fault, int row) : inner_(std::move(inner)), fault_(fault), row_(row) {}

    void set_layout(const PageLayout & layout) override {
        layout_ = &layout;
        inner_->set_layout(layout);
    }
    half * get() override { return inner_->get(); }
    void put(half * rows) override { inner_->put(rows); }
    void zero(half * rows, int n) override {
        if (fault_ != Fault::erased_row_stays || n == kPageCells) inner_->zero(rows, n);
    }
    void copy(half * to, const half * from) override {
        inner_->copy(to, from);
        if (fault_ == Fault::wrong_rows_copied) inner_->zero(to + size_t(kPageCells - 1) * row_, 1);
    }
    void copy_records(uint8_t * to, const uint8_t * from) override {
        const bool other = fault_ == Fault::wrong_page_copied && last_record_;
        inner_->copy_records(to, other ? last_record_ : from);
    }
    void pack(int stream, const PageJob * jobs, int n, int n_threads) override {
        std::vector<PageJob> list(jobs, jobs + n);
        if (fault_ == Fault::stale_record) list.pop_back();
        for (PageJob & job : list) {
            if (fault_ != Fault::mask_off_by_one) break;
            job.valid.word[1] = job.valid.word[1] << 1 | job.valid.word[0] >> 63;
            job.valid.word[0] <<= 1;
        }
        inner_->pack(stream, list.data(), int(list.size()), n_threads);
        last_record_ = jobs[n - 1].records;
        if (fault_ == Fault::wrong_scale) damage(jobs[0].records);
    }
    void unpack(const PageJob * jobs, int n, int n_threads) override {
        inner_->unpack(jobs, n, n_threads);
        if (fault_ == Fault::row_not_unpacked) inner_->zero(jobs[0].rows + size_t(kPageCells - 1) * row_, 1);
    }
    void write(half * const * to, int n, const Rows & from) override {
        std::vector<half *> list(to, to + n);
        bool lost = false;
        for (half *& at : list) {
            if (at && !written_.insert(at).second && fault_ == Fault::row_lost && !lost) at = nullptr, lost = true;
        }
        inner_->write(list.data(), n, from);
        if (fault_ == Fault::not_a_number_stays && from.is_half && from.on_host) store_raw(to, n, from);
    }
    void read(const PageSpan * spans, int n, half * rows) override { inner_->read(spans, n, rows); }
    void get_records(const uint8_t * from, uint8_t * host) override { inner_->get_records(from, host); }
    void set_records(uint8_t * to, const uint8_t * host) override {
        inner_->set_records(to, host);
        if (fault_ == Fault::restored_record_wrong) damage(to);
    }
    void unpack_from(const uint8_t * host, half * host_rows) override { inner_->unpack_from(host, host_rows); }
    void observe(const Queries & queries, int n_threads) override {
        Queries other = queries;
        if (fault_ == Fault::statistics_of_first) other.first_stream = 0;
        inner_->observe(other, n_threads);
    }
    bool query_statistics(int stream, float * mean_abs, float * mean_sqr) override { return inner_->query_statistics(stream, mean_abs, mean_sqr); }
    void forget_queries(int stream) override {
        if (fault_ != Fault::statistics_stay) inner_->forget_queries(stream);
    }
    void mark_queries(int stream, int mark) override { inner_->mark_queries(stream, mark); }
    void recall_queries(int stream, int mark) override {
        if (fault_ != Fault::statistics_not_recalled) inner_->recall_queries(stream, mark);
    }
    void copy_queries(int to, PageMemory & other, int from) override {
        if (fault_ != Fault::statistics_not_copied) inner_->copy_queries(to, *static_cast<FaultyMemory &>(other).inner_, from);
    }
    QueryState query_state(int stream, const std::vector<int> & marks) override { return inner_->query_state(stream, marks); }
    void restore_queries(int stream, const QueryState & state) override {
        if (fault_ != Fault::statistics_not_restored) inner_->restore_queries(stream, state);
    }
    size_t query_bytes() const override { return inner_->query_bytes(); }

  private:
    // A bit of a scale of the first head, or, where it has none, of its first number.
    void damage(uint8_t * records) {
        Region copy(layout_->record_bytes);
        inner_->get_records(records, copy.data());
        if (layout_->is_value()) {
            const ValueFormat & f = layout_->values[0];
            copy.data()[f.offset_scale() + (f.rotated() ? 64 : 2 * 64 * f.n_groups() + 1)] ^= f.rotated() ? 8 : 4;
        } else {
            copy.data()[layout_->keys[0].n_coded() ? layout_->keys[0].offset_scale() + 1 : 1] ^= 4;
        }
        inner_->set_records(records, copy.data());
    }
    // One number that is not finite, where the host reaches the pages.
    void store_raw(half * const * to, int n, const Rows & from) {
        for (int i = 0; i < n; ++i) {
            const auto * row = reinterpret_cast<const half *>(static_cast<const uint8_t *>(from.data) + i * from.stride);
            for (int d = 0; d < row_ && to[i]; ++d) {
                if ((row[d] & 0x7fff) > 0x7c00) to[i][d] = row[d];
            }
        }
    }

    std::unique_ptr<PageMemory> inner_;
    Fault fault_;
    int row_;
    const PageLayout * layout_ = nullptr;
    const uint8_t * last_record_ = nullptr;
    std::unordered_set<const half *> written_;
};

}  // namespace mixkvq
