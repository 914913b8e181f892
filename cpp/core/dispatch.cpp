// Which kernels run: what was built in, what this CPU can do, what MIXKVQ_ISA asks for.
#include "mixkvq/isa.h"
#include "mixkvq/kernels.h"

#include <cstdlib>
#include <cstring>

#if defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__))
#include <cpuid.h>
#endif

namespace mixkvq {

const Kernels & scalar_kernels();
#if MIXKVQ_HAVE_AVX2
const Kernels & avx2_kernels();
#endif

namespace {

constexpr Isa kAll[] = {Isa::scalar, Isa::neon, Isa::avx2, Isa::avx512};  // rising preference

#if defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__))
// Clang up to 14 does not know "f16c" in __builtin_cpu_supports.
bool has_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

bool cpu_has(Isa isa) {
    switch (isa) {
        case Isa::scalar: return true;
#if defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__))
        case Isa::avx2:
            __builtin_cpu_init();
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
#endif
        default: return false;
    }
}

}  // namespace

const char * isa_name(Isa isa) {
    switch (isa) {
        case Isa::scalar: return "scalar";
        case Isa::avx2:   return "avx2";
        case Isa::avx512: return "avx512";
        case Isa::neon:   return "neon";
    }
    return "unknown";
}

const Kernels * kernels_for(Isa isa) {
    switch (isa) {
        case Isa::scalar: return &scalar_kernels();
#if MIXKVQ_HAVE_AVX2
        case Isa::avx2:   return &avx2_kernels();
#endif
        default:          return nullptr;
    }
}

bool isa_built(Isa isa) { return kernels_for(isa) != nullptr; }
bool isa_supported(Isa isa) { return isa_built(isa) && cpu_has(isa); }

Isa select_isa(std::string & error) {
    error.clear();
    const char * wanted = std::getenv("MIXKVQ_ISA");
    if (wanted == nullptr || *wanted == '\0') {
        Isa best = Isa::scalar;
        for (Isa isa : kAll) {
            if (isa_supported(isa)) best = isa;
        }
        return best;
    }
    std::string usable;
    for (Isa isa : kAll) {
        if (isa_supported(isa)) usable += std::string(usable.empty() ? " " : ", ") + isa_name(isa);
    }
    for (Isa isa : kAll) {
        if (std::strcmp(wanted, isa_name(isa)) != 0) continue;
        if (isa_supported(isa)) return isa;
        error = std::string("MIXKVQ_ISA=\"") + wanted + "\": " +
                (isa_built(isa) ? "this CPU does not have it" : "these kernels are not built into this library") + "; use one of" + usable;
        return Isa::scalar;
    }
    error = std::string("MIXKVQ_ISA=\"") + wanted + "\" is not an instruction set; use one of" + usable;
    return Isa::scalar;
}

}  // namespace mixkvq
