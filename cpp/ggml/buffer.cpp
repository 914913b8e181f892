// The buffer type whose key and value tensors take the bytes of packed pages.

#include <algorithm>
#include <cstring>
#include <set>

#include "border.h"
#include "buffer.h"
#include "state.h"

namespace mixkvq::MIXKVQ_GLUE {

namespace {

// "cache_k_l12" or "cache_v_l12": a layer's keys or values in llama.cpp's main cache. Its other tensors (recurrent states cache_r_* and cache_s_*, indexer
// keys cache_idx_*) are named cache_* too and stay as they are.
bool parse_name(const char * name, int & layer, bool & is_value) {
    const bool k = std::strncmp(name, "cache_k_l", 9) == 0, v = std::strncmp(name, "cache_v_l", 9) == 0;
    if (!k && !v) return false;
    const char * p = name + 9;
    if (*p < '0' || *p > '9') return false;
    layer = 0;
    for (; *p >= '0' && *p <= '9'; ++p) layer = 10 * layer + (*p - '0');
    is_value = v;
    return *p == 0;
}

// Keys or values of a cache that this version does not know: "cache_something_k_l12".
bool looks_like_cache(const char * name) {
    const char * const end = std::strstr(name, "k_l") ? std::strstr(name, "k_l") : std::strstr(name, "v_l");
    return end && std::strncmp(name, "cache_", 6) == 0 && std::strncmp(name, "cache_idx_", 10) != 0 && end[3] >= '0' && end[3] <= '9';
}

bool is_cache_tensor(const ggml_tensor * t, int & layer, bool & is_value) {
    return !t->view_src && t->op == GGML_OP_NONE && parse_name(t->name, layer, is_value);
}

StoreShape shape_of(const ggml_tensor * t, bool is_value, const Settings & s) {
    StoreShape shape;
    shape.is_value = is_value;
    shape.row = int(t->ne[0]);
    shape.n_cells = int(t->ne[1]);
    shape.n_streams = int(t->ne[2]);
    shape.window = s.window;
    shape.sinks = s.sinks;
    return shape;
}

// Bytes of a page's records; 0 if there is no such format.
size_t records_for(const Settings & s, const LayerProfile * layer, bool is_value, int n_heads, int head_size) {
    std::string error;
    size_t bytes = 0;
    if (is_value) {
        std::vector<ValueFormat> formats;
        if (!value_formats(s, layer, n_heads, head_size, formats, error)) return 0;
        for (const ValueFormat & f : formats) bytes += f.record_bytes();
    } else {
        std::vector<KeyFormat> formats;
        if (!key_formats(s, layer, n_heads, head_size, formats, error)) return 0;
        for (const KeyFormat & f : formats) bytes += f.record_bytes();
    }
    return bytes;
}

// The head size is known from the settings or a profile; otherwise llama.cpp tells it only when the tensor is first read, and the largest answer that a
// usual head size gives is reserved, or, for a row that has none, that of any.
size_t records_per_page(const Settings & s, int layer, bool is_value, int row) {
    const ProfileFit fit = profile_fit(s, layer, is_value, row, 0, 0);
    if (fit.layer) return records_for(s, fit.layer, is_value, int(fit.layer->keys.size()), row / int(fit.layer->keys.size()));
    if (s.codec || fit.kind != ProfileFit::none) return 0;  // a codec's pages stay F16, in the scratch pool where the home pages do not hold them
    if (layer < int(s.head_sizes.size())) {
        const int d = is_value ? s.head_sizes[layer].second : s.head_sizes[layer].first;
        if (d >= kMinHeadSize && d <= kMaxHeadSize && d % 8 == 0 && row % d == 0) return records_for(s, nullptr, is_value, row / d, d);
    }
    const auto most_of = [&](const std::vector<int> & sizes) {
        size_t most = 0;
        for (int d : sizes) {
            if (row % d == 0) most = std::max(most, records_for(s, nullptr, is_value, row / d, d));
        }
        return most;
    };
    if (const size_t usual = most_of({64, 80, 96, 112, 128, 160, 192, 224, 256})) return usual;
    std::vector<int> all;
    for (int d = kMinHeadSize; d <= kMaxHeadSize; d += 8) all.push_back(d);
    return most_of(all);
}

size_t size_of(const Settings & s, const ggml_tensor * t, int layer, bool is_value) {
    return reserve_bytes(shape_of(t, is_value, s), records_per_page(s, layer, is_value, int(t->ne[0])));
}

// Sentences stay for as long as the process: a program may read one while the tensor that it is about goes.
const char * for_ever(const std::string & sentence) {
    static std::mutex mutex;
    static auto * const sentences = new std::set<std::string>;
    std::lock_guard<std::mutex> lock(mutex);
    return sentences->insert(sentence).first->c_str();
}

}  // namespace

// ---- cache tensors ----

std::atomic<uint64_t> mode_changes{0};

const ggml_tensor * root_of(const ggml_tensor * t) {
    while (t->view_src) t = t->view_src;
    return t;
}

// The devices share the functions of their buffer types.
static size_t get_alloc_size(ggml_backend_buffer_type_t type, const ggml_tensor * t);
static bool is_ours(ggml_backend_buffer_t buffer) { return buffer && buffer->buft->iface.get_alloc_size == get_alloc_size; }

Buffer * buffer_of(const ggml_tensor * t) {
    const ggml_tensor * root = root_of(t);
    if (!is_ours(root->buffer)) return nullptr;
    auto * holder = static_cast<std::shared_ptr<Buffer> *>(root->buffer->context);
    return holder ? holder->get() : nullptr;  // dummies that measure memory have no context
}

CacheTensor * cache_of(const ggml_tensor * t) {
    const ggml_tensor * root = root_of(t);
    return is_ours(root->buffer) ? static_cast<CacheTensor *>(root->extra) : nullptr;
}

bool is_in_memory_of_llama(const ggml_tensor * t) {
    const ggml_tensor * root = root_of(t);
    return is_ours(root->buffer) && std::strncmp(root->name, "cache_", 6) == 0;
}

bool is_split(const ggml_tensor * op) {
    static std::atomic<bool> any{false};  // model in this process
    const auto is_there = [](const ggml_tensor * t) {
        const ggml_backend_buffer_t buffer = root_of(t)->buffer;
        ggml_backend_dev_t device = buffer ? ggml_backend_buft_get_device(ggml_backend_buffer_get_type(buffer)) : nullptr;
        return device && ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_META;
    };
    // The result is in no buffer yet when ggml asks, nor may its sources be; what those come from is in the end, a weight or the cache.
    constexpr int kLook = 64;
    const ggml_tensor * found[kLook] = {op};
    for (int i = 0, n = 1; i < n && (i <= GGML_MAX_SRC || any); ++i) {
        if (is_there(found[i])) return any = true;
        const ggml_tensor * t = root_of(found[i]);
        for (int j = 0; j < GGML_MAX_SRC && n < kLook; ++j) {
            if (t->src[j]) found[n++] = t->src[j];
        }
    }
    return false;
}

size_t offset_in_cache(const ggml_tensor * t) {
    return size_t(static_cast<const char *>(t->data) - static_cast<const char *>(root_of(t)->data));
}

void CacheTensor::decide(int heads_size, int heads) {
    if (mode != Mode::undecided) return;
    std::lock_guard<std::recursive_mutex> lock(owner->mutex);
    const Settings & settings = owner->session->settings;
    head_size = heads_size;
    n_heads = heads;
    if (head_size < kMinHeadSize || head_size > kMaxHeadSize || head_size % 8) {
        make_plain("its head size " + std::to_string(head_size) + " is not a multiple of 8 from 32 to 256");
        return;
    }
    if (head_size * n_heads != store->shape().row) {
        make_plain("its cells do not divide into " + std::to_string(n_heads) + " heads of " + std::to_string(head_size));
        return;
    }
    const ProfileFit fit = profile_fit(settings, layer, is_value, store->shape().row, n_heads, head_size);
    if (fit.kind == ProfileFit::left_out || fit.kind == ProfileFit::wrong) {
        make_plain(fit.why, settings.profile->path);  // one line for a profile, not one for every layer
        return;
    }
    const size_t bytes = reserve_bytes(store->shape(), settings.codec ? 0 : records_for(settings, fit.layer, is_value, n_heads, head_size));
    if (bytes > region_bytes) move_to_larger_region(bytes);
    std::string error;
    if (is_value) {
        std::vector<ValueFormat> formats;
        if (value_formats(settings, fit.layer, n_heads, head_size, formats, error)) store->set_formats(std::move(formats));
    } else {
        std::vector<KeyFormat> formats;
        std::vector<float> prior = fit.layer ? fit.layer->query_prior : std::vector<float>();
        if (key_formats(settings, fit.layer, n_heads, head_size, formats, error)) store->set_formats(std::move(formats), std::move(prior));
    }
    if (!error.empty()) {
        make_plain(error);
        return;
    }
    mode = Mode::packed;
    ++mode_changes;
}

// The pages of heads of this size take more than was reserved for others.
void CacheTensor::move_to_larger_region(size_t bytes) {
    const StoreShape shape = store->shape();
    uint8_t * const region = owner->memory->allocate(bytes);
    owner->more += bytes;
    auto larger = std::make_unique<PageStore>(shape, owner->memory->pages(shape), region, bytes);
    larger->keep_statistics(keeps_statistics());
    std::vector<half> rows(size_t(kPageCells) * shape.row);
    for (int s = 0; s < shape.n_streams; ++s) {
        for (int p = 0; p < shape.n_pages(); ++p) {
            if (store->page(s, p).empty()) continue;
            const int cell = p * kPageCells, n = std::min(kPageCells, shape.n_cells - cell);
            store->read(s, cell, n, rows.data());
            larger->write(s, cell, n, rows.data(), shape.row);
        }
    }
    store = std::move(larger);
    if (!owner->memory->is_zero()) unused_bytes = region_bytes;  // fresh memory of the machine is not there before it is written
    region_bytes = bytes;
}

void CacheTensor::make_plain(const std::string & why, const std::string & topic) {
    if (mode == Mode::plain) return;
    std::lock_guard<std::recursive_mutex> lock(owner->mutex);
    const char * const sentence = for_ever(why);
    const StoreShape & shape = store->shape();
    uint8_t * data = owner->memory->allocate(nominal_bytes);
    owner->more += nominal_bytes;
    std::vector<half> rows(size_t(kPageCells) * shape.row);
    for (int s = 0; s < shape.n_streams; ++s) {
        for (int p = 0; p < shape.n_pages(); ++p) {
            if (store->page(s, p).empty()) continue;
            const int cell = p * kPageCells, n = std::min(kPageCells, shape.n_cells - cell);
            store->read(s, cell, n, rows.data());
            owner->memory->set(data + (size_t(s) * shape.n_cells + cell) * row_bytes, rows.data(), n * row_bytes);
        }
    }
    store->clear();
    plain_data = data;
    mode = Mode::plain;
    ++mode_changes;
    reason = sentence;
    // One line for a cause, not one for every layer, keys and values.
    if (!owner->dry) warn_once("keys or values of some layers are stored plainly in F16: " + why, topic.empty() ? why : topic);
}

void CacheTensor::read(size_t offset, void * data, size_t size) const {
    if (mode == Mode::plain) {
        owner->memory->get(data, plain_data + offset, size);
        return;
    }
    const int n_cells = store->shape().n_cells;
    auto * out = static_cast<uint8_t *>(data);
    std::vector<uint8_t> row;
    while (size > 0) {
        const size_t cell = offset / row_bytes, skip = offset % row_bytes;
        const int stream = int(cell / n_cells), first = int(cell % n_cells);
        if (skip || size < row_bytes) {
            row.resize(row_bytes);
            store->read(stream, first, 1, reinterpret_cast<half *>(row.data()));
            const size_t n = std::min(size, row_bytes - skip);
            std::memcpy(out, row.data() + skip, n);
            out += n, offset += n, size -= n;
        } else {
            const int n = int(std::min(size / row_bytes, size_t(n_cells - first)));
            if (reinterpret_cast<uintptr_t>(out) % alignof(half)) {
                row.resize(n * row_bytes);
                store->read(stream, first, n, reinterpret_cast<half *>(row.data()));
                std::memcpy(out, row.data(), n * row_bytes);
            } else {
                store->read(stream, first, n, reinterpret_cast<half *>(out));
            }
            out += n * row_bytes, offset += n * row_bytes, size -= n * row_bytes;
        }
    }
}

void CacheTensor::write(size_t offset, const void * data, size_t size, int n_threads) {
    if (mode == Mode::plain) {
        owner->memory->set(plain_data + offset, data, size);
        return;
    }
    const int n_cells = store->shape().n_cells;
    const auto * in = static_cast<const uint8_t *>(data);
    std::vector<uint8_t> rows;
    while (size > 0) {
        const size_t cell = offset / row_bytes, skip = offset % row_bytes;
        const int stream = int(cell / n_cells), first = int(cell % n_cells);
        // A page at a time, so that what is full can be packed on the way. The copy also aligns the rows.
        const int n = skip || size < row_bytes ? 1 : int(std::min(size / row_bytes, size_t(std::min(kPageCells - first % kPageCells, n_cells - first))));
        rows.resize(n * row_bytes);
        const size_t bytes = std::min(size, n * row_bytes - skip);
        if (bytes < rows.size()) store->read(stream, first, n, reinterpret_cast<half *>(rows.data()));
        std::memcpy(rows.data() + skip, in, bytes);
        store->write(stream, first, n, reinterpret_cast<const half *>(rows.data()), store->shape().row);
        store->settle(n_threads);  // a page that the codec refuses fails the next decode, which tries it again
        in += bytes, offset += bytes, size -= bytes;
    }
    owner->memory->trim();
}

void CacheTensor::erase(size_t offset, size_t size) {
    if (mode == Mode::plain) {
        owner->memory->fill(plain_data + offset, 0, size);
        return;
    }
    const int n_cells = store->shape().n_cells;
    size_t cell = offset / row_bytes;
    const size_t end = (offset + size + row_bytes - 1) / row_bytes;
    while (cell < end) {
        const int stream = int(cell / n_cells), first = int(cell % n_cells);
        const int n = int(std::min(end - cell, size_t(n_cells - first)));
        store->erase(stream, first, n);
        cell += n;
    }
}

void CacheTensor::clear() {
    store->clear();
    if (plain_data) owner->memory->fill(plain_data, 0, nominal_bytes);
}

// ---- the buffer ----

namespace {

Buffer & get(ggml_backend_buffer_t buffer) { return **static_cast<std::shared_ptr<Buffer> *>(buffer->context); }

void free_buffer(ggml_backend_buffer_t buffer) {
    at_border("out of memory while a cache was freed", [&] { delete static_cast<std::shared_ptr<Buffer> *>(buffer->context); });
}

void * get_base(ggml_backend_buffer_t buffer) { return get(buffer).memory->base(); }

// A cache tensor over `bytes` from `region` on. False: the profile is not for it, as the session says.
bool add_cache(Buffer & buffer, ggml_tensor * t, int layer, bool is_value, uint8_t * region, size_t bytes) {
    Session & session = *buffer.session;
    const Settings & settings = session.settings;
    if (t->type == GGML_TYPE_F16) {
        const ProfileFit fit = profile_fit(settings, layer, is_value, int(t->ne[0]), 0, 0);
        if (fit.kind == ProfileFit::wrong) {
            session.fail(fit.why, settings.profile->path);
            return false;
        }
    }
    auto cache = std::make_unique<CacheTensor>();
    cache->owner = &buffer;
    cache->name = t->name;
    cache->layer = layer;
    cache->is_value = is_value;
    cache->nominal_bytes = ggml_nbytes(t);
    cache->row_bytes = t->nb[1];
    cache->region_bytes = bytes;
    const StoreShape shape = shape_of(t, is_value, settings);
    cache->store = std::make_unique<PageStore>(shape, buffer.memory->pages(shape), region, bytes);
    cache->store->keep_statistics(keeps_statistics());
    if (settings.codec) cache->store->set_codec(codec_of(session, layer, is_value, *cache->store), kernels());
    if (t->type != GGML_TYPE_F16) {
        cache->mode = CacheTensor::Mode::plain;
        cache->plain_data = region;
        cache->reason = for_ever(std::string("its type is ") + ggml_type_name(t->type));
        if (!buffer.dry) {
            warn_once(std::string("keys or values of some layers are stored plainly: llama.cpp was asked for a cache of type ") +
                      ggml_type_name(t->type) + "; leave the type at f16 for a MixKVQ cache");
        }
    }
    buffer.tensors.reserve(buffer.tensors.size() + 1);
    t->extra = cache.get();
    buffer.tensors.push_back(std::move(cache));
    return true;
}

// ggml sees a key or value tensor as itself, without an operation.
ggml_status init_cache(Buffer & buffer, ggml_tensor * t, int layer, bool is_value) {
    auto * region = static_cast<uint8_t *>(t->data);
    const size_t bytes = std::min(size_of(buffer.session->settings, t, layer, is_value), buffer.size - size_t(region - buffer.memory->base()));
    if (t->type != GGML_TYPE_F16) buffer.memory->init(t);
    return add_cache(buffer, t, layer, is_value, region, bytes) ? GGML_STATUS_SUCCESS : GGML_STATUS_FAILED;
}

ggml_status init_tensor(ggml_backend_buffer_t ggml_buffer, ggml_tensor * t) {
    try {
        Buffer & buffer = get(ggml_buffer);
        std::lock_guard<std::recursive_mutex> lock(buffer.mutex);
        int layer;
        bool is_value;
        if (is_cache_tensor(t, layer, is_value)) return init_cache(buffer, t, layer, is_value);
        if (!t->view_src && std::strncmp(t->name, "cache_", 6) == 0) buffer.direct.push_back({t->data, ggml_nbytes(t)});
        if (!t->view_src && looks_like_cache(t->name)) {
            warn_once(std::string("this llama.cpp has a cache that MixKVQ does not know, ") + t->name + ": it is not packed; use a newer MixKVQ", "unknown cache");
        }
        return t->view_src ? GGML_STATUS_SUCCESS : buffer.memory->init(t);
    } catch (...) {
        return say_exception("out of memory for a cache");
    }
}

// ggml cannot be told that such a call failed.
template <class F> void guarded(ggml_backend_buffer_t buffer, F && f) noexcept {
    at_border("out of memory while llama.cpp copied into or out of the cache: what it copied is incomplete, reset the context", [&] {
        std::lock_guard<std::recursive_mutex> lock(get(buffer).mutex);
        f(get(buffer));
    });
}

void memset_tensor(ggml_backend_buffer_t ggml_buffer, ggml_tensor * t, uint8_t value, size_t offset, size_t size) {
    guarded(ggml_buffer, [&](Buffer & buffer) {
        CacheTensor * cache = cache_of(t);
        buffer.touched = true;
        if (!cache) {
            buffer.memory->fill(static_cast<uint8_t *>(t->data) + offset, value, size);
        } else if (value == 0) {
            cache->erase(offset_in_cache(t) + offset, size);
        } else {
            const std::vector<uint8_t> data(size, value);
            cache->write(offset_in_cache(t) + offset, data.data(), size, 1);
        }
    });
}

void set_tensor(ggml_backend_buffer_t ggml_buffer, ggml_tensor * t, const void * data, size_t offset, size_t size) {
    guarded(ggml_buffer, [&](Buffer & buffer) {
        buffer.touched = true;
        if (CacheTensor * cache = cache_of(t)) {
            if (take_rows(*cache, data, offset_in_cache(t) + offset, size)) return;
            const size_t at = offset_in_cache(t) + offset;
            const auto * rows = static_cast<const uint8_t *>(data);
            cache->each_stream(at, size, [&](int stream, int first, int n, size_t) { buffer.notes.before_write(*cache, stream, first, n); });
            cache->write(at, data, size, buffer.session->n_threads);
            cache->each_stream(at, size, [&](int stream, int first, int n, size_t from) { buffer.notes.written(*cache, stream, first, n, rows + from); });
        } else {
            buffer.memory->set(static_cast<uint8_t *>(t->data) + offset, data, size);
        }
    });
}

void get_tensor(ggml_backend_buffer_t ggml_buffer, const ggml_tensor * t, void * data, size_t offset, size_t size) {
    guarded(ggml_buffer, [&](Buffer & buffer) {
        if (CacheTensor * cache = cache_of(t)) {
            if (take_rows(*cache, data, offset_in_cache(t) + offset, size)) return;
            const size_t at = offset_in_cache(t) + offset;
            cache->read(at, data, size);
            const auto * rows = static_cast<const uint8_t *>(data);
            cache->each_stream(at, size, [&](int stream, int first, int n, size_t from) { buffer.notes.read(*cache, stream, first, n, rows + from); });
            buffer.memory->trim();
        } else {
            buffer.memory->get(data, static_cast<const uint8_t *>(t->data) + offset, size);
        }
    });
}

// seq_cp between streams copies a stream's view. Packed pages are copied as they are.
bool copy_between(Buffer & buffer, const ggml_tensor * src, ggml_tensor * dst) {
    CacheTensor * from = cache_of(src);
    CacheTensor * to = cache_of(dst);
    if (!from && !to) return buffer.memory->copy(src, dst);
    if (!from || !to || (from->owner != to->owner && (from->owner->memory->has_queue() || to->owner->memory->has_queue()))) return false;
    if (from->mode != CacheTensor::Mode::packed || to->mode != from->mode || !from->store->same_layout(*to->store)) return false;
    const size_t stream_bytes = from->row_bytes * from->store->shape().n_cells;
    const size_t a = offset_in_cache(src), b = offset_in_cache(dst);
    if (a % stream_bytes || b % stream_bytes || ggml_nbytes(src) != stream_bytes) return false;
    buffer.touched = true;
    to->store->copy_stream(*from->store, int(a / stream_bytes), int(b / stream_bytes));
    return true;
}

bool cpy_tensor(ggml_backend_buffer_t ggml_buffer, const ggml_tensor * src, ggml_tensor * dst) {
    // Where this fails ggml copies through the host.
    return at_border("out of memory while llama.cpp copied a cache", false, [&] {
        BufferLocks locks;
        locks.add(&get(ggml_buffer));
        locks.add(buffer_of(src));
        locks.lock();
        return copy_between(get(ggml_buffer), src, dst);
    });
}

void clear(ggml_backend_buffer_t ggml_buffer, uint8_t value) {
    guarded(ggml_buffer, [&](Buffer & buffer) {
        if (!buffer.touched && value == 0) return;  // fresh memory is zero; writing it would make it resident
        for (auto & cache : buffer.tensors) cache->clear();
        if (buffer.tensors.empty()) {
            buffer.memory->fill(buffer.memory->base(), value, buffer.size);
        } else {
            for (auto & d : buffer.direct) buffer.memory->fill(static_cast<uint8_t *>(d.first), value, d.second);
            if (buffer.direct.empty()) buffer.memory->zero_all();
            buffer.memory->trim();
        }
        buffer.memory->recover(buffer.tensors);
        buffer.touched = value != 0 || !buffer.memory->is_zero();
    });
}

// ---- the buffer type ----

Device & device_at(ggml_backend_buffer_type_t type) { return *static_cast<Device *>(type->context); }

const char * buft_name(ggml_backend_buffer_type_t type) { return device_at(type).name.c_str(); }

ggml_backend_buffer_t make_buffer(ggml_backend_buffer_type_t type, size_t size) {
    auto session = current_session();
    std::string error;
    auto buffer = std::make_shared<Buffer>();
    buffer->device = &device_at(type);
    buffer->memory = buffer->device->allocate(*buffer->device, size, error);
    if (!buffer->memory) {
        session->fail(error);
        return nullptr;
    }
    buffer->size = size;
    buffer->touched = !buffer->memory->is_zero();
    buffer->session = session;
    auto holder = std::make_unique<std::shared_ptr<Buffer>>(buffer);
    {
        std::lock_guard<std::mutex> lock(session->mutex);
        auto & list = session->buffers;
        list.erase(std::remove_if(list.begin(), list.end(), [](auto & weak) { return weak.expired(); }), list.end());
        if (!session->codec_failed || list.empty()) {  // what failed before is not this context's
            session->error.clear();
            session->codec_failed = false;
        }
        list.push_back(buffer);
    }
    ggml_backend_buffer_i iface = {};
    iface.free_buffer = free_buffer;
    iface.get_base = get_base;
    iface.init_tensor = init_tensor;
    iface.memset_tensor = memset_tensor;
    iface.set_tensor = set_tensor;
    iface.get_tensor = get_tensor;
    iface.cpy_tensor = cpy_tensor;
    iface.clear = clear;
    return ggml_backend_buffer_init(type, iface, holder.release(), size);
}

ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t type, size_t size) {
    return at_border("out of memory for a cache", static_cast<ggml_backend_buffer_t>(nullptr), [&] { return make_buffer(type, size); });
}

size_t get_alignment(ggml_backend_buffer_type_t type) {
    const size_t inner = ggml_backend_buft_get_alignment(ggml_backend_dev_buffer_type(device_at(type).inner));
    return std::max<size_t>(64, inner);
}

bool is_host(ggml_backend_buffer_type_t) { return false; }

}  // namespace

size_t get_alloc_size(ggml_backend_buffer_type_t type, const ggml_tensor * t) {
    int layer;
    bool is_value;
    const bool is_inner = !is_cache_tensor(t, layer, is_value) || t->type != GGML_TYPE_F16;
    const auto inner = [&] { return ggml_backend_buft_get_alloc_size(ggml_backend_dev_buffer_type(device_at(type).inner), t); };
    if (is_inner) return inner();
    return at_border("out of memory for a cache", inner(), [&] {
        const size_t bytes = size_of(current_session()->settings, t, layer, is_value);
        return asserts_sizes ? std::max(bytes, ggml_nbytes(t)) : bytes;  // then addresses are reserved that nobody touches
    });
}

namespace {

// What is behind the tensors of a dry run: nothing. Stores keep their books over addresses that nobody follows.
class NoPages final : public HostMemory {
  public:
    NoPages(ScratchPool & pool, int row, const Device & device) : HostMemory(kernels(), pool, row), device_(device) {}
    void set_layout(const PageLayout & layout) override {
        HostMemory::set_layout(layout);
        query_bytes_ = device_.query_bytes && !layout.is_value() ? device_.query_bytes(layout) : HostMemory::query_bytes();
    }
    size_t query_bytes() const override { return query_bytes_; }

  private:
    const Device & device_;
    size_t query_bytes_ = 0;
};

class NoMemory final : public BufferMemory {
  public:
    Device * device = nullptr;  // of the tensor that is taken

    uint8_t * base() const override { return nullptr; }
    bool is_zero() const override { return true; }
    const char * isa() const override { return isa_name(kernels().isa); }
    std::unique_ptr<PageMemory> pages(const StoreShape & shape) override {
        return std::make_unique<NoPages>(pool_, shape.row, *device);
    }
    void trim() override {}
    size_t scratch_bytes() const override { return 0; }
    size_t scratch_bytes_peak() const override { return 0; }
    uint8_t * allocate(size_t) override { return nullptr; }
    void set(uint8_t *, const void *, size_t) override {}
    void get(void *, const uint8_t *, size_t) const override {}
    void fill(uint8_t *, uint8_t, size_t) override {}
    void zero_all() override {}

  private:
    ScratchPool pool_;
};

}  // namespace

void take_dry(const ggml_tensor * tensor) {
    auto * root = const_cast<ggml_tensor *>(root_of(tensor));
    int layer;
    bool is_value;
    if (!is_ours(root->buffer) || root->buffer->context || root->extra || !is_cache_tensor(root, layer, is_value)) return;
    const auto session = current_session();
    if (session->is_default) return;  // nobody asks it for sizes
    if (!session->dry) {
        auto buffer = std::make_shared<Buffer>();
        buffer->memory = std::make_unique<NoMemory>();
        buffer->dry = true;
        buffer->session = session;
        session->dry = buffer;
        std::lock_guard<std::mutex> lock(session->mutex);
        session->buffers.push_back(buffer);
    }
    const size_t bytes = get_alloc_size(root->buffer->buft, root);
    std::lock_guard<std::recursive_mutex> lock(session->dry->mutex);
    session->dry->device = static_cast<NoMemory &>(*session->dry->memory).device = &device_at(root->buffer->buft);
    session->dry->size += bytes;
    add_cache(*session->dry, root, layer, is_value, reinterpret_cast<uint8_t *>(uintptr_t(64)), bytes);
}

void init_buffer_type(Device & device) {
    ggml_backend_buffer_type_i & iface = device.type.iface = {};
    iface.get_name = buft_name;
    iface.alloc_buffer = alloc_buffer;
    iface.get_alignment = get_alignment;
    iface.get_alloc_size = get_alloc_size;
    iface.is_host = is_host;
    device.type.device = &device.ggml;
    device.type.context = &device;
}

}  // namespace mixkvq::MIXKVQ_GLUE
