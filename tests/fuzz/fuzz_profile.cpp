// A profile (GGUF) as the backend reads it, through ggml's own reader: refused with one sentence, or what it says can be used.
#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>

#include <unistd.h>

#include "../../cpp/ggml/functions.h"
#include "../../cpp/ggml/settings.h"
#include "fuzz.h"

using namespace mixkvq;

namespace {
Counts counts;
std::string path;
}

extern "C" int LLVMFuzzerInitialize(int *, char ***) {
    const GgmlLibrary ggml(reinterpret_cast<void *>(&LLVMFuzzerInitialize));
    std::string error;
    const bool found = MIXKVQ_GLUE::load_functions(ggml, error);
    promise(found, error.c_str());
    const auto set_log = reinterpret_cast<void (*)(void (*)(int, const char *, void *), void *)>(ggml.find("ggml_log_set"));
    set_log([](int, const char *, void *) {}, nullptr);  // it says in its own words what is wrong
    const char * folder = std::getenv("TMPDIR");
    path = std::string(folder ? folder : "/tmp") + "/mixkvq-fuzz-" + std::to_string(getpid()) + ".gguf";
    std::atexit([] { std::remove(path.c_str()); });
    return 0;
}

std::vector<std::vector<uint8_t>> good_inputs() { return {}; }  // tests/fuzz/targets.py makes them

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    std::FILE * file = std::fopen(path.c_str(), "wb");
    promise(file && std::fwrite(data, 1, size, file) == size && std::fclose(file) == 0, "no file can be written");
    Profile profile;
    std::string error;
    const bool taken = MIXKVQ_GLUE::load_profile(path, profile, error);
    counts.add(taken);
    promise(taken == error.empty(), "refused without a sentence, or taken with one");
    promise(error.find('\n') == std::string::npos, "more than one line");
    for (const LayerProfile & layer : profile.layers) {
        promise(!taken || layer.keys.size() == layer.values.size(), "keys and values of different heads");
        for (const KeyFormat & f : layer.keys) promise(!taken || !f.error(), "a format that cannot be");
    }
    return 0;
}
