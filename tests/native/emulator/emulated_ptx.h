// The functions of cpp/cuda/ptx.cuh on the CPU, see cuda_runtime.h. Fragments as in the PTX manual: lane = 4 g + j.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace mixkvq::cuda {

inline float exp2_of(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1 / x; }

namespace emulated {

inline float half_of(uint32_t pair, int i) { return float(bits_of<__half>(uint16_t(pair >> 16 * i))); }
template <class T>
T byte_of(uint32_t word, int i) {
    return T(uint8_t(word >> 8 * i));
}

}  // namespace emulated

inline void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    const uint32_t mine[6] = {a0, a1, a2, a3, b0, b1};
    const emulator::Met & met = emulator::meet(mine, sizeof mine);
    const int g = emulator::lane() / 4, j = emulator::lane() % 4;
    for (int i = 0; i < 4; ++i) {
        const int row = i / 2, column = 2 * j + i % 2;
        float sum = c[i];
        for (int k = 0; k < 8; ++k) {  // pairs of columns of a
            const uint32_t a = met.words[4 * g + k % 4][row + 2 * (k / 4)], b = met.words[4 * column + k % 4][4 + k / 4];
            sum += emulated::half_of(a, 0) * emulated::half_of(b, 0) + emulated::half_of(a, 1) * emulated::half_of(b, 1);
        }
        c[i] = sum;
    }
}

inline void mma_bytes(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    const uint32_t mine[6] = {a0, a1, a2, a3, b0, b1};
    const emulator::Met & met = emulator::meet(mine, sizeof mine);
    const int g = emulator::lane() / 4, j = emulator::lane() % 4;
    for (int i = 0; i < 4; ++i) {
        const int row = i / 2, column = 2 * j + i % 2;
        for (int k = 0; k < 8; ++k) {
            const uint32_t a = met.words[4 * g + k % 4][row + 2 * (k / 4)], b = met.words[4 * column + k % 4][4 + k / 4];
            for (int r = 0; r < 4; ++r) c[i] += emulated::byte_of<uint8_t>(a, r) * emulated::byte_of<int8_t>(b, r);
        }
    }
}
inline void mma_bytes(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) { mma_bytes(c, a0, a1, 0, 0, b, 0); }

template <int offset>
void copy_async(uint32_t shared, const uint8_t * from, bool wanted) {
    if (wanted) emulator::start(emulator::Unit::copies, [=] { std::memcpy(reinterpret_cast<void *>(uintptr_t(shared)), from + offset, 16); });
}
inline void copy_async(void * to, const void * from) { emulator::start(emulator::Unit::copies, [=] { std::memcpy(to, from, 16); }); }
inline void copy_or_zero(void * to, const void * from, bool wanted) {
    emulator::start(emulator::Unit::copies, [=] { wanted ? std::memcpy(to, from, 16) : std::memset(to, 0, 16); });
}
inline void store_shared(void * to, const uint4 & x) { *static_cast<uint4 *>(to) = x; }
inline void wait_for_copies() { emulator::finish(emulator::Unit::copies, -1); }
inline void copies_end() { emulator::end_group(emulator::Unit::copies); }
template <int n>
void copies_wait() {
    emulator::finish(emulator::Unit::copies, n);
}

inline void pair_sync(int barrier) { emulator::barrier(barrier, 64, false); }
inline uint32_t arrive(uint32_t * counter) { return (*counter)++; }
inline void wait_for_kernel_before() {}
inline void let_kernel_after_start() {}

inline uint32_t transpose(uint32_t x) {
    const emulator::Met & met = emulator::meet(&x, sizeof x);
    const int g = emulator::lane() / 4, j = emulator::lane() % 4;
    auto at = [&](int row, int column) { return met.words[4 * row + column / 2][0] >> 16 * (column % 2) & 0xffff; };
    return at(2 * j, g) | at(2 * j + 1, g) << 16;
}

namespace emulated {

inline void load(uint32_t (&x)[4], const __half * row, bool transposed) {
    const emulator::Met & met = emulator::meet(&row, sizeof row);
    const int g = emulator::lane() / 4, j = emulator::lane() % 4;
    for (int m = 0; m < 4; ++m) {
        auto at = [&](int r, int column) { return uint32_t(bits_of<uint16_t>(met.get<const __half *>(8 * m + r)[column])); };
        x[m] = transposed ? at(2 * j, g) | at(2 * j + 1, g) << 16 : at(g, 2 * j) | at(g, 2 * j + 1) << 16;
    }
    emulator::meet(nullptr, 0);  // the matrices may be written again
}

}  // namespace emulated

inline void load_matrices(uint32_t (&x)[4], const __half * row) { emulated::load(x, row, false); }
inline void load_transposed(uint32_t (&x)[4], const __half * row) { emulated::load(x, row, true); }

inline void prefetch_record(const uint8_t *, uint32_t) {}
inline uint4 load_stream(const void * at) { return *static_cast<const uint4 *>(at); }

}  // namespace mixkvq::cuda
