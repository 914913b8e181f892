// XXH64 against vectors of the reference implementation, in one go and in pieces.
#include <algorithm>
#include <vector>

#include "check.h"
#include "mixkvq/checksum.h"

using namespace mixkvq;

int main() {
    std::vector<uint8_t> bytes(101);
    for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = uint8_t(i * 7 + 3);
    struct Case {
        size_t n;
        uint64_t sum;
    };
    const Case cases[] = {
        {0, 0xef46db3751d8e999}, {1, 0x1f25c8d0bc1f4bb6}, {3, 0x31d2363f52e564c9}, {4, 0x9bb64b7d66ee9fda},
        {7, 0x9a7b149959ce60d8}, {8, 0xdab99d95c6f90092}, {12, 0xd52e407833af5133}, {31, 0xa2aa5f33cc4a6119},
        {32, 0x23c3c17ef790fd97}, {33, 0x50a7cfc7ba588784}, {63, 0x5e3e54b431c7493c}, {64, 0x0eb64b3ef6eeb01f},
        {100, 0xa61f8d4c170fe531}, {101, 0xbad4d3bf033bda4c}};
    for (const Case & c : cases) {
        CHECK(checksum_of(bytes.data(), c.n) == c.sum, "%zu bytes: %016llx", c.n, (unsigned long long) checksum_of(bytes.data(), c.n));
        for (size_t piece = 1; piece <= 40; ++piece) {
            Checksum sum;
            for (size_t at = 0; at < c.n; at += piece) sum.add(bytes.data() + at, std::min(piece, c.n - at));
            CHECK(sum.value() == c.sum, "%zu bytes in pieces of %zu", c.n, piece);
        }
    }
    return check_result();
}
