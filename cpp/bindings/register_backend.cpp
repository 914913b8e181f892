#include <pybind11/stl.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <optional>
#include <unordered_map>

#if defined(_WIN32)
#include <io.h>
#else
#include <unistd.h>
#endif

#include "mixkvq/backend_api.h"
#include "register.h"

namespace mixkvq::bindings {

namespace {

// A codec that is a Python function, and what its last call raised.
struct Codec {
    py::object function, failure = py::none();
};

// Codecs by number, which is what the backend gets to know: a cache that outlives its session then finds no codec instead of freed memory.
// Guarded by the GIL; never destroyed, because the interpreter may be gone before this library is.
std::unordered_map<uintptr_t, std::shared_ptr<Codec>> & codecs() {
    static auto * const map = new std::unordered_map<uintptr_t, std::shared_ptr<Codec>>;
    return *map;
}

py::array read_only(const float * data, std::vector<py::ssize_t> shape) {
    py::array_t<float> copy(std::move(shape), data);  // a copy: the function may keep it
    copy.attr("setflags")(py::arg("write") = false);
    return copy;
}

void run_codec(const py::object & function, const mixkvq_page & page, float * rows, double & bits) {
    const py::ssize_t heads = page.n_heads, d = page.head_size;
    py::array_t<bool> valid(128);
    for (int t = 0; t < 128; ++t) valid.mutable_at(t) = page.valid[t / 64] >> t % 64 & 1;
    valid.attr("setflags")(py::arg("write") = false);
    const py::object q_abs = page.q_abs ? py::object(read_only(page.q_abs, {heads, d})) : py::none();
    const py::object q_sqr = page.q_sqr ? py::object(read_only(page.q_sqr, {heads, d})) : py::none();
    const py::object result =
        function(page.layer, page.is_value != 0, page.stream, page.first_cell, read_only(page.rows, {heads, 128, d}), valid, q_abs, q_sqr);
    if (!py::isinstance<py::tuple>(result) || py::len(result) != 2) {
        throw py::type_error("a codec returns rows and bits, not " + std::string(py::str(py::type::of(result).attr("__name__"))));
    }
    const py::tuple pair = result;
    // By NumPy itself, whose own errors say what cannot be an array of numbers.
    const py::array array = py::module_::import("numpy").attr("asarray")(pair[0], py::arg("dtype") = "float32", py::arg("order") = "C");
    const py::array checked_rows = checked(array, "rows", "float32", {heads, 128, d});
    const py::object number = pair[1];
    bits = PyFloat_AsDouble(number.ptr());
    if (PyErr_Occurred()) throw py::error_already_set();
    const float * data = static_cast<const float *>(checked_rows.data());
    std::copy(data, data + checked_rows.size(), rows);
}

// What the backend calls, in the thread that decodes. Nothing may leave it but a number.
int call_codec(void * user, const mixkvq_page * page, float * rows, double * bits) noexcept {
    if (!Py_IsInitialized()) return 1;
    const py::gil_scoped_acquire gil;
    try {
        const auto found = codecs().find(reinterpret_cast<uintptr_t>(user));
        if (found == codecs().end()) return 1;
        const std::shared_ptr<Codec> codec = found->second;  // lives through the call, whatever the function does
        codec->failure = py::none();
        try {
            run_codec(codec->function, *page, rows, *bits);
            return 0;
        } catch (py::error_already_set & e) {
            codec->failure = e.value();
            if (e.trace()) PyException_SetTraceback(e.value().ptr(), e.trace().ptr());
        } catch (const py::type_error & e) {
            codec->failure = py::module_::import("builtins").attr("TypeError")(e.what());
        } catch (const std::exception & e) {
            codec->failure = py::module_::import("builtins").attr("ValueError")(e.what());
        }
    } catch (...) {
        PyErr_Clear();
    }
    return 1;
}

// A packed state on its way out or in; see backend_api.h. Everything that is done with it, and with llama.cpp meanwhile, is done in one thread.
class State {
  public:
    State(const mixkvq_backend_api * api, mixkvq_state * state, std::optional<py::buffer_info> data = std::nullopt)
        : api_(api), state_(state), data_(std::move(data)) {}
    ~State() { close(); }
    State(const State &) = delete;
    State & operator=(const State &) = delete;

    void close() {
        if (state_) api_->state_free(state_);
        state_ = nullptr;
        data_.reset();
    }

    std::pair<uintptr_t, size_t> data() const {
        size_t size = 0;
        void * const at = api_->state_data(open(), &size);
        return {reinterpret_cast<uintptr_t>(at), size};
    }

    uint64_t n_bytes(size_t n) const {
        uint64_t bytes = 0;
        check(api_->state_write(open(), n, nullptr, nullptr, &bytes));
        return bytes;
    }

    py::bytes to_bytes(size_t n) const {
        const uint64_t bytes = n_bytes(n);
        PyObject * const result = PyBytes_FromStringAndSize(nullptr, py::ssize_t(bytes));
        if (!result) throw py::error_already_set();
        auto all = py::reinterpret_steal<py::bytes>(result);
        struct Rest {
            char * at;
            size_t left;
        } rest = {PyBytes_AS_STRING(result), size_t(bytes)};
        const auto append = [](void * user, const void * data, size_t size) {
            auto & to = *static_cast<Rest *>(user);
            if (size > to.left) return 1;
            std::memcpy(to.at, data, size);
            to.at += size, to.left -= size;
            return 0;
        };
        check(api_->state_write(open(), n, append, &rest, nullptr));
        return all;
    }

    uint64_t write(size_t n, int descriptor) const {
        struct To {
            int descriptor, error;
        } to = {descriptor, 0};
        const auto append = [](void * user, const void * data, size_t size) {
            auto & file = *static_cast<To *>(user);
            for (const auto * at = static_cast<const char *>(data); size > 0;) {
                const auto done = ::write(file.descriptor, at, unsigned(std::min(size, size_t(1) << 30)));
                if (done < 0 && errno == EINTR) continue;
                if (done <= 0) return file.error = done < 0 ? errno : ENOSPC, 1;
                at += done, size -= size_t(done);
            }
            return 0;
        };
        uint64_t bytes = 0;
        int code;
        {
            const py::gil_scoped_release release;
            code = api_->state_write(open(), n, append, &to, &bytes);
        }
        if (to.error) {
            errno = to.error;
            PyErr_SetFromErrno(PyExc_OSError);
            throw py::error_already_set();
        }
        check(code);
        return bytes;
    }

    int32_t finish(size_t n) const {
        int code;
        int32_t first = -1;
        {
            const py::gil_scoped_release release;
            code = api_->state_finish(open(), n, &first);
        }
        check(code);
        return first;
    }

  private:
    mixkvq_state * open() const {
        if (!state_) throw std::runtime_error("the state is closed");
        return state_;
    }
    void check(int code) const {
        if (code != 0) throw std::runtime_error(api_->error(nullptr));
    }

    const mixkvq_backend_api * api_;
    mixkvq_state *             state_;
    std::optional<py::buffer_info> data_;  // what it is loaded from
};

// The handle of one session. The caches live on without it.
class Session {
  public:
    Session(const mixkvq_backend_api * api, mixkvq_session * session, uintptr_t codec) : api_(api), session_(session), codec_(codec) {}
    ~Session() {
        end();
        api_->release(session_);
        codecs().erase(codec_);
    }
    Session(const Session &) = delete;
    Session & operator=(const Session &) = delete;

    void end() {
        if (!open_) return;
        open_ = false;
        api_->end(session_);
    }

    std::string error() const { return text_of(session_); }

    py::object codec_failure() const {
        const auto found = codecs().find(codec_);
        return found == codecs().end() ? py::none() : found->second->failure;
    }

    py::dict stats() const {
        mixkvq_stats s{};
        if (call([&] { return api_->stats(session_, &s); }) != 0) throw std::runtime_error(said());
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
        d["bytes_reserved"] = s.bytes_reserved;
        d["bytes_recurrent"] = s.bytes_recurrent;
        d["n_cells_gain"] = s.n_cells_gain;
        return d;
    }

    py::list layers() const {
        py::list  list;
        const int n = call([&] { return api_->n_layers(session_); });
        for (int i = 0; i < n; ++i) {
            mixkvq_layer_stats s{};
            if (call([&] { return api_->layer_stats(session_, i, &s); }) != 0) throw std::runtime_error(said());
            py::dict d;
            d["name"] = s.name ? s.name : "";
            d["kind"] = s.kind ? s.kind : "";
            d["reason"] = s.reason ? s.reason : "";
            d["layer"] = s.layer;
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

    py::object query_statistics(int index) const {
        mixkvq_layer_stats s{};
        if (call([&] { return api_->layer_stats(session_, index, &s); }) != 0) throw py::index_error(said());
        if (s.n_heads <= 0 || s.head_size <= 0) return py::none();
        py::array_t<float> mean_abs({s.n_heads, s.head_size}), mean_sqr({s.n_heads, s.head_size});
        float * const abs = mean_abs.mutable_data(), * const sqr = mean_sqr.mutable_data();
        if (call([&] { return api_->query_statistics(session_, index, abs, sqr); }) != 0) return py::none();
        return py::make_tuple(mean_abs, mean_sqr);
    }

    std::unique_ptr<State> save_state(size_t size, int flags) const { return state_of(api_->state_save(session_, size, flags)); }

    std::unique_ptr<State> load_state(const py::buffer & data, int flags) const {
        py::buffer_info info = data.request();
        if (info.ndim != 1 || info.itemsize != 1) throw py::value_error("a state is a sequence of bytes");
        mixkvq_state * state = nullptr;
        call([&] { return state = api_->state_load(session_, info.ptr, size_t(info.size), flags), 0; });
        return state_of(state, std::move(info));
    }

  private:
    std::unique_ptr<State> state_of(mixkvq_state * state, std::optional<py::buffer_info> data = std::nullopt) const {
        if (!state) throw py::value_error(api_->error(nullptr));
        return std::make_unique<State>(api_, state, std::move(data));
    }

    // A call that may wait for the thread that decodes, which may itself wait for the GIL, in a codec.
    template <class F> static int call(F && f) {
        const py::gil_scoped_release release;
        return f();
    }

    std::string text_of(mixkvq_session * session) const {
        const char * text = nullptr;
        call([&] { return text = api_->error(session), 0; });
        return text ? text : "";
    }

    // What the session failed at, or else the last call of this thread.
    std::string said() const {
        const std::string of_call = text_of(nullptr), of_session = error();
        return of_session.empty() ? of_call : of_session;
    }

    const mixkvq_backend_api * api_;
    mixkvq_session *           session_;
    uintptr_t                  codec_;
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
                                   const std::optional<std::vector<std::pair<int32_t, int32_t>>> & head_sizes, const py::object & codec,
                                   bool all_threads) const {
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
        settings.all_threads = all_threads;
        uintptr_t number = 0;
        if (!codec.is_none()) {
            static uintptr_t last = 0;
            number = ++last;
            settings.codec = call_codec;
            settings.codec_user = reinterpret_cast<void *>(number);
        }
        mixkvq_session * session = api_->begin(&settings);
        if (!session) {
            const char * error = api_->error(nullptr);
            throw py::value_error(error && *error ? error : "the backend refused these settings without a reason");
        }
        auto handle = std::make_unique<Session>(api_, session, number);
        if (number) {
            codecs()[number] = std::make_shared<Codec>();
            codecs()[number]->function = codec;
        }
        return handle;
    }

    std::string why_unused(const std::string & device) const { return api_->why_unused(device.c_str()); }

  private:
    const mixkvq_backend_api * api_;
};

}  // namespace

void register_backend(py::module_ & m) {
    using py::arg;

    m.attr("STATE_SEQUENCE") = int(MIXKVQ_STATE_SEQUENCE);
    m.attr("STATE_SHARED") = int(MIXKVQ_STATE_SHARED);

    py::class_<State>(m, "State")
        .def("data", &State::data)
        .def("n_bytes", &State::n_bytes, arg("n"))
        .def("to_bytes", &State::to_bytes, arg("n"))
        .def("write", &State::write, arg("n"), arg("descriptor"))
        .def("finish", &State::finish, arg("n"))
        .def("close", &State::close);

    py::class_<Session>(m, "Session")
        .def("end", &Session::end)
        .def("stats", &Session::stats)
        .def("layers", &Session::layers)
        .def("error", &Session::error)
        .def("codec_failure", &Session::codec_failure)
        .def("query_statistics", &Session::query_statistics, arg("index"))
        .def("save_state", &Session::save_state, arg("size"), arg("flags") = 0)
        .def("load_state", &Session::load_state, arg("data"), arg("flags") = 0)
        .def("__enter__", [](py::object self) { return self; })
        .def("__exit__", [](Session & s, const py::args &) { s.end(); });

    py::class_<Backend>(m, "Backend")
        .def(py::init<uintptr_t>(), arg("address"))
        .def("begin", &Backend::begin, arg("preset") = py::none(), arg("profile") = py::none(), arg("window") = -1, arg("sinks") = -1,
             arg("head_sizes") = py::none(), arg("codec") = py::none(), arg("all_threads") = false)
        .def("why_unused", &Backend::why_unused, arg("device"));
}

}  // namespace mixkvq::bindings
