#include <algorithm>
#include <cmath>
#include <new>

#include "border.h"
#include "buffer.h"
#include "device.h"
#include "session.h"
#include "state.h"

namespace mixkvq::MIXKVQ_GLUE {

namespace {

// What is behind the handles that a program holds.
struct SessionHandle {
    std::shared_ptr<Session> session;
};
struct StateHandle {
    std::shared_ptr<State> state;
};
SessionHandle & of(mixkvq_session * handle) { return *reinterpret_cast<SessionHandle *>(handle); }
StateHandle & of(mixkvq_state * handle) { return *reinterpret_cast<StateHandle *>(handle); }

constexpr const char * kOutOfMemory = "out of memory while a program asked about its caches";

std::shared_ptr<Session> default_session;
thread_local std::shared_ptr<Session> thread_session;   // maybe one that has been ended, by whatever thread
thread_local std::shared_ptr<Session> context_session;  // without one: that of the context which the thread began last
thread_local std::string last_error;

// Those of all threads, the latest last.
std::mutex shared_mutex;
std::vector<std::shared_ptr<Session>> shared_sessions;

std::shared_ptr<Session> session_of_thread() {
    while (thread_session && !thread_session->open) thread_session = std::shared_ptr<Session>(thread_session->outer);
    return thread_session;
}

std::shared_ptr<Session> shared_session() {
    std::lock_guard<std::mutex> lock(shared_mutex);
    return shared_sessions.empty() ? default_session : shared_sessions.back();
}

// The buffers with cache tensors, which stay as they are as long as this lives.
struct Buffers {
    std::vector<std::shared_ptr<Buffer>> list;
    BufferLocks locks;
    uint64_t recurrent = 0;  // bytes of llama.cpp's other memory, in these and in buffers without cache tensors

    explicit Buffers(Session & session) {
        {
            std::lock_guard<std::mutex> lock(session.mutex);
            for (auto & weak : session.buffers) {
                if (auto buffer = weak.lock()) list.push_back(std::move(buffer));
            }
        }
        for (auto & buffer : list) locks.add(buffer.get());
        locks.lock();
        for (auto & buffer : list) {
            for (const auto & d : buffer->direct) recurrent += d.second;
        }
        list.erase(std::remove_if(list.begin(), list.end(), [](auto & buffer) { return buffer->tensors.empty(); }), list.end());
    }
};

// The tensor with this number; nullptr, with a sentence in `last_error`, if there is none.
const CacheTensor * find_tensor(const Buffers & buffers, int index) {
    int n = 0;
    for (const auto & buffer : buffers.list) {
        const int here = int(buffer->tensors.size());
        if (index >= n && index < n + here) return buffer->tensors[index - n].get();
        n += here;
    }
    last_error = "there is no cache tensor " + std::to_string(index) + ", the session has " + std::to_string(n);
    return nullptr;
}

double body_bits_of(const CacheTensor & t) {
    if (t.store->has_codec()) return t.store->codec_bits();
    return 8.0 * t.store->records_per_page() / (double(kPageCells) * t.store->shape().row);
}

// Bytes of a tensor once all its cells are filled. A codec's pages stay F16, as do those of a tensor that nobody reads.
uint64_t filled_bytes_of(const CacheTensor & t) {
    const StoreShape & shape = t.store->shape();
    if (t.mode == CacheTensor::Mode::plain) return t.nominal_bytes;
    const uint64_t unused = t.unused_bytes;
    if (t.store->has_codec() || t.mode == CacheTensor::Mode::undecided) return uint64_t(shape.n_streams) * shape.n_pages() * shape.page_bytes() + unused;
    return filled_bytes(shape, t.store->records_per_page()) + unused;
}

// The same with the records of a codec, which nobody writes, at the bits that it counts (before its first page: 16).
uint64_t counted_bytes_of(const CacheTensor & t) {
    if (!t.store->has_codec() || t.mode != CacheTensor::Mode::packed) return filled_bytes_of(t);
    const double bits = t.store->codec_bits() > 0 ? t.store->codec_bits() : 16;
    return filled_bytes(t.store->shape(), size_t(bits / 8 * kPageCells * t.store->shape().row));
}

uint64_t table_bytes_of(const CacheTensor & t) { return t.store->table_bytes() + sizeof(CacheTensor); }

// The same with other pages; statistics remembered for a longer stream would be some rows more.
uint64_t table_bytes_at(const CacheTensor & t, const StoreShape & shape) {
    const int64_t pages = int64_t(shape.n_pages()) * shape.n_streams, now = int64_t(t.store->shape().n_pages()) * t.store->shape().n_streams;
    return table_bytes_of(t) + (pages - now) * int64_t(sizeof(PageStore::Page));
}

// From how many cells on, in steps of 256, a stream of all packed tensors takes less than in F16; 0: from none.
int cells_of_gain(const Buffers & buffers) {
    constexpr int kStep = 256, kMost = 1 << 20;
    for (int n = kStep; n <= kMost; n += kStep) {
        uint64_t packed = 0, f16 = 0;
        for (const auto & buffer : buffers.list) {
            for (const auto & t : buffer->tensors) {
                if (t->mode != CacheTensor::Mode::packed) continue;
                StoreShape shape = t->store->shape();
                shape.n_cells = n, shape.n_streams = 1;
                packed += filled_bytes(shape, t->store->records_per_page()) + table_bytes_at(*t, shape);
                f16 += uint64_t(2) * shape.row * n;
            }
        }
        if (!f16) return 0;
        if (packed < f16) return n;
    }
    return 0;
}

mixkvq_session * begin(const mixkvq_settings * settings) {
    return at_border(kOutOfMemory, static_cast<mixkvq_session *>(nullptr), [&]() -> mixkvq_session * {
        last_error = "out of memory";  // if that is thrown
        auto handle = std::make_unique<SessionHandle>();
        auto session = handle->session = std::make_shared<Session>();
        const mixkvq_settings defaults = {nullptr, nullptr, -1, -1, 0, nullptr, nullptr, nullptr, nullptr, 0};
        const mixkvq_settings & s = settings ? *settings : defaults;
        std::string error;
        if (!settings_from_api(s, session->settings, error)) {
            last_error = error;
            return nullptr;
        }
        if (s.all_threads) {
            std::lock_guard<std::mutex> lock(shared_mutex);
            shared_sessions.push_back(session);
        }
        session->outer = session_of_thread();
        thread_session = session;
        context_session = nullptr;
        last_error.clear();
        return reinterpret_cast<mixkvq_session *>(handle.release());
    });
}

void end(mixkvq_session * handle) {
    if (!handle) return;
    at_border(kOutOfMemory, [&] {
        of(handle).session->open = false;  // its thread finds out by itself, if it is not this one
        session_of_thread();
        context_session = nullptr;
        std::lock_guard<std::mutex> lock(shared_mutex);
        shared_sessions.erase(std::remove(shared_sessions.begin(), shared_sessions.end(), of(handle).session), shared_sessions.end());
    });
}

void release(mixkvq_session * handle) {
    end(handle);
    at_border(kOutOfMemory, [&] {
        if (!handle) return;
        of(handle).session->dry.reset();  // it holds the session
        delete &of(handle);
    });
}

int fill_stats(Session & session, mixkvq_stats * out) {
    *out = mixkvq_stats{};
    const Buffers buffers(session);
    double packed_bits = 0, packed_elements = 0;
    uint64_t counted = 0, scratch_peak = 0;
    for (const auto & buffer : buffers.list) {
        for (const auto & t : buffer->tensors) {
            const StoreShape & shape = t->store->shape();
            const uint64_t elements = uint64_t(shape.row) * shape.n_cells * shape.n_streams;
            out->elements += elements;
            out->bytes_f16 += 2 * elements;
            const uint64_t tables = table_bytes_of(*t);
            out->bytes += filled_bytes_of(*t) + tables;
            out->bytes_reserved += tables;
            counted += counted_bytes_of(*t) + tables;
            out->n_cells = std::max(out->n_cells, shape.n_cells * shape.n_streams);
            out->n_layers += t->is_value ? 0 : 1;
            if (t->mode == CacheTensor::Mode::plain) {
                out->n_plain_layers += 1;
                out->bytes_used += buffer->dry ? 0 : t->nominal_bytes;
            } else {
                out->bytes_used += t->store->bytes_used();
            }
            if (t->mode == CacheTensor::Mode::packed) {
                const double bits = body_bits_of(*t);
                packed_bits += bits * elements;
                packed_elements += bits > 0 ? elements : 0;
            }
        }
        out->bytes_reserved += buffer->size + buffer->more + buffer->memory->scratch_bytes();
        scratch_peak += buffer->memory->scratch_bytes_peak();
    }
    if (buffers.list.empty()) {
        last_error = "no cache has been created under this session";
        return -1;
    }
    out->bytes_recurrent = buffers.recurrent;
    out->bytes_peak = out->bytes + scratch_peak;
    out->n_cells_gain = out->bytes < out->bytes_f16 ? 0 : cells_of_gain(buffers);
    out->body_bits = packed_elements > 0 ? packed_bits / packed_elements : 0;
    out->total_bits = out->elements ? 8.0 * double(counted) / double(out->elements) : 0;
    out->n_threads = session.n_threads;
    out->isa = buffers.list[0]->memory->isa();
    return 0;
}

int count_layers(Session & session) {
    int n = 0;
    const Buffers buffers(session);
    for (const auto & buffer : buffers.list) n += int(buffer->tensors.size());
    return n;
}

void fill_layer_stats(const CacheTensor & t, mixkvq_layer_stats * out) {
    const StoreShape & shape = t.store->shape();
    *out = mixkvq_layer_stats{};
    out->name = t.name.c_str();
    const bool coded = t.store->has_codec();
    out->kind = t.mode == CacheTensor::Mode::plain ? "plain" : t.mode == CacheTensor::Mode::undecided ? "unused" : coded ? "codec" : "packed";
    out->reason = t.reason;
    out->layer = t.layer;
    out->is_value = t.is_value;
    out->head_size = t.head_size;
    out->n_heads = t.n_heads;
    out->n_cells = shape.n_cells;
    out->n_streams = shape.n_streams;
    out->bytes = filled_bytes_of(t);
    if (t.mode == CacheTensor::Mode::packed) {
        if (coded) {
            // the formats are not used
        } else if (t.is_value) {
            out->value_bits = t.store->value_format(0).bits;
            out->group = t.store->value_format(0).group;
        } else {
            const KeyFormat & f = t.store->key_format(0);
            const int tiers[5] = {f.n16, f.n8, f.n4, f.n3, f.n2};
            std::copy(tiers, tiers + 5, out->tiers);
            out->group = f.group;
        }
        out->pages_packed = t.store->pages_packed();
        out->pages_f16 = t.store->pages_half();
        out->pages_packed_ever = t.store->pages_packed_ever();
        out->body_bits = body_bits_of(t);
    }
}

// A call of the interface: why there is no result is in `last_error`.
template <class F> int call(mixkvq_session * handle, F && f) noexcept {
    return at_border(kOutOfMemory, -1, [&] {
        last_error = handle ? "out of memory" : "there is no session: the handle is NULL";
        const int result = handle ? f(*of(handle).session) : -1;
        if (result >= 0) last_error.clear();
        return result;
    });
}

int stats(mixkvq_session * handle, mixkvq_stats * out) {
    return call(handle, [&](Session & session) { return fill_stats(session, out); });
}

int n_layers(mixkvq_session * handle) { return std::max(0, call(handle, count_layers)); }

int layer_stats(mixkvq_session * handle, int index, mixkvq_layer_stats * out) {
    return call(handle, [&](Session & session) {
        const Buffers buffers(session);
        const CacheTensor * t = find_tensor(buffers, index);
        if (t) fill_layer_stats(*t, out);
        return t ? 0 : -1;
    });
}

const char * error(mixkvq_session * handle) {
    return at_border(kOutOfMemory, "out of memory", [&] {
        if (handle) {
            std::lock_guard<std::mutex> lock(of(handle).session->mutex);
            last_error = of(handle).session->error;
        }
        return last_error.c_str();
    });
}

int query_statistics(mixkvq_session * handle, int index, float * mean_abs, float * mean_sqr) {
    return call(handle, [&](Session & session) {
        const Buffers buffers(session);
        const CacheTensor * t = find_tensor(buffers, index);
        if (!t) return -1;
        last_error = "no query has read packed keys in " + t->name;
        return t->mode == CacheTensor::Mode::packed && !t->is_value && t->store->query_statistics(mean_abs, mean_sqr) ? 0 : -1;
    });
}

const char * why_unused(const char * device) {
    for (const LeftOut & gpu : left_out()) {
        if (device && gpu.name == device) return gpu.why.c_str();
    }
    return "";
}

// ---- packed states ----

// A handle around what `begin` returns; without that, or where it throws, nullptr and a sentence in `last_error`.
template <class F> mixkvq_state * begin_state(mixkvq_session * session, F && begin) noexcept {
    return at_border("out of memory for a state", static_cast<mixkvq_state *>(nullptr), [&]() -> mixkvq_state * {
        last_error = session ? "there is not enough memory for the state" : "there is no session: the handle is NULL";
        if (!session) return nullptr;
        auto handle = std::make_unique<StateHandle>();
        handle->state = begin(of(session).session);
        return handle->state ? reinterpret_cast<mixkvq_state *>(handle.release()) : nullptr;
    });
}

mixkvq_state * state_save(mixkvq_session * session, size_t size, int flags) {
    return begin_state(session, [&](auto & of) { return begin_saving(of, size, uint32_t(flags)); });
}

mixkvq_state * state_load(mixkvq_session * session, const void * data, size_t bytes, int flags) {
    return begin_state(session, [&](auto & of) {
        std::string why;
        auto state = begin_loading(of, data, bytes, uint32_t(flags), why);
        if (!state) last_error = why;
        return state;
    });
}

void * data_of(mixkvq_state * state, size_t * size) {
    uint64_t n = 0;
    void * const data = state ? state_data(*of(state).state, &n) : nullptr;
    if (size) *size = size_t(n);
    return data;
}

int state_write(mixkvq_state * state, size_t n, mixkvq_write write, void * user, uint64_t * bytes) {
    return at_border("out of memory for a state", -1, [&] {
        last_error = state ? "there is not enough memory to save the state" : "there is no state: the handle is NULL";
        if (!state) return -1;
        last_error = n ? "what took the state has refused to go on" : "llama.cpp did not save its state";
        uint64_t count = 0;
        const auto to = [&](const void * data, size_t size) { return write(user, data, size) == 0; };
        const bool done = n && finish_saving(*of(state).state, n, write ? StateWriter::Write(to) : StateWriter::Write(), &count);
        if (bytes) *bytes = count;
        if (done) last_error.clear();
        return done ? 0 : -1;
    });
}

int state_finish(mixkvq_state * state, size_t n, int32_t * first_position) {
    return at_border("out of memory while a state was loaded: reset the context", -1, [&] {
        last_error = state ? "there is not enough memory to load the state" : "there is no state: the handle is NULL";
        if (!state) return -1;
        const std::string why = n ? finish_loading(*of(state).state) : "llama.cpp did not take it";
        last_error = why;
        if (first_position) *first_position = first_filler(*of(state).state);
        return why.empty() ? 0 : -1;
    });
}

void state_free(mixkvq_state * state) {
    if (state) delete &of(state);
}

}  // namespace

void Session::fail(const std::string & sentence, const std::string & topic) {
    std::lock_guard<std::mutex> lock(mutex);
    error = sentence;
    codec_failed = false;
    warn_once(sentence, topic);
}

PageCodec codec_of(Session & session, int layer, bool is_value, const PageStore & store) {
    return [&session, &store, layer, is_value](const CodecPage & page, float * rows, double & bits) {
        const int d = store.head_size();
        const mixkvq_page p = {layer, is_value, page.stream, page.first_cell, store.n_heads(), d, {page.valid.word[0], page.valid.word[1]},
                               page.rows, page.q_abs, page.q_sqr};
        std::string wrong;
        const int code = session.settings.codec(session.settings.codec_user, &p, rows, &bits);
        if (code != 0) {
            wrong = "it returned " + std::to_string(code);
        } else if (!(bits > 0 && std::isfinite(bits))) {
            wrong = "it counts " + std::to_string(bits) + " bits";
        } else {
            for (int i = 0; i < p.n_heads * kPageCells && wrong.empty(); ++i) {
                const float * row = rows + size_t(i) * d;
                if (page.valid.test(i % kPageCells) && std::any_of(row, row + d, [](float x) { return std::isnan(x); })) {
                    wrong = "its result has a NaN in head " + std::to_string(i / kPageCells) + ", cell " + std::to_string(i % kPageCells) + " of the page";
                }
            }
        }
        std::lock_guard<std::mutex> lock(session.mutex);
        if (!wrong.empty()) {
            session.error = std::string("the codec failed on the ") + (is_value ? "values" : "keys") + " of layer " + std::to_string(layer) +
                            ", cells " + std::to_string(page.first_cell) + " to " + std::to_string(page.first_cell + kPageCells - 1) + ": " + wrong;
        } else if (session.codec_failed) {
            session.error.clear();
        }
        session.codec_failed = !wrong.empty();
        return wrong.empty();
    };
}

std::shared_ptr<Session> current_session() {
    if (auto session = session_of_thread()) return session;
    return context_session ? context_session : shared_session();
}

void begin_context() { context_session = session_of_thread() ? nullptr : shared_session(); }

bool init_default_session(std::string & error) {
    auto session = std::make_shared<Session>();
    if (!settings_from_environment(session->settings, error)) return false;
    session->is_default = true;
    default_session = session;
    return true;
}

const mixkvq_backend_api * backend_api() {
    static const mixkvq_backend_api api = {MIXKVQ_BACKEND_API_VERSION, begin, end, release, stats, n_layers, layer_stats, error, query_statistics,
                                           why_unused,
                                           state_save, state_load, data_of, state_write, state_finish, state_free};
    return &api;
}

}  // namespace mixkvq::MIXKVQ_GLUE
