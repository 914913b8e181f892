// What a store makes of writes and masks: query statistics that go back with a stream that is emptied or rewound, and a window for each sequence of a
// unified cache. A small model of llama.cpp's cells says which of them a token sees.
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "mixkvq/cache.h"
#include "mixkvq/profile.h"

using namespace mixkvq;

namespace {

constexpr int kHeadSize = 32, kCells = 4096;

struct Token {
    int seq, pos, cell;
};

// A key store of one head, and what is in its cells.
struct Cache {
    ScratchPool pool;
    Region region;
    std::unique_ptr<PageStore> store;
    std::vector<std::vector<std::pair<int, int>>> cells;  // [stream]: sequence and position, -1: free
    int span;                                              // positions that a token sees, itself included

    explicit Cache(int n_streams = 1, int window = 128, int sinks = 128, int sees = 1 << 30) : span(sees) {
        StoreShape shape;
        shape.row = kHeadSize, shape.n_cells = kCells, shape.n_streams = n_streams, shape.window = window, shape.sinks = sinks;
        const KeyFormat format = key_format(*find_preset("balanced"), kHeadSize);
        region = Region(reserve_bytes(shape, format.record_bytes()));
        store = std::make_unique<PageStore>(shape, *kernels_for(Isa::scalar), region.data(), region.size(), pool);
        store->set_formats(std::vector<KeyFormat>{format}, {});
        cells.assign(n_streams, std::vector<std::pair<int, int>>(kCells, {-1, -1}));
    }

    // A batch of a text: its numbers are those of the tokens' sequences and positions.
    void feed(const std::vector<Token> & tokens, unsigned text, int stream = 0) {
        const int n = int(tokens.size());
        std::vector<float> rows, q;
        std::vector<PageStore::Cell> places;
        for (const Token & t : tokens) {
            std::mt19937 rng(text * 100003 + t.seq * 10007 + t.pos);
            for (int i = 0; i < kHeadSize; ++i) rows.push_back(std::normal_distribution<float>()(rng));
            for (int i = 0; i < kHeadSize; ++i) q.push_back(std::normal_distribution<float>()(rng) * float(1 + i * text % 7));
            places.push_back({stream, t.cell});
            cells[stream][t.cell] = {t.seq, t.pos};
        }
        store->settle(1);
        store->write(places.data(), n, {rows.data(), kHeadSize * sizeof(float), false});
        std::vector<half> mask(size_t(n) * kCells, 0xfc00);
        for (int i = 0; i < n; ++i) {
            for (int c = 0; c < kCells; ++c) {
                const auto [seq, pos] = cells[stream][c];
                if (seq == tokens[i].seq && pos <= tokens[i].pos && pos > tokens[i].pos - span) mask[size_t(i) * kCells + c] = 0;
            }
        }
        store->look({mask.data(), true, kCells, 0, n, 1, stream, kCells});
        store->observe({q.data(), kHeadSize, kHeadSize, 0, n, 1, 1, stream}, 1);
        store->settle(1);
    }
    // A run of them, where cell and position are the same.
    void feed_at(int first, int n, unsigned text, int stream = 0, int seq = 0, int shift = 0) {
        std::vector<Token> tokens;
        for (int i = first; i < first + n; ++i) tokens.push_back({seq, i, i + shift});
        feed(tokens, text, stream);
    }
    // What llama.cpp does, of which a store sees nothing.
    void remove(int from, int seq = 0, int stream = 0) {
        for (auto & cell : cells[stream]) {
            if (cell.first == seq && cell.second >= from) cell = {-1, -1};
        }
    }
    std::vector<float> importance(int stream = 0) { return store->importance(stream); }
    std::vector<half> content(int n, int stream = 0) const {
        std::vector<half> rows(size_t(n) * kHeadSize);
        store->read(stream, 0, n, rows.data());
        return rows;
    }
};

void request(Cache & c, unsigned text, int stream = 0) {
    for (int first : {0, 300, 600}) c.feed_at(first, 300, text, stream);
    for (int i = 900; i < 1200; ++i) c.feed_at(i, 1, text, stream);
}

// A request, another, and the first again: the same tiers, whatever came between, and however the stream was emptied.
void test_emptied() {
    Cache fresh;
    request(fresh, 1);
    const auto importance = fresh.importance();
    const auto content = fresh.content(1200);
    for (int how = 0; how < 4; ++how) {
        Cache c;
        request(c, 1);
        CHECK(c.importance() == importance, "another cache");
        for (unsigned text : {2, 3}) {
            c.remove(0);
            if (how == 1) c.store->clear();
            if (how == 2) c.store->erase(0, 0, kCells);
            if (how == 3 && text == 3) c.feed_at(0, 40, text);  // a short one, which does not write over the end of the last
            if (how != 3 || text == 2) request(c, text);
            CHECK(c.importance() != importance, "the queries of another text make no difference");
        }
        c.remove(0);
        if (how == 1) c.store->clear();
        if (how == 2) c.store->erase(0, 0, kCells);
        request(c, 1);
        CHECK(c.importance() == importance, "emptied (%d): other statistics the second time", how);
        CHECK(c.content(1200) == content, "emptied (%d): other records the second time", how);
    }
    Cache kept;
    kept.store->keep_statistics(true);
    request(kept, 1);
    kept.remove(0);
    request(kept, 1);
    CHECK(kept.importance() != importance, "statistics that are to be kept begin anew");
}

void test_streams() {
    Cache fresh;
    request(fresh, 1);
    Cache c(3);
    request(c, 2, 0);
    request(c, 1, 1);
    request(c, 3, 2);
    CHECK(c.importance(1) == fresh.importance() && c.content(1200, 1) == fresh.content(1200), "the queries of other streams count");
    c.store->copy_stream(*c.store, 1, 0);
    c.cells[0] = c.cells[1];
    CHECK(c.importance(0) == fresh.importance() && c.content(1200, 0) == fresh.content(1200), "a copy has other statistics");
    for (Cache * x : {&c, &fresh}) {
        x->remove(700);
        x->feed_at(700, 60, 4);
    }
    CHECK(c.importance(0) == fresh.importance(), "a copy does not know how its source came to be");
}

// Back to a prefix: the statistics are those at the end of the last 128, 512, 2048, ... tokens in it.
void test_rewound() {
    for (int kept : {100, 290, 310, 899, 1199}) {
        Cache c;
        for (int first = 0; first < 1200; first += 100) c.feed_at(first, 100, 1);
        for (int round = 0; round < 3; ++round) {
            c.remove(kept);
            for (int i = 0; i < 250; i += 50) c.feed_at(kept + i, 50, 2 + round);
        }
        // A stream that has read no more than the batches before the mark, and then the same.
        const int mark = kept >= 600 ? 600 : kept >= 200 ? 200 : 0;
        Cache right;
        for (int first = 0; first < mark; first += 100) right.feed_at(first, 100, 1);
        for (int i = mark; i < kept; ++i) right.cells[0][i] = {0, i};
        for (int i = 0; i < 250; i += 50) right.feed_at(kept + i, 50, 4);
        CHECK(c.importance() == right.importance(), "rewound to %d: not the statistics of the %d tokens before the mark", kept, mark);
    }
}

// What is not a rewinding: rejected drafts, a context shift, a ring of few cells.
void test_not_rewound() {
    Cache drafts, all;
    drafts.feed_at(0, 400, 1);
    all.store->keep_statistics(true);
    all.feed_at(0, 400, 1);
    for (int i = 400; i < 900; i += 3) {
        for (Cache * x : {&drafts, &all}) {
            x->feed_at(i, 8, 2);
            x->remove(i + 3);
        }
    }
    CHECK(drafts.importance() == all.importance(), "rejected drafts take the statistics back");

    Cache shifted, counted;
    counted.store->keep_statistics(true);
    for (Cache * x : {&shifted, &counted}) {
        for (int first = 0; first < 1000; first += 100) x->feed_at(first, 100, 1);
        for (auto & cell : x->cells[0]) {
            if (cell.first == 0 && cell.second >= 100 && cell.second < 600) cell = {-1, -1};
            if (cell.first == 0 && cell.second >= 600) cell.second -= 500;
        }
        for (int i = 500; i < 900; i += 50) x->feed_at(i, 50, 3, 0, 0, -400);  // into the cells that are free now
    }
    CHECK(shifted.importance() == counted.importance(), "a context shift takes the statistics back");

    Cache ring(1, 128, 128, 200), whole(1, 128, 128, 200);
    whole.store->keep_statistics(true);
    for (int i = 0; i < 2000; i += 40) {
        for (Cache * x : {&ring, &whole}) {
            std::vector<Token> tokens;
            for (int j = i; j < i + 40; ++j) tokens.push_back({0, j, j % 320});
            x->feed(tokens, 1);
        }
    }
    CHECK(ring.importance() == whole.importance(), "a ring of cells takes the statistics back");
}

int in_f16(const Cache & c) { return c.store->pages_half(); }

// Sequences in one stream: each has its window, and the page of its first token.
void test_sequences() {
    constexpr int kSequences = 4, kPrompt = 600;
    Cache c;
    std::vector<int> at(kSequences);
    int next = 0;
    auto append = [&](int n, const std::vector<int> & which) {  // a batch of n tokens of each
        std::vector<Token> tokens;
        for (int i = 0; i < n; ++i) {
            for (int s : which) tokens.push_back({s, at[s]++, next++});
        }
        c.feed(tokens, 1);
    };
    auto check_windows = [&](const char * when) {
        for (int cell = 0; cell < next; ++cell) {
            const auto [seq, pos] = c.cells[0][cell];
            const PageStore::Page & page = c.store->page(0, cell / kPageCells);
            const bool is_recent = pos >= at[seq] - 128;
            CHECK(!(is_recent || pos == 0) || !page.settled(), "%s: token %d of sequence %d (of %d) is packed", when, pos, seq, at[seq]);
        }
        CHECK(in_f16(c) <= kSequences * c.store->shape().home_pages(), "%s: %d pages in F16", when, in_f16(c));
    };
    for (int s = 0; s < kSequences; ++s) {
        append(300, {s});
        append(300, {s});
        check_windows("after a prompt");
    }
    CHECK(next == kSequences * kPrompt && c.store->pages_packed() >= 8, "%d pages are packed", c.store->pages_packed());
    for (int i = 0; i < 200; ++i) {
        append(1, {0, 1, 2, 3});
        if (i % 10 == 0) check_windows("token by token");
    }
    for (int i = 0; i < 100; ++i) append(1, {2});
    check_windows("one alone");
    append(50, {1, 3});
    check_windows("two at once");
    int n_packed = c.store->pages_packed();
    CHECK(n_packed >= next / kPageCells - kSequences * c.store->shape().home_pages(), "only %d of %d pages are packed", n_packed, next / kPageCells);

    // One of them ends, and another takes its cells: the others keep their windows.
    c.remove(0, 0);
    at[0] = 0;
    const int end = next;
    next = 0;
    append(200, {0});
    next = end;
    for (int s : {1, 2, 3}) {
        for (int cell = 0; cell < next; ++cell) {
            const auto [seq, pos] = c.cells[0][cell];
            CHECK(seq != s || pos < at[s] - 128 || !c.store->page(0, cell / kPageCells).settled(), "afterwards: token %d of sequence %d is packed", pos, seq);
        }
    }
}

// A sequence that came between the tokens of another ends, and a new one takes its cells: it has the place of the one that ended, not of the other.
void test_scattered() {
    for (int sinks : {0, 128}) {
        constexpr int kWindow = 256;
        Cache c(1, kWindow, sinks);
        int next = 0, at[3] = {};
        auto append = [&](int seq, int n) {
            std::vector<Token> tokens;
            for (int i = 0; i < n; ++i) tokens.push_back({seq, at[seq]++, next++});
            c.feed(tokens, 1);
        };
        for (int i = 0; i < 45; ++i) append(0, 38), append(1, 4);
        c.remove(0, 1);
        std::vector<Token> tokens;
        for (int cell = 0; tokens.size() < 90; ++cell) {
            if (c.cells[0][cell].first < 0) tokens.push_back({2, at[2]++, cell});
        }
        c.feed(tokens, 1);
        for (int cell = 0; cell < next; ++cell) {
            const auto [seq, pos] = c.cells[0][cell];
            CHECK(seq != 0 || pos < at[0] - kWindow || !c.store->page(0, cell / kPageCells).settled(), "token %d of %d is packed (%d sinks)", pos, at[0], sinks);
        }
        CHECK(in_f16(c) <= 2 * c.store->shape().home_pages(), "%d pages in F16 (%d sinks)", in_f16(c), sinks);
    }
}

// A sequence by itself is what it was: one window, nothing more.
void test_one_sequence() {
    Cache c;
    for (int round = 0; round < 5; ++round) {
        for (int first = 0; first < 1500; first += 100) {
            c.feed_at(first, 100, round);
            CHECK(in_f16(c) <= c.store->shape().home_pages(), "%d pages in F16", in_f16(c));
        }
        c.remove(round * 300);
        c.feed_at(round * 300, 20, 9);
        c.remove(0);
    }
}

}  // namespace

int main() {
    test_emptied();
    test_streams();
    test_rewound();
    test_not_rewound();
    test_sequences();
    test_scattered();
    test_one_sequence();
    return check_result();
}
