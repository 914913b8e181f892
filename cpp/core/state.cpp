#include "mixkvq/state.h"

#include <algorithm>

#include "mixkvq/cache.h"
#include "mixkvq/check.h"

namespace mixkvq {

// ---- bytes ----

void StateWriter::add(const void * data, size_t bytes) {
    bytes_ += bytes;
    if (only_counts() || refused_) return;
    sum_.add(data, bytes);
    const auto * at = static_cast<const uint8_t *>(data);
    if (buffer_.size() + bytes > kBuffer) {
        refused_ = !buffer_.empty() && !write_(buffer_.data(), buffer_.size());
        buffer_.clear();
    }
    if (bytes > kBuffer) {
        refused_ = refused_ || !write_(at, bytes);
    } else {
        buffer_.insert(buffer_.end(), at, at + bytes);
    }
}

bool StateWriter::finish() {
    if (!only_counts() && !refused_ && !buffer_.empty()) refused_ = !write_(buffer_.data(), buffer_.size());
    buffer_.clear();
    return !refused_;
}

const uint8_t * StateReader::take(size_t bytes) {
    if (!ok_ || bytes > left_) {
        spoil();
        return nullptr;
    }
    const uint8_t * const at = at_;
    at_ += bytes, left_ -= bytes;
    return at;
}

const StreamState::Page * StreamState::find(int number) const {
    const auto is_before = [](const Page & page, int n) { return page.number < n; };
    const auto found = std::lower_bound(pages.begin(), pages.end(), number, is_before);
    return found != pages.end() && found->number == number ? &*found : nullptr;
}

namespace {

constexpr int kMostPages = 1 << 24, kMostListed = 1 << 20;

int count_of(const CellMask & mask) {
    int n = 0;
    for (int t = 0; t < kPageCells; ++t) n += mask.test(t);
    return n;
}

// A buffer that is aligned like records.
class Aligned {
  public:
    explicit Aligned(size_t bytes) : memory_(bytes + kRecordAlign) {}
    uint8_t * data() {
        const auto at = reinterpret_cast<uintptr_t>(memory_.data());
        return memory_.data() + (kRecordAlign - at % kRecordAlign) % kRecordAlign;
    }

  private:
    std::vector<uint8_t> memory_;
};

void put_runs(const std::vector<HistoryState::Run> & runs, StateWriter & out) {
    out.add(uint32_t(runs.size()));
    for (const HistoryState::Run & run : runs) out.add(run.first), out.add(run.n), out.add(run.over);
}

std::vector<HistoryState::Run> get_runs(StateReader & in) {
    std::vector<HistoryState::Run> runs;
    for (uint32_t i = 0, n = in.get<uint32_t>(); i < n && in.ok(); ++i) {
        HistoryState::Run run;
        run.first = in.get<int32_t>(), run.n = in.get<int32_t>(), run.over = in.get<int32_t>();
        if (run.first < 0 || run.n <= 0 || run.n > kMostPages) in.spoil();
        runs.push_back(run);
    }
    return runs;
}

void put_history(const HistoryState & history, StateWriter & out) {
    put_runs(history.now, out);
    put_runs(history.last, out);
    out.add(uint32_t(history.marks.size()));
    for (const HistoryState::Mark & mark : history.marks) out.add(mark.number), out.add(mark.cell), out.add(mark.rows);
    out.add(uint32_t(history.sequences.size()));
    for (const HistoryState::Sequence & s : history.sequences) {
        out.add(s.tip), out.add(s.first_page), out.add(s.rows), out.add(s.seen);
        out.add(uint32_t(s.recent.size()));
        for (const HistoryState::Recent & recent : s.recent) out.add(recent.page), out.add(recent.row);
    }
    out.add(history.rows), out.add(history.looks);
}

HistoryState get_history(StateReader & in) {
    HistoryState history;
    history.now = get_runs(in);
    history.last = get_runs(in);
    int least = 0;
    for (uint32_t i = 0, n = in.get<uint32_t>(); i < n && in.ok(); ++i) {
        HistoryState::Mark mark;
        mark.number = in.get<int32_t>(), mark.cell = in.get<int32_t>(), mark.rows = in.get<uint64_t>();
        if (mark.number < least || mark.number > 30) in.spoil();
        least = mark.number + 1;
        history.marks.push_back(mark);
    }
    for (uint32_t i = 0, n = in.get<uint32_t>(); i < n && in.ok(); ++i) {
        HistoryState::Sequence s;
        s.tip = in.get<int32_t>(), s.first_page = in.get<int32_t>(), s.rows = in.get<uint64_t>(), s.seen = in.get<uint64_t>();
        for (uint32_t r = 0, n_recent = in.get<uint32_t>(); r < n_recent && in.ok(); ++r) {
            HistoryState::Recent recent;
            recent.page = in.get<int32_t>(), recent.row = in.get<uint64_t>();
            if (recent.row > s.rows) in.spoil();
            s.recent.push_back(recent);
        }
        history.sequences.push_back(std::move(s));
    }
    history.rows = in.get<uint64_t>(), history.looks = in.get<uint64_t>();
    return history;
}

void put_queries(const QueryState & queries, StateWriter & out) {
    out.add_list(queries.abs), out.add_list(queries.sqr), out.add(queries.count);
    out.add(uint32_t(queries.marks.size()));
    for (const QueryState::Mark & mark : queries.marks) out.add(int32_t(mark.number)), out.add_list(mark.abs), out.add(mark.count);
}

bool is_sum(const std::vector<float> & list) {
    return std::all_of(list.begin(), list.end(), [](float x) { return x >= 0 && x < 1e30f; });
}

QueryState get_queries(StateReader & in, size_t n) {
    QueryState queries;
    queries.abs = in.get_list<float>(n), queries.sqr = in.get_list<float>(n), queries.count = in.get<double>();
    bool good = is_sum(queries.abs) && is_sum(queries.sqr) && queries.count >= 0 && queries.count < 1e30;
    for (uint32_t i = 0, n_marks = in.get<uint32_t>(); i < n_marks && in.ok(); ++i) {
        QueryState::Mark mark;
        mark.number = in.get<int32_t>(), mark.abs = in.get_list<float>(n), mark.count = in.get<double>();
        good = good && mark.number >= 0 && mark.number <= 30 && is_sum(mark.abs) && mark.count >= 0 && mark.count < 1e30;
        queries.marks.push_back(std::move(mark));
    }
    if (!good) in.spoil();
    return queries;
}

}  // namespace

// ---- saving ----

void PageStore::save_stream(int stream, const CellRuns & live, bool shared, StateWriter & out) const {
    std::vector<CellMask> is_live(shape_.n_pages());
    for (const CellRun & run : live) {
        for (int i = run.first; i < run.first + run.n; ++i) is_live[i / kPageCells].set(i % kPageCells);
    }
    const auto valid_of = [&](int p) {
        CellMask valid = page(stream, p).valid;
        for (int w = 0; shared && w < 2; ++w) valid.word[w] &= is_live[p].word[w];
        return valid;
    };
    // A packed page of which nobody sees a cell is never looked at again. One in F16 counts where pages are packed early.
    std::vector<int> saved;
    for (int p = 0; p < shape_.n_pages(); ++p) {
        const Page & each = page(stream, p);
        const bool dead = is_live[p].empty() && (each.records || shared);
        if (!each.empty() && !dead && !valid_of(p).empty()) saved.push_back(p);
    }
    out.add(clock_[stream]);
    out.add(int32_t(newest_[stream]));
    out.add(uint32_t(saved.size()));
    for (int p : saved) {
        const Page & each = page(stream, p);
        const CellMask valid = valid_of(p);
        out.add(uint32_t(p)), out.add(uint32_t((each.records ? 1 : 0) | (each.coded ? 2 : 0)));
        out.add(valid.word[0]), out.add(valid.word[1]), out.add(uint64_t(each.written));
    }
    HistoryState history = histories_[stream].state();
    if (shared) {
        const auto is_ours = [&](int cell) { return cell >= 0 && cell < shape_.n_cells && is_live[cell / kPageCells].test(cell % kPageCells); };
        auto & all = history.sequences;
        all.erase(std::remove_if(all.begin(), all.end(), [&](auto & s) { return !is_ours(s.tip); }), all.end());
        history.now.clear(), history.last.clear(), history.marks.clear();
    }
    put_history(history, out);
    if (configured_ && !shape_.is_value) {
        std::vector<int> marks;
        for (const HistoryState::Mark & mark : history.marks) marks.push_back(mark.number);
        put_queries(memory_->query_state(stream, marks), out);
    }
    std::vector<uint8_t> records(layout_.record_bytes);
    std::vector<half> rows(size_t(kPageCells) * shape_.row);
    for (int p : saved) {
        const Page & each = page(stream, p);
        const CellMask valid = valid_of(p);
        if (out.only_counts()) {
            out.skip(each.records ? layout_.record_bytes : size_t(2) * shape_.row * count_of(valid));
        } else if (each.records) {
            memory_->get_records(each.records, records.data());
            out.add(records.data(), layout_.record_bytes);
        } else {
            const PageSpan span = {each.rows, nullptr, 0, kPageCells};
            memory_->read(&span, 1, rows.data());
            for (int t = 0; t < kPageCells; ++t) {
                if (valid.test(t)) out.add(rows.data() + size_t(t) * shape_.row, size_t(2) * shape_.row);
            }
        }
    }
}

// ---- loading ----

const char * PageStore::parse_stream(StateReader & in, StreamState & state) const {
    constexpr const char * kDamaged = "it is damaged";
    state.clock = in.get<uint64_t>();
    state.newest = in.get<int32_t>();
    const uint32_t n = in.get<uint32_t>();
    if (n > kMostListed || state.clock >> 60) return kDamaged;
    for (uint32_t i = 0; i < n && in.ok(); ++i) {
        StreamState::Page page;
        page.number = in.get<int32_t>();
        const uint32_t kind = in.get<uint32_t>();
        page.valid.word[0] = in.get<uint64_t>(), page.valid.word[1] = in.get<uint64_t>();
        page.written = in.get<uint64_t>();
        page.packed = kind == 1, page.coded = kind == 2;
        const int least = state.pages.empty() ? 0 : state.pages.back().number + 1;
        const bool fits = kind == 0 || (configured_ && (kind == 1 ? layout_.record_bytes > 0 : has_codec()));
        if (page.number < least || page.number >= kMostPages || page.valid.empty() || page.written > state.clock || !fits) return kDamaged;
        state.pages.push_back(page);
    }
    state.history = get_history(in);
    if (configured_ && !shape_.is_value) state.queries = get_queries(in, size_t(layout_.n_heads) * layout_.head_size);
    for (StreamState::Page & page : state.pages) {
        page.data = in.take(page.packed ? layout_.record_bytes : size_t(2) * shape_.row * count_of(page.valid));
        if (!page.data || !page.packed || shape_.is_value) continue;
        for (int h = 0; h < layout_.n_heads; ++h) {
            if (find_bad_channel(layout_.keys[h], page.data + layout_.record_offset[h]) >= 0) return kDamaged;
        }
    }
    return in.ok() ? nullptr : kDamaged;
}

void PageStore::rows_of(const StreamState::Page & from, half * rows) const {
    if (from.packed) {
        Aligned records(layout_.record_bytes);
        std::memcpy(records.data(), from.data, layout_.record_bytes);
        memory_->unpack_from(records.data(), rows);
        return;
    }
    const size_t row_bytes = size_t(2) * shape_.row;
    const uint8_t * at = from.data;
    for (int t = 0; t < kPageCells; ++t) {
        half * row = rows + size_t(t) * shape_.row;
        if (from.valid.test(t)) {
            std::memcpy(row, at, row_bytes);
            at += row_bytes;
        } else {
            std::memset(row, 0, row_bytes);
        }
    }
}

bool PageStore::has_record(int stream, int p, const StreamState::Page & from) const {
    const Page & page = this->page(stream, p);
    if (!page.records || !from.packed) return false;
    std::vector<uint8_t> here(layout_.record_bytes);
    memory_->get_records(page.records, here.data());
    return std::memcmp(here.data(), from.data, layout_.record_bytes) == 0;
}

// An empty page becomes one of the state's, of which `valid` cells hold tokens: packed if there is a record left.
void PageStore::load_page(int stream, int p, const StreamState::Page & from, const CellMask & valid, uint64_t written) {
    if (from.packed && !free_records_.empty()) {
        take_record(stream, p);
        memory_->set_records(at(stream, p).records, from.data);
    } else {
        std::vector<half> rows(size_t(kPageCells) * shape_.row);
        rows_of(from, rows.data());
        half * const to = stage(stream, p);
        half * cells[kPageCells];
        for (int t = 0; t < kPageCells; ++t) cells[t] = from.packed || valid.test(t) ? to + size_t(t) * shape_.row : nullptr;
        memory_->write(cells, kPageCells, {rows.data(), size_t(2) * shape_.row, true});
        if (from.coded) {
            forget(stream, p);
            at(stream, p).coded = 1;
            ++n_packed_;
        }
    }
    at(stream, p).valid = valid;
    at(stream, p).written = written;
}

// Cells of a page get rows of the state, from the cell that `sources` says; -1: this one stays as it is.
void PageStore::load_rows(int stream, int p, const StreamState & state, const int * sources, uint64_t written) {
    std::vector<half> rows(size_t(kPageCells) * shape_.row), page_rows(rows.size());
    int before = -1;
    half * const to = stage(stream, p);
    half * cells[kPageCells] = {};
    for (int t = 0; t < kPageCells; ++t) {
        if (sources[t] < 0) continue;
        const int q = sources[t] / kPageCells;
        if (q != before) rows_of(*state.find(q), page_rows.data());
        before = q;
        std::memcpy(rows.data() + size_t(t) * shape_.row, page_rows.data() + size_t(sources[t] % kPageCells) * shape_.row, size_t(2) * shape_.row);
        cells[t] = to + size_t(t) * shape_.row;
        at(stream, p).valid.set(t);
    }
    memory_->write(cells, kPageCells, {rows.data(), size_t(2) * shape_.row, true});
    at(stream, p).written = std::max(uint64_t(at(stream, p).written), written);
}

// The stream is empty and becomes the saved one.
void PageStore::load_whole(int stream, const StreamState & state) {
    for (const StreamState::Page & page : state.pages) {
        if (page.number < shape_.n_pages()) load_page(stream, page.number, page, page.valid, page.written);
    }
    newest_[stream] = state.newest < shape_.n_pages() ? state.newest : -1;
    histories_[stream].restore(state.history);
}

// The sequences whose last cells have come along, with the pages that their pages have become.
void PageStore::take_sequences(int stream, const HistoryState & history, const std::vector<CellMove> & moves) {
    const auto cell_of = [&](int cell) {
        for (const CellMove & m : moves) {
            if (cell >= m.from && cell < m.from + m.n) return m.to + cell - m.from;
        }
        return -1;
    };
    const auto page_of = [&](int64_t q) {  // any number, in a damaged state
        for (const CellMove & m : moves) {
            const int64_t first = std::max(int64_t(m.from), q * kPageCells), end = std::min(int64_t(m.from) + m.n, (q + 1) * kPageCells);
            if (first < end) return int((m.to + end - 1 - m.from) / kPageCells);
        }
        return -1;
    };
    for (HistoryState::Sequence sequence : history.sequences) {
        sequence.tip = cell_of(sequence.tip);
        sequence.first_page = page_of(sequence.first_page);
        for (auto & recent : sequence.recent) recent.page = page_of(recent.page);
        if (sequence.tip >= 0) histories_[stream].adopt(sequence);
    }
}

void PageStore::load_stream(int stream, const StreamState & state, const std::vector<CellMove> & moves, bool alone, int n_threads) {
    calm_ = false;
    bool empty = true;
    for (int p = 0; p < shape_.n_pages() && empty; ++p) empty = page(stream, p).empty();
    alone = alone || empty;
    if (alone) {
        for (int p = 0; p < shape_.n_pages(); ++p) {
            drop(stream, p);
            at(stream, p).written = 0;
        }
        begin_anew(stream);
        clock_[stream] = state.clock;
        newest_[stream] = -1;
        if (configured_ && !shape_.is_value) memory_->restore_queries(stream, state.queries);
        if (std::all_of(moves.begin(), moves.end(), [](const CellMove & m) { return m.from == m.to; })) return load_whole(stream, state);
    }
    std::vector<int> sources(size_t(shape_.n_pages()) * kPageCells, -1);
    for (const CellMove & m : moves) {
        for (int i = 0; i < m.n; ++i) {
            if (state.find((m.from + i) / kPageCells)) sources[m.to + i] = m.from + i;  // a cell that nobody has written is in no page
        }
    }
    int last_page = -1;
    uint64_t last_written = 0;
    for (int p = 0; p < shape_.n_pages(); ++p) {
        const int * const from = sources.data() + size_t(p) * kPageCells;
        const int first = int(std::find_if(from, from + kPageCells, [](int cell) { return cell >= 0; }) - from);
        if (first == kPageCells) continue;
        const int q = from[first] / kPageCells;
        CellMask valid;
        bool same = from[first] % kPageCells == first, room = true;
        uint64_t written = 0;
        for (int t = 0; t < kPageCells; ++t) {
            if (from[t] < 0) {
                room = room && !page(stream, p).valid.test(t);
                continue;
            }
            valid.set(t);
            same = same && from[t] == q * kPageCells + t;
            written = std::max(written, state.find(from[t] / kPageCells)->written);
        }
        // As long ago as it was there.
        const uint64_t age = state.clock - written;
        written = clock_[stream] > age ? clock_[stream] - age : 0;
        const StreamState::Page & source = *state.find(q);
        if (same && has_record(stream, p, source)) {
            for (int w = 0; w < 2; ++w) at(stream, p).valid.word[w] |= valid.word[w];
        } else if (same && room) {
            drop(stream, p);
            load_page(stream, p, source, valid, written);
        } else {
            load_rows(stream, p, state, from, written);
        }
        if (last_page < 0 || written > last_written) last_page = p, last_written = written;
    }
    if (newest_[stream] < 0) newest_[stream] = last_page;
    take_sequences(stream, state.history, moves);
    settle(n_threads);
}

// ---- beside llama.cpp's own states ----

size_t StreamNotes::bytes() const {
    size_t n = (history.now.size() + history.last.size()) * sizeof(HistoryState::Run) + history.marks.size() * sizeof(HistoryState::Mark);
    for (const auto & sequence : history.sequences) n += sizeof(sequence) + sequence.recent.size() * sizeof(HistoryState::Recent);
    n += (queries.abs.size() + queries.sqr.size()) * sizeof(float);
    for (const auto & mark : queries.marks) n += sizeof(mark) + mark.abs.size() * sizeof(float);
    return n;
}

StreamNotes PageStore::notes(int stream) const {
    StreamNotes notes;
    notes.history = histories_[stream].state();
    if (!configured_ || shape_.is_value) return notes;
    std::vector<int> marks;
    for (const HistoryState::Mark & mark : notes.history.marks) marks.push_back(mark.number);
    notes.queries = memory_->query_state(stream, marks);
    return notes;
}

bool PageStore::forget_replaced(int stream, int cell, int n) {
    const auto holds_token = [&](int i) { return page(stream, i / kPageCells).valid.test(i % kPageCells); };
    for (const HistoryState::Sequence & sequence : histories_[stream].state().sequences) {
        bool replaced = false;
        const int first = std::max(cell, sequence.first_page * kPageCells), end = std::min(cell + n, (sequence.first_page + 1) * kPageCells);
        for (int i = first; i < end && !replaced; ++i) replaced = holds_token(i);
        if (!replaced) return false;
    }
    if (histories_[stream].n_sequences() > 0) begin_anew(stream);
    return true;
}

void PageStore::recall(int stream, const StreamNotes & notes, const std::vector<CellMove> & moves, bool alone) {
    if (alone && configured_ && !shape_.is_value && !keep_statistics_ && !notes.queries.abs.empty()) memory_->restore_queries(stream, notes.queries);
    if (alone && std::all_of(moves.begin(), moves.end(), [](const CellMove & m) { return m.from == m.to; })) {
        histories_[stream].restore(notes.history);
    } else {
        take_sequences(stream, notes.history, moves);
    }
}

}  // namespace mixkvq
