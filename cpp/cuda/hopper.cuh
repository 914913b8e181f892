// What compute capability 9.0 has of its own: copies by one thread, and tensor cores that read shared memory and are waited for. Code for it needs the
// architecture 90a; elsewhere kHopper is false and none of this is called.
#pragma once

#include "mma.cuh"
#ifdef MIXKVQ_EMULATED
#include "emulated_hopper.h"  // tests/native/emulator
#else

namespace mixkvq::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool kHopper = true;
#define MIXKVQ_HOPPER(...) asm volatile(__VA_ARGS__)
#else
constexpr bool kHopper = false;
#define MIXKVQ_HOPPER(...) (void)0
#endif

__device__ __forceinline__ uint32_t shared_address(const void * at) { return static_cast<uint32_t>(__cvta_generic_to_shared(at)); }

// --- barriers and copies --------------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(uint64_t * barrier, int n) {
    MIXKVQ_HOPPER("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(n) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t * barrier) {
    MIXKVQ_HOPPER("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void barrier_expect(uint64_t * barrier, uint32_t bytes) {
    MIXKVQ_HOPPER("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint64_t * barrier, uint32_t parity) {
    MIXKVQ_HOPPER("{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(shared_address(barrier)),
                  "r"(parity)
                  : "memory");
}

// Multiples of 16 bytes, which the barrier counts.
__device__ __forceinline__ void copy_bulk(void * to, const void * from, uint32_t bytes, uint64_t * barrier) {
    MIXKVQ_HOPPER("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(to)),
                  "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier))
                  : "memory");
}

// What was stored before is seen by copies and tensor cores.
__device__ __forceinline__ void fence_async() { MIXKVQ_HOPPER("fence.proxy.async.shared::cta;" ::: "memory"); }

// --- tensor cores ---------------------------------------------------------------------------------------------
// Four warps multiply 64 rows. A and C as of mma.m16n8k16, sixteen rows to a warp; B in shared memory as lines of 64 halves whose eight units of 16
// bytes are exchanged: unit u of line i stands at u ^ (i % 8). Eight lines make 1024 bytes, aligned to as much.

// B from lines that run along k (columns are lines), or along the columns (k are lines; `next`: bytes to the next 64 columns).
__device__ __forceinline__ uint64_t matrix_of(const __half * at, uint32_t next = 16) {
    return uint64_t((shared_address(at) & 0x3ffff) >> 4) | uint64_t(next >> 4) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

__device__ __forceinline__ void multiply_begin() { MIXKVQ_HOPPER("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void multiply_end() { MIXKVQ_HOPPER("wgmma.commit_group.sync.aligned;" ::: "memory"); }

#define MIXKVQ_C(i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])

// What comes before uses c as it was, what comes after as it is here: the compiler does not know when products write it.
template <int n>
__device__ __forceinline__ void fix_here(float (&c)[n][4]) {
#pragma unroll
    for (int i = 0; i < n; ++i) MIXKVQ_HOPPER("" : MIXKVQ_C(i)::"memory");
}
// Until all but the last `n` products are there.
template <int n>
__device__ __forceinline__ void multiply_wait() {
    MIXKVQ_HOPPER("wgmma.wait_group.sync.aligned %0;" ::"n"(n) : "memory");
}

#define MIXKVQ_C4(i) MIXKVQ_C(i), MIXKVQ_C(i + 1), MIXKVQ_C(i + 2), MIXKVQ_C(i + 3)

// Two groups of four warps in turns: turn_wait(i) is passed once turn_next(i) has been called by the other group.
__device__ __forceinline__ void turn_wait(int i) { MIXKVQ_HOPPER("bar.sync %0, 256;" ::"r"(i + 1) : "memory"); }
__device__ __forceinline__ void turn_next(int i) { MIXKVQ_HOPPER("bar.arrive %0, 256;" ::"r"(i + 1) : "memory"); }

// c = a b, or c += a b; `transposed`: the lines of b run along its columns.
template <bool transposed>
__device__ __forceinline__ void multiply_wide(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b, bool add) {
    MIXKVQ_HOPPER(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"
        "%24,%25,%26,%27,%28,%29,%30,%31}, {%32,%33,%34,%35}, %36, add, 1, 1, %38;\n}"
        : MIXKVQ_C4(0), MIXKVQ_C4(4)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(transposed)));
}
template <bool transposed>
__device__ __forceinline__ void multiply_wide(float (&c)[16][4], const uint32_t (&a)[4], uint64_t b, bool add) {
    MIXKVQ_HOPPER(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"
        "%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,"
        "%59,%60,%61,%62,%63}, {%64,%65,%66,%67}, %68, add, 1, 1, %70;\n}"
        : MIXKVQ_C4(0), MIXKVQ_C4(4), MIXKVQ_C4(8), MIXKVQ_C4(12)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(transposed)));
}
#undef MIXKVQ_C4
#undef MIXKVQ_C

}  // namespace mixkvq::cuda

#endif
