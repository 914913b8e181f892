// PageStore with a codec beside one that packs: the same random writes, removals, copies and edits must settle the same pages, and what an identity
// codec keeps must read back as it was written. Then refusals, and the query statistics against sums in double.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "mixkvq/cache.h"
#include "mixkvq/profile.h"

using namespace mixkvq;

namespace {

std::mt19937 rng(5);
int any(int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); }
const Kernels & scalar() { return *kernels_for(Isa::scalar); }

struct Call {
    int stream, first_cell;
    CellMask valid;
    std::vector<float> rows, q_abs, q_sqr;
};

struct Store {
    ScratchPool pool;
    std::vector<uint8_t> memory;
    std::vector<Call> calls;
    bool refuse = false;
    PageStore * store = nullptr;

    Store(const StoreShape & shape, int heads, int head_size, bool codec) {
        const KeyFormat k = key_format(*find_preset("mix8.2"), head_size);
        const ValueFormat v = value_format(*find_preset("mix8.2"), head_size);
        const size_t record = codec ? 0 : heads * (shape.is_value ? v.record_bytes() : k.record_bytes());
        memory.resize(reserve_bytes(shape, record) + 64);
        uint8_t * aligned = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
        store = new PageStore(shape, scalar(), aligned, memory.size() - 64, pool);
        if (codec) {
            store->set_codec([this, n = size_t(heads) * kPageCells * head_size, m = size_t(heads) * head_size](const CodecPage & page, float * rows, double & bits) {
                for (size_t i = 0; i < n; ++i) CHECK(rows[i] == 0, "the result begins with %g", double(rows[i]));
                Call call = {page.stream, page.first_cell, page.valid, {page.rows, page.rows + n}, {}, {}};
                if (page.q_abs) call.q_abs.assign(page.q_abs, page.q_abs + m), call.q_sqr.assign(page.q_sqr, page.q_sqr + m);
                calls.push_back(call);
                std::copy(page.rows, page.rows + n, rows);
                bits = 100 * double(calls.size());
                return !refuse;
            });
        }
        if (shape.is_value) {
            store->set_formats(std::vector<ValueFormat>(heads, v));
        } else {
            store->set_formats(std::vector<KeyFormat>(heads, k), {});
        }
    }
    ~Store() { delete store; }
    PageStore * operator->() { return store; }
};

// The cells as they were written, NaN and infinity already replaced.
using Shadow = std::map<std::pair<int, int>, std::vector<half>>;

void check_same(Store & packing, Store & coding, const Shadow & shadow, const StoreShape & shape, const char * after) {
    int settled = 0;
    for (int s = 0; s < shape.n_streams; ++s) {
        for (int p = 0; p < shape.n_pages(); ++p) {
            const PageStore::Page & a = packing->page(s, p);
            const PageStore::Page & b = coding->page(s, p);
            CHECK(a.settled() == b.settled() && a.empty() == b.empty() && a.written == b.written && !std::memcmp(&a.valid, &b.valid, sizeof(a.valid)),
                  "after %s: page %d of stream %d: packing %d, codec %d", after, p, s, int(a.settled()), int(b.settled()));
            CHECK(!b.coded || (b.rows && !b.records), "a page of the codec is in F16");
            settled += b.coded;
        }
        std::vector<half> row(shape.row);
        for (int cell = 0; cell < shape.n_cells; ++cell) {
            const auto at = shadow.find({s, cell});
            coding->read(s, cell, 1, row.data());
            const std::vector<half> expected = at == shadow.end() ? std::vector<half>(shape.row) : at->second;
            CHECK(row == expected, "after %s: cell %d of stream %d reads back differently", after, cell, s);
        }
    }
    CHECK(coding->pages_packed() == settled && packing->pages_packed() == settled, "after %s: %d settled, the stores count %d and %d", after, settled,
          coding->pages_packed(), packing->pages_packed());
    CHECK(coding->pages_half() == packing->pages_half(), "after %s: F16 pages %d and %d", after, coding->pages_half(), packing->pages_half());
    CHECK(coding->pages_packed_ever() == packing->pages_packed_ever() && coding->pages_packed_ever() == coding.calls.size(), "after %s", after);
    CHECK(coding->bytes_used() == (coding->pages_half() + size_t(settled)) * shape.page_bytes(), "after %s", after);
}

void test_same_pages(bool is_value, int window, int sinks, int n_streams) {
    const int heads = 2, d = 32;
    StoreShape shape;
    shape.is_value = is_value, shape.row = heads * d, shape.n_cells = 1000, shape.n_streams = n_streams, shape.window = window, shape.sinks = sinks;
    Store packing(shape, heads, d, false), coding(shape, heads, d, true);
    Shadow shadow;
    std::vector<int> end(n_streams, 0);
    for (int step = 0; step < 500; ++step) {
        const int s = any(0, n_streams - 1), what = any(0, 9);
        const char * name = "write";
        if (what < 6) {  // at the end mostly, or anywhere
            if (end[s] > 900) end[s] = any(0, 200);
            const int n = any(1, 90), cell = what < 5 ? end[s] : any(0, shape.n_cells - n);
            std::vector<float> rows(size_t(n) * shape.row);
            for (float & x : rows) x = std::normal_distribution<float>(0, 3)(rng);
            rows[0] = std::nanf(""), rows[1] = INFINITY;
            for (Store * store : {&packing, &coding}) (*store)->write(s, cell, n, rows.data(), shape.row);
            for (int i = 0; i < n; ++i) {
                std::vector<half> row(shape.row);
                scalar().to_half(rows.data() + size_t(i) * shape.row, row.data(), shape.row);
                shadow[{s, cell + i}] = row;
            }
            if (what < 5) end[s] = cell + n;
        } else if (what == 6) {
            name = "erase";
            const int n = any(1, 300), cell = any(0, shape.n_cells - n);
            for (Store * store : {&packing, &coding}) (*store)->erase(s, cell, n);
            for (int i = 0; i < n; ++i) shadow.erase({s, cell + i});
        } else if (what == 7 && n_streams > 1) {
            name = "copy";
            const int to = (s + 1) % n_streams;
            for (Store * store : {&packing, &coding}) (*store)->copy_stream(*store->store, s, to);
            for (int cell = 0; cell < shape.n_cells; ++cell) {
                shadow.erase({to, cell});
                const auto from = shadow.find({s, cell});
                if (from != shadow.end()) shadow[{to, cell}] = from->second;
            }
            end[to] = end[s];
        } else if (what == 8) {
            name = "edit";  // as a context shift does
            const int p = any(0, shape.n_pages() - 1);
            for (Store * store : {&packing, &coding}) {
                (*store)->edit_page(s, p, 1, [&](half * rows) {
                    for (int i = 0; i < kPageCells * shape.row; ++i) rows[i] ^= rows[i] ? 0x8000 : 0;
                });
            }
            for (int cell = p * kPageCells; cell < std::min(shape.n_cells, (p + 1) * kPageCells); ++cell) {
                const auto at = shadow.find({s, cell});
                if (at == shadow.end()) continue;
                for (half & x : at->second) x ^= x ? 0x8000 : 0;
            }
        } else if (any(0, 9) == 0) {
            name = "clear";
            for (Store * store : {&packing, &coding}) (*store)->clear();
            shadow.clear();
        }
        const size_t before = coding.calls.size();
        CHECK(packing->settle(1) && coding->settle(1), "settle");
        for (size_t i = before + 1; i < coding.calls.size(); ++i) {
            const Call & a = coding.calls[i - 1];
            const Call & b = coding.calls[i];
            CHECK(std::make_pair(a.stream, a.first_cell) < std::make_pair(b.stream, b.first_cell), "pages come in the order of cells");
        }
        for (size_t i = before; i < coding.calls.size(); ++i) {
            const Call & call = coding.calls[i];
            for (int t = 0; t < kPageCells; ++t) {
                const auto at = shadow.find({call.stream, call.first_cell + t});
                CHECK(call.valid.test(t) == (at != shadow.end()), "cell %d: valid is wrong", call.first_cell + t);
                std::vector<float> row(shape.row, 0.0f);
                if (at != shadow.end()) scalar().from_half(at->second.data(), row.data(), shape.row);
                for (int h = 0; h < heads; ++h) {
                    CHECK(!std::memcmp(&row[h * d], &call.rows[(size_t(h) * kPageCells + t) * d], sizeof(float) * d), "cell %d: the codec got other rows",
                          call.first_cell + t);
                }
            }
            CHECK(call.q_abs.empty() == is_value, "keys alone have query statistics");
            CHECK(std::all_of(call.q_abs.begin(), call.q_abs.end(), [](float x) { return x == 1; }), "ones before any query");
        }
        check_same(packing, coding, shadow, shape, name);
    }
    CHECK(coding.calls.size() > 10, "only %zu pages settled", coding.calls.size());
    const double n = double(coding.calls.size()), elements = n * kPageCells * shape.row;
    CHECK(std::fabs(coding->codec_bits() - 50 * n * (n + 1) / elements) < 1e-9, "bits per element %g", coding->codec_bits());
    coding->clear();
    coding.pool.trim();
    CHECK(coding.pool.bytes() == 0, "%zu bytes of scratch are held by nobody", coding.pool.bytes());
}

void test_refusal() {
    StoreShape shape;
    shape.row = 64, shape.n_cells = 1024, shape.window = 128, shape.sinks = 0;
    Store coding(shape, 2, 32, true);
    const std::vector<half> rows(size_t(600) * shape.row, 0x3c00);
    coding->write(0, 0, 600, rows.data(), shape.row);
    coding.refuse = true;
    for (int i = 0; i < 2; ++i) {
        CHECK(!coding->settle(1), "a refusal is a failure");
        CHECK(coding.calls.size() == size_t(i + 1) && coding.calls[i].first_cell == 0, "it ends the settling, and the page comes again");
        CHECK(coding->pages_packed() == 0 && coding->pages_half() == 5 && coding->codec_bits() == 0, "nothing is settled");
    }
    coding.refuse = false;
    CHECK(coding->settle(1) && coding->pages_packed() == 3, "%d pages settled", coding->pages_packed());
    CHECK(coding->settle(1) && coding.calls.size() == 5, "a page comes once");
    coding.refuse = true;
    coding->edit_page(0, 1, 1, [](half * page) { page[0] = 0x4000; });
    half row[64];
    coding->read(0, 128, 1, row);
    CHECK(row[0] == 0x4000 && coding->pages_packed() == 2, "an edit holds even if the codec refuses the page");
    coding.refuse = false;
    CHECK(coding->settle(1) && coding->pages_packed() == 3 && coding.calls.back().rows[0] == 2.0f, "and the next settle hands it over");
}

void test_query_statistics() {
    StoreShape shape;
    shape.row = 2 * 40, shape.n_cells = 512, shape.window = 0, shape.sinks = 0;
    Store coding(shape, 2, 40, true);
    std::vector<float> mean_abs(80), mean_sqr(80);
    CHECK(!coding->query_statistics(mean_abs.data(), mean_sqr.data()) && mean_abs == std::vector<float>(80, 1.0f) && mean_sqr == mean_abs, "ones before any query");
    std::vector<double> sum_abs(80), sum_sqr(80);
    double count = 0;
    for (int batch = 0; batch < 40; ++batch) {
        const int n = any(1, 900);
        std::vector<float> q(size_t(n) * 80);
        for (float & x : q) x = std::normal_distribution<float>(0, 1)(rng) * (1 + batch % 7);
        coding->observe({q.data(), 80, 40, 0, n, 2, 1}, 1);
        for (size_t i = 0; i < q.size(); ++i) {
            sum_abs[i % 80] += std::fabs(double(q[i]));
            sum_sqr[i % 80] += double(q[i]) * double(q[i]);
        }
        count += n;
        for (; count > 8192; count /= 2) {
            for (double & x : sum_abs) x /= 2;
            for (double & x : sum_sqr) x /= 2;
        }
        CHECK(coding->query_statistics(mean_abs.data(), mean_sqr.data()), "there were queries");
        for (int i = 0; i < 80; ++i) {
            CHECK(std::fabs(mean_abs[i] * count / sum_abs[i] - 1) < 1e-4 && std::fabs(mean_sqr[i] * count / sum_sqr[i] - 1) < 1e-4, "batch %d, channel %d: %g and %g",
                  batch, i, double(mean_abs[i]), double(mean_sqr[i]));
        }
    }
    const std::vector<half> rows(size_t(300) * 80, 0x3c00);
    coding->write(0, 0, 300, rows.data(), 80);
    coding->settle(1);
    CHECK(!coding.calls.empty() && coding.calls[0].q_abs == mean_abs && coding.calls[0].q_sqr == mean_sqr, "the codec gets the statistics");
    CHECK(coding->importance() == mean_abs, "I_d is the mean |q|");
    coding->clear();
    std::vector<float> after(80), after_sqr(80);
    CHECK(!coding->query_statistics(after.data(), after_sqr.data()) && after == std::vector<float>(80, 1.0f) && after_sqr == after, "a clear begins them anew");
}

void test_no_vector_kernels() {
    const bool vector = std::any_of(std::begin(kIsas), std::end(kIsas), [](Isa isa) { return isa != Isa::scalar && isa_supported(isa); });
    CHECK((no_vector_kernels() == nullptr) == vector, "%s", no_vector_kernels() ? no_vector_kernels() : "no warning");
}

}  // namespace

int main() {
    for (bool is_value : {false, true}) {
        for (int streams : {1, 3}) {
            test_same_pages(is_value, 128, 128, streams);
            test_same_pages(is_value, 0, 0, streams);
            test_same_pages(is_value, 200, 300, streams);
        }
    }
    test_refusal();
    test_query_statistics();
    test_no_vector_kernels();
    return check_result();
}
