#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>

#include "gguf.h"
#include "glue.h"

namespace mixkvq::glue {

void warn_once(const std::string & sentence, const std::string & topic) {
    static std::mutex mutex;
    static std::set<std::string> said;
    std::lock_guard<std::mutex> lock(mutex);
    if (said.insert(topic.empty() ? sentence : topic).second) std::fprintf(stderr, "mixkvq: %s\n", sentence.c_str());
}

namespace {

std::string preset_names() {
    std::string names;
    for (const Preset & p : presets()) {
        names += names.empty() ? "" : ", ";
        names += p.name;
        if (*p.alias) names += std::string(" (") + p.alias + ")";
    }
    return names;
}

bool set_preset(const char * name, Settings & s, std::string & error) {
    s.preset = name && *name ? find_preset(name) : &default_preset();
    if (!s.preset) error = std::string("there is no preset \"") + name + "\"; the presets are " + preset_names();
    return s.preset != nullptr;
}

bool set_profile(const char * path, Settings & s, std::string & error) {
    if (!path || !*path) return true;
    auto profile = std::make_shared<Profile>();
    if (!load_profile(path, *profile, error)) return false;
    if (profile->window >= 0) s.window = profile->window;
    if (profile->sinks >= 0) s.sinks = profile->sinks;
    s.profile = profile;
    return true;
}

bool read_count(const char * variable, int & value, std::string & error) {
    const char * text = std::getenv(variable);
    if (!text || !*text) return true;
    char * end = nullptr;
    const long n = std::strtol(text, &end, 10);
    if (*end || n < 0 || n > (1 << 20)) {
        error = std::string(variable) + "=\"" + text + "\" is not a number of tokens from 0 to 1048576";
        return false;
    }
    value = int(n);
    return true;
}

// The one tensor of a profile with this name, type and size of a row; nullptr and `error` if it is missing or different.
const void * profile_tensor(gguf_context * file, const std::vector<uint8_t> & data, const std::string & name, ggml_type type, bool needed,
                            size_t & bytes, const std::string & path, std::string & error) {
    const int64_t id = gguf_find_tensor(file, name.c_str());
    if (id < 0) {
        if (needed) error = "the profile " + path + " lacks the tensor " + name;
        return nullptr;
    }
    bytes = gguf_get_tensor_size(file, id);
    const size_t offset = gguf_get_data_offset(file) + gguf_get_tensor_offset(file, id);
    if (gguf_get_tensor_type(file, id) != type || offset > data.size() || bytes > data.size() - offset) {
        error = "the profile " + path + " has a damaged tensor " + name;
        return nullptr;
    }
    return data.data() + offset;
}

}  // namespace

bool load_profile(const std::string & path, Profile & profile, std::string & error) {
    struct FileCloser {
        void operator()(std::FILE * f) const { std::fclose(f); }
    };
    std::unique_ptr<std::FILE, FileCloser> in(std::fopen(path.c_str(), "rb"));
    char magic[4] = {};
    const size_t n_magic = in ? std::fread(magic, 1, sizeof(magic), in.get()) : 0;
    if (!in || std::ferror(in.get())) {  // a directory can be opened but not read
        error = "the profile " + path + " cannot be read";
        return false;
    }
    if (n_magic < sizeof(magic) || std::memcmp(magic, "GGUF", sizeof(magic)) != 0) {
        error = "the profile " + path + " is not a GGUF file";
        return false;
    }
    struct Closer {
        void operator()(gguf_context * c) const { gguf_free(c); }
    };
    std::unique_ptr<gguf_context, Closer> file(gguf_init_from_file(path.c_str(), {/*no_alloc=*/true, /*ctx=*/nullptr}));
    if (!file) {
        error = "the profile " + path + " is a damaged GGUF file";
        return false;
    }
    auto key = [&](const char * name, gguf_type type) {
        const int64_t id = gguf_find_key(file.get(), name);
        return id >= 0 && gguf_get_kv_type(file.get(), id) == type ? id : -1;
    };
    const int64_t version = key("mixkvq.profile.version", GGUF_TYPE_UINT32);
    const int64_t layers = key("mixkvq.profile.layer_count", GGUF_TYPE_UINT32);
    if (version < 0 || layers < 0) {
        error = path + " is not a MixKVQ profile: mixkvq.profile.version or mixkvq.profile.layer_count is missing";
        return false;
    }
    const uint32_t v = gguf_get_val_u32(file.get(), version);
    if (v != 1) {
        error = "the profile " + path + " has version " + std::to_string(v) + ", this library reads version 1; install a newer mixkvq";
        return false;
    }
    // The tensors' bytes; a file that is no profile, a model perhaps, was not read so far.
    std::vector<uint8_t> data;
    std::rewind(in.get());
    for (size_t n = 1; n > 0;) {
        const size_t at = data.size();
        data.resize(at + (size_t(1) << 20));
        n = std::fread(data.data() + at, 1, data.size() - at, in.get());
        data.resize(at + n);
    }
    if (std::ferror(in.get())) {
        error = "the profile " + path + " cannot be read";
        return false;
    }
    const int64_t window = key("mixkvq.profile.window", GGUF_TYPE_INT32), sinks = key("mixkvq.profile.sinks", GGUF_TYPE_INT32);
    if (window >= 0) profile.window = gguf_get_val_i32(file.get(), window);
    if (sinks >= 0) profile.sinks = gguf_get_val_i32(file.get(), sinks);
    profile.path = path;

    const uint32_t n_layers = gguf_get_val_u32(file.get(), layers);
    if (n_layers > 4096) {
        error = "the profile " + path + " names " + std::to_string(n_layers) + " layers; at most 4096 are possible";
        return false;
    }
    profile.layers.resize(n_layers);
    for (uint32_t i = 0; i < n_layers; ++i) {
        const std::string prefix = "blk." + std::to_string(i) + ".";
        size_t n_tiers = 0, n_values = 0, n_prior = 0;
        const auto * tiers = static_cast<const uint8_t *>(profile_tensor(file.get(), data, prefix + "tiers", GGML_TYPE_I32, false, n_tiers, path, error));
        if (!error.empty()) return false;
        if (!tiers) continue;  // a layer without a cache
        const auto * values = static_cast<const uint8_t *>(profile_tensor(file.get(), data, prefix + "values", GGML_TYPE_I32, true, n_values, path, error));
        if (!values) return false;
        const size_t heads = n_tiers / (6 * sizeof(int32_t));
        if (heads == 0 || n_tiers % (6 * sizeof(int32_t)) || n_values != heads * 2 * sizeof(int32_t)) {
            error = "the profile " + path + " has " + prefix + "tiers and " + prefix + "values for different numbers of heads";
            return false;
        }
        LayerProfile & layer = profile.layers[i];
        for (size_t h = 0; h < heads; ++h) {
            int32_t t[6], w[2];
            std::memcpy(t, tiers + h * sizeof(t), sizeof(t));
            std::memcpy(w, values + h * sizeof(w), sizeof(w));
            KeyFormat k;
            k.n16 = t[0], k.n8 = t[1], k.n4 = t[2], k.n3 = t[3], k.n2 = t[4], k.group = t[5];
            int64_t sum = 0;
            for (int j = 0; j < 5; ++j) sum += t[j];
            k.head_size = int(std::max<int64_t>(0, std::min<int64_t>(sum, 1 << 20)));
            ValueFormat f;
            f.head_size = kMaxHeadSize;  // the model says; checked again when it is known
            f.bits = w[0], f.group = w[1];
            const char * wrong = k.error() ? k.error() : f.error();
            if (wrong) {
                error = "the profile " + path + ", " + prefix + "tiers and values, head " + std::to_string(h) + ": " + wrong;
                return false;
            }
            layer.keys.push_back(k);
            layer.values.push_back(f);
        }
        const void * prior = profile_tensor(file.get(), data, prefix + "query_prior", GGML_TYPE_F32, false, n_prior, path, error);
        if (!error.empty()) return false;
        if (prior) {
            if (n_prior != heads * layer.keys[0].head_size * sizeof(float)) {
                error = "the profile " + path + " has a " + prefix + "query_prior of another size than its tiers";
                return false;
            }
            layer.query_prior.resize(n_prior / sizeof(float));
            std::memcpy(layer.query_prior.data(), prior, n_prior);
            for (float x : layer.query_prior) {
                if (!(x >= 0 && x < 1e30f)) {
                    error = "the profile " + path + " has a " + prefix + "query_prior with a negative or infinite number";
                    return false;
                }
            }
        }
    }
    return true;
}

bool settings_from_environment(Settings & s, std::string & error) {
    if (!set_preset(std::getenv("MIXKVQ_PRESET"), s, error)) {
        error = "MIXKVQ_PRESET: " + error;
        return false;
    }
    if (!set_profile(std::getenv("MIXKVQ_PROFILE"), s, error)) {
        error = "MIXKVQ_PROFILE: " + error;
        return false;
    }
    return read_count("MIXKVQ_WINDOW", s.window, error) && read_count("MIXKVQ_SINKS", s.sinks, error);
}

bool settings_from_api(const mixkvq_settings & from, Settings & s, std::string & error) {
    if (!set_preset(from.preset, s, error) || !set_profile(from.profile, s, error)) return false;
    if (from.window >= 0) s.window = from.window;
    if (from.sinks >= 0) s.sinks = from.sinks;
    for (int i = 0; i < from.n_layers; ++i) s.head_sizes.push_back({from.head_size_k[i], from.head_size_v[i]});
    return true;
}

// The profile's entry for a layer, checked against what the model turned out to be. Null without a profile.
static const LayerProfile * layer_profile(const Settings & s, int layer, int n_heads, std::string & error) {
    if (!s.profile) return nullptr;
    if (layer >= int(s.profile->layers.size()) || int(s.profile->layers[layer].keys.size()) != n_heads) {
        error = "the profile " + s.profile->path + " is for another model: it does not have " + std::to_string(n_heads) + " heads in layer " +
                std::to_string(layer);
        return nullptr;
    }
    return &s.profile->layers[layer];
}

bool key_formats(const Settings & s, int layer, int n_heads, int head_size, std::vector<KeyFormat> & formats, std::vector<float> & prior,
                 std::string & error) {
    const LayerProfile * p = layer_profile(s, layer, n_heads, error);
    if (!error.empty()) return false;
    formats.assign(n_heads, key_format(*s.preset, head_size));
    if (p) {
        formats = p->keys;
        prior = p->query_prior;
    }
    for (const KeyFormat & f : formats) {
        if (f.head_size != head_size) {
            error = "the profile " + s.profile->path + " is for another model: layer " + std::to_string(layer) + " has heads of " +
                    std::to_string(head_size) + " channels, the profile " + std::to_string(f.head_size);
        } else if (f.error()) {
            error = f.error();
        }
    }
    return error.empty();
}

bool value_formats(const Settings & s, int layer, int n_heads, int head_size, std::vector<ValueFormat> & formats, std::string & error) {
    const LayerProfile * p = layer_profile(s, layer, n_heads, error);
    if (!error.empty()) return false;
    formats.assign(n_heads, value_format(*s.preset, head_size));
    if (p) formats = p->values;
    for (ValueFormat & f : formats) {
        f.head_size = head_size;
        if (f.error()) error = f.error();
    }
    return error.empty();
}

}  // namespace mixkvq::glue
