#include "mixkvq/cache.h"

#include <algorithm>

namespace mixkvq {

int StoreShape::sink_pages() const { return std::min((sinks + kPageCells - 1) / kPageCells, n_pages()); }

int StoreShape::home_pages() const {
    const int recent = (window + kPageCells - 1) / kPageCells + 1;
    return std::min(sink_pages() + recent, n_pages());
}

int StoreShape::record_pages() const { return std::max(0, n_pages() - sink_pages() - 1); }

size_t reserve_bytes(const StoreShape & s, size_t records_per_page) {
    return size_t(s.n_streams) * (s.home_pages() * s.page_bytes() + s.record_pages() * records_per_page);
}

size_t filled_bytes(const StoreShape & s, size_t records_per_page) {
    const int staying = std::max(1, (s.window + kPageCells - 1) / kPageCells);
    const int packed = std::max(0, s.n_pages() - s.sink_pages() - staying);
    return size_t(s.n_streams) * (s.home_pages() * s.page_bytes() + packed * records_per_page);
}

PageStore::PageStore(const StoreShape & shape, std::unique_ptr<PageMemory> memory, uint8_t * region, size_t region_bytes)
    : shape_(shape), memory_(std::move(memory)), region_(region), region_bytes_(region_bytes) {
    pages_.resize(size_t(shape.n_streams) * shape.n_pages());
    half_pages_.resize(shape.n_streams);
    clock_.resize(shape.n_streams, 0);
    newest_.resize(shape.n_streams, -1);
    histories_.reserve(shape.n_streams);
    for (int s = 0; s < shape.n_streams; ++s) histories_.emplace_back(shape.n_cells, shape.window, shape.sinks > 0);
    // What only moves a page from one list to another throws nothing.
    for (auto & list : half_pages_) list.reserve(shape.n_pages());
    moved_.reserve(pages_.size());
    free_home_.reserve(size_t(shape.home_pages()) * shape.n_streams);
    for (int i = shape.home_pages() * shape.n_streams; i-- > 0;) free_home_.push_back(region + i * shape.page_bytes());
}

PageStore::PageStore(const StoreShape & shape, const Kernels & kernels, uint8_t * region, size_t region_bytes, ScratchPool & pool)
    : PageStore(shape, std::make_unique<HostMemory>(kernels, pool, shape.row), region, region_bytes) {}

PageStore::~PageStore() { clear(); }

// The heads of a cell and their records, which lie behind the F16 pages. Free lists are in falling order: low addresses are taken first.
template <class Format> void PageStore::lay_out(const std::vector<Format> & formats) {
    layout_.n_heads = int(formats.size());
    layout_.n_streams = shape_.n_streams;
    layout_.n_marks = History::n_marks(shape_.n_cells);
    layout_.head_size = formats[0].head_size;
    layout_.record_offset.clear();  // an earlier call may have thrown
    free_records_.clear();
    size_t bytes = 0;
    for (const Format & f : formats) {
        layout_.record_offset.push_back(bytes);
        bytes += f.record_bytes();
    }
    const size_t home_bytes = size_t(shape_.home_pages()) * shape_.n_streams * shape_.page_bytes();
    const size_t n = std::min((region_bytes_ - home_bytes) / bytes, size_t(shape_.record_pages()) * shape_.n_streams);
    free_records_.reserve(codec_ ? 0 : n);
    for (size_t i = n; i-- > 0 && !codec_;) free_records_.push_back(region_ + home_bytes + i * bytes);
    layout_.record_bytes = codec_ ? 0 : bytes;
    memory_->set_layout(layout_);
    configured_ = true;
}

void PageStore::set_formats(std::vector<KeyFormat> formats, std::vector<float> query_prior) {
    layout_.keys = std::move(formats);
    layout_.query_prior = std::move(query_prior);
    lay_out(layout_.keys);
}

void PageStore::set_formats(std::vector<ValueFormat> formats) {
    layout_.values = std::move(formats);
    lay_out(layout_.values);
}

half * PageStore::stage(int stream, int p, bool keep_records) {
    Page & page = at(stream, p);
    calm_ = false;
    if (page.rows) {
        if (page.coded) {
            page.coded = 0;
            --n_packed_;
            recent(stream, p);
        }
        return page.rows;
    }
    half * rows = take_rows();
    try {
        if (page.records && !keep_records) {
            const PageJob job = {rows, page.records, {}};
            memory_->unpack(&job, 1, 1);
        } else {
            memory_->zero(rows, kPageCells);
        }
    } catch (...) {
        give_rows(rows);
        throw;
    }
    page.rows = rows;
    mark_moved(stream, p);
    recent(stream, p);
    if (page.records && !keep_records) drop_records(stream, p);
    return rows;
}

half * PageStore::take_rows() {
    if (free_home_.empty()) return memory_->get();
    auto * rows = reinterpret_cast<half *>(free_home_.back());
    free_home_.pop_back();
    return rows;
}

void PageStore::give_rows(half * rows) {
    if (owns(rows)) {
        free_home_.push_back(reinterpret_cast<uint8_t *>(rows));
    } else {
        memory_->put(rows);
    }
}

void PageStore::mark_moved(int stream, int p) {
    Page & page = at(stream, p);
    if (!page.moved) moved_.push_back(stream * shape_.n_pages() + p);
    page.moved = 1;
}

void PageStore::recent(int stream, int p) {
    half_pages_[stream].push_back(p);
    ++n_half_;
}

void PageStore::drop_rows(int stream, int p) {
    give_rows(at(stream, p).rows);
    lose_rows(stream, p);
}

// Somebody else has them.
void PageStore::lose_rows(int stream, int p) {
    Page & page = at(stream, p);
    calm_ = false;
    page.rows = nullptr;
    mark_moved(stream, p);
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

void PageStore::take_record(int stream, int p) {
    at(stream, p).records = free_records_.back();
    free_records_.pop_back();
    ++n_packed_;
    mark_moved(stream, p);
}

void PageStore::drop_records(int stream, int p) {
    Page & page = at(stream, p);
    calm_ = false;
    free_records_.push_back(page.records);
    page.records = nullptr;
    --n_packed_;
    mark_moved(stream, p);
}

// The page is empty afterwards.
void PageStore::drop(int stream, int p) {
    Page & page = at(stream, p);
    if (page.rows) drop_rows(stream, p);
    if (page.records) drop_records(stream, p);
    page.valid = CellMask();
}

// The page in F32 to the codec and its answer back in place.
bool PageStore::code(Place place) {
    Page & page = at(place.stream, place.page);
    const int n_heads = layout_.n_heads, d = layout_.head_size;
    const size_t n = size_t(kPageCells) * shape_.row, n_queries = shape_.is_value ? 0 : shape_.row;
    codec_half_.resize(n);
    codec_rows_.resize(2 * n + 2 * n_queries);
    float * rows = codec_rows_.data();
    float * result = rows + n;
    float * q_abs = shape_.is_value ? nullptr : result + n;
    float * q_sqr = shape_.is_value ? nullptr : q_abs + n_queries;
    auto each_valid = [&](auto && f) {  // its place in a head of the page, and in the store's rows
        for (int h = 0; h < n_heads; ++h) {
            for (int t = 0; t < kPageCells; ++t) {
                if (page.valid.test(t)) f((size_t(h) * kPageCells + t) * d, codec_half_.data() + size_t(t) * shape_.row + h * d);
            }
        }
    };
    const PageSpan span = {page.rows, nullptr, 0, kPageCells};
    memory_->read(&span, 1, codec_half_.data());
    std::fill(rows, result + n, 0.0f);
    each_valid([&](size_t at, const half * row) { codec_kernels_->from_half(row, rows + at, d); });
    if (!shape_.is_value) query_statistics(q_abs, q_sqr, place.stream);
    double bits = 0;
    if (!codec_({place.stream, place.page * kPageCells, page.valid, rows, q_abs, q_sqr}, result, bits)) return false;
    each_valid([&](size_t at, half * row) { codec_kernels_->to_half(result + at, row, d); });
    half * to[kPageCells];
    for (int t = 0; t < kPageCells; ++t) to[t] = page.valid.test(t) ? page.rows + size_t(t) * shape_.row : nullptr;
    memory_->write(to, kPageCells, {codec_half_.data(), size_t(2) * shape_.row, true});
    forget(place.stream, place.page);
    page.coded = 1;
    ++n_packed_;
    ++packed_ever_;
    coded_bits_ += bits;
    return true;
}

bool PageStore::pack(const std::vector<Place> & places, int n_threads) {
    if (codec_) return std::all_of(places.begin(), places.end(), [&](Place place) { return code(place); });
    for (size_t i = 0, n; i < places.size(); i += n) {
        const auto is_other = [&](const Place & place) { return place.stream != places[i].stream; };
        n = std::find_if(places.begin() + i, places.end(), is_other) - (places.begin() + i);
        pack_some(&places[i], int(n), n_threads);
    }
    return true;
}

// Pages of a stream. They have their records when these are written.
void PageStore::pack_some(const Place * places, int n, int n_threads) {
    jobs_.clear();
    for (int i = 0; i < n; ++i) {
        const Page & page = at(places[i].stream, places[i].page);
        jobs_.push_back({page.rows, free_records_[free_records_.size() - 1 - i], page.valid});
    }
    memory_->pack(places[0].stream, jobs_.data(), n, n_threads);
    for (int i = 0; i < n; ++i) {
        take_record(places[i].stream, places[i].page);
        drop_rows(places[i].stream, places[i].page);
    }
    packed_ever_ += n;
}

bool PageStore::settle(int n_threads) {
    if (!configured_ || calm_) return true;
    ready_.clear();
    for (int s = 0; s < shape_.n_streams; ++s) {
        const History & history = histories_[s];
        const int n_sequences = std::max(1, history.n_sequences());
        const auto rank = [&](int p) { return n_sequences > 1 ? history.rank(p) : History::kNotHeld; };
        int staying = 0;
        waiting_.clear();
        for (int p : half_pages_[s]) {
            const Page & page = at(s, p);
            const bool may = p >= shape_.sink_pages() && p != newest_[s];
            if (may && page.valid.full() && clock_[s] - page.written >= uint64_t(shape_.window) && rank(p) == History::kNotHeld) {
                ready_.push_back({s, p});
            } else {
                ++staying;
                if (may) waiting_.push_back({s, p});
            }
        }
        // Holes that nobody fills would keep pages in F16 for ever: no stream holds more than it owns, times the sequences in it. A sequence with a few rows
        // in each of many pages does not take the room of the others: what is left of each are its latest pages.
        const int over = staying - n_sequences * shape_.home_pages();
        if (over > 0) {
            const auto key = [&](Place x) { return std::make_pair(-rank(x.page), uint64_t(at(s, x.page).written)); };
            std::sort(waiting_.begin(), waiting_.end(), [&](Place a, Place b) { return key(a) < key(b); });
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
    return calm_ = taken;
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
            memory_->copy(home, page.rows);
            memory_->put(page.rows);
            page.rows = home;
            mark_moved(s, p);
        }
    }
}

// `cells(i)` is the place of row i. Every page is staged before the first mark is set: staging may throw.
template <class Cells> void PageStore::write_cells(Cells && cells, int n, const Rows & rows) {
    constexpr int kFew = 64;  // a token of every sequence: allocates nothing
    half * few[kFew];
    std::vector<half *> many(n > kFew ? n : 0);
    half ** to = n > kFew ? many.data() : few;
    // A page that is written from its first cell to its last one need not be unpacked, unless staging another one throws.
    const auto is_whole = [&](int first, Cell c) {
        if (c.cell % kPageCells != 0 || n - first < kPageCells) return false;
        for (int i = 1; i < kPageCells; ++i) {
            const Cell next = cells(first + i);
            if (next.stream != c.stream || next.cell != c.cell + i) return false;
        }
        return true;
    };
    overwritten_.clear();
    overwritten_.reserve(n / kPageCells);
    int n_runs = 0;
    const auto is_over = [&](Cell c) { return page(c.stream, c.cell / kPageCells).valid.test(c.cell % kPageCells); };
    for (int i = 0; i < n; ++i) {
        const Cell c = cells(i), before = i > 0 ? cells(i - 1) : Cell{-1, 0};
        n_runs += c.stream != before.stream || c.cell != before.cell + 1 || is_over(c) != is_over(before);
    }
    for (History & history : histories_) history.reserve(n_runs);
    try {
        for (int i = 0; i < n; ++i) {
            const Cell c = cells(i);
            const int p = c.cell / kPageCells;
            const bool whole = at(c.stream, p).records && !at(c.stream, p).rows && is_whole(i, c);
            to[i] = stage(c.stream, p, whole) + size_t(c.cell % kPageCells) * shape_.row;
            if (whole) overwritten_.push_back({c.stream, p});
        }
        memory_->write(to, n, rows);
    } catch (...) {
        for (const Place & place : overwritten_) drop_rows(place.stream, place.page);
        throw;
    }
    for (const Place & place : overwritten_) drop_records(place.stream, place.page);
    for (int i = 0; i < n; ++i) {
        const Cell c = cells(i);
        const int p = c.cell / kPageCells;
        Page & page = at(c.stream, p);
        histories_[c.stream].wrote(c.cell, page.valid.test(c.cell % kPageCells));
        page.valid.set(c.cell % kPageCells);
        page.written = ++clock_[c.stream];
        newest_[c.stream] = p;
    }
}

void PageStore::write(const Cell * cells, int n, const Rows & rows) {
    write_cells([&](int i) { return cells[i]; }, n, rows);
}
void PageStore::write(int stream, int cell, int n, const float * rows, size_t stride) {
    write_cells([&](int i) { return Cell{stream, cell + i}; }, n, {rows, stride * sizeof(float), false});
}
void PageStore::write(int stream, int cell, int n, const half * rows, size_t stride) {
    write_cells([&](int i) { return Cell{stream, cell + i}; }, n, {rows, stride * sizeof(half), true});
}

// Every page that keeps some cells is staged before the first one changes: staging may throw.
void PageStore::erase(int stream, int cell, int n) {
    const auto each_page = [&](auto && f) {
        for (int at = cell, m; at < cell + n; at += m) {
            const int p = at / kPageCells, t = at % kPageCells;
            m = std::min(cell + n - at, kPageCells - t);
            if (this->page(stream, p).empty()) continue;
            CellMask rest = this->page(stream, p).valid;
            for (int i = t; i < t + m; ++i) rest.word[i >> 6] &= ~(uint64_t(1) << (i & 63));
            f(p, t, m, rest);
        }
    };
    each_page([&](int p, int, int, const CellMask & rest) {
        if (!rest.empty()) stage(stream, p);
    });
    each_page([&](int p, int t, int m, const CellMask & rest) {
        if (rest.empty()) {
            drop(stream, p);
        } else {
            memory_->zero(at(stream, p).rows + size_t(t) * shape_.row, m);
            at(stream, p).valid = rest;
        }
    });
    histories_[stream].erased(cell, n);
    bool any = false;
    for (int p = 0; p < shape_.n_pages() && !any; ++p) any = !page(stream, p).empty();
    if (!any) begin_anew(stream);
}

void PageStore::begin_anew(int stream) {
    histories_[stream].clear();
    if (configured_ && !shape_.is_value && !keep_statistics_) memory_->forget_queries(stream);
}

void PageStore::look(const MaskView & view) {
    for (int i = 0; i < view.n_streams; ++i) {
        const int stream = view.first_stream + i;
        const History::Step step = histories_[stream].look(view, i);
        if (shape_.is_value || keep_statistics_) continue;
        if (step.turn == History::Turn::back) memory_->recall_queries(stream, step.mark);
        if (step.turn == History::Turn::anew) memory_->forget_queries(stream);
        if (step.marked >= 0) memory_->mark_queries(stream, step.marked);
    }
}

void PageStore::read(int stream, int cell, int n, half * rows) const {
    std::vector<PageSpan> spans;
    while (n > 0) {
        const int p = cell / kPageCells, t = cell % kPageCells, m = std::min(n, kPageCells - t);
        const Page & page = this->page(stream, p);
        spans.push_back({page.rows, page.records, t, m});
        cell += m;
        n -= m;
    }
    memory_->read(spans.data(), int(spans.size()), rows);
}

std::vector<float> PageStore::importance(int stream) const {
    std::vector<float> mean(size_t(layout_.n_heads) * layout_.head_size), sqr(mean.size());
    return query_statistics(mean.data(), sqr.data(), stream) || layout_.query_prior.empty() ? mean : layout_.query_prior;
}

bool PageStore::same_layout(const PageStore & other) const {
    return shape_.is_value == other.shape_.is_value && shape_.row == other.shape_.row && shape_.n_cells == other.shape_.n_cells &&
           configured_ == other.configured_ && layout_.record_offset == other.layout_.record_offset &&
           layout_.record_bytes == other.layout_.record_bytes;
}

void PageStore::copy_stream(const PageStore & other, int from, int to) {
    if (&other == this && from == to) return;
    // What may fail comes first: the history, rows beyond those that are free or that the stream gives back, the statistics.
    History history = other.histories_[from];
    std::vector<half *> spare;
    int n_packed = int(free_records_.size()), n_rows = -int(free_home_.size());
    for (int p = 0; p < shape_.n_pages(); ++p) {
        n_packed += page(to, p).records != nullptr;
        n_rows -= page(to, p).rows != nullptr;
    }
    for (int p = 0; p < shape_.n_pages(); ++p) {
        const Page & source = other.page(from, p);
        const bool stays_packed = source.records && n_packed > 0;
        n_packed -= stays_packed;
        n_rows += !source.empty() && !stays_packed;
    }
    spare.reserve(shape_.n_pages() + std::max(n_rows, 0));
    try {
        for (; n_rows > 0; --n_rows) spare.push_back(memory_->get());
        if (configured_ && !shape_.is_value) memory_->copy_queries(to, *other.memory_, from);
    } catch (...) {
        for (half * rows : spare) memory_->put(rows);
        throw;
    }
    for (int p = 0; p < shape_.n_pages(); ++p) {
        Page & page = at(to, p);
        if (page.rows && !owns(page.rows)) spare.push_back(page.rows);
        if (page.rows && owns(page.rows)) free_home_.push_back(reinterpret_cast<uint8_t *>(page.rows));
        if (page.rows) lose_rows(to, p);
        if (page.records) drop_records(to, p);
    }
    for (int p = 0; p < shape_.n_pages(); ++p) {
        Page & page = at(to, p);
        const Page & source = other.page(from, p);
        if (source.records && !free_records_.empty()) {
            take_record(to, p);
            memory_->copy_records(page.records, source.records);
        } else if (!source.empty()) {
            if (free_home_.empty()) {
                page.rows = spare.back();
                spare.pop_back();
            } else {
                page.rows = take_rows();
            }
            mark_moved(to, p);
            if (source.records) {
                const PageJob job = {page.rows, source.records, {}};
                other.memory_->unpack(&job, 1, 1);
            } else {
                memory_->copy(page.rows, source.rows);
            }
            page.coded = source.coded;
            if (source.coded) ++n_packed_;
            if (!source.coded) recent(to, p);
        }
        page.valid = source.valid;
        page.written = source.written;
    }
    for (half * rows : spare) memory_->put(rows);
    calm_ = false;
    clock_[to] = other.clock_[from];
    newest_[to] = other.newest_[from];
    histories_[to] = std::move(history);
}

void PageStore::clear() {
    for (int s = 0; s < shape_.n_streams; ++s) {
        for (int p = 0; p < shape_.n_pages(); ++p) {
            drop(s, p);
            at(s, p).written = 0;
        }
        clock_[s] = 0;
        newest_[s] = -1;
        begin_anew(s);
    }
    // Low addresses first again, so that what is resident stays together.
    std::sort(free_home_.rbegin(), free_home_.rend());
    std::sort(free_records_.rbegin(), free_records_.rend());
}

size_t PageStore::table_bytes() const {
    size_t n = sizeof(*this) + pages_.capacity() * sizeof(Page) + moved_.capacity() * sizeof(int) + memory_->query_bytes();
    for (const auto & list : half_pages_) n += list.capacity() * sizeof(int);
    for (const History & history : histories_) n += sizeof(History) + history.bytes();
    return n;
}

size_t PageStore::bytes_used() const { return n_half_ * shape_.page_bytes() + n_packed_ * (codec_ ? shape_.page_bytes() : layout_.record_bytes); }

}  // namespace mixkvq
