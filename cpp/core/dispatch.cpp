// Which kernels run: what was built in, what this CPU can do, what MIXKVQ_ISA asks for.
#include "mixkvq/isa.h"
#include "mixkvq/kernels.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

#if defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__))
#include <cpuid.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace mixkvq {

const Kernels & scalar_kernels();
const Kernels & neon_kernels();
const Kernels & neon_dotprod_kernels();
const Kernels & avx2_kernels();
const Kernels & avx2_vnni_kernels();
const Kernels & avx512_kernels();
const Kernels & avx512_vnni_kernels();

namespace {

#if defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__))
// Asked of the processor: not every compiler's __builtin_cpu_supports knows these names, and Zig's knows none.
struct Registers {
    unsigned a = 0, b = 0, c = 0, d = 0;
};
Registers cpuid(unsigned leaf, unsigned subleaf) {
    Registers r;
    if (!__get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d)) return {};
    return r;
}
bool has(unsigned bits, std::initializer_list<int> wanted) {
    for (int bit : wanted) {
        if (!(bits >> bit & 1)) return false;
    }
    return true;
}
// Whether the system keeps these registers: 1 and 2 are those of AVX, 5 to 7 those of AVX-512.
bool keeps(std::initializer_list<int> registers) {
    if (!has(cpuid(1, 0).c, {27})) return false;  // xgetbv is there
    unsigned low, high;
    __asm__ __volatile__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return has(low, registers);
}
bool has_avx2() { return keeps({1, 2}) && has(cpuid(1, 0).c, {12, 28, 29}) && has(cpuid(7, 0).b, {5}); }  // FMA, AVX, F16C; AVX2
bool has_avx_vnni() { return has(cpuid(7, 1).a, {4}); }
bool has_avx512() { return has_avx2() && keeps({5, 6, 7}) && has(cpuid(7, 0).b, {16, 17, 30, 31}); }  // F, DQ, BW, VL
bool has_avx512_vnni() { return has(cpuid(7, 0).c, {11}); }
#endif

#if defined(__aarch64__)
bool has_dotprod() {
#if defined(__linux__)
    return getauxval(AT_HWCAP) & (1ul << 20);  // HWCAP_ASIMDDP
#elif defined(__APPLE__)
    return true;  // every Apple processor of this architecture since the first Mac
#else
    return false;
#endif
}
#endif

bool cpu_has(Isa isa) {
    switch (isa) {
        case Isa::scalar: return true;
#if defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__))
        case Isa::avx2: return has_avx2();
        case Isa::avx2_vnni: return has_avx2() && has_avx_vnni();
        case Isa::avx512: return has_avx512();
        case Isa::avx512_vnni: return has_avx512() && has_avx512_vnni();
#endif
#if defined(__aarch64__)
        case Isa::neon: return true;
        case Isa::neon_dotprod: return has_dotprod();
#endif
        default: return false;
    }
}

}  // namespace

const char * isa_name(Isa isa) {
    switch (isa) {
        case Isa::scalar: return "scalar";
        case Isa::neon: return "neon";
        case Isa::neon_dotprod: return "neon_dotprod";
        case Isa::avx2: return "avx2";
        case Isa::avx2_vnni: return "avx2_vnni";
        case Isa::avx512: return "avx512";
        case Isa::avx512_vnni: return "avx512_vnni";
    }
    return "unknown";
}

const Kernels * kernels_for(Isa isa) {
    switch (isa) {
        case Isa::scalar: return &scalar_kernels();
#if MIXKVQ_HAVE_NEON
        case Isa::neon: return &neon_kernels();
#endif
#if MIXKVQ_HAVE_NEON_DOTPROD
        case Isa::neon_dotprod: return &neon_dotprod_kernels();
#endif
#if MIXKVQ_HAVE_AVX2
        case Isa::avx2: return &avx2_kernels();
#endif
#if MIXKVQ_HAVE_AVX2_VNNI
        case Isa::avx2_vnni: return &avx2_vnni_kernels();
#endif
#if MIXKVQ_HAVE_AVX512
        case Isa::avx512: return &avx512_kernels();
#endif
#if MIXKVQ_HAVE_AVX512_VNNI
        case Isa::avx512_vnni: return &avx512_vnni_kernels();
#endif
        default: return nullptr;
    }
}

bool isa_built(Isa isa) { return kernels_for(isa) != nullptr; }
bool isa_supported(Isa isa) { return isa_built(isa) && cpu_has(isa); }

Isa select_isa(std::string & error) {
    error.clear();
    const char * wanted = std::getenv("MIXKVQ_ISA");
    if (wanted == nullptr || *wanted == '\0') {
        Isa best = Isa::scalar;
        for (Isa isa : kIsas) {
            if (isa_supported(isa)) best = isa;
        }
        return best;
    }
    std::string usable;
    for (Isa isa : kIsas) {
        if (isa_supported(isa)) usable += std::string(usable.empty() ? " " : ", ") + isa_name(isa);
    }
    for (Isa isa : kIsas) {
        if (std::strcmp(wanted, isa_name(isa)) != 0) continue;
        if (isa_supported(isa)) return isa;
        error = std::string("MIXKVQ_ISA=\"") + wanted + "\": " +
                (isa_built(isa) ? "this CPU does not have it" : "these kernels are not built into this library") + "; use one of" + usable;
        return Isa::scalar;
    }
    error = std::string("MIXKVQ_ISA=\"") + wanted + "\" is not an instruction set; use one of" + usable;
    return Isa::scalar;
}

const char * no_vector_kernels() {
    bool built = false;
    for (Isa isa : kIsas) {
        if (isa != Isa::scalar && isa_supported(isa)) return nullptr;
        built |= isa != Isa::scalar && isa_built(isa);
    }
    if (built) return "this processor has neither AVX2 (with FMA and F16C) nor NEON, so the plain C++ kernels are used: attention is several times slower";
#if defined(__x86_64__) || defined(_M_X64) || defined(__aarch64__) || defined(_M_ARM64)
    return "this library was built without vector kernels (GCC and Clang make them), so the plain C++ ones are used: attention is several times slower";
#else
    return "there are no vector kernels for this kind of processor, so the plain C++ ones are used: attention is several times slower";
#endif
}

}  // namespace mixkvq
