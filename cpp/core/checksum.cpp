#include "mixkvq/checksum.h"

#include <algorithm>
#include <cstring>

namespace mixkvq {

namespace {

constexpr uint64_t kPrime1 = 0x9e3779b185ebca87, kPrime2 = 0xc2b2ae3d27d4eb4f, kPrime3 = 0x165667b19e3779f9, kPrime4 = 0x85ebca77c2b2ae63,
                   kPrime5 = 0x27d4eb2f165667c5;

uint64_t rotate(uint64_t x, int n) { return x << n | x >> (64 - n); }
uint64_t round_of(uint64_t lane, uint64_t word) { return rotate(lane + word * kPrime2, 31) * kPrime1; }
uint64_t merged(uint64_t sum, uint64_t lane) { return (sum ^ round_of(0, lane)) * kPrime1 + kPrime4; }

template <class T> T word_at(const uint8_t * at) {
    T word;
    std::memcpy(&word, at, sizeof(word));
    return word;
}

}  // namespace

void Checksum::stripe(const uint8_t * at) {
    for (int i = 0; i < 4; ++i) lanes_[i] = round_of(lanes_[i], word_at<uint64_t>(at + 8 * i));
}

void Checksum::add(const void * data, size_t bytes) {
    const auto * at = static_cast<const uint8_t *>(data);
    const size_t held = bytes_ % kStripe;
    bytes_ += bytes;
    if (held) {
        const size_t n = std::min(bytes, kStripe - held);
        std::memcpy(rest_ + held, at, n);
        if (held + n < kStripe) return;
        stripe(rest_);
        at += n, bytes -= n;
    }
    for (; bytes >= kStripe; at += kStripe, bytes -= kStripe) stripe(at);
    if (bytes) std::memcpy(rest_, at, bytes);
}

uint64_t Checksum::value() const {
    uint64_t sum = kPrime5;
    if (bytes_ >= kStripe) {
        sum = rotate(lanes_[0], 1) + rotate(lanes_[1], 7) + rotate(lanes_[2], 12) + rotate(lanes_[3], 18);
        for (uint64_t lane : lanes_) sum = merged(sum, lane);
    }
    sum += bytes_;
    const uint8_t * at = rest_, * const end = rest_ + bytes_ % kStripe;
    for (; end - at >= 8; at += 8) sum = rotate(sum ^ round_of(0, word_at<uint64_t>(at)), 27) * kPrime1 + kPrime4;
    for (; end - at >= 4; at += 4) sum = rotate(sum ^ word_at<uint32_t>(at) * kPrime1, 23) * kPrime2 + kPrime3;
    for (; at < end; ++at) sum = rotate(sum ^ *at * kPrime5, 11) * kPrime1;
    sum = (sum ^ sum >> 33) * kPrime2;
    sum = (sum ^ sum >> 29) * kPrime3;
    return sum ^ sum >> 32;
}

}  // namespace mixkvq
