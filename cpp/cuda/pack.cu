// Rows to records and back, and the query statistics. A block of threads takes a head of a page.
//
// Pack and unpack give the bytes of cpp/kernels/scalar.cpp: the same operations in the same order, none fused. Compile with -fmad=false, without
// flushing to zero and with exact division and square root, or the bytes change. Pages are 16-byte aligned, their rows multiples of 8 halfs.
#include <algorithm>

#include "common.cuh"
#include "launch.cuh"
#include "mma.cuh"
#include "observe.cuh"

namespace mixkvq::cuda {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

// --- rows -----------------------------------------------------------------------------------------------------

__device__ half finite_half(float x) { return float_to_half(x); }
__device__ half finite_half(half h) {
    const int magnitude = h & 0x7fff;
    return magnitude < 0x7c00 ? h : magnitude > 0x7c00 ? half(0) : half((h & 0x8000) | 0x7bff);
}

template <class Row>
__device__ void write_row(const Row * from, half * to, int row) {
    const bool aligned = ((reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to)) & 15) == 0;
    const int vectors = aligned ? row / 8 : 0;
    for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
        constexpr int n = 8 * sizeof(Row) / 16;
        uint4 in[n], out;
        for (int k = 0; k < n; ++k) in[k] = reinterpret_cast<const uint4 *>(from)[i * n + k];
        Row x[8];
        half h[8];
        memcpy(x, in, sizeof in);
        for (int k = 0; k < 8; ++k) h[k] = finite_half(x[k]);
        memcpy(&out, h, sizeof out);
        reinterpret_cast<uint4 *>(to)[i] = out;
    }
    for (int i = 8 * vectors + threadIdx.x; i < row; i += blockDim.x) to[i] = finite_half(from[i]);
}

__device__ void write_row_of(const RowWrite & first, const RowWrite & second, int i) {
    const RowWrite & write = i < first.n ? first : second;
    if (i >= first.n) i -= first.n;
    half * to = write.destination[i];
    if (!to) return;
    const uint8_t * from = static_cast<const uint8_t *>(write.source) + i * write.stride;
    if (write.source_is_half) {
        write_row(reinterpret_cast<const half *>(from), to, write.row);
    } else {
        write_row(reinterpret_cast<const float *>(from), to, write.row);
    }
}

__global__ void write_rows_kernel(const RowWrite first, const RowWrite second) { write_row_of(first, second, blockIdx.x); }

// --- keys -----------------------------------------------------------------------------------------------------

constexpr int kKeyThreads = 256;  // a thread per channel where channels are counted
constexpr int kChunk = 64;        // tokens in shared memory at once: what a word of top bits covers
constexpr int kSegment = 32;      // the smallest group
static_assert(kKeyThreads >= kMaxHeadSize, "a thread per channel");

// Halfs from token to token of a tile: an odd number of words, so that a column lies in different banks.
__device__ int tile_width(int head_size) { return head_size + 2; }

__device__ void load_tile(const half * rows, int row, int head_size, half * tile) {
    const int vectors = head_size / 8, width = tile_width(head_size);
#pragma unroll 4
    for (int i = threadIdx.x; i < kChunk * vectors; i += kKeyThreads) {
        const int t = i / vectors, d = i % vectors * 8;
        const uint4 x = *reinterpret_cast<const uint4 *>(rows + size_t(t) * row + d);
        uint32_t * to = reinterpret_cast<uint32_t *>(tile + t * width + d);
        to[0] = x.x;
        to[1] = x.y;
        to[2] = x.z;
        to[3] = x.w;
    }
}

__device__ void store_tile(const half * tile, half * rows, int row, int head_size) {
    const int vectors = head_size / 8, width = tile_width(head_size);
    for (int i = threadIdx.x; i < kChunk * vectors; i += kKeyThreads) {
        const int t = i / vectors, d = i % vectors * 8;
        const uint32_t * from = reinterpret_cast<const uint32_t *>(tile + t * width + d);
        *reinterpret_cast<uint4 *>(rows + size_t(t) * row + d) = make_uint4(from[0], from[1], from[2], from[3]);
    }
}

struct KeyShared {
    alignas(16) half tile[kChunk * (kMaxHeadSize + 2)];
    // By segment and channel; from channel_ranges() on by group, and at the end `hi` holds inverse scales.
    float lo[kPageCells / kSegment][kMaxHeadSize], hi[kPageCells / kSegment][kMaxHeadSize];
    float salience[kMaxHeadSize];
    half scale[kPageCells / kSegment][kMaxHeadSize];
    uint8_t own[kMaxHeadSize], tier[kMaxHeadSize], order[kMaxHeadSize];
    // Scales and bits that the tile's numbers are rounded with as they are read, for a page that is packed twice.
    half first_scale[kPageCells / kSegment][kMaxHeadSize];
    uint8_t bits[kMaxHeadSize], first_bits[kMaxHeadSize];
};

// Least and largest number of the tile's channels in each segment; infinities where no cell holds a token.
__device__ void segment_ranges(KeyShared & s, int head_size, int chunk, const CellMask & valid) {
    const int pairs = head_size / 2, width = tile_width(head_size);
    for (int i = threadIdx.x; i < pairs * (kChunk / kSegment); i += kKeyThreads) {
        const int d = i % pairs * 2, segment = i / pairs;
        const uint32_t cells = uint32_t(valid.word[chunk] >> kSegment * segment);
        const half * x = s.tile + segment * kSegment * width + d;
        float lo0 = INFINITY, lo1 = INFINITY, hi0 = -INFINITY, hi1 = -INFINITY;
#pragma unroll 8
        for (int t = 0; t < kSegment; ++t) {
            const uint32_t both = *reinterpret_cast<const uint32_t *>(x + t * width);
            if (!(cells >> t & 1)) continue;
            const float a = half_to_float(half(both)), b = half_to_float(half(both >> 16));
            lo0 = fminf(lo0, a);
            hi0 = fmaxf(hi0, a);
            lo1 = fminf(lo1, b);
            hi1 = fmaxf(hi1, b);
        }
        const int at = chunk * (kChunk / kSegment) + segment;
        s.lo[at][d] = lo0;
        s.hi[at][d] = hi0;
        s.lo[at][d + 1] = lo1;
        s.hi[at][d + 1] = hi1;
    }
}

// Segments to groups, in place, for channel d; returns the sum of the ranges. A zero becomes +0 whatever its sign.
__device__ float channel_ranges(KeyShared & s, int group, int d) {
    const int per_group = group / kSegment;
    float sum = 0;
    for (int g = 0; g < kPageCells / group; ++g) {
        float lo = INFINITY, hi = -INFINITY;
        for (int i = g * per_group; i < (g + 1) * per_group; ++i) {
            lo = fminf(lo, s.lo[i][d]);
            hi = fmaxf(hi, s.hi[i][d]);
        }
        s.lo[g][d] = lo = lo <= hi ? lo + 0.0f : 0.0f;
        s.hi[g][d] = hi = hi >= lo ? hi + 0.0f : 0.0f;
        sum += hi - lo;
    }
    return sum;
}

__device__ float inverse(half scale) {
    const float s = half_to_float(scale);
    return s > 0 ? 1.0f / s : 0.0f;
}

// Numbers from `lo` on as codes: see cpp/kernels/scalar.cpp.
struct Affine {
    float lo, scale, inv, top;
    half scale_half;

    __device__ Affine(float lo, half scale, int bits)
        : lo(lo), scale(half_to_float(scale)), inv(inverse(scale)), top(float((1 << min(bits, 8)) - 1)), scale_half(scale) {}
    __device__ float code(float x) const { return fminf(fmaxf(rintf((x - lo) * inv), 0.0f), top); }
    __device__ half back_half(float x) const { return float_to_half(lo + code(x) * scale); }
    __device__ float back(float x) const { return half_to_float(back_half(x)); }
};

// The scale of a range is that of the range as it reads back.
__device__ Affine affine_range(float lo, float hi, int bits) {
    const float top = float((1 << min(bits, 8)) - 1);
    const Affine first(lo, float_to_half((hi - lo) / top), bits);
    return Affine(lo, float_to_half((first.back(hi) - lo) / top), bits);
}

// Bits of the i-th tier below 16, the narrowest first, and how many channels a format has there.
__device__ int narrow_bits(int i) { return i < 3 ? 2 + i : 8; }
__device__ int tier_count(const KeyFormat & f, int bits) { return bits == 16 ? f.n16 : bits == 8 ? f.n8 : bits == 4 ? f.n4 : bits == 3 ? f.n3 : f.n2; }
__device__ int tier_at(const KeyFormat & f, int rank) {
    return rank < f.n16 ? 16 : rank < f.n16 + f.n8 ? 8 : rank < f.n16 + f.n8 + f.n4 ? 4 : rank < f.head_size - f.n2 ? 3 : 2;
}

// The page's chunk into the tile, once all threads are done with the one before; `again`: as it reads back the first time.
__device__ void load_chunk(KeyShared & s, const half * rows, int row, const KeyFormat & f, int chunk, bool again) {
    const int n = f.head_size, width = tile_width(n), per_group = f.group / kSegment;
    __syncthreads();
    load_tile(rows + size_t(chunk) * kChunk * row, row, n, s.tile);
    __syncthreads();
    if (!again) return;
    for (int i = threadIdx.x; i < kChunk * n; i += kKeyThreads) {
        const int t = i / n, d = i % n, g = (chunk * (kChunk / kSegment) + t / kSegment) / per_group;
        if (s.first_bits[d] == 16) continue;
        half & x = s.tile[t * width + d];
        x = Affine(s.lo[g][d], s.first_scale[g][d], s.first_bits[d]).back_half(half_to_float(x));
    }
    __syncthreads();
}

// How many cells of channel d of the tile read back as they are at these bits, of those in `cells`; at the first that does not, -1 if `all` must.
// `hi` is the end of each group's range.
__device__ int unchanged(const KeyShared & s, const KeyFormat & f, int chunk, uint64_t cells, int d, int bits, const float * hi, bool all,
                         const int round_bits = 16) {
    const int width = tile_width(f.head_size), per_group = f.group / kSegment;
    int same = 0;
    for (int segment = 0; segment < kChunk / kSegment; ++segment) {
        const int g = (chunk * (kChunk / kSegment) + segment) / per_group;
        const Affine a = affine_range(s.lo[g][d], hi[g], bits), own(s.lo[g][d], s.scale[g][d], round_bits);
        for (int t = segment * kSegment; t < (segment + 1) * kSegment; ++t) {
            if (!(cells >> t & 1)) continue;
            float x = half_to_float(s.tile[t * width + d]);
            if (round_bits < 16) x = own.back(x);
            const bool equal = a.back(x) == x;
            same += equal;
            if (all && !equal) return -1;
        }
    }
    return same;
}

// Whether rows come from a record, which they do if their channels fit its tiers; s.tier and s.bits then say how.
__device__ bool keep_tiers(KeyShared & s, const half * rows, int row, const KeyFormat & f, const CellMask & valid, bool again) {
    const int n = f.head_size, d = threadIdx.x;
    bool whole[4] = {true, true, true, true};
    float hi[kPageCells / kSegment];
    for (int g = 0; d < n && g < kPageCells / f.group; ++g) hi[g] = s.hi[g][d];
    for (int chunk = 0; chunk < 2; ++chunk) {
        load_chunk(s, rows, row, f, chunk, again);
        for (int i = 0; i < 4 && d < n; ++i) {
            const int bits = narrow_bits(i);
            whole[i] = whole[i] && tier_count(f, bits) > 0 && unchanged(s, f, chunk, valid.word[chunk], d, bits, hi, true) >= 0;
        }
    }
    if (d < n) s.own[d] = whole[0] ? 2 : whole[1] ? 3 : whole[2] ? 4 : whole[3] ? 8 : 16;
    __syncthreads();
    bool fits = true;
    if (d < n) {
        int rank = 0;
        for (int i = 0; i < n; ++i) rank += s.own[i] > s.own[d] || (s.own[i] == s.own[d] && i < d);
        s.tier[d] = uint8_t(tier_at(f, rank));
        s.bits[d] = s.own[d];
        fits = s.own[d] <= s.tier[d];
    }
    return __syncthreads_and(fits);
}

// The bits at which channels seem to have been packed before, judged by a sample of cells, to s.own; whether enough of them do. The last chunk is
// in the tile, the first is afterwards.
__device__ bool sampled_bits(KeyShared & s, const half * rows, int row, const KeyFormat & f, const CellMask & valid) {
    const uint64_t sample = 0x000000ff000000ffull;
    const int n = f.head_size, d = threadIdx.x;
    const int n_sample = __popcll(valid.word[0] & sample) + __popcll(valid.word[1] & sample);
    int same[4] = {};
    float hi[kPageCells / kSegment];
    for (int g = 0; d < n && g < kPageCells / f.group; ++g) hi[g] = s.hi[g][d];
    for (int chunk = 1; chunk >= 0; --chunk) {
        if (chunk == 0) load_chunk(s, rows, row, f, chunk, false);
        for (int i = 0; i < 4 && d < n; ++i) {
            if (tier_count(f, narrow_bits(i)) > 0) same[i] += unchanged(s, f, chunk, valid.word[chunk] & sample, d, narrow_bits(i), hi, false);
        }
    }
    int own = 16, best = 0;
    for (int i = 0; i < 4 && d < n; ++i) {
        if (2 * same[i] >= n_sample && same[i] > best) best = same[i], own = narrow_bits(i);
    }
    if (d < n) s.own[d] = uint8_t(own);
    const int known = __syncthreads_count(own < 16);
    return n_sample == 0 || 2 * known >= f.head_size - f.n16;
}

// Tiers by salience, but for channels that keep theirs.
__device__ void choose_tiers(KeyShared & s, const KeyFormat & f, bool is_new) {
    const int n = f.head_size, d = threadIdx.x;
    int own = d < n && !is_new ? s.own[d] : 16, known = 0;
    for (int i = 0; i < 4; ++i) {
        const int bits = narrow_bits(i), found = __syncthreads_count(own == bits);
        if (found <= tier_count(f, bits)) {
            known += found;
        } else if (own == bits) {
            own = 16;  // no record has so many
        }
    }
    if (2 * known < n - f.n16) own = 16;
    if (d < n) s.own[d] = uint8_t(own);
    __syncthreads();
    if (d < n) {
        int tier = own;
        if (own == 16) {
            int rank = 0, kept[17] = {};
            for (int i = 0; i < n; ++i) {
                ++kept[s.own[i]];
                rank += s.own[i] == 16 && (s.salience[i] > s.salience[d] || (s.salience[i] == s.salience[d] && i < d));
            }
            for (int i = 0; i < 5; ++i) {
                tier = i == 0 ? 16 : narrow_bits(4 - i);
                const int room = tier_count(f, tier) - (i == 0 ? 0 : kept[tier]);
                if (rank < room) break;
                rank -= room;
            }
        }
        s.tier[d] = s.bits[d] = uint8_t(tier);
    }
    __syncthreads();
}

// Scales of the chosen bits; whether a channel comes out so that fewer bits than its tier's would hold it.
__device__ bool any_narrower(KeyShared & s, const half * rows, int row, const KeyFormat & f, const CellMask & valid) {
    const int n = f.head_size, d = threadIdx.x;
    bool narrower[4] = {};
    float hi[kPageCells / kSegment];  // as they read back
    for (int g = 0; d < n && g < kPageCells / f.group; ++g) {
        const Affine a(s.lo[g][d], s.scale[g][d], s.bits[d]);
        hi[g] = s.bits[d] == 16 ? s.hi[g][d] : a.back(s.hi[g][d]);
    }
    for (int i = 0; i < 4 && d < n; ++i) narrower[i] = tier_count(f, narrow_bits(i)) > 0 && narrow_bits(i) < s.tier[d];
    for (int chunk = 0; chunk < 2; ++chunk) {
        if (chunk == 1) load_chunk(s, rows, row, f, chunk, false);
        for (int i = 0; i < 4 && d < n; ++i) {
            narrower[i] = narrower[i] && unchanged(s, f, chunk, valid.word[chunk], d, narrow_bits(i), hi, true, s.bits[d]) >= 0;
        }
    }
    return __syncthreads_or(narrower[0] || narrower[1] || narrower[2] || narrower[3]);
}

__device__ void set_scales(KeyShared & s, const KeyFormat & f) {
    const int d = threadIdx.x;
    for (int g = 0; d < f.head_size && g < kPageCells / f.group; ++g) s.scale[g][d] = affine_range(s.lo[g][d], s.hi[g][d], s.bits[d]).scale_half;
    __syncthreads();
}

// The rows as they read back with the chosen tiers are what is packed from here on.
__device__ void read_back(KeyShared & s, const KeyFormat & f) {
    const int d = threadIdx.x;
    if (d < f.head_size) {
        s.first_bits[d] = s.bits[d];
        for (int g = 0; g < kPageCells / f.group; ++g) {
            s.first_scale[g][d] = s.scale[g][d];
            if (s.bits[d] < 16) s.hi[g][d] = Affine(s.lo[g][d], s.scale[g][d], s.bits[d]).back(s.hi[g][d]);
        }
    }
    __syncthreads();
}

// The tile's codes and F16 channels. s.lo and s.hi hold minima and inverse scales.
__device__ void store_key_codes(const KeyShared & s, const KeyFormat & f, int chunk, uint64_t cells, uint8_t * record) {
    const int width = tile_width(f.head_size), per_group = f.group / kSegment;
    for (int i = threadIdx.x; i < f.n16 * (kChunk / 2); i += kKeyThreads) {
        const int r = i / (kChunk / 2), t = i % (kChunk / 2) * 2, d = s.order[r];
        uint32_t x[2] = {s.tile[t * width + d], s.tile[(t + 1) * width + d]};
        if (s.bits[d] < 16) {
            const int g = (chunk * (kChunk / kSegment) + t / kSegment) / per_group;
            const Affine a(s.lo[g][d], s.scale[g][d], s.bits[d]);
            for (int k = 0; k < 2; ++k) x[k] = a.back_half(half_to_float(half(x[k])));
        }
        for (int k = 0; k < 2; ++k) x[k] = cells >> (t + k) & 1 ? x[k] : 0;
        *reinterpret_cast<uint32_t *>(record + 2 * (r * kPageCells + chunk * kChunk + t)) = x[0] | x[1] << 16;
    }
    for (int i = threadIdx.x; i < (f.head_size - f.n16) * 2; i += kKeyThreads) {
        const KeyQuad quad(f, i / 8);
        const int t = i % 8;
        uint32_t code[8] = {};
        for (int r = 0; r < 4; ++r) {
            const int d = s.order[f.n16 + i / 8 * 4 + r];
            const float top = float((1 << s.bits[d]) - 1);
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                const int g = (chunk * (kChunk / kSegment) + k / 4) / per_group;
                const float x = half_to_float(s.tile[(8 * k + t) * width + d]);
                const uint32_t c = uint32_t(fminf(fmaxf(rintf((x - s.lo[g][d]) * s.hi[g][d]), 0.0f), top));
                if (cells >> (8 * k + t) & 1) code[k] |= c << 8 * r;
            }
        }
        uint32_t * low = reinterpret_cast<uint32_t *>(record + quad.offset);
        store_codes(quad.bits, code, low + chunk * 8 * low_bits(quad.bits) + t, 8, low + 32 + chunk * 8 + t);
    }
}

__global__ void __launch_bounds__(kKeyThreads) pack_keys_kernel(const KeyHead * heads, int n_heads, int row, const PageJob * jobs,
                                                                const float * importance) {
    __shared__ KeyShared s;
    const int head = blockIdx.x % n_heads, d = threadIdx.x;
    const PageJob & job = jobs[blockIdx.x / n_heads];
    const KeyFormat f = heads[head].format;
    const KeyPlaces at(f);
    const CellMask valid = job.valid;
    const int n = f.head_size, groups = at.groups;
    const half * rows = job.rows + size_t(head) * n;
    uint8_t * record = job.records + heads[head].record_offset;

    for (int chunk = 0; chunk < 2; ++chunk) {
        load_chunk(s, rows, row, f, chunk, false);
        segment_ranges(s, n, chunk, valid);
    }
    __syncthreads();
    if (d < n) {
        const float salience = importance[size_t(head) * n + d] * channel_ranges(s, f.group, d);
        s.salience[d] = salience > 0 ? salience : 0;  // NaN sorts as 0
    }
    __syncthreads();

    const bool is_new = !sampled_bits(s, rows, row, f, valid);
    bool again = false;
    uint8_t sampled = d < n ? s.own[d] : 16;
    if (!is_new && keep_tiers(s, rows, row, f, valid, false)) {
        set_scales(s, f);
    } else {
        if (d < n) s.own[d] = sampled;
        if (!is_new) load_chunk(s, rows, row, f, 0, false);
        choose_tiers(s, f, is_new);
        set_scales(s, f);
        again = any_narrower(s, rows, row, f, valid);
        if (again) {  // then the page is packed once more, from the rows as they read back
            read_back(s, f);
            keep_tiers(s, rows, row, f, valid, true);
            set_scales(s, f);
        }
    }

    if (d < n) {
        int rank = 0;
        for (int i = 0; i < n; ++i) rank += s.tier[i] > s.tier[d] || (s.tier[i] == s.tier[d] && i < d);
        s.order[rank] = uint8_t(d);
        record[at.order + rank] = uint8_t(d);
        const int coded = rank - f.n16;
        for (int g = 0; g < groups; ++g) {
            s.hi[g][d] = inverse(s.scale[g][d]);
            if (coded < 0) continue;
            reinterpret_cast<half *>(record + at.scale)[coded * groups + g] = s.scale[g][d];
            reinterpret_cast<half *>(record + at.min)[coded * groups + g] = float_to_half(s.lo[g][d]);
        }
    }
    for (uint32_t i = at.order + n + threadIdx.x; i < at.bytes; i += kKeyThreads) record[i] = 0;
    __syncthreads();

    store_key_codes(s, f, 1, valid.word[1], record);  // its tile is still there
    load_chunk(s, rows, row, f, 0, again);
    store_key_codes(s, f, 0, valid.word[0], record);
}

__global__ void __launch_bounds__(kKeyThreads) unpack_keys_kernel(const KeyHead * heads, int n_heads, int row, const PageJob * jobs) {
    alignas(16) __shared__ half tile[kChunk * (kMaxHeadSize + 2)];
    const int head = blockIdx.x % n_heads;
    const PageJob & job = jobs[blockIdx.x / n_heads];
    const KeyFormat f = heads[head].format;
    const KeyPlaces at(f);
    const int n = f.head_size, width = tile_width(n), groups = at.groups, per_group = f.group / kSegment;
    half * rows = job.rows + size_t(head) * n;
    const uint8_t * record = job.records + heads[head].record_offset;
    const uint8_t * order = record + at.order;

    for (int chunk = 0; chunk < 2; ++chunk) {
        for (int i = threadIdx.x; i < f.n16 * kChunk; i += kKeyThreads) {
            const int r = i / kChunk, t = i % kChunk;
            tile[t * width + order[r]] = reinterpret_cast<const half *>(record)[r * kPageCells + chunk * kChunk + t];
        }
        for (int i = threadIdx.x; i < (n - f.n16) * 2; i += kKeyThreads) {
            const KeyQuad quad(f, i / 8);
            const int t = i % 8, rank = i / 8 * 4;
            const uint32_t * low = reinterpret_cast<const uint32_t *>(record + quad.offset);
            for (int k = 0; k < 8; ++k) {
                const uint32_t codes = load_codes(quad.bits, k, low + chunk * 8 * low_bits(quad.bits) + t, 8, low + 32 + chunk * 8 + t);
                const int g = (chunk * (kChunk / kSegment) + k / 4) / per_group;
                for (int r = 0; r < 4; ++r) {
                    const float scale = half_to_float(reinterpret_cast<const half *>(record + at.scale)[(rank + r) * groups + g]);
                    const float min = half_to_float(reinterpret_cast<const half *>(record + at.min)[(rank + r) * groups + g]);
                    tile[(8 * k + t) * width + order[f.n16 + rank + r]] = float_to_half(min + float(codes >> 8 * r & 255) * scale);
                }
            }
        }
        __syncthreads();
        store_tile(tile, rows + size_t(chunk) * kChunk * row, row, n);
        __syncthreads();
    }
}

// --- values ---------------------------------------------------------------------------------------------------

constexpr int kValueThreads = 512;
constexpr int kValueWarps = kValueThreads / 32;

// A warp holds a token: lane l has dimensions l, l + 32, ... in its registers, 0 beyond the head.

__device__ inline int lane() { return threadIdx.x % 32; }

template <int slots>
__device__ void load_row(const half * row, int n, float (&x)[slots]) {
#pragma unroll
    for (int i = 0; i < slots; ++i) {
        const int d = lane() + 32 * i;
        x[i] = d < n ? half_to_float(row[d]) : 0.0f;
    }
}

// The normalised Walsh-Hadamard transform in blocks: distances below 32 between lanes, the rest between registers.
template <int slots>
__device__ void rotate(float (&x)[slots], int block) {
#pragma unroll
    for (int h = 1; h < 32; h *= 2) {
        if (h >= block) break;
#pragma unroll
        for (int i = 0; i < slots; ++i) {
            const float other = __shfl_xor_sync(kAllLanes, x[i], h);
            x[i] = lane() & h ? other - x[i] : x[i] + other;
        }
    }
#pragma unroll
    for (int h = 1; h < slots; h *= 2) {
        if (32 * h >= block) break;
#pragma unroll
        for (int i = 0; i < slots; ++i) {
            if (i & h) continue;
            const float a = x[i], b = x[i + h];
            x[i] = a + b;
            x[i + h] = a - b;
        }
    }
    const float norm = 1.0f / sqrtf(float(block));
#pragma unroll
    for (int i = 0; i < slots; ++i) x[i] *= norm;
}

__device__ float warp_min(float x) {
    for (int h = 16; h > 0; h /= 2) x = fminf(x, __shfl_xor_sync(kAllLanes, x, h));
    return x;
}
__device__ float warp_max(float x) {
    for (int h = 16; h > 0; h /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, h));
    return x;
}

// The sum of a token's numbers in the order of eight vector lanes, known to all lanes.
template <int slots>
__device__ float sum_of_lanes(const float (&x)[slots]) {
    float s = 0;  // of dimensions lane % 8, + 8, + 16, ...
#pragma unroll
    for (int i = 0; i < slots; ++i) {
#pragma unroll
        for (int k = 0; k < 32; k += 8) s += __shfl_sync(kAllLanes, x[i], lane() % 8 + k);
    }
    s += __shfl_xor_sync(kAllLanes, s, 4);
    s += __shfl_xor_sync(kAllLanes, s, 2);
    s += __shfl_xor_sync(kAllLanes, s, 1);
    return s;
}

// The scale of a rotated token, known to all lanes.
template <int slots>
__device__ uint8_t rotated_scale(int bits, int n, const float (&x)[slots]) {
    if (bits == 8) {
        float top = 0;
#pragma unroll
        for (int i = 0; i < slots; ++i) top = fmaxf(top, fabsf(x[i]));
        return scale_byte(warp_max(top) / 127.5f, 0x7f);  // upwards: nothing is cut off
    }
    float square[slots];
#pragma unroll
    for (int i = 0; i < slots; ++i) square[i] = x[i] * x[i];
    return scale_byte(sqrtf(sum_of_lanes(square) / float(n)) * gaussian_step(bits), 0x40);
}

template <int slots>
struct ValueShared {
    uint32_t codes[kPageCells / 4 * 32 * slots];  // [token quad][dimension], a byte per token; before that phases, [token][dimension]
    float mean[32 * slots], exact[32 * slots], square[32 * slots];
    float inv[kPageCells];  // of the scales that tokens seem to have had, or 0
    uint8_t own[32 * slots], near[32 * slots];  // bytes of means: that of the rows themselves, that of which they are rid
    float least;
};

// --- rotated values that come from a record: see cpp/kernels/scalar.cpp

constexpr int kPhases = 256;
__device__ int phase_of(float z, float inv) { return (int(floorf(z * inv * float(kPhases))) & (kPhases - 1)) - kPhases / 2; }

__device__ int warp_sum(int x) {
    for (int h = 16; h > 0; h /= 2) x += __shfl_xor_sync(kAllLanes, x, h);
    return x;
}

template <int slots>
__device__ uint8_t kept_scale(int bits, int n, const float (&z)[slots], int dims) {
    const int guess = rotated_scale(bits, n, z), above = scales_above(bits);
    float peak = 0;
#pragma unroll
    for (int i = 0; i < slots; ++i) peak = fmaxf(peak, fabsf(z[i]));
    peak = warp_max(peak);
    int fewest = kPhases / 8 * dims, best = 0;
    for (int i = 1; i <= 2 * max(above, kScalesBelow) + 1 && fewest > kPhases / 64 * dims; ++i) {
        const int by = i % 2 ? -(i / 2) : i / 2, byte = guess + by;  // 0, 1, -1, 2, ...
        if (by < -kScalesBelow || by > above || byte <= 0 || byte > 0xf7) continue;
        const float inv = 1.0f / scale_of(uint8_t(byte));
        if (peak * inv > float(1 << (bits - 1))) continue;
        int off = 0;
#pragma unroll
        for (int k = 0; k < slots; ++k) off += lane() + 32 * k < dims ? abs(phase_of(z[k], inv)) : 0;
        off = warp_sum(off);
        if (off < fewest) fewest = off, best = byte;
    }
    return uint8_t(best);
}

__device__ uint8_t large_mean_byte(float x, float least) {
    const uint8_t byte = mean_byte(x);
    return fabsf(x) < least || byte == 0x80 ? 0 : byte;
}

// A token, rotated, without the means.
template <int slots>
__device__ void rotated_row(const half * row, int n, const float * mean, float (&x)[slots]) {
    load_row(row, n, x);
    rotate(x, n & -n);
#pragma unroll
    for (int i = 0; i < slots; ++i) x[i] = lane() + 32 * i < n ? x[i] - mean[lane() + 32 * i] : 0.0f;
}

// How far dimension d would be from the middles of its steps with another mean, over all tokens.
__device__ int off_with(const int8_t * phase, const float * inv, int n, int d, float mean, float near) {
    int sum = 0;
    for (int t = 0; t < kPageCells; ++t) {
        if (inv[t] == 0) continue;
        const float away = fminf(fmaxf((mean - near) * inv[t], -16384.0f), 16384.0f);
        const int moved = int(floorf(away * float(kPhases) + 0.5f));
        sum += abs(((phase[t * n + d] - moved + kPhases / 2) & (kPhases - 1)) - kPhases / 2);
    }
    return sum;
}

__device__ uint8_t kept_mean(const int8_t * phase, const float * inv, int n, int d, float least, float exact, uint8_t own, uint8_t near) {
    const float was = mean_of(near);
    float total = 0, weight = 0;  // least squares
    int count = 0;
    for (int t = 0; t < kPageCells; ++t) {
        if (inv[t] == 0) continue;
        total += (float(phase[t * n + d]) + 0.5f) * inv[t];
        weight += inv[t] * inv[t];
        ++count;
    }
    uint8_t best = large_mean_byte(was + (weight > 0 ? total / (weight * float(kPhases)) : 0.0f), least * 0.5f);
    int fewest = off_with(phase, inv, n, d, mean_of(best), was);
    if (fewest <= kPhases / 16 * count && (best == near || best == 0)) return best;
    const int around = near ? near : own, sign = around & 0x80, magnitude = around & 0x7f;
    const int others[4] = {sign | min(magnitude + 1, 0x7b), sign | max(magnitude - 1, 0), near ? 0 : own, 0};
    for (int byte : others) {
        const int off = off_with(phase, inv, n, d, mean_of(uint8_t(byte)), was);
        const bool nearer = fabsf(mean_of(uint8_t(byte)) - exact) < fabsf(mean_of(best) - exact);
        if (off < fewest - count || (nearer && off <= fewest + count)) fewest = off, best = uint8_t(byte);
    }
    return best;
}

// The cell of the i-th row to look at, or -1.
__device__ int sample_cell(const CellMask & valid, int i) {
    for (int k = 0; k < kPageCells; ++k) {
        const int t = k % 8 * 16 + k / 8;
        if (valid.test(t) && i-- == 0) return t;
    }
    return -1;
}

// The means of the page's rows, rotated, to the record and to `mean`, and whether the rows come from a record: then they are the means of that one.
template <int slots>
__device__ bool rotated_means(ValueShared<slots> & s, const half * rows, int row, int bits, int n, const CellMask & valid, uint8_t * record) {
    const int d = threadIdx.x, count = max(__popcll(valid.word[0]) + __popcll(valid.word[1]), 1);
    if (d < n) {
        float sum = 0, square = 0;
#pragma unroll 16
        for (int t = 0; t < kPageCells; ++t) {
            const float x = half_to_float(rows[size_t(t) * row + d]);
            if (!valid.test(t)) continue;
            sum += x;
            square += x * x;
        }
        s.mean[d] = sum / float(count);
        s.square[d] = square;
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        float x[slots], square[slots];
#pragma unroll
        for (int i = 0; i < slots; ++i) {
            const bool inside = lane() + 32 * i < n;
            x[i] = inside ? s.mean[lane() + 32 * i] : 0.0f;
            square[i] = inside ? s.square[lane() + 32 * i] : 0.0f;
        }
        const float least = sqrtf(sum_of_lanes(square) / float(count * n)) * kLeastMean;
        rotate(x, n & -n);
#pragma unroll
        for (int i = 0; i < slots; ++i) {
            const int d = lane() + 32 * i;
            if (d >= n) continue;
            s.exact[d] = x[i];
            record[d] = large_mean_byte(x[i], least);
            s.near[d] = bits > 2 ? record[d] : mean_byte(x[i]);  // see scalar.cpp
            s.own[d] = bits > 2 ? mean_byte(x[i]) : uint8_t(0);
            s.mean[d] = mean_of(s.near[d]);
        }
        if (lane() == 0) s.least = least;
    }
    __syncthreads();

    const int looked = min(count, kSample);
    bool kept = false;
    if (threadIdx.x / 32 < kSample) {
        const int t = sample_cell(valid, threadIdx.x / 32);
        if (t >= 0) {
            float x[slots];
            rotated_row(rows + size_t(t) * row, n, s.mean, x);
            kept = kept_scale(bits, n, x, kSampleDims) > 0;
        }
    }
    const int n_kept = __syncthreads_count(kept && lane() == 0);
    const bool from_record = (valid.word[0] | valid.word[1]) != 0 && 2 * n_kept >= looked;
    int8_t * phase = reinterpret_cast<int8_t *>(s.codes);
    bool changed = true;
    for (int round = 0; round < kMeanRounds && from_record && changed; ++round) {  // with better means, more rows find their scale
        for (int t = threadIdx.x / 32; t < kPageCells; t += kValueWarps) {
            float inv = 0;
            if (valid.test(t)) {
                float x[slots];
                rotated_row(rows + size_t(t) * row, n, s.mean, x);
                const uint8_t scale = kept_scale(bits, n, x, n);
                if (scale > 0) inv = 1.0f / scale_of(scale);
#pragma unroll
                for (int i = 0; i < slots; ++i) {
                    if (inv > 0 && lane() + 32 * i < n) phase[t * n + lane() + 32 * i] = int8_t(phase_of(x[i], inv));
                }
            }
            if (lane() == 0) s.inv[t] = inv;
        }
        __syncthreads();
        uint8_t byte = 0;
        if (d < n) byte = kept_mean(phase, s.inv, n, d, s.least, s.exact[d], s.own[d], s.near[d]);
        changed = __syncthreads_count(d < n && byte != s.near[d]) > 0;
        if (d < n) {
            record[d] = s.near[d] = byte;
            s.mean[d] = mean_of(byte);
        }
        __syncthreads();
    }
    if (d < n) s.mean[d] = mean_of(record[d]);
    __syncthreads();
    return from_record;
}

// Codes of a token into x, and its scale into the record.
template <int slots>
__device__ void rotated_codes(const ValueFormat & f, const half * row, const float * mean, bool from_record, float (&x)[slots], uint8_t * scale) {
    const int n = f.head_size;
    rotated_row(row, n, mean, x);
    uint8_t s = from_record ? kept_scale(f.bits, n, x, n) : 0;
    if (s == 0) s = rotated_scale(f.bits, n, x);
    if (lane() == 0) *scale = s;
    const float inv = s > 0 ? 1.0f / scale_of(s) : 0.0f, middle = float(1 << (f.bits - 1));
#pragma unroll
    for (int i = 0; i < slots; ++i) x[i] = fminf(fmaxf(floorf(x[i] * inv), -middle), middle - 1.0f) + middle;
}

template <int slots>
__device__ void grouped_codes(const ValueFormat & f, float (&x)[slots], half * scale, half * min) {
#pragma unroll
    for (int i = 0; i < slots; i += 2) {  // 64 dimensions: one group or two
        float lo[2], hi[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const bool inside = lane() + 32 * (i + k) < f.head_size;
            lo[k] = inside ? x[i + k] : INFINITY;
            hi[k] = inside ? x[i + k] : -INFINITY;
        }
        if (f.group == 64) {
            lo[0] = lo[1] = fminf(lo[0], lo[1]);
            hi[0] = hi[1] = fmaxf(hi[0], hi[1]);
        }
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            if (32 * (i + k) >= f.head_size) break;
            const float low = warp_min(lo[k]) + 0.0f, high = warp_max(hi[k]) + 0.0f;  // a zero becomes +0
            const Affine a = affine_range(low, high, f.bits);
            const int g = 32 * (i + k) / f.group;
            if (lane() == 0) {
                scale[g] = a.scale_half;
                min[g] = float_to_half(low);
            }
            x[i + k] = a.code(x[i + k]);
        }
    }
}

template <int slots>
__global__ void __launch_bounds__(kValueThreads) pack_values_kernel(const ValueHead * heads, int n_heads, int row, const PageJob * jobs) {
    __shared__ ValueShared<slots> shared;
    const int head = blockIdx.x % n_heads;
    const PageJob & job = jobs[blockIdx.x / n_heads];
    const ValueFormat f = heads[head].format;
    const ValuePlaces at(f);
    const CellMask valid = job.valid;
    const int n = f.head_size;
    const half * rows = job.rows + size_t(head) * n;
    uint8_t * record = job.records + heads[head].record_offset;
    half * scales = reinterpret_cast<half *>(record + at.scale);
    half * mins = reinterpret_cast<half *>(record + at.min);
    const bool rotated = f.group == 0;

    const bool from_record = rotated && rotated_means<slots>(shared, rows, row, f.bits, n, valid, record + at.mean);
    for (int t = threadIdx.x / 32; t < kPageCells; t += kValueWarps) {
        float x[slots] = {};
        if (valid.test(t)) {
            if (rotated) {
                rotated_codes(f, rows + size_t(t) * row, shared.mean, from_record, x, record + at.scale + t);
            } else {
                load_row(rows + size_t(t) * row, n, x);
                grouped_codes(f, x, scales + t * at.groups, mins + t * at.groups);
            }
        } else if (rotated) {
            if (lane() == 0) record[at.scale + t] = 0;
        } else if (lane() < at.groups) {
            scales[t * at.groups + lane()] = 0;
            mins[t * at.groups + lane()] = 0;
        }
        uint8_t * code = reinterpret_cast<uint8_t *>(shared.codes + t / 4 * n) + t % 4;
#pragma unroll
        for (int i = 0; i < slots; ++i) {
            const int d = lane() + 32 * i;
            if (d < n) code[4 * d] = uint8_t(x[i]);
        }
    }
    const uint32_t end = rotated ? at.mean + n : at.min + 2 * kPageCells * at.groups;
    for (uint32_t i = end + threadIdx.x; i < at.bytes; i += kValueThreads) record[i] = 0;
    __syncthreads();

    for (int i = threadIdx.x; i < 4 * n; i += kValueThreads) {
        const int chunk = i / n, d = i % n;
        uint32_t code[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) code[k] = shared.codes[(chunk * 8 + k) * n + d];
        uint32_t * words = reinterpret_cast<uint32_t *>(record);
        store_codes(f.bits, code, words + chunk * low_bits(f.bits) * n + d, n, words + at.high / 4 + chunk * n + d);
    }
}

template <int slots>
__global__ void __launch_bounds__(kValueThreads) unpack_values_kernel(const ValueHead * heads, int n_heads, int row, const PageJob * jobs) {
    const int head = blockIdx.x % n_heads;
    const PageJob & job = jobs[blockIdx.x / n_heads];
    const ValueFormat f = heads[head].format;
    const ValuePlaces at(f);
    const int n = f.head_size;
    half * rows = job.rows + size_t(head) * n;
    const uint8_t * record = job.records + heads[head].record_offset;
    const uint32_t * words = reinterpret_cast<const uint32_t *>(record);
    const half * scales = reinterpret_cast<const half *>(record + at.scale);
    const half * mins = reinterpret_cast<const half *>(record + at.min);

    for (int t = threadIdx.x / 32; t < kPageCells; t += kValueWarps) {
        const int chunk = t / 32, k = t % 32 / 4;
        float x[slots];
#pragma unroll
        for (int i = 0; i < slots; ++i) {
            const int d = lane() + 32 * i;
            x[i] = 0;
            if (d >= n) continue;
            const uint32_t codes = load_codes(f.bits, k, words + chunk * low_bits(f.bits) * n + d, n, words + at.high / 4 + chunk * n + d);
            const float code = float(codes >> t % 4 * 8 & 255);
            if (f.group == 0) {
                x[i] = mean_of(record[at.mean + d]) + (code + 0.5f - float(1 << (f.bits - 1))) * scale_of(record[at.scale + t]);
            } else {
                const int g = t * at.groups + d / f.group;
                x[i] = half_to_float(mins[g]) + code * half_to_float(scales[g]);
            }
        }
        if (f.group == 0) rotate(x, n & -n);
#pragma unroll
        for (int i = 0; i < slots; ++i) {
            const int d = lane() + 32 * i;
            if (d < n) rows[size_t(t) * row + d] = float_to_half(x[i]);
        }
    }
}

// --- query statistics -----------------------------------------------------------------------------------------

constexpr int kObserveThreads = 512;
constexpr int kObserveChannels = 8;  // of a block: a sector of memory per query
constexpr int kObserveRows = kObserveThreads / kObserveChannels;
constexpr int kFewThreads = 1024;
constexpr size_t kFew = 1 << 15;  // numbers that one block reads by itself

__global__ void __launch_bounds__(kObserveThreads) observe_kernel(QuerySums sums, Queries c, int head_size, float memory) {
    __shared__ float abs[kObserveThreads], sqr[kObserveThreads];
    const int stream = blockIdx.y;
    const size_t its = stream * sums.stream;
    const int chunks = head_size / kObserveChannels, kv_head = blockIdx.x / chunks, i = threadIdx.x;
    const int d = blockIdx.x % chunks * kObserveChannels + i % kObserveChannels;
    float a = 0, b = 0;
    add_queries(c, stream, kv_head, d, i / kObserveChannels, kObserveRows, a, b);
    abs[i] = a;
    sqr[i] = b;
    for (int h = kObserveThreads / 2; h >= kObserveChannels; h /= 2) {
        __syncthreads();
        if (i >= h) continue;
        abs[i] += abs[i + h];
        sqr[i] += sqr[i + h];
    }
    if (i < kObserveChannels) add_sums(sums, its + kv_head * head_size + d, abs[i], sqr[i], Fading(sums.count[its], c.n, memory));
}

// After observe_kernel, whose blocks all read the old count.
__global__ void count_kernel(QuerySums sums, int n, float memory) {
    float & count = sums.count[blockIdx.x * sums.stream];
    count = Fading(count, n, memory).count;
}

// Both in one, by a block, for a few queries.
__device__ void observe_few(const QuerySums & sums, const Queries & c, int n_kv_heads, int head_size, float memory) {
    for (int stream = 0; stream < c.n_streams; ++stream) {
        const size_t its = stream * sums.stream;
        const Fading fading(sums.count[its], c.n, memory);
        for (int i = threadIdx.x; i < n_kv_heads * head_size; i += kFewThreads) {
            float abs = 0, sqr = 0;
            add_queries(c, stream, i / head_size, i % head_size, 0, 1, abs, sqr);
            add_sums(sums, its + i, abs, sqr, fading);
        }
        __syncthreads();
        if (threadIdx.x == 0) sums.count[its] = fading.count;
    }
}
__global__ void __launch_bounds__(kFewThreads) observe_few_kernel(QuerySums sums, Queries c, int n_kv_heads, int head_size, float memory) {
    observe_few(sums, c, n_kv_heads, head_size, memory);
}

// What a token brings to a layer. The last block observes.
__global__ void __launch_bounds__(kFewThreads)
    token_kernel(const RowWrite keys, const RowWrite values, QuerySums sums, Queries c, int n_kv_heads, int head_size, float memory) {
    const int i = blockIdx.x;
    if (i < keys.n + values.n) {
        write_row_of(keys, values, i);
    } else {
        observe_few(sums, c, n_kv_heads, head_size, memory);
    }
}

bool are_few(const Observation & o, const Queries & queries) { return size_t(queries.n) * o.n_streams * o.n_kv_heads * o.head_size <= kFew; }

}  // namespace

void write_rows(Stream stream, const RowWrite & write, const RowWrite & second) {
    const int n = write.n + second.n, row = std::max(write.row, second.row);
    if (n == 0) return;
    const int threads = row <= 512 ? 64 : row <= 1024 ? 128 : 256;
    launch(write_rows_kernel, n, threads, 0, stream, write, second);
}

void pack_keys(Stream stream, const KeyHead * heads, int n_heads, int, int row, const PageJob * jobs, int n_jobs, const float * importance) {
    if (n_jobs == 0) return;
    launch(pack_keys_kernel, n_jobs * n_heads, kKeyThreads, 0, stream, heads, n_heads, row, jobs, importance);
}

void unpack_keys(Stream stream, const KeyHead * heads, int n_heads, int, int row, const PageJob * jobs, int n_jobs) {
    if (n_jobs == 0) return;
    launch(unpack_keys_kernel, n_jobs * n_heads, kKeyThreads, 0, stream, heads, n_heads, row, jobs);
}

void pack_values(Stream stream, const ValueHead * heads, int n_heads, int head_size, int row, const PageJob * jobs, int n_jobs) {
    if (n_jobs == 0) return;
    auto * kernel = head_size <= 128 ? pack_values_kernel<4> : pack_values_kernel<8>;
    launch(kernel, n_jobs * n_heads, kValueThreads, 0, stream, heads, n_heads, row, jobs);
}

void unpack_values(Stream stream, const ValueHead * heads, int n_heads, int head_size, int row, const PageJob * jobs, int n_jobs) {
    if (n_jobs == 0) return;
    auto * kernel = head_size <= 128 ? unpack_values_kernel<4> : unpack_values_kernel<8>;
    launch(kernel, n_jobs * n_heads, kValueThreads, 0, stream, heads, n_heads, row, jobs);
}

void observe(Stream stream, const Observation & o) {
    const Queries queries = queries_of(o);
    if (queries.n == 0) return;
    if (are_few(o, queries)) {
        launch(observe_few_kernel, 1, kFewThreads, 0, stream, o.sums, queries, o.n_kv_heads, o.head_size, o.memory);
    } else {
        launch(observe_kernel, dim3(o.n_kv_heads * (o.head_size / kObserveChannels), o.n_streams), kObserveThreads, 0, stream, o.sums, queries, o.head_size,
               o.memory);
        launch(count_kernel, o.n_streams, 1, 0, stream, o.sums, queries.n, o.memory);
    }
}

void write_and_observe(Stream stream, const NewRows & rows) {
    const Observation & o = rows.queries;
    const Queries queries = queries_of(o);
    if (queries.n == 0 || !are_few(o, queries)) {
        write_rows(stream, rows.keys, rows.values);
        observe(stream, o);
    } else {
        launch(token_kernel, rows.keys.n + rows.values.n + 1, kFewThreads, 0, stream, rows.keys, rows.values, o.sums, queries, o.n_kv_heads, o.head_size,
               o.memory);
    }
}

}  // namespace mixkvq::cuda
