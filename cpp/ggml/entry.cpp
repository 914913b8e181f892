// The entry point that ggml calls when it loads the library. It chooses the layout of structs that this ggml has, by what it exports and never by a version
// string: ggml has changed its structs without changing its version, twice.

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#else
#include <dlfcn.h>
#endif
#if defined(__linux__) && defined(__LP64__)
#include <link.h>
#define MIXKVQ_READS_ELF 1
#endif

#include <cstdio>
#include <cstring>
#include <exception>
#include <string>

#include "entry.h"
#include "layouts.h"

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

#if defined(_WIN32)
GgmlLibrary::GgmlLibrary(void * caller) {
    HMODULE module = nullptr;
    GetModuleHandleExA(GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS | GET_MODULE_HANDLE_EX_FLAG_UNCHANGED_REFCOUNT, static_cast<const char *>(caller), &module);
    handle_ = module;
}

// A look-up there does not search the libraries that one imports from: they are asked one after the other.
void * GgmlLibrary::find(const char * function) const {
    if (!handle_) return nullptr;
    if (FARPROC found = GetProcAddress(static_cast<HMODULE>(handle_), function)) return reinterpret_cast<void *>(found);
    const auto * base = static_cast<const char *>(handle_);
    const auto * dos = reinterpret_cast<const IMAGE_DOS_HEADER *>(base);
    const auto * nt = reinterpret_cast<const IMAGE_NT_HEADERS *>(base + dos->e_lfanew);
    const IMAGE_DATA_DIRECTORY & imports = nt->OptionalHeader.DataDirectory[IMAGE_DIRECTORY_ENTRY_IMPORT];
    if (!imports.Size) return nullptr;
    for (auto * i = reinterpret_cast<const IMAGE_IMPORT_DESCRIPTOR *>(base + imports.VirtualAddress); i->Name; ++i) {
        HMODULE module = GetModuleHandleA(base + i->Name);
        FARPROC found = module ? GetProcAddress(module, function) : nullptr;
        if (found) return reinterpret_cast<void *>(found);
    }
    return nullptr;
}
#else
// The handle is kept: the functions are used for as long as the process lives.
GgmlLibrary::GgmlLibrary(void * caller) {
    Dl_info info;
    if (dladdr(caller, &info) && info.dli_fname) handle_ = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    if (!handle_) handle_ = dlopen(nullptr, RTLD_LAZY);  // ggml is a part of the program itself
}

void * GgmlLibrary::find(const char * function) const { return handle_ ? dlsym(handle_, function) : nullptr; }
#endif

#if defined(MIXKVQ_READS_ELF)
// By what the library with the backends' common code imports: assert() calls __assert_fail.
bool GgmlLibrary::asserts() const {
    Dl_info info;
    link_map * map = nullptr;
    void * const inside = find("ggml_backend_buft_get_alloc_size");
    if (!inside || !dladdr1(inside, &info, reinterpret_cast<void **>(&map), RTLD_DL_LINKMAP) || !map) return false;
    const auto at = [&](ElfW(Addr) address) { return address < map->l_addr ? address + map->l_addr : address; };  // musl leaves them as they are
    ElfW(Addr) symbols = 0, strings = 0, tables[2] = {};
    size_t bytes[2] = {};
    for (const ElfW(Dyn) * d = map->l_ld; d->d_tag != DT_NULL; ++d) {
        if (d->d_tag == DT_SYMTAB) symbols = at(d->d_un.d_ptr);
        if (d->d_tag == DT_STRTAB) strings = at(d->d_un.d_ptr);
        if (d->d_tag == DT_JMPREL) tables[0] = at(d->d_un.d_ptr);
        if (d->d_tag == DT_PLTRELSZ) bytes[0] = d->d_un.d_val;
        if (d->d_tag == DT_RELA) tables[1] = at(d->d_un.d_ptr);
        if (d->d_tag == DT_RELASZ) bytes[1] = d->d_un.d_val;
    }
    if (!symbols || !strings) return false;
    for (int t = 0; t < 2; ++t) {
        const auto * r = reinterpret_cast<const ElfW(Rela) *>(tables[t]);
        for (size_t i = 0; r && i < bytes[t] / sizeof(*r); ++i) {
            const auto & symbol = reinterpret_cast<const ElfW(Sym) *>(symbols)[ELF64_R_SYM(r[i].r_info)];
            if (!std::strcmp(reinterpret_cast<const char *>(strings) + symbol.st_name, "__assert_fail")) return true;
        }
    }
    return false;
}
#else
bool GgmlLibrary::asserts() const { return false; }
#endif

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

void * start(void * caller, std::string & error) {
    const GgmlLibrary library(caller);
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
    void * const registry = layout->start(library, error);
    if (!registry && error.rfind("ggml ", 0) == 0) error = refusal("its " + error);
    return registry;
}

}  // namespace

}  // namespace mixkvq

// nullptr, after a sentence on stderr, when the library cannot serve this process.
MIXKVQ_EXPORT void * ggml_backend_init(void) {
    void * const caller = MIXKVQ_RETURN_ADDRESS();
    try {
        static std::string error;
        static void * const registry = mixkvq::start(caller, error);
        static const bool said = !registry && std::fprintf(stderr, "mixkvq: %s\n", error.c_str()) > 0;
        (void)said;
        return registry;
    } catch (const std::exception & e) {
        std::fprintf(stderr, "mixkvq: the library could not start: %s\n", e.what());
        return nullptr;
    }
}
