// The kernels on a GPU. Attention: time of a layer, and packed bytes per second beside what a copy from device to device reaches (bytes read plus bytes
// written). Eight layers of memory of their own take turns, so that the L2 cache holds none of them when it is read again.
//
// `bench_cuda [depth...]`: decoding at these depths (default 4096 32768 131072), three pages of which are F16 and do not count as packed bytes, then
// prefill of 512 and 2048 tokens at depth 32768, and what brings tokens into a layer's pages.
// The numbers in the pages do not matter to the time: eight different pages, packed by the scalar kernels, repeat.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include <cuda_runtime.h>

#include "mixkvq/cuda.h"
#include "mixkvq/kernels.h"
#include "mixkvq/profile.h"

using namespace mixkvq;

namespace mixkvq {
const Kernels & scalar_kernels();
}

namespace {

constexpr int kLayers = 8, kHeads = 8, kGroup = 4, kSize = 128, kRow = kHeads * kSize, kRuns = 21;

void check(cudaError_t error, const char * what) {
    if (error == cudaSuccess) return;
    std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
    std::exit(1);
}

template <class T>
T * device(size_t n) {
    void * p = nullptr;
    check(cudaMalloc(&p, n * sizeof(T)), "cudaMalloc");
    return static_cast<T *>(p);
}
template <class T>
T * upload(const std::vector<T> & x) {
    T * p = device<T>(x.size());
    check(cudaMemcpy(p, x.data(), x.size() * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
    return p;
}

// Median milliseconds of what `run` puts on a stream, `n` times in a row. It is recorded before, as llama.cpp records a token, or not.
double time_of(int n, const std::function<void(cudaStream_t)> & run, bool recorded = true) {
    cudaStream_t stream;
    cudaEvent_t start, stop;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t recording = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
    check(cudaEventCreate(&start), "cudaEventCreate");
    check(cudaEventCreate(&stop), "cudaEventCreate");
    run(stream);  // what is done once, such as asking for shared memory
    check(cudaStreamSynchronize(stream), "run");
    if (recorded) {
        check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed), "cudaStreamBeginCapture");
        run(stream);
        check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
        check(cudaGraphInstantiate(&recording, graph, 0), "cudaGraphInstantiate");
    }
    std::vector<float> ms;
    for (int i = 0; i < kRuns + 3; ++i) {
        check(cudaEventRecord(start, stream), "cudaEventRecord");
        for (int k = 0; k < n; ++k) {
            if (recorded) {
                check(cudaGraphLaunch(recording, stream), "cudaGraphLaunch");
            } else {
                run(stream);
            }
        }
        check(cudaEventRecord(stop, stream), "cudaEventRecord");
        check(cudaEventSynchronize(stop), "run");
        float x = 0;
        check(cudaEventElapsedTime(&x, start, stop), "cudaEventElapsedTime");
        if (i >= 3) ms.push_back(x / n);
    }
    std::sort(ms.begin(), ms.end());
    if (recorded) {
        check(cudaGraphExecDestroy(recording), "cudaGraphExecDestroy");
        check(cudaGraphDestroy(graph), "cudaGraphDestroy");
    }
    check(cudaEventDestroy(start), "cudaEventDestroy");
    check(cudaEventDestroy(stop), "cudaEventDestroy");
    check(cudaStreamDestroy(stream), "cudaStreamDestroy");
    return ms[ms.size() / 2];
}

// A cache of one format. `n_half` pages are F16: the first one and the last ones, as in a model; if there is only one, the last one.
struct Cache {
    KeyFormat key;
    ValueFormat value;
    int n_pages, n_half;
    size_t key_bytes, value_bytes;  // of a page, all heads
    cuda::KeyHead * key_heads;
    cuda::ValueHead * value_heads;
    std::vector<cuda::PageRef *> key_pages, value_pages;  // by layer
    std::vector<void *> memory;

    Cache(const Preset & preset, int n_pages, int n_half) : key(key_format(preset, kSize)), value(value_format(preset, kSize)), n_pages(n_pages), n_half(n_half) {
        const Kernels & host = scalar_kernels();
        key_bytes = kHeads * key.record_bytes();
        value_bytes = kHeads * value.record_bytes();
        std::vector<cuda::KeyHead> kh;
        std::vector<cuda::ValueHead> vh;
        for (int h = 0; h < kHeads; ++h) {
            kh.push_back({key, uint32_t(h * key.record_bytes())});
            vh.push_back({value, uint32_t(h * value.record_bytes())});
        }
        key_heads = keep(upload(kh));
        value_heads = keep(upload(vh));

        constexpr int kKinds = 8;
        std::mt19937 rng(1);
        std::normal_distribution<float> gauss;
        std::vector<float> importance(kSize, 1.0f);
        std::vector<half> rows(size_t(kPageCells) * kRow);
        std::vector<uint8_t> records_k(kKinds * key_bytes + 64), records_v(kKinds * value_bytes + 64);
        auto aligned = [](std::vector<uint8_t> & x) { return reinterpret_cast<uint8_t *>((reinterpret_cast<uintptr_t>(x.data()) + 63) / 64 * 64); };
        for (int i = 0; i < kKinds; ++i) {
            for (half & x : rows) {
                const float y = gauss(rng);
                host.to_half(&y, &x, 1);
            }
            for (int h = 0; h < kHeads; ++h) {
                host.pack_keys(key, rows.data() + h * kSize, kRow, CellMask::all(), importance.data(), aligned(records_k) + i * key_bytes + kh[h].record_offset);
                host.pack_values(value, rows.data() + h * kSize, kRow, CellMask::all(), aligned(records_v) + i * value_bytes + vh[h].record_offset);
            }
        }
        const int n_packed = n_pages - n_half;
        const half * half_rows = keep(upload(rows));
        for (int layer = 0; layer < kLayers; ++layer) {
            uint8_t * k = keep(device<uint8_t>(std::max<size_t>(1, n_packed * key_bytes)));
            uint8_t * v = keep(device<uint8_t>(std::max<size_t>(1, n_packed * value_bytes)));
            std::vector<cuda::PageRef> kp(n_pages), vp(n_pages);
            for (int p = 0; p < n_packed; p += kKinds) {
                const size_t n = std::min(kKinds, n_packed - p);
                check(cudaMemcpy(k + p * key_bytes, aligned(records_k), n * key_bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
                check(cudaMemcpy(v + p * value_bytes, aligned(records_v), n * value_bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
            }
            for (int p = 0; p < n_pages; ++p) {
                const int i = n_half > 1 ? p - 1 : p;
                const bool packed = i >= 0 && i < n_packed;
                kp[p] = packed ? cuda::PageRef{k + i * key_bytes, nullptr} : cuda::PageRef{nullptr, half_rows};
                vp[p] = packed ? cuda::PageRef{v + i * value_bytes, nullptr} : cuda::PageRef{nullptr, half_rows};
            }
            key_pages.push_back(keep(upload(kp)));
            value_pages.push_back(keep(upload(vp)));
        }
    }
    ~Cache() {
        for (void * p : memory) cudaFree(p);
    }
    Cache(const Cache &) = delete;
    Cache & operator=(const Cache &) = delete;
    template <class T>
    T * keep(T * p) {
        memory.push_back(p);
        return p;
    }
};

// Milliseconds per layer, the layers in turns.
double time_attention(Cache & cache, int n_tokens) {
    cuda::Attention c = {};
    c.n_tokens = n_tokens, c.n_heads = kHeads * kGroup, c.n_kv_heads = kHeads, c.n_streams = 1, c.n_kv = cache.n_pages * kPageCells;
    c.head_size_k = c.head_size_v = kSize;
    c.scale = 1.0f / std::sqrt(float(kSize));
    c.q_head = kSize, c.q_token = kSize * c.n_heads, c.q_stream = c.q_token * n_tokens;
    c.out_head = kSize, c.out_token = c.q_token, c.out_stream = c.q_stream;
    c.mask_token = c.n_kv, c.mask_stream = c.mask_token * n_tokens;
    std::mt19937 rng(2);
    std::normal_distribution<float> gauss;
    std::vector<float> q(c.q_stream);
    for (float & x : q) x = gauss(rng);
    std::vector<half> mask(c.mask_stream);
    for (int t = 0; t < n_tokens; ++t) {
        for (int i = 0; i < c.n_kv; ++i) mask[t * c.mask_token + i] = i > c.n_kv - n_tokens + t ? 0xfc00 : 0;
    }
    float * dq = upload(q), * out = device<float>(c.out_stream);
    half * dmask = upload(mask);
    c.q = dq, c.out = out, c.mask = dmask;
    c.page_stride = cache.n_pages;
    c.key_heads = cache.key_heads, c.value_heads = cache.value_heads;
    c.row_k = c.row_v = kRow;
    c.most_n16 = cache.key.n16;
    c.any_grouped = !cache.value.rotated();
    c.most_key_bytes = int(cache.key.record_bytes()), c.most_value_bytes = int(cache.value.record_bytes());
    c.arrivals = upload(std::vector<uint32_t>(cuda::attention_arrivals(c)));
    c.workspace = device<float>(cuda::attention_workspace(c) + 1);
    const double ms = time_of(n_tokens <= 8 ? 8 : 1, [&](cudaStream_t stream) {
        for (int layer = 0; layer < kLayers; ++layer) {
            c.key_pages = cache.key_pages[layer], c.value_pages = cache.value_pages[layer];
            if (n_tokens <= 2) {
                cuda::attention(stream, c, cuda::NewRows{});  // as in a model, where a token's rows come with the call: may start as the kernel before ends
            } else {
                cuda::attention(stream, c);
            }
        }
    });
    check(cudaGetLastError(), "attention");
    for (void * p : {static_cast<void *>(dq), static_cast<void *>(out), static_cast<void *>(dmask), static_cast<void *>(c.workspace), static_cast<void *>(c.arrivals)}) {
        cudaFree(p);
    }
    return ms / kLayers;
}

// What brings tokens into a layer: microseconds, all of it in the L2 cache.
void print_storing() {
    constexpr int kJobs = 4, kQueries = kHeads * kGroup * kSize;
    const Cache cache(*find_preset("mix3.2"), 1, 0);
    std::mt19937 rng(3);
    std::normal_distribution<float> gauss;
    std::vector<half> numbers(size_t(kJobs) * kPageCells * kRow);
    for (half & x : numbers) {
        const float y = gauss(rng);
        scalar_kernels().to_half(&y, &x, 1);
    }
    half * rows = upload(numbers);
    uint8_t * k = device<uint8_t>(kJobs * cache.key_bytes), * v = device<uint8_t>(kJobs * cache.value_bytes);
    std::vector<cuda::PageJob> key_jobs, value_jobs;
    for (int i = 0; i < kJobs; ++i) {
        key_jobs.push_back({rows + size_t(i) * kPageCells * kRow, k + i * cache.key_bytes, CellMask::all()});
        value_jobs.push_back({rows + size_t(i) * kPageCells * kRow, v + i * cache.value_bytes, CellMask::all()});
    }
    cuda::PageJob * kj = upload(key_jobs), * vj = upload(value_jobs);
    float * importance = upload(std::vector<float>(kRow, 1.0f));
    const auto print = [](const char * what, int n, const std::function<void(cudaStream_t)> & run) {
        std::printf("%-22s %7d | %10.1f\n", what, n, 1e3 * time_of(8, run));
    };
    std::printf("\n%-22s %7s | %10s\n", "mix3.2", "number", "us / layer");
    print("pack pages of keys", kJobs, [&](cudaStream_t s) { cuda::pack_keys(s, cache.key_heads, kHeads, kSize, kRow, kj, kJobs, importance); });
    print("pack pages of values", kJobs, [&](cudaStream_t s) { cuda::pack_values(s, cache.value_heads, kHeads, kSize, kRow, vj, kJobs); });
    print("unpack pages of keys", kJobs, [&](cudaStream_t s) { cuda::unpack_keys(s, cache.key_heads, kHeads, kSize, kRow, kj, kJobs); });
    print("unpack pages of values", kJobs, [&](cudaStream_t s) { cuda::unpack_values(s, cache.value_heads, kHeads, kSize, kRow, vj, kJobs); });

    const auto zeros = [](int n) { return upload(std::vector<float>(n, 0.0f)); };
    const cuda::QuerySums sums = {zeros(kRow), zeros(kRow), zeros(kRow), zeros(1)};
    for (int n : {1, 512, 2048}) {
        float * q = upload(std::vector<float>(size_t(n) * kQueries, 0.5f));
        std::vector<half *> places(n);
        for (int i = 0; i < n; ++i) places[i] = rows + size_t(i % (kJobs * kPageCells)) * kRow;
        half ** destination = upload(places);
        print("sum up queries", n, [&](cudaStream_t s) { cuda::observe(s, {sums, q, kQueries, kSize, 0, n, 1, kHeads, kGroup, kSize, 8192.0f}); });
        print("write rows", n, [&](cudaStream_t s) { cuda::write_rows(s, {q, false, kQueries * sizeof(float), destination, n, kRow}); });
        cudaFree(q);
        cudaFree(destination);
    }
    for (void * p : {static_cast<void *>(rows), static_cast<void *>(k), static_cast<void *>(v), static_cast<void *>(kj), static_cast<void *>(vj),
                     static_cast<void *>(importance), static_cast<void *>(sums.abs), static_cast<void *>(sums.sqr), static_cast<void *>(sums.importance),
                     static_cast<void *>(sums.count)}) {
        cudaFree(p);
    }
}

double copy_bandwidth() {
    const size_t bytes = size_t(1) << 30;
    char * a = device<char>(bytes), * b = device<char>(bytes);
    check(cudaMemset(a, 1, bytes), "cudaMemset");
    // Not recorded: a copy in a graph reaches two thirds of this.
    const auto run = [&](cudaStream_t stream) { check(cudaMemcpyAsync(b, a, bytes, cudaMemcpyDeviceToDevice, stream), "cudaMemcpyAsync"); };
    const double ms = time_of(1, run, false);
    cudaFree(a);
    cudaFree(b);
    return 2.0 * double(bytes) / ms * 1e-6;
}

}  // namespace

int main(int argc, char ** argv) {
    int n_devices = 0;
    const char * why = cuda::unavailable();
    if (why || cudaGetDeviceCount(&n_devices) != cudaSuccess || n_devices == 0) {
        std::printf("skipped: %s\n", why ? why : "no GPU");
        return 77;
    }
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
    const double copy = copy_bandwidth();
    std::printf("%s, %d SMs; copy %.0f GB/s (read + written)\n", properties.name, properties.multiProcessorCount, copy);
    std::printf("%d query and %d KV heads of %d\n\n", kHeads * kGroup, kHeads, kSize);

    std::vector<int> depths;
    for (int i = 1; i < argc; ++i) depths.push_back(std::atoi(argv[i]));
    if (depths.empty()) depths = {4096, 32768, 131072};
    std::printf("%-9s %8s %7s | %10s %12s %8s | %14s\n", "format", "depth", "tokens", "us / layer", "packed GB/s", "of copy", "F16 bytes GB/s");
    for (const char * name : {"mix2.5", "mix3.2", "mix4.3"}) {
        for (int depth : depths) {
            const int n_pages = (depth + kPageCells - 1) / kPageCells;
            Cache cache(*find_preset(name), n_pages, std::min(3, n_pages / 2));
            for (int n_tokens : {1, 2, 4, 8, 16, 32}) {
                const double ms = time_attention(cache, n_tokens);
                const double gb = double(cache.n_pages - cache.n_half) * double(cache.key_bytes + cache.value_bytes) / ms * 1e-6;
                const double as_half = double(cache.n_pages) * kPageCells * kRow * 2 * 2 / ms * 1e-6;
                std::printf("%-9s %8d %7d | %10.1f %12.0f %7.0f%% | %14.0f\n", name, depth, n_tokens, 1e3 * ms, gb, 100 * gb / copy, as_half);
            }
        }
    }
    std::printf("\n%-9s %8s %7s | %10s %10s\n", "format", "depth", "tokens", "ms / layer", "TFLOP/s");
    for (const char * name : {"mix2.5", "mix3.2", "mix4.3"}) {
        for (int n_tokens : {512, 2048}) {
            const int depth = 32768;
            Cache cache(*find_preset(name), (depth + n_tokens) / kPageCells, n_tokens / kPageCells);
            const double ms = time_attention(cache, n_tokens);
            std::printf("%-9s %8d %7d | %10.3f %10.0f\n", name, depth, n_tokens, ms, 4.0 * n_tokens * (depth + n_tokens / 2.0) * kHeads * kGroup * kSize / ms * 1e-9);
        }
    }
    print_storing();
    return 0;
}
