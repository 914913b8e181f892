// A cache under load: long random sequences of everything that is done to one, against rows in F16 that say what each cell holds. Of what is packed, oracle.h
// says how far it may be off; then the rows become what reads back, so that errors do not add up, and until the next packing every read must give them bit by
// bit. Attention is held against a softmax in double over these rows; statistics of queries against sums in double.
//
//   soak [--operations N | --minutes M] [--seed S] [--jobs J]   by default 4000 operations; J cases at a time
//   soak --seed S --case C --until N                            what a failure prints: operation N of that case is the last one
//   soak --faults                                               each fault of faults.h must be noticed
//
// With MIXKVQ_TEST_CUDA the pages are on a GPU (exit code 77 without one), with MIXKVQ_EMULATED as well on an emulated one.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "faults.h"
#include "mixkvq/attention.h"
#include "mixkvq/profile.h"
#include "oracle.h"
#include "places.h"
#ifdef MIXKVQ_EMULATED
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#endif

namespace {

constexpr half kHidden = 0xfc00;
const Kernels & scalar() { return *kernels_for(Isa::scalar); }

// The same numbers with every library.
class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed) {}
    uint32_t bits() {
        uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
        return uint32_t((z ^ (z >> 31)) >> 32);
    }
    int any(int low, int high) { return low + int(bits() % uint32_t(high - low + 1)); }
    bool one_in(int n) { return any(1, n) == 1; }
    float uniform() { return float((bits() >> 8) + 0.5) / 16777216.0f; }
    // Normal, from a table: drawing each would take most of the time.
    void gauss(float * x, int n) {
        static const std::vector<float> table = [] {
            Random random(1);
            std::vector<float> list(1 << 16);
            for (float & y : list) y = std::sqrt(-2 * std::log(random.uniform())) * std::cos(6.2831853f * random.uniform());
            return list;
        }();
        for (int i = 0, m; i < n; i += m) {
            m = std::min(n - i, 64);
            std::copy_n(table.data() + any(0, int(table.size()) - m), m, x + i);
        }
    }

  private:
    uint64_t state_;
};

enum class Kind {
    write, scattered, attention, read, shift, copy, save_f16, restore_f16, restore_f16_part, save_packed, restore_packed, restore_packed_part, erase, clear, rewind, count
};
const char * name_of(Kind kind) {
    const char * names[] = {"writes of batches", "writes into any cells", "attention", "reads", "shifts", "copies of streams", "saves in F16", "restores in F16",
                            "restores in F16, a sequence", "saves packed", "restores packed", "restores packed, a sequence", "erasures", "clears", "rewinds"};
    static_assert(sizeof(names) / sizeof(names[0]) == size_t(Kind::count), "a name for each");
    return names[int(kind)];
}

struct Totals {
    uint64_t operations = 0, of_kind[size_t(Kind::count)] = {}, pages_packed = 0, cells_read = 0, attended = 0, cases = 0;
    int most_pages = 0, least_pages = 1 << 30;
    Worst worst;

    void take(const Totals & other) {
        operations += other.operations, pages_packed += other.pages_packed, cells_read += other.cells_read, attended += other.attended, cases += other.cases;
        for (size_t i = 0; i < size_t(Kind::count); ++i) of_kind[i] += other.of_kind[i];
        most_pages = std::max(most_pages, other.most_pages), least_pages = std::min(least_pages, other.least_pages);
        worst.take(other.worst);
    }
};

// What a case is made of.
struct Plan {
    bool large = false, gentle = false;  // gentle: streams stay one text after the other, so that what becomes of their statistics is known
    Isa isa = Isa::scalar;
    int heads = 1, group = 1, d = 64, dv = 64, n_seqs = 1;
    bool few_records = false, prior = false;
    bool extreme = false;  // rows beside which others do not count: attention is then only seen to be finite
    float softcap = 0;
    StoreShape shape;  // of the keys
    std::vector<KeyFormat> keys;
    std::vector<ValueFormat> values;

    std::string text() const {
        char line[300];
        std::snprintf(line, sizeof(line), "%s, %d pages, %d streams, %d heads of %d/%d, group %d, tiers %d,%d,%d,%d,%d/%d, values %d/%d, window %d, sinks %d%s%s%s%s",
                      isa_name(isa), shape.n_pages(), shape.n_streams, heads, d, dv, group, keys[0].n16, keys[0].n8, keys[0].n4, keys[0].n3, keys[0].n2, keys[0].group,
                      values[0].bits, values[0].group, shape.window, shape.sinks, few_records ? ", few records" : "", n_seqs > 1 ? ", unified" : "", gentle ? ", gentle" : "", extreme ? ", extreme" : "");
        return line;
    }
};

Plan draw_plan(Random & random, uint64_t number) {
    Plan plan;
#ifdef MIXKVQ_EMULATED
    const int head_sizes[] = {32, 64, 40};
    const int most_cells = 900, large_cells = 0;
#else
    const int head_sizes[] = {32, 64, 40, 80, 128, 96, 256};
    const int most_cells = 2500, large_cells = 300000;
#endif
    plan.large = large_cells > 0 && number % 40 == 7;
    plan.gentle = random.one_in(2);
    std::vector<Isa> sets;
    for (Isa isa : kIsas) {
        if (isa_supported(isa)) sets.push_back(isa);
    }
    plan.isa = plan.large ? sets.back() : sets[number % sets.size()];
    const int n_sizes = plan.large || plan.isa == Isa::scalar ? 3 : int(sizeof(head_sizes) / sizeof(int));
    plan.d = head_sizes[random.any(0, n_sizes - 1)], plan.dv = random.one_in(4) ? head_sizes[random.any(0, n_sizes - 1)] : plan.d;
    plan.heads = plan.large ? 1 : random.any(1, 2), plan.group = random.any(1, 4);
    plan.n_seqs = plan.gentle ? 1 : random.any(1, 3);
    plan.extreme = random.one_in(6);
    plan.few_records = random.one_in(5), plan.prior = random.one_in(3), plan.softcap = random.one_in(4) ? 20.0f : 0.0f;
    StoreShape & s = plan.shape;
    s.row = plan.heads * plan.d, s.n_streams = plan.large ? random.any(1, 2) : random.any(1, 3);
    s.n_cells = plan.large ? random.any(130000, large_cells) : random.any(400, most_cells);
    const int lengths[] = {128, 128, 0, 200, 300, 37};
    s.window = lengths[random.any(0, 5)], s.sinks = lengths[random.any(0, 5)];
    for (int h = 0; h < plan.heads; ++h) {
        const auto any_preset = [&]() -> const Preset & { return presets()[random.any(0, int(presets().size()) - 1)]; };
        plan.keys.push_back(key_format(any_preset(), plan.d));
        plan.values.push_back(value_format(any_preset(), plan.dv));
        if (random.one_in(3)) plan.values.back().bits = std::vector<int>{2, 3, 4, 8}[random.any(0, 3)], plan.values.back().group = 32 * random.any(0, 2);
        if (random.one_in(3)) plan.keys.back().group = 32 << random.any(0, 2);
    }
    return plan;
}

// A page as it reads back.
struct ModelPage {
    std::vector<half> rows;    // none: it is empty
    CellMask valid, carried;   // carried: this row came out of a record
    bool pristine = false;     // all of it came out of one record
    bool settled = false;
    uint64_t written = 0;
    std::vector<float> steps;  // settled: of each head, times attention's share of them; oracle.h
};

struct Counted {
    double n = 0;
    std::vector<double> abs, sqr;
};

struct Stream {
    std::vector<uint8_t> owner;   // by cell: 1 + the sequence whose token it holds, 0: nobody sees it
    std::vector<uint32_t> order;  // when it was written
    uint32_t n_written = 0;
    int end = 0;                  // where the next batch goes
    uint64_t clock = 0;
    int newest = -1;              // page
    Counted counted;

    // One text from the first cell on, written batch by batch and rewound now and then: the rules of docs/architecture.md, "What the masks tell", are few then.
    bool simple = true;
    int last_first = 0;           // cell of the batch before
    uint64_t rows = 0;
    struct Mark {
        int number, cell;
        uint64_t rows;
        Counted then;
    };
    std::vector<Mark> marks;
};

// The keys or the values.
struct Side {
    bool is_value = false;
    int row = 0, d = 0;
    std::unique_ptr<PageStore> store;
    std::vector<ModelPage> pages;  // [stream][page]
    int capacity = 0;              // records
};

// Which cells a token of a batch sees: those of its sequence that were not written after it.
struct Token {
    int seq;
    uint32_t order;
};

class Soak {
  public:
    Soak(const Plan & drawn, uint64_t seed, Fault fault, Totals & sums)
        : plan(drawn), random(seed), totals(sums), kernels(*kernels_for(drawn.isa)),
#ifdef MIXKVQ_TEST_CUDA
          place(Where::gpu, kernels)
#else
          place(Where::host, kernels)
#endif
    {
        const Place::Wrap wrap = [&, fault](std::unique_ptr<PageMemory> memory) -> std::unique_ptr<PageMemory> {
            if (fault == Fault::none) return memory;
            return std::make_unique<FaultyMemory>(std::move(memory), fault, is_value_next ? plan.heads * plan.dv : plan.heads * plan.d);
        };
        for (Side & side : sides) {
            side.is_value = is_value_next = &side == &sides[1];
            side.d = side.is_value ? plan.dv : plan.d, side.row = plan.heads * side.d;
            StoreShape shape = plan.shape;
            shape.is_value = side.is_value, shape.row = side.row;
            size_t record_bytes = 0;
            for (int h = 0; h < plan.heads; ++h) record_bytes += side.is_value ? plan.values[h].record_bytes() : plan.keys[h].record_bytes();
            side.capacity = plan.few_records ? std::min(3, shape.record_pages() * shape.n_streams) : shape.record_pages() * shape.n_streams;
            side.store = place.store(shape, reserve_bytes(shape, 0) + side.capacity * record_bytes, wrap);
            if (side.is_value) {
                side.store->set_formats(plan.values);
            } else {
                std::vector<float> prior(plan.prior ? side.row : 0);
                for (float & x : prior) x = float(random.any(1, 100));
                side.store->set_formats(plan.keys, prior);
            }
            side.pages.resize(size_t(shape.n_streams) * shape.n_pages());
        }
        streams.resize(plan.shape.n_streams);
        for (Stream & s : streams) s.owner.resize(plan.shape.n_cells), s.order.resize(plan.shape.n_cells), s.counted = nothing();
        loud.resize(std::max(sides[0].row, sides[1].row));
        offset.resize(loud.size());
        random.gauss(offset.data(), int(offset.size()));
        for (float & x : loud) x = random.one_in(16) ? 8.0f : std::exp2(float(random.any(-2, 2)));
        totals.most_pages = std::max(totals.most_pages, plan.shape.n_pages()), totals.least_pages = std::min(totals.least_pages, plan.shape.n_pages());
    }

    void run(int n_operations) {
        for (n_done = 0; n_done < n_operations;) operation();
        finish();
        ++totals.cases;
    }

    int n_done = 0;

  private:
    // ---- one operation after the other ----

    void done(Kind kind) { ++n_done, ++totals.operations, ++totals.of_kind[size_t(kind)]; }

    void operation() {
        const int rare = plan.large ? 4 : 1;
        int at = random.any(0, 999);
        const auto with = [&](int weight) { return (at -= weight) < 0; };
        if (with(20 / rare)) clear();
        else if (with(85)) rewind();
        else if (with(60)) shift();
        else if (with(50 / rare)) copy();
        else if (with(60 / rare)) restore_packed();
        else if (with(60)) read();
        else if (with(140)) attention_alone();
        else if (!plan.gentle && with(50)) scattered();
        else if (!plan.gentle && with(50)) erase();
        else if (with((plan.gentle ? 20 : 40) / rare)) restore_f16();
        else if (with((plan.gentle ? 15 : 40) / rare)) restore_f16_part();
        else if (with((plan.gentle ? 15 : 60) / rare)) restore_packed_part();
        else batch();
        for (Side & side : sides) {
            absorb(side);
            if (random.one_in(4)) check_page(side, any_stream(), random.any(0, n_pages() - 1));
        }
        check_statistics();
    }

    void finish() {
        for (Side & side : sides) {
            for (int s = 0; s < n_streams(); ++s) {
                for (int p = 0; p < n_pages(); ++p) check_page(side, s, p);
            }
            side.store->clear();
        }
        place.pool.trim();
        EXPECT(place.pool.bytes() == 0, "%zu bytes of scratch are held by nobody", place.pool.bytes());
    }

    int n_streams() const { return plan.shape.n_streams; }
    int n_cells() const { return plan.shape.n_cells; }
    int n_pages() const { return plan.shape.n_pages(); }
    int any_stream() { return random.any(0, n_streams() - 1); }
    ModelPage & at(Side & side, int s, int p) { return side.pages[size_t(s) * n_pages() + p]; }
    const half * row_of(const Side & side, int s, int cell) const {
        return side.pages[size_t(s) * n_pages() + cell / kPageCells].rows.data() + size_t(cell % kPageCells) * side.row;
    }
    Counted nothing() const { return {0, std::vector<double>(plan.heads * plan.d), std::vector<double>(plan.heads * plan.d)}; }
    static constexpr int kOddSizes[] = {1, 1, 1, 2, 3, 5, 7, 13, 17, 31, 33, 63, 65, 97, 127, 129, 255, 300};

    // ---- rows ----

    // Rows of every kind that a cache may be given, and what it must make of them.
    struct Rows2 {
        std::vector<uint8_t> data;
        std::vector<half> stored;
        size_t stride = 0;
        bool is_half = false;
        Rows rows() const { return {data.data(), stride, is_half}; }
    };
    Rows2 draw_rows(const Side & side, int n) {
        Rows2 r;
        const int row = side.row;
        r.is_half = random.one_in(2);
        r.stride = size_t(row + random.any(0, 1) * 8) * (r.is_half ? 2 : 4);
        r.data.resize(n * r.stride), r.stored.resize(size_t(n) * row);
        std::vector<float> x(row);
        for (int i = 0; i < n; ++i) {
            random.gauss(x.data(), row);
            const float size = plan.extreme && random.one_in(50) ? 100.0f : 1.0f;
            for (int d = 0; d < row; ++d) x[d] = size * (loud[d] * x[d] + offset[d]);
            if (random.one_in(200)) std::fill(x.begin(), x.end(), random.one_in(2) ? 0.0f : 1.5f);
            if (plan.extreme && random.one_in(100)) x[random.any(0, row - 1)] = random.one_in(2) ? 65504.0f : -65504.0f;
            half * to = &r.stored[size_t(i) * row];
            if (!r.is_half && random.one_in(50)) x[random.any(0, row - 1)] = std::vector<float>{NAN, INFINITY, -INFINITY, 1e6f}[random.any(0, plan.extreme ? 3 : 0)];
            scalar().to_half(x.data(), to, row);
            if (r.is_half) {
                std::memcpy(&r.data[i * r.stride], to, 2 * row);
                if (random.one_in(50)) {
                    const int d = random.any(0, row - 1), which = random.any(0, plan.extreme ? 2 : 0);
                    const half odd[3] = {0x7e01, 0x7c00, 0xfc00}, kept[3] = {0, 0x7bff, 0xfbff};
                    std::memcpy(&r.data[i * r.stride + 2 * d], &odd[which], 2);
                    to[d] = kept[which];
                }
            } else {
                std::memcpy(&r.data[i * r.stride], x.data(), 4 * row);
            }
        }
        return r;
    }

    void put_row(Side & side, int s, int cell, const half * row, bool carried) {
        ModelPage & page = at(side, s, cell / kPageCells);
        if (page.rows.empty()) page.rows.resize(size_t(kPageCells) * side.row);
        std::copy_n(row, side.row, page.rows.begin() + size_t(cell % kPageCells) * side.row);
        page.valid.set(cell % kPageCells);
        unset(page.carried, cell % kPageCells);
        if (carried) page.carried.set(cell % kPageCells);
        page.pristine = page.settled = false;
    }
    static void unset(CellMask & mask, int t) { mask.word[t >> 6] &= ~(uint64_t(1) << (t & 63)); }

    // New rows into cells, of both sides.
    void write(int s, const std::vector<int> & cells, int seq) {
        std::vector<PageStore::Cell> places;
        for (int cell : cells) places.push_back({s, cell});
        for (Side & side : sides) {
            const Rows2 rows = draw_rows(side, int(cells.size()));
            side.store->write(places.data(), int(places.size()), rows.rows());
            for (size_t i = 0; i < cells.size(); ++i) {
                put_row(side, s, cells[i], &rows.stored[i * side.row], false);
                at(side, s, cells[i] / kPageCells).written = streams[s].clock + i + 1;
            }
        }
        Stream & stream = streams[s];
        stream.clock += cells.size(), stream.newest = cells.back() / kPageCells;
        for (int cell : cells) stream.owner[cell] = uint8_t(seq + 1), stream.order[cell] = ++stream.n_written;
    }

    // ---- batches ----

    void batch() {
        const int s = any_stream();
        Stream & stream = streams[s];
        int n = plan.large && random.one_in(3) ? random.any(500, 6000) : kOddSizes[random.any(0, int(sizeof(kOddSizes) / sizeof(int)) - 1)];
        n = std::min(n, n_cells());
        if (stream.end + n > n_cells()) {
            if (stream.simple) return rewind();
            stream.end = random.any(0, n_cells() - n);
        }
        const int seq = plan.n_seqs > 1 ? random.any(0, plan.n_seqs - 1) : 0;
        if (seq > 0 && stream.simple) stream.simple = false;
        settle();
        std::vector<int> cells;
        for (int i = 0; i < n; ++i) cells.push_back(stream.end + i);
        write_and_look(s, cells, seq);
        done(Kind::write);
    }

    // The cells of a simple stream that the batch writes over are not seen by it: those behind are, for nobody.
    void write_and_look(int s, const std::vector<int> & cells, int seq) {
        Stream & stream = streams[s];
        const int first = cells[0], n = int(cells.size());
        if (stream.simple) looked(stream, first, n);
        for (int i = first; i < stream.end && stream.simple; ++i) stream.owner[i] = 0;
        write(s, cells, seq);
        stream.end = cells.back() + 1;
        std::vector<Token> tokens;
        for (int cell : cells) tokens.push_back({seq, stream.order[cell]});
        const int seen = cells_seen(s, 1);
        if (int64_t(n) * seen <= (1 << 20)) return attend(s, 1, tokens, seen);
        // A batch too long to write its mask down: every cell up to the last one is seen.
        if (!stream.simple) return;
        for (Side & side : sides) side.store->look({nullptr, true, 0, 0, n, 1, s, stream.end});
        settle();
    }

    // What the next batch makes of the statistics of a simple stream.
    void looked(Stream & s, int first, int n) {
        const int tip = s.end - 1;
        const bool rewound = tip >= first;
        const auto lose = [&](auto && is_lost) { s.marks.erase(std::remove_if(s.marks.begin(), s.marks.end(), is_lost), s.marks.end()); };
        lose([&](const Stream::Mark & m) { return m.cell >= first && m.cell < first + n; });
        if (rewound && s.last_first >= first) {
            lose([&](const Stream::Mark & m) { return m.cell >= first; });
            const Stream::Mark then = s.marks.empty() ? Stream::Mark{0, 0, 0, nothing()} : s.marks.back();
            for (double & x : s.counted.sqr) x *= s.counted.n > 0 ? then.then.n / s.counted.n : 0;
            s.counted.abs = then.then.abs, s.counted.n = then.then.n;
            if (s.counted.n == 0) s.counted = nothing();
            s.rows = then.rows;
        } else if (!rewound && tip >= 0 && s.rows <= uint64_t(n_cells())) {
            int number = -1;
            for (uint64_t m = 128; m <= s.rows; m *= 4) ++number;
            if (number > (s.marks.empty() ? -1 : s.marks.back().number)) s.marks.push_back({number, tip, s.rows, s.counted});
        }
        s.rows += n;
        s.last_first = first;
    }

    // A stream goes back to a prefix, or a sequence loses its last tokens, and another continuation is written over them.
    void rewind() {
        const int s = any_stream();
        Stream & stream = streams[s];
        settle();
        std::vector<int> cells;
        const int most = plan.large ? 8 : random.any(1, 100);
        int seq = 0;
        if (stream.simple) {
            if (stream.end == 0) return batch();
            const int first = random.one_in(6) ? 0 : random.one_in(3) ? std::max(0, stream.end - random.any(1, 9)) : random.any(0, stream.end - 1);
            for (int i = first; i < std::min(first + most, n_cells()); ++i) cells.push_back(i);
        } else {
            seq = random.any(0, plan.n_seqs - 1);
            for (int i = stream.end; i-- > 0 && int(cells.size()) < most;) {
                if (stream.owner[i] == seq + 1) stream.owner[i] = 0, cells.push_back(i);
            }
            if (cells.empty()) return batch();
            std::reverse(cells.begin(), cells.end());
        }
        const int end = stream.end;
        write_and_look(s, cells, seq);
        if (!stream.simple) stream.end = std::max(end, stream.end);
        done(Kind::rewind);
    }

    void scattered() {
        const int s = any_stream();
        std::vector<int> cells;
        if (random.one_in(3)) {  // whole pages among them, which are not unpacked to be written over
            const int n = random.any(kPageCells, 300), first = random.one_in(2) ? random.any(0, (n_cells() - n) / kPageCells) * kPageCells : random.any(0, n_cells() - n);
            for (int i = 0; i < n; ++i) cells.push_back(first + i);
        } else {
            for (int n = random.any(1, 20); n > 0; --n) cells.push_back(random.any(0, n_cells() - 1));
            std::sort(cells.begin(), cells.end());
            cells.erase(std::unique(cells.begin(), cells.end()), cells.end());
            for (size_t i = cells.size(); i > 1; --i) std::swap(cells[i - 1], cells[random.any(0, int(i) - 1)]);
        }
        streams[s].simple = false;
        write(s, cells, random.any(0, plan.n_seqs - 1));
        streams[s].end = std::max(streams[s].end, *std::max_element(cells.begin(), cells.end()) + 1);
        done(Kind::scattered);
    }

    // ---- attention ----

    int cells_seen(int first, int n) const {
        int seen = 1;
        for (int s = first; s < first + n; ++s) seen = std::max(seen, streams[s].end);
        return std::min((seen + 31) / 32 * 32, n_cells());
    }

    void attention_alone() {
        const int first = any_stream(), n = random.any(1, n_streams() - first);
        std::vector<Token> tokens;
        const int seen = cells_seen(first, n);
        const int most = std::max(1, std::min(random.one_in(4) ? 70 : 4, (1 << 19) / seen));
        for (int i = random.any(1, most); i > 0; --i) tokens.push_back({random.any(0, plan.n_seqs - 1), 0xffffffffu});
        attend(first, n, tokens, seen);
    }

    void attend(int first, int n, const std::vector<Token> & tokens, int n_kv) {
        const int n_tokens = int(tokens.size()), n_heads = plan.heads * plan.group;
        std::vector<half> mask(size_t(n) * n_tokens * n_kv, kHidden);
        for (int s = 0; s < n; ++s) {
            const Stream & stream = streams[first + s];
            for (int t = 0; t < n_tokens; ++t) {
                half * row = &mask[(size_t(s) * n_tokens + t) * n_kv];
                for (int i = 0; i < n_kv; ++i) {
                    if (stream.owner[i] == tokens[t].seq + 1 && stream.order[i] <= tokens[t].order) row[i] = 0;
                }
            }
        }
        AttentionCall call;
        call.q_head = plan.d, call.q_token = size_t(n_heads) * plan.d, call.q_stream = call.q_token * n_tokens;
        call.out_head = plan.dv, call.out_token = size_t(n_heads) * plan.dv, call.out_stream = call.out_token * n_tokens;
        call.mask_token = n_kv, call.mask_stream = size_t(n_kv) * n_tokens;
        call.n_tokens = n_tokens, call.n_heads = n_heads, call.n_streams = n, call.first_stream = first, call.n_kv = n_kv;
        call.scale = 1 / std::sqrt(float(plan.d)), call.softcap = plan.softcap;
        std::vector<float> q(call.q_stream * n), out(call.out_stream * n, NAN), sinks(random.one_in(4) ? n_heads : 0);
        random.gauss(q.data(), int(q.size()));
        const float size = random.one_in(4) ? 3.0f : 1.0f;
        for (size_t i = 0; i < q.size(); ++i) q[i] *= size * (i % plan.d % 7 == 3 ? 1.5f : 0.3f);
        for (float & x : sinks) x = 2 * float(random.any(-2, 2));
        compute(call, q, mask, sinks, out);
        for (int s = 0; s < n; ++s) count(streams[first + s], &q[s * call.q_stream], n_tokens, n_heads);
        for (int i = 0; i < (plan.large ? 1 : 3); ++i) {
            const int s = random.any(0, n - 1), t = random.any(0, n_tokens - 1), h = random.any(0, n_heads - 1);
            check_attention(call, first + s, &mask[(size_t(s) * n_tokens + t) * n_kv], &q[s * call.q_stream + t * call.q_token + h * call.q_head], h,
                            sinks.empty() ? nullptr : &sinks[h], &out[s * call.out_stream + t * call.out_token + h * call.out_head]);
        }
        settle();
        done(Kind::attention);
    }

    void compute(AttentionCall call, const std::vector<float> & q, const std::vector<half> & mask, const std::vector<float> & sinks, std::vector<float> & out) {
#ifdef MIXKVQ_TEST_CUDA
        for (Side & side : sides) side.store->look(call.view(mask.data()));
#endif
        const Place::There<float> q_there(place, q), out_there(place, out), sinks_there(place, sinks);
        const Place::There<half> mask_there(place, mask);
        call.q = q_there.data(), call.out = out_there.data(), call.mask = mask_there.data(), call.sinks = sinks.empty() ? nullptr : sinks_there.data();
#ifdef MIXKVQ_TEST_CUDA
        mixkvq::attention(*sides[0].store, *place.gpu[0], *sides[1].store, *place.gpu[1], call);
        place.queue->synchronize();
        EXPECT(!place.queue->error(), "%s", place.queue->error());
#else
        mixkvq::attention(kernels, *sides[0].store, *sides[1].store, call, random.any(1, 2), workspace);
#endif
        out_there.fetch(out);
    }

    // A softmax in double over the rows as they read back, for one query of one head. The tolerance is what the steps give: four standard deviations, where each
    // packed number of a key and of a value is off by attention's share of its step (oracle.h) and by what reading back rounds to F16, all of them independent of
    // each other, and sums in F32 by a few of their last bits.
    void check_attention(const AttentionCall & call, int s, const half * mask, const float * q, int head, const float * sink, const float * got) {
        const int kv = head / plan.group, d = plan.d, dv = plan.dv;
        const KeyFormat & f = plan.keys[kv];
        std::vector<double> weight(call.n_kv, 0.0), spread(call.n_kv, 0.0), out(dv);
        double top = sink ? *sink : -INFINITY, sum = 0, square = 0, noise = 0, linear = 0;
        std::vector<double> of_group(f.n_groups());
        for (int p = 0; p * kPageCells < call.n_kv; ++p) {
            const ModelPage & page = at(sides[0], s, p);
            const bool packed = page.settled && !page.rows.empty();
            for (int g = 0; g < f.n_groups() && packed; ++g) {
                of_group[g] = 0;
                for (int j = 0; j < d; ++j) of_group[g] += std::pow(double(q[j]) * page.steps[(size_t(kv) * d + j) * f.n_groups() + g], 2) / 12;
            }
            for (int i = p * kPageCells; i < std::min((p + 1) * kPageCells, call.n_kv); ++i) {
                if (mask[i] == kHidden) continue;
                const half * key = row_of(sides[0], s, i) + kv * d;
                double x = 0, rounding = 0, sizes = 0;
                for (int j = 0; j < d; ++j) {
                    const double term = double(q[j]) * number(key[j]);
                    x += term, rounding += term * term, sizes += std::fabs(term);
                }
                x *= call.scale;
                if (call.softcap > 0) x = call.softcap * std::tanh(x / call.softcap);
                const double off = (packed ? of_group[i % kPageCells / f.group] + std::ldexp(rounding, -22) / 3 : 0) + std::pow(std::ldexp(sizes, -23), 2);
                spread[i] = call.scale * std::sqrt(off);  // of a logit: steps, F16, sums in F32
                weight[i] = x, top = std::max(top, x);
            }
        }
        if (sink) sum = std::exp(*sink - top);
        for (int i = 0; i < call.n_kv; ++i) {
            if (mask[i] == kHidden) continue;
            const double w = std::exp(weight[i] - top);
            sum += w;
            if (w < 1e-30) continue;
            const half * value = row_of(sides[1], s, i) + kv * dv;
            for (int j = 0; j < dv; ++j) out[j] += w * number(value[j]);
        }
        for (double & x : out) x = sum > 0 ? x / sum : 0;
        for (int i = 0; i < call.n_kv; ++i) {
            if (mask[i] == kHidden) continue;
            // The weight, and by how much four deviations of its logit change it.
            const double w = std::exp(weight[i] - top) / sum;
            const double w_off = std::min(1.0, std::exp(std::min(0.0, weight[i] - top + 4 * spread[i])) / sum * -std::expm1(-4 * spread[i]));
            if (w < 1e-9 && w_off < 1e-9) continue;
            const ModelPage & page = at(sides[1], s, i / kPageCells);
            const half * value = row_of(sides[1], s, i) + kv * dv;
            double apart = 0, size = 0;
            for (int j = 0; j < dv; ++j) apart += std::pow(number(value[j]) - out[j], 2), size += std::pow(number(value[j]), 2);
            const double step = page.settled ? page.steps[size_t(kv) * kPageCells + i % kPageCells] : 0;
            const bool is_small = 4 * spread[i] < 0.5;
            if (!is_small) linear += w_off * std::sqrt(apart);  // keys of a page share the rounding of a query
            noise += (is_small ? w_off * w_off * apart : 0) + 16 * w * w * (dv * step * step / 12 + (page.settled ? std::ldexp(size, -22) / 3 : 0));
            square += w * size;
        }
        for (int j = 0; j < dv; ++j) EXPECT(std::isfinite(got[j]) && (sum > 0 || got[j] == 0), "attention of stream %d, head %d gives %g", s, head, got[j]);
        ++totals.attended;
        if (plan.extreme) return;
        double error = 0;
        for (int j = 0; j < dv; ++j) error += std::pow(double(got[j]) - out[j], 2);
#ifdef MIXKVQ_TEST_CUDA
        float q_size = 1;
        for (int j = 0; j < d; ++j) q_size = std::max(q_size, std::fabs(q[j]));
        const double of_values = 2e-3 * q_size;  // of a GPU: it rounds queries and weights to F16, as stock attention does (test_cuda_attention.cpp)
#else
        // Weights are rounded to a grid for each page, and what that loses does not average out over a thousand pages; stock attention rounds them to F16.
        const double of_values = 1e-3;
#endif
        const double tolerance = std::sqrt(noise) + linear + of_values * std::sqrt(square) + 1e-12, ratio = std::sqrt(error) / tolerance;
        EXPECT(ratio <= 1, "attention of stream %d, head %d over %d cells is off by %g, and %g is what the steps give", s, head, call.n_kv, std::sqrt(error), tolerance);
        totals.worst.attention = std::max(totals.worst.attention, ratio);
    }

    void count(Stream & stream, const float * q, int n_tokens, int n_heads) {
        if (!stream.simple) return know_statistics(stream);  // what a batch makes of them is History's, which test_history.cpp is about
        Counted & sums = stream.counted;
        for (int i = 0; i < n_tokens * n_heads * plan.d; ++i) {
            const int at = i / plan.d % n_heads / plan.group * plan.d + i % plan.d;
            const double x = std::fabs(double(q[i]));
            sums.abs[at] += x, sums.sqr[at] += x * x;
        }
        for (sums.n += n_tokens * plan.group; sums.n > 8192; sums.n /= 2) {
            for (double & x : sums.abs) x /= 2;
            for (double & x : sums.sqr) x /= 2;
        }
    }

    // ---- packing ----

    void settle() {
        for (Side & side : sides) settle(side);
    }

    // What a simple stream must pack, and what it may.
    void settle(Side & side) {
        absorb(side);
        std::vector<std::pair<int, int>> ready;
        std::vector<int> staying(n_streams());
        const auto is_ready = [&](int s, const ModelPage & page, int p) {
            return p >= side.store->shape().sink_pages() && p != streams[s].newest && page.valid.full() && streams[s].clock - page.written >= uint64_t(plan.shape.window);
        };
        for (int s = 0; s < n_streams(); ++s) {
            for (int p = 0; p < n_pages(); ++p) {
                const ModelPage & page = at(side, s, p);
                if (page.rows.empty() || page.settled) continue;
                if (is_ready(s, page, p)) ready.push_back({s, p});
                else ++staying[s];
            }
        }
        EXPECT(side.store->settle(random.any(1, 2)), "settle");
        for (int s = 0; s < n_streams(); ++s) {
            for (int p = 0; p < n_pages(); ++p) {
                const ModelPage & page = at(side, s, p);
                if (page.settled || !side.store->page(s, p).settled()) continue;
                EXPECT(p >= side.store->shape().sink_pages() && (p != streams[s].newest), "page %d of stream %d may not be packed", p, s);
                const bool early = staying[s] > side.store->shape().home_pages();
                EXPECT(!streams[s].simple || early || is_ready(s, page, p), "page %d of stream %d is packed too early", p, s);
            }
        }
        for (auto [s, p] : ready) {
            const bool room = side.store->pages_packed() < side.capacity;
            EXPECT(!streams[s].simple || !room || side.store->page(s, p).settled(), "page %d of stream %d is full and old and stays in F16", p, s);
        }
        absorb(side);
    }

    // The books of the store against the model's; what has been packed since the last time is judged, and becomes what reads back.
    void absorb(Side & side) {
        for (int s = 0; s < n_streams(); ++s) {
            for (int p = 0; p < n_pages(); ++p) {
                const PageStore::Page & page = side.store->page(s, p);
                ModelPage & model = at(side, s, p);
                EXPECT(page.empty() == model.rows.empty() && !std::memcmp(&page.valid, &model.valid, sizeof(page.valid)), "page %d of stream %d holds other cells", p, s);
                if (!page.settled() && model.settled) model.settled = false, model.steps.clear();
                if (page.settled() && !model.settled) judge(side, s, p);
            }
        }
    }

    int cells_of(int p) const { return std::min(kPageCells, n_cells() - p * kPageCells); }

    void judge(Side & side, int s, int p) {
        ModelPage & model = at(side, s, p);
        std::vector<half> got(size_t(kPageCells) * side.row);
        side.store->read(s, p * kPageCells, cells_of(p), got.data());
        Region records(side.store->records_per_page());
        side.store->memory().get_records(side.store->page(s, p).records, records.data());
        const std::vector<float> importance = side.is_value ? std::vector<float>() : side.store->importance(s);
        const bool exact = model.pristine && model.valid.full();
        // Extreme rows, loud in one channel, may look like those of a record: docs/format.md says so.
        CellMask carried = plan.extreme && side.is_value ? CellMask::all() : model.carried;
        for (int w = 0; w < 2; ++w) carried.word[w] &= model.valid.word[w];
        model.steps.assign(side.is_value ? size_t(plan.heads) * kPageCells : size_t(side.row) * 4, 0.0f);
        try {
            size_t at_record = 0;
            for (int h = 0; h < plan.heads; ++h) {
                const PackedHead head = {model.rows.data() + h * side.d, got.data() + h * side.d, size_t(side.row), model.valid, carried, exact, records.data() + at_record};
                if (!side.is_value) {
                    const KeyFormat & f = plan.keys[h];
                    check_keys(f, head, importance.data() + h * side.d, model.steps.data() + size_t(h) * side.d * f.n_groups(), totals.worst);
                    at_record += f.record_bytes();
                } else {
                    const ValueFormat & f = plan.values[h];
                    (f.rotated() ? check_rotated : check_grouped)(f, head, model.steps.data() + size_t(h) * kPageCells, totals.worst);
                    at_record += f.record_bytes();
                }
            }
        } catch (const Mismatch & wrong) {
            throw Mismatch(std::string(side.is_value ? "values" : "keys") + ", page " + std::to_string(p) + " of stream " + std::to_string(s) + ": " + wrong.what());
        }
        model.rows = got;
        model.carried = model.valid, model.pristine = model.settled = true;
        ++totals.pages_packed;
    }

    // ---- reads ----

    void check_cells(Side & side, int s, int first, int n) {
        std::vector<half> got(size_t(n) * side.row);
        side.store->read(s, first, n, got.data());
        const std::vector<half> zeros(side.row);
        for (int i = 0; i < n; ++i) {
            const bool empty = at(side, s, (first + i) / kPageCells).rows.empty();
            EXPECT(!std::memcmp(&got[size_t(i) * side.row], empty ? zeros.data() : row_of(side, s, first + i), 2 * side.row), "%s: cell %d of stream %d reads back differently",
                   side.is_value ? "values" : "keys", first + i, s);
        }
        totals.cells_read += n;
    }
    void check_page(Side & side, int s, int p) { check_cells(side, s, p * kPageCells, cells_of(p)); }

    void read() {
        const int n = random.any(1, std::min(n_cells(), random.one_in(8) ? 2000 : 200));
        for (Side & side : sides) check_cells(side, any_stream(), random.any(0, n_cells() - n), n);
        done(Kind::read);
    }

    void know_statistics(Stream & stream) {
        std::vector<float> abs(sides[0].row), sqr(sides[0].row);
        const bool any = sides[0].store->query_statistics(abs.data(), sqr.data(), int(&stream - streams.data()));
        stream.counted = {any ? 1.0 : 0.0, {abs.begin(), abs.end()}, {sqr.begin(), sqr.end()}};
    }

    void check_statistics() {
        std::vector<float> abs(sides[0].row), sqr(sides[0].row);
        for (int s = 0; s < n_streams(); ++s) {
            const Counted & sums = streams[s].counted;
            EXPECT(sides[0].store->query_statistics(abs.data(), sqr.data(), s) == (sums.n > 0), "%g queries of stream %d", sums.n, s);
            for (int i = 0; i < sides[0].row && sums.n > 0; ++i) {
                EXPECT(std::fabs(abs[i] * sums.n - sums.abs[i]) <= 1e-4 * sums.abs[i] && std::fabs(sqr[i] * sums.n - sums.sqr[i]) <= 1e-4 * sums.sqr[i],
                       "stream %d, channel %d: mean |q| %g and q^2 %g, not %g and %g", s, i, abs[i], sqr[i], sums.abs[i] / sums.n, sums.sqr[i] / sums.n);
            }
        }
    }

    // ---- everything else ----

    // The keys of some pages turn, as by a change of positions.
    void shift() {
        const int s = any_stream();
        const int first = random.any(0, n_pages() - 1), last = std::min(n_pages(), first + (plan.large ? random.any(1, 20) : random.any(1, n_pages())));
        const float angle = 0.001f * float(random.any(-3000, 3000));
        const int heads = plan.heads, d = plan.d, row = sides[0].row;
        const auto turn = [=](half * rows) {
            std::vector<float> x(row), y(row);
            for (int t = 0; t < kPageCells; ++t) {
                scalar().from_half(rows + size_t(t) * row, x.data(), row);
                for (int i = 0; i < heads * d; ++i) {
                    const int h = i / d * d, j = i % d;
                    const float a = angle * std::pow(0.7f, float(j / 2)), c = std::cos(a), sine = std::sin(a);
                    y[i] = j % 2 ? x[h + j] * c + x[h + j - 1] * sine : x[h + j] * c - x[h + j + 1] * sine;
                }
                scalar().to_half(y.data(), rows + size_t(t) * row, row);
            }
        };
        Side & keys = sides[0];
        absorb(keys);
        for (int p = first; p < last; ++p) {
            ModelPage & page = at(keys, s, p);
            if (page.rows.empty()) continue;
            keys.store->edit_page(s, p, random.any(1, 2), [&](half * rows) { place.edit(rows, kPageCells * row, turn); });
            turn(page.rows.data());
            page.pristine = page.settled = false;  // carried stays: channels that hardly turn are still those of a record
        }
        done(Kind::shift);
    }

    void copy() {
        const int from = any_stream(), to = any_stream();
        for (Side & side : sides) {
            side.store->copy_stream(*side.store, from, to);
            for (int p = 0; p < n_pages(); ++p) {
                at(side, to, p) = at(side, from, p);
                EXPECT(!side.store->page(to, p).settled() || at(side, from, p).settled, "a copy has been packed");
            }
        }
        streams[to] = streams[from];
        done(Kind::copy);
    }

    void begin_anew(Stream & stream) {
        std::fill(stream.owner.begin(), stream.owner.end(), uint8_t(0));
        stream.end = 0, stream.simple = true, stream.last_first = 0, stream.rows = 0;
        stream.marks.clear();
        stream.counted = nothing();
    }

    void clear() {
        for (Side & side : sides) {
            side.store->clear();
            for (ModelPage & page : side.pages) page = ModelPage();
        }
        for (Stream & stream : streams) begin_anew(stream), stream.clock = 0, stream.newest = -1;
        done(Kind::clear);
    }

    void erase() {
        const int s = any_stream(), n = random.any(1, 300), first = random.any(0, n_cells() - n);
        Stream & stream = streams[s];
        bool any_left = false;
        for (Side & side : sides) {
            side.store->erase(s, first, n);
            for (int i = first; i < first + n; ++i) {
                ModelPage & page = at(side, s, i / kPageCells);
                if (page.rows.empty()) continue;
                unset(page.valid, i % kPageCells), unset(page.carried, i % kPageCells);
                std::fill_n(page.rows.begin() + size_t(i % kPageCells) * side.row, side.row, half(0));
                page.pristine = page.settled = false;
            }
            for (int p = 0; p < n_pages(); ++p) {
                ModelPage & page = at(side, s, p);
                if (!page.rows.empty() && page.valid.empty()) page = ModelPage();
                any_left |= !page.rows.empty();
            }
        }
        for (int i = first; i < first + n; ++i) stream.owner[i] = 0;
        if (any_left) stream.simple = false;
        else begin_anew(stream);
        done(Kind::erase);
    }

    // ---- states in F16 ----

    // What llama.cpp keeps of a stream: the cells of one sequence, or of all, and their rows.
    struct Saved {
        std::vector<int> cells;
        std::vector<uint8_t> owner;
        std::vector<uint32_t> order;
        std::vector<half> rows[2];
        std::vector<char> carried[2];
        std::vector<char> pristine[2];  // the page of the cell
    };
    Saved save_rows(int s, int seq) {
        Saved saved;
        const Stream & stream = streams[s];
        for (int i = 0; i < n_cells(); ++i) {
            if (stream.owner[i] && (seq < 0 || stream.owner[i] == seq + 1)) saved.cells.push_back(i), saved.owner.push_back(stream.owner[i]), saved.order.push_back(stream.order[i]);
        }
        for (int k = 0; k < 2; ++k) {
            Side & side = sides[k];
            saved.rows[k].resize(saved.cells.size() * side.row);
            for (size_t i = 0, n; i < saved.cells.size(); i += n) {
                for (n = 1; i + n < saved.cells.size() && saved.cells[i + n] == saved.cells[i] + int(n);) ++n;
                side.store->read(s, saved.cells[i], int(n), &saved.rows[k][i * side.row]);
            }
            for (size_t i = 0; i < saved.cells.size(); ++i) {
                const ModelPage & page = at(side, s, saved.cells[i] / kPageCells);
                EXPECT(!std::memcmp(&saved.rows[k][i * side.row], row_of(side, s, saved.cells[i]), 2 * side.row), "cell %d of stream %d is saved differently", saved.cells[i], s);
                saved.carried[k].push_back(page.carried.test(saved.cells[i] % kPageCells));
                saved.pristine[k].push_back(page.pristine && page.valid.full());
            }
        }
        done(Kind::save_f16);
        return saved;
    }

    // The rows one after the other from a cell on, as the backend's buffer takes them: a page at a time, and what is full and old is packed on the way.
    void load_rows(int s, int first, const Saved & saved) {
        Stream & stream = streams[s];
        const int n = int(saved.cells.size());
        for (int k = 0; k < 2; ++k) {
            Side & side = sides[k];
            uint64_t clock = stream.clock;
            for (int i = 0, m; i < n; i += m) {
                m = std::min(n - i, kPageCells - (first + i) % kPageCells);
                side.store->write(s, first + i, m, &saved.rows[k][size_t(i) * side.row], side.row);
                bool whole = m == kPageCells && saved.cells[i] % kPageCells == 0;
                for (int j = 0; j < m; ++j) {
                    put_row(side, s, first + i + j, &saved.rows[k][size_t(i + j) * side.row], saved.carried[k][i + j]);
                    whole = whole && saved.cells[i + j] == saved.cells[i] + j && saved.pristine[k][i + j];
                }
                ModelPage & page = at(side, s, (first + i) / kPageCells);
                page.pristine = whole, page.written = clock += m;
                const int newest = std::exchange(stream.newest, (first + i) / kPageCells);
                std::swap(stream.clock, clock);
                settle(side);
                std::swap(stream.clock, clock);
                if (k == 0) stream.newest = newest;
            }
        }
        stream.clock += n;
        for (int i = 0; i < n; ++i) stream.owner[first + i] = saved.owner[i], stream.order[first + i] = saved.order[i];
        stream.end = std::max(stream.end, first + n);
        if (n > 0) stream.newest = (first + n - 1) / kPageCells;
        for (uint32_t order : saved.order) stream.n_written = std::max(stream.n_written, order);
        if (n > 0) stream.simple = false;
    }

    void restore_f16() {
        std::vector<Saved> all;
        for (int s = 0; s < n_streams(); ++s) all.push_back(save_rows(s, -1));
        n_done -= n_streams() - 1, totals.operations -= n_streams() - 1, totals.of_kind[size_t(Kind::save_f16)] -= n_streams() - 1;
        clear();
        --n_done, --totals.operations, --totals.of_kind[size_t(Kind::clear)];
        for (int s = 0; s < n_streams(); ++s) load_rows(s, 0, all[s]);
        done(Kind::restore_f16);
    }

    void restore_f16_part() {
        const int from = any_stream(), to = any_stream(), seq = random.any(0, plan.n_seqs - 1);
        const Saved saved = save_rows(from, seq);
        if (saved.cells.empty()) return;
        for (uint8_t & owner : streams[to].owner) owner = owner == seq + 1 ? 0 : owner;
        const int n = int(saved.cells.size()), shift = random.one_in(2) ? saved.cells[0] : random.any(0, n_cells() - n);
        streams[to].simple = false;
        load_rows(to, std::min(shift, n_cells() - n), saved);
        done(Kind::restore_f16_part);
    }

    // ---- packed states ----

    CellRuns runs_of(const Stream & stream, int seq) const {
        CellRuns runs;
        for (int i = 0; i < n_cells(); ++i) {
            if (!stream.owner[i] || (seq >= 0 && stream.owner[i] != seq + 1)) continue;
            if (!runs.empty() && runs.back().first + runs.back().n == i) ++runs.back().n;
            else runs.push_back({i, 1});
        }
        return runs;
    }

    std::vector<uint8_t> save(Side & side, int s, const CellRuns & runs, bool shared) {
        std::vector<uint8_t> bytes;
        StateWriter count, out([&](const void * data, size_t n) {
            bytes.insert(bytes.end(), static_cast<const uint8_t *>(data), static_cast<const uint8_t *>(data) + n);
            return true;
        });
        for (StateWriter * writer : {&count, &out}) side.store->save_stream(s, runs, shared, *writer);
        EXPECT(out.finish() && count.bytes() == bytes.size(), "a state of %zu bytes, and %zu were counted", bytes.size(), size_t(count.bytes()));
        return bytes;
    }
    void load(Side & side, const std::vector<uint8_t> & bytes, int s, const std::vector<CellMove> & moves, bool alone) {
        StateReader in(bytes.data(), bytes.size());
        StreamState state;
        const char * wrong = side.store->parse_stream(in, state);
        EXPECT(!wrong && in.left() == 0, "a state is refused: %s", wrong ? wrong : "it is too long");
        side.store->load_stream(s, state, moves, alone, random.any(1, 2));
    }

    // A stream as it is, into the same one or another. Pages of which nobody sees a cell stay behind if they are packed.
    void restore_packed() {
        const int from = any_stream(), to = any_stream();
        const bool all = random.one_in(2);
        const CellRuns runs = all ? CellRuns{{0, n_cells()}} : runs_of(streams[from], -1);
        std::vector<CellMove> moves;
        for (const CellRun & run : runs) moves.push_back({run.first, run.first, run.n});
        std::vector<char> live(n_pages());
        for (const CellRun & run : runs) std::fill(live.begin() + run.first / kPageCells, live.begin() + (run.first + run.n - 1) / kPageCells + 1, char(1));
        for (Side & side : sides) {
            const std::vector<uint8_t> bytes = save(side, from, runs, false);
            load(side, bytes, to, moves, true);
            for (int p = 0; p < n_pages(); ++p) {
                ModelPage page = at(side, from, p);
                if (!live[p] && page.settled) page = ModelPage();
                for (int t = 0; t < kPageCells && !page.settled && !page.rows.empty(); ++t) {  // of pages in F16 only cells that hold tokens go out
                    if (!page.valid.test(t)) std::fill_n(page.rows.begin() + size_t(t) * side.row, side.row, half(0));
                }
                at(side, to, p) = page;
            }
        }
        streams[to] = streams[from];
        done(Kind::save_packed), done(Kind::restore_packed);
    }

    // A sequence, to other places: beside what is there, or in its stead.
    void restore_packed_part() {
        const int from = any_stream(), to = any_stream(), seq = random.any(0, plan.n_seqs - 1);
        bool shared = random.one_in(2);
        const CellRuns runs = runs_of(streams[from], shared ? seq : -1);
        int n = 0;
        for (const CellRun & run : runs) n += run.n;
        if (n == 0) return;
        // By whole pages, or anywhere.
        const int first = random.one_in(2) ? random.any(0, (n_cells() - n) / kPageCells) * kPageCells + (n_cells() - n >= kPageCells ? runs[0].first % kPageCells : 0) : random.any(0, n_cells() - n);
        std::vector<CellMove> moves;
        int at_cell = std::min(first, n_cells() - n);
        for (const CellRun & run : runs) moves.push_back({run.first, at_cell, run.n}), at_cell += run.n;
        if (!shared && std::all_of(moves.begin(), moves.end(), [](const CellMove & m) { return m.from == m.to; })) return;  // that is the other kind
        const Stream source = streams[from];
        bool is_empty = true;
        for (int p = 0; p < n_pages(); ++p) is_empty = is_empty && at(sides[0], to, p).rows.empty();
        const bool alone = !shared || is_empty;
        for (Side & side : sides) {
            const std::vector<uint8_t> bytes = save(side, from, runs, shared);
            const std::vector<ModelPage> pages(side.pages.begin() + size_t(from) * n_pages(), side.pages.begin() + size_t(from + 1) * n_pages());
            load(side, bytes, to, moves, !shared);
            for (int p = 0; p < n_pages() && alone; ++p) at(side, to, p) = ModelPage();
            move_cells(side, pages, to, moves);
        }
        Stream & stream = streams[to];
        if (alone) {
            begin_anew(stream);
            stream.counted = source.counted, stream.clock = source.clock;
        }
        for (uint8_t & owner : stream.owner) owner = owner == seq + 1 && !alone ? 0 : owner;
        for (const CellMove & m : moves) {
            for (int i = 0; i < m.n; ++i) stream.owner[m.to + i] = source.owner[m.from + i], stream.order[m.to + i] = source.order[m.from + i];
        }
        stream.end = std::max(stream.end, at_cell), stream.n_written = std::max(stream.n_written, source.n_written);
        stream.simple = false, stream.newest = -1;
        if (from != to) streams[from] = source;
        done(Kind::save_packed), done(Kind::restore_packed_part);
    }

    void move_cells(Side & side, const std::vector<ModelPage> & pages, int to, const std::vector<CellMove> & moves) {
        std::vector<int> source(size_t(n_pages()) * kPageCells, -1);
        for (const CellMove & m : moves) {
            for (int i = 0; i < m.n; ++i) source[m.to + i] = m.from + i;
        }
        for (int p = 0; p < n_pages(); ++p) {
            const int * from = &source[size_t(p) * kPageCells];
            bool any = false, whole = true;
            for (int t = 0; t < kPageCells; ++t) {
                any |= from[t] >= 0;
                whole = whole && from[t] >= 0 && from[t] == from[0] + t && from[0] % kPageCells == 0;
            }
            if (!any) continue;
            for (int t = 0; t < kPageCells; ++t) {
                if (from[t] < 0) continue;
                const ModelPage & page = pages[from[t] / kPageCells];
                put_row(side, to, p * kPageCells + t, page.rows.data() + size_t(from[t] % kPageCells) * side.row, page.carried.test(from[t] % kPageCells));
            }
            ModelPage & model = at(side, to, p);
            model.pristine = whole && pages[from[0] / kPageCells].pristine && pages[from[0] / kPageCells].valid.full();
            // Cells that hold no token are what they are.
            std::vector<half> got(size_t(kPageCells) * side.row);
            side.store->read(to, p * kPageCells, cells_of(p), got.data());
            for (int t = 0; t < kPageCells; ++t) {
                if (!model.valid.test(t)) std::copy_n(got.begin() + size_t(t) * side.row, side.row, model.rows.begin() + size_t(t) * side.row);
            }
        }
    }

    const Plan & plan;
    Random random;
    Totals & totals;
    const Kernels & kernels;
    Place place;
    bool is_value_next = false;
    Side sides[2];
    std::vector<Stream> streams;
    std::vector<float> loud, offset;  // by channel
    AttentionWorkspace workspace;
};

constexpr int Soak::kOddSizes[];

// ---- cases ----

#if defined(MIXKVQ_EMULATED)
const char * const kName = "build/native/soak_emulated";
#elif defined(MIXKVQ_TEST_CUDA)
const char * const kName = "build/native/soak_cuda";
#else
const char * const kName = "build/native/soak";
#endif

struct Options {
    uint64_t seed = 1;
    long only_case = -1, until = -1, operations = 4000;
    double minutes = 0;
    int jobs = 1;
    bool faults = false;
};

// Of a case; many short ones where there are few operations in all.
int operations_of(const Plan & plan, long operations) {
#ifdef MIXKVQ_EMULATED
    return plan.large || operations > 1000 ? 150 : 50;
#else
    return plan.large ? 400 : operations > 10000 ? 1500 : 200;
#endif
}

uint64_t seed_of(uint64_t seed, uint64_t number) { return seed * 0x9e3779b97f4a7c15ull + number * 0xd1342543de82ef95ull; }

// Whether it went well.
bool run_case(const Options & options, long number, Fault fault, Totals & totals, bool quiet) {
#ifdef MIXKVQ_EMULATED
    emulator::begin_order(unsigned(number));  // a case alone is what it is among others
#endif
    Random random(seed_of(options.seed, number));
    const Plan plan = draw_plan(random, number);
    int n_done = 0;
    try {
        Soak soak(plan, random.bits(), fault, totals);
        try {
            soak.run(options.until >= 0 ? int(options.until) : operations_of(plan, options.minutes > 0 ? 1 << 30 : options.operations));
        } catch (...) {
            n_done = soak.n_done;
            throw;
        }
        return true;
    } catch (const std::exception & error) {
        if (quiet) return false;
        std::fprintf(stderr, "soak: %s\nsoak: after %d operations of case %ld (%s); to see it again:\n  %s --seed %llu --case %ld --until %d\n", error.what(), n_done, number,
                     plan.text().c_str(), kName, static_cast<unsigned long long>(options.seed), number, n_done + 1);
        return false;
    }
}

void print(const Totals & t, const Options & options, double seconds) {
    std::printf("soak: %llu operations in %llu caches of %d to %d pages a stream, seed %llu, %.0f s\n", static_cast<unsigned long long>(t.operations),
                static_cast<unsigned long long>(t.cases), t.least_pages, t.most_pages, static_cast<unsigned long long>(options.seed), seconds);
    for (size_t i = 0; i < size_t(Kind::count); ++i) std::printf("  %-28s %9llu\n", name_of(Kind(i)), static_cast<unsigned long long>(t.of_kind[i]));
    std::printf("  %llu pages packed, %llu cells read, %llu outputs of attention checked\n", static_cast<unsigned long long>(t.pages_packed),
                static_cast<unsigned long long>(t.cells_read), static_cast<unsigned long long>(t.attended));
    std::printf("  worst error over tolerance: keys %.3f, grouped values %.3f, rotated values %.3f, attention %.3f\n", t.worst.keys, t.worst.grouped, t.worst.rotated,
                t.worst.attention);
}

// What several cases at a time have in common. They run in threads; an emulated GPU serves one thread at a time, so there they run in processes.
class Jobs {
  public:
    static constexpr int kMost = 64;
    struct Shared {
        std::atomic<long> next{0};
        std::atomic<uint64_t> operations{0};
        std::atomic<bool> good{true};
        Totals totals[kMost];  // by job
    };

    explicit Jobs(int n) : n_(std::min(std::max(n, 1), kMost)) {
#ifdef MIXKVQ_EMULATED
        void * memory = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
#else
        void * memory = ::operator new(sizeof(Shared));
#endif
        shared_ = new (memory) Shared;
    }
    Jobs(const Jobs &) = delete;
    Jobs & operator=(const Jobs &) = delete;
    ~Jobs() {
        shared_->~Shared();
#ifdef MIXKVQ_EMULATED
        munmap(shared_, sizeof(Shared));
#else
        ::operator delete(shared_);
#endif
    }
    Shared & shared() { return *shared_; }

    template <class Work>
    void run(Work work) {
#ifdef MIXKVQ_EMULATED
        for (int i = 1; i < n_; ++i) {
            if (const pid_t pid = fork(); pid == 0) {
                work(shared_->totals[i]);
                std::fflush(nullptr);
                _exit(0);
            } else if (pid < 0) {
                std::perror("soak: fork");
                shared_->good = false;
            }
        }
        work(shared_->totals[0]);
        for (int status; wait(&status) > 0;) {
            if (status != 0) std::fprintf(stderr, "soak: a job ended with status %d\n", status), shared_->good = false;
        }
#else
        std::vector<std::thread> threads;
        for (int i = 1; i < n_; ++i) threads.emplace_back([&, i] { work(shared_->totals[i]); });
        work(shared_->totals[0]);
        for (std::thread & thread : threads) thread.join();
#endif
    }

  private:
    int n_;
    Shared * shared_;
};

int run_all(const Options & options) {
    Totals totals;
    const auto start = std::chrono::steady_clock::now();
    const auto seconds = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); };
    bool good = true;
    if (options.only_case >= 0) {
        good = run_case(options, options.only_case, Fault::none, totals, false);
    } else {
        const uint64_t operations = options.minutes > 0 ? 0 : uint64_t(options.operations);
        Jobs jobs(options.jobs);
        Jobs::Shared & shared = jobs.shared();
        jobs.run([&](Totals & of_job) {
            while (shared.good && (shared.operations < operations || seconds() < 60 * options.minutes)) {
                Totals of_case;
                if (!run_case(options, shared.next++, Fault::none, of_case, false)) shared.good = false;
                shared.operations += of_case.operations;
                of_job.take(of_case);
            }
        });
        for (const Totals & of_job : shared.totals) totals.take(of_job);
        good = shared.good;
    }
    print(totals, options, seconds());
    return good ? 0 : 1;
}

// Every fault is noticed, in a few cases at most, and the case in which it is goes well without it.
int run_faults(const Options & options) {
    constexpr int kCases = 40;
    int missed = 0;
    Totals totals;
    for (int f = 1; f < int(Fault::count); ++f) {
        int cases = 0;
        while (cases < kCases && run_case(options, cases, Fault(f), totals, true)) ++cases;
        if (cases == kCases || !run_case(options, cases, Fault::none, totals, false)) ++missed;
        std::printf("%-26s %s\n", name_of(Fault(f)), cases == kCases ? "NOT NOTICED" : ("noticed in case " + std::to_string(cases)).c_str());
    }
    return missed;
}

}  // namespace

int main(int argc, char ** argv) {
#ifdef MIXKVQ_TEST_CUDA
    if (const char * reason = cuda::unavailable()) {
        std::printf("skipped: %s\n", reason);
        return 77;
    }
#endif
    Options options;
    for (int i = 1; i < argc; ++i) {
        const std::string name = argv[i];
        const char * value = i + 1 < argc ? argv[i + 1] : nullptr;
        if (name == "--faults") options.faults = true;
        else if (!value) return std::fprintf(stderr, "soak: %s is no option, or lacks its value\n", name.c_str()), 2;
        else if (name == "--seed") options.seed = std::strtoull(value, nullptr, 10), ++i;
        else if (name == "--case") options.only_case = std::atol(value), ++i;
        else if (name == "--until") options.until = std::atol(value), ++i;
        else if (name == "--operations") options.operations = std::atol(value), ++i;
        else if (name == "--minutes") options.minutes = std::atof(value), ++i;
#if !defined(MIXKVQ_TEST_CUDA) || defined(MIXKVQ_EMULATED)
        else if (name == "--jobs") options.jobs = std::atoi(value), ++i;
#endif
        else return std::fprintf(stderr, "soak: %s is no option\n", name.c_str()), 2;
    }
    return options.faults ? run_faults(options) : run_all(options);
}
