// The layouts of ggml's backend structs that this library serves. All of cpp/ggml but entry.cpp is compiled once for each, with MIXKVQ_ABI its number and
// MIXKVQ_GLUE the namespace of its own; CMakeLists.txt reads the lines of the list. What differs between them stands in abi.h.
#pragma once

// X(letter, number, ggml's backend API, a function that ggml exports since, the first build of llama.cpp, the first llama-cpp-python that carries it)
#define MIXKVQ_LAYOUTS(X)                                                          \
    X(a, 1, 2, "ggml_solve_tri", "b7347", "0.3.17")                                \
    X(b, 2, 2, "ggml_backend_tensor_set_2d", "b8771", "0.3.22")                    \
    X(c, 3, 3, "ggml_backend_buft_alloc_buffer_n", "b11352", "none yet")

// A function of a layout that comes after all of these.
#define MIXKVQ_LATER_LAYOUT "ggml_backend_buft_get_alloc_interface"
