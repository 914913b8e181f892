#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <mutex>
#include <set>
#include <type_traits>

#include "border.h"
#include "settings.h"

namespace mixkvq::MIXKVQ_GLUE {

void warn_once(const std::string & sentence, const std::string & topic) noexcept {
    static std::mutex mutex;
    static std::set<std::string> said;
    try {
        std::lock_guard<std::mutex> lock(mutex);
        if (!said.insert(topic.empty() ? sentence : topic).second) return;
    } catch (const std::exception &) {
        // Then it may be said twice.
    }
    std::fprintf(stderr, "mixkvq: %s\n", sentence.c_str());
}

ggml_status say_exception(const char * out_of_memory) noexcept {
    try {
        try {
            throw;
        } catch (const std::bad_alloc &) {
            warn_once(out_of_memory);
            return GGML_STATUS_ALLOC_FAILED;
        } catch (const std::exception & e) {
            warn_once(std::string("the cache failed: ") + e.what() + "; reset the context");
        } catch (...) {
            warn_once("the cache failed: an exception of an unknown type; reset the context");
        }
    } catch (...) {
        std::fprintf(stderr, "mixkvq: out of memory\n");
    }
    return GGML_STATUS_FAILED;
}

std::string format_bytes(uint64_t bytes) {
    const char * const units[] = {"KiB", "MiB", "GiB", "TiB"};
    double n = double(bytes) / 1024;
    int unit = 0;
    for (; n >= 1000 && unit < 3; ++unit) n /= 1024;
    char text[32];
    std::snprintf(text, sizeof(text), "%.1f %s", n, units[unit]);
    return text;
}

namespace {

constexpr int kMostTokens = 1 << 20;  // of a window or of sinks

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
    if (*end || n < 0 || n > kMostTokens) {
        error = std::string(variable) + "=\"" + text + "\" is not a number of tokens from 0 to " + std::to_string(kMostTokens);
        return false;
    }
    value = int(n);
    return true;
}

bool keep_statistics = false;

bool read_switch(const char * variable, bool & value, std::string & error) {
    const char * text = std::getenv(variable);
    if (!text || !*text) return true;
    value = std::strcmp(text, "1") == 0;
    if (value || std::strcmp(text, "0") == 0) return true;
    error = std::string(variable) + "=\"" + text + "\" is neither 0 nor 1";
    return false;
}

struct FileCloser {
    void operator()(std::FILE * f) const { std::fclose(f); }
};
struct GgufCloser {
    void operator()(gguf_context * c) const { gguf_free(c); }
};

// An opened profile. A file of its own has tensors; in a model, where llama.cpp would refuse tensors that it does not know, the same numbers are
// arrays under "mixkvq.profile.<name>". Only what is asked for is read: a model has gigabytes.
struct ProfileFile {
    std::string path;
    std::unique_ptr<std::FILE, FileCloser> in;
    std::unique_ptr<gguf_context, GgufCloser> gguf;

    int64_t key(const std::string & name, gguf_type type) const {
        const int64_t id = gguf_find_key(gguf.get(), name.c_str());
        return id >= 0 && gguf_get_kv_type(gguf.get(), id) == type ? id : -1;
    }

    // The numbers under a name; empty if there is nothing. False: `error` says what is wrong with them.
    template <class T> bool numbers(const std::string & name, std::vector<T> & out, std::string & error) {
        static_assert(sizeof(T) == 4, "I32 and F32");
        constexpr bool is_float = std::is_same_v<T, float>;
        const std::string array_name = "mixkvq.profile." + name;
        const int64_t array = gguf_find_key(gguf.get(), array_name.c_str());
        if (array >= 0) {
            if (gguf_get_kv_type(gguf.get(), array) != GGUF_TYPE_ARRAY ||
                gguf_get_arr_type(gguf.get(), array) != (is_float ? GGUF_TYPE_FLOAT32 : GGUF_TYPE_INT32)) {
                error = "the profile " + path + " has no array of " + (is_float ? "float32" : "int32") + " under " + array_name;
                return false;
            }
            out.resize(gguf_get_arr_n(gguf.get(), array));
            if (!out.empty()) std::memcpy(out.data(), gguf_get_arr_data(gguf.get(), array), out.size() * sizeof(T));
            return true;
        }
        const int64_t tensor = gguf_find_tensor(gguf.get(), name.c_str());
        if (tensor < 0) return true;
        constexpr size_t kMost = size_t(1) << 24;  // bytes, many times what a layer can have
        const size_t bytes = gguf_get_tensor_size(gguf.get(), tensor);
        const size_t offset = gguf_get_data_offset(gguf.get()) + gguf_get_tensor_offset(gguf.get(), tensor);
        bool whole = gguf_get_tensor_type(gguf.get(), tensor) == (is_float ? GGML_TYPE_F32 : GGML_TYPE_I32) && bytes <= kMost &&
                     offset <= size_t(std::numeric_limits<long>::max()) && std::fseek(in.get(), long(offset), SEEK_SET) == 0;
        if (whole) {
            out.resize(bytes / sizeof(T));
            whole = std::fread(out.data(), 1, bytes, in.get()) == bytes;
        }
        if (!whole) error = "the profile " + path + " has a damaged tensor " + name;
        return whole;
    }
};

bool open_profile(const std::string & path, ProfileFile & file, std::string & error) {
    file.path = path;
    file.in.reset(std::fopen(path.c_str(), "rb"));
    char magic[4] = {};
    const size_t n_magic = file.in ? std::fread(magic, 1, sizeof(magic), file.in.get()) : 0;
    if (!file.in || std::ferror(file.in.get())) {  // a directory can be opened but not read
        error = "the profile " + path + " cannot be read";
    } else if (n_magic < sizeof(magic) || std::memcmp(magic, "GGUF", sizeof(magic)) != 0) {
        error = "the profile " + path + " is not a GGUF file";
    } else {
        file.gguf.reset(gguf_init_from_file(path.c_str(), {/*no_alloc=*/true, /*ctx=*/nullptr}));
        if (!file.gguf) error = "the profile " + path + " is a damaged GGUF file";
    }
    return error.empty();
}

// The formats of a layer. A layer without any has no cache.
bool load_layer(ProfileFile & file, uint32_t index, LayerProfile & layer, std::string & error) {
    const std::string prefix = "blk." + std::to_string(index) + ".";
    std::vector<int32_t> tiers, values;
    if (!file.numbers(prefix + "tiers", tiers, error) || !file.numbers(prefix + "values", values, error) ||
        !file.numbers(prefix + "query_prior", layer.query_prior, error)) {
        return false;
    }
    const std::string in_profile = "the profile " + file.path;
    if (tiers.empty() && values.empty() && layer.query_prior.empty()) return true;
    const size_t heads = tiers.size() / 6;
    if (heads == 0 || tiers.size() % 6 || values.size() != heads * 2) {
        error = in_profile + " has " + prefix + "tiers and " + prefix + "values for different numbers of heads";
        return false;
    }
    for (size_t h = 0; h < heads; ++h) {
        const int32_t * t = &tiers[6 * h];
        KeyFormat k;
        k.n16 = t[0], k.n8 = t[1], k.n4 = t[2], k.n3 = t[3], k.n2 = t[4], k.group = t[5];
        int64_t sum = 0;
        for (int j = 0; j < 5; ++j) sum += t[j];
        k.head_size = int(std::max<int64_t>(0, std::min<int64_t>(sum, 1 << 20)));
        ValueFormat f;
        f.head_size = kMaxHeadSize;  // the model says; checked again when it is known
        f.bits = values[2 * h], f.group = values[2 * h + 1];
        const char * wrong = k.error() ? k.error() : f.error();
        if (wrong) {
            error = in_profile + ", " + prefix + "tiers and values, head " + std::to_string(h) + ": " + wrong;
            return false;
        }
        layer.keys.push_back(k);
        layer.values.push_back(f);
    }
    if (!layer.query_prior.empty() && layer.query_prior.size() != heads * layer.keys[0].head_size) {
        error = in_profile + " has a " + prefix + "query_prior of another size than its tiers";
    } else if (!std::all_of(layer.query_prior.begin(), layer.query_prior.end(), [](float x) { return x >= 0 && x < 1e30f; })) {
        error = in_profile + " has a " + prefix + "query_prior with a negative or infinite number";
    }
    return error.empty();
}

}  // namespace

bool load_profile(const std::string & path, Profile & profile, std::string & error) {
    ProfileFile file;
    if (!open_profile(path, file, error)) return false;
    const int64_t version = file.key("mixkvq.profile.version", GGUF_TYPE_UINT32);
    const int64_t layers = file.key("mixkvq.profile.layer_count", GGUF_TYPE_UINT32);
    if (version < 0 || layers < 0) {
        error = path + " is not a MixKVQ profile: mixkvq.profile.version or mixkvq.profile.layer_count is missing";
        return false;
    }
    const uint32_t v = gguf_get_val_u32(file.gguf.get(), version);
    if (v < 1 || v > 2) {
        error = "the profile " + path + " has version " + std::to_string(v) + ", this library reads versions 1 and 2; install a newer mixkvq";
        return false;
    }
    for (auto [name, count] : {std::pair("window", &profile.window), std::pair("sinks", &profile.sinks)}) {
        const std::string key = std::string("mixkvq.profile.") + name;
        if (gguf_find_key(file.gguf.get(), key.c_str()) < 0) continue;
        const int64_t id = file.key(key, GGUF_TYPE_INT32);
        *count = id >= 0 ? gguf_get_val_i32(file.gguf.get(), id) : -1;
        if (*count < 0 || *count > kMostTokens) {
            error = "in the profile " + path + ", " + key + " is not a number of tokens (int32) from 0 to " + std::to_string(kMostTokens);
            return false;
        }
    }
    profile.path = path;

    const uint32_t n_layers = gguf_get_val_u32(file.gguf.get(), layers);
    if (n_layers < 1 || n_layers > 4096) {
        error = "the profile " + path + " names " + std::to_string(n_layers) + " layers; 1 to 4096 are possible";
        return false;
    }
    profile.layers.resize(n_layers);
    bool any = false;
    for (uint32_t i = 0; i < n_layers; ++i) {
        if (!load_layer(file, i, profile.layers[i], error)) return false;
        any |= !profile.layers[i].keys.empty();
    }
    if (!any) error = "the profile " + path + " says nothing about any layer";
    return any;
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
    s.any_model = true;
    return read_count("MIXKVQ_WINDOW", s.window, error) && read_count("MIXKVQ_SINKS", s.sinks, error) &&
           read_switch("MIXKVQ_KEEP_STATISTICS", keep_statistics, error);
}

bool keeps_statistics() { return keep_statistics; }

bool settings_from_api(const mixkvq_settings & from, Settings & s, std::string & error) {
    s.codec = from.codec;
    s.codec_user = from.codec_user;
    const bool formats = !from.codec;
    if (!set_preset(formats ? from.preset : nullptr, s, error) || !set_profile(formats ? from.profile : nullptr, s, error)) return false;
    for (int n : {from.window, from.sinks}) {
        if (n > kMostTokens) error = std::to_string(n) + " is not a number of tokens from 0 to " + std::to_string(kMostTokens);
    }
    if (!error.empty()) return false;
    if (from.window >= 0) s.window = from.window;
    if (from.sinks >= 0) s.sinks = from.sinks;
    for (int i = 0; i < from.n_layers; ++i) s.head_sizes.push_back({from.head_size_k[i], from.head_size_v[i]});
    return true;
}

namespace {

// Why a profile's entry is not for this tensor; empty if it may be.
std::string misfit(const Profile & profile, int layer, bool is_value, int row, int n_heads, int head_size) {
    const std::string another = "the profile " + profile.path + " is for another model: ";
    if (layer >= int(profile.layers.size())) {
        return another + "it has " + std::to_string(profile.layers.size()) + " layers, and there is a layer " + std::to_string(layer);
    }
    const LayerProfile & p = profile.layers[layer];
    const int heads = int(p.keys.size());
    const std::string of_layer = " in layer " + std::to_string(layer);
    if (n_heads ? heads != n_heads : row % heads != 0) {
        return another + "it has " + std::to_string(heads) + " heads" + of_layer + ", the cache " +
               (n_heads ? std::to_string(n_heads) : "cells of " + std::to_string(row) + " elements");
    }
    const int size = head_size ? head_size : row / heads;
    if (!is_value && p.keys[0].head_size != size) {
        return another + "it has heads of " + std::to_string(p.keys[0].head_size) + " channels" + of_layer + ", the cache of " + std::to_string(size);
    }
    return "";
}

}  // namespace

ProfileFit profile_fit(const Settings & s, int layer, bool is_value, int row, int n_heads, int head_size) {
    // llama.cpp comes with the keys of a layer and then with its values, whose head size a profile does not say: if the keys are another model's, so are
    // they.
    static thread_local struct {
        const Profile * profile = nullptr;
        int layer = -1;
        std::string why;
    } keys;
    ProfileFit fit;
    if (!s.profile) return fit;
    const Profile & profile = *s.profile;
    if (layer < int(profile.layers.size()) && profile.layers[layer].keys.empty()) {
        fit.kind = ProfileFit::left_out;
        fit.why = "the profile " + profile.path + " has no formats for this layer";
    } else {
        fit.why = misfit(profile, layer, is_value, row, n_heads, head_size);
        if (is_value && fit.why.empty() && s.any_model && keys.profile == &profile && keys.layer == layer) fit.why = keys.why;
        fit.kind = fit.why.empty() ? ProfileFit::fits : ProfileFit::wrong;
        if (fit.why.empty()) fit.layer = &profile.layers[layer];
    }
    if (!is_value) {
        keys.profile = &profile;
        keys.layer = layer;
        keys.why = fit.why;
    }
    if (fit.why.empty() || !s.any_model) return fit;
    warn_once((fit.kind == ProfileFit::wrong ? fit.why : "the profile " + profile.path + " has no formats for layer " + std::to_string(layer)) +
                  "; layers that it does not fit get the preset " + s.preset->name, profile.path);
    return {};
}

bool key_formats(const Settings & s, const LayerProfile * layer, int n_heads, int head_size, std::vector<KeyFormat> & formats, std::string & error) {
    formats.assign(n_heads, key_format(*s.preset, head_size));
    if (layer) formats = layer->keys;
    for (const KeyFormat & f : formats) {
        if (f.error()) error = f.error();
    }
    return error.empty();
}

bool value_formats(const Settings & s, const LayerProfile * layer, int n_heads, int head_size, std::vector<ValueFormat> & formats, std::string & error) {
    formats.assign(n_heads, value_format(*s.preset, head_size));
    if (layer) formats = layer->values;
    for (ValueFormat & f : formats) {
        f.head_size = head_size;
        if (f.error()) error = f.error();
    }
    return error.empty();
}

}  // namespace mixkvq::MIXKVQ_GLUE
