// Nanoseconds of processor time per page and head for every kernel of every supported instruction set; "again" packs rows that were read back.
// Usage: bench_kernels [head size]; MIXKVQ_ISA=avx2 for one set only
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <random>
#include <vector>

#include "mixkvq/kernels.h"

using namespace mixkvq;

namespace {

// The best of several runs of about two milliseconds: other programs only ever add time.
template <class Work>
double nanoseconds(Work work) {
    auto run = [&](int n) {
        const std::clock_t begin = std::clock();
        for (int i = 0; i < n; ++i) work();
        return double(std::clock() - begin) * (1e9 / CLOCKS_PER_SEC) / n;
    };
    const int n = std::max(1, int(2e6 / std::max(run(1), 100.0)));
    double best = run(n);
    for (int i = 0; i < 20; ++i) best = std::min(best, run(n));
    return best;
}

float * aligned(std::vector<float> & v, size_t n) {
    v.assign(n + 16, 0.0f);
    return reinterpret_cast<float *>((reinterpret_cast<uintptr_t>(v.data()) + 63) / 64 * 64);
}

struct KeyCase { const char * name; KeyFormat format; };
struct ValueCase { const char * name; ValueFormat format; };

}  // namespace

int main(int argc, char ** argv) {
    const char * only = std::getenv("MIXKVQ_ISA");
    const int d = argc > 1 ? std::atoi(argv[1]) : 128;
    const int n8 = 4, n4 = d * 5 / 16 / 4 * 4, counts[] = {1, 4, 8, 64};
    const KeyCase keys[] = {
        {"keys 8@4 4@5/16 2@rest", {d, 0, n8, n4, 0, d - n8 - n4, 128}},
        {"keys the same, groups of 32", {d, 0, n8, n4, 0, d - n8 - n4, 32}},
        {"keys 3 bits", {d, 0, 0, 0, d, 0, 128}},
        {"keys 4 bits", {d, 0, 0, d, 0, 0, 128}},
        {"keys 8 bits", {d, 0, d, 0, 0, 0, 128}},
    };
    const ValueCase values[] = {
        {"values 2 bits rotated", {d, 2, 0}}, {"values 3 bits rotated", {d, 3, 0}}, {"values 4 bits rotated", {d, 4, 0}},
        {"values 8 bits rotated", {d, 8, 0}}, {"values 2 bits, groups of 32", {d, 2, 32}},
    };
    for (const KeyCase & c : keys) {
        if (c.format.error()) return std::fprintf(stderr, "bench_kernels: head size %d: %s\n", d, c.format.error()), 2;
    }

    std::mt19937 rng(1);
    std::normal_distribution<float> gauss;
    const size_t stride = size_t(8) * d;  // eight heads side by side, as the cache has them
    std::vector<float> x(kPageCells * stride), importance(d, 1.0f), memory[5];
    for (float & v : x) v = gauss(rng);
    std::vector<half> rows(x.size()), back(x.size());
    kernels_for(Isa::scalar)->to_half(x.data(), rows.data(), int(x.size()));
    float * q = aligned(memory[0], 64 * d), * scores = aligned(memory[1], 64 * kPageCells), * acc = aligned(memory[2], 64 * d);
    float * scratch = aligned(memory[3], scratch_floats(d));
    uint8_t * record = reinterpret_cast<uint8_t *>(aligned(memory[4], kPageCells * d));

    for (Isa isa : kIsas) {
        if (!isa_supported(isa) || (only && std::strcmp(only, isa_name(isa)))) continue;
        const Kernels & k = *kernels_for(isa);
        std::printf("\n%s, head size %d, ns per page and head %33s", isa_name(isa), d, "");
        for (int n : counts) std::printf("   n=%-5d", n);
        std::printf("\n");
        auto row = [&](const char * name, const char * what, auto work) {
            std::printf("  %-30s %-8s", name, what);
            std::printf("%31s", "");
            for (int n : counts) {
                std::printf("%9.0f ", nanoseconds([&] { work(n); }));
                std::fflush(stdout);
            }
            std::printf("\n");
        };
        auto once = [&](const char * name, const char * what, auto work) {
            std::printf("  %-30s %-8s%9.0f\n", name, what, nanoseconds(work));
        };
        auto new_queries = [&] { for (int i = 0; i < 64 * d; ++i) q[i] = gauss(rng); };
        auto new_weights = [&] { for (int i = 0; i < 64 * kPageCells; ++i) scores[i] = std::abs(gauss(rng)); };

        for (const KeyCase & c : keys) {
            once(c.name, "pack", [&] { k.pack_keys(c.format, rows.data(), stride, CellMask::all(), importance.data(), record); });
            once(c.name, "unpack", [&] { k.unpack_keys(c.format, record, back.data(), stride); });
            once(c.name, "again", [&] { k.pack_keys(c.format, back.data(), stride, CellMask::all(), importance.data(), record); });
            new_queries();
            row(c.name, "scores", [&](int n) { k.scores_packed(c.format, record, nullptr, q, n, scores, scratch); });
        }
        new_queries();
        row("F16 rows", "scores", [&](int n) { k.scores_half(d, rows.data(), stride, kPageCells, q, n, scores, scratch); });
        for (const ValueCase & c : values) {
            once(c.name, "pack", [&] { k.pack_values(c.format, rows.data(), stride, CellMask::all(), record); });
            once(c.name, "unpack", [&] { k.unpack_values(c.format, record, back.data(), stride); });
            once(c.name, "again", [&] { k.pack_values(c.format, back.data(), stride, CellMask::all(), record); });
            new_weights();
            row(c.name, "values", [&](int n) { k.values_packed(c.format, record, nullptr, scores, n, acc, scratch); });
        }
        row("F16 rows", "values", [&](int n) { k.values_half(d, rows.data(), stride, kPageCells, scores, n, acc, scratch); });
        row("softmax", "logits", [&](int n) {
            for (int i = 0; i < n; ++i) scores[0] += k.logits(scores + 128 * i, kPageCells, 0.9f, 0.0f, nullptr, 1.0f);
        });
        row("softmax", "exp_sum", [&](int n) {
            for (int i = 0; i < n; ++i) {
                for (int t = 0; t < kPageCells; ++t) scores[t] = -0.01f * float(t);
                k.exp_sum(scores, kPageCells, 0.0f);
            }
        });
        once("output", "rotate", [&] { k.rotate(acc, d, d & -d); });
    }
    return 0;
}
