// Code bytes to registers of codes and back. Included after the primitives of an instruction set.
#pragma once

#include <utility>

namespace mixkvq {
namespace {

// Calls body(0), ... body(n - 1) with compile-time indices.
template <class Body, int... i>
inline __attribute__((always_inline)) void unroll(Body && body, std::integer_sequence<int, i...>) {
    (body(std::integral_constant<int, i>()), ...);
}
template <int n, class Body>
inline __attribute__((always_inline)) void unroll(Body && body) {
    unroll(body, std::make_integer_sequence<int, n>());
}

// A chunk is eight registers of code bytes: 64 tokens of a key quad (`row` = 32 bytes) or 32 tokens of eight value dimensions
// (`row` = 4 Dv bytes). `high` is the chunk's register of top bits, for 3 bits only.
template <int bits, int k>
inline B load_codes(const uint8_t * low, size_t row, const uint8_t * high) {
    if constexpr (bits == 8) return load_bytes(low + k * row);
    if constexpr (bits == 4) return bits_and(shift_right<k % 2 * 4>(load_bytes(low + k / 2 * row)), splat_byte(15));
    const B code = bits_and(shift_right<k % 4 * 2>(load_bytes(low + k / 4 * row)), splat_byte(3));
    if constexpr (bits == 2) return code;
    const B top = load_bytes(high);
    return bits_or(code, bits_and(k < 2 ? shift_left<(k < 2 ? 2 - k : 0)>(top) : shift_right<(k < 2 ? 0 : k - 2)>(top), splat_byte(4)));
}

template <int bits>
inline void store_codes(const B code[8], uint8_t * low, size_t row, uint8_t * high) {
    if constexpr (bits == 8) {
        for (int k = 0; k < 8; ++k) store_bytes(low + k * row, code[k]);
    } else if constexpr (bits == 4) {
        for (int k = 0; k < 8; k += 2) store_bytes(low + k / 2 * row, bits_or(code[k], shift_left<4>(code[k + 1])));
    } else {
        const B two = splat_byte(3);
        for (int k = 0; k < 8; k += 4) {
            const B a = bits_or(bits_and(code[k], two), shift_left<2>(bits_and(code[k + 1], two)));
            const B b = bits_or(bits_and(code[k + 2], two), shift_left<2>(bits_and(code[k + 3], two)));
            store_bytes(low + k / 4 * row, bits_or(a, shift_left<4>(b)));
        }
        if constexpr (bits == 3) {
            B top = zero_bytes();
            unroll<8>([&](auto k) { top = bits_or(top, shift_left<k>(bits_and(shift_right<2>(code[k]), splat_byte(1)))); });
            store_bytes(high, top);
        }
    }
}

}  // namespace
}  // namespace mixkvq
