// PageStore against a plain model of every cell, through long random sequences of writes, removals, copies, edits and clears, over two memories: the
// host's, and one that behaves like a device (places.h). test_cuda_store.cpp has a third one, a GPU's.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "mixkvq/cache.h"
#include "mixkvq/profile.h"
#include "places.h"

using namespace mixkvq;

namespace {

std::mt19937 rng(17);
int any(int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); }
const Kernels & scalar() { return *kernels_for(Isa::scalar); }

struct Config {
    Where where;
    bool is_value, codec;
    int n_streams, window, sinks;
    bool few_records;
    std::string text() const {
        char line[120];
        std::snprintf(line, sizeof(line), "%s %s%s, %d streams, window %d, sinks %d%s", where == Where::gpu ? "GPU" : where == Where::far ? "far" : "host", is_value ? "values" : "keys", codec ? " of a codec" : "",
                      n_streams, window, sinks, few_records ? ", few records" : "");
        return line;
    }
};

// What the cells hold, as they read back.
struct ModelPage {
    std::vector<half> rows;
    CellMask valid;
    uint64_t written = 0;
    bool settled = false;
};

class Test {
  public:
    explicit Test(const Config & config) : c(config) {
        shape.is_value = c.is_value, shape.row = kHeads * kHeadSize, shape.n_cells = 1000, shape.n_streams = c.n_streams, shape.window = c.window, shape.sinks = c.sinks;
        for (const char * name : {"mix8.2", "balanced"}) {
            keys.push_back(key_format(*find_preset(name), kHeadSize));
            values.push_back(value_format(*find_preset(name), kHeadSize));
        }
        for (int h = 0; h < kHeads; ++h) record_bytes += c.is_value ? values[h].record_bytes() : keys[h].record_bytes();
        capacity = c.few_records ? 3 : shape.record_pages() * shape.n_streams;
        const size_t bytes = reserve_bytes(shape, 0) + capacity * record_bytes;
        store = place.store(shape, bytes);
        far = place.far;
        if (c.codec) {
            store->set_codec([this](const CodecPage & page, float * rows, double & bits) {  // turns the signs
                for (size_t i = 0; i < size_t(kPageCells) * shape.row; ++i) rows[i] = -page.rows[i];
                bits = 1;
                return true;
            });
        }
        pages.resize(size_t(shape.n_streams) * shape.n_pages());
        for (ModelPage & page : pages) page.rows.resize(size_t(kPageCells) * shape.row);
        clock.resize(shape.n_streams), newest.resize(shape.n_streams, -1), end.resize(shape.n_streams);
        counted.assign(shape.n_streams, Counted(shape.row));
        table.resize(pages.size(), {nullptr, nullptr});
    }

    void run(int steps) {
        for (int step = 0; step < steps; ++step) {
            if (step == steps / 20) configure();
            switch (any(0, 9)) {
                case 0: any(0, 1) ? write_anywhere() : write_pages(); break;
                case 1: erase(); break;
                case 2: copy(); break;
                case 3: edit(); break;
                case 4: any(0, 7) ? observe() : any(0, 1) ? clear() : rewind(); break;
                case 5: any(0, 1) ? run_out_of_memory() : restore(); break;
                default: write_at_end(); break;
            }
            if (any(0, 2)) settle();
            check_table();
            if (any(0, 3) == 0) check_content();
            if (any(0, 3) == 0) check_statistics();
        }
        check_content();
        CHECK(!store->configured() || store->pages_packed_ever() > uint64_t(steps / 25), "%s: only %d pages settled", c.text().c_str(), int(store->pages_packed_ever()));
        store->clear();
        if (far) CHECK(far->held() == 0, "%s: %d pages are held by nobody", c.text().c_str(), far->held());
        place.pool.trim();
        CHECK(place.pool.bytes() == 0, "%s: %zu bytes of scratch are held by nobody", c.text().c_str(), place.pool.bytes());
    }

  private:
    static constexpr int kHeads = 2, kHeadSize = 32;

    ModelPage & at(int stream, int p) { return pages[size_t(stream) * shape.n_pages() + p]; }
    half * row(int stream, int cell) { return at(stream, cell / kPageCells).rows.data() + size_t(cell % kPageCells) * shape.row; }

    void configure() {
        if (c.is_value) {
            store->set_formats(values);
        } else {
            std::vector<float> prior(any(0, 1) * shape.row);
            for (float & x : prior) x = float(any(1, 100));
            store->set_formats(keys, prior);
        }
    }

    void pack(ModelPage & page, const std::vector<float> & importance) {
        page.settled = true;
        if (c.codec) {
            for (int i = 0; i < kPageCells * shape.row; ++i) page.rows[i] ^= page.valid.test(i / shape.row) ? 0x8000 : 0;
            return;
        }
        Region record(record_bytes);
        for (int h = 0; h < kHeads; ++h) {
            half * rows = page.rows.data() + h * kHeadSize;
            if (c.is_value) {
                scalar().pack_values(values[h], rows, shape.row, page.valid, record.data());
                scalar().unpack_values(values[h], record.data(), rows, shape.row);
            } else {
                scalar().pack_keys(keys[h], rows, shape.row, page.valid, importance.data() + h * kHeadSize, record.data());
                scalar().unpack_keys(keys[h], record.data(), rows, shape.row);
            }
        }
    }

    // ---- what is done to the store and to the model ----

    // Rows of the cells, some of them with what a cache may not hold.
    void write(const std::vector<PageStore::Cell> & cells, bool fails = false) {
        const int n = int(cells.size());
        const bool is_half = any(0, 1);
        const size_t stride = size_t(shape.row + any(0, 1) * 8) * (is_half ? 2 : 4);
        std::vector<uint8_t> data(n * stride);
        std::vector<half> stored(size_t(n) * shape.row);
        for (int i = 0; i < n; ++i) {
            std::vector<float> x(shape.row);
            for (float & v : x) v = std::normal_distribution<float>(0, 3)(rng);
            half * to = &stored[size_t(i) * shape.row];
            if (is_half) {
                scalar().to_half(x.data(), to, shape.row);
                std::memcpy(&data[i * stride], to, 2 * shape.row);
                const half odd[3] = {0x7e01, 0x7c00, 0xfc00}, kept[3] = {0, 0x7bff, 0xfbff};
                std::memcpy(&data[i * stride], odd, sizeof(odd));
                std::memcpy(to, kept, sizeof(kept));
            } else {
                x[0] = std::nanf(""), x[1] = -INFINITY, x[2] = 1e6f;
                scalar().to_half(x.data(), to, shape.row);
                std::memcpy(&data[i * stride], x.data(), 4 * shape.row);
            }
        }
        bool failed = false;
        try {
            bool run = n > 0;
            for (int i = 1; i < n; ++i) run &= cells[i].stream == cells[0].stream && cells[i].cell == cells[0].cell + i;
            if (run && any(0, 1)) {
                if (is_half) store->write(cells[0].stream, cells[0].cell, n, reinterpret_cast<const half *>(data.data()), stride / 2);
                if (!is_half) store->write(cells[0].stream, cells[0].cell, n, reinterpret_cast<const float *>(data.data()), stride / 4);
            } else {
                store->write(cells.data(), n, {data.data(), stride, is_half});
            }
        } catch (const std::bad_alloc &) {
            failed = true;
        }
        CHECK(fails || !failed, "%s: out of memory", c.text().c_str());
        std::fill(data.begin(), data.end(), uint8_t(0x11));  // the store may not keep it
        for (int i = 0; i < n; ++i) {
            const int s = cells[i].stream, p = cells[i].cell / kPageCells;
            ModelPage & page = at(s, p);
            if (failed) {  // some pages may have been unpacked
                page.settled = store->page(s, p).settled();
                continue;
            }
            std::copy_n(&stored[size_t(i) * shape.row], shape.row, row(s, cells[i].cell));
            page.valid.set(cells[i].cell % kPageCells);
            page.written = ++clock[s];
            page.settled = false;
            newest[s] = p;
        }
    }

    void write_at_end() {
        const int s = any(0, shape.n_streams - 1);
        if (end[s] > 900) end[s] = any(0, 200);
        std::vector<PageStore::Cell> cells;
        for (int n = any(0, 3) ? any(1, 99) : 1; n > 0; --n) cells.push_back({s, end[s]++});
        write(cells);
    }

    void write_anywhere(bool fails = false) {
        std::vector<PageStore::Cell> cells;
        const int n = any(0, 1) ? any(1, 8) : any(50, 120);
        while (int(cells.size()) < n) {
            const PageStore::Cell cell = {any(0, shape.n_streams - 1), any(0, shape.n_cells - 1)};
            const bool there = std::any_of(cells.begin(), cells.end(), [&](PageStore::Cell x) { return x.stream == cell.stream && x.cell == cell.cell; });
            if (!there) cells.push_back(cell);
        }
        write(cells, fails);
    }

    // Cells in a row, pages from the first to the last among them, which are not unpacked to be written over.
    void write_pages(bool fails = false) {
        const int s = any(0, shape.n_streams - 1), n = any(kPageCells, 500), cell = any(0, 1) ? any(0, 3) * kPageCells : any(0, shape.n_cells - n);
        std::vector<PageStore::Cell> cells;
        int n_packed = 0;
        for (int i = 0; i < n; ++i) cells.push_back({s, cell + i});
        for (int p = cell / kPageCells; p * kPageCells < cell + n; ++p) {
            const bool whole = p * kPageCells >= cell && (p + 1) * kPageCells <= cell + n;
            n_packed += store->page(s, p).records && !whole;
        }
        if (far) far->n_unpacked = 0;
        write(cells, fails);
        CHECK(!far || fails || far->n_unpacked == n_packed, "%s: %d pages unpacked instead of %d", c.text().c_str(), far->n_unpacked, n_packed);
    }

    // A write that finds no scratch leaves every cell as it was.
    void run_out_of_memory() {
        if (!far) return;
        far->gets_left = any(0, 3);
        any(0, 1) ? write_anywhere(true) : write_pages(true);
        far->gets_left = 1 << 30;
    }

    void erase() {
        const int s = any(0, shape.n_streams - 1), n = any(1, 300), cell = any(0, shape.n_cells - n);
        store->erase(s, cell, n);
        for (int p = cell / kPageCells; p <= (cell + n - 1) / kPageCells; ++p) {
            ModelPage & page = at(s, p);
            const bool any_before = !page.valid.empty();
            for (int i = std::max(cell, p * kPageCells); i < std::min(cell + n, (p + 1) * kPageCells); ++i) {
                page.valid.word[i % kPageCells >> 6] &= ~(uint64_t(1) << (i & 63));
                if (any_before) std::fill_n(row(s, i), shape.row, half(0));
            }
            page.settled = false;
            if (page.valid.empty()) std::fill(page.rows.begin(), page.rows.end(), half(0));
        }
        bool any_left = false;
        for (int p = 0; p < shape.n_pages(); ++p) any_left |= !at(s, p).valid.empty();
        if (!any_left) counted[s] = Counted(shape.row);
    }

    void copy() {
        const int from = any(0, shape.n_streams - 1), to = any(0, shape.n_streams - 1);
        store->copy_stream(*store, from, to);
        for (int p = 0; p < shape.n_pages() && from != to; ++p) {
            at(to, p) = at(from, p);
            CHECK(!store->page(to, p).settled() || at(from, p).settled, "%s: a copy has been packed", c.text().c_str());
            at(to, p).settled = store->page(to, p).settled();  // not if there is no record left
        }
        clock[to] = clock[from], newest[to] = newest[from], end[to] = end[from], counted[to] = counted[from];
    }

    // A stream goes out as bytes and comes back, into the same place or another.
    void restore() {
        const int from = any(0, shape.n_streams - 1), to = any(0, shape.n_streams - 1);
        std::vector<uint8_t> bytes;
        StateWriter count, out([&](const void * data, size_t n) {
            bytes.insert(bytes.end(), static_cast<const uint8_t *>(data), static_cast<const uint8_t *>(data) + n);
            return true;
        });
        for (StateWriter * writer : {&count, &out}) store->save_stream(from, {{0, shape.n_cells}}, false, *writer);
        CHECK(out.finish() && count.bytes() == bytes.size() && out.bytes() == bytes.size(), "%s: %zu bytes, not %zu", c.text().c_str(), bytes.size(), size_t(count.bytes()));
        StateReader in(bytes.data(), bytes.size());
        StreamState state;
        const char * wrong = store->parse_stream(in, state);
        CHECK(!wrong && in.left() == 0, "%s: a state is refused: %s", c.text().c_str(), wrong ? wrong : "it is too long");
        store->load_stream(to, state, {{0, 0, shape.n_cells}}, true, 1);
        for (int p = 0; p < shape.n_pages(); ++p) {
            at(to, p) = at(from, p);
            if (at(to, p).valid.empty()) at(to, p).written = 0;
            // Of pages in F16 only cells that hold tokens go out.
            for (int t = 0; t < kPageCells && (c.codec || !at(from, p).settled); ++t) {
                if (!at(to, p).valid.test(t)) std::fill_n(at(to, p).rows.begin() + size_t(t) * shape.row, shape.row, half(0));
            }
            CHECK(!store->page(to, p).settled() || at(from, p).settled, "%s: a page has been packed while a state was loaded", c.text().c_str());
            at(to, p).settled = store->page(to, p).settled();  // not if there is no record left
        }
        clock[to] = clock[from], newest[to] = newest[from], end[to] = end[from], counted[to] = counted[from];
    }

    void edit() {
        const int s = any(0, shape.n_streams - 1), p = any(0, shape.n_pages() - 1);
        ModelPage & page = at(s, p);
        const std::vector<float> importance = store->importance(s);
        int calls = 0;
        const int n = kPageCells * shape.row;
        store->edit_page(s, p, 1, [&](half * rows) {
            auto work = [n](half * x) {
                for (int i = 0; i < n; ++i) x[i] ^= x[i] ? 0x8000 : 0;
            };
            place.edit(rows, n, work);
            ++calls;
        });
        CHECK(calls == (store->page(s, p).empty() ? 0 : 1), "%s: %d edits of a page", c.text().c_str(), calls);
        for (half & x : page.rows) x ^= x ? 0x8000 : 0;
        if (page.settled) pack(page, importance);
    }

    void observe() {
        const int first = any(0, shape.n_streams - 1);
        observe(first, any(1, shape.n_streams - first));
    }

    void observe(int first, int n_streams) {
        if (c.is_value || !store->configured()) return;
        const int n = any(1, 40), group = any(1, 3);
        const size_t token = size_t(kHeads) * group * kHeadSize;
        std::vector<float> q(n_streams * n * token);
        for (float & x : q) x = std::normal_distribution<float>(0, 2)(rng) * float(any(1, 9));
        const float odd[3] = {std::nanf(""), -INFINITY, -3e38f};
        for (int i = any(0, 5); i > 0; --i) q[any(0, int(q.size()) - 1)] = odd[any(0, 2)];
        for (int s = 0; s < n_streams; ++s) {
            Counted & sums = counted[first + s];
            for (size_t i = 0; i < n * token; ++i) {
                const size_t at = i % token / (group * kHeadSize) * kHeadSize + i % kHeadSize;
                const double x = q[s * n * token + i], counts = std::isfinite(x) ? std::min(std::fabs(x), 65504.0) : 0;
                sums.abs[at] += counts, sums.sqr[at] += counts * counts;
            }
            for (sums.n += n * group; sums.n > 8192; sums.n /= 2) {
                for (double & x : sums.abs) x /= 2;
                for (double & x : sums.sqr) x /= 2;
            }
        }
        const Place::There<float> there(place, q);
        store->observe({there.data(), token, kHeadSize, n * token, n, kHeads * group, n_streams, first}, 1);
    }

    // A stream that is rewound to its first 200 cells, of which 150 had been read when its statistics were remembered, and one that begins anew.
    void rewind() {
        if (!store->configured()) return;
        clear();
        const int s = any(0, shape.n_streams - 1);
        const auto batch = [&](int first, int n) {
            std::vector<PageStore::Cell> cells;
            std::vector<half> mask(size_t(n) * shape.n_cells, 0xfc00);
            for (int i = 0; i < n; ++i) {
                cells.push_back({s, first + i});
                std::fill_n(&mask[size_t(i) * shape.n_cells], first + i + 1, half(0));
            }
            write(cells);
            store->look({mask.data(), true, size_t(shape.n_cells), 0, n, 1, s, shape.n_cells});
        };
        batch(0, 150);
        observe(s, 1);
        const Counted then = counted[s];
        for (int first = 150; first < 300; first += 50) {
            batch(first, 50);
            observe(s, 1);
        }
        batch(200, 20);
        if (!c.is_value) {
            for (double & x : counted[s].sqr) x *= then.n / counted[s].n;
            counted[s].abs = then.abs, counted[s].n = then.n;
        }
        check_statistics();
        observe(s, 1);
        check_statistics();
        settle();
        batch(0, 30);
        if (!c.is_value) counted[s] = Counted(shape.row);
        check_statistics();
        end[s] = 30;
    }

    void check_statistics() {
        if (c.is_value || !store->configured()) return;
        std::vector<float> abs(shape.row), sqr(shape.row);
        Counted all(shape.row);
        for (int s = -1; s < shape.n_streams; ++s) {
            if (s < 0) {
                for (const Counted & one : counted) {
                    all.n += one.n;
                    for (int i = 0; i < shape.row; ++i) all.abs[i] += one.abs[i], all.sqr[i] += one.sqr[i];
                }
            }
            const Counted & sums = s < 0 ? all : counted[s];
            CHECK(store->query_statistics(abs.data(), sqr.data(), s) == (sums.n > 0), "%s: %g queries of stream %d", c.text().c_str(), sums.n, s);
            for (int i = 0; i < shape.row && sums.n > 0; ++i) {
                CHECK(std::fabs(abs[i] * sums.n - sums.abs[i]) <= 1e-4 * sums.abs[i] && std::fabs(sqr[i] * sums.n - sums.sqr[i]) <= 1e-4 * sums.sqr[i],
                      "%s: stream %d, channel %d: mean |q| %g and q^2 %g, not %g and %g", c.text().c_str(), s, i, abs[i], sqr[i], sums.abs[i] / sums.n, sums.sqr[i] / sums.n);
            }
        }
    }

    void clear() {
        store->clear();
        counted.assign(shape.n_streams, Counted(shape.row));
        for (ModelPage & page : pages) {
            std::fill(page.rows.begin(), page.rows.end(), half(0));
            page.valid = CellMask(), page.written = 0, page.settled = false;
        }
        std::fill(clock.begin(), clock.end(), 0), std::fill(newest.begin(), newest.end(), -1), std::fill(end.begin(), end.end(), 0);
    }

    // Which pages must go follows from the model, except where records run out.
    void settle() {
        const int room = c.codec ? 1 << 30 : capacity - store->pages_packed();
        std::vector<bool> in_f16;
        for (int s = 0; s < shape.n_streams; ++s) {
            for (int p = 0; p < shape.n_pages(); ++p) in_f16.push_back(!store->page(s, p).empty() && !store->page(s, p).settled());
        }
        std::vector<std::vector<float>> importance;
        for (int s = 0; s < shape.n_streams; ++s) importance.push_back(store->importance(s));
        CHECK(store->settle(any(1, 2)), "settle");
        if (!store->configured()) return;

        int wanted = 0, taken = 0, left = 0;
        for (int s = 0; s < shape.n_streams; ++s) {
            int staying = 0, early = 0, n_waiting = 0;
            uint64_t last_early = 0, first_waiting = ~uint64_t(0);
            bool all_ready = true;
            for (int p = 0; p < shape.n_pages(); ++p) {
                if (!in_f16[size_t(s) * shape.n_pages() + p]) continue;
                ModelPage & page = at(s, p);
                const bool may = p >= shape.sink_pages() && p != newest[s];
                const bool ready = may && page.valid.full() && clock[s] - page.written >= uint64_t(c.window);
                const bool gone = store->page(s, p).settled();
                CHECK(may || !gone, "%s: page %d of stream %d may not be packed", c.text().c_str(), p, s);
                wanted += ready, taken += gone, left += !gone, staying += !ready;
                if (ready) {
                    all_ready &= gone;
                } else if (may) {
                    ++n_waiting, early += gone;
                    if (gone) last_early = std::max(last_early, page.written);
                    if (!gone) first_waiting = std::min(first_waiting, page.written);
                }
                if (gone) pack(page, importance[s]);
            }
            const int over = std::max(0, std::min(staying - shape.home_pages(), n_waiting));
            wanted += over;
            if (wanted > room) continue;
            CHECK(all_ready, "%s: a page that is full and old stays in F16", c.text().c_str());
            CHECK(early == over, "%s: %d of %d pages were packed early", c.text().c_str(), early, over);
            CHECK(last_early <= first_waiting, "%s: not the least recently written pages were packed early", c.text().c_str());
        }
        CHECK(taken == std::min(wanted, room), "%s: %d pages were packed, not %d", c.text().c_str(), taken, std::min(wanted, room));
        const int home = shape.home_pages() * shape.n_streams;
        if (far && !c.codec) CHECK(far->held() == std::max(0, left - home), "%s: %d pages in scratch, %d in F16, %d at home", c.text().c_str(), far->held(), left, home);
    }

    // ---- whether they agree ----

    // A copy of the page table that follows take_moved.
    void check_table() {
        if (any(0, 2)) return;
        std::vector<int> seen(pages.size());
        store->take_moved([&](int s, int p) {
            const size_t i = size_t(s) * shape.n_pages() + p;
            CHECK(++seen[i] == 1, "%s: page %d comes twice", c.text().c_str(), p);
            table[i] = {store->page(s, p).rows, store->page(s, p).records};
        });
        for (size_t i = 0; i < pages.size(); ++i) {
            const PageStore::Page & page = store->page(int(i) / shape.n_pages(), int(i) % shape.n_pages());
            CHECK(table[i].first == page.rows && table[i].second == page.records, "%s: page %zu has moved and nobody says so", c.text().c_str(), i);
        }
    }

    void check_content() {
        int packed = 0, in_f16 = 0;
        std::vector<half> got(size_t(shape.n_cells) * shape.row);
        for (int s = 0; s < shape.n_streams; ++s) {
            for (int p = 0; p < shape.n_pages(); ++p) {
                const PageStore::Page & page = store->page(s, p);
                const ModelPage & model = at(s, p);
                packed += page.settled(), in_f16 += !page.settled() && !page.empty();
                CHECK(page.settled() == model.settled && page.written == model.written && !std::memcmp(&page.valid, &model.valid, sizeof(page.valid)),
                      "%s: page %d of stream %d is not what it should be", c.text().c_str(), p, s);
                CHECK(!page.empty() || page.valid.empty(), "%s: an empty page has cells", c.text().c_str());
            }
            for (int cell = 0, n; cell < shape.n_cells; cell += n) {  // in pieces
                n = std::min(shape.n_cells - cell, any(0, 1) ? shape.n_cells : any(1, 300));
                store->read(s, cell, n, got.data() + size_t(cell) * shape.row);
            }
            for (int cell = 0; cell < shape.n_cells; ++cell) {
                CHECK(!std::memcmp(&got[size_t(cell) * shape.row], row(s, cell), 2 * shape.row), "%s: cell %d of stream %d reads back differently", c.text().c_str(), cell, s);
            }
        }
        CHECK(store->pages_packed() == packed && store->pages_half() == in_f16, "%s: %d pages are settled and %d in F16, the store counts %d and %d", c.text().c_str(),
              packed, in_f16, store->pages_packed(), store->pages_half());
    }

    Config c;
    StoreShape shape;
    std::vector<KeyFormat> keys;
    std::vector<ValueFormat> values;
    size_t record_bytes = 0;
    int capacity = 0;
    Place place{c.where, scalar()};
    FarMemory * far = nullptr;
    std::unique_ptr<PageStore> store;

    // The queries of a stream.
    struct Counted {
        double n = 0;
        std::vector<double> abs, sqr;
        explicit Counted(int row) : abs(row), sqr(row) {}
    };

    std::vector<ModelPage> pages;
    std::vector<Counted> counted;
    std::vector<uint64_t> clock;
    std::vector<int> newest, end;
    std::vector<std::pair<const half *, const uint8_t *>> table;
};

}  // namespace

int main() {
#ifdef MIXKVQ_TEST_CUDA
    if (const char * reason = cuda::unavailable()) {
        std::printf("skipped: %s\n", reason);
        return 77;
    }
    const std::vector<Where> places = {Where::gpu};
#else
    const std::vector<Where> places = {Where::host, Where::far};
#endif
#ifdef MIXKVQ_EMULATED
    const int steps = 100;
#else
    const int steps = 500;
#endif
    for (Where where : places) {
        for (bool is_value : {false, true}) {
            for (int n_streams : {1, 3}) {
                Test({where, is_value, false, n_streams, 128, 128, false}).run(steps);
                Test({where, is_value, false, n_streams, 0, 0, true}).run(steps);
                Test({where, is_value, false, n_streams, 200, 300, false}).run(steps);
                Test({where, is_value, true, n_streams, 128, 0, false}).run(steps * 3 / 5);
            }
        }
    }
    return check_result();
}
