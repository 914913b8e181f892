// Attention of many queries, in two steps for each chunk of pages: the pages are unpacked into F16 once, for all queries, then a kernel does nothing
// but multiply. Chunks are as large as the room for unpacked pages. What a row has summed up waits between chunks in global memory.
//
// Unpacked pages are tiles of 64 cells, dimension by dimension, in the order of layout.cuh and as shared memory wants them: a line of 64 halves per
// dimension, whose unit u of 16 bytes stands at u ^ (dimension % 8). Lines and columns then hit all banks, and a tile is one piece to copy.
#include "prefill.cuh"

#include "attention_tiles.cuh"
#include "common.cuh"
#include "hopper.cuh"

#include <algorithm>

namespace mixkvq::cuda {

namespace {

constexpr size_t kUnpackedBytes = size_t(64) << 20;
constexpr int kRows = 128, kWarps = kRows / 16, kThreads = 32 * kWarps;
constexpr int kFewRows = 128;  // query vectors of a KV head up to which unpacking for one tile is not worth a detour through memory
constexpr int kUnpackThreads = 128;

// Weights are 2^(z - reference) * 2^kLift: the reference follows the maximum only when it is kSlack below, so that sums are seldom rescaled; weights
// stay below 2^15, and small ones keep their digits as halves.
constexpr int kLift = 7, kSlack = 8;

struct Chunk {
    __half * keys, * values;  // [stream][KV head][half page of the chunk][dimension][64 cells]
    int first, n_pages;
    bool opens, closes;  // the call
};

__device__ __forceinline__ __half * tiles_of(__half * base, const Attention & call, const Chunk & chunk, int stream, int kv, int head_size) {
    return base + (size_t(stream) * call.n_kv_heads + kv) * chunk.n_pages * kPageCells * head_size;
}
__device__ __forceinline__ const uint8_t * sight_of(const Attention & call, const Cut & cut, int stream, int kv) {
    return cut.sight + size_t(n_masks(call) == 1 ? stream : stream * call.n_kv_heads + kv) * cut.n_tiles * cut.n_pages;
}

// --- unpacking ------------------------------------------------------------------------------------------------

// tile_of_rows in the rotated basis; a warp takes a token.
__device__ __forceinline__ void tile_of_rotated_rows(const __half * rows, int row, int head_size, int n_cells, int part_of_page, __half * tile) {
    for (int column = threadIdx.x / 32; column < kTileCells; column += kUnpackThreads / 32) {
        const int cell = kTileCells * part_of_page + tile_token(column);
        float x[kMaxHeadSize / 32];
#pragma unroll
        for (int i = 0; i < kMaxHeadSize / 32; ++i) {
            const int d = lane() + 32 * i;
            x[i] = d < head_size && cell < n_cells ? __half2float(rows[size_t(cell) * row + d]) : 0.0f;
        }
        rotate(x, head_size & -head_size);
#pragma unroll
        for (int i = 0; i < kMaxHeadSize / 32; ++i) {
            const int d = lane() + 32 * i;
            if (d < head_size) tile[d * kTilePitch + column] = __float2half_rn(fminf(fmaxf(x[i], -65504.0f), 65504.0f));
        }
    }
}

// grid: half pages, KV heads, streams * (keys, values). Values of a rotated head stay, or get, in the rotated basis.
__global__ void __launch_bounds__(kUnpackThreads) unpack_kernel(const Attention call, const Cut cut, const Chunk chunk) {
    extern __shared__ uint4 memory[];
    __half * const tile = reinterpret_cast<__half *>(memory);
    const int page = chunk.first + blockIdx.x / 2, part_of_page = blockIdx.x % 2, kv = blockIdx.y, stream = blockIdx.z / 2;
    const bool values = blockIdx.z % 2;

    const uint8_t * sight = sight_of(call, cut, stream, kv) + page;
    bool seen = false;
    for (int i = threadIdx.x; i < cut.n_tiles; i += kUnpackThreads) seen |= sight[size_t(i) * cut.n_pages] != kUnseen;
    if (!__syncthreads_or(seen)) return;

    const PageRef ref = (values ? call.value_pages : call.key_pages)[stream * call.page_stride + page];
    const int n_cells = call.n_kv - page * kPageCells, n = values ? call.head_size_v : call.head_size_k, row = values ? call.row_v : call.row_k;
    const __half * rows = reinterpret_cast<const __half *>(ref.rows) + kv * n;
    if (values) {
        const ValueHead & head = call.value_heads[kv];
        const ValueFormat format = head.format;
        if (ref.records) {
            tile_of_values<kUnpackThreads>(format, ValuePlaces(format), ref.records + head.record_offset, part_of_page, tile);
        } else if (format.group == 0) {
            tile_of_rotated_rows(rows, row, n, n_cells, part_of_page, tile);
        } else {
            tile_of_rows<kUnpackThreads>(rows, row, n, n_cells, part_of_page, tile);
        }
    } else if (ref.records) {
        const KeyHead & head = call.key_heads[kv];
        tile_of_keys<kUnpackThreads>(KeyPlaces(head.format), ref.records + head.record_offset, part_of_page, tile);
    } else {
        tile_of_rows<kUnpackThreads>(rows, row, n, n_cells, part_of_page, tile);
    }
    __syncthreads();
    uint4 * to = reinterpret_cast<uint4 *>(tiles_of(values ? chunk.values : chunk.keys, call, chunk, stream, kv, n) + size_t(blockIdx.x) * kTileCells * n);
    for (int i = threadIdx.x; i < 8 * n; i += kUnpackThreads) {
        const int d = i / 8, unit = i % 8;
        to[8 * d + (unit ^ (d & 7))] = *reinterpret_cast<const uint4 *>(tile + d * kTilePitch + 8 * unit);
    }
}

// --- multiplying ----------------------------------------------------------------------------------------------

// Head sizes up to `size`, `cells` at a time. Two slots in shared memory take turns: one holds the keys of a step and the values of the step before.
template <int size, int cells>
struct Shape {
    static constexpr bool kQueriesInRegisters = size <= 128;
    static constexpr int kQueryPitch = size + 8;
    static constexpr int kTile = size * kTileCells, kTiles = cells / kTileCells, kSlot = 2 * kTiles * kTile;  // halfs
    static constexpr size_t kBytes = sizeof(__half) * (2 * kSlot + (kQueriesInRegisters ? 0 : kRows * kQueryPitch)) + 4 * sizeof(uint64_t);
};

__device__ __forceinline__ void copy_async(void * to, const void * from) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(__cvta_generic_to_global(from)) : "memory");
#else
    *static_cast<uint4 *>(to) = *static_cast<const uint4 *>(from);
#endif
}
__device__ __forceinline__ void copies_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// grid: tiles * splits, KV heads, streams.
template <int size, int cells>
__global__ void __launch_bounds__(kThreads, 1) prefill_kernel(const Attention call, const Cut cut, const Chunk chunk) {
    using S = Shape<size, cells>;
    constexpr bool kAsync = kHopper && size <= 128;
    constexpr int kSteps = size / 16, kWide = cells / 8, kParts = kPageCells / cells;
    extern __shared__ __align__(1024) uint4 memory[];
    __half * const slots = reinterpret_cast<__half *>(memory);
    __half * const query_tile = slots + 2 * S::kSlot;
    uint64_t * const full = reinterpret_cast<uint64_t *>(reinterpret_cast<uint8_t *>(memory) + S::kBytes) - 4, * const empty = full + 2;

    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, n8 = lane >> 2, j = lane & 3, m = lane >> 3, r = lane & 7;
    const int split = blockIdx.x % cut.n_splits, tile = cut.n_tiles - 1 - blockIdx.x / cut.n_splits;  // the last see most
    const int kv = blockIdx.y, stream = blockIdx.z, d_k = call.head_size_k, d_v = call.head_size_v, n_rows = call.n_tokens * cut.group;
    const int row0 = tile * kRows + 16 * warp + n8;  // this lane's rows: row0 and row0 + 8

    // A step is `cells` cells, counted from the first of the call.
    const uint8_t * sight = sight_of(call, cut, stream, kv) + size_t(tile) * cut.n_pages;
    const int end_page = min(chunk.first + min((split + 1) * cut.pages_per_split, chunk.n_pages), cut.n_pages), end = end_page * kParts;
    auto seen_from = [&](int step) {
        while (step < end && sight[step / kParts] == kUnseen) step = (step / kParts + 1) * kParts;
        return min(step, end);
    };
    int at = seen_from((chunk.first + split * cut.pages_per_split) * kParts);
    if (at >= end && !chunk.opens && !chunk.closes) return;

    // Dimensions from the head size to `size` stay zero; values that are not there yet are multiplied, too, in the first turn.
    for (int i = threadIdx.x; i < 2 * S::kSlot / 8; i += kThreads) memory[i] = make_uint4(0, 0, 0, 0);
    if (kAsync && threadIdx.x == 0) {
        for (int i = 0; i < 2; ++i) {
            barrier_init(full + i, 1);
            barrier_init(empty + i, kWarps);
        }
    }
    fence_async();
    __syncthreads();

    const __half * keys = tiles_of(chunk.keys, call, chunk, stream, kv, d_k);
    const __half * values = tiles_of(chunk.values, call, chunk, stream, kv, d_v);
    // Into the slot of turn n: keys of one step and values of another, unless they are at or beyond the end.
    auto load = [&](int n, int key_step, int value_step) {
        auto each = [&](auto && copy) {
            for (int what = 0; what < 2; ++what) {
                const int step = what ? value_step : key_step, d = what ? d_v : d_k;
                if (step >= end) continue;
                for (int t = 0; t < S::kTiles; ++t) {
                    copy(slots + (n & 1) * S::kSlot + (what * S::kTiles + t) * S::kTile,
                         (what ? values : keys) + size_t(S::kTiles * step + t - 2 * chunk.first) * kTileCells * d, d * kTileCells);
                }
            }
        };
        if constexpr (!kAsync) {
            each([&](__half * to, const __half * from, int n_halfs) {
                for (int i = 8 * threadIdx.x; i < n_halfs; i += 8 * kThreads) copy_async(to + i, from + i);
            });
        } else if (threadIdx.x == 0) {
            if (n >= 2) barrier_wait(empty + (n & 1), (n / 2 - 1) & 1);
            barrier_expect(full + (n & 1), 2 * cells * ((key_step < end ? d_k : 0) + (value_step < end ? d_v : 0)));
            each([&](__half * to, const __half * from, int n_halfs) { copy_bulk(to, from, 2 * n_halfs, full + (n & 1)); });
        }
        __syncwarp();
    };
    auto wait_for = [&](int n) {
        if (kAsync) {
            barrier_wait(full + (n & 1), (n / 2) & 1);
        } else {
            copies_wait();
            __syncthreads();  // the other slot, too, is no longer read
        }
    };
    if (at < end) load(0, at, end);

    // Queries become halves below 2^15, each row with its own power of two.
    uint32_t q[S::kQueriesInRegisters ? kSteps : 1][4];
    float factor[2], slope[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const RowPlace place(cut, kv, row0 + 8 * h < n_rows ? row0 + 8 * h : 0);
        const float * from = query_of(call, stream, place);
        float top = 0;
        for (int d = 2 * j; d < d_k; d += 8) top = fmaxf(top, fmaxf(fabsf(from[d]), fabsf(from[d + 1])));
        top = fmaxf(top, __shfl_xor_sync(kWarp, top, 1));
        top = fmaxf(top, __shfl_xor_sync(kWarp, top, 2));
        const int e = exponent_above(top);
        const float shrink = power(min(15 - e, 127));
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const int d = 16 * step + 8 * k + 2 * j;
                const uint32_t pair = d < d_k ? pack2(from[d] * shrink, from[d + 1] * shrink) : 0;
                if constexpr (S::kQueriesInRegisters) {
                    q[step][2 * k + h] = pair;
                } else {
                    *reinterpret_cast<uint32_t *>(query_tile + (16 * warp + n8 + 8 * h) * S::kQueryPitch + d) = pair;
                }
            }
        }
        factor[h] = call.scale * kLog2E * power(max(e - 15, -126));
        slope[h] = alibi_slope(call, place.head) * kLog2E;
    }

    // Where a row is kept between chunks and for the join.
    const size_t block = ((size_t(stream) * call.n_kv_heads + kv) * cut.n_tiles + tile) * cut.n_splits + split;
    float * const partial = cut.partial + block * (cut.n_splits == 1 ? 2 * kRows : partial_floats(cut, d_v));
    float * const maxima = partial + (cut.n_splits == 1 ? 0 : kRows * d_v);
    auto row_at = [&](int row) {
        if (cut.n_splits > 1) return partial + size_t(row - tile * kRows) * d_v;
        const RowPlace place(cut, kv, row);
        return call.out + stream * call.out_stream + place.head * call.out_head + place.token * call.out_token;
    };

    float acc[size / 8][4], reference[2] = {minus_infinity(), minus_infinity()}, sum[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < size / 8; ++i) acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = 0;
    if (!chunk.opens) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = row0 + 8 * h;
            if (row >= n_rows) continue;
            reference[h] = maxima[row - tile * kRows];
            if (j == 0) sum[h] = maxima[row - tile * kRows + kRows];
            const float * from = row_at(row);
#pragma unroll
            for (int i = 0; i < size / 8; ++i) {
                if (8 * i >= d_v) continue;
                acc[i][2 * h] = from[8 * i + 2 * j];
                acc[i][2 * h + 1] = from[8 * i + 2 * j + 1];
            }
        }
    }

    float s[kWide][4];
    uint32_t p[kWide / 2][4] = {};
    auto multiply_keys = [&](const __half * keys) {
        if constexpr (kAsync) {
            multiply_begin();
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                multiply_wide<true>(s, q[step], matrix_of(keys + 16 * step * kTileCells, 2 * S::kTile), step > 0);
            }
            multiply_end();
        } else {
#pragma unroll
            for (int i = 0; i < kWide; ++i) s[i][0] = s[i][1] = s[i][2] = s[i][3] = 0;
            const __half * from = keys + ((m & 1) * 8 + r) * kTileCells;
            const __half * from_q = query_tile + (16 * warp + (m & 1) * 8 + r) * S::kQueryPitch + (m >> 1) * 8;
            const int unit = (m >> 1) ^ r;
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                uint32_t a[4];
                if constexpr (S::kQueriesInRegisters) {
#pragma unroll
                    for (int k = 0; k < 4; ++k) a[k] = q[step][k];
                } else {
                    load_matrices(a, from_q + 16 * step);
                }
#pragma unroll
                for (int i = 0; i < kWide / 2; ++i) {
                    uint32_t b[4];
                    load_transposed(b, from + i / 4 * S::kTile + 16 * step * kTileCells + 8 * (unit ^ (2 * i & 7)));
                    mma(s[2 * i], a[0], a[1], a[2], a[3], b[0], b[1]);
                    mma(s[2 * i + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
                }
            }
        }
    };
    auto multiply_values = [&](const __half * values) {
        if constexpr (kAsync) {
            multiply_begin();
#pragma unroll
            for (int k = 0; k < kWide / 2; ++k) multiply_wide<false>(acc, p[k], matrix_of(values + k / 4 * S::kTile + 16 * (k % 4)), true);
            multiply_end();
        } else {
            const __half * from = values + ((m >> 1) * 8 + r) * kTileCells;
            const int unit = (m & 1) ^ r;
#pragma unroll
            for (int k = 0; k < kWide / 2; ++k) {
#pragma unroll
                for (int i = 0; i < size / 16; ++i) {
                    uint32_t b[4];
                    load_matrices(b, from + k / 4 * S::kTile + 16 * i * kTileCells + 8 * (unit ^ (2 * k & 7)));
                    mma(acc[2 * i], p[k][0], p[k][1], p[k][2], p[k][3], b[0], b[1]);
                    mma(acc[2 * i + 1], p[k][0], p[k][1], p[k][2], p[k][3], b[2], b[3]);
                }
            }
        }
    };

    int n = 0;
    for (; at < end; ++n) {
        const Sight seen = Sight(sight[at / kParts]);
        const int next = seen_from(at + 1);
        wait_for(n);
        const __half * slot = slots + (n & 1) * S::kSlot;
        if (!kAsync) load(n + 1, next, at);
        multiply_keys(slot);
        multiply_values(slot + S::kTiles * S::kTile);
        if (kAsync) load(n + 1, next, at);  // may have to wait for slower warps
        if (kAsync) {
            multiply_wait<1>();
            fix_here(s);
        }

        // Scores become logits in units of log2: here where there is more to do than to multiply by the factor.
        float scale[2] = {factor[0], factor[1]};
        if (call.softcap > 0 || seen == kPackedMasked || seen == kHalfMasked) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int row = row0 + 8 * h;
                const __half * mask = call.mask ? mask_of(call, stream, RowPlace(cut, kv, min(row, n_rows - 1))) : nullptr;
#pragma unroll
                for (int i = 0; i < kWide; ++i) {
#pragma unroll
                    for (int k = 2 * h; k < 2 * h + 2; ++k) {
                        // Column 8i + 2j + e is token tile_token(..) of this tile.
                        const int cell = at * cells + i / 8 * kTileCells + tile_token(8 * (i % 8) + 2 * j + (k & 1));
                        float z = s[i][k] * factor[h];
                        if (call.softcap > 0) z = capped(call, z);
                        const float bias = cell >= call.n_kv ? minus_infinity() : mask ? __half2float(mask[cell]) : 0.0f;
                        s[i][k] = bias == minus_infinity() ? bias : z + slope[h] * bias;
                    }
                }
                scale[h] = 1;
            }
        }
        float lower[2];
        bool raised = false;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float top = fmaxf(s[0][2 * h], s[0][2 * h + 1]);
#pragma unroll
            for (int i = 1; i < kWide; ++i) top = fmaxf(top, fmaxf(s[i][2 * h], s[i][2 * h + 1]));
            top = fmaxf(top, __shfl_xor_sync(kWarp, top, 1));
            top = fmaxf(top, __shfl_xor_sync(kWarp, top, 2)) * scale[h];
            const bool raise = top > reference[h] + kSlack;
            lower[h] = raise ? exp2_of(reference[h] - top) : 1.0f;
            if (raise) reference[h] = top;
            raised |= raise;
            const float base = reference[h] == minus_infinity() ? 0.0f : reference[h] - kLift;
            sum[h] *= lower[h];
#pragma unroll
            for (int i = 0; i < kWide; ++i) {
                const float x = exp2_of(s[i][2 * h] * scale[h] - base), y = exp2_of(s[i][2 * h + 1] * scale[h] - base);
                sum[h] += x + y;
                s[i][2 * h] = x;
                s[i][2 * h + 1] = y;
            }
        }
        if (kAsync) {
            fix_here(s);
            compute_before_wait(n);  // weights are computed while values are multiplied
            multiply_wait<0>();
            fix_here(acc);
            if (lane == 0) barrier_arrive(empty + (n & 1));
        }
        if (__any_sync(kWarp, raised)) {
#pragma unroll
            for (int i = 0; i < size / 8; ++i) {
#pragma unroll
                for (int k = 0; k < 4; ++k) acc[i][k] *= lower[k >> 1];
            }
        }
#pragma unroll
        for (int i = 0; i < kWide; ++i) {
#pragma unroll
            for (int h = 0; h < 2; ++h) p[i / 2][2 * (i & 1) + h] = pack2(s[i][2 * h], s[i][2 * h + 1]);
        }
        at = next;
    }
    if (n > 0) {
        wait_for(n);
        multiply_values(slots + (n & 1) * S::kSlot + S::kTiles * S::kTile);
        if (kAsync) multiply_wait<0>();
        fix_here(acc);
    }

    if (chunk.closes && call.value_heads[kv].format.group == 0) rotate_accumulators<size>(acc, d_v);
    const float lift = chunk.closes ? power(-kLift) : 1.0f;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int row = row0 + 8 * h;
        sum[h] += __shfl_xor_sync(kWarp, sum[h], 1);
        sum[h] += __shfl_xor_sync(kWarp, sum[h], 2);
        sum[h] *= lift;
        if (row >= n_rows) continue;
        float scale = lift;
        if (chunk.closes && cut.n_splits == 1) {
            scale *= close_softmax(reference[h], sum[h], call.sinks ? call.sinks + RowPlace(cut, kv, row).head : nullptr);
        } else if (j == 0) {
            maxima[row - tile * kRows] = reference[h];
            maxima[row - tile * kRows + kRows] = sum[h];
        }
        float * to = row_at(row);
#pragma unroll
        for (int i = 0; i < size / 8; ++i) {
            if (8 * i >= d_v) continue;
            to[8 * i + 2 * j] = acc[i][2 * h] * scale;
            to[8 * i + 2 * j + 1] = acc[i][2 * h + 1] * scale;
        }
    }
}

// --- plan -----------------------------------------------------------------------------------------------------

using Kernel = void (*)(Attention, Cut, Chunk);

struct Plan {
    Cut cut = {};
    Kernel kernel = nullptr;
    size_t shared = 0;
    int chunk_pages = 0;
    size_t unpacked_k = 0, unpacked_v = 0, partial = 0, sight_bytes = 0;  // halfs, halfs, floats

    template <int size, int cells>
    bool take(size_t most_shared) {
        shared = Shape<size, cells>::kBytes;
        if (shared > most_shared) return false;
        kernel = prefill_kernel<size, cells>;
        return true;
    }
    size_t floats() const { return (unpacked_k + unpacked_v) / 2 + partial + (sight_bytes + 3) / 4; }
};

// A plan without a kernel: the call is not for this file.
Plan make_plan(const Attention & c) {
    Plan plan;
    Cut & cut = plan.cut;
    cut.group = c.n_heads / c.n_kv_heads;
    cut.n_pages = (c.n_kv + kPageCells - 1) / kPageCells;
    const int n_rows = c.n_tokens * cut.group;
    if (n_rows <= kFewRows || cut.n_pages == 0) return plan;

    int device = 0, n_sms = 1, most_shared = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&n_sms, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    const int size = std::max(c.head_size_k, c.head_size_v);
    const bool taken = size <= 64    ? plan.take<64, 128>(most_shared) || plan.take<64, 64>(most_shared)
                       : size <= 128 ? plan.take<128, 128>(most_shared) || plan.take<128, 64>(most_shared)
                       : size <= 192 ? plan.take<192, 64>(most_shared)
                                     : plan.take<256, 64>(most_shared);
    if (!taken) return plan;

    // Chunks of about the same size.
    const size_t page_k = size_t(c.n_streams) * c.n_kv_heads * kPageCells * c.head_size_k, page_v = page_k / c.head_size_k * c.head_size_v;
    const size_t room = (c.unpacked_bytes ? c.unpacked_bytes : kUnpackedBytes) / (2 * (page_k + page_v));
    const int most = int(std::max<size_t>(1, std::min<size_t>(room, cut.n_pages))), n_chunks = (cut.n_pages + most - 1) / most;
    plan.chunk_pages = (cut.n_pages + n_chunks - 1) / n_chunks;
    plan.unpacked_k = plan.chunk_pages * page_k;
    plan.unpacked_v = plan.chunk_pages * page_v;

    // Splits, where they leave fewer SMs without work.
    cut.rows = kRows;
    cut.n_tiles = (n_rows + kRows - 1) / kRows;
    const int blocks = cut.n_tiles * c.n_kv_heads * c.n_streams;
    auto time_of = [&](int splits) { return double((blocks * splits + n_sms - 1) / n_sms) / splits; };
    int wanted = 1;
    for (int splits = 2; blocks * splits <= 2 * n_sms; ++splits) {
        if (time_of(splits) < 0.95 * time_of(wanted)) wanted = splits;
    }
    cut.pages_per_split = (plan.chunk_pages + wanted - 1) / wanted;
    cut.n_splits = (plan.chunk_pages + cut.pages_per_split - 1) / cut.pages_per_split;
    plan.partial = size_t(blocks) * cut.n_splits * (cut.n_splits == 1 ? 2 * kRows : partial_floats(cut, c.head_size_v));
    plan.sight_bytes = size_t(c.n_streams) * n_masks(c) * cut.n_tiles * cut.n_pages;
    return plan;
}

}  // namespace

size_t prefill_workspace(const Attention & call) {
    const Plan plan = make_plan(call);
    return plan.kernel ? plan.floats() : 0;
}

bool prefill(cudaStream_t stream, const Attention & call) {
    Plan plan = make_plan(call);
    if (!plan.kernel) return false;
    Cut & cut = plan.cut;
    Chunk chunk = {};
    chunk.keys = reinterpret_cast<__half *>(call.workspace);
    chunk.values = chunk.keys + plan.unpacked_k;
    cut.partial = reinterpret_cast<float *>(chunk.values + plan.unpacked_v);
    cut.sight = reinterpret_cast<uint8_t *>(cut.partial + plan.partial);

    cudaFuncSetAttribute(reinterpret_cast<const void *>(plan.kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, int(plan.shared));
    const size_t unpack_bytes = sizeof(__half) * kTilePitch * std::max(call.head_size_k, call.head_size_v);
    find_sight(stream, call, cut);
    for (; chunk.first < cut.n_pages; chunk.first += plan.chunk_pages) {
        chunk.n_pages = std::min(plan.chunk_pages, cut.n_pages - chunk.first);
        chunk.opens = chunk.first == 0;
        chunk.closes = chunk.first + chunk.n_pages == cut.n_pages;
        unpack_kernel<<<dim3(2 * chunk.n_pages, call.n_kv_heads, 2 * call.n_streams), kUnpackThreads, unpack_bytes, stream>>>(call, cut, chunk);
        plan.kernel<<<dim3(cut.n_tiles * cut.n_splits, call.n_kv_heads, call.n_streams), kThreads, plan.shared, stream>>>(call, cut, chunk);
    }
    if (cut.n_splits > 1) join_splits(stream, call, cut);
    return true;
}

}  // namespace mixkvq::cuda
