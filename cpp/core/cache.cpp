#include "mixkvq/cache.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "parallel.h"

namespace mixkvq {

// Queries beyond this many fade: I_d follows the last few thousand queries, as the paper's I_d follows the current ones.
constexpr double kQueryMemory = 4096;

int StoreShape::sink_pages() const { return std::min((sinks + kPageCells - 1) / kPageCells, n_pages()); }

int StoreShape::home_pages() const {
    const int recent = (window + kPageCells - 1) / kPageCells + 1;
    return std::min(sink_pages() + recent, n_pages());
}

int StoreShape::record_pages() const { return std::max(0, n_pages() - sink_pages() - 1); }

size_t reserve_bytes(const StoreShape & s, size_t records_per_page) {
    return size_t(s.n_streams) * (s.home_pages() * s.page_bytes() + s.record_pages() * records_per_page);
}

PageStore::PageStore(const StoreShape & shape, const Kernels & kernels, uint8_t * memory, size_t memory_bytes, ScratchPool & pool)
    : shape_(shape), k_(kernels), memory_(memory), memory_bytes_(memory_bytes), pool_(pool) {
    pages_.resize(size_t(shape.n_streams) * shape.n_pages());
    half_pages_.resize(shape.n_streams);
    clock_.resize(shape.n_streams, 0);
    newest_.resize(shape.n_streams, -1);
    for (int i = shape.home_pages() * shape.n_streams; i-- > 0;) free_home_.push_back(memory + i * shape.page_bytes());
}

PageStore::~PageStore() { clear(); }

// The heads of a cell and their records, which lie behind the F16 pages. Free lists are in falling order: low addresses are taken first.
template <class Format> void PageStore::lay_out(const std::vector<Format> & formats) {
    n_heads_ = int(formats.size());
    head_size_ = formats[0].head_size;
    for (const Format & f : formats) {
        record_offset_.push_back(records_bytes_);
        records_bytes_ += f.record_bytes();
    }
    const size_t home_bytes = size_t(shape_.home_pages()) * shape_.n_streams * shape_.page_bytes();
    const size_t n = std::min((memory_bytes_ - home_bytes) / records_bytes_, size_t(shape_.record_pages()) * shape_.n_streams);
    for (size_t i = n; i-- > 0 && !codec_;) free_records_.push_back(memory_ + home_bytes + i * records_bytes_);
    if (codec_) records_bytes_ = 0;
    configured_ = true;
}

void PageStore::set_formats(std::vector<KeyFormat> formats, std::vector<float> query_prior) {
    keys_ = std::move(formats);
    lay_out(keys_);
    q_prior_ = std::move(query_prior);
    q_sum_.assign(size_t(n_heads_) * head_size_, 0.0f);
    q_sqr_ = q_sum_;
}

void PageStore::set_formats(std::vector<ValueFormat> formats) {
    values_ = std::move(formats);
    lay_out(values_);
}

half * PageStore::stage(int stream, int p) {
    Page & page = at(stream, p);
    if (page.rows) {
        if (page.coded) {
            page.coded = 0;
            --n_packed_;
            recent(stream, p);
        }
        return page.rows;
    }
    if (free_home_.empty()) {
        page.rows = static_cast<half *>(pool_.get(shape_.page_bytes()));
    } else {
        page.rows = reinterpret_cast<half *>(free_home_.back());
        free_home_.pop_back();
        std::memset(page.rows, 0, shape_.page_bytes());
    }
    if (page.records) {
        unpack(page, page.rows);
        drop_records(page);
    }
    recent(stream, p);
    return page.rows;
}

void PageStore::recent(int stream, int p) {
    half_pages_[stream].push_back(p);
    ++n_half_;
}

void PageStore::drop_rows(Page & page, int stream, int p) {
    if (owns(page.rows)) {
        free_home_.push_back(reinterpret_cast<uint8_t *>(page.rows));
    } else {
        pool_.put(page.rows, shape_.page_bytes());
    }
    page.rows = nullptr;
    if (page.coded) {
        page.coded = 0;
        --n_packed_;
    } else {
        forget(stream, p);
    }
}

void PageStore::forget(int stream, int p) {
    auto & list = half_pages_[stream];
    list.erase(std::find(list.begin(), list.end(), p));
    --n_half_;
}

void PageStore::drop_records(Page & page) {
    free_records_.push_back(page.records);
    page.records = nullptr;
    --n_packed_;
}

void PageStore::unpack(const Page & page, half * rows) const {
    for (int h = 0; h < n_heads_; ++h) {
        if (shape_.is_value) {
            k_.unpack_values(values_[h], record(page, h), rows + h * head_size_, shape_.row);
        } else {
            k_.unpack_keys(keys_[h], record(page, h), rows + h * head_size_, shape_.row);
        }
    }
}

// The page in F32 to the codec and its answer back in place.
bool PageStore::code(Place place) {
    Page & page = at(place.stream, place.page);
    const size_t n = size_t(kPageCells) * shape_.row, n_queries = q_sum_.size();
    codec_rows_.resize(2 * n + 2 * n_queries);
    float * rows = codec_rows_.data();
    float * result = rows + n;
    float * q_abs = shape_.is_value ? nullptr : result + n;
    float * q_sqr = shape_.is_value ? nullptr : q_abs + n_queries;
    auto each_cell = [&](auto && f) {  // its place in a head of the page, and in the store's rows
        for (int h = 0; h < n_heads_; ++h) {
            for (int t = 0; t < kPageCells; ++t) f(t, (size_t(h) * kPageCells + t) * head_size_, page.rows + size_t(t) * shape_.row + h * head_size_);
        }
    };
    std::fill(rows, result + n, 0.0f);
    each_cell([&](int t, size_t at, const half * row) {
        if (page.valid.test(t)) k_.from_half(row, rows + at, head_size_);
    });
    if (!shape_.is_value) query_statistics(q_abs, q_sqr);
    double bits = 0;
    if (!codec_({place.stream, place.page * kPageCells, page.valid, rows, q_abs, q_sqr}, result, bits)) return false;
    each_cell([&](int t, size_t at, half * row) {
        if (page.valid.test(t)) k_.to_half(result + at, row, head_size_);
    });
    forget(place.stream, place.page);
    page.coded = 1;
    ++n_packed_;
    ++packed_ever_;
    coded_bits_ += bits;
    return true;
}

bool PageStore::pack(const std::vector<Place> & places, int n_threads) {
    if (codec_) return std::all_of(places.begin(), places.end(), [&](Place place) { return code(place); });
    if (!shape_.is_value) read_importance(importance_);
    for (const Place & place : places) {
        Page & page = at(place.stream, place.page);
        page.records = free_records_.back();
        free_records_.pop_back();
    }
    parallel_for(n_threads, int(places.size()) * n_heads_, [&](int i, int) {
        const Place & place = places[i / n_heads_];
        const int h = i % n_heads_;
        const Page & page = at(place.stream, place.page);
        uint8_t * record = page.records + record_offset_[h];
        const half * rows = page.rows + h * head_size_;
        if (shape_.is_value) {
            k_.pack_values(values_[h], rows, shape_.row, page.valid, record);
        } else {
            k_.pack_keys(keys_[h], rows, shape_.row, page.valid, importance_.data() + h * head_size_, record);
        }
    });
    for (const Place & place : places) drop_rows(at(place.stream, place.page), place.stream, place.page);
    n_packed_ += int(places.size());
    packed_ever_ += places.size();
    return true;
}

bool PageStore::settle(int n_threads) {
    if (!configured_) return true;
    ready_.clear();
    for (int s = 0; s < shape_.n_streams; ++s) {
        int staying = 0;
        waiting_.clear();
        for (int p : half_pages_[s]) {
            const Page & page = at(s, p);
            const bool may = p >= shape_.sink_pages() && p != newest_[s];
            if (may && page.valid.full() && clock_[s] - page.written >= uint64_t(shape_.window)) {
                ready_.push_back({s, p});
            } else {
                ++staying;
                if (may) waiting_.push_back({s, p});
            }
        }
        // Holes that nobody fills would keep pages in F16 for ever: no stream holds more than it owns.
        const int over = staying - shape_.home_pages();
        if (over > 0) {
            std::sort(waiting_.begin(), waiting_.end(), [&](Place a, Place b) { return at(s, a.page).written < at(s, b.page).written; });
            waiting_.resize(std::min<size_t>(waiting_.size(), over));
            ready_.insert(ready_.end(), waiting_.begin(), waiting_.end());
        }
        if (!codec_ && ready_.size() > free_records_.size()) ready_.resize(free_records_.size());
    }
    if (codec_) {
        std::sort(ready_.begin(), ready_.end(), [](Place a, Place b) { return a.stream != b.stream ? a.stream < b.stream : a.page < b.page; });
    }
    const bool taken = ready_.empty() || pack(ready_, n_threads);
    come_home();
    return taken;
}

// Moves F16 pages from the shared scratch to the store's own memory, as far as packing has made room there: the scratch is for one layer at a time.
void PageStore::come_home() {
    for (int s = 0; s < shape_.n_streams; ++s) {
        for (int p : half_pages_[s]) {
            if (free_home_.empty()) return;
            Page & page = at(s, p);
            if (owns(page.rows)) continue;
            half * home = reinterpret_cast<half *>(free_home_.back());
            free_home_.pop_back();
            std::memcpy(home, page.rows, shape_.page_bytes());
            pool_.put(page.rows, shape_.page_bytes());
            page.rows = home;
        }
    }
}

template <class Row> void PageStore::write_rows(int stream, int cell, int n, const Row * rows, size_t stride) {
    for (int i = 0; i < n; ++i, ++cell, rows += stride) {
        const int p = cell / kPageCells, t = cell % kPageCells;
        half * to = stage(stream, p) + size_t(t) * shape_.row;
        if constexpr (std::is_same_v<Row, float>) {
            k_.to_half(rows, to, shape_.row);
        } else {
            for (int d = 0; d < shape_.row; ++d) {
                const half x = rows[d];
                const half magnitude = x & 0x7fff;
                to[d] = magnitude < 0x7c00 ? x : magnitude > 0x7c00 ? half(0) : half((x & 0x8000) | 0x7bff);
            }
        }
        Page & page = at(stream, p);
        page.valid.set(t);
        page.written = ++clock_[stream];
        newest_[stream] = p;
    }
}

void PageStore::write(int stream, int cell, int n, const float * rows, size_t stride) { write_rows(stream, cell, n, rows, stride); }
void PageStore::write(int stream, int cell, int n, const half * rows, size_t stride) { write_rows(stream, cell, n, rows, stride); }

void PageStore::erase(int stream, int cell, int n) {
    while (n > 0) {
        const int p = cell / kPageCells, t = cell % kPageCells, m = std::min(n, kPageCells - t);
        Page & page = at(stream, p);
        if (!page.empty()) {
            CellMask left = page.valid;
            for (int i = t; i < t + m; ++i) left.word[i >> 6] &= ~(uint64_t(1) << (i & 63));
            if (left.empty()) {
                if (page.rows) drop_rows(page, stream, p);
                if (page.records) drop_records(page);
            } else {
                std::memset(stage(stream, p) + size_t(t) * shape_.row, 0, size_t(2) * m * shape_.row);
            }
            page.valid = left;
        }
        cell += m;
        n -= m;
    }
}

void PageStore::read(int stream, int cell, int n, half * rows) const {
    std::vector<half> unpacked;
    while (n > 0) {
        const int p = cell / kPageCells, t = cell % kPageCells, m = std::min(n, kPageCells - t);
        const Page & page = this->page(stream, p);
        const size_t bytes = size_t(2) * m * shape_.row;
        if (page.rows) {
            std::memcpy(rows, page.rows + size_t(t) * shape_.row, bytes);
        } else if (page.records && m == kPageCells) {
            unpack(page, rows);
        } else if (page.records) {
            unpacked.resize(size_t(kPageCells) * shape_.row);
            unpack(page, unpacked.data());
            std::memcpy(rows, unpacked.data() + size_t(t) * shape_.row, bytes);
        } else {
            std::memset(rows, 0, bytes);
        }
        cell += m;
        n -= m;
        rows += size_t(m) * shape_.row;
    }
}

void PageStore::observe(int head, const float * q, size_t stride, int n) {
    float * sum = q_sum_.data() + size_t(head) * head_size_;
    float * sqr = q_sqr_.data() + size_t(head) * head_size_;
    for (int i = 0; i < n; ++i, q += stride) {
        for (int d = 0; d < head_size_; ++d) {
            sum[d] += std::fabs(q[d]);
            sqr[d] += q[d] * q[d];
        }
    }
    if (head == 0) q_pending_ += n;
}

void PageStore::end_observation() {
    q_count_ += q_pending_;
    q_pending_ = 0;
    while (q_count_ > 2 * kQueryMemory) {
        q_count_ *= 0.5;
        for (float & x : q_sum_) x *= 0.5f;
        for (float & x : q_sqr_) x *= 0.5f;
    }
}

bool PageStore::query_statistics(float * mean_abs, float * mean_sqr) const {
    const bool any = q_count_ > 0;
    for (size_t i = 0; i < q_sum_.size(); ++i) {
        mean_abs[i] = any ? float(q_sum_[i] / q_count_) : 1.0f;
        mean_sqr[i] = any ? float(q_sqr_[i] / q_count_) : 1.0f;
    }
    return any;
}

void PageStore::read_importance(std::vector<float> & mean) const {
    if (q_count_ > 0) {
        mean = q_sum_;
        for (float & x : mean) x = float(x / q_count_);
    } else if (q_prior_.empty()) {
        mean.assign(q_sum_.size(), 1.0f);
    } else {
        mean = q_prior_;
    }
}

bool PageStore::same_layout(const PageStore & other) const {
    return shape_.is_value == other.shape_.is_value && shape_.row == other.shape_.row && shape_.n_cells == other.shape_.n_cells &&
           configured_ == other.configured_ && record_offset_ == other.record_offset_ && records_bytes_ == other.records_bytes_;
}

void PageStore::copy_stream(const PageStore & other, int from, int to) {
    if (&other == this && from == to) return;
    for (int p = 0; p < shape_.n_pages(); ++p) {
        Page & page = at(to, p);
        if (page.rows) drop_rows(page, to, p);
        if (page.records) drop_records(page);
        page = Page();
        const Page & source = other.page(from, p);
        if (source.records && !free_records_.empty()) {
            page.records = free_records_.back();
            free_records_.pop_back();
            std::memcpy(page.records, source.records, records_bytes_);
            ++n_packed_;
        } else if (!source.empty()) {
            half * rows = stage(to, p);
            if (source.records) {
                other.unpack(source, rows);
            } else {
                std::memcpy(rows, source.rows, shape_.page_bytes());
            }
            if (source.coded) {
                forget(to, p);
                page.coded = 1;
                ++n_packed_;
            }
        }
        page.valid = source.valid;
        page.written = source.written;
    }
    clock_[to] = other.clock_[from];
    newest_[to] = other.newest_[from];
}

void PageStore::clear() {
    for (int s = 0; s < shape_.n_streams; ++s) {
        for (int p = 0; p < shape_.n_pages(); ++p) {
            Page & page = at(s, p);
            if (page.rows) drop_rows(page, s, p);
            if (page.records) drop_records(page);
            page = Page();
        }
        clock_[s] = 0;
        newest_[s] = -1;
    }
    // Low addresses first again, so that what is resident stays together.
    std::sort(free_home_.rbegin(), free_home_.rend());
    std::sort(free_records_.rbegin(), free_records_.rend());
}

size_t PageStore::bytes_used() const { return n_half_ * shape_.page_bytes() + n_packed_ * (codec_ ? shape_.page_bytes() : records_bytes_); }

}  // namespace mixkvq
