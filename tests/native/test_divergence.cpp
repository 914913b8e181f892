// The comparison of predictions: every instruction set against the scalar kernels, and the vector ones against each other.
//
// Tolerances: an exponential is good to 4e-16 of itself (rounding of the polynomial), sums of non-negative numbers to 1e-14; a divergence, which
// cancels numbers as large as the logarithms of probabilities, to 1e-13.
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "mixkvq/divergence.h"

using namespace mixkvq;

namespace {

std::mt19937 rng(7);
float gauss() { return std::normal_distribution<float>()(rng); }
const float kInfinity = std::numeric_limits<float>::infinity();

void test_exp(const Kernels & a, const Kernels & b) {
    for (int n : {0, 1, 7, 15, 16, 17, 33, 1024}) {
        std::vector<float> x(n + 1, 5.0f);
        for (int i = 0; i < n; ++i) x[i] = i % 9 == 4 ? -kInfinity : 3.25f - std::fabs(float(i % 3 ? 4 : 300) * gauss());
        if (n > 2) x[2] = 3.25f - 708.0f;
        std::vector<double> y(n + 1, 9.0), z = y;
        const double sa = a.exp_wide(x.data(), n, 3.25f, y.data()), sb = b.exp_wide(x.data(), n, 3.25f, z.data());
        for (int i = 0; i < n; ++i) CHECK(std::fabs(y[i] - z[i]) <= 4e-16 * y[i], "exp(%.9g): %.17g, %.17g", x[i] - 3.25f, y[i], z[i]);
        CHECK(std::fabs(sa - sb) <= 1e-14 * sa, "sum of %d: %.17g, %.17g", n, sa, sb);
        CHECK(z[n] == 9.0, "exp_wide of %d wrote too far", n);
        std::vector<float> other(n);
        double             size = 0;
        for (int i = 0; i < n; ++i) other[i] = 8 * gauss(), size += y[i] > 0 ? y[i] * std::fabs(double(x[i]) - other[i]) : 0;
        const double ga = a.weighted_gap(y.data(), x.data(), 3.25f, other.data(), 2.0f, n), gb = b.weighted_gap(y.data(), x.data(), 3.25f, other.data(), 2.0f, n);
        CHECK(std::fabs(ga - gb) <= 1e-14 * (size + 1), "weighted gap of %d: %.17g, %.17g", n, ga, gb);
    }
}

void test_top(const Kernels & a, const Kernels & b) {
    for (int n : {1, 3, 100, 127, 128, 129, 255, 256, 257, 511, 512, 513, 3000}) {
        for (int kind = 0; kind < 30; ++kind) {
            std::vector<float> x(n);
            for (float & v : x) v = kind % 3 ? gauss() : float(int(rng() % 4));
            if (kind == 4) std::fill(x.begin(), x.end(), -kInfinity);
            if (kind % 5 == 4) x[rng() % n] = std::numeric_limits<float>::quiet_NaN();
            int wa = -1, wb = -1;
            const float ta = a.first_top(x.data(), n, wa), tb = b.first_top(x.data(), n, wb);
            CHECK(wa == wb && (ta == tb || (std::isnan(ta) && std::isnan(tb))), "the first top of %d: %g at %d, %g at %d", n, ta, wa, tb, wb);
        }
    }
}

std::vector<Prediction> compare(const Kernels & k, int n_vocab, int n_threads, const std::vector<std::vector<float>> & rows, const std::vector<int32_t> & targets) {
    const int n = int(targets.size());
    std::vector<const float *> caches;
    for (size_t i = 1; i < rows.size(); ++i) caches.push_back(rows[i].data());
    std::vector<Prediction> out(rows.size() * n);
    const BadLogits bad = compare_predictions(k, rows[0].data(), caches.data(), int(caches.size()), n, n_vocab, targets.data(), n_threads, out.data());
    CHECK(bad.row < 0, "row %d of %d is no distribution", bad.row, bad.cache);
    return out;
}

void test_rows(const Kernels & scalar, const Kernels & k, std::vector<std::vector<Prediction>> & all) {
    std::mt19937 own(3);
    std::normal_distribution<float> normal;
    for (int n_vocab : {1, 17, 1023, 1025, 5003}) {
        const int n = 6;
        std::vector<std::vector<float>> rows(3, std::vector<float>(size_t(n) * n_vocab));
        for (size_t i = 0; i < rows[0].size(); ++i) {
            rows[0][i] = 4 * normal(own);
            rows[1][i] = rows[0][i] + 0.01f * normal(own);
            rows[2][i] = 4 * normal(own);
        }
        std::vector<int32_t> targets(n);
        for (int i = 0; i < n; ++i) targets[i] = int32_t(own() % unsigned(n_vocab));
        const std::vector<Prediction> expected = compare(scalar, n_vocab, 1, rows, targets), found = compare(k, n_vocab, 3, rows, targets);
        for (size_t i = 0; i < found.size(); ++i) {
            CHECK(std::fabs(found[i].kld - expected[i].kld) <= 1e-13, "divergence over %d: %.17g, %.17g", n_vocab, found[i].kld, expected[i].kld);
            CHECK(std::fabs(found[i].nll - expected[i].nll) <= 1e-13, "-log p over %d: %.17g, %.17g", n_vocab, found[i].nll, expected[i].nll);
            CHECK(found[i].top == expected[i].top, "first choice of %d: %d, %d", n_vocab, found[i].top, expected[i].top);
        }
        all.push_back(found);
    }
    std::vector<float> good(200, 1.0f), nan = good;
    nan[150] = std::numeric_limits<float>::quiet_NaN();
    const float * caches[] = {good.data(), nan.data()};
    Prediction    out[6];
    const BadLogits bad = compare_predictions(k, good.data(), caches, 2, 2, 100, nullptr, 2, out);
    CHECK(bad.cache == 1 && bad.row == 1 && bad.token == 50, "cache %d, row %d, token %d", bad.cache, bad.row, bad.token);
}

}  // namespace

int main() {
    const Kernels & scalar = *kernels_for(Isa::scalar);
    std::vector<std::vector<Prediction>> first;
    for (Isa isa : kIsas) {
        if (!isa_supported(isa)) continue;
        const Kernels & k = *kernels_for(isa);
        test_exp(scalar, k);
        test_top(scalar, k);
        std::vector<std::vector<Prediction>> found;
        test_rows(scalar, k, found);
        if (isa == Isa::scalar) continue;
        if (first.empty()) first = found;
        for (size_t i = 0; i < found.size(); ++i) {
            for (size_t j = 0; j < found[i].size(); ++j) {
                const bool same = found[i][j].kld == first[i][j].kld && found[i][j].nll == first[i][j].nll;
                CHECK(same, "%s: other bits than the first vector kernels, case %zu row %zu", isa_name(isa), i, j);
            }
        }
    }
    return check_result();
}
