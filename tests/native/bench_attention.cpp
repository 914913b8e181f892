// Attention over a whole cache of one layer, as the backend calls it: milliseconds, GB/s of cache read, by preset, depth, batch and instruction
// set, or for that of MIXKVQ_ISA. Usage: bench_attention [threads [query heads [KV heads [head size [preset ...]]]]]
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <random>
#include <string>
#include <vector>

#include "mixkvq/attention.h"
#include "mixkvq/profile.h"

using namespace mixkvq;

namespace {

constexpr int kCells = 32768, kWindow = 128, kSinks = 128;

// Processor time on one thread, so that other programs do not count; with several the time that passes.
double now_ms(int n_threads) {
    if (n_threads == 1) return double(std::clock()) * (1e3 / CLOCKS_PER_SEC);
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

template <class Work>
double milliseconds(int n_threads, Work work) {
    std::vector<double> rounds;
    const double start = now_ms(n_threads);
    while (rounds.size() < 5 || (rounds.size() < 50 && now_ms(n_threads) - start < 500)) {
        const double begin = now_ms(n_threads);
        work();
        rounds.push_back(now_ms(n_threads) - begin);
    }
    std::nth_element(rounds.begin(), rounds.begin() + rounds.size() / 2, rounds.end());
    return rounds[rounds.size() / 2];
}

struct Layer {
    Region memory[2];
    ScratchPool pool;
    PageStore keys, values;

    static StoreShape shape(bool is_value, int row) {
        StoreShape s;
        s.is_value = is_value, s.row = row, s.n_cells = kCells, s.window = kWindow, s.sinks = kSinks;
        return s;
    }
    static size_t bytes(bool is_value, int row) { return 2 * shape(is_value, row).page_bytes() + reserve_bytes(shape(is_value, row), shape(is_value, row).page_bytes()); }

    Layer(const Kernels & k, int row)
        : memory{Region(bytes(false, row)), Region(bytes(true, row))},
          keys(shape(false, row), k, memory[0].data(), memory[0].size(), pool),
          values(shape(true, row), k, memory[1].data(), memory[1].size(), pool) {}
};

}  // namespace

int main(int argc, char ** argv) {
    auto argument = [&](int i, int otherwise) { return argc > i ? std::atoi(argv[i]) : otherwise; };
    const int n_threads = argument(1, 2), n_heads = argument(2, 32), n_kv_heads = argument(3, 8), d = argument(4, 128);
    std::vector<std::string> names(argv + std::min(argc, 5), argv + argc);
    if (names.empty()) names = {"balanced"};
    if (n_threads < 1 || n_kv_heads < 1 || n_heads % n_kv_heads || d % 8 || d < kMinHeadSize || d > kMaxHeadSize) {
        return std::fprintf(stderr, "bench_attention: heads must be a multiple of KV heads, the head size a multiple of 8 from %d to %d\n", kMinHeadSize, kMaxHeadSize), 2;
    }
    const char * only = std::getenv("MIXKVQ_ISA");
    const int row = n_kv_heads * d;
    const int depths[] = {4096, 16384, 32768}, batches[] = {1, 64};
    std::mt19937 rng(1);
    std::normal_distribution<float> gauss;
    std::vector<float> rows(size_t(512) * row), q(size_t(512) * n_heads * d), out(q.size());
    for (float & x : rows) x = gauss(rng);
    for (float & x : q) x = gauss(rng) * 0.3f;

    for (Isa isa : kIsas) {
        if (!isa_supported(isa) || (only ? std::strcmp(only, isa_name(isa)) != 0 : isa == Isa::scalar && argc > 1)) continue;
        const Kernels & k = *kernels_for(isa);
        for (const std::string & name : names) {
            const Preset * preset = find_preset(name);
            if (!preset) return std::fprintf(stderr, "bench_attention: no preset \"%s\"\n", name.c_str()), 2;
            Layer layer(k, row);
            {
                layer.keys.set_formats(std::vector<KeyFormat>(n_kv_heads, key_format(*preset, d)), {});
                layer.values.set_formats(std::vector<ValueFormat>(n_kv_heads, value_format(*preset, d)));
            }
            double packing = 0;
            for (int cell = 0; cell < kCells; cell += 512) {
                layer.keys.write(0, cell, 512, rows.data(), row);
                layer.values.write(0, cell, 512, rows.data(), row);
                const double begin = now_ms(n_threads);
                layer.keys.settle(n_threads);
                layer.values.settle(n_threads);
                packing += 1e3 * (now_ms(n_threads) - begin);
            }
            std::printf("\n%s, %s, %d threads, %d query / %d KV heads of %d: packing %.2f us a token\n", isa_name(isa), name.c_str(), n_threads, n_heads, n_kv_heads, d,
                        packing / kCells);
            const double cell_bytes = double(layer.keys.records_per_page() + layer.values.records_per_page()) / kPageCells;
            for (int n_tokens : batches) {
                std::vector<half> mask(size_t(n_tokens) * kCells, 0);
                AttentionWorkspace workspace;
                for (int depth : depths) {
                    AttentionCall c;
                    c.q = q.data(), c.q_head = d, c.q_token = size_t(n_heads) * d;
                    c.out = out.data(), c.out_head = d, c.out_token = size_t(n_heads) * d;
                    c.mask = mask.data(), c.mask_token = depth;
                    c.n_tokens = n_tokens, c.n_heads = n_heads, c.n_kv = depth, c.scale = 1 / std::sqrt(float(d));
                    const double ms = milliseconds(n_threads, [&] { attention(k, layer.keys, layer.values, c, n_threads, workspace); });
                    std::printf("  %4d tokens at %6d: %9.3f ms  %6.2f GB/s\n", n_tokens, depth, ms, cell_bytes * depth / ms * 1e-6);
                    std::fflush(stdout);
                }
            }
        }
    }
    return 0;
}
