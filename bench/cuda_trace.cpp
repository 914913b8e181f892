// When every kernel of a program ran on an NVIDIA GPU, those in CUDA graphs too, and every copy. CUDA 13 loads it into any program; no profiler is needed:
//
//     g++ -shared -fPIC -I$CUDA/include -I$CUDA/extras/CUPTI/include bench/cuda_trace.cpp -o cuda_trace.so -L$CUDA/extras/CUPTI/lib64 -lcupti
//     CUDA_INJECTION64_PATH=$PWD/cuda_trace.so CUDA_TRACE=trace.tsv llama-bench -m model.gguf -p 0 -n 48 -r 1 -d 32768
//     python bench/cuda_trace.py trace.tsv
//
// A line per kernel: start and end in nanoseconds, blocks, name. A line per copy between host and GPU: start, end, bytes, `[to GPU]` or `[to host]`.
#include <cupti.h>
#include <cxxabi.h>

#include <cstdio>
#include <cstdlib>

namespace {

FILE * out;

void give_buffer(uint8_t ** buffer, size_t * bytes, size_t * most_records) {
    *bytes = 8 << 20;
    *buffer = static_cast<uint8_t *>(aligned_alloc(8, *bytes));
    *most_records = 0;  // as many as fit
}

void take_buffer(CUcontext, uint32_t, uint8_t * buffer, size_t, size_t valid_bytes) {
    CUpti_Activity * record = nullptr;
    while (cuptiActivityGetNextRecord(buffer, valid_bytes, &record) == CUPTI_SUCCESS) {
        if (record->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
            const auto * copy = reinterpret_cast<const CUpti_ActivityMemcpy6 *>(record);
            const bool to_gpu = copy->copyKind == CUPTI_ACTIVITY_MEMCPY_KIND_HTOD, to_host = copy->copyKind == CUPTI_ACTIVITY_MEMCPY_KIND_DTOH;
            if (!to_gpu && !to_host) continue;
            std::fprintf(out, "%llu\t%llu\t%llu\t%s\n", static_cast<unsigned long long>(copy->start), static_cast<unsigned long long>(copy->end),
                         static_cast<unsigned long long>(copy->bytes), to_gpu ? "[to GPU]" : "[to host]");
            continue;
        }
        if (record->kind != CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) continue;
        const auto * kernel = reinterpret_cast<const CUpti_ActivityKernel10 *>(record);
        char * const plain = kernel->name ? abi::__cxa_demangle(kernel->name, nullptr, nullptr, nullptr) : nullptr;
        std::fprintf(out, "%llu\t%llu\t%d\t%s\n", static_cast<unsigned long long>(kernel->start), static_cast<unsigned long long>(kernel->end),
                     kernel->gridX * kernel->gridY * kernel->gridZ, plain ? plain : kernel->name ? kernel->name : "?");
        std::free(plain);
    }
    std::free(buffer);
}

void finish() {
    cuptiActivityFlushAll(1);
    std::fclose(out);
}

}  // namespace

extern "C" int InitializeInjection() {
    const char * path = std::getenv("CUDA_TRACE");
    out = std::fopen(path ? path : "trace.tsv", "w");
    if (!out) {
        std::fprintf(stderr, "cuda_trace: %s cannot be written; name another file in CUDA_TRACE\n", path ? path : "trace.tsv");
        return 1;
    }
    cuptiActivityRegisterCallbacks(give_buffer, take_buffer);
    cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMCPY);
    if (cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) != CUPTI_SUCCESS) std::fprintf(stderr, "cuda_trace: CUPTI gives no kernels here\n");
    std::atexit(finish);
    return 1;
}
