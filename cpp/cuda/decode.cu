// Attention of few queries over long caches.
//
// Two warps, a pair, take packed pages one by one: while they work on a page's keys its values are on their way to shared memory, while they work on
// its values the next page's keys. Codes go as bytes into integer tensor cores. Tokens (then dimensions) are the rows of their tiles; a query is two
// columns, the high and the low bytes of 16-bit numbers: the query times the scales of the page's channels, then the weights times the scales of the
// tokens. What is the same for all codes (minima, means, the middle of the code range) is added in F32. The warps of a pair share the tokens of the
// keys, half a run of 32 each, and the dimensions of the values.
//
// Pages in F16 are few: blocks of their own look for them, all warps on one page. What new tokens bring is written by them, too. For every row the last
// warp that has written its part joins what all have found.
#include "attention_common.cuh"
#include "common.cuh"
#include "decode.cuh"
#include "observe.cuh"
#include "prefill.cuh"

#include <algorithm>
#include <atomic>

namespace mixkvq::cuda {

namespace {

constexpr int kMostRows = 8;    // query vectors of a KV head that a block serves
constexpr int kMostTiles = 8;   // tiles of as many; with more prefill.cu is faster
constexpr int kFewTiles = 4, kSmallShared = 160 * 1024;  // with more than these it is, too, where an SM holds few pairs
constexpr int kMostPairs = 4;   // in a block
constexpr int kMostSplits = 512, kAlonePages = 4;
constexpr int kAhead = 11;  // parts of a row that a warp loads at once to join them
constexpr float kLargest = 32512, kUnit = 1 / kLargest;  // of the 16-bit numbers: 127 * 256
constexpr int kMostSteps8 = 3;  // steps of channels at 8 bits up to which the sums of 256 channels fit into 32 bits; beyond, queries have 14 bits
constexpr float kRound = 12582912.0f + 128;  // x + kRound has the bits of rint(x) + 128 below

// Sections of shared memory, in bytes.
constexpr int kStagedBytes = 128;
constexpr int kTableStep = 256;  // copies of 16 bytes, four of each thread of a pair, whose places lie together
struct DecodeShape {
    DecodeShape() = default;

    int slots;                                             // quads of folded queries: every tier is filled up to four
    int value, scales, folded, weights, ends, pair_bytes;  // of a pair; its keys come first, and before them `Staged`
    int key_table, value_table, queries, refs, pairs, bytes;  // of a block
    uint32_t ahead;  // what four copies of a pair advance: were it a constant, the compiler would add it to every address by itself

    // key_bytes, value_bytes: of the largest records. Copies write whole lines: so their sections begin with one.
    DecodeShape(int rows, int n_pairs, int d_k, int d_v, int key_bytes, int value_bytes) {
        slots = d_k / 4 + 12;
        value = lines(key_bytes + 8 * d_k);    // 32 bytes between quads
        scales = value + value_bytes + 8 * 96;  // up to 96 between runs of 32 tokens
        folded = scales + kPageCells;
        weights = folded + rows * 8 * slots;
        ends = weights + 256 * rows;
        pair_bytes = kStagedBytes + lines(std::max(ends + 5 * 4 * rows, 4 * rows * (d_v + 8)));
        key_table = 0;
        value_table = table_bytes(key_bytes);
        queries = value_table + table_bytes(value_bytes);
        refs = queries + 4 * rows * d_k;
        pairs = lines(refs + n_pairs * 32 * 16) + kStagedBytes;
        bytes = pairs - kStagedBytes + n_pairs * pair_bytes;
        ahead = 4 * 64 * 16;
    }

  private:
    static int lines(int bytes) { return (bytes + 127) / 128 * 128; }
    static int table_bytes(int record_bytes) { return (record_bytes / 16 + kTableStep - 1) / kTableStep * kTableStep * 4; }
};

// Sections of shared memory of a block for pages in F16, in bytes.
struct HalfShape {
    static constexpr int kRows = 8;  // of a tile of tensor cores that are used
    int query_pitch, key_pitch, value_pitch, sum_pitch;  // halves; of sums floats
    int values, keys, ends, sums, bytes;  // queries come first; in the end `ends` and `sums` take their place

    HalfShape() = default;
    HalfShape(int rows, int n_pairs, int d_k, int d_v) {
        const int tokens = 32 * n_pairs;  // a warp keeps the 16 that it works on
        query_pitch = (d_k + 63) / 64 * 64 + 32;
        key_pitch = d_k + 8;
        value_pitch = sum_pitch = d_v + 8;
        values = 2 * kRows * query_pitch;
        keys = values + 2 * tokens * value_pitch;
        ends = 0;
        sums = 8 * 2 * kMostPairs * rows;
        const int first = keys + 2 * tokens * key_pitch, second = sums + 4 * 2 * n_pairs * rows * sum_pitch;
        bytes = first > second ? first : second;
    }
};

struct DecodeCut : Cut {
    float group_inverse;
    int n_half;                // the first splits: blocks for pages in F16
    int half_each, half_more;  // pages of such a block; how many of them look at one more
    int each;                  // pages of a pair
    int more, more_blocks;     // pairs of a block that have one more; in the first `more_blocks` it is one pair more
    int front, back;           // and the first and the last pair of all have these: likely to be in F16
    int observer;              // the block that observes queries: a split that has the time, or one of its own
    int ways, n_weights;       // warps that join a row; weights that each has room for, which are more than there are splits
    DecodeShape shape;
    HalfShape half_shape;
};

// What new tokens bring.
struct Brought {
    RowWrite keys, values;
    QuerySums sums;
    Queries queries;
    float memory;
};

// The work of a block.
struct Place {
    int block, kv, stream, first_row, n_rows;

    __device__ __forceinline__ RowPlace row(const DecodeCut & cut, int i) const {
        i += first_row;
        const int token = int((i + 0.5f) * cut.group_inverse);
        return RowPlace(token, kv * cut.group + i - token * cut.group);
    }
};

// What is rare stands apart: of a kernel that comes once a layer all code is fetched anew, some 100 cycles for eight instructions in a row.

// A logit with its mask.
__device__ __forceinline__ float masked(float z, unsigned m, float slope) {
    return fmaf(slope, __half2float(__ushort_as_half(static_cast<unsigned short>(m))), z);
}
__device__ __noinline__ float masked_apart(float z, const __half * mask, int cell, int end, float slope) {  // cells from `end` on are hidden
    return masked(z, cell >= end ? 0xfc00 : mask ? __half_as_ushort(mask[cell]) : 0, slope);
}

// The masks of four cells, of which `n` are there.
__device__ __noinline__ uint2 masks_apart(const __half * mask, int cell, int n) {
    uint32_t m[4];
#pragma unroll 1
    for (int i = 0; i < 4; ++i) {
        const uint32_t x = i >= n ? 0xfc00 : mask ? __half_as_ushort(mask[cell + i]) : 0;
        m[0] = i == 0 ? x : m[0], m[1] = i == 1 ? x : m[1], m[2] = i == 2 ? x : m[2], m[3] = i == 3 ? x : m[3];
    }
    return make_uint2(m[0] | m[1] << 16, m[2] | m[3] << 16);
}
__device__ __forceinline__ uint2 masks_of(const __half * mask, int cell, int n) {
    if (!mask || n < 4 || (reinterpret_cast<uintptr_t>(mask + cell) & 7) != 0) return masks_apart(mask, cell, n);
    return *reinterpret_cast<const uint2 *>(mask + cell);
}

// What is seen of up to 32 cells: 1 if anything is, 2 more if something is masked.
__device__ __noinline__ int look_apart(const __half * mask, int n) {
    int found = 0;
#pragma unroll 1
    for (int k = 0; k < min(n, 32); ++k) {
        const unsigned short x = __half_as_ushort(mask[k]);
        found |= (x != 0xfc00) | (x != 0) << 1;
    }
    return found;
}

// Which of the `n_pages` pages from `page` on, 32 at most, anybody sees, and of which everybody sees all, as bits: by a whole warp, 32 cells a lane.
__device__ __forceinline__ unsigned look(const Attention & call, const DecodeCut & cut, const Place & at, int page, int n_pages, unsigned & open) {
    const int lane = threadIdx.x & 31, token = at.row(cut, 0).token;
    const int n_looks = !call.mask ? 0 : call.mask_head ? at.n_rows : at.row(cut, at.n_rows - 1).token - token + 1;  // masks that differ
    unsigned all_seen = 0, all_open = 0;
#pragma unroll 1
    for (int first = 0; first < n_pages; first += 8) {
        const int cell = (page + first) * kPageCells + 32 * lane, n = call.n_kv - cell;
        bool seen = n_looks == 0, plain = n >= 32;
        if (first + lane / 4 < n_pages) {
#pragma unroll 1
            for (int i = 0; i < n_looks; ++i) {
                const __half * m = mask_of(call, at.stream, call.mask_head ? at.row(cut, i) : RowPlace(token + i, 0)) + cell;
                if (n >= 32 && (reinterpret_cast<uintptr_t>(m) & 15) == 0) {
                    uint4 x[4];
#pragma unroll
                    for (int k = 0; k < 4; ++k) x[k] = *reinterpret_cast<const uint4 *>(m + 8 * k);
#pragma unroll
                    for (int k = 0; k < 4; ++k) {
                        seen |= ((x[k].x ^ 0xfc00fc00u) | (x[k].y ^ 0xfc00fc00u) | (x[k].z ^ 0xfc00fc00u) | (x[k].w ^ 0xfc00fc00u)) != 0;
                        plain &= (x[k].x | x[k].y | x[k].z | x[k].w) == 0;
                    }
                } else {
                    const int found = look_apart(m, n);
                    seen |= (found & 1) != 0;
                    plain &= found < 2;
                }
            }
        }
        const unsigned any = __ballot_sync(kWarp, seen), other = __ballot_sync(kWarp, !plain);
        const bool mine = lane / 8 * 8 == first;  // bit `lane` is that of page lane % 8 of this round
        all_seen |= __ballot_sync(kWarp, mine && (any >> lane % 8 * 4 & 15) != 0);
        all_open |= __ballot_sync(kWarp, mine && (other >> lane % 8 * 4 & 15) == 0);
    }
    open = all_open;
    return all_seen;
}

// A query, of which a lane gets the numbers 4 lane to 4 lane + 3 and, if there are so many, those 128 further. Returns exponent_above() all of them.
__device__ __forceinline__ int load_query(const float * q, int d_k, float (&x)[8]) {
    const int d = 4 * (threadIdx.x & 31);
    float4 a = make_float4(0, 0, 0, 0), b = a;
    if (d < d_k) a = *reinterpret_cast<const float4 *>(q + d);
    if (128 + d < d_k) b = *reinterpret_cast<const float4 *>(q + 128 + d);
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
    float top = 0;
#pragma unroll
    for (int k = 0; k < 8; ++k) top = fmaxf(top, fabsf(x[k]));
    return exponent_above(__uint_as_float(warp_max(__float_as_uint(top))));
}

// The rotation of a row, of which a lane has the numbers 4 lane to 4 lane + 3 and, if n is 8, four more, 128 further.
template <int n>
__device__ __forceinline__ void rotate_row(float (&x)[n], int d_v) {
    const int lane = threadIdx.x & 31, block = d_v & -d_v;
    const float norm = rsqrtf(float(block));
#pragma unroll
    for (int k = 0; k < n; ++k) x[k] *= norm;
#pragma unroll
    for (int step = 1; step <= 2; step *= 2) {
#pragma unroll
        for (int k = 0; k < n; ++k) {
            if (k & step) continue;
            const float a = x[k], b = x[k + step];
            x[k] = a + b;
            x[k + step] = a - b;
        }
    }
#pragma unroll 1
    for (int step = 1; step <= 16 && 4 * step < block; step *= 2) {
#pragma unroll
        for (int k = 0; k < n; ++k) {
            const float other = __shfl_xor_sync(kWarp, x[k], step);
            x[k] = lane & step ? other - x[k] : x[k] + other;
        }
    }
    if constexpr (n == 8) {
        if (block <= 128) return;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const float a = x[k], b = x[k + 4];
            x[k] = a + b;
            x[k + 4] = a - b;
        }
    }
}

__device__ __noinline__ float capped_apart(float logit2, float softcap) { return softcap * kLog2E * tanhf(logit2 / (softcap * kLog2E)); }

// --- packed pages ---------------------------------------------------------------------------------------------

// The records of a head in shared memory: as in global memory, but with gaps, so that the 16 bytes that eight lanes read lie in different banks. Every
// pair has its own copy of this, next to its pages: an address less to be computed.
struct alignas(16) Staged {
    int n_quads, groups, steps;  // steps: a byte for each of 8, 4, 3, 2 bits; four quads a step
    int quads[4], slot[4];
    int scale, min, order, key_chunks;
    int bits, run, top, top_run, mean, value_chunks;  // run: from the codes of tokens 32j to those of 32j + 32
    uint32_t value_scale;
    float largest, unit;      // of the folded queries
    float factor[kMostRows];  // of scores of queries scaled to below 1

    // Where each 16 bytes of a record go.
    __device__ static void set_tables(const KeyHead & k, const ValueHead & v, uint32_t * key_table, uint32_t * value_table) {  // by a whole block
        const KeyPlaces f(k.format);
        const ValuePlaces g(v.format);
        const int sizes[4] = {8, 4, 3, 2}, counts[4] = {f.q8, f.q4, f.q3, f.q2}, starts[4] = {int(f.at8), int(f.at4), int(f.at3), int(f.at2)};
        const int row = 4 * v.format.head_size, length = v.format.bits == 3 ? 2 * row : v.format.bits * row;
        const int gap = gap_of(length), top_gap = v.format.bits == 3 ? gap_of(row) : 0;
#pragma unroll 1
        for (int c = threadIdx.x; c < f.bytes / 16; c += blockDim.x) {
            int before = 0;
#pragma unroll
            for (int t = 0; t < 4; ++t) before += ::min(counts[t], int(unsigned(max(0, 16 * c - starts[t])) / (64u * sizes[t])));
            key_table[place(c)] = 16 * c + 32 * before;
        }
#pragma unroll 1
        for (int c = threadIdx.x; c < chunks_of(v, g); c += blockDim.x) {
            int at = 16 * c;
#pragma unroll
            for (int k = 1; k <= 4; ++k) at += (16 * c >= k * length ? gap : 0) + (16 * c >= 4 * length + k * row ? top_gap : 0);
            value_table[place(c)] = at;
        }
    }

    // By a pair. lanes: where this thread finds its first codes of 8, 4, 3 and 2 bits, then the top bits of those of 3.
    __device__ void set(const KeyHead & k, const ValueHead & v, uint32_t (&lanes)[5]) {
        const KeyPlaces f(k.format);
        const ValuePlaces g(v.format);
        const int sizes[4] = {8, 4, 3, 2}, counts[4] = {f.q8, f.q4, f.q3, f.q2}, starts[4] = {int(f.at8), int(f.at4), int(f.at3), int(f.at2)};
        const int in_pair = threadIdx.x & 63, n8 = in_pair >> 2 & 7, j = in_pair & 3, half = in_pair >> 5;
        const int row = 4 * v.format.head_size, length = v.format.bits == 3 ? 2 * row : v.format.bits * row;
        const int gap = gap_of(length), top_gap = v.format.bits == 3 ? gap_of(row) : 0;
        int before = 0, slots = 0, all_steps = 0;
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            const int bits = sizes[t], chunk = key_chunk(bits, n8, bits == 8 ? 2 * half : bits == 4 ? half : 0);
            const int at = starts[t] + 32 * before + (64 * bits + 32) * j;
            lanes[t] = at + 16 * chunk;
            if (bits == 3) lanes[4] = at + 16 * key_chunk(3, n8, 1);
            if (in_pair == 0) quads[t] = counts[t], slot[t] = slots;
            before += counts[t];
            slots += (counts[t] + 3) / 4 * 4;
            all_steps |= (counts[t] + 3) / 4 << 8 * t;
        }
        if (in_pair != 0) return;
        n_quads = f.coded();
        groups = f.groups;
        steps = all_steps;
        largest = (all_steps & 255) > kMostSteps8 ? kLargest / 4 : kLargest;
        unit = (all_steps & 255) > kMostSteps8 ? 4 * kUnit : kUnit;
        scale = f.scale + 32 * n_quads;
        min = f.min + 32 * n_quads;
        order = f.order + 32 * n_quads;
        key_chunks = f.bytes / 16;
        bits = v.format.bits;
        run = length + gap;
        top = 4 * run;
        top_run = row + top_gap;
        mean = g.mean + 4 * (gap + top_gap);
        value_chunks = chunks_of(v, g);
        value_scale = g.scale;
    }

  private:
    __device__ static int place(int c) { return c / kTableStep * kTableStep + c % 64 * 4 + c / 64 % 4; }
    __device__ static int gap_of(int length) { return (32 - length) & 127; }
    __device__ static int chunks_of(const ValueHead & v, const ValuePlaces & g) { return (g.mean + v.format.head_size + 15) / 16; }
};
static_assert(sizeof(Staged) == kStagedBytes);

// Adds a tier's share of the scores of a warp's half of the tokens. s[i]: rows n8 and n8 + 8 are tokens key_token(n8, i, 2 half) and (.., 2 half + 1),
// the latter times kTimes. lanes: as Staged::set() found them; folded: of the next tier afterwards. Where a page has several
// groups of tokens, lanes that are not `mine` add nothing.
template <int bits, bool grouped, int NT>
__device__ __forceinline__ void add_tier(const uint8_t * key, const uint32_t (&lanes)[5], int steps, const uint32_t *& folded, int pitch, bool mine, int half,
                                         int n8, int (&s)[4][NT][4]) {
    constexpr int kLoads = bits == 8 || bits == 3 ? 2 : 1, kTier = bits == 8 ? 0 : bits == 4 ? 1 : bits == 3 ? 2 : 3;
    if (steps == 0) return;
    const uint8_t * at = key + lanes[kTier], * top = bits == 3 ? key + lanes[4] : nullptr;
    const int shift = 4 * half, top_turn = (2 - 2 * half - key_top_shift(n8)) & 31;
    constexpr int kPitch = 4 * (64 * bits + 32);
    auto load = [&](uint4 (&x)[kLoads], uint32_t (&b)[NT], int ahead) {
        x[0] = *reinterpret_cast<const uint4 *>(at + ahead * kPitch);
        if (kLoads == 2) x[kLoads - 1] = *reinterpret_cast<const uint4 *>((bits == 8 ? at + 32 : top) + ahead * kPitch);
        if (grouped && !mine) x[0] = x[kLoads - 1] = make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) b[nt] = folded[nt * pitch + 32 * ahead];
    };
    auto bytes = [&](const uint4 (&x)[kLoads], int i, uint32_t & a0, uint32_t & a1) {
        if (bits == 3) {
            const uint32_t low = part(x[0], i) >> shift, turned = __funnelshift_l(part(x[kLoads - 1], i), part(x[kLoads - 1], i), top_turn);
            a0 = with_top(low, turned, 0), a1 = with_top(low, turned << 1, 2);
        } else {
            Codes<bits> codes;
            codes.word[0] = bits == 2 ? part(x[0], i) >> shift : part(x[0], i);
            if (bits == 8) codes.word[kLoads - 1] = part(x[kLoads - 1], i);
            a0 = codes.bytes(0), a1 = codes.bytes(1);
        }
    };
    int n = steps;
#pragma unroll 1
    for (; n >= 2; n -= 2) {
        uint4 x[2][kLoads];
        uint32_t b[2][NT];
        load(x[0], b[0], 0);
        load(x[1], b[1], 1);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            uint32_t a[4];
            bytes(x[0], i, a[0], a[1]);
            bytes(x[1], i, a[2], a[3]);
#pragma unroll
            for (int nt = 0; nt < NT; ++nt) mma_bytes(s[i][nt], a[0], a[1], a[2], a[3], b[0][nt], b[1][nt]);
        }
        at += 2 * kPitch;
        top += 2 * kPitch;
        folded += 64;
    }
    if (n > 0) {
        uint4 x[kLoads];
        uint32_t b[NT];
        load(x, b, 0);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            uint32_t a0, a1;
            bytes(x, i, a0, a1);
#pragma unroll
            for (int nt = 0; nt < NT; ++nt) mma_bytes(s[i][nt], a0, a1, b[nt]);
        }
        folded += 32;
    }
    if (bits == 8 && (!grouped || mine)) {  // as the other tiers
#pragma unroll
        for (int k = 0; k < 8 * NT; ++k) s[k / (2 * NT)][k / 2 % NT][2 + k % 2] *= Codes<4>::kTimes;
    }
}
template <bool grouped, int NT>
__device__ __forceinline__ void add_tiers(const Staged & f, const uint8_t * key, const uint32_t (&lanes)[5], const uint32_t * folded, int pitch, bool mine,
                                          int half, int n8, int (&s)[4][NT][4]) {
    const int steps = f.steps;
    add_tier<8, grouped, NT>(key, lanes, steps & 255, folded, pitch, mine, half, n8, s);
    add_tier<4, grouped, NT>(key, lanes, steps >> 8 & 255, folded, pitch, mine, half, n8, s);
    add_tier<3, grouped, NT>(key, lanes, steps >> 16 & 255, folded, pitch, mine, half, n8, s);
    add_tier<2, grouped, NT>(key, lanes, steps >> 24 & 255, folded, pitch, mine, half, n8, s);
}

// Sums of n numbers over a warp, n a power of two: a lane gets that of number lane % n.
template <int n>
__device__ __forceinline__ float sum_of(float (&x)[n], int lane) {
#pragma unroll
    for (int step = n / 2; step > 0; step /= 2) {
        const bool up = lane & step;
#pragma unroll
        for (int i = 0; i < step; ++i) x[i] = (up ? x[i + step] : x[i]) + __shfl_xor_sync(kWarp, up ? x[i] : x[i + step], step);
    }
    float sum = x[0];
#pragma unroll
    for (int step = n; step < 32; step *= 2) sum += __shfl_xor_sync(kWarp, sum, step);
    return sum;
}

// Where the folded queries of quad u go: every tier is filled up to four.
__device__ __forceinline__ int slot_of(const Staged & f, int u) {
    int slot = u;
#pragma unroll
    for (int t = 1, first = 0; t < 4; ++t) {
        first += f.quads[t - 1];
        if (u >= first) slot = u - first + f.slot[t];
    }
    return slot;
}

// The largest scale of this lane's part of a page's channels.
__device__ __forceinline__ unsigned largest_scale(const Staged & f, const uint8_t * key, int lane) {
    unsigned top = 0;
#pragma unroll 1
    for (int u = lane; u < f.n_quads * f.groups; u += 32) {
        const uint2 s = *reinterpret_cast<const uint2 *>(key + f.scale + 8 * u);
        top = __vmaxu2(top, __vmaxu2(s.x, s.y));
    }
    return ::max(top & 0xffff, top >> 16);
}

// Folds the scales of a page's group g, the largest of which is `most`, into half of the queries, and sums the minima. slots: of quads lane and
// lane + 32, 16 bits each.
template <int NT>
__device__ __forceinline__ void fold_queries(const Staged & f, const uint8_t * key, const float2 * queries, int d_k, uint32_t * folded, int pitch,
                                              float * bias, unsigned slots, float most, int g, int half, int lane) {
    const int n_quads = f.n_quads, groups = f.groups;
    const float grow = f.largest * reciprocal(most);
    float sums[2 * NT] = {};
#pragma unroll 1
    for (int u = lane; u < n_quads; u += 32, slots >>= 16) {
        const uint32_t order = *reinterpret_cast<const uint32_t *>(key + f.order + 4 * u);
        float scale[4], min[4];
        if (groups == 1) {
            const uint2 s = *reinterpret_cast<const uint2 *>(key + f.scale + 8 * u), m = *reinterpret_cast<const uint2 *>(key + f.min + 8 * u);
            const float2 s01 = __half22float2(as_half2(s.x)), s23 = __half22float2(as_half2(s.y));
            const float2 m01 = __half22float2(as_half2(m.x)), m23 = __half22float2(as_half2(m.y));
            scale[0] = s01.x, scale[1] = s01.y, scale[2] = s23.x, scale[3] = s23.y;
            min[0] = m01.x, min[1] = m01.y, min[2] = m23.x, min[3] = m23.y;
        } else {
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                scale[r] = half_at(key + f.scale, (4 * u + r) * groups + g);
                min[r] = half_at(key + f.min, (4 * u + r) * groups + g);
            }
        }
#pragma unroll
        for (int k = 0; k < NT; ++k) {  // two rows
            const int two = NT * half + k;
            uint32_t y[2][4], word[4];
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const float2 q = queries[two * d_k + ((order >> 8 * r) & 255)];
                y[0][r] = __float_as_uint(fmaf(q.x, scale[r] * grow, kRound));
                y[1][r] = __float_as_uint(fmaf(q.y, scale[r] * grow, kRound));
                sums[2 * k] = fmaf(q.x, min[r], sums[2 * k]);
                sums[2 * k + 1] = fmaf(q.y, min[r], sums[2 * k + 1]);
            }
            split_bytes(y[0], word[0], word[1]);
            split_bytes(y[1], word[2], word[3]);
            store_shared(folded + (two >> 1) * pitch + 8 * (slots & 0xffff) + 4 * (two & 1), make_uint4(word[0], word[1], word[2], word[3]));
        }
    }
    const float sum = sum_of(sums, lane);
    if (lane < 2 * NT) bias[2 * NT * half + lane] = sum;
}

// acc[k][i]: value_dim(n8, half + 2 k, i). Adds the sums of codes and of weights, of half c worth units[..][c], of the tokens value_token(j, c, ..).
template <int bits, int NB, int NT>
__device__ __forceinline__ void add_values(const uint8_t * codes_at, const Staged & f, int d_v, const uint8_t * weights, const float (&units)[NT][2], int half,
                                           int n8, int j, float (&acc)[NB][4][NT]) {
    constexpr int kLoads = bits == 8 ? 4 : bits == 4 ? 2 : 1;
    const uint8_t * const low_at = codes_at + f.run * j + 4 * value_dim(n8, half, 0), * const top_at = codes_at + f.top + f.top_run * j + 4 * value_dim(n8, half, 0);
    uint4 w[NT][2];  // of both halves
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) w[nt][odd] = *reinterpret_cast<const uint4 *>(weights + 1024 * nt + 16 * weight_run_read(n8, j, odd));
    }
#pragma unroll
    for (int k = 0; k < NB; ++k) {
        if (32 * (half + 2 * k) >= d_v) continue;
        uint4 top = make_uint4(0, 0, 0, 0);
        if (bits == 3) top = *reinterpret_cast<const uint4 *>(top_at + 256 * k);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            uint4 x[kLoads];
#pragma unroll
            for (int l = 0; l < kLoads; ++l) x[l] = *reinterpret_cast<const uint4 *>(low_at + 4 * d_v * value_row(bits, 0, c, l) + 256 * k);
#pragma unroll
            for (int ip = 0; ip < 2; ++ip) {
                Codes<bits> codes[2];
#pragma unroll
                for (int h = 0; h < 2; ++h) {
#pragma unroll
                    for (int l = 0; l < kLoads; ++l) codes[h].word[l] = part(x[l], 2 * ip + h);
                    if (bits == 3) codes[h].word[Codes<bits>::kWords - 1] = part(top, 2 * ip + h) >> 4 * c;
                }
                int sum[NT][4] = {};
#pragma unroll
                for (int s = 0; s < 2; ++s) {
                    const uint32_t a0 = codes[0].bytes(s), a1 = codes[1].bytes(s), a2 = codes[0].bytes(s + 2), a3 = codes[1].bytes(s + 2);
#pragma unroll
                    for (int nt = 0; nt < NT; ++nt) mma_bytes(sum[nt], a0, a1, a2, a3, part(w[nt][s], 2 * c), part(w[nt][s], 2 * c + 1));
                }
#pragma unroll
                for (int nt = 0; nt < NT; ++nt) {
                    acc[k][2 * ip][nt] = fmaf(float(sum[nt][0] * 256 + sum[nt][1]), units[nt][c], acc[k][2 * ip][nt]);
                    acc[k][2 * ip + 1][nt] = fmaf(float(sum[nt][2] * 256 + sum[nt][3]), units[nt][c], acc[k][2 * ip + 1][nt]);
                }
            }
        }
    }
}

// What a block finds goes here. Worked out when it is needed, for registers are few.
__device__ __forceinline__ float * part_of(const Attention & call, const DecodeCut & cut, int block) {
    const int head = opaque(int(blockIdx.z)) * call.n_kv_heads + opaque(int(blockIdx.y));
    return cut.partial + ahead(head * cut.n_splits + block, partial_floats(cut, call.head_size_v));
}

template <int NB, int NT>
__device__ __forceinline__ void packed_pages(const Attention & call, const DecodeCut & cut, const Place & at, uint8_t * memory) {
    constexpr int kRows = 4 * NT, NQ = NT < 2 ? NT : 2;  // scores of NQ blocks of four rows at a time
    const int lane = threadIdx.x & 31, n8 = lane >> 2, j = lane & 3, warp = warp_index(), pair = warp >> 1, half = warp & 1, in_pair = threadIdx.x & 63;
    const int n_warps = blockDim.x >> 5, n_pairs = n_warps / 2, d_k = call.head_size_k, d_v = call.head_size_v;
    const DecodeShape & shape = cut.shape;
    uint32_t * const key_table = reinterpret_cast<uint32_t *>(memory + shape.key_table);
    uint32_t * const value_table = reinterpret_cast<uint32_t *>(memory + shape.value_table);
    float2 * const queries = reinterpret_cast<float2 *>(memory + shape.queries);  // [two rows][channel], each row scaled by a power of two to below 1
    const uint8_t ** const refs = reinterpret_cast<const uint8_t **>(memory + shape.refs + 512 * pair);  // [page][key, value]
    uint8_t * const mine = memory + shape.pairs + pair * shape.pair_bytes;
    Staged & f = *(reinterpret_cast<Staged *>(mine) - 1);
    uint32_t * const folded = reinterpret_cast<uint32_t *>(mine + shape.folded);
    float * const bias = reinterpret_cast<float *>(mine + shape.ends), * const tops = bias + kRows, * const sums = tops + 2 * kRows;
    const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(mine));

    const PageRef * const key_pages = call.key_pages + ahead(at.stream, call.page_stride), * const value_pages = call.value_pages + ahead(at.stream, call.page_stride);
    const int worker = (at.block - cut.n_half) * n_pairs + pair;
    const bool is_first = worker == 0, is_last = worker == (cut.n_splits - cut.n_half) * n_pairs - 1;
    const int block = at.block - cut.n_half, more = cut.more + (block < cut.more_blocks);
    const int begin = cut.front + worker * cut.each + block * cut.more + min(block, cut.more_blocks) + min(pair, more);
    const int first = is_first ? 0 : begin, last = is_last ? cut.n_pages : begin + cut.each + (pair < more);

    // Which of up to 32 pages are packed; their records of this head.
    const KeyHead key_head = call.key_heads[at.kv];
    const ValueHead value_head = call.value_heads[at.kv];
    auto find = [&](int start) {
        const uint8_t * key = nullptr, * value = nullptr;
        if (start + lane < last) key = key_pages[start + lane].records, value = value_pages[start + lane].records;
        const bool packed = key && value;
        if (half == 0 && packed) refs[2 * lane] = key + key_head.record_offset, refs[2 * lane + 1] = value + value_head.record_offset;
        return __ballot_sync(kWarp, packed);
    };
    unsigned left = find(first);

    Staged::set_tables(key_head, value_head, key_table, value_table);
    uint32_t lanes[5];
    f.set(key_head, value_head, lanes);
    __syncthreads();

    const int n_key = f.key_chunks - in_pair, n_value = f.value_chunks - in_pair;
    auto stage = [&](uint32_t to, const uint32_t * to_table, int n, const uint8_t * from) {
        const uint4 * table = reinterpret_cast<const uint4 *>(to_table) + in_pair;
        from += 16 * in_pair + 2048;  // a copy adds between -2048 and 2047 by itself
#pragma unroll 1
        for (; n > 0; n -= 2 * kTableStep, table += 2 * kTableStep / 4) {
            const uint4 a = table[0], b = table[kTableStep / 4];  // b: of places that there may not be
            copy_async<-2048>(to + a.x, from, true);
            copy_async<-1024>(to + a.y, from, n > 64);
            copy_async<0>(to + a.z, from, n > 128);
            copy_async<1024>(to + a.w, from, n > 192);
            from += shape.ahead;
            copy_async<-2048>(to + b.x, from, n > 256);
            copy_async<-1024>(to + b.y, from, n > 320);
            copy_async<0>(to + b.z, from, n > 384);
            copy_async<1024>(to + b.w, from, n > 448);
            from += shape.ahead;
        }
    };
    auto stage_keys = [&](unsigned pages) {
        const int page = __ffs(pages) - 1;
        stage(shared, key_table, n_key, refs[2 * page]);
        // The values' scales are needed with the keys.
        copy_async<0>(shared + shape.scales + 16 * in_pair, refs[2 * page + 1] + f.value_scale + 16 * in_pair, in_pair < kPageCells / 16);
    };
    auto stage_values = [&](unsigned pages) { stage(shared + shape.value, value_table, n_value, refs[2 * (__ffs(pages) - 1) + 1]); };

#pragma unroll 1
    for (int i = in_pair; i < kRows * 2 * shape.slots; i += 64) folded[i] = 0;
    // Masks are there already, queries perhaps not yet. Were the first page asked for before them, they would come after it.
    unsigned open = 0;
    if (first < last) left &= look(call, cut, at, first, min(32, last - first), open);
    wait_for_kernel_before();
#pragma unroll 1
    for (int i = warp; i < kRows; i += n_warps) {
        float x[8];
        const int e = load_query(query_of(call, at.stream, at.row(cut, min(i, at.n_rows - 1))), d_k, x);
        const float unit = power(-e);
        float * const to = reinterpret_cast<float *>(queries + (i >> 1) * d_k + 4 * lane) + (i & 1);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            if (128 * h + 4 * lane >= d_k) continue;
#pragma unroll
            for (int k = 0; k < 4; ++k) to[256 * h + 2 * k] = x[4 * h + k] * unit;
        }
        if (lane < n_pairs) reinterpret_cast<Staged *>(memory + shape.pairs + lane * shape.pair_bytes)[-1].factor[i] = call.scale * kLog2E * power(e);
    }
    if (left) stage_keys(left);
    __syncthreads();

    const unsigned slots = slot_of(f, lane) | slot_of(f, lane + 32) << 16;
    float acc[NB][4][NT], ones[NT], max_[NT], sum[NT];  // ones: weights times scales, of this lane's tokens
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
        ones[nt] = sum[nt] = 0;
        max_[nt] = minus_infinity();
#pragma unroll
        for (int k = 0; k < 4 * NB; ++k) acc[k / 4][k % 4][nt] = 0;
    }

#pragma unroll 1
    for (int start = first; start < last; start += 32) {
        if (start > first) {
            pair_sync(pair + 1);
            left = find(start);
            left &= look(call, cut, at, start, min(32, last - start), open);
            wait_for_copies();
            pair_sync(pair + 1);
            if (left) stage_keys(left);
        }
#pragma unroll 1
        for (; left; left &= left - 1) {
            const int lane = opaque(threadIdx.x & 31), n8 = lane >> 2, j = lane & 3;
            wait_for_copies();
            pair_sync(pair + 1);  // the keys are there, the values of the page before not needed any more
            stage_values(left);

            const uint8_t * const scales = mine + shape.scales;
            float most, most_scale;  // of the keys' scales, of the values'
            {
                const uint32_t x = reinterpret_cast<const uint32_t *>(scales)[lane], of_values = __vmaxu2(x & 0x00ff00ff, (x >> 8) & 0x00ff00ff);
                const unsigned of_keys = largest_scale(f, mine, lane), top = warp_max(of_keys), top_value = warp_max(::max(of_values & 0xffff, of_values >> 16));
                most = top ? __half2float(__ushort_as_half(top)) : 1.0f;
                most_scale = __half2float(__ushort_as_half(::max(1u, top_value) << 7));
            }
            fold_queries<NT>(f, mine, queries, d_k, folded, 8 * shape.slots, bias, slots, most, 0, half, lane);
            pair_sync(pair + 1);
            float scaled[NT];  // sums of this lane's weights times the tokens' scales

#pragma unroll 1
            for (int q = 0; q < NT; q += NQ) {
                // --- scores
                int s[4][NQ][4] = {};
                float offset[NQ];
                const uint32_t * const folded_q = folded + q * 8 * shape.slots + 8 * j + n8;
                if (f.groups == 1) {
                    add_tiers<false, NQ>(f, mine, lanes, folded_q, 8 * shape.slots, true, half, n8, s);
#pragma unroll
                    for (int nt = 0; nt < NQ; ++nt) offset[nt] = bias[4 * (q + nt) + j];
                } else {
#pragma unroll 1
                    for (int g = 0; g < f.groups; ++g) {
                        if (g + q > 0) {
                            pair_sync(pair + 1);
                            fold_queries<NT>(f, mine, queries, d_k, folded, 8 * shape.slots, bias, slots, most, g, half, lane);
                            pair_sync(pair + 1);
                        }
                        const bool here = n8 * f.groups / 8 == g;
                        add_tiers<true, NQ>(f, mine, lanes, folded_q, 8 * shape.slots, here, half, n8, s);
#pragma unroll
                        for (int nt = 0; nt < NQ; ++nt) offset[nt] = here ? bias[4 * (q + nt) + j] : offset[nt];
                    }
                }

                // --- weights: of the query 4 nt + j, relative to the largest in this half of the page, times the tokens' scales
                float token_scale[2][4];
                const float odd_times = n8 % 2 == 0 || f.bits == 8 ? 1.0f : Codes<4>::kTimes;  // of codes at odd places
                {
                    const float factor = kLargest * reciprocal(most_scale * odd_times);
#pragma unroll
                    for (int p = 0; p < 2; ++p) {
                        const uint32_t y = *reinterpret_cast<const uint32_t *>(scales + key_token(n8, 0, 2 * half + p));
                        const float2 s01 = __half22float2(as_half2(__byte_perm(y, 0, 0x4140) << 7)), s23 = __half22float2(as_half2(__byte_perm(y, 0, 0x4342) << 7));
                        token_scale[p][0] = s01.x * factor, token_scale[p][1] = s01.y * factor, token_scale[p][2] = s23.x * factor, token_scale[p][3] = s23.y * factor;
                    }
                }
#pragma unroll
                for (int nt = 0; nt < NQ; ++nt) {
                    const int row = 4 * (q + nt) + j;
                    const float factor = f.factor[row], unit = most * f.unit * factor, add = offset[nt] * factor;
                    float z[2][4], top = minus_infinity(), total = 0, with_scales = 0;
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
#pragma unroll
                        for (int p = 0; p < 2; ++p) {
                            const float x = float(s[i][nt][2 * p] * 256 + s[i][nt][2 * p + 1]);
                            z[p][i] = fmaf(x, p == 0 ? unit : unit / Codes<4>::kTimes, add);
                        }
                    }
                    if (call.softcap > 0) {
#pragma unroll
                        for (int k = 0; k < 8; ++k) z[k / 4][k % 4] = capped_apart(z[k / 4][k % 4], call.softcap);
                    }
                    if (!(open >> (__ffs(left) - 1) & 1)) {
                        const int cell0 = (start + __ffs(left) - 1) * kPageCells;
                        const RowPlace place = at.row(cut, min(row, at.n_rows - 1));
                        const __half * const mask = call.mask ? mask_of(call, at.stream, place) : nullptr;
                        const float slope = alibi_slope(call, place.head) * kLog2E;
#pragma unroll
                        for (int k = 0; k < 8; ++k) {
                            z[k / 4][k % 4] = masked_apart(z[k / 4][k % 4], mask, cell0 + key_token(n8, k % 4, 2 * half + k / 4), call.n_kv, slope);
                        }
                    }
#pragma unroll
                    for (int k = 0; k < 8; ++k) top = fmaxf(top, z[k / 4][k % 4]);
#pragma unroll
                    for (int step = 4; step <= 16; step *= 2) top = fmaxf(top, __shfl_xor_sync(kWarp, top, step));
                    const float zero = top == minus_infinity() ? 0.0f : top;
                    uint32_t high[2], low[2];
#pragma unroll
                    for (int p = 0; p < 2; ++p) {
                        uint32_t y[4];
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            const float x = exp2_of(z[p][i] - zero);
                            total += x;
                            with_scales = fmaf(x, token_scale[p][i], with_scales);
                            y[i] = __float_as_uint(fmaf(x, token_scale[p][i], kRound));
                        }
                        split_bytes(y, high[p], low[p]);
                    }
                    scaled[q + nt] = with_scales * odd_times;
                    uint8_t * to = mine + shape.weights + 1024 * (q + nt) + 8 * half;
                    *reinterpret_cast<uint2 *>(to + 16 * weight_run_written(n8, j, 0)) = make_uint2(high[0], high[1]);
                    *reinterpret_cast<uint2 *>(to + 16 * weight_run_written(n8, j, 1)) = make_uint2(low[0], low[1]);
#pragma unroll
                    for (int step = 4; step <= 16; step *= 2) total += __shfl_xor_sync(kWarp, total, step);
                    if (n8 == 0) {
                        tops[half * kRows + row] = top;
                        sums[half * kRows + row] = total;
                    }
                }
            }
            wait_for_copies();
            pair_sync(pair + 1);  // weights and values are there, the keys not needed any more
            if (left & (left - 1)) stage_keys(left & (left - 1));

            // --- values
            float page_sum[NT], units[NT][2];  // of half c: what 1 of its weights is worth
#pragma unroll
            for (int nt = 0; nt < NT; ++nt) {
                const int row = 4 * nt + j;
                const float top0 = tops[row], top1 = tops[kRows + row], top = fmaxf(max_[nt], fmaxf(top0, top1)), zero = top == minus_infinity() ? 0.0f : top;
                const float lower = exp2_of(max_[nt] - zero), more0 = exp2_of(top0 - zero), more1 = exp2_of(top1 - zero);
                max_[nt] = top;
                page_sum[nt] = fmaf(sums[row], more0, sums[kRows + row] * more1);
                sum[nt] = fmaf(sum[nt], lower, page_sum[nt]);
                units[nt][0] = more0 * (most_scale * kUnit), units[nt][1] = more1 * (most_scale * kUnit);
                ones[nt] = fmaf(ones[nt], lower, scaled[nt] * (half ? units[nt][1] : units[nt][0]));
#pragma unroll
                for (int k = 0; k < 4 * NB; ++k) acc[k / 4][k % 4][nt] *= lower;
            }
            const uint8_t * const codes = mine + shape.value;
#pragma unroll
            for (int k = 0; k < NB; ++k) {
                const uint32_t means = *reinterpret_cast<const uint32_t *>(codes + f.mean + min(value_dim(n8, half + 2 * k, 0), d_v - 4));
                const float2 m01 = __half22float2(as_half2(__byte_perm(means, 0, 0x1404))), m23 = __half22float2(as_half2(__byte_perm(means, 0, 0x3424)));
#pragma unroll
                for (int nt = 0; nt < NT; ++nt) {
                    acc[k][0][nt] = fmaf(page_sum[nt], m01.x, acc[k][0][nt]);
                    acc[k][1][nt] = fmaf(page_sum[nt], m01.y, acc[k][1][nt]);
                    acc[k][2][nt] = fmaf(page_sum[nt], m23.x, acc[k][2][nt]);
                    acc[k][3][nt] = fmaf(page_sum[nt], m23.y, acc[k][3][nt]);
                }
            }
            const uint8_t * const weights = mine + shape.weights;
            switch (f.bits) {
                case 2: add_values<2, NB, NT>(codes, f, d_v, weights, units, half, n8, j, acc); break;
                case 3: add_values<3, NB, NT>(codes, f, d_v, weights, units, half, n8, j, acc); break;
                case 4: add_values<4, NB, NT>(codes, f, d_v, weights, units, half, n8, j, acc); break;
                default: add_values<8, NB, NT>(codes, f, d_v, weights, units, half, n8, j, acc); break;
            }
        }
    }

    // --- joins the pairs
    wait_for_copies();
    pair_sync(pair + 1);  // sums take the place of keys and values
    __shared__ float pair_max[kMostPairs][kRows], pair_sum[kMostPairs][kRows], pair_ones[2][kMostPairs][kRows];
    const int pitch = d_v + 8;
    float * const partial = part_of(call, cut, opaque(int(blockIdx.x)));
    const float middle = 0.5f - float(1 << (f.bits - 1));
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
        const int row = 4 * nt + j;
#pragma unroll
        for (int step = 4; step <= 16; step *= 2) ones[nt] += __shfl_xor_sync(kWarp, ones[nt], step);
        if (n8 == 0) {
            pair_ones[half][pair][row] = middle * ones[nt];
            if (half == 0) pair_max[pair][row] = max_[nt], pair_sum[pair][row] = sum[nt];
        }
#pragma unroll
        for (int k = 0; k < NB; ++k) {
            const int d = value_dim(n8, half + 2 * k, 0);
            if (d >= d_v) continue;
            *reinterpret_cast<float4 *>(reinterpret_cast<float *>(mine) + row * pitch + d) =
                make_float4(acc[k][0][nt], acc[k][1][nt], acc[k][2][nt], acc[k][3][nt]);
        }
    }
    __syncthreads();
#pragma unroll 1
    for (int row = warp; row < at.n_rows; row += n_warps) {
        constexpr int kFours = NB <= 2 ? 1 : 2;
        const bool is_pair = lane < n_pairs;  // a lane for each of them
        const float max = is_pair ? pair_max[lane][row] : minus_infinity(), middles = is_pair ? pair_ones[0][lane][row] + pair_ones[1][lane][row] : 0.0f;
        float top = max;
#pragma unroll
        for (int step = 1; step < kMostPairs; step *= 2) top = fmaxf(top, __shfl_xor_sync(kWarp, top, step));
        top = __shfl_sync(kWarp, top, 0);
        const float weight = max == minus_infinity() ? 0.0f : exp2_of(max - top);
        float total = is_pair ? weight * pair_sum[lane][row] : 0.0f, x[4 * kFours] = {};
#pragma unroll
        for (int step = 1; step < kMostPairs; step *= 2) total += __shfl_xor_sync(kWarp, total, step);
#pragma unroll 1
        for (int p = 0; p < n_pairs; ++p) {
            const float factor = __shfl_sync(kWarp, weight, p), add = factor * __shfl_sync(kWarp, middles, p);
            const float * from = reinterpret_cast<const float *>(memory + shape.pairs + p * shape.pair_bytes) + row * pitch + 4 * lane;
#pragma unroll
            for (int k = 0; k < kFours; ++k) {
                if (128 * k + 4 * lane >= d_v) continue;
                const float4 y = *reinterpret_cast<const float4 *>(from + 128 * k);
                x[4 * k] += fmaf(factor, y.x, add), x[4 * k + 1] += fmaf(factor, y.y, add);
                x[4 * k + 2] += fmaf(factor, y.z, add), x[4 * k + 3] += fmaf(factor, y.w, add);
            }
        }
        rotate_row(x, d_v);
#pragma unroll
        for (int k = 0; k < kFours; ++k) {
            const int d = 128 * k + 4 * lane;
            if (d < d_v) *reinterpret_cast<float4 *>(partial + row * d_v + d) = make_float4(x[4 * k], x[4 * k + 1], x[4 * k + 2], x[4 * k + 3]);
        }
        if (lane == 0) {
            partial[kRows * d_v + row] = top;
            partial[kRows * d_v + kRows + row] = total;
        }
    }
}

// --- pages in F16 ---------------------------------------------------------------------------------------------

__device__ inline int coded(const uint8_t * codes, int bits, int row, int place) {  // place: of the eight that share words, as in pack.cu
    const int low = bits == 3 ? 2 : bits, per_byte = 8 / low;
    return (codes[place / per_byte * row] >> low * (place % per_byte)) & ((1 << low) - 1);
}

// In one load.
__device__ __forceinline__ PageRef load_page(const PageRef * at) {
    const uint4 x = *reinterpret_cast<const uint4 *>(at);
    PageRef page;
    memcpy(&page, &x, sizeof page);
    return page;
}

// The rows of a page of which only the keys, or only the values, are packed: rare, and one code at a time.
__device__ __noinline__ void unpack_key_rows(const KeyHead & head, const uint8_t * records, int t0, __half * rows, int pitch) {
    const KeyPlaces f(head.format);
    const uint8_t * record = records + head.record_offset;
    for (int t = t0 + (threadIdx.x & 31); t < t0 + 16; t += 32) {
        for (int i = 0; i < 4 * f.coded(); ++i) {
            int quad = i / 4, bits = 8;
            uint32_t at = f.at8;
            if (quad >= f.q8) quad -= f.q8, bits = 4, at = f.at4;
            if (bits == 4 && quad >= f.q4) quad -= f.q4, bits = 3, at = f.at3;
            if (bits == 3 && quad >= f.q3) quad -= f.q3, bits = 2, at = f.at2;
            const uint8_t * codes = record + at + 64 * bits * quad + 4 * (t % 8) + i % 4;
            int code = coded(codes, bits, 32, t / 8);
            if (bits == 3) code |= ((codes[128 + 32 * (t / 64)] >> t / 8 % 8) & 1) << 2;
            const int scale_at = i * f.groups + t * f.groups / kPageCells;
            const float x = half_at(record + f.min, scale_at) + float(code) * half_at(record + f.scale, scale_at);
            rows[(t - t0) * pitch + record[f.order + i]] = __ushort_as_half(float_to_half(x));
        }
    }
}
__device__ __noinline__ void unpack_value_rows(const ValueHead & head, const uint8_t * records, int t0, __half * rows, int pitch) {
    const ValuePlaces f(head.format);
    const uint8_t * record = records + head.record_offset;
    const int d_v = head.format.head_size, bits = head.format.bits, lane = threadIdx.x & 31;
    const float middle = 0.5f - float(1 << (bits - 1));
    for (int t = t0; t < t0 + 16; ++t) {
        float x[8];
        for (int k = 0; k < 8; ++k) {
            const int d = 128 * (k / 4) + 4 * lane + k % 4;
            x[k] = 0;
            if (d >= d_v) continue;
            const uint8_t * codes = record + 4 * d + t % 4;
            int code = coded(codes, bits, 4 * d_v, t / 4);
            if (bits == 3) code |= ((codes[f.high + t / 32 * 4 * d_v] >> t / 4 % 8) & 1) << 2;
            x[k] = mean_of(record[f.mean + d]) + (float(code) + middle) * scale_of(record[f.scale + t]);
        }
        rotate_row(x, d_v);
        for (int k = 0; k < 8; ++k) {
            const int d = 128 * (k / 4) + 4 * lane + k % 4;
            if (d < d_v) rows[(t - t0) * pitch + d] = __ushort_as_half(float_to_half(x[k]));
        }
    }
}

// Pages in F16 altogether, or in keys or values.
__device__ __forceinline__ bool is_half(const PageRef & key, const PageRef & value) {
    const auto bits = [](const void * x) { return reinterpret_cast<uintptr_t>(x); };
    return ((bits(key.rows) | bits(value.rows)) != 0) & ((bits(key.rows) | bits(key.records)) != 0) & ((bits(value.rows) | bits(value.records)) != 0);
}

// Blocks for such pages take turns through all pages. Most likely these are in F16: the last three and the first; so they come first.
__device__ __forceinline__ int half_page(int n_pages, int turn) { return turn == 3 ? 0 : n_pages - 1 - turn + (turn > 3); }

// Which of `n` turns, `step` apart from `first` on, are pages in F16: 32 bits to a word, by a whole block.
__device__ __noinline__ void find_half(const PageRef * key_pages, const PageRef * value_pages, int n_pages, int first, int step, int n, int n_words, unsigned * hits) {
    const int lane = threadIdx.x & 31;
#pragma unroll 1
    for (int word = warp_index(); word < n_words; word += blockDim.x >> 5) {
        const int i = 32 * word + lane, page = half_page(n_pages, first + min(i, n - 1) * step);
        const unsigned found = __ballot_sync(kWarp, i < n && is_half(load_page(key_pages + page), load_page(value_pages + page)));
        if (lane == 0) hits[word] = found;
    }
    __syncthreads();
}

// Writes a KV head's share of new rows that are among the 16 from `rows` on, and brings it to shared memory, too: by a whole warp. `to`: where the row
// of a lane goes.
__device__ __forceinline__ void write_new(const RowWrite & write, half * to, half * rows, int kv, int head_size, __half * shared, int pitch) {
    const int lane = threadIdx.x & 31;
#pragma unroll 1
    for (int first = 0; first < write.n; first += 32) {
        if (first > 0) to = first + lane < write.n ? write.destination[first + lane] : nullptr;
#pragma unroll 1
        for (unsigned left = __ballot_sync(kWarp, to >= rows && to < rows + 16 * write.row); left; left &= left - 1) {
            const int i = __ffs(left) - 1;
            const unsigned offset = __shfl_sync(kWarp, unsigned(to - rows), i);
            half * const at = rows + offset;
            const int t = __ffs(__ballot_sync(kWarp, unsigned(lane * write.row) == offset)) - 1;
            const float * from = reinterpret_cast<const float *>(static_cast<const uint8_t *>(write.source) + (first + i) * write.stride) + kv * head_size;
#pragma unroll 1
            for (int d = 4 * lane; d < head_size; d += 128) {
                const float4 x = *reinterpret_cast<const float4 *>(from + d);
                const uint2 y = make_uint2(float_to_half(x.x) | uint32_t(float_to_half(x.y)) << 16, float_to_half(x.z) | uint32_t(float_to_half(x.w)) << 16);
                *reinterpret_cast<uint2 *>(at + kv * head_size + d) = y;
                *reinterpret_cast<uint2 *>(shared + t * pitch + d) = y;
            }
        }
    }
}

// A warp takes 16 tokens of a page. Queries are rows of its tiles for the scores, columns for the sums; of rows a lane has n8, of columns 2j and 2j + 1.
// Its tokens are 4j to 4j + 3, as keys 4 (n8 / 2) + n8 % 2 and two more.
template <int NB, int NT>
__device__ __forceinline__ void half_pages(const Attention & call, const DecodeCut & cut, const Brought & brought, const Place & at, uint8_t * memory,
                                           bool alone) {
    constexpr int kRows = 4 * NT;
    constexpr int kRounds = 4;  // pages of a thread that are looked for at once
    __shared__ unsigned hits[kRounds * 2 * kMostPairs];
    __shared__ float factors[kRows];  // of scores of queries scaled to below 2^14
    const int lane = threadIdx.x & 31, n8 = lane >> 2, j = lane & 3, warp = warp_index(), n_warps = blockDim.x >> 5;
    const int d_k = call.head_size_k, d_v = call.head_size_v, n_rows = at.n_rows;
    const HalfShape & shape = cut.half_shape;
    __half * const queries = reinterpret_cast<__half *>(memory);
    __half * const keys = reinterpret_cast<__half *>(memory + shape.keys), * const values = reinterpret_cast<__half *>(memory + shape.values);
    const PageRef * const key_pages = call.key_pages + ahead(at.stream, call.page_stride), * const value_pages = call.value_pages + ahead(at.stream, call.page_stride);
    const int row = min(n8, n_rows - 1);
    const __half * const mask = call.mask ? mask_of(call, at.stream, at.row(cut, row)) : nullptr;

    float acc[NB][4][4], max_ = minus_infinity(), sum = 0;  // acc: dimensions 64 b + 8 n8 + 2 k and one more
#pragma unroll
    for (int i = 0; i < 16 * NB; ++i) acc[i / 16][i / 4 % 4][i % 4] = 0;

    // Pages in turns: those of the recent window are neighbours. Few are not looked for.
    const int n_blocks = alone ? 1 : cut.n_half, n_mine = alone ? cut.n_pages : cut.half_each + (at.block < cut.half_more);
    const bool few = n_mine <= kAlonePages;

    // Everything but the queries and new rows is there before the kernel before this one is done.
    half * const new_key = lane < brought.keys.n ? brought.keys.destination[lane] : nullptr;
    half * const new_value = lane < brought.values.n ? brought.values.destination[lane] : nullptr;
    const float slope = alibi_slope(call, at.row(cut, row).head) * kLog2E;
    bool ready = false;
    auto prepare = [&] {
        wait_for_kernel_before();
#pragma unroll 1
        for (int r = warp; r < HalfShape::kRows; r += n_warps) {
            float x[8];
            const int e = load_query(query_of(call, at.stream, at.row(cut, min(r, n_rows - 1))), d_k, x);
            const float unit = r < n_rows ? power(-e) * 0x1p14f : 0.0f;
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const int d = 128 * k + 4 * lane;
                const uint2 y = make_uint2(pack2(x[4 * k] * unit, x[4 * k + 1] * unit), pack2(x[4 * k + 2] * unit, x[4 * k + 3] * unit));
                if (d < shape.query_pitch) *reinterpret_cast<uint2 *>(queries + r * shape.query_pitch + d) = y;
            }
            if (lane == 0 && r < kRows) factors[r] = call.scale * kLog2E * power(e) * 0x1p-14f;
        }
        __syncthreads();
        ready = true;
    };

    auto take = [&](int page) {
        const int lane = opaque(threadIdx.x & 31), n8 = lane >> 2, j = lane & 3;
        const PageRef key = load_page(key_pages + page), value = load_page(value_pages + page);
        if (few && !is_half(key, value)) return;
        const int cell0 = page * kPageCells, n_cells = min(call.n_kv - cell0, kPageCells);
#pragma unroll 1
        for (int t0 = 16 * warp; t0 < kPageCells; t0 += 16 * n_warps) {
            const int own = 16 * warp, key_t = own + 4 * (n8 >> 1) + (n8 & 1), value_t = own + 4 * j;
            if (!key.rows) unpack_key_rows(call.key_heads[at.kv], key.records, t0, keys + own * shape.key_pitch, shape.key_pitch);
            if (!value.rows) unpack_value_rows(call.value_heads[at.kv], value.records, t0, values + own * shape.value_pitch, shape.value_pitch);
#pragma unroll 1
            for (int side = 0; side < 2; ++side) {
                const half * from = side ? value.rows : key.rows;
                const int row = side ? call.row_v : call.row_k, size = side ? d_v : d_k, pitch = side ? shape.value_pitch : shape.key_pitch;
                if (!from) continue;
                from += unsigned((t0 + (lane >> 3)) * row + at.kv * size);
                __half * const to = (side ? values : keys) + (own + (lane >> 3)) * pitch;
#pragma unroll 1
                for (int d = 8 * (lane & 7); d < size; d += 64) {
#pragma unroll
                    for (int t = 0; t < 16; t += 4) {
                        copy_or_zero(to + t * pitch + d, from + unsigned(t * row + d), t0 + (lane >> 3) + t < n_cells);
                    }
                }
            }
            const uint2 m = masks_of(mask, cell0 + t0 + 4 * j, n_cells - t0 - 4 * j);
            if (!ready) prepare();
            wait_for_copies();
            __syncwarp();
            const auto is_here = [&](const half * row, const half * rows, int elements) {
                return reinterpret_cast<uintptr_t>(row) - reinterpret_cast<uintptr_t>(rows + t0 * elements) < uintptr_t(32 * elements);
            };
            if (__any_sync(kWarp, is_here(new_key, key.rows, call.row_k) || is_here(new_value, value.rows, call.row_v)) || brought.keys.n > 32) {
#pragma unroll 1
                for (int side = 0; side < 2; ++side) {
                    half * const page_rows = const_cast<half *>(side ? value.rows : key.rows);
                    const int pitch = side ? shape.value_pitch : shape.key_pitch;
                    if (page_rows) {
                        write_new(side ? brought.values : brought.keys, side ? new_value : new_key, page_rows + t0 * (side ? call.row_v : call.row_k), at.kv,
                                  side ? d_v : d_k, (side ? values : keys) + own * pitch, pitch);
                    }
                }
                __syncwarp();
            }
            if (!__any_sync(kWarp, m.x != 0xfc00fc00u || m.y != 0xfc00fc00u)) continue;

            // --- scores; of keys that are not there they mean nothing
            float s[2][4] = {};
            const __half * const query_at = queries + n8 * shape.query_pitch + 8 * j, * const key_at = keys + key_t * shape.key_pitch + 8 * j;
#pragma unroll 1
            for (int d = 0; d < d_k; d += 32) {
                const uint4 q = *reinterpret_cast<const uint4 *>(query_at + d);
#pragma unroll
                for (int b = 0; b < 2; ++b) {
                    const uint4 k = d + 8 * j < d_k ? *reinterpret_cast<const uint4 *>(key_at + 2 * b * shape.key_pitch + d) : make_uint4(0, 0, 0, 0);
                    mma(s[b], q.x, 0, q.y, 0, k.x, k.y);
                    mma(s[b], q.z, 0, q.w, 0, k.z, k.w);
                }
            }

            // --- weights
            float z[4] = {s[0][0], s[0][1], s[1][0], s[1][1]}, top = max_;
            const float unit = factors[min(n8, kRows - 1)];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                z[i] *= unit;
                if (call.softcap > 0) z[i] = capped_apart(z[i], call.softcap);
                z[i] = masked(z[i], (i < 2 ? m.x : m.y) >> 16 * (i % 2) & 0xffff, slope);
                top = fmaxf(top, z[i]);
            }
            top = fmaxf(top, __shfl_xor_sync(kWarp, top, 1));
            top = fmaxf(top, __shfl_xor_sync(kWarp, top, 2));
            const float zero = top == minus_infinity() ? 0.0f : top, lower = exp2_of(max_ - zero);
            max_ = top;
            sum *= lower;
#pragma unroll
            for (int i = 0; i < 4; ++i) sum += z[i] = exp2_of(z[i] - zero);
            const uint32_t p0 = pack2(z[0], z[1]), p1 = pack2(z[2], z[3]);

            // --- values
            const float lower0 = __shfl_sync(kWarp, lower, 8 * j), lower1 = __shfl_sync(kWarp, lower, 8 * j + 4);
#pragma unroll
            for (int b = 0; b < NB; ++b) {
                uint4 v[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    v[i] = *reinterpret_cast<const uint4 *>(values + (value_t + i) * shape.value_pitch + 64 * b + 8 * n8);
                }
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float (&c)[4] = acc[b][i];
                    c[0] *= lower0, c[1] *= lower1, c[2] *= lower0, c[3] *= lower1;
                    const uint32_t x0 = part(v[0], i), x1 = part(v[1], i), x2 = part(v[2], i), x3 = part(v[3], i);
                    mma(c, __byte_perm(x0, x1, 0x5410), __byte_perm(x0, x1, 0x7632), __byte_perm(x2, x3, 0x5410), __byte_perm(x2, x3, 0x7632), p0, p1);
                }
            }
            __syncwarp();  // keys and values are not needed any more
        }
    };

#pragma unroll 1
    for (int start = 0; start < n_mine; start += kRounds * blockDim.x) {
        const int n_words = min(kRounds * n_warps, (n_mine - start + 31) / 32);
        if (!few) find_half(key_pages, value_pages, cut.n_pages, at.block + start * n_blocks, n_blocks, n_mine - start, n_words, hits);
#pragma unroll 1
        for (int word = 0; word < n_words; ++word) {
#pragma unroll 1
            for (unsigned left = few ? (1u << n_mine) - 1 : hits[word]; left; left &= left - 1) {
                take(half_page(cut.n_pages, at.block + (start + 32 * word + __ffs(left) - 1) * n_blocks));
            }
        }
        __syncthreads();
    }
    if (!ready) wait_for_kernel_before();

    // --- joins the warps
    __syncthreads();
    float * const partial = part_of(call, cut, at.block);
    float2 * const ends = reinterpret_cast<float2 *>(memory + shape.ends);  // [warp][row]: maximum, sum
    float * const sums = reinterpret_cast<float *>(memory + shape.sums);    // [warp][row][dimension]
    sum += __shfl_xor_sync(kWarp, sum, 1);
    sum += __shfl_xor_sync(kWarp, sum, 2);
    if (j == 0 && n8 < kRows) ends[warp * kRows + n8] = make_float2(max_, sum);
#pragma unroll
    for (int b = 0; b < NB; ++b) {
        if (64 * b + 8 * n8 >= d_v) continue;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int r = 2 * j + i % 2;
            if (r >= kRows) continue;
            float * to = sums + (warp * kRows + r) * shape.sum_pitch + 64 * b + 8 * n8 + 2 * (i / 2);
            *reinterpret_cast<float2 *>(to) = make_float2(acc[b][i / 2][i % 2], acc[b][i / 2][2 + i % 2]);
        }
    }
    __syncthreads();
#pragma unroll 1
    for (int r = warp; r < n_rows; r += n_warps) {
        const float2 end = lane < n_warps ? ends[lane * kRows + r] : make_float2(minus_infinity(), 0);
        float top = end.x;
#pragma unroll
        for (int step = 4; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(kWarp, top, step));
        top = __shfl_sync(kWarp, top, 0);
        const float weight = exp2_of(end.x - (top == minus_infinity() ? 0.0f : top));
        float total = weight * end.y;
#pragma unroll
        for (int step = 4; step > 0; step /= 2) total += __shfl_xor_sync(kWarp, total, step);
        total = __shfl_sync(kWarp, total, 0);
        const RowPlace place = at.row(cut, r);
        const float scale = alone ? close_softmax(top, total, call.sinks ? call.sinks + place.head : nullptr) : 1.0f;
        float * to = alone ? call.out + ahead(at.stream, call.out_stream) + ahead(place.head, call.out_head) + ahead(place.token, call.out_token) : partial + r * d_v;
#pragma unroll 1
        for (int first = 0; first < d_v; first += 128) {
            const int d = first + 4 * lane;
            float4 x = make_float4(0, 0, 0, 0);
#pragma unroll 2
            for (int w = 0; w < n_warps; ++w) {
                const float factor = __shfl_sync(kWarp, weight, w);
                if (d >= d_v) continue;
                const float4 y = *reinterpret_cast<const float4 *>(sums + (w * kRows + r) * shape.sum_pitch + d);
                x.x = fmaf(factor, y.x, x.x), x.y = fmaf(factor, y.y, x.y), x.z = fmaf(factor, y.z, x.z), x.w = fmaf(factor, y.w, x.w);
            }
            if (d < d_v) *reinterpret_cast<float4 *>(to + d) = make_float4(x.x * scale, x.y * scale, x.z * scale, x.w * scale);
        }
        if (!alone && lane == 0) {
            partial[kRows * d_v + r] = top;
            partial[kRows * d_v + kRows + r] = total;
        }
    }
}

// --- the kernel -----------------------------------------------------------------------------------------------

// What all blocks of a KV head have found for a row: every `ways`-th part from `way` on, by a warp. weights: [split], in shared memory: maximum, then
// weight; sum. Loops of lanes are as long for all of them: where they part, every shuffle afterwards needs more code.
template <int NB>
__device__ __forceinline__ void join(const Attention & call, const DecodeCut & cut, const RowPlace & place, int row, int way, int ways, float2 * weights,
                                     const float * base, float * to) {
    const int lane = threadIdx.x & 31, d_v = call.head_size_v, stride = int(partial_floats(cut, d_v)), last = (cut.n_splits - 1) * stride, step = ways * stride;
    const float * const parts = base + row * d_v;
    float4 x[kAhead];
    auto load = [&](int at, int d) {
        const float * from = parts + min(d, d_v - 4);
        asm volatile("" : "+l"(from));  // else the compiler adds up more for every load
#pragma unroll
        for (int i = 0; i < kAhead; ++i, at = opaque(at + step)) x[i] = __ldcg(reinterpret_cast<const float4 *>(from + min(at, last)));
    };
    load(way * stride, 4 * lane);  // before it is known what they weigh

    const float * const maxima = base + cut.rows * d_v + row;
    float top = minus_infinity(), total = 0;
#pragma unroll 1
    for (int first = 0; first < cut.n_weights; first += 32) {
        const int split = first + lane;
        const float * const at = maxima + min(split * stride, last);
        const float max = split < cut.n_splits ? __ldcg(at) : minus_infinity(), sum = __ldcg(at + cut.rows);
        weights[split] = make_float2(max, sum);
        top = fmaxf(top, max);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(kWarp, top, step));
    const float zero = top == minus_infinity() ? 0.0f : top;
#pragma unroll 1
    for (int first = 0; first < cut.n_weights; first += 32) {
        float2 & x = weights[first + lane];
        x.x = exp2_of(x.x - zero);
        total = fmaf(x.x, x.y, total);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(kWarp, total, step);
    __syncwarp();

    const float scale = close_softmax(top, total, call.sinks ? call.sinks + place.head : nullptr);
#pragma unroll 1
    for (int d = 4 * lane;; d += 128) {
        float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 1
        for (int first = way;;) {
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                const float weight = weights[first + i * ways].x;
                sum.x = fmaf(weight, x[i].x, sum.x), sum.y = fmaf(weight, x[i].y, sum.y);
                sum.z = fmaf(weight, x[i].z, sum.z), sum.w = fmaf(weight, x[i].w, sum.w);
            }
            first += kAhead * ways;
            if (first >= cut.n_splits) break;
            load(first * stride, d);
        }
        if (d < d_v) *reinterpret_cast<float4 *>(to + d) = make_float4(sum.x * scale, sum.y * scale, sum.z * scale, sum.w * scale);
        if (NB <= 2 || d - 4 * lane + 128 >= d_v) break;
        load(way * stride, d + 128);
    }
    __syncwarp();  // the weights are not needed any more
}

// Sums the queries of a KV head up; the last head's block counts them.
__device__ __forceinline__ void observe_head(const Brought & brought, int kv, int n_kv_heads, int head_size, uint32_t * counter) {
    const auto fading = [&](int stream) { return Fading(brought.sums.count[stream * brought.sums.stream], brought.queries.n, brought.memory); };
#pragma unroll 1
    for (int stream = 0; stream < brought.queries.n_streams; ++stream) {
        const Fading fades = fading(stream);
#pragma unroll 1
        for (int d = threadIdx.x; d < head_size; d += blockDim.x) {
            float abs = 0, sqr = 0;
            add_queries(brought.queries, stream, kv, d, abs, sqr);
            add_sums(brought.sums, stream * brought.sums.stream + kv * head_size + d, abs, sqr, fades);
        }
    }
    __syncthreads();
    if (threadIdx.x == 0 && arrive(counter) == uint32_t(n_kv_heads - 1)) {
        *counter = 0;
#pragma unroll 1
        for (int stream = 0; stream < brought.queries.n_streams; ++stream) brought.sums.count[stream * brought.sums.stream] = fading(stream).count;
    }
}

// grid: splits and perhaps an observer, KV heads, streams and tiles of rows. NB: blocks of 32 value dimensions of a warp, NT: blocks of four rows.
template <int NB, int NT>
__global__ void __launch_bounds__(64 * kMostPairs, NB <= 2 ? 2 : 1)
    decode_kernel(const __grid_constant__ Attention call, const __grid_constant__ DecodeCut cut, const __grid_constant__ Brought brought) {
    constexpr int kRows = 4 * NT;
    MIXKVQ_DYNAMIC_SHARED(memory, 128);  // as DecodeShape's lines
    Place at;
    at.block = blockIdx.x, at.kv = blockIdx.y, at.stream = blockIdx.z, at.first_row = 0, at.n_rows = call.n_tokens * cut.group;
    if (cut.n_tiles > 1) {
        at.stream = int(blockIdx.z) / cut.n_tiles, at.first_row = (int(blockIdx.z) - at.stream * cut.n_tiles) * cut.rows;
        at.n_rows = min(at.n_rows - at.first_row, cut.rows);
    }

    // A short context, a page in F16 at most: one block does it all, and nobody has to wait.
    bool alone = false;
    if (cut.n_pages > 0 && cut.n_pages <= kAlonePages) {
        const int page = min(int(threadIdx.x & 31), cut.n_pages - 1);
        const size_t i = ahead(at.stream, call.page_stride) + page;
        const PageRef key = load_page(call.key_pages + i), value = load_page(call.value_pages + i);
        const unsigned halves = __ballot_sync(kWarp, int(threadIdx.x & 31) < cut.n_pages && (key.rows || value.rows));
        alone = __ballot_sync(kWarp, key.records || value.records) == 0 && (halves & (halves - 1)) == 0;
    }
    if (alone) let_kernel_after_start();  // otherwise later: what starts takes room on the SMs and only waits there
    if (at.block == cut.n_splits || (alone && at.block > 0)) {
        wait_for_kernel_before();
    } else if (at.block < cut.n_half) {
        half_pages<NB, NT>(call, cut, brought, at, reinterpret_cast<uint8_t *>(memory), alone);
        if (alone && at.block != cut.observer) return;
    } else {
        packed_pages<NB, NT>(call, cut, at, reinterpret_cast<uint8_t *>(memory));
    }
    let_kernel_after_start();
    if (!alone && at.block < cut.n_splits) {
        const int warp = warp_index(), n_warps = blockDim.x >> 5, d_v = call.head_size_v;
        float2 * const weights = reinterpret_cast<float2 *>(memory) + warp * cut.n_weights;
        float * const parts = reinterpret_cast<float *>(memory) + n_warps * 2 * cut.n_weights;  // [warp][dimension], of several ways
        const auto result = [&](int row) {
            const RowPlace place = at.row(cut, row);
            return call.out + ahead(at.stream, call.out_stream) + ahead(place.head, call.out_head) + ahead(place.token, call.out_token);
        };
        __shared__ bool is_last[kRows];
        __syncthreads();  // of the shared memory nothing is needed any more
#pragma unroll 1
        for (int row = warp; row < at.n_rows; row += n_warps) {  // whose part this warp has written
            if ((threadIdx.x & 31) != 0) continue;
            uint32_t * const counter = call.arrivals + (opaque(int(blockIdx.z)) * call.n_kv_heads + opaque(int(blockIdx.y))) * kMostRows + row;
            is_last[row] = arrive(counter) == uint32_t(cut.n_splits - 1);
            if (is_last[row]) *counter = 0;
        }
        __syncwarp();  // what the first lane has seen to be there is there for all
        if (cut.ways > 1) __syncthreads();
#pragma unroll 1
        for (int i = warp; i < at.n_rows * cut.ways; i += n_warps) {
            const int way = cut.ways > 1 ? i / at.n_rows : 0, row = i - way * at.n_rows;
            if (__any_sync(kWarp, is_last[row])) {
                join<NB>(call, cut, at.row(cut, row), row, way, cut.ways, weights, part_of(call, cut, 0), cut.ways > 1 ? parts + warp * d_v : result(row));
            }
        }
        if (cut.ways > 1) {
            __syncthreads();
            if (warp < at.n_rows && __any_sync(kWarp, is_last[warp])) {
#pragma unroll 1
                for (int d = threadIdx.x & 31; d < d_v; d += 32) {
                    float sum = 0;
#pragma unroll 1
                    for (int w = warp; w < cut.ways * at.n_rows; w += at.n_rows) sum += parts[w * d_v + d];
                    result(warp)[d] = sum;
                }
            }
        }
    }
    if (brought.queries.n > 0 && at.block == cut.observer && at.stream == 0) {
        observe_head(brought, at.kv, call.n_kv_heads, call.head_size_k, call.arrivals + call.n_streams * call.n_kv_heads * kMostRows);
    }
}

// --- host -----------------------------------------------------------------------------------------------------

using Kernel = void (*)(Attention, DecodeCut, Brought);

// A kernel, and how many of its blocks an SM holds: asked once per device, pairs and size.
struct Entry {
    Kernel kernel;
    std::atomic<uint64_t> known[16][kMostPairs];

    int blocks_per_sm(int device, int n_pairs, int bytes, int most_bytes) {
        std::atomic<uint64_t> & cell = known[device % 16][n_pairs - 1];
        const uint64_t tag = uint64_t(device + 1) << 40 | uint64_t(bytes) << 8, seen = cell.load(std::memory_order_relaxed);
        if ((seen & ~uint64_t(255)) == tag) return int(seen & 255);
        const void * function = reinterpret_cast<const void *>(kernel);
        int n = 0;
        if (cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most_bytes) != cudaSuccess ||
            cudaOccupancyMaxActiveBlocksPerMultiprocessor(&n, function, 64 * n_pairs, bytes) != cudaSuccess) {
            cudaGetLastError();
        }
        n = std::min(n, 255);
        cell.store(tag | uint64_t(n), std::memory_order_relaxed);
        return n;
    }
};
template <int NB, int NT>
Entry & entry_of() {
    static Entry entry{decode_kernel<NB, NT>, {}};
    return entry;
}
template <int NT>
Entry & entry_of(int d_v) {
    return d_v <= 64 ? entry_of<1, NT>() : d_v <= 128 ? entry_of<2, NT>() : entry_of<4, NT>();
}

struct Plan {
    DecodeCut cut;
    Entry * entry = nullptr;  // nullptr: not served
    int n_pairs, bytes;
    size_t n_heads;  // KV heads of all streams, once for every tile of rows
};

int n_tiles(const Attention & c, int rows) { return (c.n_tokens * (c.n_heads / c.n_kv_heads) + rows - 1) / rows; }

Plan make_plan(const Attention & c) {
    Plan plan = {};
    DecodeCut & cut = plan.cut;
    cut.group = c.n_heads / c.n_kv_heads;
    cut.group_inverse = 1.0f / cut.group;
    const int n_rows = std::min(kMostRows, c.n_tokens * cut.group);
    if ((c.q_token | c.q_head | c.q_stream | c.out_token | c.out_head | c.out_stream) % 4 != 0) return plan;
    if (n_rows <= 0 || n_tiles(c, kMostRows) > kMostTiles || c.any_grouped || c.most_n16 > 0) return plan;

    const Gpu gpu = current_gpu();
    const int most_bytes = gpu.shared - 2048;  // less what the kernel declares itself
    if (n_tiles(c, kMostRows) > kFewTiles && gpu.shared < kSmallShared && prefill_workspace(c) > 0) return plan;

    cut.n_pages = (c.n_kv + kPageCells - 1) / kPageCells;
    int blocks = 0;
    for (int rows : {kMostRows, kMostRows / 2}) {  // half as many take less shared memory
        if (plan.entry || (rows > 4 && n_rows <= 4)) continue;
        cut.rows = rows;
        Entry & entry = rows == 4 ? entry_of<1>(c.head_size_v) : entry_of<2>(c.head_size_v);
        for (int n_pairs = kMostPairs; n_pairs > 0; --n_pairs) {  // as many pairs as an SM can hold
            const DecodeShape shape(cut.rows, n_pairs, c.head_size_k, c.head_size_v, c.most_key_bytes, c.most_value_bytes);
            const HalfShape half_shape(cut.rows, n_pairs, c.head_size_k, c.head_size_v);
            const int bytes = std::max({shape.bytes, half_shape.bytes, 2 * n_pairs * (8 * (kMostSplits + 2 * kMostPairs * kAhead + 32) + 4 * c.head_size_v)});
            const int n = bytes > most_bytes ? 0 : std::min(gpu.most_blocks(bytes), entry.blocks_per_sm(gpu.device, n_pairs, bytes, most_bytes));
            if (n * n_pairs <= blocks * plan.n_pairs) continue;
            blocks = n;
            cut.shape = shape;
            cut.half_shape = half_shape;
            plan.n_pairs = n_pairs;
            plan.bytes = bytes;
            plan.entry = &entry;
        }
    }
    if (!plan.entry) return plan;
    cut.n_tiles = n_tiles(c, cut.rows);
    plan.n_heads = size_t(c.n_kv_heads) * c.n_streams * cut.n_tiles;
    const int tile_rows = std::min(n_rows, cut.rows);

    // As many splits as fill the GPU once. In long contexts the first page and the last ones are in F16 as a rule: they are no work for pairs.
    const int splits = std::max(2, std::min(kMostSplits, int(size_t(gpu.n_sms) * blocks / plan.n_heads)));
    cut.front = cut.n_pages > 16 ? 1 : 0, cut.back = 2 * cut.front;
    const int n_counted = cut.n_pages - cut.front - cut.back;
    const auto ceil_of = [](int a, int b) { return (a + b - 1) / b; };
    const auto n_workers = [&](int n_half) { return plan.n_pairs * std::max(1, std::min(splits - n_half, ceil_of(cut.n_pages, plan.n_pairs))); };
    // Short contexts may lie in F16 altogether. In others blocks for four such pages and pairs should be done at the same time: in a model, thousands of
    // cycles of an H200.
    const auto time = [&](int n_half) { return std::max(7.0 + 5.5 * ceil_of(n_counted, n_workers(n_half)), 6.5 + 5.3 * ceil_of(4, n_half)); };
    cut.n_half = std::max(1, std::min(cut.n_pages <= 16 ? cut.n_pages : 4, splits / 2));
    for (int n : {2, 1}) {
        if (cut.n_pages > 16 && n < cut.n_half && time(n) < time(cut.n_half)) cut.n_half = n;
    }
    cut.half_each = cut.n_pages / cut.n_half, cut.half_more = cut.n_pages % cut.n_half;
    cut.n_splits = cut.n_half + n_workers(cut.n_half) / plan.n_pairs;
    const int workers = n_workers(cut.n_half), n_blocks = cut.n_splits - cut.n_half;
    cut.each = n_counted / workers, cut.more = n_counted % workers / n_blocks, cut.more_blocks = n_counted % workers % n_blocks;
    cut.ways = std::max(1, std::min(2 * plan.n_pairs / tile_rows, ceil_of(cut.n_splits, 3 * kAhead)));
    cut.n_weights = (cut.n_splits + cut.ways * kAhead + 31) / 32 * 32;
    cut.observer = cut.n_splits < splits ? cut.n_splits : cut.n_half > 1 || cut.n_pages > 512 ? 0 : cut.n_splits - 1;
    return plan;
}

}  // namespace

size_t decode_workspace(const Attention & call) {
    const Plan plan = make_plan(call);
    return plan.entry ? plan.n_heads * plan.cut.n_splits * partial_floats(plan.cut, call.head_size_v) : 0;
}

size_t attention_arrivals(const Attention & call) {
    return size_t(call.n_streams) * std::min(n_tiles(call, kMostRows / 2), 2 * kMostTiles) * call.n_kv_heads * kMostRows + 1;
}

bool decode(Stream stream, const Attention & call, const NewRows * rows) {
    Plan plan = make_plan(call);
    if (!plan.entry) return false;
    Brought brought = {};
    if (rows) {
        if (plan.cut.n_tiles > 1) return false;
        const auto serves = [](const RowWrite & w) { return !w.source_is_half && (reinterpret_cast<uintptr_t>(w.source) | w.stride) % 16 == 0; };
        if (!serves(rows->keys) || !serves(rows->values)) return false;
        const Observation & o = rows->queries;
        brought = {rows->keys, rows->values, o.sums, queries_of(o), o.memory};
    }
    plan.cut.partial = call.workspace;
    const dim3 grid(plan.cut.n_splits + (rows && plan.cut.observer == plan.cut.n_splits), call.n_kv_heads, call.n_streams * plan.cut.n_tiles);
    if (rows && can_start_early(plan.entry->kernel)) {
        launch_early(plan.entry->kernel, grid, 64 * plan.n_pairs, plan.bytes, stream, call, plan.cut, brought);
    } else {
        launch(plan.entry->kernel, grid, 64 * plan.n_pairs, plan.bytes, stream, call, plan.cut, brought);
    }
    return true;
}

}  // namespace mixkvq::cuda
