// The online softmax of attend.h against a softmax in double over all pages at once. Tolerance: the kernels' exp is good to 3e-7, a sum of a few
// hundred weights and a rescaling per page add a few roundings: 2e-6 relative. What comes from packing is tested elsewhere.
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "mixkvq/attend.h"

using namespace mixkvq;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
std::mt19937    rng(7);

float uniform(float low, float high) { return std::uniform_real_distribution<float>(low, high)(rng); }

struct Case {
    const char *     name;
    SoftmaxParams    params;
    std::vector<int> cells;  // of each page
    float            spread;
    bool             masked, sink;
};

// One value per cell stands for the values: the accumulator is a single number per query.
void run(const Kernels & k, const Case & c) {
    constexpr int n = 5;
    const int     n_pages = int(c.cells.size());
    const size_t  stride = size_t(n_pages) * kPageCells;
    std::vector<float> scores(n * stride), mask(n * stride, 0.0f), value(stride), sink(n);
    for (float & x : scores) x = uniform(-c.spread, c.spread);
    for (float & x : value) x = uniform(0.5f, 1.5f);
    for (float & x : sink) x = uniform(-2, 2);
    sink[3] = 1000;  // takes everything
    sink[4] = -kInf; // is not there
    if (c.masked) {
        for (float & x : mask) x = rng() % 3 ? uniform(-1, 1) : -kInf;
        std::fill(mask.begin(), mask.begin() + stride, -kInf);                         // query 0 sees nothing
        std::fill(mask.begin() + stride, mask.begin() + stride + kPageCells, -kInf);   // query 1 does not see the first page
        for (int i = 0; i < n; ++i) std::fill_n(mask.begin() + i * stride + stride - kPageCells, kPageCells, -kInf);  // nobody sees the last
    }

    std::vector<float> max(n, -kInf), sum(n, 0.0f), factor(n), acc(n, 0.0f), page(n * kPageCells);
    for (int p = 0; p < n_pages; ++p) {
        for (int i = 0; i < n; ++i) std::copy_n(&scores[i * stride + p * kPageCells], kPageCells, &page[i * kPageCells]);
        for (int i = 0; i < n; ++i) std::fill_n(&page[i * kPageCells] + c.cells[p], kPageCells - c.cells[p], kInf);  // must not be looked at
        const bool seen = softmax_page(k, c.params, page.data(), n, c.cells[p], c.masked ? &mask[p * kPageCells] : nullptr, stride, max.data(),
                                       sum.data(), factor.data());
        const bool expected_seen = c.cells[p] > 0 && !(c.masked && p == n_pages - 1);
        CHECK(seen == expected_seen, "%s, %s: page %d", isa_name(k.isa), c.name, p);
        for (int i = 0; i < n; ++i) {
            acc[i] *= factor[i];
            for (int t = 0; t < kPageCells; ++t) {
                const float w = page[i * kPageCells + t];
                CHECK(w >= 0 && w <= 1 && (t < c.cells[p] || w == 0), "%s, %s: weight %g of cell %d", isa_name(k.isa), c.name, double(w), t);
                acc[i] += w * value[p * kPageCells + t];
            }
        }
    }

    for (int i = 0; i < n; ++i) {
        std::vector<double> logit, v;
        for (int p = 0; p < n_pages; ++p) {
            for (int t = 0; t < c.cells[p]; ++t) {
                const size_t j = p * kPageCells + t;
                double       s = double(scores[i * stride + j]) * c.params.scale;
                if (c.params.softcap > 0) s = c.params.softcap * std::tanh(s / c.params.softcap);
                logit.push_back(s + mask[i * stride + j]);
                v.push_back(value[j]);
            }
        }
        double peak = c.sink ? double(sink[i]) : -INFINITY, total = 0, out = 0;
        for (double s : logit) peak = std::max(peak, s);
        if (peak != -INFINITY) {
            for (size_t j = 0; j < logit.size(); ++j) {
                const double w = std::exp(logit[j] - peak);
                total += w;
                out += w * v[j];
            }
            if (c.sink) total += std::exp(sink[i] - peak);
            out /= total;
        }
        const double got = double(acc[i]) * double(softmax_close(max[i], sum[i], c.sink ? &sink[i] : nullptr));
        CHECK(std::abs(got - out) <= 2e-6, "%s, %s: query %d: %.8g, not %.8g", isa_name(k.isa), c.name, i, got, out);
    }
}

}  // namespace

int main() {
    const Case cases[] = {
        {"one page", {0.5f, 0}, {128}, 4, false, false},
        {"pages", {0.088f, 0}, {128, 128, 128, 128}, 60, false, false},
        {"a part of a page", {1, 0}, {128, 37}, 3, false, false},
        {"single cells", {1, 0}, {1, 1, 1}, 3, false, false},
        {"an empty page", {1, 0}, {0, 128}, 3, false, false},
        {"far apart", {1, 0}, {128, 128, 128}, 300, false, false},
        {"softcap", {0.25f, 5}, {128, 128}, 100, false, false},
        {"mask", {1, 0}, {128, 128, 128}, 5, true, false},
        {"mask and softcap", {1, 3}, {128, 128, 99}, 5, true, false},
        {"sink", {1, 0}, {128, 77}, 2, false, true},
        {"everything", {0.5f, 8}, {128, 128, 128, 50}, 9, true, true},
    };
    for (Isa isa : kIsas) {
        if (!isa_supported(isa)) continue;
        for (const Case & c : cases) run(*kernels_for(isa), c);
    }
    return check_result();
}
