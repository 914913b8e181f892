// A page store whose every allocation fails once: what was asked for is done or not done, no page is half of both, and nothing is lost or leaks.
#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <new>
#include <random>
#include <vector>

#include "check.h"
#include "mixkvq/cache.h"
#include "mixkvq/profile.h"

using namespace mixkvq;

namespace {

long left = -1;  // allocations until one fails; -1: none does
bool fails() { return left >= 0 && left-- == 0; }

}  // namespace

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmismatched-new-delete"  // it sees through one of the two only
#endif
void * operator new(size_t n) {
    void * p = fails() ? nullptr : std::malloc(n ? n : 1);
    if (!p) throw std::bad_alloc();
    return p;
}
void operator delete(void * p) noexcept { std::free(p); }
void operator delete(void * p, size_t) noexcept { std::free(p); }
#if defined(__linux__)
// Pages beyond a store's own.
extern "C" int posix_memalign(void ** p, size_t alignment, size_t n) noexcept {
    *p = fails() ? nullptr : std::aligned_alloc(alignment, (n + alignment - 1) / alignment * alignment);
    return *p ? 0 : ENOMEM;
}
#endif

namespace {

constexpr int kRow = 64, kCells = 1000, kStreams = 2;

struct Store {
    ScratchPool pool;
    Region region;
    StoreShape shape;
    std::unique_ptr<PageStore> store;
    std::mt19937 rng{5};

    Store(bool is_value, int window, bool codec) {
        shape.is_value = is_value, shape.row = kRow, shape.n_cells = kCells, shape.n_streams = kStreams, shape.window = window, shape.sinks = 0;
        const Preset & preset = *find_preset("balanced");
        const KeyFormat key = key_format(preset, kRow / 2);
        const ValueFormat value = value_format(preset, kRow / 2);
        region = Region(reserve_bytes(shape, 2 * (is_value ? value.record_bytes() : key.record_bytes())));
        store = std::make_unique<PageStore>(shape, *kernels_for(Isa::scalar), region.data(), region.size(), pool);
        if (codec) {
            store->set_codec([](const CodecPage & page, float * rows, double & bits) {
                std::copy(page.rows, page.rows + kPageCells * kRow, rows);
                bits = 16;
                return true;
            });
        }
        if (is_value) store->set_formats({value, value});
        if (!is_value) store->set_formats({key, key}, {});
    }
    ~Store() {
        store.reset();
        pool.trim();
        CHECK(pool.bytes() == 0, "%zu bytes of scratch are held by nobody", pool.bytes());
    }
    std::vector<float> rows(int n) {
        std::vector<float> x(size_t(n) * kRow);
        for (float & v : x) v = std::normal_distribution<float>()(rng);
        return x;
    }
    void write(int stream, int cell, int n) { store->write(stream, cell, n, rows(n).data(), kRow); }
    std::vector<half> content() const {
        std::vector<half> all(size_t(kStreams) * kCells * kRow);
        for (int s = 0; s < kStreams; ++s) store->read(s, 0, kCells, all.data() + size_t(s) * kCells * kRow);
        return all;
    }
    std::vector<bool> settled() const {
        std::vector<bool> all;
        for (int s = 0; s < kStreams; ++s) {
            for (int p = 0; p < shape.n_pages(); ++p) all.push_back(store->page(s, p).settled());
        }
        return all;
    }
    void check_books(const char * what, long k) const {
        int packed = 0, in_f16 = 0;
        for (int s = 0; s < kStreams; ++s) {
            for (int p = 0; p < shape.n_pages(); ++p) {
                const PageStore::Page & page = store->page(s, p);
                CHECK(!page.rows || !page.records, "%s, allocation %ld: page %d of stream %d is packed and in F16", what, k, p, s);
                CHECK(!page.empty() || page.valid.empty(), "%s, allocation %ld: an empty page has cells", what, k);
                packed += page.settled(), in_f16 += !page.settled() && !page.empty();
            }
        }
        CHECK(store->pages_packed() == packed && store->pages_half() == in_f16, "%s, allocation %ld: %d pages packed and %d in F16, counted %d and %d", what, k,
              packed, in_f16, store->pages_packed(), store->pages_half());
    }
};

// `prepare` brings a store to where `work` is tried with its first, second, ... allocation failing, until none is left to fail. `keeps`: what is in
// the cells afterwards is what was in them before.
int try_all(const char * what, bool is_value, int window, bool codec, const std::function<void(Store &)> & prepare, const std::function<void(Store &)> & work, bool keeps) {
    Store undisturbed(is_value, window, codec);
    prepare(undisturbed);
    work(undisturbed);
    undisturbed.store->settle(1);
    const std::vector<bool> expected = undisturbed.settled();
    long k = 0;
    for (bool failed = true; failed; ++k) {
        Store s(is_value, window, codec);
        prepare(s);
        s.check_books("before", k);
        const std::vector<half> before = s.content();
        failed = false;
        left = k;
        try {
            work(s);
        } catch (const std::bad_alloc &) {
            failed = true;
        }
        left = -1;
        s.check_books(what, k);
        if (failed && keeps) CHECK(s.content() == before, "%s, allocation %ld: cells have changed", what, k);
        if (failed) work(s);
        CHECK(s.store->settle(1), "settle");
        s.check_books("afterwards", k);
        CHECK(s.settled() == expected, "%s, allocation %ld: other pages are packed than without the failure", what, k);
        s.store->clear();
        s.check_books("cleared", k);
        CHECK(k < 500, "%s: no end", what);
        if (k >= 500) break;
    }
    return int(k - 1);
}

void filled(Store & s) {
    s.write(0, 0, 900);
    s.write(1, 0, 300);
    s.store->settle(1);
}

void run(bool is_value, bool codec) {
    const auto unsettled = [](Store & s) { s.write(0, 0, 900), s.write(1, 0, 300); };
    int n = 0;
    const auto both = [&](const char * what, auto && prepare, auto && work, bool keeps) {
        for (int window : {0, 200}) n += try_all(what, is_value, window, codec, prepare, work, keeps);
    };
    both("settle", unsettled, [](Store & s) { s.store->settle(1); }, false);
    both("settle later", filled, [](Store & s) { s.write(0, 128, 300), s.store->settle(1), s.write(0, 900, 90), s.store->settle(1); }, false);
    both("write", filled, [rows = std::vector<float>(size_t(700) * kRow, 1.5f)](Store & s) { s.store->write(0, 70, 700, rows.data(), kRow); }, true);
    both("write anywhere", filled, [](Store & s) {
        static const std::vector<float> rows(size_t(5) * kRow, -2.5f);
        static const PageStore::Cell cells[5] = {{0, 3}, {1, 999}, {0, 400}, {0, 130}, {1, 150}};
        s.store->write(cells, 5, {rows.data(), kRow * sizeof(float), false});
    }, true);
    both("erase", filled, [](Store & s) { s.store->erase(0, 70, 600); }, true);
    both("copy a stream", filled, [](Store & s) { s.store->copy_stream(*s.store, 0, 1); }, true);
    both("copy a short stream", filled, [](Store & s) { s.store->copy_stream(*s.store, 1, 0); }, true);
    both("copy what is in F16", unsettled, [](Store & s) { s.store->copy_stream(*s.store, 0, 1); }, true);
    both("edit", filled, [](Store & s) { s.store->edit_page(0, 1, 1, [](half *) {}); }, !codec);
    both("read", filled, [](Store & s) { std::vector<half> rows(size_t(300) * kRow); s.store->read(0, 50, 300, rows.data()); }, true);
    both("clear", filled, [](Store & s) { s.store->clear(); }, true);
    CHECK(n > 10, "only %d allocations have failed", n);
}

}  // namespace

int main() {
    for (bool is_value : {false, true}) {
        for (bool codec : {false, true}) run(is_value, codec);
    }
    return check_result();
}
