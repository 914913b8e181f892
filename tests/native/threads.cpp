// Several contexts of one model in threads of their own, on our CPU device, while another thread reads their figures: for the thread sanitizer (`make tsan`, where
// llama.cpp and ggml are built with it as well), and short as a test of its own: each context gives the logits that it gives alone.
//
//   threads libggml-mixkvq.so model.gguf [ROUNDS]
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "ggml-backend.h"
#include "llama.h"
#include "mixkvq/backend_api.h"

namespace {

constexpr int kThreads = 4, kContext = 512, kPrompt = 200, kTokens = 6;
const char * const kPresets[kThreads] = {"balanced", "mix2.5", "near-lossless", "paper"};

const mixkvq_backend_api * api = nullptr;
std::atomic<int> failures{0};

void fail(const std::string & what) {
    std::fprintf(stderr, "threads: %s\n", what.c_str());
    ++failures;
}

// The sessions whose figures are read.
class Published {
  public:
    void add(mixkvq_session * session) {
        std::lock_guard<std::mutex> lock(mutex_);
        sessions_.push_back(session);
    }
    std::vector<mixkvq_session *> all() {
        std::lock_guard<std::mutex> lock(mutex_);
        return sessions_;
    }

  private:
    std::mutex mutex_;
    std::vector<mixkvq_session *> sessions_;
};

void decode(llama_context * context, const std::vector<llama_token> & tokens, int first, int n) {
    llama_batch batch = llama_batch_init(n, 0, 1);
    batch.n_tokens = n;
    for (int i = 0; i < n; ++i) {
        batch.token[i] = tokens[first + i];
        batch.pos[i] = first + i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i] = i == n - 1;
    }
    if (llama_decode(context, batch) != 0) fail("a batch is not decoded");
    llama_batch_free(batch);
}

// A packed state of the context, and back.
void save_and_load(llama_context * context, mixkvq_session * session) {
    std::vector<uint8_t> bytes;
    const auto take = [](void * user, const void * data, size_t n) {
        auto & to = *static_cast<std::vector<uint8_t> *>(user);
        to.insert(to.end(), static_cast<const uint8_t *>(data), static_cast<const uint8_t *>(data) + n);
        return 0;
    };
    size_t size = llama_state_get_size(context);
    mixkvq_state * state = api->state_save(session, size, 0);
    if (!state) return fail(api->error(nullptr));
    size_t n = llama_state_get_data(context, static_cast<uint8_t *>(api->state_data(state, &size)), size);
    if (api->state_write(state, n, take, &bytes, nullptr)) fail(api->error(nullptr));
    api->state_free(state);
    state = api->state_load(session, bytes.data(), bytes.size(), 0);
    if (!state) return fail(api->error(nullptr));
    n = llama_state_set_data(context, static_cast<const uint8_t *>(api->state_data(state, &size)), size);
    if (api->state_finish(state, n)) fail(api->error(nullptr));
    api->state_free(state);
}

// What one context says in the end.
std::vector<float> work(llama_model * model, int number, Published * published) {
    mixkvq_settings settings = {nullptr, nullptr, 0, 0, 0, nullptr, nullptr, nullptr, nullptr, 0};
    settings.preset = kPresets[number];
    mixkvq_session * session = api->begin(&settings);
    if (!session) {
        fail(api->error(nullptr));
        return {};
    }
    llama_context_params params = llama_context_default_params();
    params.n_ctx = kContext, params.n_batch = params.n_ubatch = 128, params.n_threads = params.n_threads_batch = 2;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED, params.offload_kqv = true;
    llama_context * context = llama_init_from_model(model, params);
    api->end(session);
    if (!context) {
        fail("a context is not made");
        return {};
    }
    if (published) published->add(session);
    const llama_vocab * vocab = llama_model_get_vocab(model);
    std::vector<llama_token> tokens;
    for (int i = 0; i < kPrompt + kTokens; ++i) tokens.push_back((number * 977 + i * 31) % llama_vocab_n_tokens(vocab));
    for (int at = 0; at < kPrompt; at += 100) decode(context, tokens, at, 100);
    for (int i = 0; i < kTokens / 2; ++i) decode(context, tokens, kPrompt + i, 1);
    save_and_load(context, session);
    for (int i = kTokens / 2; i < kTokens; ++i) decode(context, tokens, kPrompt + i, 1);
    const float * logits = llama_get_logits_ith(context, -1);
    std::vector<float> result(logits, logits + llama_vocab_n_tokens(vocab));
    llama_free(context);
    if (!published) api->release(session);
    return result;
}

// Reads all there is to read, over and over.
void read_figures(Published & published, const std::atomic<bool> & stop) {
    std::vector<float> abs(1 << 16), sqr(1 << 16);
    while (!stop) {
        for (mixkvq_session * session : published.all()) {
            mixkvq_stats stats;
            if (api->stats(session, &stats) == 0 && stats.bytes_used > stats.bytes_f16) fail("more is in use than F16 would take");
            for (int i = 0; i < api->n_layers(session); ++i) {
                mixkvq_layer_stats layer;
                if (api->layer_stats(session, i, &layer) == 0) api->query_statistics(session, i, abs.data(), sqr.data());
            }
            api->error(session);
        }
        std::this_thread::yield();
    }
}

}  // namespace

int main(int argc, char ** argv) {
    if (argc < 3) return std::fprintf(stderr, "usage: threads libggml-mixkvq.so model.gguf [ROUNDS]\n"), 2;
    llama_log_set([](ggml_log_level level, const char * text, void *) { if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr); }, nullptr);
    ggml_backend_reg_t reg = ggml_backend_load(argv[1]);
    if (!reg) return std::fprintf(stderr, "threads: %s is not loaded\n", argv[1]), 1;
    api = static_cast<const mixkvq_backend_api *>(ggml_backend_reg_get_proc_address(reg, "mixkvq_backend_api"));
    ggml_backend_dev_t devices[2] = {ggml_backend_dev_by_name("MIXKVQ-CPU"), nullptr};
    llama_model_params params = llama_model_default_params();
    params.devices = devices, params.n_gpu_layers = 999;
    llama_model * model = llama_model_load_from_file(argv[2], params);
    if (!model) return std::fprintf(stderr, "threads: %s is not loaded\n", argv[2]), 1;

    std::vector<std::vector<float>> alone(kThreads);
#ifndef __SANITIZE_THREAD__  // which makes everything many times as slow, and looks for something else
    for (int i = 0; i < kThreads; ++i) alone[i] = work(model, i, nullptr);
#endif
    const int rounds = argc > 3 ? std::atoi(argv[3]) : 1;
    for (int round = 0; round < rounds; ++round) {
        Published published;
        std::atomic<bool> stop{false};
        std::thread reader([&] { read_figures(published, stop); });
        std::vector<std::vector<float>> together(kThreads);
        std::vector<std::thread> threads;
        for (int i = 0; i < kThreads; ++i) threads.emplace_back([&, i] { together[i] = work(model, i, &published); });
        for (std::thread & thread : threads) thread.join();
        stop = true;
        reader.join();
        for (mixkvq_session * session : published.all()) api->release(session);
        for (int i = 0; i < kThreads; ++i) {
            if (!alone[i].empty() && together[i] != alone[i]) fail(std::string("the context of ") + kPresets[i] + " says something else than alone");
        }
    }
    llama_model_free(model);
    if (!failures) std::printf("threads: %d contexts, %d rounds: each as alone\n", kThreads, rounds);
    return failures != 0;
}
