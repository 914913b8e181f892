// The device that owns the cache. It claims only operations on cache tensors; weights and all else stay with ggml's CPU backend. And what all
// our devices have in common.

#include <cstdlib>
#include <cstring>

#include "backends.h"
#include "border.h"
#include "device.h"
#include "operations.h"

namespace mixkvq::MIXKVQ_GLUE {

namespace {

Device device;
std::vector<std::unique_ptr<Device>> others;
std::vector<LeftOut> without;
std::vector<Device *> all;
const Kernels * table = nullptr;

const char * get_name(ggml_backend_dev_t) { return device.name.c_str(); }
const char * get_description(ggml_backend_dev_t) { return device.description.c_str(); }
void get_memory(ggml_backend_dev_t, size_t * free, size_t * total) { ggml_backend_dev_memory(device.inner, free, total); }

// An integrated device: llama.cpp picks it by itself only where there is no discrete GPU. It would also pick it beside an integrated GPU of another
// backend (older ones give each a part of the layers), and so put a model on a slower device than without us. There it is an accelerator, which a program has
// to name.
enum ggml_backend_dev_type get_type(ggml_backend_dev_t dev) {
    for (size_t i = 0, n = ggml_backend_dev_count(); i < n; ++i) {
        ggml_backend_dev_t other = ggml_backend_dev_get(i);
        if (other->reg != dev->reg && ggml_backend_dev_type(other) == GGML_BACKEND_DEVICE_TYPE_IGPU) return GGML_BACKEND_DEVICE_TYPE_ACCEL;
    }
    return GGML_BACKEND_DEVICE_TYPE_IGPU;
}

void get_props(ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
    ggml_backend_dev_props inner = {};
    ggml_backend_dev_get_props(device.inner, &inner);
    *props = {};
    props->name = get_name(dev);
    props->description = get_description(dev);
    props->type = get_type(dev);
    get_memory(dev, &props->memory_free, &props->memory_total);
    props->caps.mmap_support = inner.caps.mmap_support;  // without it llama.cpp does not map the model into memory
}

ggml_backend_t init_backend(ggml_backend_dev_t dev, const char *) {
    return at_border("out of memory for a context", static_cast<ggml_backend_t>(nullptr), [&] { return make_backend(dev); });
}
ggml_backend_buffer_type_t get_buffer_type(ggml_backend_dev_t) { return &device.type; }

bool supports_op(ggml_backend_dev_t, const ggml_tensor * op) {
    return at_border("out of memory for a cache that has to be stored plainly", false, [&] {
        if (!touches_cache(op, &device.type) && !is_split(op)) return false;
        return is_view(op->op) || ggml_backend_dev_supports_op(device.inner, op);
    });
}

bool supports_buft(ggml_backend_dev_t, ggml_backend_buffer_type_t type) { return type == &device.type || ggml_backend_buft_is_host(type); }

// The memory of the machine, which becomes resident where it is touched.
class HostBuffer final : public BufferMemory {
  public:
    explicit HostBuffer(size_t size) : region_(size) {}

    uint8_t * base() const override { return region_.data(); }
    bool is_zero() const override { return true; }
    const char * isa() const override { return isa_name(kernels().isa); }
    std::unique_ptr<PageMemory> pages(const StoreShape & shape) override {
        return std::make_unique<HostMemory>(kernels(), pool_, shape.row);
    }
    void trim() override { pool_.trim(); }
    size_t scratch_bytes() const override { return pool_.bytes(); }
    size_t scratch_bytes_peak() const override { return pool_.bytes_peak(); }
    uint8_t * allocate(size_t bytes) override {
        Region region(bytes);
        if (!region.data()) throw std::bad_alloc();
        more_.push_back(std::move(region));
        return more_.back().data();
    }
    void set(uint8_t * to, const void * from, size_t bytes) override { std::memcpy(to, from, bytes); }
    void get(void * to, const uint8_t * from, size_t bytes) const override { std::memcpy(to, from, bytes); }
    void fill(uint8_t * at, uint8_t value, size_t bytes) override {
        for (Region & region : more_) {
            if (region.data() == at && value == 0) return region.zero();
        }
        std::memset(at, value, bytes);
    }
    void zero_all() override { region_.zero(); }

  private:
    Region region_;
    ScratchPool pool_;
    std::vector<Region> more_;
};

std::unique_ptr<BufferMemory> allocate(Device &, size_t size, std::string & error) {
    const uint64_t memory = physical_memory();
    if (memory && size > memory) {
        error = "the cache needs " + format_bytes(size) + " and this process can have " + format_bytes(memory) + " of memory; choose a smaller context";
        return nullptr;
    }
    auto buffer = std::make_unique<HostBuffer>(size);
    if (buffer->base()) return buffer;
    error = "there is no memory for a cache of " + format_bytes(size) + "; choose a smaller context";
    return nullptr;
}

}  // namespace

const std::vector<Device *> & devices() { return all; }
const std::vector<LeftOut> & left_out() { return without; }
ggml_backend_dev_t cpu_device() { return &device.ggml; }
ggml_backend_dev_t inner_device() { return device.inner; }

bool find_inner_devices(std::string & error) {
    device.inner = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    if (!device.inner) {
        error = "ggml's CPU backend is not in the process that loads this library; load it before";
        return false;
    }
#if defined(MIXKVQ_HAVE_CUDA)
    others = find_cuda_devices(without);
    for (const LeftOut & gpu : without) warn_once(gpu.name + " has no MixKVQ cache: " + gpu.why);
#endif
    return true;
}

void init_devices(ggml_backend_reg_t reg) {
    device.name = "MIXKVQ-CPU";
    device.description = "CPU with a MixKVQ cache";
    device.allocate = allocate;
    ggml_backend_device_i & iface = device.ggml.iface = {};
    iface.get_name = get_name;
    iface.get_description = get_description;
    iface.get_memory = get_memory;
    iface.get_type = get_type;
    iface.get_props = get_props;
    iface.init_backend = init_backend;
    iface.get_buffer_type = get_buffer_type;
    iface.supports_op = supports_op;
    iface.supports_buft = supports_buft;
    all = {&device};
    for (auto & other : others) {
        other->weights[0] = ggml_backend_dev_buffer_type(other->inner);
        all.push_back(other.get());
    }
    for (Device * d : all) {
        d->ggml.reg = reg;
        d->ggml.context = d;
        init_buffer_type(*d);
    }
}

const Kernels & kernels() { return *table; }

bool init_kernels(std::string & error) {
    table = kernels_for(select_isa(error));
    const char * wanted = std::getenv("MIXKVQ_ISA");
    const char * slow = wanted && *wanted ? nullptr : no_vector_kernels();
    if (slow) warn_once(slow);
    return error.empty() && table;
}

}  // namespace mixkvq::MIXKVQ_GLUE
