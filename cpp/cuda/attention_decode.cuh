// Attention of few queries over long caches. Every warp is a worker of its own: it takes whole pages, reads codes straight into registers, sixteen
// bytes a lane, while the L2 cache fetches its next page, and keeps a softmax of its own; nothing is shared or waited for until the end.
//
// Tokens (then dimensions) are the rows of the tensor-core tiles, queries their columns, so that eight queries waste nothing. Keys: codes of a page
// times queries folded with the channels' scales, gathered in the page's order. Values: codes times weights folded with the tokens' scales. Codes go
// in as subnormal halves (layout.cuh); everything that is the same for all codes (minima, means, the middle of the code range) is added in F32.
#pragma once

#include "attention_common.cuh"

namespace mixkvq::cuda {

constexpr int kDecodeWarps = 4;

// Sections of shared memory. Pitches are such that eight rows hit all banks.
struct DecodeShape {
    int query_pitch;   // halves: queries for F16 pages
    int folded_pitch;  // halves: queries folded with a page's scales
    int at_half, at_warps, warp_bytes, bytes;

    __host__ __device__ DecodeShape(int d_k, int n_queries, int dv_blocks) {
        query_pitch = (d_k + 63) / 64 * 64 + 32;
        const int slots = d_k / 4 + 12;  // every tier is filled up to four quads
        folded_pitch = (slots * 4 + 63) / 64 * 64 + 16;
        at_half = n_queries * d_k * 4;
        at_warps = at_half + n_queries * query_pitch * 2;
        warp_bytes = n_queries * folded_pitch * 2 + 4 * n_queries * 4;
        bytes = at_warps + kDecodeWarps * warp_bytes;
        const int joined = kDecodeWarps / 2 * (32 * dv_blocks * n_queries * 4 + 2 * n_queries / 8 * 2 * 32 * 4);
        if (bytes < joined) bytes = joined;
    }
};

// --- keys -----------------------------------------------------------------------------------------------------

// 16 channels of all 128 tokens of a page for one lane: the words of its quad.
template <int bits>
struct KeyWords {
    uint4 x[Codes<bits>::kWords];

    __device__ __forceinline__ void load(const uint8_t * tier, int quad, int n_quads, int n8) {
#pragma unroll
        for (int w = 0; w < Codes<bits>::kWords; ++w) x[w] = load_stream_if(quad < n_quads, tier + 64 * bits * quad + 16 * key_chunk(bits, n8, w));
    }
    __device__ __forceinline__ Codes<bits> codes(int i, int top_shift) const {
        Codes<bits> c;
#pragma unroll
        for (int w = 0; w < Codes<bits>::kWords; ++w) c.word[w] = part(x[w], i);
        if (bits == 3) c.word[Codes<bits>::kWords - 1] >>= top_shift;
        return c;
    }
};

// Adds a tier's share of the scores. s[2i + sp][nt]: rows n8 and n8 + 8 are tokens key_token(n8, i, 2 sp) and (.., 2 sp + 1).
// `scales` (only of groups below 128 tokens): this lane's group of the tier's first channel; n channels apart.
template <int bits, bool scaled, int NT>
__device__ __forceinline__ void add_tier(const uint8_t * tier, int n_quads, const __half * folded, int pitch, const __half * scales, int groups,
                                         int n8, int j, float (&s)[8][NT][4]) {
    if (n_quads == 0) return;
    const int top_shift = key_top_shift(n8), n_steps = (n_quads + 3) / 4;
    KeyWords<bits> words;
    words.load(tier, j, n_quads, n8);
    for (int step = 0; step < n_steps; ++step) {
        const KeyWords<bits> now = words;
        if (step + 1 < n_steps) words.load(tier, 4 * step + 4 + j, n_quads, n8);
        uint32_t b[NT][2];
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
            const uint2 x = *reinterpret_cast<const uint2 *>(folded + (8 * nt + n8) * pitch + 4 * (4 * step + j));
            b[nt][0] = x.x;
            b[nt][1] = x.y;
        }
        __half2 scale02 = as_half2(0), scale13 = as_half2(0);
        if (scaled && 4 * step + j < n_quads) {
            const __half * at = scales + 4 * (4 * step + j) * groups;
            const __half2 quarter = __float2half2_rn(0.25f);
            scale02 = __hmul2(__halves2half2(at[0], at[2 * groups]), quarter);
            scale13 = __hmul2(__halves2half2(at[groups], at[3 * groups]), quarter);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const Codes<bits> codes = now.codes(i, top_shift);
#pragma unroll
            for (int sp = 0; sp < 2; ++sp) {
                uint32_t even[2], odd[2];
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    if (scaled) {
                        codes.plain(2 * sp + h, even[h], odd[h]);
                        even[h] = as_bits(__hmul2(integers(even[h]), scale02));
                        odd[h] = as_bits(__hmul2(integers(odd[h]), scale13));
                    } else {
                        codes.fast(2 * sp + h, even[h], odd[h]);
                    }
                }
#pragma unroll
                for (int nt = 0; nt < NT; ++nt) mma(s[2 * i + sp][nt], even[0], even[1], odd[0], odd[1], b[nt][0], b[nt][1]);
            }
        }
    }
}

// Sums of eight numbers over a warp: lane l gets that of number l / 4.
__device__ __forceinline__ float sum_of_eight(const float (&x)[8], int lane) {
    float y[4], z[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const bool up = lane & 16;
        y[i] = (up ? x[i + 4] : x[i]) + __shfl_xor_sync(kWarp, up ? x[i] : x[i + 4], 16);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const bool up = lane & 8;
        z[i] = (up ? y[i + 2] : y[i]) + __shfl_xor_sync(kWarp, up ? y[i] : y[i + 2], 8);
    }
    const bool up = lane & 4;
    float sum = (up ? z[1] : z[0]) + __shfl_xor_sync(kWarp, up ? z[0] : z[1], 4);
    sum += __shfl_xor_sync(kWarp, sum, 2);
    return sum + __shfl_xor_sync(kWarp, sum, 1);
}

// Folds a page's scales into the queries; returns what a unit of the accumulators is worth. bias: [group][query].
template <int NT>
__device__ __forceinline__ float fold_queries(const KeyPlaces & f, const uint8_t * record, const float * queries, int n_rows, __half * folded, int pitch,
                                              float * bias, int lane) {
    const int n_quads = f.coded(), groups = f.groups;
    int shift = 13;  // groups below 128: scales (a quarter of them) stay with the codes
    float unit = 0x1p-11f;
    if (groups == 1) {
        unsigned top = 0;
        for (int u = lane; u < n_quads; u += 32) {
            const uint2 s = *reinterpret_cast<const uint2 *>(record + f.scale + 8 * u);
            top = max(top, __vmaxu2(s.x, s.y));
        }
        top = warp_max(max(top & 0xffff, top >> 16));
        const int e = int(top >> 10) - 14;  // scales < 2^e
        shift = 15 - e;
        unit = power(24 - shift);
    }
    float sums[NT][8] = {};
    for (int u = lane; u < n_quads; u += 32) {
        // The quad's slot: tiers begin at multiples of four.
        int slot = u, bits = 8;
        if (u >= f.q8) {
            slot = u - f.q8 + (f.q8 + 3) / 4 * 4;
            bits = 4;
            if (u >= f.q8 + f.q4) {
                slot = u - f.q8 - f.q4 + (f.q8 + 3) / 4 * 4 + (f.q4 + 3) / 4 * 4;
                bits = 3;
                if (u >= f.q8 + f.q4 + f.q3) slot += (f.q3 + 3) / 4 * 4 - f.q3;
            }
        }
        const uint32_t order = *reinterpret_cast<const uint32_t *>(record + f.order + 4 * u);
        float fold[4], min[4];
        const float base = power(shift), odd = groups == 1 && bits <= 3 ? 0x1p-8f : 1.0f;
        if (groups == 1) {
            const uint2 s = *reinterpret_cast<const uint2 *>(record + f.scale + 8 * u), m = *reinterpret_cast<const uint2 *>(record + f.min + 8 * u);
            const float2 s01 = __half22float2(as_half2(s.x)), s23 = __half22float2(as_half2(s.y));
            const float2 m01 = __half22float2(as_half2(m.x)), m23 = __half22float2(as_half2(m.y));
            fold[0] = s01.x * base;
            fold[1] = s01.y * base * odd;
            fold[2] = s23.x * base;
            fold[3] = s23.y * base * odd;
            min[0] = m01.x;
            min[1] = m01.y;
            min[2] = m23.x;
            min[3] = m23.y;
        } else {
#pragma unroll
            for (int r = 0; r < 4; ++r) fold[r] = base, min[r] = 0;
        }
#pragma unroll
        for (int four = 0; four < 2 * NT; ++four) {
            if (4 * four >= n_rows) break;
            float4 q[4];
#pragma unroll
            for (int r = 0; r < 4; ++r) q[r] = *reinterpret_cast<const float4 *>(queries + ((order >> 8 * r) & 255) * 8 * NT + 4 * four);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const float x[4] = {(&q[0].x)[k], (&q[1].x)[k], (&q[2].x)[k], (&q[3].x)[k]};
                *reinterpret_cast<uint2 *>(folded + (4 * four + k) * pitch + 4 * slot) =
                    make_uint2(pack2(x[0] * fold[0], x[2] * fold[2]), pack2(x[1] * fold[1], x[3] * fold[3]));
                sums[four / 2][4 * (four & 1) + k] += x[0] * min[0] + x[1] * min[1] + x[2] * min[2] + x[3] * min[3];
            }
        }
    }
    if (groups == 1) {
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
            const float total = sum_of_eight(sums[nt], lane);
            if ((lane & 3) == 0) bias[8 * nt + (lane >> 2)] = total;
        }
    } else {
        for (int i = lane; i < groups * 8 * NT; i += 32) {  // rare: a lane sums all channels of a query and a group
            const int g = i / (8 * NT), row = i % (8 * NT);
            float total = 0;
            for (int r = 0; r < 4 * n_quads; ++r) {
                total += queries[record[f.order + r] * 8 * NT + row] * half_at(record + f.min, r * groups + g);
            }
            bias[g * 8 * NT + row] = total;
        }
    }
    return unit;
}

// --- values ---------------------------------------------------------------------------------------------------

// acc[b][ip][nt]: rows n8 and n8 + 8 are dimensions value_dim(n8, b, 2 ip) and (.., 2 ip + 1). p[c][s][nt]: the weights of value_token(j, c, s, ..).
template <int bits, int NB, int NT>
__device__ __forceinline__ void add_values(const uint8_t * record, int dv, uint32_t high, const uint32_t (&p)[2][4][NT][2], int n8, int j,
                                           float (&acc)[NB][2][NT][4], float (&ones)[NT][4]) {
    constexpr uint32_t kOne = 0x3c003c00u, kOdd = Codes<bits>::kOdd ? 0x5c005c00u : kOne;  // 1, 256
#pragma unroll
    for (int c = 0; c < 2; ++c) {
#pragma unroll
        for (int s = 0; s < 4; ++s) {
#pragma unroll
            for (int nt = 0; nt < NT; ++nt) mma(ones[nt], kOne, kOne, kOdd, kOdd, p[c][s][nt][0], p[c][s][nt][1]);
        }
    }
#pragma unroll
    for (int b = 0; b < NB; ++b) {
        const bool there = value_dim(n8, b, 0) < dv;
        const uint8_t * at = record + 4 * value_dim(n8, b, 0);
        uint4 top = make_uint4(0, 0, 0, 0);
        if (bits == 3) top = load_stream_if(there, at + high + 4 * dv * j);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            constexpr int kWords = bits == 3 ? 1 : Codes<bits>::kWords;
            uint4 x[kWords];
#pragma unroll
            for (int w = 0; w < kWords; ++w) x[w] = load_stream_if(there, at + 4 * dv * value_row(bits, j, c, w));
#pragma unroll
            for (int ip = 0; ip < 2; ++ip) {
                Codes<bits> codes[2];
#pragma unroll
                for (int h = 0; h < 2; ++h) {
#pragma unroll
                    for (int w = 0; w < kWords; ++w) codes[h].word[w] = part(x[w], 2 * ip + h);
                    if (bits == 3) codes[h].word[Codes<bits>::kWords - 1] = part(top, 2 * ip + h) >> 4 * c;
                }
#pragma unroll
                for (int s = 0; s < 4; ++s) {
                    uint32_t even[2], odd[2];
#pragma unroll
                    for (int h = 0; h < 2; ++h) codes[h].fast(s, even[h], odd[h]);
#pragma unroll
                    for (int nt = 0; nt < NT; ++nt) mma(acc[b][ip][nt], even[0], even[1], odd[0], odd[1], p[c][s][nt][0], p[c][s][nt][1]);
                }
            }
        }
    }
}

// --- the kernel -----------------------------------------------------------------------------------------------

// Adds slope * mask to the logits of four neighbouring cells; cells from `end` on are hidden.
__device__ __forceinline__ void add_mask(const __half * mask, bool aligned, int cell, int end, float slope, float (&z)[4]) {
    unsigned short m[4] = {0, 0, 0, 0};
    if (mask) {
        if (aligned && cell + 4 <= end) {
            const uint2 x = *reinterpret_cast<const uint2 *>(mask + cell);
            m[0] = x.x & 0xffff, m[1] = x.x >> 16, m[2] = x.y & 0xffff, m[3] = x.y >> 16;
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (cell + i < end) m[i] = __half_as_ushort(mask[cell + i]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const bool hidden = m[i] == 0xfc00 || cell + i >= end;
        z[i] = hidden ? minus_infinity() : m[i] ? z[i] + slope * __half2float(__ushort_as_half(m[i])) : z[i];
    }
}

// grid: tiles * splits, KV heads, streams. NB: blocks of 32 value dimensions, NT: blocks of 8 rows.
template <int NB, int NT>
__global__ void __launch_bounds__(32 * kDecodeWarps, NB * NT > 4 ? 2 : NT == 1 ? 4 : 3) decode_kernel(const Attention call, const Cut cut) {
    constexpr int kRows = 8 * NT;
    MIXKVQ_DYNAMIC_SHARED(memory, 16);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, own_n8 = lane >> 2, own_j = lane & 3;
    const int split = blockIdx.x % cut.n_splits, tile = blockIdx.x / cut.n_splits, kv = blockIdx.y, stream = blockIdx.z;
    const int d_k = call.head_size_k;
    const int row0 = tile * kRows, n_rows = min(kRows, call.n_tokens * cut.group - row0);
    const PageRef * key_pages = call.key_pages + stream * call.page_stride;
    const PageRef * value_pages = call.value_pages + stream * call.page_stride;
    const KeyPlaces key_format(call.key_heads[kv].format);
    const uint32_t key_at = call.key_heads[kv].record_offset, value_at = call.value_heads[kv].record_offset;
    const ValuePlaces value_format(call.value_heads[kv].format);
    const int value_bits = call.value_heads[kv].format.bits;

    const int first = split * cut.pages_per_split + warp, last = min((split + 1) * cut.pages_per_split, cut.n_pages);
    if (first < last) {
        const PageRef k = key_pages[first], v = value_pages[first];
        if (k.records) prefetch_record(k.records + key_at, key_format.bytes);
        if (v.records) prefetch_record(v.records + value_at, value_format.bytes);
    }

    const DecodeShape shape(d_k, kRows, NB);
    uint8_t * bytes = reinterpret_cast<uint8_t *>(memory);
    float * queries = reinterpret_cast<float *>(bytes);  // [channel][row], each row scaled by a power of two to below 1
    __half * half_queries = reinterpret_cast<__half *>(bytes + shape.at_half);
    __half * folded = reinterpret_cast<__half *>(bytes + shape.at_warps + warp * shape.warp_bytes);
    float * bias = reinterpret_cast<float *>(folded + kRows * shape.folded_pitch);

    // What a row needs is kept by the lanes that have its columns: rows 8 nt + 2j + e.
    __shared__ int exponents[kRows];
    for (int i = threadIdx.x; i < shape.at_warps / 4; i += blockDim.x) reinterpret_cast<uint32_t *>(bytes)[i] = 0;
    for (int i = lane; i < shape.warp_bytes / 4; i += 32) reinterpret_cast<uint32_t *>(folded)[i] = 0;
    __syncthreads();
    for (int row = warp; row < kRows; row += kDecodeWarps) {
        int e = 0;
        if (row < n_rows) {
            const float * from = query_of(call, stream, RowPlace(cut, kv, row0 + row));
            float top = 0;
            for (int d = lane; d < d_k; d += 32) top = fmaxf(top, fabsf(from[d]));
            top = __uint_as_float(warp_max(__float_as_uint(top)));
            e = exponent_above(top);
            const float shrink = power(-e);
            for (int d = lane; d < d_k; d += 32) {
                const float x = from[d] * shrink;
                queries[d * kRows + row] = x;
                half_queries[row * shape.query_pitch + d] = __float2half_rn(x * 0x1p14f);
            }
        }
        if (lane == 0) exponents[row] = e;
    }
    __syncthreads();

    float factor[NT][2], slope[NT][2];
    const __half * mask[NT][2];
    bool aligned[NT][2];
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int row = 8 * nt + 2 * own_j + e;
            const RowPlace at(cut, kv, row0 + min(row, n_rows - 1));
            factor[nt][e] = call.scale * kLog2E * power(exponents[row]);
            slope[nt][e] = alibi_slope(call, at.head) * kLog2E;
            mask[nt][e] = call.mask ? mask_of(call, stream, at) : nullptr;
            aligned[nt][e] = (reinterpret_cast<uintptr_t>(mask[nt][e]) & 7) == 0;
        }
    }

    float acc[NB][2][NT][4], ones[NT][4], max_[NT][2], sum[NT][2];
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
        for (int k = 0; k < 4; ++k) ones[nt][k] = 0;
#pragma unroll
        for (int e = 0; e < 2; ++e) max_[nt][e] = minus_infinity(), sum[nt][e] = 0;
#pragma unroll
        for (int b = 0; b < NB; ++b) {
#pragma unroll
            for (int k = 0; k < 8; ++k) acc[b][k >> 2][nt][k & 3] = 0;
        }
    }
    int weight_shift = 15;  // weights of packed pages are p * scale * 2^weight_shift

    bool any_packed = false, any_half = false;
    for (int kind = 0; kind < 2; ++kind) {  // packed pages, then those in F16
        if (kind == 1) {
            // Out of the rotated basis: from sums of weights and codes to values, in units of 2^-14.
            if (any_packed) {
                const int n8 = own_n8, d_v = call.head_size_v;
                const float unit = power(14 - weight_shift), middle = 0.5f - float(1 << (value_bits - 1)), norm = rsqrtf(float(d_v & -d_v));
                const int block = d_v & -d_v;
#pragma unroll
                for (int b = 0; b < NB; ++b) {
#pragma unroll
                    for (int nt = 0; nt < NT; ++nt) {
                        float x[8];  // dimension: bit 0 is h, bit 1 is ip
#pragma unroll
                        for (int k = 0; k < 8; ++k) {  // k = 4 ip + 2 h + e
                            x[k] = (acc[b][k >> 2][nt][k & 3] * 0x1p24f + middle * ones[nt][k & 1]) * unit * norm;
                            if (value_dim(n8, b, 0) >= d_v) x[k] = 0;
                        }
#pragma unroll
                        for (int step = 2; step <= 4; step *= 2) {
#pragma unroll
                            for (int k = 0; k < 8; ++k) {
                                if (k & step) continue;
                                const float a = x[k], c = x[k + step];
                                x[k] = a + c;
                                x[k + step] = a - c;
                            }
                        }
#pragma unroll
                        for (int step = 1; step <= 4; step *= 2) {
                            if (4 * step >= block) break;
#pragma unroll
                            for (int k = 0; k < 8; ++k) {
                                const float other = __shfl_xor_sync(kWarp, x[k], 4 * step);
                                x[k] = n8 & step ? other - x[k] : x[k] + other;
                            }
                        }
#pragma unroll
                        for (int k = 0; k < 8; ++k) acc[b][k >> 2][nt][k & 3] = x[k];
                    }
                }
#pragma unroll
                for (int step = 1; step < NB; step *= 2) {
                    if (32 * step >= block) break;
#pragma unroll
                    for (int b = 0; b < NB; ++b) {
                        if ((b & step) || b + step >= NB) continue;
#pragma unroll
                        for (int k = 0; k < 8 * NT; ++k) {
                            float & x = acc[b][k / (4 * NT)][k / 4 % NT][k & 3];
                            float & y = acc[b + step < NB ? b + step : b][k / (4 * NT)][k / 4 % NT][k & 3];
                            const float a = x, c = y;
                            x = a + c;
                            y = a - c;
                        }
                    }
                }
            }
            if (!any_half) break;
        }
        for (int page = first; page < last; page += kDecodeWarps) {
            const PageRef key = key_pages[page], value = value_pages[page];
            if (!(key.records || key.rows) || !(value.records || value.rows)) continue;
            if ((value.records == nullptr) != (kind == 1)) {
                any_half = true;
                continue;
            }
            const int next = page + kDecodeWarps;
            if (kind == 0 && next < last) {
                const PageRef k = key_pages[next], v = value_pages[next];
                if (k.records) prefetch_record(k.records + key_at, key_format.bytes);
                if (v.records) prefetch_record(v.records + value_at, value_format.bytes);
            }
            const int n8 = opaque(own_n8), j = opaque(own_j), d_v = opaque(call.head_size_v);
            const int cell0 = page * kPageCells, end = min(call.n_kv, cell0 + kPageCells);

            // A page that nobody sees is not read; one that everybody sees needs no look at the mask later.
            bool open = end == cell0 + kPageCells;
            if (call.mask) {
                bool seen = false, plain = true;
                const int n_masks = call.mask_head ? n_rows : (row0 + n_rows - 1) / cut.group - row0 / cut.group + 1;
                for (int i = 0; i < n_masks; ++i) {
                    const int row = call.mask_head ? row0 + i : (row0 / cut.group + i) * cut.group;
                    const __half * m = mask_of(call, stream, RowPlace(cut, kv, row));
                    for (int cell = cell0 + lane; cell < end; cell += 32) {
                        const unsigned short x = __half_as_ushort(m[cell]);
                        seen |= x != 0xfc00;
                        plain &= x == 0;
                    }
                }
                if (!__any_sync(kWarp, seen)) continue;
                open &= __all_sync(kWarp, plain) != 0;
            }

            // --- scores
            float s[8][NT][4];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
#pragma unroll
                for (int nt = 0; nt < NT; ++nt) s[i][nt][0] = s[i][nt][1] = s[i][nt][2] = s[i][nt][3] = 0;
            }
            float unit = 0x1p-14f;
            float offset[NT][2] = {};
            if (key.records) {
                const uint8_t * record = key.records + key_at;
                __syncwarp();
                unit = fold_queries<NT>(key_format, record, queries, n_rows, folded, shape.folded_pitch, bias, lane);
                __syncwarp();
                const int groups = key_format.groups, group = n8 * groups / 8, q8 = key_format.q8, q4 = key_format.q4, q3 = key_format.q3;
                const __half * to4 = folded + 16 * ((q8 + 3) / 4), * to3 = to4 + 16 * ((q4 + 3) / 4), * to2 = to3 + 16 * ((q3 + 3) / 4);
                if (groups == 1) {
                    add_tier<8, false, NT>(record + key_format.at8, q8, folded, shape.folded_pitch, nullptr, 1, n8, j, s);
                    add_tier<4, false, NT>(record + key_format.at4, q4, to4, shape.folded_pitch, nullptr, 1, n8, j, s);
                    add_tier<3, false, NT>(record + key_format.at3, q3, to3, shape.folded_pitch, nullptr, 1, n8, j, s);
                    add_tier<2, false, NT>(record + key_format.at2, key_format.q2, to2, shape.folded_pitch, nullptr, 1, n8, j, s);
                } else {
                    const __half * scales = reinterpret_cast<const __half *>(record + key_format.scale) + group;
                    add_tier<8, true, NT>(record + key_format.at8, q8, folded, shape.folded_pitch, scales, groups, n8, j, s);
                    scales += 4 * q8 * groups;
                    add_tier<4, true, NT>(record + key_format.at4, q4, to4, shape.folded_pitch, scales, groups, n8, j, s);
                    scales += 4 * q4 * groups;
                    add_tier<3, true, NT>(record + key_format.at3, q3, to3, shape.folded_pitch, scales, groups, n8, j, s);
                    scales += 4 * q3 * groups;
                    add_tier<2, true, NT>(record + key_format.at2, key_format.q2, to2, shape.folded_pitch, scales, groups, n8, j, s);
                }
#pragma unroll
                for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
                    for (int e = 0; e < 2; ++e) offset[nt][e] = bias[group * kRows + 8 * nt + 2 * j + e];
                }
            } else {
                const __half * rows = reinterpret_cast<const __half *>(key.rows) + kv * d_k;
                for (int d = 0; d < d_k; d += 32) {
                    const bool there = d + 8 * j < d_k;
                    uint4 q[NT];
#pragma unroll
                    for (int nt = 0; nt < NT; ++nt) {
                        q[nt] = *reinterpret_cast<const uint4 *>(half_queries + (8 * nt + n8) * shape.query_pitch + d + 8 * j);
                    }
#pragma unroll
                    for (int i = 0; i < 8; ++i) {  // i = 2 * (i of key_token) + sp
                        uint4 x[2];
#pragma unroll
                        for (int h = 0; h < 2; ++h) {
                            const int t = key_token(n8, i >> 1, 2 * (i & 1) + h);
                            x[h] = load_stream_if(there && cell0 + t < end, rows + size_t(t) * call.row_k + d + 8 * j);
                        }
#pragma unroll
                        for (int nt = 0; nt < NT; ++nt) {
                            mma(s[i][nt], x[0].x, x[1].x, x[0].y, x[1].y, q[nt].x, q[nt].y);
                            mma(s[i][nt], x[0].z, x[1].z, x[0].w, x[1].w, q[nt].z, q[nt].w);
                        }
                    }
                }
            }

            // --- softmax of logits in units of log2
            float lower[NT][2], page_sum[NT][2];
            bool changed = false;
#pragma unroll
            for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const float f = unit * factor[nt][e], o = offset[nt][e] * factor[nt][e];
#pragma unroll
                    for (int k = 0; k < 16; ++k) s[k >> 1][nt][2 * (k & 1) + e] = s[k >> 1][nt][2 * (k & 1) + e] * f + o;
                    if (call.softcap > 0) {
#pragma unroll
                        for (int k = 0; k < 16; ++k) s[k >> 1][nt][2 * (k & 1) + e] = capped(call, s[k >> 1][nt][2 * (k & 1) + e]);
                    }
                    if (!open) {
#pragma unroll
                        for (int sk = 0; sk < 4; ++sk) {
                            float z[4];
#pragma unroll
                            for (int i = 0; i < 4; ++i) z[i] = s[2 * i + (sk >> 1)][nt][2 * (sk & 1) + e];
                            add_mask(mask[nt][e], aligned[nt][e], cell0 + key_token(n8, 0, sk), end, slope[nt][e], z);
#pragma unroll
                            for (int i = 0; i < 4; ++i) s[2 * i + (sk >> 1)][nt][2 * (sk & 1) + e] = z[i];
                        }
                    }
                    float top = max_[nt][e];
#pragma unroll
                    for (int k = 0; k < 16; ++k) top = fmaxf(top, s[k >> 1][nt][2 * (k & 1) + e]);
#pragma unroll
                    for (int step = 4; step <= 16; step *= 2) top = fmaxf(top, __shfl_xor_sync(kWarp, top, step));
                    lower[nt][e] = top == max_[nt][e] ? 1.0f : exp2_of(max_[nt][e] - top);
                    changed |= top != max_[nt][e];
                    max_[nt][e] = top;
                    if (top == minus_infinity()) top = 0;
                    float total = 0;
#pragma unroll
                    for (int i = 0; i < 8; ++i) {
#pragma unroll
                        for (int h = 0; h < 2; ++h) {
                            float & x = s[i][nt][2 * h + e];
                            x = exp2_of(x - top);
                            total += x;
                        }
                    }
#pragma unroll
                    for (int step = 4; step <= 16; step *= 2) total += __shfl_xor_sync(kWarp, total, step);
                    page_sum[nt][e] = total;
                    sum[nt][e] = sum[nt][e] * lower[nt][e] + total;
                }
            }

            // --- weights as halves, times the tokens' scales
            const uint8_t * record = value.records ? value.records + value_at : nullptr;
            uint32_t scale[4] = {};
            float odd = 1, weight = 0x1p14f;
            if (kind == 0) {
                any_packed = true;
                unsigned top = 0;
#pragma unroll
                for (int sk = 0; sk < 4; ++sk) {  // byte i: the scale of key_token(n8, i, sk)
                    scale[sk] = *reinterpret_cast<const uint32_t *>(record + value_format.scale + key_token(n8, 0, sk));
                    top = __vmaxu4(top, scale[sk]);
                }
                top = max(max(top & 255, (top >> 8) & 255), max((top >> 16) & 255, top >> 24));
                const int shift = min(weight_shift, 29 - int(warp_max(top) >> 3));
                if (shift != weight_shift) {
                    const float less = power(shift - weight_shift);
#pragma unroll
                    for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
                        for (int e = 0; e < 2; ++e) lower[nt][e] *= less;
                    }
                    weight_shift = shift;
                    changed = true;
                }
                weight = power(112 + weight_shift);  // a byte, put where a float has its exponent, is its number * 2^-112
                odd = value_bits <= 3 ? 0x1p-8f : 1.0f;
            }
            if (__any_sync(kWarp, changed)) {
#pragma unroll
                for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
                    for (int k = 0; k < 4; ++k) ones[nt][k] *= lower[nt][k & 1];
#pragma unroll
                    for (int b = 0; b < NB; ++b) {
#pragma unroll
                        for (int k = 0; k < 8; ++k) acc[b][k >> 2][nt][k & 3] *= lower[nt][k & 1];
                    }
                }
            }
            uint32_t p[2][4][NT][2];
#pragma unroll
            for (int sk = 0; sk < 4; ++sk) {
                float w[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const uint32_t byte = (scale[sk] >> 8 * i) & 255;
                    w[i] = (kind == 0 ? __uint_as_float(byte << 20) : 1.0f) * weight * (i & 1 ? odd : 1.0f);
                }
#pragma unroll
                for (int nt = 0; nt < NT; ++nt) {
                    uint32_t x[4];  // after transposing: tokens 32j + 8 sk + i and + 4
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float * from = &s[2 * i + (sk >> 1)][nt][2 * (sk & 1)];
                        x[i] = transpose(pack2(from[0] * w[i], from[1] * w[i]));
                    }
                    const int c = sk >> 1, s0 = 2 * (sk & 1);
                    p[c][s0][nt][0] = __byte_perm(x[0], x[2], 0x5410);
                    p[c][s0][nt][1] = __byte_perm(x[1], x[3], 0x5410);
                    p[c][s0 + 1][nt][0] = __byte_perm(x[0], x[2], 0x7632);
                    p[c][s0 + 1][nt][1] = __byte_perm(x[1], x[3], 0x7632);
                }
            }

            // --- values
            if (kind == 0) {
                switch (value_bits) {
                    case 2: add_values<2, NB, NT>(record, d_v, value_format.high, p, n8, j, acc, ones); break;
                    case 3: add_values<3, NB, NT>(record, d_v, value_format.high, p, n8, j, acc, ones); break;
                    case 4: add_values<4, NB, NT>(record, d_v, value_format.high, p, n8, j, acc, ones); break;
                    default: add_values<8, NB, NT>(record, d_v, value_format.high, p, n8, j, acc, ones); break;
                }
                const float mean_unit = power(weight_shift - 24);
#pragma unroll
                for (int b = 0; b < NB; ++b) {
                    const int d = value_dim(n8, b, 0);
                    const uint32_t means = d < d_v ? *reinterpret_cast<const uint32_t *>(record + value_format.mean + d) : 0;
                    const float2 low = __half22float2(as_half2(__byte_perm(means, 0, 0x1404))), high = __half22float2(as_half2(__byte_perm(means, 0, 0x3424)));
#pragma unroll
                    for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
                        for (int e = 0; e < 2; ++e) {
                            const float f = page_sum[nt][e] * mean_unit;
                            acc[b][0][nt][e] += f * low.x;
                            acc[b][0][nt][2 + e] += f * low.y;
                            acc[b][1][nt][e] += f * high.x;
                            acc[b][1][nt][2 + e] += f * high.y;
                        }
                    }
                }
            } else {
                const __half * rows = reinterpret_cast<const __half *>(value.rows) + kv * d_v;
#pragma unroll
                for (int b = 0; b < NB; ++b) {
                    const int d = value_dim(n8, b, 0);
#pragma unroll
                    for (int cs = 0; cs < 8; ++cs) {
                        uint2 x[4];
#pragma unroll
                        for (int byte = 0; byte < 4; ++byte) {
                            const int t = value_token(j, cs >> 2, cs & 3, byte);
                            x[byte] = d < d_v && cell0 + t < end ? *reinterpret_cast<const uint2 *>(rows + size_t(t) * call.row_v + d) : make_uint2(0, 0);
                        }
#pragma unroll
                        for (int nt = 0; nt < NT; ++nt) {
                            const uint32_t p0 = p[cs >> 2][cs & 3][nt][0], p1 = p[cs >> 2][cs & 3][nt][1];
                            mma(acc[b][0][nt], __byte_perm(x[0].x, x[2].x, 0x5410), __byte_perm(x[0].x, x[2].x, 0x7632),
                                __byte_perm(x[1].x, x[3].x, 0x5410), __byte_perm(x[1].x, x[3].x, 0x7632), p0, p1);
                            mma(acc[b][1][nt], __byte_perm(x[0].y, x[2].y, 0x5410), __byte_perm(x[0].y, x[2].y, 0x7632),
                                __byte_perm(x[1].y, x[3].y, 0x5410), __byte_perm(x[1].y, x[3].y, 0x7632), p0, p1);
                        }
                    }
                }
            }
        }
    }

    // --- joins the warps: two by two
    constexpr int kSlots = 8 * NB * NT + 4 * NT;
    float * const exchange = reinterpret_cast<float *>(memory);
#pragma unroll 1
    for (int apart = kDecodeWarps / 2; apart > 0; apart /= 2) {
        __syncthreads();
        if (warp >= apart && warp < 2 * apart) {
            float * to = exchange + (warp - apart) * kSlots * 32 + lane;
#pragma unroll
            for (int k = 0; k < 8 * NB * NT; ++k) to[32 * k] = acc[k / (8 * NT)][k / (4 * NT) % 2][k / 4 % NT][k & 3];
#pragma unroll
            for (int k = 0; k < 2 * NT; ++k) {
                to[32 * (8 * NB * NT + k)] = max_[k >> 1][k & 1];
                to[32 * (8 * NB * NT + 2 * NT + k)] = sum[k >> 1][k & 1];
            }
        }
        __syncthreads();
        if (warp < apart) {
            const float * from = exchange + warp * kSlots * 32 + lane;
            float mine[NT][2], other[NT][2];
#pragma unroll
            for (int k = 0; k < 2 * NT; ++k) {
                const float a = max_[k >> 1][k & 1], b = from[32 * (8 * NB * NT + k)], top = fmaxf(a, b);
                mine[k >> 1][k & 1] = a == top ? 1.0f : exp2_of(a - top);
                other[k >> 1][k & 1] = b == top ? 1.0f : exp2_of(b - top);
                max_[k >> 1][k & 1] = top;
                sum[k >> 1][k & 1] = sum[k >> 1][k & 1] * mine[k >> 1][k & 1] + from[32 * (8 * NB * NT + 2 * NT + k)] * other[k >> 1][k & 1];
            }
#pragma unroll
            for (int k = 0; k < 8 * NB * NT; ++k) {
                float & x = acc[k / (8 * NT)][k / (4 * NT) % 2][k / 4 % NT][k & 3];
                x = x * mine[k / 4 % NT][k & 1] + from[32 * k] * other[k / 4 % NT][k & 1];
            }
        }
    }
    if (warp != 0) return;

    const int n8 = own_n8, j = own_j, d_v = call.head_size_v;
    const size_t block = ((size_t(stream) * call.n_kv_heads + kv) * cut.n_tiles + tile) * cut.n_splits + split;
    float * const base = cut.partial + block * partial_floats(cut, d_v);
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int local = 8 * nt + 2 * j + e;
            if (local >= n_rows) continue;
            float * to;
            float scale = 0x1p-14f;
            if (cut.n_splits == 1) {
                const RowPlace at(cut, kv, row0 + local);
                to = call.out + stream * call.out_stream + at.head * call.out_head + at.token * call.out_token;
                scale *= close_softmax(max_[nt][e], sum[nt][e], call.sinks ? call.sinks + at.head : nullptr);
            } else {
                to = base + size_t(local) * d_v;
                if (n8 == 0) {
                    base[size_t(kRows) * d_v + local] = max_[nt][e];
                    base[size_t(kRows) * d_v + kRows + local] = sum[nt][e];
                }
            }
#pragma unroll
            for (int b = 0; b < NB; ++b) {
                const int d = value_dim(n8, b, 0);
                if (d >= d_v) continue;
#pragma unroll
                for (int i = 0; i < 4; ++i) to[d + i] = acc[b][i >> 1][nt][2 * (i & 1) + e] * scale;
            }
        }
    }
}

}  // namespace mixkvq::cuda
