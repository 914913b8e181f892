// What the parts of the ggml backend share: settings and sessions, buffers and the cache tensors in them.
#pragma once

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

namespace mixkvq::glue {

// ---- settings.cpp ----

struct Settings {
    const Preset * preset = nullptr;
    std::shared_ptr<const Profile> profile;
    int window = 128, sinks = 128;
    std::vector<std::pair<int, int>> head_sizes;  // by layer: keys, values; empty if not known
    mixkvq_codec codec = nullptr;                 // in place of the formats of preset and profile
    void * codec_user = nullptr;
};

// From MIXKVQ_PRESET, MIXKVQ_PROFILE, MIXKVQ_WINDOW and MIXKVQ_SINKS. False: `error` says what is wrong with them.
bool settings_from_environment(Settings & settings, std::string & error);
bool settings_from_api(const mixkvq_settings & from, Settings & settings, std::string & error);
bool load_profile(const std::string & path, Profile & profile, std::string & error);

// Formats of a layer with heads of this size, or a sentence why the profile does not fit.
bool key_formats(const Settings & s, int layer, int n_heads, int head_size, std::vector<KeyFormat> & formats, std::vector<float> & prior,
                 std::string & error);
bool value_formats(const Settings & s, int layer, int n_heads, int head_size, std::vector<ValueFormat> & formats, std::string & error);

// One line on stderr, "mixkvq: ...". The same line, or another on the same topic, is not repeated in a process.
void warn_once(const std::string & sentence, const std::string & topic = "");

// ---- session.cpp ----

struct Buffer;

struct Session {
    Settings settings;
    std::mutex mutex;
    std::vector<std::weak_ptr<Buffer>> buffers;
    std::string error;
    bool codec_failed = false;  // the error is one of the codec, and the next page it takes ends it
    std::atomic<int> n_threads{1};
};

// The codec of a session as the store of a layer calls it: checks what it returns, and leaves a sentence in the session.
PageCodec codec_of(Session & session, int layer, bool is_value, const PageStore & store);

// The session of this thread: the one between begin and end, else the process's, which follows the environment.
std::shared_ptr<Session> current_session();
bool init_default_session(std::string & error);
const mixkvq_backend_api * backend_api();

// ---- buffer.cpp ----

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
    Mode mode = Mode::undecided;
    std::string reason;
    int head_size = 0, n_heads = 0;
    std::unique_ptr<PageStore> store;
    uint8_t * plain_data = nullptr;
    Region plain_region;

    // The first reader says how a cell is divided into heads.
    void decide(int head_size, int n_heads);
    void make_plain(const std::string & reason, const std::string & topic = "");
    // Byte ranges in nominal layout.
    void read(size_t offset, void * data, size_t size) const;
    void write(size_t offset, const void * data, size_t size, int n_threads);
    void erase(size_t offset, size_t size);
    void clear();
};

struct Buffer {
    Region region;
    ScratchPool pool;
    std::vector<std::unique_ptr<CacheTensor>> tensors;
    std::vector<std::pair<void *, size_t>> direct;  // tensors of llama.cpp's memory that are no key or value cache
    bool touched = false;
    std::shared_ptr<Session> session;
};

ggml_backend_buffer_type_t cpu_buffer_type();
const ggml_tensor * root_of(const ggml_tensor * tensor);
CacheTensor * cache_of(const ggml_tensor * tensor);  // nullptr unless the tensor is (a view of) a cache tensor
bool is_in_memory_of_llama(const ggml_tensor * tensor);  // in one of our buffers, made by llama.cpp's memory (cache_*)
size_t offset_in_cache(const ggml_tensor * tensor);

// ---- backend.cpp, device.cpp ----

struct BackendContext {
    ggml_backend_t inner = nullptr;
    int n_threads = 1;
    AttentionWorkspace workspace;
    std::vector<PageStore::Cell> cells;  // of a write
};

extern ggml_guid backend_guid;
ggml_backend_t make_backend(ggml_backend_dev_t device);
void set_n_threads(ggml_backend_t backend, int n_threads);
ggml_backend_dev_t cpu_device();    // ours
ggml_backend_dev_t inner_device();  // ggml's CPU device
bool find_inner_device(void * return_address, std::string & error);
void init_device(ggml_backend_reg_t reg);
const Kernels & kernels();
bool init_kernels(std::string & error);

// ---- ops.cpp ----

// Operations that compute nothing.
bool is_view(ggml_op op);

// Whether `op` reads or writes a cache of ours. Learns head sizes on the way.
bool touches_cache(const ggml_tensor * op);
ggml_status compute(BackendContext & backend, ggml_tensor * op);

}  // namespace mixkvq::glue
