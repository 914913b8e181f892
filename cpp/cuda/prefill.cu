// Attention of many queries, in two steps for each chunk of pages: the pages are unpacked into F16 once, for all queries, then a kernel does nothing
// but multiply. Chunks are as large as the room for unpacked pages. What a row has summed up waits between chunks in global memory.
//
// Unpacked pages are tiles of 64 cells, dimension by dimension, in the order of layout.cuh and as shared memory wants them: a line of 64 halves per
// dimension, whose unit u of 16 bytes stands at u ^ (dimension % 8). Lines and columns then hit all banks, and a tile is one piece to copy.
#include "prefill.cuh"

#include "attention_tiles.cuh"
#include "hopper.cuh"

#include <algorithm>

namespace mixkvq::cuda {

namespace {

constexpr size_t kUnpackedBytes = size_t(64) << 20;
constexpr int kRows = 128, kWarps = kRows / 16, kThreads = 32 * kWarps;
constexpr int kFewRows = 32;  // query vectors of a KV head up to which unpacking is not worth a detour through memory
constexpr int kMostPages = 512;  // of a chunk
constexpr int kUnpackThreads = 128;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kUnpackBlocks = 8;  // on an SM: what 1024 threads are
#else
constexpr int kUnpackBlocks = 12;
#endif

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

// tile_of_rows in the rotated basis; a lane has eight dimensions of a token.
__device__ __forceinline__ void tile_of_rotated_rows(const __half * rows, int row, int head_size, int n_cells, int part_of_page, __half * tile) {
    const int lanes = head_size <= 128 ? 16 : 32, d = threadIdx.x % lanes * 8, block = head_size & -head_size;
    const float norm = rsqrtf(float(block));
#pragma unroll 4
    for (int column = threadIdx.x / lanes; column < kTileCells; column += kUnpackThreads / lanes) {
        const int cell = kTileCells * part_of_page + tile_token(column);
        uint4 in = make_uint4(0, 0, 0, 0);
        if (d < head_size && cell < n_cells) in = *reinterpret_cast<const uint4 *>(rows + size_t(cell) * row + d);
        float x[8];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const float2 pair = __half22float2(as_half2(part(in, k)));
            x[2 * k] = pair.x * norm;
            x[2 * k + 1] = pair.y * norm;
        }
#pragma unroll
        for (int step = 1; step < 8; step *= 2) {
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                if (k & step) continue;
                const float a = x[k], b = x[k + step];
                x[k] = a + b;
                x[k + step] = a - b;
            }
        }
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            if (8 * step >= block) break;
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                const float other = __shfl_xor_sync(kWarp, x[k], step);
                x[k] = threadIdx.x & step ? other - x[k] : x[k] + other;
            }
        }
        if (d >= head_size) continue;
#pragma unroll
        for (int k = 0; k < 8; ++k) tile[(d + k) * kTilePitch + column] = __float2half_rn(fminf(fmaxf(x[k], -65504.0f), 65504.0f));
    }
}

// grid: half pages, KV heads, streams * (keys, values). Values of a rotated head stay, or get, in the rotated basis.
__global__ void __launch_bounds__(kUnpackThreads, kUnpackBlocks) unpack_kernel(const Attention call, const Cut cut, const Chunk chunk) {
    MIXKVQ_DYNAMIC_SHARED(memory, 16);
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

// Head sizes up to `size`, `cells` cells a turn. Slots of shared memory are filled ahead: of turn n, its keys and the values of the turn before.
template <int size, int cells>
struct Shape {
    static constexpr bool kQueriesInRegisters = size <= 128;
    static constexpr int kQueryPitch = size + 8;
    static constexpr int kTile = size * kTileCells, kTiles = cells / kTileCells, kSlot = 2 * kTiles * kTile;  // halfs
    static constexpr int kSlots = cells == kPageCells ? 3 : 2;
    struct Memory {
        __half slots[kSlots][kSlot];
        __half queries[kQueriesInRegisters ? 8 : kRows * kQueryPitch];
        uint64_t full[kSlots], empty[kSlots];
        uint16_t seen[kMostPages];  // pages of the chunk that the tile sees: 2 * page, + 1 where it has to look at the mask
        int n_seen;
    };
};

// grid: tiles * splits, KV heads, streams.
template <int size, int cells>
__global__ void __launch_bounds__(kThreads, 1) prefill_kernel(const Attention call, const Cut cut, const Chunk chunk) {
    using S = Shape<size, cells>;
    constexpr bool kAsync = kHopper && cells == kPageCells;
    constexpr int kSteps = size / 16, kWide = cells / 8, kParts = kPageCells / cells;
    MIXKVQ_DYNAMIC_SHARED(lines, 1024);
    typename S::Memory & shared = *reinterpret_cast<typename S::Memory *>(lines);

    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, n8 = lane >> 2, j = lane & 3, m = lane >> 3, r = lane & 7;
    const int split = blockIdx.x % cut.n_splits, tile = cut.n_tiles - 1 - blockIdx.x / cut.n_splits;  // the last see most
    const int kv = blockIdx.y, stream = blockIdx.z, d_k = call.head_size_k, d_v = call.head_size_v, n_rows = call.n_tokens * cut.group;
    const int row0 = tile * kRows + 16 * warp + n8;  // this lane's rows: row0 and row0 + 8

    if (warp == 0) {
        const uint8_t * sight = sight_of(call, cut, stream, kv) + size_t(tile) * cut.n_pages + chunk.first;
        const int first = split * cut.pages_per_split, last = min(first + cut.pages_per_split, chunk.n_pages);
        int n = 0;
        for (int page = first + lane; page - lane < last; page += 32) {
            const int is = page < last ? sight[page] : kUnseen;
            const unsigned seen = __ballot_sync(kWarp, is != kUnseen);
            if (is != kUnseen) shared.seen[n + __popc(seen & ((1u << lane) - 1))] = uint16_t(2 * page + (is == kPackedMasked || is == kHalfMasked));
            n += __popc(seen);
        }
        if (lane == 0) {
            shared.n_seen = n;
            for (int i = 0; i < S::kSlots; ++i) {
                barrier_init(shared.full + i, 1);
                barrier_init(shared.empty + i, kWarps);
            }
        }
    }
    // Dimensions from the head size to `size` stay zero; of the first slot the values, too, which are multiplied before there are any.
    const bool whole = d_k < size || d_v < size;
    for (int i = threadIdx.x + (whole ? 0 : S::kSlot / 16); i < (whole ? S::kSlots : 1) * S::kSlot / 8; i += kThreads) lines[i] = make_uint4(0, 0, 0, 0);
    fence_async();
    __syncthreads();
    const int n_turns = shared.n_seen * kParts;
    if (n_turns == 0 && !chunk.opens && !chunk.closes) return;

    const __half * keys = tiles_of(chunk.keys, call, chunk, stream, kv, d_k);
    const __half * values = tiles_of(chunk.values, call, chunk, stream, kv, d_v);
    auto load = [&](int n) {
        auto each = [&](auto && copy) {
            for (int what = 0; what < 2; ++what) {
                const int turn = n - what, d = what ? d_v : d_k;
                if (turn < 0 || turn >= n_turns) continue;
                const int half_page = (shared.seen[turn / kParts] & ~1) + turn % kParts;
                for (int t = 0; t < S::kTiles; ++t) {
                    copy(shared.slots[n % S::kSlots] + (what * S::kTiles + t) * S::kTile, (what ? values : keys) + size_t(half_page + t) * kTileCells * d,
                         d * kTileCells);
                }
            }
        };
        if constexpr (!kAsync) {
            each([&](__half * to, const __half * from, int n_halfs) {
                for (int i = 8 * threadIdx.x; i < n_halfs; i += 8 * kThreads) copy_async(to + i, from + i);
            });
            copies_end();
        } else if (threadIdx.x == 0 && n <= n_turns) {
            uint64_t * full = shared.full + n % S::kSlots;
            if (n >= S::kSlots) barrier_wait(shared.empty + n % S::kSlots, (n / S::kSlots - 1) & 1);
            barrier_expect(full, 2 * cells * ((n < n_turns ? d_k : 0) + (n > 0 ? d_v : 0)));
            each([&](__half * to, const __half * from, int n_halfs) { copy_bulk(to, from, 2 * n_halfs, full); });
        }
    };
    auto wait_for = [&](int n) {
        if (kAsync) {
            barrier_wait(shared.full + n % S::kSlots, (n / S::kSlots) & 1);
        } else {
            copies_wait<S::kSlots - 2>();
            __syncthreads();  // the slot before is no longer read
        }
    };
    if (n_turns > 0) {
        for (int n = 0; n < S::kSlots - 1; ++n) load(n);
    }

    // Queries become halves below 2^15, each row with its own power of two.
    uint32_t q[S::kQueriesInRegisters ? kSteps : 1][4];
    float factor[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const float * from = query_of(call, stream, RowPlace(cut, kv, min(row0 + 8 * h, n_rows - 1))) + 2 * j;
        float x[size / 8][2], top = 0;
#pragma unroll
        for (int i = 0; i < size / 8; ++i) {
            x[i][0] = 8 * i < d_k ? from[8 * i] : 0.0f;
            x[i][1] = 8 * i < d_k ? from[8 * i + 1] : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < size / 8; ++i) top = fmaxf(top, fmaxf(fabsf(x[i][0]), fabsf(x[i][1])));
        top = fmaxf(top, __shfl_xor_sync(kWarp, top, 1));
        top = fmaxf(top, __shfl_xor_sync(kWarp, top, 2));
        const int e = exponent_above(top);
        const float shrink = power(min(15 - e, 127));
#pragma unroll
        for (int i = 0; i < size / 8; ++i) {
            const uint32_t pair = pack2(x[i][0] * shrink, x[i][1] * shrink);
            if constexpr (S::kQueriesInRegisters) {
                q[i / 2][2 * (i % 2) + h] = pair;
            } else {
                *reinterpret_cast<uint32_t *>(shared.queries + (16 * warp + n8 + 8 * h) * S::kQueryPitch + 8 * i + 2 * j) = pair;
            }
        }
        factor[h] = call.scale * kLog2E * power(max(e - 15, -126));
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
    const bool in_pairs = cut.n_splits > 1 || ((reinterpret_cast<uintptr_t>(call.out) / 4 | call.out_stream | call.out_head | call.out_token) & 1) == 0;

    float acc[size / 8][4], reference[2] = {minus_infinity(), minus_infinity()}, sum[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < size / 8; ++i) acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = 0;
    if (!chunk.opens) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = min(row0 + 8 * h, n_rows - 1);
            const float * from = row_at(row) + 2 * j;
#pragma unroll
            for (int i = 0; i < size / 8; ++i) {
                if (8 * i >= d_v) continue;
                float2 x;
                if (in_pairs) {
                    x = *reinterpret_cast<const float2 *>(from + 8 * i);
                } else {
                    x = make_float2(from[8 * i], from[8 * i + 1]);
                }
                acc[i][2 * h] = x.x;
                acc[i][2 * h + 1] = x.y;
            }
            reference[h] = maxima[row - tile * kRows];
            if (j == 0) sum[h] = maxima[row - tile * kRows + kRows];
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
            const __half * from_q = shared.queries + (16 * warp + (m & 1) * 8 + r) * S::kQueryPitch + (m >> 1) * 8;
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

    // On Hopper the two groups of four warps multiply in turns: while one does, the other computes weights.
    const int half_block = warp / 4;
    if (kAsync && half_block == 1) turn_next(0);
    for (int n = 0; n < n_turns; ++n) {
        const int seen = shared.seen[n / kParts];
        const __half * slot = shared.slots[n % S::kSlots];
        wait_for(n);
        if (!kAsync) load(n + S::kSlots - 1);
        if (kAsync) turn_wait(half_block);
        multiply_keys(slot);
        multiply_values(slot + S::kTiles * S::kTile);
        if (kAsync) {
            turn_next(half_block ^ 1);
            multiply_wait<1>();
            fix_here(s);
        }

        // Scores become logits in units of log2: here where there is more to do than to multiply by the factor.
        float scale[2] = {factor[0], factor[1]};
        if (call.softcap > 0 || seen % 2) {
            const int cell0 = (chunk.first + seen / 2) * kPageCells + n % kParts * cells;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const RowPlace place(cut, kv, min(row0 + 8 * h, n_rows - 1));
                const __half * mask = call.mask ? mask_of(call, stream, place) : nullptr;
                const float slope = alibi_slope(call, place.head) * kLog2E;
#pragma unroll
                for (int i = 0; i < kWide; ++i) {
#pragma unroll
                    for (int k = 2 * h; k < 2 * h + 2; ++k) {
                        const int cell = cell0 + i / 8 * kTileCells + tile_token(8 * (i % 8) + 2 * j + (k & 1));
                        float z = s[i][k] * factor[h];
                        if (call.softcap > 0) z = capped(call, z);
                        const float bias = cell >= call.n_kv ? minus_infinity() : mask ? __half2float(mask[cell]) : 0.0f;
                        s[i][k] = bias == minus_infinity() ? bias : z + slope * bias;
                    }
                }
                scale[h] = 1;
            }
        }
        float most[2][4], base[2], lower[2];  // four at a time do not wait for each other
        bool raised = false;
#pragma unroll
        for (int i = 0; i < kWide; i += 2) {
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                float & x = most[k / 2 % 2][k / 4 * 2 + k % 2];
                x = i == 0 ? s[k / 4][k % 4] : fmaxf(x, s[i + k / 4][k % 4]);
            }
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float top = fmaxf(fmaxf(most[h][0], most[h][1]), fmaxf(most[h][2], most[h][3]));
            top = fmaxf(top, __shfl_xor_sync(kWarp, top, 1));
            top = fmaxf(top, __shfl_xor_sync(kWarp, top, 2)) * scale[h];
            const bool raise = top > reference[h] + kSlack;
            lower[h] = raise ? exp2_of(reference[h] - top) : 1.0f;
            if (raise) reference[h] = top;
            raised |= raise;
            base[h] = reference[h] == minus_infinity() ? 0.0f : reference[h] - kLift;
            sum[h] *= lower[h];
        }
        auto weigh = [&](int h) {
#pragma unroll
            for (int i = 0; i < kWide; ++i) {
                const float x = exp2_of(s[i][2 * h] * scale[h] - base[h]), y = exp2_of(s[i][2 * h + 1] * scale[h] - base[h]);
                sum[h] += x + y;
                s[i][2 * h] = x;
                s[i][2 * h + 1] = y;
            }
        };
        weigh(0);
        if (kAsync) {
            fix_here(s);
            load(n + S::kSlots - 1);  // may have to wait for the other warps
            multiply_wait<0>();
            fix_here(acc);
            if (lane == 0) barrier_arrive(shared.empty + n % S::kSlots);
        }
        if (__any_sync(kWarp, raised)) {
#pragma unroll
            for (int i = 0; i < size / 8; ++i) {
#pragma unroll
                for (int k = 0; k < 4; ++k) acc[i][k] *= lower[k >> 1];
            }
        }
        weigh(1);
#pragma unroll
        for (int i = 0; i < kWide; ++i) {
#pragma unroll
            for (int h = 0; h < 2; ++h) p[i / 2][2 * (i & 1) + h] = pack2(s[i][2 * h], s[i][2 * h + 1]);
        }
    }
    if (kAsync && half_block == 0) turn_wait(0);
    if (n_turns > 0) {
        wait_for(n_turns);
        multiply_values(shared.slots[n_turns % S::kSlots] + S::kTiles * S::kTile);
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
        float * to = row_at(row) + 2 * j;
#pragma unroll
        for (int i = 0; i < size / 8; ++i) {
            if (8 * i >= d_v) continue;
            const float2 x = make_float2(acc[i][2 * h] * scale, acc[i][2 * h + 1] * scale);
            if (in_pairs) {
                *reinterpret_cast<float2 *>(to + 8 * i) = x;
            } else {
                to[8 * i] = x.x;
                to[8 * i + 1] = x.y;
            }
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
        shared = sizeof(typename Shape<size, cells>::Memory);
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

    const Gpu gpu = current_gpu();
    const int n_sms = gpu.n_sms, most_shared = gpu.shared;
    const int size = std::max(c.head_size_k, c.head_size_v);
    const bool taken = size <= 64    ? plan.take<64, 128>(most_shared) || plan.take<64, 64>(most_shared)
                       : size <= 128 ? plan.take<128, 128>(most_shared) || plan.take<128, 64>(most_shared)
                       : size <= 192 ? plan.take<192, 64>(most_shared)
                                     : plan.take<256, 64>(most_shared);
    if (!taken) return plan;

    // Chunks of about the same size.
    const size_t page_k = size_t(c.n_streams) * c.n_kv_heads * kPageCells * c.head_size_k, page_v = page_k / c.head_size_k * c.head_size_v;
    const size_t room = (c.unpacked_bytes ? c.unpacked_bytes : kUnpackedBytes) / (2 * (page_k + page_v));
    const int most = int(std::max<size_t>(1, std::min<size_t>(room, kMostPages))), n_chunks = (cut.n_pages + most - 1) / most;
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
        launch(unpack_kernel, dim3(2 * chunk.n_pages, call.n_kv_heads, 2 * call.n_streams), kUnpackThreads, unpack_bytes, stream, call, cut, chunk);
        launch(plan.kernel, dim3(cut.n_tiles * cut.n_splits, call.n_kv_heads, call.n_streams), kThreads, plan.shared, stream, call, cut, chunk);
    }
    if (cut.n_splits > 1) join_splits(stream, call, cut);
    return true;
}

}  // namespace mixkvq::cuda
