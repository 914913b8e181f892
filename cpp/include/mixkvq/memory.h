// Memory that becomes resident only where it is touched.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

namespace mixkvq {

// A zeroed region, aligned to a memory page.
class Region {
  public:
    Region() = default;
    // data() is nullptr if there is not enough memory. only_addresses: most of it will never be touched, so that nobody has to vouch for it.
    explicit Region(size_t bytes, bool only_addresses = false);
    ~Region();
    Region(Region && other) noexcept;
    Region & operator=(Region && other) noexcept;
    Region(const Region &) = delete;
    Region & operator=(const Region &) = delete;

    uint8_t * data() const { return data_; }
    size_t size() const { return size_; }
    void zero();  // back to zeros, giving the memory back where the system can

  private:
    uint8_t * data_ = nullptr;
    size_t size_ = 0;
};

// Memory that this process can have at most, in bytes: the machine's, or what its control groups (containers) allow; 0 if it cannot be told.
uint64_t physical_memory();
// The smallest limit of its control groups, 0 if there is none. `root`: in front of /proc and of the paths where they are mounted.
uint64_t group_memory(const std::string & root = "");

// Blocks for F16 pages beyond the ones a cache tensor owns: those of the ubatch in flight. Shared by the layers of a context.
class ScratchPool {
  public:
    ~ScratchPool();
    void * get(size_t bytes);  // zeroed, 64-byte aligned; throws std::bad_alloc
    void put(void * block, size_t bytes);  // throws nothing
    void trim();  // frees the blocks that nobody holds
    size_t bytes() const { return bytes_; }
    size_t bytes_peak() const { return peak_; }

  private:
    struct Blocks {
        std::vector<void *> free;
        size_t n_blocks = 0;  // with those that somebody holds
    };
    std::unordered_map<size_t, Blocks> blocks_;  // by size
    size_t bytes_ = 0, peak_ = 0;
};

}  // namespace mixkvq
