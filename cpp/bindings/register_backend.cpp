#include <pybind11/stl.h>

#include <memory>
#include <optional>

#include "mixkvq/backend_api.h"
#include "register.h"

namespace mixkvq::bindings {

namespace {

// The handle of one session. The caches live on without it.
class Session {
  public:
    Session(const mixkvq_backend_api * api, mixkvq_session * session) : api_(api), session_(session) {}
    ~Session() {
        end();
        api_->release(session_);
    }
    Session(const Session &) = delete;
    Session & operator=(const Session &) = delete;

    void end() {
        if (!open_) return;
        open_ = false;
        api_->end(session_);
    }

    std::string error() const {
        const char * text = api_->error(session_);
        return text ? text : "";
    }

    py::dict stats() const {
        mixkvq_stats s{};
        int          code;
        {
            py::gil_scoped_release release;
            code = api_->stats(session_, &s);
        }
        if (code != 0) throw std::runtime_error(said("no cache has been created under this session"));
        py::dict d;
        d["bytes"] = s.bytes;
        d["bytes_peak"] = s.bytes_peak;
        d["bytes_f16"] = s.bytes_f16;
        d["bytes_used"] = s.bytes_used;
        d["elements"] = s.elements;
        d["body_bits"] = s.body_bits;
        d["total_bits"] = s.total_bits;
        d["n_cells"] = s.n_cells;
        d["n_layers"] = s.n_layers;
        d["n_plain_layers"] = s.n_plain_layers;
        d["n_threads"] = s.n_threads;
        d["isa"] = s.isa ? s.isa : "";
        return d;
    }

    py::list layers() const {
        py::list  list;
        const int n = api_->n_layers(session_);
        for (int i = 0; i < n; ++i) {
            mixkvq_layer_stats s{};
            int                code;
            {
                py::gil_scoped_release release;
                code = api_->layer_stats(session_, i, &s);
            }
            if (code != 0) throw std::runtime_error(said("there are no statistics of cache tensor " + std::to_string(i) + " of " + std::to_string(n)));
            py::dict d;
            d["name"] = s.name ? s.name : "";
            d["kind"] = s.kind ? s.kind : "";
            d["reason"] = s.reason ? s.reason : "";
            d["is_value"] = s.is_value != 0;
            d["head_size"] = s.head_size;
            d["n_heads"] = s.n_heads;
            d["n_cells"] = s.n_cells;
            d["n_streams"] = s.n_streams;
            d["tiers"] = py::make_tuple(s.tiers[0], s.tiers[1], s.tiers[2], s.tiers[3], s.tiers[4]);
            d["value_bits"] = s.value_bits;
            d["group"] = s.group;
            d["pages_packed"] = s.pages_packed;
            d["pages_f16"] = s.pages_f16;
            d["pages_packed_ever"] = s.pages_packed_ever;
            d["bytes"] = s.bytes;
            d["body_bits"] = s.body_bits;
            list.append(d);
        }
        return list;
    }

  private:
    std::string said(const std::string & otherwise) const {
        const std::string text = error();
        return text.empty() ? otherwise : text;
    }

    const mixkvq_backend_api * api_;
    mixkvq_session *           session_;
    bool                       open_ = true;
};

class Backend {
  public:
    explicit Backend(uintptr_t address) : api_(reinterpret_cast<const mixkvq_backend_api *>(address)) {
        if (!api_) throw py::value_error("address is 0: the loaded library is not the MixKVQ backend");
        if (api_->version != MIXKVQ_BACKEND_API_VERSION) {
            throw std::runtime_error("the loaded MixKVQ backend speaks version " + std::to_string(api_->version) + " of its interface, this package " +
                                     std::to_string(MIXKVQ_BACKEND_API_VERSION) + ": both must come from one installation");
        }
    }

    std::unique_ptr<Session> begin(const std::optional<std::string> & preset, const std::optional<std::string> & profile, int window, int sinks,
                                   const std::optional<std::vector<std::pair<int32_t, int32_t>>> & head_sizes) const {
        std::vector<int32_t> k, v;
        if (head_sizes) {
            for (const auto & [key_size, value_size] : *head_sizes) {
                k.push_back(key_size);
                v.push_back(value_size);
            }
        }
        mixkvq_settings settings{};
        settings.preset = preset ? preset->c_str() : nullptr;
        settings.profile = profile ? profile->c_str() : nullptr;
        settings.window = window;
        settings.sinks = sinks;
        settings.n_layers = int(k.size());
        settings.head_size_k = k.data();
        settings.head_size_v = v.data();
        mixkvq_session * session = api_->begin(&settings);
        if (!session) {
            const char * error = api_->error(nullptr);
            throw py::value_error(error && *error ? error : "the backend refused these settings without a reason");
        }
        return std::make_unique<Session>(api_, session);
    }

  private:
    const mixkvq_backend_api * api_;
};

}  // namespace

void register_backend(py::module_ & m) {
    using py::arg;

    py::class_<Session>(m, "Session")
        .def("end", &Session::end)
        .def("stats", &Session::stats)
        .def("layers", &Session::layers)
        .def("error", &Session::error)
        .def("__enter__", [](py::object self) { return self; })
        .def("__exit__", [](Session & s, const py::args &) { s.end(); });

    py::class_<Backend>(m, "Backend")
        .def(py::init<uintptr_t>(), arg("address"))
        .def("begin", &Backend::begin, arg("preset") = py::none(), arg("profile") = py::none(), arg("window") = -1, arg("sinks") = -1,
             arg("head_sizes") = py::none());
}

}  // namespace mixkvq::bindings
