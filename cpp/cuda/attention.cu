// Attention on the GPU: which kernel serves a call, how a call is cut into blocks, and the join of the splits.
#include "attention_tiles.cuh"
#include "decode.cuh"
#include "prefill.cuh"

#include <algorithm>
#include <atomic>

namespace mixkvq::cuda {

namespace {

constexpr int kTileSplitPages = 4;  // a split of a tile has no fewer pages
constexpr int kJoinWarps = 8;

// --- join of the splits ---------------------------------------------------------------------------------------

// grid: rows, KV heads, streams. Each split is a softmax over its pages with its own maximum.
__global__ void __launch_bounds__(32 * kJoinWarps) join_kernel(const Attention call, const Cut cut) {
    __shared__ float parts[kJoinWarps][kMaxHeadSize + 1];
    const int row = blockIdx.x, kv = blockIdx.y, stream = blockIdx.z, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int tile = row / cut.rows, local = row % cut.rows, dv = call.head_size_v;
    const size_t stride = partial_floats(cut, dv);
    const float * base = cut.partial + ((size_t(stream) * call.n_kv_heads + kv) * cut.n_tiles + tile) * cut.n_splits * stride;
    const float * maxima = base + size_t(cut.rows) * dv + local;

    float top = minus_infinity();
    for (int split = lane; split < cut.n_splits; split += 32) top = fmaxf(top, maxima[split * stride]);
    for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(kWarp, top, step));

    float acc[kMaxHeadSize / 32] = {}, sum = 0;
#pragma unroll 2
    for (int split = warp; split < cut.n_splits; split += kJoinWarps) {
        const float max = maxima[split * stride], weight = max == minus_infinity() ? 0.0f : exp2_of(max - top);
        const float * from = base + split * stride + size_t(local) * dv;
        sum += weight * maxima[split * stride + cut.rows];
#pragma unroll
        for (int k = 0; k < kMaxHeadSize / 32; ++k) {
            if (32 * k + lane < dv) acc[k] += weight * from[32 * k + lane];
        }
    }
#pragma unroll
    for (int k = 0; k < kMaxHeadSize / 32; ++k) parts[warp][32 * k + lane] = acc[k];
    if (lane == 0) parts[warp][kMaxHeadSize] = sum;
    __syncthreads();

    const RowPlace at(cut, kv, row);
    sum = 0;
    for (int w = 0; w < kJoinWarps; ++w) sum += parts[w][kMaxHeadSize];
    const float scale = close_softmax(top, sum, call.sinks ? call.sinks + at.head : nullptr);
    if (int(threadIdx.x) >= dv) return;
    float x = 0;
    for (int w = 0; w < kJoinWarps; ++w) x += parts[w][threadIdx.x];
    call.out[stream * call.out_stream + at.head * call.out_head + at.token * call.out_token + threadIdx.x] = x * scale;
}

// --- kernels --------------------------------------------------------------------------------------------------

using Kernel = void (*)(Attention, Cut);

// A kernel with its dynamic shared memory, and how many of its blocks an SM holds: asked once per device and size.
struct Entry {
    Kernel kernel;
    std::atomic<uint64_t> known[16];

    int blocks_per_sm(int device, int threads, size_t bytes) {
        std::atomic<uint64_t> & cell = known[device % 16];
        const uint64_t tag = uint64_t(device) << 40 | uint64_t(bytes) << 8, seen = cell.load(std::memory_order_relaxed);
        if ((seen & ~uint64_t(255)) == tag && (seen & 255) != 0) return int(seen & 255);
        const void * function = reinterpret_cast<const void *>(kernel);
        if (bytes > 48 * 1024) cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
        int n = 0;
        if (cudaOccupancyMaxActiveBlocksPerMultiprocessor(&n, function, threads, bytes) != cudaSuccess) n = 0;
        n = std::max(1, std::min(n, 255));
        cell.store(tag | uint64_t(n), std::memory_order_relaxed);
        return n;
    }
};

template <int size, int warps, bool shared_tile>
Entry & tile_entry(size_t & bytes) {
    static Entry entry{tile_kernel<size, warps, shared_tile>, {}};
    bytes = TileShape<size, warps, shared_tile>::kBytes;
    return entry;
}
template <int warps>
Entry & tile_entry(int head_size, size_t & bytes) {
    if (head_size <= 64) return tile_entry<64, warps, false>(bytes);
    if (head_size <= 96) return tile_entry<96, warps, false>(bytes);
    if (head_size <= 128) return tile_entry<128, warps, false>(bytes);
    if (head_size <= 192) return tile_entry<192, warps, false>(bytes);
    return tile_entry<256, warps, false>(bytes);
}

struct Plan {
    Cut cut;
    Kernel kernel;
    int threads;
    size_t bytes, sight_bytes, partial;
};

Plan make_plan(const Attention & c) {
    const Gpu gpu = current_gpu();
    const int most_bytes = gpu.shared - 256;  // less what kernels declare themselves

    Plan plan = {};
    Cut & cut = plan.cut;
    cut.group = c.n_heads / c.n_kv_heads;
    cut.n_pages = (c.n_kv + kPageCells - 1) / kPageCells;
    const int n_rows = c.n_tokens * cut.group, size = std::max(c.head_size_k, c.head_size_v);
    Entry * entry = nullptr;
    cut.rows = 128;
    if (n_rows > 64) entry = &tile_entry<8>(size, plan.bytes);
    if (!entry || plan.bytes > size_t(most_bytes)) {
        cut.rows = 64;
        entry = &tile_entry<4>(size, plan.bytes);
    }
    if (plan.bytes > size_t(most_bytes)) {
        cut.rows = 32;
        entry = &tile_entry<256, 2, true>(plan.bytes);
    }
    plan.threads = 2 * cut.rows;
    plan.kernel = entry->kernel;
    cut.n_tiles = (n_rows + cut.rows - 1) / cut.rows;

    // As many splits as fill the GPU once.
    const int blocks = cut.n_tiles * c.n_kv_heads * c.n_streams, slots = gpu.n_sms * entry->blocks_per_sm(gpu.device, plan.threads, plan.bytes);
    const int wanted = std::max(1, slots / std::max(1, blocks));
    cut.pages_per_split = std::max(kTileSplitPages, (cut.n_pages + wanted - 1) / wanted);
    cut.n_splits = std::max(1, (cut.n_pages + cut.pages_per_split - 1) / cut.pages_per_split);

    plan.partial = cut.n_splits == 1 ? 0 : size_t(blocks) * cut.n_splits * partial_floats(cut, c.head_size_v);
    plan.sight_bytes = size_t(c.n_streams) * n_masks(c) * cut.n_tiles * cut.n_pages;
    return plan;
}

}  // namespace

void find_sight(cudaStream_t stream, const Attention & call, const Cut & cut) {
    launch(sight_kernel, dim3(cut.n_pages, cut.n_tiles, call.n_streams * n_masks(call)), kPageCells, 0, stream, call, cut);
}

void join_splits(cudaStream_t stream, const Attention & call, const Cut & cut) {
    launch(join_kernel, dim3(call.n_tokens * cut.group, call.n_kv_heads, call.n_streams), 32 * kJoinWarps, 0, stream, call, cut);
}

size_t attention_workspace(const Attention & call) {
    if (const size_t floats = decode_workspace(call)) return floats;
    if (const size_t floats = prefill_workspace(call)) return floats;
    const Plan plan = make_plan(call);
    return plan.partial + (plan.sight_bytes + 3) / 4;
}

void attention(Stream stream, const Attention & call, const NewRows & rows) {
    if (decode(stream, call, &rows)) return;
    write_and_observe(stream, rows);
    attention(stream, call);
}

void attention(Stream stream, const Attention & call) {
    const cudaStream_t on = static_cast<cudaStream_t>(stream);
    if (call.n_tokens <= 0 || call.n_streams <= 0 || decode(stream, call) || prefill(on, call)) return;
    Plan plan = make_plan(call);
    Cut & cut = plan.cut;
    cut.partial = call.workspace;
    cut.sight = reinterpret_cast<uint8_t *>(call.workspace + plan.partial);
    if (cut.n_pages > 0) find_sight(on, call, cut);
    launch(plan.kernel, dim3(cut.n_tiles * cut.n_splits, call.n_kv_heads, call.n_streams), plan.threads, plan.bytes, on, call, cut);
    if (cut.n_splits > 1) join_splits(on, call, cut);
}

}  // namespace mixkvq::cuda
