// What the parts of the ggml backend share: settings and sessions, buffers and the cache tensors in them.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "abi.h"
#include "mixkvq/attention.h"
#include "mixkvq/backend_api.h"
#include "mixkvq/cache.h"
#include "mixkvq/profile.h"

namespace mixkvq {
class CudaMemory;
namespace cuda {
class Queue;
}
}  // namespace mixkvq

namespace mixkvq::glue {

// ---- settings.cpp ----

struct Settings {
    const Preset * preset = nullptr;
    std::shared_ptr<const Profile> profile;
    int window = 128, sinks = 128;
    std::vector<std::pair<int, int>> head_sizes;  // by layer: keys, values; empty if not known
    bool any_model = false;                       // the profile is for some of the models that are loaded: others get the preset
    mixkvq_codec codec = nullptr;                 // in place of the formats of preset and profile
    void * codec_user = nullptr;
};

// From MIXKVQ_PRESET, MIXKVQ_PROFILE, MIXKVQ_WINDOW and MIXKVQ_SINKS. False: `error` says what is wrong with them.
bool settings_from_environment(Settings & settings, std::string & error);
bool keeps_statistics();  // MIXKVQ_KEEP_STATISTICS, for all sessions
bool settings_from_api(const mixkvq_settings & from, Settings & settings, std::string & error);
bool load_profile(const std::string & path, Profile & profile, std::string & error);

// What the profile says about a tensor of a layer whose cells have `row` elements; `n_heads` and `head_size` are 0 as long as they are not known.
struct ProfileFit {
    enum Kind {
        none,     // nothing: the preset's formats
        fits,     // `layer`
        left_out, // that the layer has no cache: it stays F16. `why` says so.
        wrong,    // it is for another model. `why` says so.
    } kind = none;
    const LayerProfile * layer = nullptr;
    std::string why;
};
ProfileFit profile_fit(const Settings & s, int layer, bool is_value, int row, int n_heads, int head_size);

// Formats of a layer, of a profile's if there is one; false: `error` says why there are none.
bool key_formats(const Settings & s, const LayerProfile * layer, int n_heads, int head_size, std::vector<KeyFormat> & formats, std::string & error);
bool value_formats(const Settings & s, const LayerProfile * layer, int n_heads, int head_size, std::vector<ValueFormat> & formats, std::string & error);

// One line on stderr, "mixkvq: ...". The same line, or another on the same topic, is not repeated in a process.
void warn_once(const std::string & sentence, const std::string & topic = "") noexcept;
std::string format_bytes(uint64_t bytes);

// ggml calls us through pointers to C functions, which no exception may leave. Says what the one that is being handled says, or, where memory is short,
// `out_of_memory`; returns the status that stands for it.
ggml_status say_exception(const char * out_of_memory) noexcept;
template <class R, class F> R at_border(const char * out_of_memory, R otherwise, F && f) noexcept {
    try {
        return f();
    } catch (...) {
        say_exception(out_of_memory);
        return otherwise;
    }
}
template <class F> void at_border(const char * out_of_memory, F && f) noexcept {
    at_border(out_of_memory, 0, [&] { return f(), 0; });
}

// ---- session.cpp ----

struct Buffer;
struct CacheTensor;

struct Session {
    Settings settings;
    std::mutex mutex;
    std::vector<std::weak_ptr<Buffer>> buffers;
    std::string error;
    bool codec_failed = false;  // the error is one of the codec: the next page that it takes ends it
    std::atomic<int> n_threads{1};
    std::shared_ptr<Buffer> dry;     // the tensors of a context that llama.cpp only measures (no_alloc); until the handle is released
    bool is_default = false;         // the process's
    std::atomic<bool> open{true};    // contexts are still created under it
    std::shared_ptr<Session> outer;  // what was this thread's before

    void fail(const std::string & sentence, const std::string & topic = "");
};

// The codec of a session as the store of a layer calls it: checks what it returns, and leaves a sentence in the session.
PageCodec codec_of(Session & session, int layer, bool is_value, const PageStore & store);

// The session of this thread: the one between begin and end, else one for all threads, else the process's, which follows the environment. A thread that
// begins a context stays with the session of that moment, whatever other threads begin and end meanwhile.
std::shared_ptr<Session> current_session();
void begin_context();
bool init_default_session(std::string & error);
const mixkvq_backend_api * backend_api();

// ---- state.cpp ----

struct State;  // a packed state; takes part in what its thread does until it is finished or freed

// nullptr: `why` says so. Throw std::bad_alloc.
std::shared_ptr<State> begin_saving(std::shared_ptr<Session> session, uint64_t size, uint32_t flags);
std::shared_ptr<State> begin_loading(std::shared_ptr<Session> session, const void * data, size_t bytes, uint32_t flags, std::string & why);
void * state_data(State & state, uint64_t * size);
// False: `to` has refused something. Without it only the bytes are counted.
bool finish_saving(State & state, uint64_t n, const StateWriter::Write & to, uint64_t * bytes);
std::string finish_loading(State & state);  // "", or why it went wrong
// Whether a state of this thread takes care of rows that llama.cpp reads or writes: nobody else has to.
bool take_rows(CacheTensor & cache, const void * data, size_t offset, size_t bytes);

// ---- device.cpp ----

class BufferMemory;

// One of our devices: one of ggml's with our cache.
struct Device {
    ggml_backend_device ggml = {};        // its context, and that of the buffer type, is this
    ggml_backend_buffer_type type = {};
    ggml_backend_dev_t inner = nullptr;   // ggml's
    ggml_backend_buffer_type_t weights[2] = {};  // where those of its layers go besides, and a null
    std::string name, description;
    // Memory for a buffer; nullptr: `error` says why.
    std::unique_ptr<BufferMemory> (*allocate)(Device & device, size_t size, std::string & error) = nullptr;
};

// A GPU of ggml's that has no device of ours, and why.
struct LeftOut {
    std::string name, why;
};
const std::vector<LeftOut> & left_out();

ggml_backend_dev_t cpu_device();    // ours
ggml_backend_dev_t inner_device();  // ggml's CPU device
bool find_inner_device(void * return_address, std::string & error);
void init_devices(ggml_backend_reg_t reg);
const std::vector<Device *> & devices();
const Kernels & kernels();
bool init_kernels(std::string & error);

// A function of the registry that is loading us.
void * registry_function(void * return_address, const char * name);

// ---- buffer.cpp ----

// What is behind a buffer: memory of its device, the F16 pages beyond those that cache tensors own, and how both are reached.
class BufferMemory {
  public:
    virtual ~BufferMemory() = default;
    virtual uint8_t * base() const = 0;
    virtual bool is_zero() const = 0;  // of fresh memory
    virtual const char * isa() const = 0;

    virtual std::unique_ptr<PageMemory> pages(CacheTensor & tensor, const StoreShape & shape) = 0;
    virtual void trim() = 0;  // frees the pages that nobody holds
    virtual size_t scratch_bytes() const = 0;
    virtual size_t scratch_bytes_peak() const = 0;

    virtual uint8_t * allocate(size_t bytes) = 0;  // more of it, zeroed, for as long as the buffer lives; throws std::bad_alloc
    virtual void set(uint8_t * to, const void * from, size_t bytes) = 0;
    virtual void get(void * to, const uint8_t * from, size_t bytes) const = 0;
    virtual void fill(uint8_t * at, uint8_t value, size_t bytes) = 0;
    virtual void zero_all() = 0;  // nobody needs the contents any more
    virtual void recover(std::vector<std::unique_ptr<CacheTensor>> &) {}  // all tensors have been cleared: what failed before does not matter any more
    // For tensors that are as ggml lays them out: prepares one, copies one to another.
    virtual ggml_status init(ggml_tensor *) { return GGML_STATUS_SUCCESS; }
    virtual bool copy(const ggml_tensor *, ggml_tensor *) { return false; }
};

// How often a cache tensor has changed its mode, of all there are: what was found out about operations on them holds until it changes.
extern std::atomic<uint64_t> mode_changes;

// A key or value tensor of llama.cpp's cache. Its `data` is a name: byte offsets from it, by the strides of its nominal
// type, say which cell and head is meant.
struct CacheTensor {
    enum class Mode {
        undecided,  // nobody has read it yet, so its head size is not known; everything stays F16
        packed,
        plain,      // kept as llama.cpp lays it out
    };

    Buffer * owner = nullptr;
    std::string name;
    int layer = 0;
    bool is_value = false;
    size_t nominal_bytes = 0;
    size_t row_bytes = 0;
    size_t region_bytes = 0;
    size_t unused_bytes = 0;  // of memory that is taken and that nothing is in
    Mode mode = Mode::undecided;
    const char * reason = "";  // why it is plain; lives as long as the process
    int head_size = 0, n_heads = 0;
    std::unique_ptr<PageStore> store;
    uint8_t * plain_data = nullptr;
    CudaMemory * cuda = nullptr;  // the store's memory, if it is on a GPU

    // The first reader says how a cell is divided into heads.
    void decide(int head_size, int n_heads);
    void move_to_larger_region(size_t bytes);
    void make_plain(const std::string & reason, const std::string & topic = "");
    // Byte ranges in nominal layout.
    void read(size_t offset, void * data, size_t size) const;
    void write(size_t offset, const void * data, size_t size, int n_threads);
    void erase(size_t offset, size_t size);
    void clear();
};

struct Buffer : std::enable_shared_from_this<Buffer> {
    // Whoever reads or changes what is in here, or the books of its pages, holds it: a program may ask for figures while another thread decodes.
    std::recursive_mutex mutex;
    Device * device = nullptr;
    std::unique_ptr<BufferMemory> memory;
    size_t size = 0;
    std::vector<std::unique_ptr<CacheTensor>> tensors;
    std::vector<std::pair<void *, size_t>> direct;  // tensors of llama.cpp's memory that are no key or value cache
    bool touched = false;
    std::shared_ptr<Session> session;
    size_t more = 0;   // bytes allocated beside `size`, for tensors that turned out to be plain
    bool dry = false;  // of a dry run: sizes without memory
};

// Several buffers that are held at once; in the order of their addresses, so that no two threads wait for each other.
class BufferLocks {
  public:
    void add(Buffer * buffer) {
        if (buffer) buffers_.push_back(buffer);
    }
    void lock() {
        std::sort(buffers_.begin(), buffers_.end());
        buffers_.erase(std::unique(buffers_.begin(), buffers_.end()), buffers_.end());
        for (Buffer * buffer : buffers_) locks_.emplace_back(buffer->mutex);
    }

  private:
    std::vector<Buffer *> buffers_;
    std::vector<std::unique_lock<std::recursive_mutex>> locks_;
};

void init_buffer_type(Device & device);
// Takes a cache tensor of a dry run (llama.cpp's no_alloc) into the books of this thread's session.
void take_dry(const ggml_tensor * tensor);
const ggml_tensor * root_of(const ggml_tensor * tensor);
CacheTensor * cache_of(const ggml_tensor * tensor);  // nullptr unless the tensor is (a view of) a cache tensor
Buffer * buffer_of(const ggml_tensor * tensor);  // nullptr unless it is in one of our buffers
bool is_split(const ggml_tensor * op);           // of a model whose tensors ggml divides between devices (-sm tensor)
bool is_in_memory_of_llama(const ggml_tensor * tensor);  // a tensor of llama.cpp's memory (cache_*) in one of our buffers
size_t offset_in_cache(const ggml_tensor * tensor);

// ---- backend.cpp ----

struct BackendContext {
    ggml_backend_t inner = nullptr;
    int n_threads = 1;
    AttentionWorkspace workspace;
    std::vector<PageStore::Cell> cells;  // of a write
};

// Some nodes of a graph, which a backend can tell apart and fuse like the graph itself.
ggml_cgraph slice_of(const ggml_cgraph & graph, int first, int end);

extern ggml_guid backend_guid;
ggml_backend_t make_backend(ggml_backend_dev_t device);
void set_n_threads(ggml_backend_t backend, int n_threads);

// ---- ops.cpp ----

// Operations that compute nothing.
bool is_view(ggml_op op);

// Whether `op` reads or writes a cache in our buffers of this type. Learns head sizes on the way.
bool touches_cache(const ggml_tensor * op, ggml_backend_buffer_type_t type);
ggml_status compute(BackendContext & backend, ggml_tensor * op);

// What an operation on caches is, whatever computes it.
void learn_geometry(const ggml_tensor * op);
bool can_write_rows(const CacheTensor & t, const ggml_tensor * op);
bool can_attend(const CacheTensor * k, const CacheTensor * v, const ggml_tensor * op);
bool is_shift(const CacheTensor & t, const ggml_tensor * op);
void keep_lengths(ggml_tensor & rope);  // of what a shift turns
int64_t index_at(const void * indices, const ggml_tensor * tensor, int64_t i);
AttentionCall attention_call(const CacheTensor & k, const ggml_tensor * op);
ggml_status run_node(ggml_backend_t backend, ggml_tensor * node);  // may return before it is done
void warn_unpacked(const CacheTensor & k);

// ---- cuda_device.cpp, cuda_backend.cpp: where there is a CUDA compiler ----

#if defined(MIXKVQ_HAVE_CUDA)
// A device for each GPU that ggml and we can use.
std::vector<std::unique_ptr<Device>> find_cuda_devices(void * return_address, std::vector<LeftOut> & left_out);
ggml_backend_t make_cuda_backend(ggml_backend_dev_t device);
// ggml's backends on this device, of whatever context, are not freed while one of ours records.
void guard_recordings(ggml_backend_dev_t inner);
ggml_backend_buffer_t inner_buffer(const Buffer & buffer);
std::shared_ptr<cuda::Queue> queue_of(const Buffer & buffer);
// The bytes of a tensor that the host has set and that nothing computed by the device can have changed; else nullptr.
const uint8_t * written_by_host(const ggml_tensor * tensor);
void has_computed(ggml_backend_dev_t device);
#endif

}  // namespace mixkvq::glue
