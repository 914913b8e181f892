// Stands for ggml's CUDA backend where there is no GPU: devices "CUDA0", "CUDA1", ... that compute with ggml's CPU backend, on the emulator's memory and in
// its order of work. So the half of cpp/ggml that drives GPUs runs as it is: the library of which this is a part is the backend itself, and a test
// registers these devices before it loads that (tests/python/test_emulated_gpu.py). Not emulated: fused operations, several streams at once.
//
// MIXKVQ_EMULATED_GPUS: the compute capabilities of the GPUs, "8.0,6.1". MIXKVQ_EMULATED_AS=Vulkan: they are integrated GPUs of another backend.

#include "cuda_runtime.h"

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <string>
#include <thread>
#include <utility>

#include "abi.h"

// For each layout of ggml's structs there is one of these, with the name of its namespace at the end: emulated_cuda_glue_b.
#define JOIN(name, glue) name##_##glue
#define OF_LAYOUT(name, glue) JOIN(name, glue)
#define EXPORT(result, name) extern "C" __attribute__((visibility("default"))) result OF_LAYOUT(name, MIXKVQ_GLUE)

namespace mixkvq::MIXKVQ_GLUE {

namespace {

struct Gpu {
    ggml_backend_device device = {};
    ggml_backend_buffer_type type = {};
    std::string name, bus;
};

struct Backend {
    ggml_backend_t cpu;
};

std::vector<std::unique_ptr<Gpu>> gpus;
std::atomic<int> n_frees{0}, n_frees_while_recording{0};
std::atomic<bool> wait_for_free{false};
ggml_guid guid = {0x65, 0x6d, 0x75};

Gpu & at(ggml_backend_dev_t device) { return *static_cast<Gpu *>(device->context); }

// --- buffers ---

void free_buffer(ggml_backend_buffer_t buffer) { cudaFree(buffer->context); }
void * get_base(ggml_backend_buffer_t buffer) { return buffer->context; }
void memset_tensor(ggml_backend_buffer_t, ggml_tensor * t, uint8_t value, size_t offset, size_t size) {
    cudaMemset(static_cast<char *>(t->data) + offset, value, size);
}
void set_tensor(ggml_backend_buffer_t, ggml_tensor * t, const void * data, size_t offset, size_t size) {
    cudaMemcpy(static_cast<char *>(t->data) + offset, data, size, cudaMemcpyHostToDevice);
}
void get_tensor(ggml_backend_buffer_t, const ggml_tensor * t, void * data, size_t offset, size_t size) {
    cudaMemcpy(data, static_cast<const char *>(t->data) + offset, size, cudaMemcpyDeviceToHost);
}
void clear(ggml_backend_buffer_t buffer, uint8_t value) { cudaMemset(buffer->context, value, buffer->size); }

const char * type_name(ggml_backend_buffer_type_t type) { return static_cast<Gpu *>(type->context)->name.c_str(); }
ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t type, size_t size) {
    void * memory = nullptr;
    if (cudaMalloc(&memory, std::max<size_t>(size, 1)) != cudaSuccess) return nullptr;
    ggml_backend_buffer_i iface = {};
    iface.free_buffer = free_buffer;
    iface.get_base = get_base;
    iface.memset_tensor = memset_tensor;
    iface.set_tensor = set_tensor;
    iface.get_tensor = get_tensor;
    iface.clear = clear;
    return ggml_backend_buffer_init(type, iface, memory, size);
}
size_t get_alignment(ggml_backend_buffer_type_t) { return 128; }

// --- computation ---

// The arguments are those of the time when it is queued.
struct Copy {
    std::vector<ggml_tensor> nodes, sources;
    explicit Copy(const ggml_cgraph & graph) {
        for (int i = 0; i < graph.n_nodes; ++i) {
            if (graph.nodes[i]->op != GGML_OP_NONE) nodes.push_back(*graph.nodes[i]);
        }
        sources.reserve(nodes.size() * GGML_MAX_SRC);
        for (ggml_tensor & node : nodes) {
            for (ggml_tensor *& src : node.src) {
                if (!src) continue;
                sources.push_back(*src);
                src = &sources.back();
            }
        }
    }
};

void compute(ggml_backend_t cpu, Copy & copy) {
    const int n = int(copy.nodes.size());
    const ggml_init_params params = {ggml_graph_overhead_custom(std::max(n, 1), false) + 1024, nullptr, true};
    ggml_context * ctx = ggml_init(params);
    ggml_cgraph * graph = ggml_new_graph_custom(ctx, std::max(n, 1), false);
    for (ggml_tensor & node : copy.nodes) ggml_graph_add_node(graph, &node);
    ggml_backend_graph_compute(cpu, graph);
    ggml_free(ctx);
}

decltype(ggml_backend_device_i::init_backend) cpu_init;  // of ggml's own CPU device

// Of a context shift: a page of keys by itself.
bool fails(const ggml_cgraph & graph) { return graph.n_nodes == 1 && graph.nodes[0]->op == GGML_OP_ROPE && emulator::fails("shift"); }

ggml_status graph_compute(ggml_backend_t backend, ggml_cgraph * graph) {
    if (fails(*graph)) return GGML_STATUS_FAILED;
    ggml_backend_t cpu = static_cast<Backend *>(backend->context)->cpu;
    emulator::later([cpu, copy = std::make_shared<Copy>(*graph)] { compute(cpu, *copy); });
    // A test frees a backend in another thread while this one records: time to do that, unless something keeps it.
    if (emulator::is_recording() && wait_for_free.exchange(false)) std::this_thread::sleep_for(std::chrono::milliseconds(300));
    return GGML_STATUS_SUCCESS;
}

void free_backend(ggml_backend_t backend) {
    ++n_frees;
    n_frees_while_recording += emulator::is_recording();
    auto * context = static_cast<Backend *>(backend->context);
    ggml_backend_free(context->cpu);
    delete context;
    delete backend;
}

const char * backend_name(ggml_backend_t backend) { return at(backend->device).name.c_str(); }
void synchronize(ggml_backend_t) { emulator::finish(); }
void event_record(ggml_backend_t, ggml_backend_event_t) {}
void event_wait(ggml_backend_t, ggml_backend_event_t) {}

// --- devices ---

const char * device_name(ggml_backend_dev_t device) { return at(device).name.c_str(); }
void get_memory(ggml_backend_dev_t, size_t * free, size_t * total) { *free = *total = size_t(8) << 30; }
// Integrated GPUs, as of Vulkan, if MIXKVQ_EMULATED_AS says so.
bool is_integrated() {
    const char * as = std::getenv("MIXKVQ_EMULATED_AS");
    return as && std::string(as) == "Vulkan";
}
enum ggml_backend_dev_type get_type(ggml_backend_dev_t) { return is_integrated() ? GGML_BACKEND_DEVICE_TYPE_IGPU : GGML_BACKEND_DEVICE_TYPE_GPU; }
void get_props(ggml_backend_dev_t device, ggml_backend_dev_props * props) {
    *props = {};
    props->name = props->description = device_name(device);
    props->type = get_type(device);
    props->device_id = at(device).bus.c_str();
    get_memory(device, &props->memory_free, &props->memory_total);
    props->caps.async = props->caps.events = props->caps.mmap_support = true;
}
ggml_backend_t init_backend(ggml_backend_dev_t device, const char *) {
    auto * backend = new ggml_backend{};
    backend->guid = &guid;
    backend->iface.get_name = backend_name;
    backend->iface.free = free_backend;
    backend->iface.synchronize = synchronize;
    backend->iface.graph_compute = graph_compute;
    backend->iface.event_record = event_record;
    backend->iface.event_wait = event_wait;
    backend->device = device;
    backend->context = new Backend{cpu_init(static_cast<ggml_backend_dev_t>(device->reg->context), nullptr)};
    return backend;
}
ggml_backend_buffer_type_t get_buffer_type(ggml_backend_dev_t device) { return &at(device).type; }
bool supports_op(ggml_backend_dev_t device, const ggml_tensor * op) {
    return ggml_backend_dev_supports_op(static_cast<ggml_backend_dev_t>(device->reg->context), op);
}
bool supports_buft(ggml_backend_dev_t device, ggml_backend_buffer_type_t type) { return type == &at(device).type; }
ggml_backend_event_t event_new(ggml_backend_dev_t device) { return new ggml_backend_event{device, new char}; }
void event_free(ggml_backend_dev_t, ggml_backend_event_t event) {
    delete static_cast<char *>(event->context);
    delete event;
}
void event_synchronize(ggml_backend_dev_t, ggml_backend_event_t) { emulator::finish(); }

// --- ggml's own CPU device, which can fail, too ---

decltype(ggml_backend_i::graph_compute) cpu_compute;

ggml_backend_t init_cpu(ggml_backend_dev_t device, const char * params) {
    ggml_backend_t backend = cpu_init(device, params);
    if (!backend) return nullptr;
    cpu_compute = backend->iface.graph_compute;
    backend->iface.graph_compute = [](ggml_backend_t b, ggml_cgraph * graph) { return fails(*graph) ? GGML_STATUS_FAILED : cpu_compute(b, graph); };
    return backend;
}

const char * registry_name(ggml_backend_reg_t) { return is_integrated() ? "Vulkan" : "CUDA"; }
size_t device_count(ggml_backend_reg_t) { return gpus.size(); }
ggml_backend_dev_t get_device(ggml_backend_reg_t, size_t i) { return &gpus[i]->device; }
void * get_proc_address(ggml_backend_reg_t, const char *) { return nullptr; }

}  // namespace

// To be registered with ggml. cpu: its CPU device.
EXPORT(ggml_backend_reg_t, emulated_cuda)(ggml_backend_dev_t cpu) {
    static ggml_backend_reg registry = {kBackendApiVersion, {registry_name, device_count, get_device, get_proc_address}, cpu};
    for (size_t i = 0; i < emulator::gpus().size(); ++i) {
        auto gpu = std::make_unique<Gpu>();
        gpu->name = "CUDA" + std::to_string(i);
        gpu->bus = emulator::bus_of(int(i));
        gpu->type.iface.get_name = type_name;
        gpu->type.iface.alloc_buffer = alloc_buffer;
        gpu->type.iface.get_alignment = get_alignment;
        gpu->type.device = &gpu->device;
        gpu->type.context = gpu.get();
        gpu->device.iface = {device_name, device_name, get_memory,  get_type,      get_props, init_backend, get_buffer_type, nullptr,
                             nullptr,     supports_op, supports_buft, nullptr,     event_new, event_free,   event_synchronize};
        gpu->device.reg = &registry;
        gpu->device.context = gpu.get();
        gpus.push_back(std::move(gpu));
    }
    cpu_init = std::exchange(cpu->iface.init_backend, init_cpu);
    return &registry;
}

// Of the calls of a kind ("malloc", "host", "launch", "capture", "instantiate", "shift"), `times` fail after `skip` that do not.
EXPORT(void, emulated_cuda_fail)(const char * call, int skip, int times) { emulator::fail(call, skip, times); }
// How many backends have been freed, and how many of them while a graph was being recorded. wait: the next recording takes long enough for one.
EXPORT(int, emulated_cuda_frees)() { return n_frees; }
EXPORT(int, emulated_cuda_frees_while_recording)() { return n_frees_while_recording; }
EXPORT(void, emulated_cuda_wait_for_free)() { wait_for_free = true; }
EXPORT(bool, emulated_cuda_waits)() { return !wait_for_free; }
// How many graphs have been launched.
EXPORT(int, emulated_cuda_launches)() { return emulator::n_launches(); }

}  // namespace mixkvq::MIXKVQ_GLUE
