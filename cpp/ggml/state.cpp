// Packed states: llama.cpp saves and loads its own, into and from memory that we give it, and we keep out of it the rows of the caches. What becomes of
// them is in PageStore::save_stream and load_stream; docs/format.md, "Packed states", is the format.

#include <algorithm>
#include <cstring>
#include <vector>

#include "mixkvq/backend_api.h"
#include "mixkvq/checksum.h"
#include "state.h"

namespace mixkvq::MIXKVQ_GLUE {

namespace {

constexpr char kMagic[8] = {'M', 'I', 'X', 'K', 'V', 'Q', 'P', 'S'};
constexpr uint32_t kVersion = 1;
constexpr size_t kHeader = 64, kTrailer = 8;
constexpr uint32_t kMostTensors = 1 << 16;

// Rows that llama.cpp has read from a cache or written to it.
struct Access {
    CacheTensor * cache;
    int stream, first, n;
    uint64_t at;  // in llama.cpp's state
};

// A cache tensor as a state describes it. One is loaded into another if all of this is the same.
struct Described {
    char name[32] = {};
    uint32_t is_value = 0, row_bytes = 0, window = 0, sinks = 0, mode = 0, n_heads = 0, head_size = 0, record_bytes = 0;
    uint64_t formats = 0;  // checksum of each head's
};

// Rows of one tensor and stream, consecutive in llama.cpp's state.
struct Span {
    uint32_t tensor = 0, stream = 0, n_streams = 1, runs = 0, n_cells = 0;
    uint64_t at = 0;

    CellRuns cells;   // loading
    CellRuns padded;  // with cells that hold nothing between them, -1
    StreamState state;
};

uint64_t count_of(const CellRuns & runs) {
    uint64_t n = 0;
    for (const CellRun & run : runs) n += uint64_t(run.n);
    return n;
}

constexpr size_t kCell = 12;     // of llama.cpp's description of a cell in one sequence
constexpr size_t kBetween = 12;  // between the rows of two tensors

Described describe(const CacheTensor & t) {
    Described d;
    std::strncpy(d.name, t.name.c_str(), sizeof(d.name) - 1);
    const StoreShape & shape = t.store->shape();
    d.is_value = t.is_value, d.row_bytes = uint32_t(t.row_bytes), d.window = shape.window, d.sinks = shape.sinks;
    if (!t.store->configured()) return d;
    d.mode = t.store->has_codec() ? 2 : 1;
    d.n_heads = t.store->n_heads(), d.head_size = t.store->head_size(), d.record_bytes = uint32_t(t.store->records_per_page());
    Checksum sum;
    for (int h = 0; h < t.store->n_heads(); ++h) {
        if (t.is_value) {
            const ValueFormat & f = t.store->value_format(h);
            const int32_t numbers[] = {f.head_size, f.bits, f.group};
            sum.add(numbers, sizeof(numbers));
        } else {
            const KeyFormat & f = t.store->key_format(h);
            const int32_t numbers[] = {f.head_size, f.n16, f.n8, f.n4, f.n3, f.n2, f.group};
            sum.add(numbers, sizeof(numbers));
        }
    }
    d.formats = sum.value();
    return d;
}

void put(const Described & d, StateWriter & out) {
    out.add(d.name, sizeof(d.name));
    for (uint32_t x : {d.is_value, d.row_bytes, d.window, d.sinks, d.mode, d.n_heads, d.head_size, d.record_bytes}) out.add(x);
    out.add(d.formats);
}

Described get_described(StateReader & in) {
    Described d;
    if (const uint8_t * name = in.take(sizeof(d.name))) std::memcpy(d.name, name, sizeof(d.name) - 1);
    for (uint32_t * x : {&d.is_value, &d.row_bytes, &d.window, &d.sinks, &d.mode, &d.n_heads, &d.head_size, &d.record_bytes}) *x = in.get<uint32_t>();
    d.formats = in.get<uint64_t>();
    return d;
}

// Why rows of `theirs` cannot become rows of `ours`; "" if they can.
std::string difference(const Described & theirs, const Described & ours) {
    const std::string what = std::string(ours.is_value ? "values" : "keys") + " in " + ours.name;
    const auto differ = [&](const char * of, uint32_t a, uint32_t b) {
        return "its " + what + " have " + of + " " + std::to_string(a) + ", and this context's " + std::to_string(b);
    };
    if (theirs.row_bytes != ours.row_bytes) return differ("rows of so many bytes:", theirs.row_bytes, ours.row_bytes);
    if (theirs.window != ours.window) return differ("a window of", theirs.window, ours.window);
    if (theirs.sinks != ours.sinks) return differ("a number of first tokens in F16 of", theirs.sinks, ours.sinks);
    if (theirs.is_value != ours.is_value || theirs.mode != ours.mode || theirs.n_heads != ours.n_heads || theirs.head_size != ours.head_size ||
        theirs.record_bytes != ours.record_bytes || theirs.formats != ours.formats) {
        return "its " + what + " are packed in other formats than this context's";
    }
    return "";
}

thread_local std::weak_ptr<State> current;  // what llama.cpp's calls in this thread are about

}  // namespace

// A state on its way out or in. Of one thread.
struct State {
    std::shared_ptr<Session> session;
    uint32_t flags = 0;
    Region region;      // llama.cpp's own state, with holes where the rows of the caches would be
    uint64_t size = 0;  // of it
    std::vector<Access> accesses;
    // Loading.
    std::vector<Described> tensors;
    std::vector<Span> spans;  // by rising place
    int32_t filler = -1;      // the position of the first cell that holds nothing

    // Whether it takes care of these rows.
    bool takes(CacheTensor & cache, const void * data, size_t offset, size_t bytes);
    std::string read(const uint8_t * data, size_t bytes);
    std::string finish();
    bool write(const StateWriter::Write & to, uint64_t * n_bytes);

  private:
    struct Cells {
        size_t first = 0, end = 0;  // spans
        size_t at = 0;              // of the first cell, in what stands before the first span
        int32_t last = -1;          // position
        bool known = false;
    };

    void fill_region(const uint8_t * own);
    Cells cells_before(const uint8_t * bytes, size_t n_bytes, size_t first, size_t end) const;
    CellRuns padded(const Span & span) const;
    std::string parse(StateReader & in);
    std::string fits(const Described & tensor, uint64_t n_cells) const;
    const CacheTensor * find(const Described & tensor) const;
    std::string load(CacheTensor & cache, const Span & span, int stream, const std::vector<CellMove> & moves);
};

bool State::takes(CacheTensor & cache, const void * data, size_t offset, size_t bytes) {
    const auto * at = static_cast<const uint8_t *>(data);
    if (cache.owner->session != session || cache.mode == CacheTensor::Mode::plain) return false;
    if (at < region.data() || at + bytes > region.data() + size || offset % cache.row_bytes || bytes % cache.row_bytes) return false;
    const int n_cells = cache.store->shape().n_cells, cell = int(offset / cache.row_bytes);
    accesses.push_back({&cache, cell / n_cells, cell % n_cells, int(bytes / cache.row_bytes), uint64_t(at - region.data())});
    return true;
}

bool take_rows(CacheTensor & cache, const void * data, size_t offset, size_t bytes) {
    const auto state = current.lock();
    return state && state->takes(cache, data, offset, bytes);
}

namespace {

// The accesses of one tensor and stream, one behind the other.
template <class F> void each_group(std::vector<Access> & accesses, F && f) {
    std::stable_sort(accesses.begin(), accesses.end(), [](const Access & a, const Access & b) { return a.at < b.at; });
    for (size_t i = 0, end; i < accesses.size(); i = end) {
        const Access & a = accesses[i];
        for (end = i + 1; end < accesses.size() && accesses[end].cache == a.cache && accesses[end].stream == a.stream; ++end) {}
        f(i, end);
    }
}

}  // namespace

// ---- saving ----

bool State::write(const StateWriter::Write & to, uint64_t * n_bytes) {
    std::vector<CacheTensor *> caches;
    std::vector<CellRuns> lists;
    std::vector<Span> rows;
    each_group(accesses, [&](size_t i, size_t end) {
        Span span;
        CacheTensor * const cache = accesses[i].cache;
        span.tensor = uint32_t(std::find(caches.begin(), caches.end(), cache) - caches.begin());
        if (span.tensor == caches.size()) caches.push_back(cache);
        span.stream = accesses[i].stream, span.at = accesses[i].at;
        span.n_streams = cache->store->shape().n_streams, span.n_cells = cache->store->shape().n_cells;
        CellRuns runs;
        for (size_t j = i; j < end; ++j) runs.push_back({accesses[j].first, accesses[j].n});
        const auto same = [&](const CellRuns & list) {
            return list.size() == runs.size() && std::equal(list.begin(), list.end(), runs.begin(), [](CellRun a, CellRun b) { return a.first == b.first && a.n == b.n; });
        };
        span.runs = uint32_t(std::find_if(lists.begin(), lists.end(), same) - lists.begin());
        if (span.runs == lists.size()) lists.push_back(std::move(runs));
        rows.push_back(std::move(span));
    });
    uint64_t kept = size;  // bytes of llama.cpp's own
    for (const Access & a : accesses) kept -= uint64_t(a.n) * a.cache->row_bytes;

    BufferLocks locks;
    for (CacheTensor * cache : caches) locks.add(cache->owner);
    locks.lock();
    const auto body = [&](StateWriter & out, uint64_t bytes) {
        out.add(kMagic, sizeof(kMagic));
        out.add(kVersion), out.add(uint32_t(kFormatVersion)), out.add(bytes), out.add(size);
        out.add(flags), out.add(uint32_t(caches.size())), out.add(uint32_t(lists.size())), out.add(uint32_t(rows.size()));
        out.add(kept), out.add(uint64_t(0));
        for (const CacheTensor * cache : caches) put(describe(*cache), out);
        for (const CellRuns & list : lists) {
            out.add(uint32_t(list.size()));
            for (const CellRun & run : list) out.add(int32_t(run.first)), out.add(int32_t(run.n));
        }
        for (const Span & span : rows) {
            for (uint32_t x : {span.tensor, span.stream, span.n_streams, span.runs, span.n_cells, uint32_t(0)}) out.add(x);
            out.add(span.at);
        }
        uint64_t at = 0;
        for (const Access & a : accesses) {
            out.add(region.data() + at, a.at - at);
            at = a.at + uint64_t(a.n) * a.cache->row_bytes;
        }
        out.add(region.data() + at, size - at);
        const bool shared = flags & MIXKVQ_STATE_SHARED;
        for (const Span & span : rows) caches[span.tensor]->store->save_stream(int(span.stream), lists[span.runs], shared, out);
    };
    StateWriter count;
    body(count, 0);
    *n_bytes = count.bytes() + kTrailer;
    if (!to) return true;
    StateWriter out(to);
    body(out, *n_bytes);
    out.add(out.checksum());
    for (CacheTensor * cache : caches) cache->owner->memory->trim();
    return out.finish();
}

// ---- loading ----

const CacheTensor * State::find(const Described & tensor) const {
    std::lock_guard<std::mutex> lock(session->mutex);
    for (const auto & weak : session->buffers) {
        const auto buffer = weak.lock();
        if (!buffer || buffer->dry) continue;
        for (const auto & t : buffer->tensors) {
            if (t->name == tensor.name) return t.get();
        }
    }
    return nullptr;
}

std::string State::fits(const Described & tensor, uint64_t n_cells) const {
    const CacheTensor * const t = find(tensor);
    if (!t) return std::string("it holds ") + tensor.name + ", which this context has not";
    if (t->mode == CacheTensor::Mode::plain) return std::string("this context stores ") + tensor.name + " plainly: " + t->reason;
    const std::string why = difference(tensor, describe(*t));
    if (!why.empty()) return why;
    const int room = t->store->shape().n_cells;
    if (n_cells <= uint64_t(room)) return "";
    return "it holds " + std::to_string(n_cells) + " tokens in " + tensor.name + ", and this context has " + std::to_string(room) + " cells there";
}

std::string State::parse(StateReader & in) {
    const std::string damaged = "it is damaged";
    in.take(kHeader - 48);
    in.get<uint64_t>();
    size = in.get<uint64_t>();
    const uint32_t kind = in.get<uint32_t>() & MIXKVQ_STATE_SEQUENCE;
    if (kind != (flags & MIXKVQ_STATE_SEQUENCE)) return kind ? "it is of one sequence, not of a whole context" : "it is of a whole context, not of one sequence";
    const uint32_t n_tensors = in.get<uint32_t>(), n_lists = in.get<uint32_t>(), n_spans = in.get<uint32_t>();
    const uint64_t kept = in.get<uint64_t>();
    in.get<uint64_t>();
    if (n_tensors > kMostTensors || kept > size || size >> 48) return damaged;
    for (uint32_t i = 0; i < n_tensors && in.ok(); ++i) tensors.push_back(get_described(in));
    std::vector<CellRuns> lists;
    std::vector<uint64_t> counts;
    for (uint32_t i = 0; i < n_lists && in.ok(); ++i) {
        CellRuns list;
        uint64_t n = 0;
        int64_t last = -1;
        for (uint32_t r = 0, n_runs = in.get<uint32_t>(); r < n_runs && in.ok(); ++r) {
            const int32_t first = in.get<int32_t>(), length = in.get<int32_t>();
            if (first <= last || length <= 0) return damaged;
            last = int64_t(first) + length - 1;
            n += length;
            list.push_back({first, length});
        }
        lists.push_back(std::move(list)), counts.push_back(n);
    }
    uint64_t at = 0, holes = 0;
    for (uint32_t i = 0; i < n_spans && in.ok(); ++i) {
        Span span;
        for (uint32_t * x : {&span.tensor, &span.stream, &span.n_streams, &span.runs, &span.n_cells}) *x = in.get<uint32_t>();
        in.get<uint32_t>();
        span.at = in.get<uint64_t>();
        if (!in.ok() || span.stream >= span.n_streams || span.tensor >= n_tensors || span.runs >= n_lists || lists[span.runs].empty() || span.at < at) return damaged;
        const CellRun & end = lists[span.runs].back();
        if (uint64_t(end.first) + end.n > span.n_cells) return damaged;
        const uint64_t bytes = counts[span.runs] * tensors[span.tensor].row_bytes;
        if (bytes > size || span.at > size - bytes) return damaged;
        at = span.at + bytes, holes += bytes;
        span.cells = lists[span.runs];
        const std::string why = fits(tensors[span.tensor], counts[span.runs]);
        if (!why.empty()) return why;
        const uint32_t n_streams = find(tensors[span.tensor])->store->shape().n_streams;
        if (span.n_streams != n_streams) {  // llama.cpp takes no others, not even of one sequence
            return "it was saved in a context of " + std::to_string(span.n_streams) + " streams, and this one has " + std::to_string(n_streams);
        }
        spans.push_back(std::move(span));
    }
    if (!in.ok() || kept != size - holes) return damaged;
    const uint8_t * const own = in.take(size_t(kept));
    if (!own) return damaged;
    fill_region(own);
    if (size && !region.data()) return "there is no memory for it";
    for (Span & span : spans) {
        if (find(tensors[span.tensor])->store->parse_stream(in, span.state)) return damaged;
    }
    return in.left() == kTrailer ? "" : damaged;
}

// llama.cpp's bytes into a region, with room for the rows of the spans. It will put the cells side by side, so where they did not lie so, or did not begin
// with a page, pages would come apart: cells that hold nothing are put in between, which are to be removed again.
void State::fill_region(const uint8_t * own) {
    std::vector<const uint8_t *> before(spans.size() + 1);  // what stands before each span, and how much
    std::vector<size_t> gap(spans.size() + 1);
    uint64_t at = 0;
    for (size_t i = 0; i <= spans.size(); ++i) {
        before[i] = own;
        gap[i] = size_t((i < spans.size() ? spans[i].at : size) - at);
        own += gap[i];
        if (i < spans.size()) at = spans[i].at + count_of(spans[i].cells) * tensors[spans[i].tensor].row_bytes;
    }
    // Spans of one cache follow each other, a type and a size between them.
    std::vector<Cells> caches;
    int32_t last = -1;
    for (size_t i = 0, end; i < spans.size(); i = end) {
        for (end = i + 1; end < spans.size() && gap[end] == kBetween; ++end) {}
        caches.push_back(cells_before(before[i], gap[i], i, end));
        last = std::max(last, caches.back().last);
    }
    const bool can = std::all_of(caches.begin(), caches.end(), [](const Cells & c) { return c.known; }) && last < 1 << 30;
    uint64_t more = 0;
    for (Cells & cells : caches) {
        for (size_t i = cells.first; i < cells.end; ++i) spans[i].padded = can ? padded(spans[cells.first]) : spans[i].cells;
        const uint64_t n = count_of(spans[cells.first].padded) - count_of(spans[cells.first].cells);
        more += n * kCell;
        for (size_t i = cells.first; i < cells.end; ++i) more += n * tensors[spans[i].tensor].row_bytes;
        if (n) filler = last + 1;
    }
    size += more;
    region = Region(size_t(size), true);
    if (!region.data()) return;
    uint8_t * to = region.data();
    const auto put = [&](const void * data, size_t bytes) { std::memcpy(to, data, bytes), to += bytes; };
    size_t next = 0;
    for (size_t i = 0; i <= spans.size(); ++i) {
        if (next < caches.size() && caches[next].first == i && filler >= 0) {
            const Cells & cells = caches[next++];
            const uint32_t n = uint32_t(count_of(spans[i].padded));
            const uint8_t * from = before[i] + cells.at;
            put(before[i], cells.at - sizeof(n));
            put(&n, sizeof(n));
            int32_t position = filler;
            const uint8_t * const first = from;
            for (const CellRun & run : spans[i].padded) {
                for (int c = 0; run.first < 0 && c < run.n; ++c, ++position) {
                    put(&position, sizeof(position));
                    put(first + sizeof(position), kCell - sizeof(position));  // of the sequence of the first
                }
                if (run.first >= 0) put(from, run.n * kCell), from += run.n * kCell;
            }
            put(from, size_t(before[i] + gap[i] - from));
        } else {
            put(before[i], gap[i]);
        }
        if (i == spans.size()) break;
        spans[i].at = uint64_t(to - region.data());
        to += count_of(spans[i].padded) * tensors[spans[i].tensor].row_bytes;
    }
}

// What llama.cpp says of the cells of a cache in front of their rows, where it is as expected: their number, for each its position, 1 and its sequence;
// then whether values are transposed, the number of layers, and the type and size of the first rows.
State::Cells State::cells_before(const uint8_t * bytes, size_t n_bytes, size_t first, size_t end) const {
    Cells cells;
    cells.first = first, cells.end = end;
    const size_t n = size_t(count_of(spans[first].cells)), behind = 2 * sizeof(uint32_t) + kBetween, all = n * kCell + behind + sizeof(uint32_t);
    if (n_bytes < all) return cells;
    cells.at = n_bytes - behind - n * kCell;
    const auto number = [&](size_t at) {
        uint32_t x;
        std::memcpy(&x, bytes + at, sizeof(x));
        return x;
    };
    if (number(cells.at - 4) != n || number(n_bytes - behind) != 0 || 2 * size_t(number(n_bytes - behind + 4)) != end - first) return cells;
    for (size_t i = 0; i < n; ++i) {
        const auto position = int32_t(number(cells.at + i * kCell));
        if (position < 0 || number(cells.at + i * kCell + 4) != 1) return cells;
        cells.last = std::max(cells.last, position);
    }
    cells.known = true;
    return cells;
}

// The cells of a span with those in between, -1: each as far behind the begin of a page as it was. The same where there is not so much room, or where
// others have cells in the stream.
CellRuns State::padded(const Span & span) const {
    const PageStore & store = *find(tensors[span.tensor])->store;
    bool empty = true;
    for (int p = 0; p < store.shape().n_pages(); ++p) empty = empty && store.page(0, p).empty();
    if ((flags & MIXKVQ_STATE_SHARED) && !empty) return span.cells;
    const int end = span.cells.back().first + span.cells.back().n;
    // What shared a stream begins with the first page, which stays in F16.
    const bool moves = (flags & MIXKVQ_STATE_SHARED) || end > store.shape().n_cells;
    const int start = moves ? span.cells.front().first / kPageCells * kPageCells : 0;
    if (end - start > store.shape().n_cells) return span.cells;
    CellRuns runs;
    int at = start;
    for (const CellRun & run : span.cells) {
        if (run.first > at) runs.push_back({-1, run.first - at});
        runs.push_back(run);
        at = run.first + run.n;
    }
    return runs;
}

std::string State::read(const uint8_t * data, size_t bytes) {
    if (bytes < kHeader + kTrailer) return "it is truncated";
    if (std::memcmp(data, kMagic, sizeof(kMagic)) != 0) return "it is no packed state";
    StateReader in(data + sizeof(kMagic), bytes - sizeof(kMagic));
    const uint32_t version = in.get<uint32_t>(), format = in.get<uint32_t>();
    if (version != kVersion) return "it is of version " + std::to_string(version) + ", and this program reads version " + std::to_string(kVersion);
    if (format != uint32_t(kFormatVersion)) {
        return "its pages are of format version " + std::to_string(format) + ", and this program's of version " + std::to_string(kFormatVersion);
    }
    const uint64_t n = in.get<uint64_t>();
    if (n > bytes) return "it is truncated: " + std::to_string(bytes) + " bytes of " + std::to_string(n);
    uint64_t sum;
    std::memcpy(&sum, data + bytes - kTrailer, sizeof(sum));
    if (n != bytes || checksum_of(data, bytes - kTrailer) != sum) return "it is damaged: its checksum is another one";
    StateReader all(data, bytes);
    return parse(all);
}

std::string State::load(CacheTensor & cache, const Span & span, int stream, const std::vector<CellMove> & moves) {
    std::lock_guard<std::recursive_mutex> lock(cache.owner->mutex);
    cache.owner->touched = true;
    cache.store->load_stream(stream, span.state, moves, !(flags & MIXKVQ_STATE_SHARED), session->n_threads);
    cache.owner->memory->trim();
    return "";
}

// llama.cpp has said where the rows go.
std::string State::finish() {
    uint64_t rows = 0, expected = 0;
    for (const Access & a : accesses) rows += uint64_t(a.n) * a.cache->row_bytes;
    for (const Span & span : spans) {
        expected += count_of(span.padded) * tensors[span.tensor].row_bytes;
    }
    if (rows != expected) return "llama.cpp asked for other rows than it holds";
    std::string why;
    each_group(accesses, [&](size_t i, size_t end) {
        CacheTensor & cache = *accesses[i].cache;
        auto span = std::upper_bound(spans.begin(), spans.end(), accesses[i].at, [](uint64_t at, const Span & s) { return at < s.at; });
        if (span == spans.begin()) return;
        --span;
        if (span->at != accesses[i].at || cache.name != tensors[span->tensor].name || !difference(tensors[span->tensor], describe(cache)).empty()) {
            why = "llama.cpp asked for rows of another cache";
            return;
        }
        // Row by row, in the order of the state.
        std::vector<CellMove> moves;
        size_t run = 0;
        int used = 0;
        for (size_t j = i; j < end; ++j) {
            for (int to = accesses[j].first, left = accesses[j].n; left > 0 && run < span->padded.size();) {
                const CellRun & from = span->padded[run];
                const int n = std::min(left, from.n - used);
                if (from.first >= 0) moves.push_back({from.first + used, to, n});
                to += n, left -= n, used += n;
                if (used == from.n) ++run, used = 0;
            }
        }
        if (why.empty()) why = load(cache, *span, accesses[i].stream, moves);
    });
    return why;
}

// ---- the interface ----

std::shared_ptr<State> begin_saving(std::shared_ptr<Session> session, uint64_t size, uint32_t flags) {
    auto state = std::make_shared<State>();
    state->session = std::move(session);
    state->flags = flags;
    state->region = Region(size_t(size), true);
    if (size && !state->region.data()) throw std::bad_alloc();
    state->size = size;
    current = state;
    return state;
}

std::shared_ptr<State> begin_loading(std::shared_ptr<Session> session, const void * data, size_t bytes, uint32_t flags, std::string & why) {
    auto state = std::make_shared<State>();
    state->session = std::move(session);
    state->flags = flags;
    why = state->read(static_cast<const uint8_t *>(data), bytes);
    if (!why.empty()) return nullptr;
    current = state;
    return state;
}

void * state_data(State & state, uint64_t * size) {
    *size = state.size;
    return state.region.data();
}

bool finish_saving(State & state, uint64_t n, const StateWriter::Write & to, uint64_t * bytes) {
    current.reset();
    state.size = std::min(state.size, n);
    return state.write(to, bytes);
}

int32_t first_filler(const State & state) { return state.filler; }

std::string finish_loading(State & state) {
    current.reset();
    return state.finish();
}

}  // namespace mixkvq::MIXKVQ_GLUE
