// What crosses the border to ggml and to the user: sentences, and exceptions that must not.
#pragma once

#include <cstdint>
#include <string>

#include "abi.h"

namespace mixkvq::MIXKVQ_GLUE {

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

}  // namespace mixkvq::MIXKVQ_GLUE
