// CHECK for native tests: reports and counts; main returns check_result().
#pragma once

#include <cstdio>

namespace check {
inline int failures = 0;
}

#define CHECK(condition, ...)                                                       \
    do {                                                                            \
        if (!(condition) && ++check::failures <= 30) {                              \
            std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition);    \
            std::fprintf(stderr, __VA_ARGS__);                                      \
            std::fputc('\n', stderr);                                               \
        }                                                                           \
    } while (0)

inline int check_result() {
    if (check::failures) std::fprintf(stderr, "%d checks failed\n", check::failures);
    return check::failures != 0;
}
