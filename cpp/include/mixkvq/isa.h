// Which instruction set the kernels use. A program asks once and keeps the answer; MIXKVQ_ISA overrides it.
#pragma once

#include <string>

namespace mixkvq {

enum class Isa { scalar = 0, avx2, avx512, neon };

const char * isa_name(Isa isa);
bool isa_built(Isa isa);      // compiled into this library
bool isa_supported(Isa isa);  // built, and this CPU has it

// The best supported one, or the one that MIXKVQ_ISA names. If that cannot be had, `error` says why and scalar is
// returned: the caller decides whether to go on.
Isa select_isa(std::string & error);

}  // namespace mixkvq
