// The devices over ggml's CUDA devices. Each computes whole graphs, so that nothing is copied between backends: the inner device does everything but
// the operations on a cache. Weights and results are the inner device's memory, and so are our buffers, with the cache tensors in them.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>

#include "backends.h"
#include "border.h"
#include "mixkvq/cuda_memory.h"
#include "operations.h"

namespace mixkvq::MIXKVQ_GLUE {

namespace {

// Of what the host wrote last, this much is remembered: a graph has fewer inputs, and lists of indices are shorter.
constexpr size_t kWrites = 64, kWrittenBytes = 64 * 1024 * 1024;

struct CudaDevice final : Device {
    int number = -1;  // CUDA's
    std::atomic<uint64_t> n_computed{0};
};

// ---- buffers ----

class CudaBuffer final : public BufferMemory {
  public:
    CudaBuffer(CudaDevice & device, ggml_backend_buffer_t inner) : device_(device), inner_(inner) {}
    ~CudaBuffer() override {
        if (queue_) queue_->synchronize();
        for (ggml_backend_buffer_t more : more_) ggml_backend_buffer_free(more);
        ggml_backend_buffer_free(inner_);
    }

    ggml_backend_buffer_t inner() const { return inner_; }
    const std::shared_ptr<cuda::Queue> & queue() const { return queue_; }

    // What the host has written there, if nothing has been computed since.
    const uint8_t * written(const void * at, size_t bytes) const {
        for (const Written & w : written_) {
            if (w.at == at && w.bytes.size() >= bytes && w.n_computed == device_.n_computed) return w.bytes.data();
        }
        return nullptr;
    }

    uint8_t * base() const override { return static_cast<uint8_t *>(ggml_backend_buffer_get_base(inner_)); }
    bool is_zero() const override { return false; }
    const char * isa() const override { return "cuda"; }

    std::unique_ptr<PageMemory> pages(const StoreShape & shape) override {
        if (!queue_) queue_ = std::make_shared<cuda::Queue>(device_.number);
        return std::make_unique<CudaMemory>(queue_, shape.row, shape.n_pages() * shape.n_streams);
    }
    bool has_queue() const override { return true; }
    void trim() override {
        if (queue_) queue_->trim();
    }
    size_t scratch_bytes() const override { return queue_ ? queue_->bytes() : 0; }
    size_t scratch_bytes_peak() const override { return queue_ ? queue_->bytes_peak() : 0; }

    uint8_t * allocate(size_t bytes) override {
        ggml_backend_buffer_t more = ggml_backend_buft_alloc_buffer(inner_->buft, bytes);
        if (!more) throw std::bad_alloc();
        more_.push_back(more);
        ggml_backend_buffer_clear(more, 0);
        return static_cast<uint8_t *>(ggml_backend_buffer_get_base(more));
    }
    void set(uint8_t * to, const void * from, size_t bytes) override {
        ggml_tensor t = bytes_at(to, bytes);
        inner_->iface.set_tensor(inner_, &t, from, 0, bytes);
        forget(to, bytes);
        if (bytes > kWrittenBytes) return;
        if (written_.size() == kWrites) written_.pop_front();
        written_.push_back({to, copy_of(static_cast<const uint8_t *>(from), bytes), device_.n_computed});
    }
    void get(void * to, const uint8_t * from, size_t bytes) const override {
        const ggml_tensor t = bytes_at(const_cast<uint8_t *>(from), bytes);
        inner_->iface.get_tensor(inner_, &t, to, 0, bytes);
    }
    void fill(uint8_t * at, uint8_t value, size_t bytes) override {
        ggml_tensor t = bytes_at(at, bytes);
        forget(at, bytes);
        inner_->iface.memset_tensor(inner_, &t, value, 0, bytes);
    }
    void zero_all() override {}  // pages are zeroed when they are taken
    void recover(std::vector<std::unique_ptr<CacheTensor>> & tensors) override {
        if (!queue_ || !queue_->error() || !queue_->recover()) return;
        for (auto & t : tensors) {
            if (t->store) cuda_memory(*t).recover();
        }
    }

    ggml_status init(ggml_tensor * t) override { return inner_->iface.init_tensor ? inner_->iface.init_tensor(inner_, t) : GGML_STATUS_SUCCESS; }
    bool copy(const ggml_tensor * src, ggml_tensor * dst) override {
        if (!inner_->iface.cpy_tensor) return false;
        ggml_tensor from = *src, to = *dst;
        from.view_src = to.view_src = nullptr;
        from.buffer = root_of(src)->buffer;
        to.buffer = inner_;
        if (const Buffer * ours = buffer_of(src)) from.buffer = inner_buffer(*ours);
        forget(static_cast<uint8_t *>(dst->data), ggml_nbytes(dst));
        return from.buffer && inner_->iface.cpy_tensor(inner_, &from, &to);
    }

  private:
    struct Written {
        const uint8_t * at;
        std::vector<uint8_t> bytes;
        uint64_t n_computed;  // then
    };

    // What is not true any more, or not soon.
    void forget(const uint8_t * at, size_t bytes) {
        const auto gone = [&](Written & w) {
            if (w.n_computed == device_.n_computed && !(w.at < at + bytes && at < w.at + w.bytes.size())) return false;
            if (w.bytes.capacity() > spare_.capacity()) spare_.swap(w.bytes), spare_since_ = device_.n_computed;
            return true;
        };
        written_.erase(std::remove_if(written_.begin(), written_.end(), gone), written_.end());
        if (device_.n_computed - spare_since_ > 1) std::vector<uint8_t>().swap(spare_);  // no long prompt any more
    }
    // The mask of a long prompt has 32 MiB and grows from batch to batch. To get memory for it from the system takes four times as long as to copy it.
    std::vector<uint8_t> copy_of(const uint8_t * from, size_t bytes) {
        constexpr size_t kLong = size_t(1) << 20;
        std::vector<uint8_t> copy;
        if (bytes >= kLong) {
            copy.swap(spare_);
            copy.clear();
            size_t room = kLong;
            while (room < bytes) room *= 2;
            copy.reserve(room);
        }
        copy.assign(from, from + bytes);
        return copy;
    }

    ggml_tensor bytes_at(uint8_t * at, size_t n) const {
        ggml_tensor t = {};
        t.type = GGML_TYPE_I8;
        t.buffer = inner_;
        t.data = at;
        t.ne[0] = int64_t(n);
        t.ne[1] = t.ne[2] = t.ne[3] = 1;
        t.nb[0] = 1;
        t.nb[1] = t.nb[2] = t.nb[3] = n;
        return t;
    }

    CudaDevice & device_;
    ggml_backend_buffer_t inner_;
    std::vector<ggml_backend_buffer_t> more_;
    std::shared_ptr<cuda::Queue> queue_;  // from the first cache tensor on
    std::deque<Written> written_;
    std::vector<uint8_t> spare_;  // memory of a copy that is not true any more
    uint64_t spare_since_ = 0;
};

std::unique_ptr<BufferMemory> allocate(Device & device, size_t size, std::string & error) {
    if (ggml_backend_buffer_t inner = ggml_backend_buft_alloc_buffer(ggml_backend_dev_buffer_type(device.inner), size)) {
        return std::make_unique<CudaBuffer>(static_cast<CudaDevice &>(device), inner);
    }
    size_t free = 0, total = 0;
    ggml_backend_dev_memory(device.inner, &free, &total);
    error = std::string(ggml_backend_dev_name(device.inner)) + " has no room for a buffer of " + format_bytes(size) + " (" + format_bytes(free) + " of " +
            format_bytes(total) + " are free); choose a smaller context";
    return nullptr;
}

// ---- the device ----

CudaDevice & get(ggml_backend_dev_t dev) { return *static_cast<CudaDevice *>(dev->context); }
ggml_backend_dev_t inner_of(ggml_backend_dev_t dev) { return get(dev).inner; }

const char * get_name(ggml_backend_dev_t dev) { return get(dev).name.c_str(); }
const char * get_description(ggml_backend_dev_t dev) { return get(dev).description.c_str(); }
void get_memory(ggml_backend_dev_t dev, size_t * free, size_t * total) { ggml_backend_dev_memory(inner_of(dev), free, total); }
enum ggml_backend_dev_type get_type(ggml_backend_dev_t dev) { return ggml_backend_dev_type(inner_of(dev)); }

// With the inner device's id: llama.cpp takes one device of an id by itself, the first, so ours has to be asked for.
void get_props(ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
    ggml_backend_dev_get_props(inner_of(dev), props);
    props->name = get_name(dev);
    props->description = get_description(dev);
}

ggml_backend_t init_backend(ggml_backend_dev_t dev, const char *) {
    return at_border("out of memory for a context", static_cast<ggml_backend_t>(nullptr), [&] { return make_cuda_backend(dev); });
}
ggml_backend_buffer_type_t get_buffer_type(ggml_backend_dev_t dev) { return &get(dev).type; }
ggml_backend_buffer_type_t get_host_buffer_type(ggml_backend_dev_t dev) { return ggml_backend_dev_host_buffer_type(inner_of(dev)); }

bool supports_op(ggml_backend_dev_t dev, const ggml_tensor * op) {
    CudaDevice & device = get(dev);
    for (int i = -1; i < GGML_MAX_SRC; ++i) {
        const ggml_tensor * t = i < 0 ? op : op->src[i];
        if (!t) continue;
        const ggml_tensor * root = root_of(t);
        if (is_in_memory_of_llama(t)) {
            if (root->buffer->buft != &device.type) return false;  // of another device of ours
        } else if (root->buffer && root->buffer->buft == &device.type && root->buffer->size == 0) {
            return false;  // an empty buffer stands for the one that a weight would be in; ours are for the cache only
        }
    }
    return at_border("there is no memory left on the GPU for a cache that has to be stored plainly", false, [&] {
        touches_cache(op, &device.type);
        // Our attention knows more shapes than the inner device's.
        if (op->op == GGML_OP_FLASH_ATTN_EXT && can_attend(cache_of(op->src[1]), cache_of(op->src[2]), op)) return true;
        return ggml_backend_dev_supports_op(device.inner, op);
    });
}

bool supports_buft(ggml_backend_dev_t dev, ggml_backend_buffer_type_t type) {
    return type == &get(dev).type || ggml_backend_dev_supports_buft(inner_of(dev), type);
}

bool offload_op(ggml_backend_dev_t dev, const ggml_tensor * op) { return ggml_backend_dev_offload_op(inner_of(dev), op); }

// An event knows the inner device and is freed and awaited there.
ggml_backend_event_t event_new(ggml_backend_dev_t dev) { return ggml_backend_event_new(inner_of(dev)); }
void event_free(ggml_backend_dev_t, ggml_backend_event_t event) { ggml_backend_event_free(event); }
void event_synchronize(ggml_backend_dev_t, ggml_backend_event_t event) { ggml_backend_event_synchronize(event); }

}  // namespace

ggml_backend_buffer_t inner_buffer(const Buffer & buffer) {
    const auto * memory = dynamic_cast<const CudaBuffer *>(buffer.memory.get());
    return memory ? memory->inner() : nullptr;
}

const uint8_t * written_by_host(const ggml_tensor * t) {
    const Buffer * buffer = buffer_of(t);
    return buffer ? static_cast<const CudaBuffer &>(*buffer->memory).written(t->data, ggml_nbytes(t)) : nullptr;
}
void has_computed(ggml_backend_dev_t dev) { ++get(dev).n_computed; }

CudaMemory & cuda_memory(const CacheTensor & tensor) { return static_cast<CudaMemory &>(tensor.store->memory()); }
std::shared_ptr<cuda::Queue> queue_of(const Buffer & buffer) { return static_cast<const CudaBuffer &>(*buffer.memory).queue(); }

std::vector<std::unique_ptr<Device>> find_cuda_devices(std::vector<LeftOut> & left_out) {
    std::vector<std::unique_ptr<Device>> found;
    for (size_t i = 0, n = ggml_backend_dev_count(); i < n; ++i) {
        ggml_backend_dev_t inner = ggml_backend_dev_get(i);
        if (std::strcmp(ggml_backend_reg_name(ggml_backend_dev_backend_reg(inner)), "CUDA") != 0) continue;
        ggml_backend_dev_props props = {};
        ggml_backend_dev_get_props(inner, &props);
        auto device = std::make_unique<CudaDevice>();
        device->number = props.device_id ? cuda::device_of_bus(props.device_id) : -1;
        const char * why = device->number < 0 ? "CUDA does not show it" : cuda::unavailable(device->number);
        if (asserts_sizes) why = "this ggml is built with assertions (without NDEBUG), which want a cache of nominal size";
        if (why) {
            left_out.push_back({ggml_backend_dev_name(inner), why});
            continue;
        }
        guard_recordings(inner);
        device->inner = inner;
        device->name = std::string("MIXKVQ-") + ggml_backend_dev_name(inner);
        device->description = std::string(ggml_backend_dev_description(inner)) + " with a MixKVQ cache";
        device->allocate = allocate;
        device->query_bytes = CudaMemory::query_bytes_of;
        ggml_backend_device_i & iface = device->ggml.iface;
        iface.get_name = get_name;
        iface.get_description = get_description;
        iface.get_memory = get_memory;
        iface.get_type = get_type;
        iface.get_props = get_props;
        iface.init_backend = init_backend;
        iface.get_buffer_type = get_buffer_type;
        iface.get_host_buffer_type = get_host_buffer_type;
        iface.supports_op = supports_op;
        iface.supports_buft = supports_buft;
        iface.offload_op = offload_op;
        if (props.caps.events) {
            iface.event_new = event_new;
            iface.event_free = event_free;
            iface.event_synchronize = event_synchronize;
        }
        found.push_back(std::move(device));
    }
    return found;
}

}  // namespace mixkvq::MIXKVQ_GLUE
