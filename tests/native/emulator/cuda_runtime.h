// CUDA on the CPU: enough of it to run the kernels of cpp/cuda as plain C++ where there is no GPU, so that their tests run everywhere. This header
// stands for NVIDIA's; cpp/cuda is compiled with -DMIXKVQ_EMULATED.
//
// Every thread of a block is a coroutine with a stack of its own; blocks run one after another, in any order. A thread runs until it waits for
// others (a barrier, or an instruction of the whole warp); then another lane of its warp goes on, or another warp, at random. So a missing barrier
// shows: whoever reads too early reads what was there before. Asynchronous copies happen at once or only when they are waited for, at random.
// What is queued on a stream is done at once or when somebody waits for it, at random too, in the order in which it was queued, whatever the stream.
// Hopper's own instructions are there where MIXKVQ_EMULATED is 90. Not emulated: time. MIXKVQ_EMULATOR_SEED chooses another order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <tuple>
#include <vector>

// --- the language ---------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define CUDART_VERSION 12000

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3() = default;
    dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using std::max;
using std::min;
inline int max(int a, unsigned b) { return int(max(unsigned(a), b)); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

// --- threads --------------------------------------------------------------------------------------------------

namespace emulator {

// Where the thread that runs is.
struct Place {
    dim3 block, thread;
};
extern Place here;
extern dim3 grid_size, block_size;

using Work = std::function<void()>;

constexpr int kWarpLanes = 32;
constexpr int kWords = 16;  // that a lane shows the others of its warp

void run(dim3 grid, int threads, size_t shared_bytes, const std::function<void()> & kernel);
constexpr int kShared = 227 * 1024;  // bytes of a block
void later(Work work);  // queues it on a stream
void finish();          // does all that is queued
void begin_order(unsigned number);  // one of many orders in which threads, blocks and queues take turns
void record(std::vector<Work> * to);  // what is queued from now on is kept there instead; nullptr: not any more
bool is_recording();

// As many GPUs as MIXKVQ_EMULATED_GPUS names by their compute capabilities, "8.0,6.1"; one of 8.0 without.
struct Gpu {
    int major = 0, minor = 0;
};
const std::vector<Gpu> & gpus();
std::string bus_of(int gpu);
int & current_gpu();  // of the thread

// Of the calls of this kind, `times` fail after `skip` that do not: "malloc", "host" (pinned memory), "capture", "instantiate", "launch" (of a graph).
void fail(const char * call, int skip, int times);
bool fails(const char * call);
inline int & n_launches() {  // of graphs
    static int n = 0;
    return n;
}
uint8_t * dynamic_shared();  // in the lowest 4 GiB: a 32-bit address is the pointer

// What the lanes of a warp bring when they meet. Nobody changes it before all have been at the next meeting.
struct Met {
    uint32_t lanes;  // that came
    uint32_t words[kWarpLanes][kWords];
    bool has(int lane) const { return lanes >> lane & 1; }
    template <class T>
    T get(int lane) const {
        T x;
        std::memcpy(&x, words[lane], sizeof x);
        return x;
    }
};

// All lanes of the warp that have not ended come here.
const Met & meet(const void * brought, size_t bytes);
inline int lane() { return int(here.thread.x) % kWarpLanes; }

// `n` threads come to barrier `id`; n = 0: all of the block. What they bring is counted (how many, how many of them true).
struct Count {
    int all, yes;
};
Count barrier(int id, int n, bool brought);
void barrier_arrive(int id, int n);  // without waiting
void pause();                        // others go on, so that what this thread waits for can happen

// Asynchronous work of a thread, of two kinds, in groups: done at once, in order, or when it is waited for.
enum class Unit { copies, products };
void start(Unit unit, Work work);
void end_group(Unit unit);
void finish(Unit unit, int but_groups);  // -1: also what is in no group yet

template <class T>
T exchange(T x, int from) {
    static_assert(sizeof(T) <= 4 * kWords);
    const Met & met = meet(&x, sizeof x);
    return met.has(from) ? met.get<T>(from) : x;
}

inline unsigned ballot(bool yes) {
    const uint32_t x = yes;
    const Met & met = meet(&x, sizeof x);
    unsigned bits = 0;
    for (int i = 0; i < kWarpLanes; ++i) bits |= unsigned(met.has(i) && met.words[i][0]) << i;
    return bits;
}

}  // namespace emulator

#define threadIdx (emulator::here.thread)
#define blockIdx (emulator::here.block)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)

inline void __syncthreads() { emulator::barrier(0, 0, false); }
inline int __syncthreads_or(int x) { return emulator::barrier(0, 0, x != 0).yes > 0; }
inline int __syncthreads_count(int x) { return emulator::barrier(0, 0, x != 0).yes; }
inline int __syncthreads_and(int x) {
    const emulator::Count n = emulator::barrier(0, 0, x != 0);
    return n.yes == n.all;
}
inline void __syncwarp(unsigned = 0xffffffffu) { emulator::meet(nullptr, 0); }
template <class T>
T __shfl_sync(unsigned, T x, int from) {
    return emulator::exchange(x, from & 31);
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
    return emulator::exchange(x, emulator::lane() ^ mask);
}
inline unsigned __ballot_sync(unsigned, int x) { return emulator::ballot(x != 0); }
inline int __any_sync(unsigned, int x) { return emulator::ballot(x != 0) != 0; }
inline int __all_sync(unsigned, int x) { return emulator::ballot(x == 0) == 0; }

// --- functions ------------------------------------------------------------------------------------------------

template <class To, class From>
To bits_of(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}
inline int __float_as_int(float x) { return bits_of<int>(x); }
inline uint32_t __float_as_uint(float x) { return bits_of<uint32_t>(x); }
inline float __int_as_float(int x) { return bits_of<float>(x); }
inline float __uint_as_float(uint32_t x) { return bits_of<float>(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline int __ffs(unsigned x) { return __builtin_ffs(int(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t both = uint64_t(b) << 32 | a;
    uint32_t y = 0;
    for (int i = 0; i < 4; ++i) y |= uint32_t(both >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return y;
}
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t n) { return uint32_t(((uint64_t(high) << 32 | low) << n % 32) >> 32); }
inline uint32_t __vmaxu2(uint32_t a, uint32_t b) { return max(a & 0xffffu, b & 0xffffu) | max(a >> 16, b >> 16) << 16; }
inline uint32_t __vmaxu4(uint32_t a, uint32_t b) {
    uint32_t y = 0;
    for (int i = 0; i < 32; i += 8) y |= max(a >> i & 0xffu, b >> i & 0xffu) << i;
    return y;
}
template <class T>
T __ldcg(const T * x) {
    return *x;
}
inline uint32_t __cvta_generic_to_shared(const void * at) { return uint32_t(reinterpret_cast<uintptr_t>(at)); }

// --- the host's side ------------------------------------------------------------------------------------------

#define MIXKVQ_DYNAMIC_SHARED(name, alignment) uint4 * const name = reinterpret_cast<uint4 *>(emulator::dynamic_shared())

namespace mixkvq::cuda {

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, void *, const Arguments &... arguments) {
    emulator::later([=, values = std::tuple<Parameters...>(arguments...)] {
        emulator::run(grid, threads, shared_bytes, [&] { std::apply(kernel, values); });
    });
}
template <class Kernel>
bool can_start_early(Kernel) {
    return false;
}
template <class... Arguments>
void launch_early(const Arguments &... arguments) {
    launch(arguments...);
}

}  // namespace mixkvq::cuda

using cudaStream_t = void *;
enum cudaError_t { cudaSuccess, cudaErrorMemoryAllocation, cudaErrorInsufficientDriver, cudaErrorNoDevice, cudaErrorInvalidDevice };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice, cudaMemcpyDefault };
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount,
    cudaDevAttrMaxSharedMemoryPerBlockOptin,
    cudaDevAttrComputeCapabilityMajor,
    cudaDevAttrL2CacheSize,
    cudaDevAttrMemoryPoolsSupported
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaDeviceProp {
    const char * name = "emulator";
    int major = 8, minor = 0;
};
struct cudaFuncAttributes {};

inline const char * cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "out of memory"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return emulator::finish(), cudaSuccess; }
inline cudaError_t cudaSetDevice(int gpu) { return emulator::current_gpu() = gpu, cudaSuccess; }
inline cudaError_t cudaDeviceGetByPCIBusId(int * device, const char * bus) {
    for (int i = 0; i < int(emulator::gpus().size()); ++i) {
        if (emulator::bus_of(i) == bus) return *device = i, cudaSuccess;
    }
    return cudaErrorInvalidDevice;
}
inline cudaError_t cudaDriverGetVersion(int * version) { return *version = CUDART_VERSION, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int * n) { return *n = int(emulator::gpus().size()), cudaSuccess; }
inline cudaError_t cudaGetDevice(int * device) { return *device = emulator::current_gpu(), cudaSuccess; }
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp * properties, int device) {
    if (device < 0 || device >= int(emulator::gpus().size())) return cudaErrorInvalidDevice;
    properties->major = emulator::gpus()[device].major;
    properties->minor = emulator::gpus()[device].minor;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int * value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount              ? 24
             : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? emulator::kShared
             : attribute == cudaDevAttrComputeCapabilityMajor       ? 8
             : attribute == cudaDevAttrMemoryPoolsSupported         ? 1
                                                                    : 1 << 20;
    return cudaSuccess;
}
template <class Function>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *, Function *) {
    return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void *, cudaFuncAttribute, int) { return cudaSuccess; }
template <class Function>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int * n, Function *, int threads, size_t shared_bytes) {
    return *n = int(std::min<size_t>(1024 / threads, (emulator::kShared + 1024) / (shared_bytes + 1024))), cudaSuccess;
}

// One order of work for all streams: events say nothing that it does not.
using cudaEvent_t = void *;
enum { cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2, cudaHostAllocDefault = 0, cudaStreamCaptureModeRelaxed = 2 };
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t * stream, int) { return *stream = new char, cudaSuccess; }
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) { return emulator::finish(), delete static_cast<char *>(stream), cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return emulator::finish(), cudaSuccess; }
inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, int) { return cudaSuccess; }
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t * event, int) { return *event = new char, cudaSuccess; }
inline cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete static_cast<char *>(event), cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return emulator::finish(), cudaSuccess; }

inline cudaError_t emulated_memory(void ** block, size_t bytes) {
    bytes = (bytes + 255) / 256 * 256;
    *block = std::aligned_alloc(256, bytes);
    if (*block) std::memset(*block, 0xff, bytes);
    return *block ? cudaSuccess : cudaErrorMemoryAllocation;
}
inline cudaError_t cudaMalloc(void ** block, size_t bytes) {
    return emulator::fails("malloc") ? cudaErrorMemoryAllocation : emulated_memory(block, bytes);
}
inline cudaError_t cudaMallocAsync(void ** block, size_t bytes, cudaStream_t) { return cudaMalloc(block, bytes); }
inline cudaError_t cudaHostAlloc(void ** block, size_t bytes, int) {
    return emulator::fails("host") ? cudaErrorMemoryAllocation : emulated_memory(block, bytes);
}
inline cudaError_t cudaFree(void * block) { return emulator::finish(), std::free(block), cudaSuccess; }
inline cudaError_t cudaFreeHost(void * block) { return cudaFree(block); }
inline cudaError_t cudaFreeAsync(void * block, cudaStream_t) { return emulator::later([=] { std::free(block); }), cudaSuccess; }
inline cudaError_t cudaMemset(void * block, int byte, size_t bytes) { return emulator::finish(), std::memset(block, byte, bytes), cudaSuccess; }
inline cudaError_t cudaMemcpy(void * to, const void * from, size_t bytes, cudaMemcpyKind) {
    return emulator::finish(), std::memcpy(to, from, bytes), cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void * block, int byte, size_t bytes, cudaStream_t) {
    return emulator::later([=] { std::memset(block, byte, bytes); }), cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void * to, const void * from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
    return emulator::later([=] { std::memmove(to, from, bytes); }), cudaSuccess;
}

using cudaGraph_t = std::vector<emulator::Work> *;
using cudaGraphExec_t = cudaGraph_t;
inline cudaGraph_t & emulated_capture() {
    static cudaGraph_t graph = nullptr;
    return graph;
}
inline cudaError_t cudaStreamBeginCapture(cudaStream_t, int) {
    if (emulator::fails("capture")) return cudaErrorMemoryAllocation;
    emulator::record(emulated_capture() = new std::vector<emulator::Work>);
    return cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t * graph) {
    emulator::record(nullptr);
    return *graph = emulated_capture(), cudaSuccess;
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t * exec, cudaGraph_t graph, int) {
    if (emulator::fails("instantiate")) return cudaErrorMemoryAllocation;
    return *exec = new std::vector<emulator::Work>(*graph), cudaSuccess;
}
struct cudaGraphExecUpdateResultInfo {};
inline cudaError_t cudaGraphExecUpdate(cudaGraphExec_t exec, cudaGraph_t graph, cudaGraphExecUpdateResultInfo *) {
    return emulator::finish(), *exec = *graph, cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) { return emulator::finish(), delete exec, cudaSuccess; }
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t) {
    if (emulator::fails("launch")) return cudaErrorMemoryAllocation;
    ++emulator::n_launches();
    for (const emulator::Work & work : *exec) emulator::later(work);
    return cudaSuccess;
}
