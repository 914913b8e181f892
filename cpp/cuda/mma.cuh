// Numbers in registers: halves, bytes of tensor cores, sums over warps.
#pragma once

#include <cstdint>

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "launch.cuh"
#include "layout.cuh"
#ifdef MIXKVQ_EMULATED
#include "emulated_ptx.h"  // tests/native/emulator
#else
#include "ptx.cuh"
#endif

namespace mixkvq::cuda {

constexpr float kLog2E = 1.44269504f;
constexpr unsigned kWarp = 0xffffffffu;

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }

// 2^e for -126 <= e <= 127.
__device__ __forceinline__ float power(int e) { return __int_as_float((127 + e) << 23); }

// Of this thread's warp. From a shuffle the compiler knows that it is the same for all lanes: branches and loops by it need no code for lanes that part.
__device__ __forceinline__ int warp_index() { return __shfl_sync(kWarp, int(threadIdx.x >> 5), 0); }

// x, of which the compiler does not know that it stays the same: what is computed from it is not kept in registers across a loop.
__device__ __forceinline__ int opaque(int x) {
    asm volatile("" : "+r"(x));
    return x;
}
__device__ __forceinline__ const uint8_t * opaque(const uint8_t * x) {
    asm volatile("" : "+l"(x));
    return x;
}

__device__ __forceinline__ __half2 as_half2(uint32_t x) {
    __half2 h;
    *reinterpret_cast<uint32_t *>(&h) = x;
    return h;
}
__device__ __forceinline__ uint32_t as_bits(__half2 h) { return *reinterpret_cast<const uint32_t *>(&h); }

__device__ __forceinline__ uint32_t pack2(float lo, float hi) { return as_bits(__floats2half2_rn(lo, hi)); }
__device__ __forceinline__ float half_at(const uint8_t * section, int i) { return __half2float(reinterpret_cast<const __half *>(section)[i]); }

// Small integers in both halves, exactly.
__device__ __forceinline__ __half2 integers(uint32_t pair) { return __hsub2(as_half2(pair | 0x64006400u), as_half2(0x64006400u)); }

// Four numbers y = 256 high + low + 128 as words of their high and low bytes, both signed.
__device__ __forceinline__ void split_bytes(const uint32_t (&y)[4], uint32_t & high, uint32_t & low) {
    const uint32_t y01 = __byte_perm(y[0], y[1], 0x5140), y23 = __byte_perm(y[2], y[3], 0x5140);
    low = __byte_perm(y01, y23, 0x5410) ^ 0x80808080u;
    high = __byte_perm(y01, y23, 0x7632);
}

__device__ __forceinline__ uint4 load_stream_if(bool wanted, const void * at) { return wanted ? load_stream(at) : make_uint4(0, 0, 0, 0); }

__device__ __forceinline__ uint32_t part(const uint4 & x, int n) { return n == 0 ? x.x : n == 1 ? x.y : n == 2 ? x.z : x.w; }

__device__ __forceinline__ unsigned warp_max(unsigned x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    return __reduce_max_sync(kWarp, x);
#else
    for (int step = 16; step > 0; step /= 2) x = max(x, __shfl_xor_sync(kWarp, x, step));
    return x;
#endif
}

}  // namespace mixkvq::cuda
