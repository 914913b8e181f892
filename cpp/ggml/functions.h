// The ggml that loads the library: its functions, its numbers, and whether its structs are those of this layout.
#pragma once

#include <string>

#include "abi.h"
#include "library.h"

namespace mixkvq::MIXKVQ_GLUE {

// Looks everything up that abi.h declares. False: `error` says what is missing.
bool load_functions(const GgmlLibrary & library, std::string & error);
// Calls functions of ggml that do nothing but call one of a table, with tables in which every function only says where it stands. False: `error` says
// which one was elsewhere than in this layout.
bool check_layout(std::string & error);

// The ggml_backend_reg of this layout, for ggml_backend_init (entry.cpp); nullptr: `error` says what cannot be served.
void * start(const GgmlLibrary & library, std::string & error);

}  // namespace mixkvq::MIXKVQ_GLUE
