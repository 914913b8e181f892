#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#else
#include <dlfcn.h>
#endif
#if defined(__GLIBC__) && defined(__LP64__)
#include <link.h>
#define MIXKVQ_READS_ELF 1
#endif

#include <cstring>

#include "library.h"

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
    const auto at = [&](ElfW(Addr) address) { return address < map->l_addr ? address + map->l_addr : address; };  // not on every architecture they are addresses already
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

}  // namespace mixkvq
