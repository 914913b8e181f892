// Sessions: which settings a context is created with.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "mixkvq/cache.h"
#include "settings.h"

namespace mixkvq::MIXKVQ_GLUE {

struct Buffer;

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

}  // namespace mixkvq::MIXKVQ_GLUE
