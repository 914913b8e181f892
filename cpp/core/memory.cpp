#include "mixkvq/memory.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#else
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace mixkvq {

#if defined(_WIN32)
Region::Region(size_t bytes, bool) : size_(bytes) {
    if (bytes) data_ = static_cast<uint8_t *>(VirtualAlloc(nullptr, bytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE));
}
Region::~Region() {
    if (data_) VirtualFree(data_, 0, MEM_RELEASE);
}
void Region::zero() {
    if (data_) std::memset(data_, 0, size_);
}
uint64_t physical_memory() {
    MEMORYSTATUSEX status;
    status.dwLength = sizeof(status);
    return GlobalMemoryStatusEx(&status) ? status.ullTotalPhys : 0;
}
#else
Region::Region(size_t bytes, bool only_addresses) : size_(bytes) {
    if (!bytes) return;
#if defined(MAP_NORESERVE)
    const int more = only_addresses ? MAP_NORESERVE : 0;
#else
    const int more = 0 * int(only_addresses);
#endif
    void * p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | more, -1, 0);
    data_ = p == MAP_FAILED ? nullptr : static_cast<uint8_t *>(p);
}
Region::~Region() {
    if (data_) munmap(data_, size_);
}
void Region::zero() {
    if (!data_) return;
#if defined(__linux__)
    if (madvise(data_, size_, MADV_DONTNEED) == 0) return;  // anonymous pages read as zeros afterwards
#endif
    std::memset(data_, 0, size_);
}
uint64_t physical_memory() {
    const long pages = sysconf(_SC_PHYS_PAGES), size = sysconf(_SC_PAGESIZE);
    const uint64_t machine = pages > 0 && size > 0 ? uint64_t(pages) * uint64_t(size) : 0, group = group_memory();
    return group && (!machine || group < machine) ? group : machine;
}
#endif

Region::Region(Region && other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

Region & Region::operator=(Region && other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
}

static void * aligned_block(size_t bytes) {
#if defined(_WIN32)
    void * p = _aligned_malloc(bytes, 64);
#else
    void * p = nullptr;
    if (posix_memalign(&p, 64, bytes) != 0) p = nullptr;
#endif
    if (!p) throw std::bad_alloc();
    return p;
}

static void free_block(void * p) {
#if defined(_WIN32)
    _aligned_free(p);
#else
    std::free(p);
#endif
}

ScratchPool::~ScratchPool() { trim(); }

void * ScratchPool::get(size_t bytes) {
    auto & [list, n_blocks] = blocks_[bytes];
    void * p;
    if (list.empty()) {
        list.reserve(n_blocks + 1);  // so that none is refused when it is put back
        p = aligned_block(bytes);
        ++n_blocks;
        bytes_ += bytes;
        peak_ = std::max(peak_, bytes_);
    } else {
        p = list.back();
        list.pop_back();
    }
    std::memset(p, 0, bytes);
    return p;
}

void ScratchPool::put(void * block, size_t bytes) { blocks_.find(bytes)->second.free.push_back(block); }

void ScratchPool::trim() {
    for (auto & [bytes, blocks] : blocks_) {
        for (void * p : blocks.free) {
            free_block(p);
            bytes_ -= bytes;
        }
        blocks.n_blocks -= blocks.free.size();
        blocks.free.clear();
    }
}

}  // namespace mixkvq
