#include <pybind11/stl.h>

#include <optional>

#include "mixkvq/divergence.h"
#include "register.h"

namespace mixkvq::bindings {

namespace {

// In float64, by row: the divergence of every cache; and of the baseline and every cache, in this order, -log p of the target and the first choice.
py::tuple compare_predictions(const py::array & baseline, const std::vector<py::array> & caches, const std::optional<py::array> & targets,
                              int threads, const std::optional<std::string> & isa) {
    const Kernels & table = kernels(isa);
    const py::array expected = checked(baseline, "baseline", "float32", {-1, -1});
    const py::ssize_t n = expected.shape(0), n_vocab = expected.shape(1), n_rows = py::ssize_t(caches.size()) + 1;
    if (n_vocab < 1 || n_vocab > INT32_MAX || n > INT32_MAX) throw py::value_error("baseline has rows of " + std::to_string(n_vocab) + " logits");
    if (threads < 1) throw py::value_error("threads is " + std::to_string(threads) + "; it must be at least 1");
    std::vector<py::array>     found;
    std::vector<const float *> rows;
    for (size_t k = 0; k < caches.size(); ++k) {
        found.push_back(checked(caches[k], ("caches[" + std::to_string(k) + "]").c_str(), "float32", {n, n_vocab}));
        rows.push_back(static_cast<const float *>(found.back().data()));
    }
    std::vector<int32_t> wanted;
    if (targets) {
        const py::array of = checked(*targets, "targets", "int64", {n});
        for (py::ssize_t i = 0; i < n; ++i) {
            const int64_t token = static_cast<const int64_t *>(of.data())[i];
            if (token < 0 || token >= n_vocab) {
                throw py::value_error("targets[" + std::to_string(i) + "] is " + std::to_string(token) + ", not one of " + std::to_string(n_vocab) + " tokens");
            }
            wanted.push_back(int32_t(token));
        }
    }
    std::vector<Prediction> out(size_t(n) * n_rows);
    BadLogits               bad;
    {
        py::gil_scoped_release release;
        bad = mixkvq::compare_predictions(table, static_cast<const float *>(expected.data()), rows.data(), int(caches.size()), int(n), int(n_vocab),
                                          targets ? wanted.data() : nullptr, threads, out.data());
    }
    if (bad.row >= 0) {
        const std::string whose = bad.cache < 0 ? "baseline" : "caches[" + std::to_string(bad.cache) + "]";
        const py::array & where = bad.cache < 0 ? expected : found[size_t(bad.cache)];
        const float       value = static_cast<const float *>(where.data())[bad.row * n_vocab + bad.token];
        throw py::value_error(whose + ", row " + std::to_string(bad.row) + ": the logit of token " + std::to_string(bad.token) + " is " +
                              std::to_string(value) + (value < 0 ? ", the largest" : ""));
    }
    py::array_t<double>  kld({n_rows - 1, n}), nll({n_rows, n});
    py::array_t<int64_t> top({n_rows, n});
    for (py::ssize_t k = 0; k < n_rows; ++k) {
        for (py::ssize_t i = 0; i < n; ++i) {
            const Prediction & each = out[size_t(k * n + i)];
            if (k > 0) kld.mutable_at(k - 1, i) = each.kld;
            nll.mutable_at(k, i) = each.nll;
            top.mutable_at(k, i) = each.top;
        }
    }
    return py::make_tuple(kld, nll, top);
}

}  // namespace

void register_divergence(py::module_ & m) {
    m.def("compare_predictions", &compare_predictions, py::arg("baseline"), py::arg("caches"), py::arg("targets") = py::none(), py::kw_only(),
          py::arg("threads") = 1, py::arg("isa") = py::none());
}

}  // namespace mixkvq::bindings
