#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>

#include <cuda_runtime.h>

#include "attention_common.cuh"

namespace mixkvq::cuda {
namespace {

__global__ void probe() {}

std::string version(int major, int minor) { return std::to_string(major) + '.' + std::to_string(minor); }
std::string cuda_version(int number) { return "CUDA " + version(number / 1000, number % 1000 / 10); }

std::string find_reason(int device) {
    int driver = 0, n_devices = 0, before = 0;
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "no NVIDIA driver was found";
    cudaError_t error = cudaGetDeviceCount(&n_devices);
    if (error == cudaErrorInsufficientDriver) {
        return "the NVIDIA driver is too old: it serves " + cuda_version(driver) + ", this build needs " + cuda_version(CUDART_VERSION);
    }
    if (error == cudaErrorNoDevice || (error == cudaSuccess && n_devices == 0)) return "the NVIDIA driver shows no GPU";
    cudaDeviceProp properties;
    if (error == cudaSuccess) error = cudaGetDeviceProperties(&properties, device);
    if (error == cudaSuccess && 10 * properties.major + properties.minor < 75) {
        return std::string(properties.name) + " is too old a GPU: its compute capability is " + version(properties.major, properties.minor) +
               ", 7.5 is the least";
    }
    // Whether this build has code for the GPU that the driver can load.
    cudaFuncAttributes attributes;
    if (error == cudaSuccess) error = cudaGetDevice(&before);
    if (error == cudaSuccess) error = cudaSetDevice(device);
    if (error == cudaSuccess) {
        error = cudaFuncGetAttributes(&attributes, probe);
        cudaSetDevice(before);
    }
    return error == cudaSuccess ? "" : std::string("the GPU cannot be used: ") + cudaGetErrorString(error);
}

}  // namespace

const char * unavailable(int device) {
    static std::mutex mutex;
    static std::map<int, std::string> reasons;
    std::lock_guard<std::mutex> lock(mutex);
    auto found = reasons.find(device);
    if (found == reasons.end()) {
        found = reasons.emplace(device, find_reason(device)).first;
        cudaGetLastError();  // the next call is not to find it
    }
    return found->second.empty() ? nullptr : found->second.c_str();
}

Gpu current_gpu() {
    static const char * const given = std::getenv("MIXKVQ_CUDA_SHARED");
    static const int most = given && std::atoi(given) > 0 ? 1024 * std::atoi(given) : 1 << 20;
    Gpu gpu = {0, 1, 48 * 1024};
    cudaGetDevice(&gpu.device);
    cudaDeviceGetAttribute(&gpu.n_sms, cudaDevAttrMultiProcessorCount, gpu.device);
    cudaDeviceGetAttribute(&gpu.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, gpu.device);
    gpu.shared = std::min(gpu.shared, most);
    return gpu;
}

}  // namespace mixkvq::cuda
