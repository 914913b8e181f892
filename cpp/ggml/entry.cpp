// The entry point that ggml calls when it loads the library. It chooses the layout of structs that this ggml has, by what it exports and never by a version
// string: ggml has changed its structs without changing its version, twice.

#include <cstdio>
#include <exception>
#include <mutex>
#include <set>
#include <string>

#include "layouts.h"
#include "library.h"

#if defined(_WIN32)
#define MIXKVQ_EXPORT extern "C" __declspec(dllexport)
#else
#define MIXKVQ_EXPORT extern "C" __attribute__((visibility("default")))
#endif
#if defined(_MSC_VER)
#include <intrin.h>
#define MIXKVQ_RETURN_ADDRESS() _ReturnAddress()
#else
#define MIXKVQ_RETURN_ADDRESS() __builtin_return_address(0)
#endif

// The ggml_backend_reg of a layout; nullptr: `error` says what this process has that cannot be served.
#define MIXKVQ_DECLARE(letter, ...)                                         \
    namespace mixkvq::glue_##letter {                                       \
    void * start(const GgmlLibrary & library, std::string & error);         \
    }
MIXKVQ_LAYOUTS(MIXKVQ_DECLARE)
#undef MIXKVQ_DECLARE

namespace mixkvq {

namespace {

struct Layout {
    const char * letter;
    int api_version;
    const char * since;  // a function
    const char *build, *package;
    void * (*start)(const GgmlLibrary &, std::string &);
};

#define MIXKVQ_ENTRY(letter, number, api, since, build, package) {#letter, api, since, build, package, glue_##letter::start},
const Layout layouts[] = {MIXKVQ_LAYOUTS(MIXKVQ_ENTRY)};
#undef MIXKVQ_ENTRY
const Layout & oldest = layouts[0];
const Layout & newest = layouts[sizeof(layouts) / sizeof(layouts[0]) - 1];

std::string refusal(const std::string & what) {
    return "this llama.cpp cannot be served, " + what + ": MixKVQ serves llama.cpp from " + oldest.build + " (llama-cpp-python from " + oldest.package +
           ") up to ggml's backend API " + std::to_string(newest.api_version) + "; use one of these, or a newer MixKVQ";
}

// Of ggml, by its CPU backend, which is registered already: every registry begins with it. 0: there is none.
int api_version(const GgmlLibrary & library) {
    const auto by_type = reinterpret_cast<void * (*)(int)>(library.find("ggml_backend_dev_by_type"));
    const auto registry = reinterpret_cast<void * (*)(void *)>(library.find("ggml_backend_dev_backend_reg"));
    void * const cpu = by_type && registry ? by_type(/*GGML_BACKEND_DEVICE_TYPE_CPU*/ 0) : nullptr;
    return cpu ? *static_cast<const int *>(registry(cpu)) : 0;
}

// The layout of this ggml; nullptr: `error` says why there is none.
const Layout * layout_of(const GgmlLibrary & library, std::string & error) {
    const int api = api_version(library);
    if (!library.find("ggml_backend_dev_by_type")) {
        error = refusal("its ggml has no registry of backends");
    } else if (!api) {
        error = "ggml's CPU backend is not in the process that loads this library; load it before";
    } else if (api < oldest.api_version) {
        error = refusal("its backend API " + std::to_string(api) + " is too old");
    } else if (api > newest.api_version || library.find(MIXKVQ_LATER_LAYOUT)) {
        error = refusal("its backend API " + std::to_string(api) + " is newer than this library");
    }
    if (!error.empty()) return nullptr;
    const Layout * layout = nullptr;
    for (const Layout & l : layouts) {
        if (library.find(l.since)) layout = &l;
    }
    if (!layout || layout->api_version != api) {
        error = refusal(layout ? "its functions are not those of its backend API " + std::to_string(api) : "its ggml is too old");
        return nullptr;
    }
    return layout;
}

// Once in a process: a second ggml gets what the first one got, if it has the same structs.
void * start(void * caller, std::string & error) {
    static const Layout * started = nullptr;
    static void * registry = nullptr;
    static std::string why;
    static std::mutex mutex;
    std::lock_guard<std::mutex> lock(mutex);
    const GgmlLibrary library(caller);
    const Layout * const layout = layout_of(library, error);
    if (!layout) return nullptr;
    if (started && layout != started) {
        error = "this process has two copies of ggml with different structs, and MixKVQ already serves the other one";
        return nullptr;
    }
    if (!started) {
        started = layout;
        registry = layout->start(library, why);
        if (why.rfind("ggml ", 0) == 0) why = refusal("its " + why);
    }
    error = why;
    return registry;
}

// Each sentence once.
void say(const std::string & sentence) {
    static std::set<std::string> said;
    if (said.insert(sentence).second) std::fprintf(stderr, "mixkvq: %s\n", sentence.c_str());
}

}  // namespace

}  // namespace mixkvq

// nullptr, after a sentence on stderr, when the library cannot serve this process.
MIXKVQ_EXPORT void * ggml_backend_init(void) {
    void * const caller = MIXKVQ_RETURN_ADDRESS();
    try {
        std::string error;
        void * const registry = mixkvq::start(caller, error);
        if (!registry) mixkvq::say(error);
        return registry;
    } catch (const std::exception & e) {
        std::fprintf(stderr, "mixkvq: the library could not start: %s\n", e.what());
        return nullptr;
    }
}
