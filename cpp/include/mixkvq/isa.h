// Which instruction set the kernels use. A program asks once and keeps the answer; MIXKVQ_ISA overrides it.
#pragma once

#include <string>

namespace mixkvq {

enum class Isa { scalar = 0, neon, neon_dotprod, avx2, avx2_vnni, avx512, avx512_vnni };

// All of them, in rising preference.
constexpr Isa kIsas[] = {Isa::scalar, Isa::neon, Isa::neon_dotprod, Isa::avx2, Isa::avx2_vnni, Isa::avx512, Isa::avx512_vnni};

const char * isa_name(Isa isa);
bool isa_built(Isa isa);      // compiled into this library
bool isa_supported(Isa isa);  // built, and this CPU has it

// The best supported one, or the one that MIXKVQ_ISA names. If that cannot be had, `error` says why and scalar is
// returned: the caller decides whether to go on.
Isa select_isa(std::string & error);

// Why this CPU gets the plain C++ kernels, one sentence; nullptr if it has vector ones.
const char * no_vector_kernels();

}  // namespace mixkvq
