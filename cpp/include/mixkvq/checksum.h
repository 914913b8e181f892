// XXH64, seed 0, of bytes that come piece by piece: the checksum of saved states. github.com/Cyan4973/xxHash, doc/xxhash_spec.md, specifies it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mixkvq {

class Checksum {
  public:
    void add(const void * data, size_t bytes);
    uint64_t value() const;

  private:
    static constexpr uint64_t kPrime1 = 0x9e3779b185ebca87, kPrime2 = 0xc2b2ae3d27d4eb4f;
    static constexpr size_t kStripe = 32;

    void stripe(const uint8_t * at);

    uint64_t lanes_[4] = {kPrime1 + kPrime2, kPrime2, 0, uint64_t(0) - kPrime1};
    uint64_t bytes_ = 0;
    uint8_t rest_[kStripe];  // what does not fill a stripe yet
};

inline uint64_t checksum_of(const void * data, size_t bytes) {
    Checksum sum;
    sum.add(data, bytes);
    return sum.value();
}

}  // namespace mixkvq
