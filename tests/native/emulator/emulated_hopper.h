// The functions of cpp/cuda/hopper.cuh on the CPU, see cuda_runtime.h.
#pragma once

#include "emulated_ptx.h"

namespace mixkvq::cuda {

constexpr bool kHopper = MIXKVQ_EMULATED >= 90;

namespace emulated {

// A barrier in shared memory: the phase, how many arrivals end it, how many of them and how many bytes are still to come.
struct Phase {
    uint8_t parity, wanted, pending, unused;
    int32_t bytes;
};
static_assert(sizeof(Phase) == sizeof(uint64_t));

inline Phase & phase(uint64_t * barrier) { return *reinterpret_cast<Phase *>(barrier); }
inline void end_phase(Phase & p) {
    if (p.pending > 0 || p.bytes != 0) return;
    p.parity ^= 1;
    p.pending = p.wanted;
}

// Bulk copies on their way: nobody waits for them but a barrier.
inline std::vector<emulator::Work> & bulk_copies() {
    static std::vector<emulator::Work> list;
    return list;
}

}  // namespace emulated

inline void barrier_init(uint64_t * barrier, int n) { emulated::phase(barrier) = {0, uint8_t(n), uint8_t(n), 0, 0}; }
inline void barrier_arrive(uint64_t * barrier) {
    emulated::Phase & p = emulated::phase(barrier);
    --p.pending;
    emulated::end_phase(p);
}
inline void barrier_expect(uint64_t * barrier, uint32_t bytes) {
    emulated::phase(barrier).bytes += int32_t(bytes);
    barrier_arrive(barrier);
}
inline void barrier_wait(uint64_t * barrier, uint32_t parity) {
    for (int turns = 0; emulated::phase(barrier).parity == parity; ++turns) {
        if (turns % 64 == 63 && !emulated::bulk_copies().empty()) {  // late, and the last first
            emulator::Work copy = std::move(emulated::bulk_copies().back());
            emulated::bulk_copies().pop_back();
            copy();
        }
        emulator::pause();
    }
}
inline void copy_bulk(void * to, const void * from, uint32_t bytes, uint64_t * barrier) {
    emulated::bulk_copies().push_back([=] {
        std::memcpy(to, from, bytes);
        emulated::phase(barrier).bytes -= int32_t(bytes);
        emulated::end_phase(emulated::phase(barrier));
    });
}
inline void fence_async() {}

// The address of the matrix, and the bytes to the next 64 columns.
inline uint64_t matrix_of(const __half * at, uint32_t next = 16) { return __cvta_generic_to_shared(at) | uint64_t(next) << 32; }

inline void multiply_begin() {}
inline void multiply_end() { emulator::end_group(emulator::Unit::products); }
template <int n>
void multiply_wait() {
    emulator::finish(emulator::Unit::products, n);
}
template <int n>
void fix_here(float (&)[n][4]) {}

inline void turn_wait(int i) { emulator::barrier(i + 1, 256, false); }
inline void turn_next(int i) { emulator::barrier_arrive(i + 1, 256); }

// A warp's 16 rows of the 64; B is read, and c written, when the tensor cores come to it.
template <bool transposed, int n>
void multiply_wide(float (&c)[n][4], const uint32_t (&a)[4], uint64_t b, bool add) {
    const emulator::Met & met = emulator::meet(a, sizeof a);
    const int g = emulator::lane() / 4, j = emulator::lane() % 4;
    struct {
        float row[2][16];
    } rows;
    for (int k = 0; k < 16; ++k) {
        const uint32_t * from = met.words[4 * g + k % 8 / 2];
        for (int h = 0; h < 2; ++h) rows.row[h][k] = emulated::half_of(from[h + 2 * (k / 8)], k % 2);
    }
    emulator::start(emulator::Unit::products, [rows, b, add, j, c = &c[0]] {
        for (int i = 0; i < n; ++i) {
            for (int e = 0; e < 4; ++e) {
                const int column = 8 * i + 2 * j + e % 2;
                float sum = add ? c[i][e] : 0.0f;
                for (int k = 0; k < 16; ++k) {
                    const uint32_t at = transposed ? 128 * k + 2 * (column % 64) + column / 64 * uint32_t(b >> 32) : 128 * column + 2 * k;
                    const uint32_t address = uint32_t(b) + at;
                    sum += rows.row[e / 2][k] * float(*reinterpret_cast<const __half *>(uintptr_t(address ^ (address >> 7 & 7) << 4)));
                }
                c[i][e] = sum;
            }
        }
    });
}

}  // namespace mixkvq::cuda
