// A stream of a packed state (cpp/core/state.cpp) that anybody may have damaged: it is refused, or the store that has loaded it is whole: it can be read, written to,
// packed, and saved again. The first byte of an input says what the store is like.
#include <cstring>
#include <memory>

#include "fuzz.h"
#include "mixkvq/cache.h"
#include "mixkvq/profile.h"

using namespace mixkvq;

namespace {

Counts counts;
constexpr int kHeads = 2, kHeadSize = 32, kCells = 600;

struct Store {
    ScratchPool pool;
    Region region;
    std::unique_ptr<PageStore> store;

    explicit Store(uint8_t kind) {
        StoreShape shape;
        shape.is_value = kind & 1, shape.row = kHeads * kHeadSize, shape.n_cells = kCells, shape.window = kind & 2 ? 0 : 128, shape.sinks = kind & 2 ? 0 : 128;
        const Preset & preset = *find_preset(kind & 4 ? "paper" : "balanced");
        const KeyFormat key = key_format(preset, kHeadSize);
        const ValueFormat value = value_format(preset, kHeadSize);
        const size_t record = kHeads * (shape.is_value ? value.record_bytes() : key.record_bytes());
        region = Region(reserve_bytes(shape, kind & 8 ? 0 : record) + (kind & 8 ? record : 0));  // 8: a single record
        store = std::make_unique<PageStore>(shape, *kernels_for(Isa::scalar), region.data(), region.size(), pool);
        if (shape.is_value) store->set_formats(std::vector<ValueFormat>(kHeads, value));
        else store->set_formats(std::vector<KeyFormat>(kHeads, key), {});
    }

    void write(int cell, int n) {
        std::vector<float> rows(size_t(n) * kHeads * kHeadSize);
        for (size_t i = 0; i < rows.size(); ++i) rows[i] = float(int(i * 2654435761u % 2001) - 1000) / 300;
        store->write(0, cell, n, rows.data(), size_t(kHeads) * kHeadSize);
        std::vector<half> mask(size_t(n) * kCells, 0xfc00);
        for (int t = 0; t < n; ++t) std::fill_n(&mask[size_t(t) * kCells], cell + t + 1, half(0));
        store->look({mask.data(), true, size_t(kCells), 0, n, 1, 0, kCells});
        if (!store->shape().is_value) store->observe({rows.data(), size_t(kHeads) * kHeadSize, kHeadSize, 0, n, kHeads, 1, 0}, 1);
        store->settle(1);
    }

    std::vector<uint8_t> saved() const {
        std::vector<uint8_t> bytes;
        StateWriter out([&](const void * data, size_t n) {
            bytes.insert(bytes.end(), static_cast<const uint8_t *>(data), static_cast<const uint8_t *>(data) + n);
            return true;
        });
        store->save_stream(0, {{0, kCells}}, false, out);
        out.finish();
        return bytes;
    }
};

}  // namespace

extern "C" int LLVMFuzzerInitialize(int *, char ***) { return 0; }

std::vector<std::vector<uint8_t>> good_inputs() {
    std::vector<std::vector<uint8_t>> inputs;
    for (uint8_t kind = 0; kind < 8; ++kind) {
        Store store(kind);
        for (int cell = 0; cell < 300; cell += 60) store.write(cell, 60);
        std::vector<uint8_t> bytes = store.saved();
        bytes.insert(bytes.begin(), kind);
        inputs.push_back(std::move(bytes));
    }
    return inputs;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    if (size == 0) return 0;
    Store to(data[0]);
    if (data[0] & 16) to.write(0, 200);
    StateReader in(data + 1, size - 1);
    StreamState state;
    if (to.store->parse_stream(in, state)) {
        counts.add(false);
        return 0;
    }
    counts.add(true);
    // To the places where they were, or elsewhere; beside what is there, or in its stead.
    const bool alone = !(data[0] & 32), same = !(data[0] & 64);
    std::vector<CellMove> moves;
    if (same) moves = {{0, 0, kCells}};
    else moves = {{100, 3, 250}, {0, 300, 90}};
    to.store->load_stream(0, state, moves, alone, 1);
    std::vector<half> rows(size_t(kCells) * kHeads * kHeadSize);
    to.store->read(0, 0, kCells, rows.data());
    to.write(40, 70);
    to.write(500, 100);
    to.store->read(0, 0, kCells, rows.data());
    const std::vector<uint8_t> again = to.saved();
    Store other(data[0]);
    StateReader second(again.data(), again.size());
    StreamState once_more;
    promise(!other.store->parse_stream(second, once_more), "what a store has saved is refused");
    return 0;
}
