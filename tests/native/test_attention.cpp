// attention() over page stores: every instruction set against the scalar kernels, and the scalar kernels against a softmax in double over the
// cells as they read back. Awkward numbers of cells and queries, every head size class, group ratios 1 to 16, every preset, masks, ALiBi,
// soft-cap, sinks, several streams, several threads.
//
// Tolerances. Scalar against double: 3e-6 of the values' RMS, the rounding of F32 sums of the online softmax, plus, for packed pages,
// 2^-9: reading back rounds keys and values to F16 (2^-11 of each, and of the logits), attention does not. A vector set against scalar: its own
// rounding of queries and weights must stay below a tenth of what packing itself has changed in the output (RMS over the output), plus the same 3e-6.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "mixkvq/attention.h"
#include "mixkvq/profile.h"

using namespace mixkvq;

namespace {

std::mt19937 rng(11);
float gauss() { return std::normal_distribution<float>()(rng); }
int any(int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); }

constexpr half kHidden = 0xfc00;

struct Case {
    int d = 128, dv = 128, kv_heads = 2, group = 4, cells = 128, tokens = 1, streams = 1, threads = 1;
    std::string preset;  // "": never packed
    enum { open, causal, holes, by_head } mask = open;
    bool sinks = false;
    float softcap = 0, max_bias = 0;

    std::string text() const {
        char line[200];
        std::snprintf(line, sizeof(line), "%s D=%d/%d heads=%dx%d cells=%d tokens=%d streams=%d threads=%d mask=%d sinks=%d softcap=%g alibi=%g",
                      preset.empty() ? "F16" : preset.c_str(), d, dv, kv_heads, group, cells, tokens, streams, threads, int(mask), int(sinks), double(softcap),
                      double(max_bias));
        return line;
    }
};

struct Input {
    std::vector<float> k, v, q, sinks;
    std::vector<half> mask;  // [stream][head or 1][token][n_kv]
    int n_kv;
};

Input make_input(const Case & c) {
    Input in;
    in.n_kv = (c.cells + 31) / 32 * 32;  // llama.cpp pads the cells it reads
    auto fill = [](std::vector<float> & x, size_t n, int period) {
        x.resize(n);
        for (size_t i = 0; i < n; ++i) x[i] = gauss() * (i % period == 3 ? 6.0f : 1.0f);  // some channels stand out
    };
    fill(in.k, size_t(c.streams) * c.cells * c.kv_heads * c.d, c.d);
    fill(in.v, size_t(c.streams) * c.cells * c.kv_heads * c.dv, 1 << 30);
    fill(in.q, size_t(c.streams) * c.tokens * c.kv_heads * c.group * c.d, c.d);
    for (int i = 0; i < c.kv_heads * c.group; ++i) in.sinks.push_back(2 * gauss());
    const int heads = c.mask == Case::by_head ? c.kv_heads * c.group : 1;
    in.mask.resize(size_t(c.streams) * heads * c.tokens * in.n_kv);
    for (size_t i = 0; i < in.mask.size(); ++i) {
        const int cell = int(i % in.n_kv), token = int(i / in.n_kv) % c.tokens;
        const bool future = cell > c.cells - c.tokens + token;
        const bool hidden = cell >= c.cells || (c.mask == Case::causal && future) || (c.mask >= Case::holes && (rng() % 4 == 0 || cell / 128 == 1));
        const float bias = c.max_bias > 0 ? -0.1f * float(c.cells - cell) : 0.0f;
        if (!hidden) kernels_for(Isa::scalar)->to_half(&bias, &in.mask[i], 1);
        if (hidden) in.mask[i] = kHidden;
    }
    return in;
}

struct Stores {
    Region memory[2];
    ScratchPool pool;
    std::deque<PageStore> store;

    Stores(const Kernels & kernels, const Case & c, const Input & in) {
        for (int i = 0; i < 2; ++i) {
            const int d = i ? c.dv : c.d;
            StoreShape s;
            s.is_value = i, s.row = c.kv_heads * d, s.n_cells = in.n_kv, s.n_streams = c.streams, s.window = 0, s.sinks = 0;
            memory[i] = Region(2 * reserve_bytes(s, s.page_bytes()) + (1 << 20));
            store.emplace_back(s, kernels, memory[i].data(), memory[i].size(), pool);
        }
        if (const Preset * preset = find_preset(c.preset)) {
            store[0].set_formats(std::vector<KeyFormat>(c.kv_heads, key_format(*preset, c.d)), {});
            store[1].set_formats(std::vector<ValueFormat>(c.kv_heads, value_format(*preset, c.dv)));
        } else {
            KeyFormat k = key_format(default_preset(), c.d);
            store[0].set_formats(std::vector<KeyFormat>(c.kv_heads, k), {});
            store[1].set_formats(std::vector<ValueFormat>(c.kv_heads, value_format(default_preset(), c.dv)));
        }
        for (int s = 0; s < c.streams; ++s) {
            store[0].write(s, 0, c.cells, in.k.data() + size_t(s) * c.cells * c.kv_heads * c.d, size_t(c.kv_heads) * c.d);
            store[1].write(s, 0, c.cells, in.v.data() + size_t(s) * c.cells * c.kv_heads * c.dv, size_t(c.kv_heads) * c.dv);
        }
        if (c.preset.empty()) return;
        for (PageStore & p : store) p.settle(1);
    }
};

std::vector<float> attend(const Kernels & kernels, Stores & stores, const Case & c, const Input & in) {
    const int heads = c.kv_heads * c.group;
    AttentionCall call;
    call.q = in.q.data(), call.q_head = c.d, call.q_token = size_t(heads) * c.d, call.q_stream = call.q_token * c.tokens;
    std::vector<float> out(size_t(c.streams) * c.tokens * heads * c.dv, std::numeric_limits<float>::quiet_NaN());
    call.out = out.data(), call.out_head = c.dv, call.out_token = size_t(heads) * c.dv, call.out_stream = call.out_token * c.tokens;
    call.mask = in.mask.data(), call.mask_token = in.n_kv, call.mask_head = c.mask == Case::by_head ? size_t(c.tokens) * in.n_kv : 0;
    call.mask_stream = in.mask.size() / c.streams;
    call.sinks = c.sinks ? in.sinks.data() : nullptr;
    call.n_tokens = c.tokens, call.n_heads = heads, call.n_streams = c.streams, call.n_kv = in.n_kv;
    call.scale = 1 / std::sqrt(float(c.d)), call.max_bias = c.max_bias, call.softcap = c.softcap;
    AttentionWorkspace workspace;
    attention(kernels, stores.store[0], stores.store[1], call, c.threads, workspace);
    std::vector<float> again(out);
    call.out = again.data();
    attention(kernels, stores.store[0], stores.store[1], call, c.threads, workspace);
    CHECK(std::memcmp(out.data(), again.data(), 4 * out.size()) == 0, "%s: %s: a second call gave other bits", isa_name(kernels.isa), c.text().c_str());
    return out;
}

float slope_of(const Case & c, int head) {
    if (c.max_bias <= 0) return 1;
    const int n = c.kv_heads * c.group, power = 1 << int(std::floor(std::log2(n)));
    const double base = std::pow(2.0, -double(c.max_bias) / power), half_base = std::pow(2.0, -double(c.max_bias) / 2 / power);
    return float(head < power ? std::pow(base, head + 1) : std::pow(half_base, 2 * (head - power) + 1));
}

// A softmax over all cells at once, in double, of the rows as the stores read back.
std::vector<double> exact(const Stores & stores, const Case & c, const Input & in) {
    const Kernels & scalar = *kernels_for(Isa::scalar);
    const int heads = c.kv_heads * c.group, row_k = c.kv_heads * c.d, row_v = c.kv_heads * c.dv;
    std::vector<double> out(size_t(c.streams) * c.tokens * heads * c.dv);
    std::vector<half> packed(size_t(in.n_kv) * std::max(row_k, row_v));
    for (int s = 0; s < c.streams; ++s) {
        std::vector<float> k(size_t(in.n_kv) * row_k), v(size_t(in.n_kv) * row_v);
        stores.store[0].read(s, 0, in.n_kv, packed.data());
        scalar.from_half(packed.data(), k.data(), int(k.size()));
        stores.store[1].read(s, 0, in.n_kv, packed.data());
        scalar.from_half(packed.data(), v.data(), int(v.size()));
        for (int t = 0; t < c.tokens; ++t) {
            for (int h = 0; h < heads; ++h) {
                const float * q = &in.q[((size_t(s) * c.tokens + t) * heads + h) * c.d];
                const half * mask = &in.mask[((size_t(s) * (c.mask == Case::by_head ? heads : 1) + (c.mask == Case::by_head ? h : 0)) * c.tokens + t) * in.n_kv];
                std::vector<double> logit(in.n_kv);
                double top = c.sinks ? double(in.sinks[h]) : -INFINITY;
                for (int i = 0; i < in.n_kv; ++i) {
                    double x = 0;
                    for (int j = 0; j < c.d; ++j) x += double(q[j]) * double(k[size_t(i) * row_k + h / c.group * c.d + j]);
                    x /= std::sqrt(double(c.d));
                    if (c.softcap > 0) x = c.softcap * std::tanh(x / c.softcap);
                    float bias;
                    scalar.from_half(mask + i, &bias, 1);
                    logit[i] = x + double(slope_of(c, h)) * (mask[i] == kHidden ? -INFINITY : double(bias));
                    top = std::max(top, logit[i]);
                }
                double sum = c.sinks ? std::exp(double(in.sinks[h]) - top) : 0;
                double * to = &out[((size_t(s) * c.tokens + t) * heads + h) * c.dv];
                if (top == -INFINITY) continue;
                for (int i = 0; i < in.n_kv; ++i) {
                    const double w = std::exp(logit[i] - top);
                    sum += w;
                    for (int j = 0; j < c.dv && w > 0; ++j) to[j] += w * double(v[size_t(i) * row_v + h / c.group * c.dv + j]);
                }
                for (int j = 0; j < c.dv; ++j) to[j] /= sum;
            }
        }
    }
    return out;
}

template <class A, class B>
double rms_difference(const std::vector<A> & a, const std::vector<B> & b) {
    double sum = 0;
    for (size_t i = 0; i < a.size(); ++i) sum += (double(a[i]) - double(b[i])) * (double(a[i]) - double(b[i]));
    return std::sqrt(sum / double(a.size()));
}

double worst_share = 0;

void run(const Case & c) {
    const Input in = make_input(c);
    const Kernels & scalar = *kernels_for(Isa::scalar);
    Stores oracle(scalar, c, in);
    const std::vector<float> expected = attend(scalar, oracle, c, in);
    const double close = 3e-6;
    const double format_noise = [&] {
        if (c.preset.empty()) return 0.0;
        Case plain = c;
        plain.preset = "";
        Stores f16(scalar, plain, in);
        return rms_difference(expected, attend(scalar, f16, plain, in));
    }();
    if (c.cells <= 300) {
        const std::vector<double> truth = exact(oracle, c, in);
        const double rounding = c.preset.empty() ? 0 : 1.0 / 512;
        CHECK(rms_difference(expected, truth) <= close + rounding, "scalar: %s: %g from a softmax in double", c.text().c_str(), rms_difference(expected, truth));
    }
    for (Isa isa : kIsas) {
        if (isa == Isa::scalar || !isa_supported(isa)) continue;
        const Kernels & k = *kernels_for(isa);
        Stores stores(k, c, in);
        const std::vector<float> got = attend(k, stores, c, in);
        const double error = rms_difference(got, expected);
        if (format_noise > 0) worst_share = std::max(worst_share, error / format_noise);
        CHECK(error <= 0.1 * format_noise + close, "%s: %s: error %g, packing itself %g", isa_name(isa), c.text().c_str(), error, format_noise);
    }
}

}  // namespace

int main() {
    const int cells[] = {1, 3, 31, 32, 33, 127, 128, 129, 255, 256, 257, 385, 700};
    const int tokens[] = {1, 2, 7, 64};
    const int head_sizes[] = {64, 80, 96, 128, 192, 256, 72, 40};
    const int groups[] = {1, 2, 3, 4, 5, 7, 8, 16};
    std::vector<std::string> formats = {""};
    for (const Preset & p : presets()) formats.push_back(p.name);

    // Every number of cells with every number of queries, and every format with every head size; the rest is drawn.
    std::vector<Case> cases;
    auto draw = [&](int n_cells, int n_tokens, const std::string & preset, int d) {
        Case c;
        c.cells = n_cells, c.tokens = std::min(n_tokens, n_cells), c.preset = preset, c.d = d, c.dv = any(0, 3) ? d : head_sizes[any(0, 7)];
        c.kv_heads = any(1, 2), c.group = n_tokens == 64 ? any(1, 2) : groups[any(0, 7)];
        c.streams = any(0, 5) ? 1 : 2, c.threads = any(1, 3);
        c.mask = std::vector<decltype(c.mask)>{Case::open, Case::causal, Case::causal, Case::holes, Case::by_head}[any(0, 4)];
        c.sinks = any(0, 3) == 0, c.softcap = any(0, 3) ? 0.0f : 20.0f, c.max_bias = any(0, 3) ? 0.0f : 8.0f;
        cases.push_back(c);
    };
    for (int n_cells : cells) {
        for (int n_tokens : tokens) draw(n_cells, n_tokens, formats[any(0, int(formats.size()) - 1)], 32 * any(1, 8));
    }
    for (const std::string & preset : formats) {
        for (int d : head_sizes) draw(cells[any(7, 12)], tokens[any(0, 2)], preset, d);
    }
    for (const Case & c : cases) run(c);
    std::printf("%d cases; the vector sets add at most %.3f of what packing changes\n", int(cases.size()), worst_share);
    return check_result();
}
