// Attention of many queries, and of every format: a page's keys and values are decoded once for a whole block into shared memory, as halves
// (the numbers unpack gives), then multiplied by tensor cores. Decoding half a page of one kind overlaps with multiplying the other: odd warps do
// one first, even warps the other.
#pragma once

#include "attention_common.cuh"

namespace mixkvq::cuda {

constexpr int kTilePitch = kTileCells + 8;  // halves from dimension to dimension: eight rows hit all banks

__device__ __forceinline__ uint32_t join_low(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }
__device__ __forceinline__ uint32_t join_high(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }

__device__ __forceinline__ __half2 clamp_top(__half2 x) { return __hmin2(x, as_half2(0x7bff7bffu)); }
__device__ __forceinline__ __half2 clamp_both(__half2 x) { return __hmax2(clamp_top(x), as_half2(0xfbfffbffu)); }

// --- keys -----------------------------------------------------------------------------------------------------

// Four channels at the tokens 8s + t8, s = 0 to 3, of a run of 32 tokens.
template <int bits>
__device__ __forceinline__ void store_quad(const Codes<bits> & codes, __half2 scale02, __half2 scale13, __half2 min02, __half2 min13, uint32_t order,
                                           __half * tile) {
    uint32_t even[4], odd[4];
#pragma unroll
    for (int s = 0; s < 4; ++s) {
        codes.plain(s, even[s], odd[s]);
        even[s] = as_bits(clamp_top(__hfma2(integers(even[s]), scale02, min02)));
        odd[s] = as_bits(clamp_top(__hfma2(integers(odd[s]), scale13, min13)));
    }
    auto put = [&](uint32_t d, uint32_t a, uint32_t b) { *reinterpret_cast<uint2 *>(tile + d * kTilePitch) = make_uint2(a, b); };
    put(order & 255, join_low(even[0], even[1]), join_low(even[2], even[3]));
    put((order >> 8) & 255, join_low(odd[0], odd[1]), join_low(odd[2], odd[3]));
    put((order >> 16) & 255, join_high(even[0], even[1]), join_high(even[2], even[3]));
    put(order >> 24, join_high(odd[0], odd[1]), join_high(odd[2], odd[3]));
}

template <int threads>
__device__ __forceinline__ void tile_of_keys(const KeyPlaces & f, const uint8_t * record, int part_of_page, __half * tile) {
    const int n_items = 16 * (f.q16 + f.coded());
#pragma unroll 2
    for (int item = threadIdx.x; item < n_items; item += threads) {
        int q = item >> 4;
        const int run = (item >> 3) & 1, t8 = item & 7, block = 2 * part_of_page + run;  // block: of 32 tokens
        const uint32_t order = *reinterpret_cast<const uint32_t *>(record + f.order + 4 * q);
        __half * to = tile + 32 * run + 4 * t8;
        if (q < f.q16) {
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const unsigned short * from = reinterpret_cast<const unsigned short *>(record) + (4 * q + r) * kPageCells + 32 * block + t8;
                *reinterpret_cast<uint2 *>(to + ((order >> 8 * r) & 255) * kTilePitch) =
                    make_uint2(from[0] | uint32_t(from[8]) << 16, from[16] | uint32_t(from[24]) << 16);
            }
            continue;
        }
        q -= f.q16;
        __half2 s02, s13, m02, m13;
        if (f.groups == 1) {
            const uint2 s = *reinterpret_cast<const uint2 *>(record + f.scale + 8 * q);
            const uint2 m = *reinterpret_cast<const uint2 *>(record + f.min + 8 * q);
            s02 = as_half2(join_low(s.x, s.y));
            s13 = as_half2(join_high(s.x, s.y));
            m02 = as_half2(join_low(m.x, m.y));
            m13 = as_half2(join_high(m.x, m.y));
        } else {
            const int n = f.groups, at = 4 * q * n + (f.groups == 4 ? block : block >> 1);
            const __half * s = reinterpret_cast<const __half *>(record + f.scale) + at;
            const __half * m = reinterpret_cast<const __half *>(record + f.min) + at;
            s02 = __halves2half2(s[0], s[2 * n]);
            s13 = __halves2half2(s[n], s[3 * n]);
            m02 = __halves2half2(m[0], m[2 * n]);
            m13 = __halves2half2(m[n], m[3 * n]);
        }
        const uint32_t * words = reinterpret_cast<const uint32_t *>(record);
        if (q < f.q8) {
            const uint32_t * w = words + f.at8 / 4 + 128 * q + 32 * block + t8;
            store_quad(Codes<8>{{w[0], w[8], w[16], w[24]}}, s02, s13, m02, m13, order, to);
            continue;
        }
        q -= f.q8;
        if (q < f.q4) {
            const uint32_t * w = words + f.at4 / 4 + 64 * q + 16 * block + t8;
            store_quad(Codes<4>{{w[0], w[8]}}, s02, s13, m02, m13, order, to);
            continue;
        }
        q -= f.q4;
        if (q < f.q3) {
            const uint32_t * w = words + f.at3 / 4 + 48 * q + t8;
            store_quad(Codes<3>{{w[8 * block], w[32 + 8 * (block >> 1)] >> 4 * (block & 1)}}, s02, s13, m02, m13, order, to);
            continue;
        }
        q -= f.q3;
        store_quad(Codes<2>{{words[f.at2 / 4 + 32 * q + 8 * block + t8]}}, s02, s13, m02, m13, order, to);
    }
}

// --- values ---------------------------------------------------------------------------------------------------

// 32 tokens of one dimension of a rotated record.
template <int bits>
__device__ __forceinline__ void store_rotated(const ValuePlaces & f, const uint8_t * record, int dv, int d, int block, __half * to) {
    const uint32_t * words = reinterpret_cast<const uint32_t *>(record) + d;
    const uint4 * scales = reinterpret_cast<const uint4 *>(record + f.scale + 32 * block);
    const uint32_t mean = record[f.mean + d] * 0x01000100u;
    const __half2 middle = __float2half2_rn(float(1 << (bits - 1)) - 0.5f);
    Codes<bits> codes[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
#pragma unroll
        for (int w = 0; w < Codes<bits>::kWords; ++w) {
            const uint32_t * plane = bits == 3 && w == 1 ? words + f.high / 4 : words;
            codes[c].word[w] = plane[value_row(bits, block, c, w) * dv];
            if (bits == 3 && w == 1) codes[c].word[w] >>= 4 * c;
        }
    }
    uint32_t x[2][4][2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
        const uint4 four = scales[c];
#pragma unroll
        for (int s = 0; s < 4; ++s) {
            codes[c].plain(s, x[c][s][0], x[c][s][1]);
#pragma unroll
            for (int odd = 0; odd < 2; ++odd) {
                const uint32_t scale = ((part(four, s) >> 8 * odd) & 0x00ff00ffu) << 7;
                x[c][s][odd] = as_bits(clamp_both(__hfma2(__hsub2(integers(x[c][s][odd]), middle), as_half2(scale), as_half2(mean))));
            }
        }
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {  // byte b of place s = 2 sigma + e stands in column 4 (4e + b) + 2c + sigma
        auto low = [&](int c, int odd) { return join_low(x[c][e][odd], x[c][2 + e][odd]); };
        auto high = [&](int c, int odd) { return join_high(x[c][e][odd], x[c][2 + e][odd]); };
        *reinterpret_cast<uint4 *>(to + 16 * e) = make_uint4(low(0, 0), low(1, 0), low(0, 1), low(1, 1));
        *reinterpret_cast<uint4 *>(to + 16 * e + 8) = make_uint4(high(0, 0), high(1, 0), high(0, 1), high(1, 1));
    }
}

__device__ __forceinline__ uint32_t value_code(const uint8_t * record, int bits, int dv, int t, int d) {
    const int row = 4 * dv, lane = 4 * d + t % 4;
    if (bits == 8) return record[t / 4 * row + lane];
    if (bits == 4) return (record[t / 8 * row + lane] >> 4 * (t / 4 % 2)) & 15;
    uint32_t code = (record[t / 16 * row + lane] >> 2 * (t / 4 % 4)) & 3;
    if (bits == 3) code |= ((record[32 * dv + t / 32 * row + lane] >> (t / 4 % 8)) & 1) << 2;
    return code;
}

template <int threads>
__device__ __forceinline__ void tile_of_values(const ValueFormat & format, const ValuePlaces & f, const uint8_t * record, int part_of_page, __half * tile) {
    const int dv = format.head_size, bits = format.bits;
    if (format.group == 0) {
        for (int item = threadIdx.x; item < 2 * dv; item += threads) {
            const int run = item >= dv, d = item - (run ? dv : 0), block = 2 * part_of_page + run;
            __half * to = tile + d * kTilePitch + 32 * run;
            if (bits == 2) store_rotated<2>(f, record, dv, d, block, to);
            if (bits == 3) store_rotated<3>(f, record, dv, d, block, to);
            if (bits == 4) store_rotated<4>(f, record, dv, d, block, to);
            if (bits == 8) store_rotated<8>(f, record, dv, d, block, to);
        }
        return;
    }
    for (int item = threadIdx.x; item < kTileCells * dv; item += threads) {
        const int column = item % kTileCells, d = item / kTileCells, t = kTileCells * part_of_page + tile_token(column);
        const int at = t * f.groups + d / format.group;
        const float x = half_at(record + f.min, at) + float(value_code(record, bits, dv, t, d)) * half_at(record + f.scale, at);
        tile[d * kTilePitch + column] = __float2half_rn(fminf(fmaxf(x, -65504.0f), 65504.0f));
    }
}

// --- pages in F16 ---------------------------------------------------------------------------------------------

template <int threads>
__device__ __forceinline__ void tile_of_rows(const __half * rows, int row, int head_size, int n_cells, int part_of_page, __half * tile) {
    for (int item = threadIdx.x; item < 2 * head_size; item += threads) {  // 16 places of tokens, eight dimensions each
        const int run = (item >> 3) & 1, t8 = item & 7, d = 8 * (item >> 4);
        uint4 x[4];
#pragma unroll
        for (int s = 0; s < 4; ++s) {
            const int t = kTileCells * part_of_page + 32 * run + 8 * s + t8;
            x[s] = t < n_cells ? *reinterpret_cast<const uint4 *>(rows + size_t(t) * row + d) : make_uint4(0, 0, 0, 0);
        }
        __half * to = tile + d * kTilePitch + 32 * run + 4 * t8;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const uint32_t a = part(x[0], k), b = part(x[1], k), c = part(x[2], k), e = part(x[3], k);
            *reinterpret_cast<uint2 *>(to + 2 * k * kTilePitch) = make_uint2(join_low(a, b), join_low(c, e));
            *reinterpret_cast<uint2 *>(to + (2 * k + 1) * kTilePitch) = make_uint2(join_high(a, b), join_high(c, e));
        }
    }
}

// --- what is seen ---------------------------------------------------------------------------------------------

// grid: pages, tiles, streams * (KV heads if masks differ by head); 128 threads. A thread reads eight cells at a time where masks are aligned for it.
static __global__ void sight_kernel(const Attention call, const Cut cut) {
    const int page = blockIdx.x, tile = blockIdx.y, n_kv = call.mask && call.mask_head ? call.n_kv_heads : 1;
    const int kv = blockIdx.z % n_kv, stream = blockIdx.z / n_kv;
    const PageRef key = call.key_pages[stream * call.page_stride + page], value = call.value_pages[stream * call.page_stride + page];
    const bool there = (key.records || key.rows) && (value.records || value.rows);
    const bool aligned = ((reinterpret_cast<uintptr_t>(call.mask) / 2 | call.mask_token | call.mask_head | call.mask_stream | size_t(call.n_kv)) & 7) == 0;
    const int width = aligned ? 8 : 1, across = kPageCells / width, cell = page * kPageCells + threadIdx.x % across * width;
    bool seen = cell < call.n_kv, plain = seen;
    if (there && call.mask && seen) {
        const int first = tile * cut.rows, last = min(first + cut.rows, call.n_tokens * cut.group) - 1;
        seen = false;
        // A tile may begin and end within a token; masks that are the same for all heads are read once per token.
        const int step = call.mask_head ? 1 : cut.group;
#pragma unroll 4
        for (int row = first / step * step + threadIdx.x / across * step; row <= last; row += width * step) {
            const __half * at = mask_of(call, stream, RowPlace(cut, kv, row)) + cell;
            uint4 m;
            if (aligned) {
                m = *reinterpret_cast<const uint4 *>(at);
            } else {
                m.x = m.y = m.z = m.w = __half_as_ushort(*at) * 0x00010001u;
            }
            seen |= m.x != 0xfc00fc00u || m.y != 0xfc00fc00u || m.z != 0xfc00fc00u || m.w != 0xfc00fc00u;
            plain &= (m.x | m.y | m.z | m.w) == 0;
        }
    }
    const bool any = __syncthreads_or(seen && there), all = __syncthreads_and(plain);
    if (threadIdx.x != 0) return;
    Sight sight = kUnseen;
    if (any) sight = value.records ? (all ? kPackedOpen : kPackedMasked) : (all ? kHalfOpen : kHalfMasked);
    cut.sight[(size_t(blockIdx.z) * cut.n_tiles + tile) * cut.n_pages + page] = sight;
}

// --- out of the rotated basis ---------------------------------------------------------------------------------

// A warp's rows n8 and n8 + 8. Dimension 8i + 2j + e: bit 0 in a register, bits 1 and 2 across lanes, the others across registers.
template <int size>
__device__ __forceinline__ void rotate_accumulators(float (&acc)[size / 8][4], int d_v) {
    const int block = d_v & -d_v, j = threadIdx.x & 3;
#pragma unroll
    for (int i = 0; i < size / 8; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float a = acc[i][2 * h], b = acc[i][2 * h + 1];
            acc[i][2 * h] = a + b;
            acc[i][2 * h + 1] = a - b;
        }
#pragma unroll
        for (int step = 1; step <= 2; step *= 2) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const float other = __shfl_xor_sync(kWarp, acc[i][k], step);
                acc[i][k] = j & step ? other - acc[i][k] : acc[i][k] + other;
            }
        }
    }
#pragma unroll
    for (int step = 1; step < size / 8; step *= 2) {
        if (8 * step >= block) break;
#pragma unroll
        for (int i = 0; i < size / 8; ++i) {
            if ((i & step) || i + step >= size / 8) continue;
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const float a = acc[i][k], b = acc[i + step][k];
                acc[i][k] = a + b;
                acc[i + step][k] = a - b;
            }
        }
    }
    const float norm = rsqrtf(float(block));
#pragma unroll
    for (int i = 0; i < size / 8; ++i) {
#pragma unroll
        for (int k = 0; k < 4; ++k) acc[i][k] *= norm;
    }
}

// --- the kernel -----------------------------------------------------------------------------------------------

template <int size, int warps, bool shared_tile>
struct TileShape {
    static constexpr bool kQueriesInRegisters = size <= 128;
    static constexpr int kQueryPitch = size + 8;
    static constexpr int kRows = 16 * warps;
    static constexpr size_t kBytes = sizeof(__half) * ((shared_tile ? 1 : 2) * size * kTilePitch + (kQueriesInRegisters ? 0 : kRows * kQueryPitch));
};

template <int size, int warps, bool shared_tile>
__global__ void __launch_bounds__(32 * warps, 1) tile_kernel(const Attention call, const Cut cut) {
    using Shape = TileShape<size, warps, shared_tile>;
    constexpr int kThreads = 32 * warps, kSteps = size / 16, kWide = kTileCells / 8;
    MIXKVQ_DYNAMIC_SHARED(memory, 16);
    __half * const key_tile = reinterpret_cast<__half *>(memory);
    __half * const value_tile = shared_tile ? key_tile : key_tile + size * kTilePitch;
    __half * const query_tile = value_tile + size * kTilePitch;

    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, n8 = lane >> 2, j = lane & 3;
    const int split = blockIdx.x % cut.n_splits, tile = cut.n_tiles - 1 - blockIdx.x / cut.n_splits;  // the last see most
    const int kv = blockIdx.y, stream = blockIdx.z, d_k = call.head_size_k, d_v = call.head_size_v, n_rows = call.n_tokens * cut.group;

    // Dimensions from the head size to `size` stay zero.
    for (int i = threadIdx.x; i < (shared_tile ? 1 : 2) * size * kTilePitch / 8; i += kThreads) memory[i] = make_uint4(0, 0, 0, 0);

    // This lane's rows: n8 and n8 + 8 of the warp's sixteen. Queries become halves below 2^15, each row with its own power of two.
    uint32_t q[Shape::kQueriesInRegisters ? kSteps : 1][4];
    const __half * mask[2] = {nullptr, nullptr};
    float factor[2], slope[2];
    bool real[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int row = tile * Shape::kRows + 16 * warp + n8 + 8 * h;
        real[h] = row < n_rows;
        const RowPlace at(cut, kv, real[h] ? row : 0);
        const float * from = query_of(call, stream, at);
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
                if (Shape::kQueriesInRegisters) {
                    q[Shape::kQueriesInRegisters ? step : 0][2 * k + h] = pair;
                } else {
                    *reinterpret_cast<uint32_t *>(query_tile + (16 * warp + n8 + 8 * h) * Shape::kQueryPitch + d) = pair;
                }
            }
        }
        factor[h] = call.scale * kLog2E * power(max(e - 15, -126));
        slope[h] = alibi_slope(call, at.head) * kLog2E;
        if (call.mask) mask[h] = mask_of(call, stream, at);
    }

    const KeyHead & key_head = call.key_heads[kv];
    const ValueFormat value_format = call.value_heads[kv].format;
    const uint32_t key_at = key_head.record_offset, value_at = call.value_heads[kv].record_offset;
    const KeyPlaces key_places(key_head.format);
    const ValuePlaces value_places(value_format);
    const PageRef * key_pages = call.key_pages + stream * call.page_stride;
    const PageRef * value_pages = call.value_pages + stream * call.page_stride;
    const uint8_t * sight = cut.sight + (size_t(call.mask && call.mask_head ? stream * call.n_kv_heads + kv : stream) * cut.n_tiles + tile) * cut.n_pages;
    const int first = split * cut.pages_per_split, last = min(first + cut.pages_per_split, cut.n_pages);

    float acc[size / 8][4];
#pragma unroll
    for (int i = 0; i < size / 8; ++i) acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = 0;
    float max_[2] = {minus_infinity(), minus_infinity()}, sum[2] = {0, 0};

    auto fill_keys = [&](int page, int half_page) {
        const PageRef & ref = key_pages[page];
        if (ref.records) {
            tile_of_keys<kThreads>(key_places, ref.records + key_at, half_page, key_tile);
        } else {
            tile_of_rows<kThreads>(reinterpret_cast<const __half *>(ref.rows) + kv * d_k, call.row_k, d_k, call.n_kv - page * kPageCells, half_page, key_tile);
        }
    };
    auto fill_values = [&](int page, int half_page) {
        const PageRef & ref = value_pages[page];
        if (ref.records) {
            tile_of_values<kThreads>(value_format, value_places, ref.records + value_at, half_page, value_tile);
        } else {
            tile_of_rows<kThreads>(reinterpret_cast<const __half *>(ref.rows) + kv * d_v, call.row_v, d_v, call.n_kv - page * kPageCells, half_page, value_tile);
        }
    };

    for (int kind = 0; kind < 2; ++kind) {  // packed pages, then those in F16
        const Sight open = kind == 0 ? kPackedOpen : kHalfOpen, masked = kind == 0 ? kPackedMasked : kHalfMasked;
        auto next_page = [&](int page) {
            while (page < last && sight[page] != open && sight[page] != masked) ++page;
            return page;
        };
        int page = next_page(first), part_of_page = 0;
        __syncthreads();  // tiles are zero, or no longer read
        if (page < last && !shared_tile) {
            fill_keys(page, 0);
            __syncthreads();
        }
        while (page < last) {
            const bool is_masked = sight[page] == masked;
            const int following = part_of_page == 0 ? page : next_page(page + 1);
            if (shared_tile) {
                fill_keys(page, part_of_page);
                __syncthreads();
            }

            float s[kWide][4];
#pragma unroll 1
            for (int turn = 0; turn < 2; ++turn) {
                if (!shared_tile && ((turn ^ warp) & 1)) {
                    fill_values(page, part_of_page);
                    continue;
                }
                if (shared_tile && turn == 1) continue;
#pragma unroll
                for (int i = 0; i < kWide; ++i) s[i][0] = s[i][1] = s[i][2] = s[i][3] = 0;
                const int m = lane >> 3, r = lane & 7;
                const __half * from = key_tile + ((m & 1) * 8 + r) * kTilePitch + (m >> 1) * 8;
                const __half * from_q = query_tile + (16 * warp + (m & 1) * 8 + r) * Shape::kQueryPitch + (m >> 1) * 8;
#pragma unroll
                for (int step = 0; step < kSteps; ++step) {
                    uint32_t a[4];
                    if (Shape::kQueriesInRegisters) {
#pragma unroll
                        for (int k = 0; k < 4; ++k) a[k] = q[Shape::kQueriesInRegisters ? step : 0][k];
                    } else {
                        load_matrices(a, from_q + 16 * step);
                    }
#pragma unroll
                    for (int i = 0; i < kWide / 2; ++i) {
                        uint32_t b[4];
                        load_transposed(b, from + 16 * step * kTilePitch + 16 * i);
                        mma(s[2 * i], a[0], a[1], a[2], a[3], b[0], b[1]);
                        mma(s[2 * i + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
                    }
                }
            }

            // Scores to logits in units of log2. Column 8i + 2j + e is token tile_token(..) of this half of the page.
            const int cell0 = page * kPageCells + part_of_page * kTileCells;
            float top[2] = {max_[0], max_[1]};
#pragma unroll
            for (int i = 0; i < kWide; ++i) {
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const int h = k >> 1;
                    float z = s[i][k] * factor[h];
                    if (call.softcap > 0) z = capped(call, z);
                    if (is_masked) {
                        const int cell = cell0 + tile_token(8 * i + 2 * j + (k & 1));
                        const bool hidden = cell >= call.n_kv || !real[h];
                        if (hidden) {
                            z = minus_infinity();
                        } else if (call.mask) {
                            const float m = __half2float(mask[h][cell]);
                            z = m == minus_infinity() ? m : z + slope[h] * m;
                        }
                    }
                    s[i][k] = z;
                    top[h] = fmaxf(top[h], z);
                }
            }
            float lower[2];
            bool changed = false;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                top[h] = fmaxf(top[h], __shfl_xor_sync(kWarp, top[h], 1));
                top[h] = fmaxf(top[h], __shfl_xor_sync(kWarp, top[h], 2));
                lower[h] = top[h] == max_[h] ? 1.0f : exp2_of(max_[h] - top[h]);
                changed |= top[h] != max_[h];
                max_[h] = top[h];
                top[h] = top[h] == minus_infinity() ? 0.0f : top[h] - 15.0f;  // weights up to 2^15: small ones keep their digits as halves
                sum[h] *= lower[h];
            }
            if (__any_sync(kWarp, changed)) {
#pragma unroll
                for (int i = 0; i < size / 8; ++i) {
#pragma unroll
                    for (int k = 0; k < 4; ++k) acc[i][k] *= lower[k >> 1];
                }
            }
            uint32_t p[kWide / 2][4];
#pragma unroll
            for (int i = 0; i < kWide; ++i) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const float x = exp2_of(s[i][2 * h] - top[h]), y = exp2_of(s[i][2 * h + 1] - top[h]);
                    sum[h] += x + y;
                    p[i / 2][2 * (i & 1) + h] = pack2(x, y);
                }
            }
            __syncthreads();
            if (shared_tile) {
                fill_values(page, part_of_page);
                __syncthreads();
            }

#pragma unroll 1
            for (int turn = 0; turn < 2; ++turn) {
                if (!shared_tile && ((turn ^ warp) & 1)) {
                    if (following < last) fill_keys(following, part_of_page ^ 1);
                    continue;
                }
                if (shared_tile && turn == 1) continue;
                const int m = lane >> 3, r = lane & 7;
                const __half * from = value_tile + ((m >> 1) * 8 + r) * kTilePitch + (m & 1) * 8;
#pragma unroll
                for (int i = 0; i < size / 16; ++i) {
#pragma unroll
                    for (int k = 0; k < kWide / 2; ++k) {
                        uint32_t b[4];
                        load_matrices(b, from + 16 * i * kTilePitch + 16 * k);
                        mma(acc[2 * i], p[k][0], p[k][1], p[k][2], p[k][3], b[0], b[1]);
                        mma(acc[2 * i + 1], p[k][0], p[k][1], p[k][2], p[k][3], b[2], b[3]);
                    }
                }
            }
            __syncthreads();
            page = following;
            part_of_page ^= 1;
        }
        if (kind == 1 || value_format.group != 0) continue;

        rotate_accumulators<size>(acc, d_v);
    }

#pragma unroll
    for (int h = 0; h < 2; ++h) {
        sum[h] += __shfl_xor_sync(kWarp, sum[h], 1);
        sum[h] += __shfl_xor_sync(kWarp, sum[h], 2);
        sum[h] *= 0x1p-15f;
        const int local = 16 * warp + n8 + 8 * h, row = tile * Shape::kRows + local;
        if (!real[h]) continue;
        const RowPlace at(cut, kv, row);
        float * to;
        float scale = 0x1p-15f;
        if (cut.n_splits == 1) {
            to = call.out + stream * call.out_stream + at.head * call.out_head + at.token * call.out_token;
            scale *= close_softmax(max_[h], sum[h], call.sinks ? call.sinks + at.head : nullptr);
        } else {
            const size_t block = ((size_t(stream) * call.n_kv_heads + kv) * cut.n_tiles + tile) * cut.n_splits + split;
            float * base = cut.partial + block * partial_floats(cut, d_v);
            to = base + size_t(local) * d_v;
            if (j == 0) {
                base[size_t(cut.rows) * d_v + local] = max_[h];
                base[size_t(cut.rows) * d_v + cut.rows + local] = sum[h];
            }
        }
#pragma unroll
        for (int i = 0; i < size / 8; ++i) {
            if (8 * i >= d_v) continue;
            to[8 * i + 2 * j] = acc[i][2 * h] * scale;
            to[8 * i + 2 * j + 1] = acc[i][2 * h + 1] * scale;
        }
    }
}

}  // namespace mixkvq::cuda
