// A packed state as the backend takes it (cpp/ggml/state.cpp), for a context of the built-in model: refused, or loaded, and the context decodes. Total size and
// checksum are set right first, or no change would come further than these. llama.cpp's own part of a state is only handed to it as it was: what llama.cpp makes
// of a damaged one is not ours.
//
// MIXKVQ_FUZZ_BACKEND: libggml-mixkvq.so, MIXKVQ_FUZZ_MODEL: the model.
#include <cstring>
#include <set>
#include <string>

#include "fuzz.h"
#include "ggml-backend.h"
#include "llama.h"
#include "mixkvq/backend_api.h"
#include "mixkvq/checksum.h"

namespace {

Counts counts;
const mixkvq_backend_api * api = nullptr;
mixkvq_session * session = nullptr;
llama_context * context = nullptr;
std::set<std::vector<uint8_t>> own_parts;  // llama.cpp's, of the good inputs

void decode(int first, int n) {
    llama_batch batch = llama_batch_init(n, 0, 1);
    batch.n_tokens = n;
    for (int i = 0; i < n; ++i) {
        batch.token[i] = 5 + i, batch.pos[i] = first + i, batch.n_seq_id[i] = 1, batch.seq_id[i][0] = 0, batch.logits[i] = i == n - 1;
    }
    promise(llama_decode(context, batch) == 0, "a batch is not decoded");
    llama_batch_free(batch);
}

void clear() { llama_memory_clear(llama_get_memory(context), true); }

std::vector<uint8_t> saved(int flags) {
    std::vector<uint8_t> bytes;
    const auto take = [](void * user, const void * data, size_t n) {
        auto & to = *static_cast<std::vector<uint8_t> *>(user);
        to.insert(to.end(), static_cast<const uint8_t *>(data), static_cast<const uint8_t *>(data) + n);
        return 0;
    };
    size_t size = flags & MIXKVQ_STATE_SEQUENCE ? llama_state_seq_get_size(context, 0) : llama_state_get_size(context);
    mixkvq_state * state = api->state_save(session, size, flags);
    auto * data = static_cast<uint8_t *>(api->state_data(state, &size));
    const size_t n = flags & MIXKVQ_STATE_SEQUENCE ? llama_state_seq_get_data(context, data, size, 0) : llama_state_get_data(context, data, size);
    promise(api->state_write(state, n, take, &bytes, nullptr) == 0, "a state is not saved");
    api->state_free(state);
    return bytes;
}

// What llama.cpp would be given.
std::vector<uint8_t> own_part(mixkvq_state * state) {
    size_t size = 0;
    const auto * data = static_cast<const uint8_t *>(api->state_data(state, &size));
    return {data, data + size};
}

void know(std::vector<uint8_t> bytes, int flags) {
    mixkvq_state * state = api->state_load(session, bytes.data(), bytes.size(), flags);
    promise(state, "a good state is refused");
    own_parts.insert(own_part(state));
    api->state_free(state);
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int *, char ***) {
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    const char * backend = std::getenv("MIXKVQ_FUZZ_BACKEND"), * path = std::getenv("MIXKVQ_FUZZ_MODEL");
    ggml_backend_reg_t reg = backend ? ggml_backend_load(backend) : nullptr;
    promise(reg && path, "MIXKVQ_FUZZ_BACKEND and MIXKVQ_FUZZ_MODEL must name the backend and a model");
    api = static_cast<const mixkvq_backend_api *>(ggml_backend_reg_get_proc_address(reg, "mixkvq_backend_api"));
    ggml_backend_dev_t devices[2] = {ggml_backend_dev_by_name("MIXKVQ-CPU"), nullptr};
    llama_model_params params = llama_model_default_params();
    params.devices = devices, params.n_gpu_layers = 999;
    llama_model * model = llama_model_load_from_file(path, params);
    const mixkvq_settings settings = {"balanced", nullptr, 0, 0, 0, nullptr, nullptr, nullptr, nullptr, 0};
    session = api->begin(&settings);
    llama_context_params of = llama_context_default_params();
    of.n_ctx = 512, of.n_batch = of.n_ubatch = 256, of.n_threads = of.n_threads_batch = 1, of.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    context = model ? llama_init_from_model(model, of) : nullptr;
    promise(context, "there is no context");
    api->end(session);
    for (const auto & bytes : good_inputs()) know({bytes.begin() + 1, bytes.end()}, bytes[0]);
    return 0;
}

// The first byte: the flags.
std::vector<std::vector<uint8_t>> good_inputs() {
    std::vector<std::vector<uint8_t>> inputs;
    for (int n : {2, 130}) {  // F16 only; a packed page, too
        clear();
        decode(0, n);
        if (n > 128) llama_memory_seq_rm(llama_get_memory(context), 0, 20, -1);
        for (int flags : {0, int(MIXKVQ_STATE_SEQUENCE), int(MIXKVQ_STATE_SEQUENCE | MIXKVQ_STATE_SHARED)}) {
            if (n > 128 && flags != int(MIXKVQ_STATE_SEQUENCE | MIXKVQ_STATE_SHARED)) continue;  // large
            std::vector<uint8_t> bytes = saved(flags);
            bytes.insert(bytes.begin(), uint8_t(flags));
            inputs.push_back(std::move(bytes));
        }
    }
    return inputs;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    if (size < 1) return 0;
    std::vector<uint8_t> bytes(data + 1, data + size);
    const int flags = data[0] & 3;
    if (!(data[0] & 4) && bytes.size() >= 72) {
        const uint64_t n = bytes.size();
        std::memcpy(&bytes[16], &n, 8);
        mixkvq::Checksum sum;
        sum.add(bytes.data(), bytes.size() - 8);
        const uint64_t value = sum.value();
        std::memcpy(&bytes[bytes.size() - 8], &value, 8);
    }
    mixkvq_state * state = api->state_load(session, bytes.data(), bytes.size(), flags);
    counts.add(state);
    if (!state) {
        promise(*api->error(nullptr), "refused without a sentence");
        return 0;
    }
    if (own_parts.count(own_part(state))) {
        clear();
        size_t n = 0;
        const auto * own = static_cast<const uint8_t *>(api->state_data(state, &n));
        n = flags & MIXKVQ_STATE_SEQUENCE ? llama_state_seq_set_data(context, own, n, 0) : llama_state_set_data(context, own, n);
        api->state_finish(state, n);
        api->state_free(state);
        clear();
        decode(0, 1);
    } else {
        api->state_free(state);
    }
    return 0;
}
