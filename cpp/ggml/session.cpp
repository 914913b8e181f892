#include <algorithm>
#include <cmath>
#include <new>

#include "glue.h"

// The handle that a program holds.
struct mixkvq_session {
    std::shared_ptr<mixkvq::glue::Session> session;
    std::shared_ptr<mixkvq::glue::Session> outer;  // what was current before
};

namespace mixkvq::glue {

namespace {

std::shared_ptr<Session> default_session;
thread_local std::shared_ptr<Session> thread_session;
thread_local std::string last_error;

std::vector<std::shared_ptr<Buffer>> alive_buffers(Session & session) {
    std::lock_guard<std::mutex> lock(session.mutex);
    std::vector<std::shared_ptr<Buffer>> alive;
    for (auto & weak : session.buffers) {
        if (auto buffer = weak.lock()) alive.push_back(buffer);
    }
    return alive;
}

// Those with keys and values.
std::vector<std::shared_ptr<Buffer>> buffers_of(Session & session) {
    auto buffers = alive_buffers(session);
    buffers.erase(std::remove_if(buffers.begin(), buffers.end(), [](auto & b) { return b->tensors.empty(); }), buffers.end());
    return buffers;
}

double body_bits_of(const CacheTensor & t) {
    if (t.store->has_codec()) return t.store->codec_bits();
    return 8.0 * t.store->records_per_page() / (double(kPageCells) * t.store->shape().row);
}

// Bytes of a tensor once all its cells are filled. A codec's pages stay F16, as do those of a tensor that nobody reads.
uint64_t filled_bytes_of(const CacheTensor & t) {
    const StoreShape & shape = t.store->shape();
    if (t.mode == CacheTensor::Mode::plain) return t.nominal_bytes;
    if (t.store->has_codec() || t.mode == CacheTensor::Mode::undecided) return uint64_t(shape.n_streams) * shape.n_pages() * shape.page_bytes();
    return filled_bytes(shape, t.store->records_per_page());
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
int cells_of_gain(const std::vector<std::shared_ptr<Buffer>> & buffers) {
    constexpr int kStep = 256, kMost = 1 << 20;
    for (int n = kStep; n <= kMost; n += kStep) {
        uint64_t packed = 0, f16 = 0;
        for (const auto & buffer : buffers) {
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
    last_error.clear();
    try {
        auto session = std::make_shared<Session>();
        const mixkvq_settings defaults = {nullptr, nullptr, -1, -1, 0, nullptr, nullptr, nullptr, nullptr};
        if (!settings_from_api(settings ? *settings : defaults, session->settings, last_error)) return nullptr;
        auto * handle = new mixkvq_session{session, thread_session};
        thread_session = session;
        return handle;
    } catch (const std::bad_alloc &) {
        last_error = "out of memory";
        return nullptr;
    }
}

void end(mixkvq_session * handle) {
    if (handle && thread_session == handle->session) thread_session = handle->outer;
}

void release(mixkvq_session * handle) {
    end(handle);
    if (handle) handle->session->dry.reset();  // it holds the session
    delete handle;
}

int stats(mixkvq_session * handle, mixkvq_stats * out) {
    *out = mixkvq_stats{};
    const auto buffers = buffers_of(*handle->session);
    double packed_bits = 0, packed_elements = 0;
    uint64_t counted = 0, scratch_peak = 0;
    for (const auto & buffer : buffers) {
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
    if (buffers.empty()) return -1;
    for (const auto & buffer : alive_buffers(*handle->session)) {
        for (const auto & d : buffer->direct) out->bytes_recurrent += d.second;
    }
    out->bytes_peak = out->bytes + scratch_peak;
    out->n_cells_gain = out->bytes < out->bytes_f16 ? 0 : cells_of_gain(buffers);
    out->body_bits = packed_elements > 0 ? packed_bits / packed_elements : 0;
    out->total_bits = out->elements ? 8.0 * double(counted) / double(out->elements) : 0;
    out->n_threads = handle->session->n_threads;
    out->isa = buffers[0]->memory->isa();
    return 0;
}

int n_layers(mixkvq_session * handle) {
    int n = 0;
    for (const auto & buffer : buffers_of(*handle->session)) n += int(buffer->tensors.size());
    return n;
}

int layer_stats(mixkvq_session * handle, int index, mixkvq_layer_stats * out) {
    for (const auto & buffer : buffers_of(*handle->session)) {
        if (index >= int(buffer->tensors.size())) {
            index -= int(buffer->tensors.size());
            continue;
        }
        const CacheTensor & t = *buffer->tensors[index];
        const StoreShape & shape = t.store->shape();
        *out = mixkvq_layer_stats{};
        out->name = t.name.c_str();
        const bool coded = t.store->has_codec();
        out->kind = t.mode == CacheTensor::Mode::plain ? "plain" : t.mode == CacheTensor::Mode::undecided ? "unused" : coded ? "codec" : "packed";
        out->reason = t.reason.c_str();
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
        return 0;
    }
    return -1;
}

const char * error(mixkvq_session * handle) {
    if (handle) {
        std::lock_guard<std::mutex> lock(handle->session->mutex);
        last_error = handle->session->error;
    }
    return last_error.c_str();
}

int query_statistics(mixkvq_session * handle, int index, float * mean_abs, float * mean_sqr) {
    for (const auto & buffer : buffers_of(*handle->session)) {
        if (index >= int(buffer->tensors.size())) {
            index -= int(buffer->tensors.size());
            continue;
        }
        const CacheTensor & t = *buffer->tensors[index];
        return t.mode == CacheTensor::Mode::packed && !t.is_value && t.store->query_statistics(mean_abs, mean_sqr) ? 0 : -1;
    }
    return -1;
}

}  // namespace

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

std::shared_ptr<Session> current_session() { return thread_session ? thread_session : default_session; }

bool init_default_session(std::string & error) {
    auto session = std::make_shared<Session>();
    if (!settings_from_environment(session->settings, error)) return false;
    session->is_default = true;
    default_session = session;
    return true;
}

const mixkvq_backend_api * backend_api() {
    static const mixkvq_backend_api api = {MIXKVQ_BACKEND_API_VERSION, begin, end, release, stats, n_layers, layer_stats, error, query_statistics};
    return &api;
}

}  // namespace mixkvq::glue
