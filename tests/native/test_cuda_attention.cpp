// Attention on the GPU against sums in double precision over the decoded records: what the scalar kernels compute, here from one-hot queries and
// weights. Exit code 77 without a GPU.
//
// Tolerance, over all outputs of a call (root mean squares, relative to that of the values' own size):
//   - at most 2e-3: queries, weights and (prefill) decoded numbers are rounded to halves, 2^-12 of each, and logits of keys with large offsets
//     carry that rounding into the softmax; stock attention over F16 rounds the same. The rounding of logits grows with them: queries k times as
//     large may add k times as much.
//   - and at most a fifth (8-bit formats: half) of what quantising the pages did to the same outputs, plus 4e-4.
// A query that sees nothing gives exactly 0. `test_cuda_attention N` runs every N-th case.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include <cuda_runtime.h>

#include "../../cpp/cuda/decode.cuh"
#include "../../cpp/cuda/layout.cuh"
#include "check.h"
#include "mixkvq/cuda.h"
#include "mixkvq/kernels.h"

using namespace mixkvq;

namespace mixkvq {
namespace cuda {
size_t prefill_workspace(const Attention & call);
}
const Kernels & scalar_kernels();
}

namespace {

std::mt19937 rng;
float gauss() { return std::normal_distribution<float>()(rng); }
int below(int n) { return int(rng() % unsigned(n)); }

const float kInf = std::numeric_limits<float>::infinity();

half to_half(float x) {
    half h;
    scalar_kernels().to_half(&x, &h, 1);
    return h;
}
float from_half(half h) {
    float x;
    scalar_kernels().from_half(&h, &x, 1);
    return x;
}

// --- device memory --------------------------------------------------------------------------------------------

struct Arena {
    std::vector<void *> blocks;
    ~Arena() {
        for (void * p : blocks) cudaFree(p);
    }
    void * get(size_t bytes, int fill = 0xff) {  // all ones: NaN
        void * p = nullptr;
        CHECK(cudaMalloc(&p, bytes + 256) == cudaSuccess, "cudaMalloc of %zu", bytes);
        cudaMemset(p, fill, bytes + 256);
        blocks.push_back(p);
        return p;
    }
    template <class T>
    T * up(const std::vector<T> & x) {
        T * p = static_cast<T *>(get(x.size() * sizeof(T)));
        cudaMemcpy(p, x.data(), x.size() * sizeof(T), cudaMemcpyHostToDevice);
        return p;
    }
};

// --- cases ----------------------------------------------------------------------------------------------------

enum class Pages { packed, mixed, all_half, crossed };  // crossed: of some pages the keys or the values only are packed
enum class Mask { none, causal, random, per_head, nothing, window, gap };

struct Case {
    std::string name;
    std::vector<KeyFormat> keys;  // by KV head
    std::vector<ValueFormat> values;
    int group = 1, n_tokens = 1, n_streams = 1, n_kv = 300;
    Pages pages = Pages::mixed;
    Mask mask = Mask::causal;
    float softcap = 0, max_bias = 0;
    bool sinks = false, outliers = false;
    float query_size = 1;
    size_t unpacked_bytes = 0;  // prefill: of a chunk
};

KeyFormat key_format(int d, int n16, int n8, int n4, int n3, int group) {
    KeyFormat f;
    f.head_size = d;
    f.n16 = n16, f.n8 = n8, f.n4 = n4, f.n3 = n3, f.n2 = d - n16 - n8 - n4 - n3;
    f.group = group;
    return f;
}
ValueFormat value_format(int d, int bits, int group) {
    ValueFormat f;
    f.head_size = d, f.bits = bits, f.group = group;
    return f;
}
int quads(int d, int part, int of) { return d * part / of / 4 * 4; }

struct Result {
    double error = 0, noise = 0;
};
double worst_error = 0, worst_share = 0;
int n_cases = 0;

// The rows of the last tokens, as far as they are in F16 pages, come with the call: the same sums, and the rows and the query statistics are there.
void check_new_rows(const Case & c, Arena & arena, cuda::Attention call, const std::vector<cuda::PageRef> & key_refs,
                    const std::vector<cuda::PageRef> & value_refs, const std::vector<float> & k0, const std::vector<float> & v0,
                    const std::vector<float> & expected) {
    const int n_heads_kv = call.n_kv_heads, d = call.head_size_k, dv = call.head_size_v, n_pages = (c.n_kv + kPageCells - 1) / kPageCells;
    const int n_new = std::min(c.n_tokens, c.n_kv), n = n_new * c.n_streams;
    struct Side {
        const std::vector<cuda::PageRef> & refs;
        const std::vector<float> & numbers;
        int size, row;
        std::vector<half *> destination;
        std::vector<float> source;
        std::vector<half> rows;
    } sides[2] = {{key_refs, k0, d, call.row_k, {}, {}, {}}, {value_refs, v0, dv, call.row_v, {}, {}, {}}};
    for (Side & side : sides) {
        side.source.assign(size_t(n) * (side.row + 4), NAN);
        side.rows.assign(size_t(n) * side.row, half(0x7e00));
        for (int i = 0; i < n; ++i) {
            const int s = i / n_new, cell = c.n_kv - n_new + i % n_new;
            const half * page = side.refs[s * call.page_stride + cell / kPageCells].rows;
            side.destination.push_back(page ? const_cast<half *>(page) + size_t(cell % kPageCells) * side.row : nullptr);
            for (int x = 0; x < n_heads_kv * side.size; ++x) {
                const float number = side.numbers[((size_t(s) * n_heads_kv + x / side.size) * n_pages * kPageCells + cell) * side.size + x % side.size];
                side.source[size_t(i) * (side.row + 4) + x] = number;
                side.rows[size_t(i) * side.row + x] = to_half(number);
            }
            for (int x = n_heads_kv * side.size; x < side.row; ++x) {
                side.source[size_t(i) * (side.row + 4) + x] = 0;
                side.rows[size_t(i) * side.row + x] = 0;
            }
            if (!page) continue;
            const std::vector<half> stale(n_heads_kv * side.size, half(0x7e00));
            cudaMemcpy(side.destination[i], stale.data(), stale.size() * sizeof(half), cudaMemcpyHostToDevice);
        }
    }
    auto write_of = [&](Side & side) {
        return cuda::RowWrite{arena.up(side.source), false, (side.row + 4) * sizeof(float), arena.up(side.destination), n, side.row};
    };
    const size_t n_sums = size_t(n_heads_kv) * d;
    const size_t stride = 3 * n_sums + 1;
    std::vector<float> before(stride * c.n_streams);
    for (float & x : before) x = 1 + float(below(1000));
    auto observation_of = [&](float * sums) {
        return cuda::Observation{{sums, sums + n_sums, sums + 2 * n_sums, sums + 3 * n_sums, stride}, call.q, call.q_token, call.q_head, call.q_stream, c.n_tokens,
                                 c.n_streams, n_heads_kv, c.group, d, 500.0f};
    };
    float * plain_sums = arena.up(before), * sums = arena.up(before);
    cuda::observe(nullptr, observation_of(plain_sums));
    cudaMemset(call.out, 0xff, expected.size() * sizeof(float));
    cuda::attention(nullptr, call, {write_of(sides[0]), write_of(sides[1]), observation_of(sums)});
    const cudaError_t error = cudaDeviceSynchronize();
    CHECK(error == cudaSuccess && cudaGetLastError() == cudaSuccess, "%s, new rows: %s", c.name.c_str(), cudaGetErrorString(error));
    if (error != cudaSuccess) std::exit(1);

    std::vector<float> got(expected.size());
    cudaMemcpy(got.data(), call.out, got.size() * sizeof(float), cudaMemcpyDeviceToHost);
    for (int s = 0; s < c.n_streams; ++s) {
        for (int t = 0; t < c.n_tokens; ++t) {
            const size_t at = s * call.out_stream + t * call.out_token;
            for (size_t i = at; i < at + size_t(call.n_heads) * dv; ++i) {
                CHECK(got[i] == expected[i], "%s, new rows: stream %d, token %d: %g, not %g", c.name.c_str(), s, t, got[i], expected[i]);
            }
        }
    }
    for (const Side & side : sides) {
        for (int i = 0; i < n; ++i) {
            if (!side.destination[i]) continue;
            std::vector<half> row(size_t(n_heads_kv) * side.size);
            cudaMemcpy(row.data(), side.destination[i], row.size() * sizeof(half), cudaMemcpyDeviceToHost);
            CHECK(std::equal(row.begin(), row.end(), side.rows.begin() + size_t(i) * side.row), "%s, new rows: row %d is another", c.name.c_str(), i);
        }
    }
    std::vector<float> plain_observed(before.size()), observed(before.size());
    cudaMemcpy(plain_observed.data(), plain_sums, before.size() * sizeof(float), cudaMemcpyDeviceToHost);
    cudaMemcpy(observed.data(), sums, before.size() * sizeof(float), cudaMemcpyDeviceToHost);
    for (size_t i = 0; i < observed.size(); ++i) {
        CHECK(observed[i] == plain_observed[i], "%s, new rows: sum %zu of queries is %.9g, not %.9g", c.name.c_str(), i, observed[i], plain_observed[i]);
    }
    std::vector<uint32_t> arrivals(cuda::attention_arrivals(call));
    cudaMemcpy(arrivals.data(), call.arrivals, arrivals.size() * 4, cudaMemcpyDeviceToHost);
    for (uint32_t x : arrivals) CHECK(x == 0, "%s, new rows: %u left in a counter", c.name.c_str(), x);
}

Result run_case(const Case & c) {
    const Kernels & host = scalar_kernels();
    Arena arena;
    const int n_heads_kv = int(c.keys.size()), d = c.keys[0].head_size, dv = c.values[0].head_size, n_heads = n_heads_kv * c.group;
    const int n_pages = (c.n_kv + kPageCells - 1) / kPageCells, n_cells = n_pages * kPageCells;
    const int row_k = n_heads_kv * d + 8, row_v = n_heads_kv * dv + 16;

    std::vector<cuda::KeyHead> key_heads;
    std::vector<cuda::ValueHead> value_heads;
    size_t key_bytes = 0, value_bytes = 0;
    int most_n16 = 0, least_bits = 8, most_key_bytes = 0, most_value_bytes = 0;
    bool any_grouped = false;
    for (const KeyFormat & f : c.keys) {
        CHECK(f.error() == nullptr, "%s: %s", c.name.c_str(), f.error());
        key_heads.push_back({f, uint32_t(key_bytes)});
        key_bytes += f.record_bytes();
        most_n16 = std::max(most_n16, f.n16);
        most_key_bytes = std::max(most_key_bytes, int(f.record_bytes()));
        if (f.n8 + f.n16 < f.head_size) least_bits = 4;
    }
    for (const ValueFormat & f : c.values) {
        CHECK(f.error() == nullptr, "%s: %s", c.name.c_str(), f.error());
        value_heads.push_back({f, uint32_t(value_bytes)});
        value_bytes += f.record_bytes();
        any_grouped |= !f.rotated();
        most_value_bytes = std::max(most_value_bytes, int(f.record_bytes()));
        if (f.bits < 8) least_bits = 4;
    }

    // Pages. k, v: the numbers attention should see; k0, v0: before quantisation. [stream][head][cell][dimension]
    const size_t cells = size_t(c.n_streams) * n_heads_kv * n_cells;
    std::vector<float> k(cells * d), v(cells * dv), k0, v0;
    std::vector<char> has(size_t(c.n_streams) * n_pages);
    const size_t page_stride = n_pages + 1;
    std::vector<cuda::PageRef> key_refs(c.n_streams * page_stride, cuda::PageRef{nullptr, nullptr}), value_refs = key_refs;
    std::vector<float> identity(size_t(d) * d), one_hot(size_t(kPageCells) * kPageCells), importance(d, 1.0f);
    for (int i = 0; i < d; ++i) identity[size_t(i) * d + i] = 1;
    for (int i = 0; i < kPageCells; ++i) one_hot[size_t(i) * kPageCells + i] = 1;
    std::vector<float> scratch_memory(scratch_floats(256) + 16), scores(size_t(d) * kPageCells), sums(size_t(kPageCells) * dv);
    float * scratch = reinterpret_cast<float *>((reinterpret_cast<uintptr_t>(scratch_memory.data()) + 63) / 64 * 64);
    std::vector<float> offset(n_heads_kv * d), spread(n_heads_kv * d), mean(n_heads_kv * dv);
    for (int i = 0; i < n_heads_kv * d; ++i) {
        offset[i] = c.outliers && below(16) == 0 ? 30 * gauss() : gauss();
        spread[i] = std::exp(0.7f * gauss()) * (c.outliers && below(16) == 0 ? 4.0f : 1.0f);
    }
    for (float & x : mean) x = 0.5f * gauss();
    auto at = [&](int s, int h, int cell) { return (size_t(s) * n_heads_kv + h) * n_cells + cell; };
    double value_size = 0;
    std::vector<half> rows_k(size_t(kPageCells) * row_k), rows_v(size_t(kPageCells) * row_v);
    for (int s = 0; s < c.n_streams; ++s) {
        for (int p = 0; p < n_pages; ++p) {
            int kind = c.pages == Pages::packed ? 2 : c.pages == Pages::all_half ? 1 : (p == n_pages - 1 || p == 0) ? 1 : (p + s) % 5 == 3 ? 0 : 2;
            if (c.pages == Pages::mixed && n_pages == 1) kind = 2;
            has[s * n_pages + p] = kind != 0;
            std::fill(rows_k.begin(), rows_k.end(), half(0x7e00));
            std::fill(rows_v.begin(), rows_v.end(), half(0x7e00));
            for (int t = 0; t < kPageCells; ++t) {
                for (int h = 0; h < n_heads_kv; ++h) {
                    for (int i = 0; i < d; ++i) rows_k[size_t(t) * row_k + h * d + i] = to_half(offset[h * d + i] + spread[h * d + i] * gauss());
                    const float size = std::exp(0.3f * gauss());
                    for (int i = 0; i < dv; ++i) rows_v[size_t(t) * row_v + h * dv + i] = to_half(mean[h * dv + i] + size * gauss());
                }
            }
            if (k0.empty()) k0.resize(k.size()), v0.resize(v.size());
            for (int h = 0; h < n_heads_kv; ++h) {
                for (int t = 0; t < kPageCells; ++t) {
                    for (int i = 0; i < d; ++i) k0[at(s, h, p * kPageCells + t) * d + i] = from_half(rows_k[size_t(t) * row_k + h * d + i]);
                    for (int i = 0; i < dv; ++i) {
                        const float x = from_half(rows_v[size_t(t) * row_v + h * dv + i]);
                        v0[at(s, h, p * kPageCells + t) * dv + i] = x;
                        value_size += double(x) * x / (double(v.size()));
                    }
                }
            }
            if (kind == 0) continue;
            const bool half_k = kind == 1 || (c.pages == Pages::crossed && p % 4 == 1), half_v = kind == 1 || (c.pages == Pages::crossed && p % 4 == 2);
            std::vector<uint8_t> records_k(key_bytes + 64), records_v(value_bytes + 64);
            uint8_t * rk = reinterpret_cast<uint8_t *>((reinterpret_cast<uintptr_t>(records_k.data()) + 63) / 64 * 64);
            uint8_t * rv = reinterpret_cast<uint8_t *>((reinterpret_cast<uintptr_t>(records_v.data()) + 63) / 64 * 64);
            for (int h = 0; h < n_heads_kv; ++h) {
                uint8_t * record = rk + key_heads[h].record_offset;
                host.pack_keys(c.keys[h], rows_k.data() + h * d, row_k, CellMask::all(), importance.data(), record);
                host.scores_packed(c.keys[h], record, nullptr, identity.data(), d, scores.data(), scratch);
                record = rv + value_heads[h].record_offset;
                host.pack_values(c.values[h], rows_v.data() + h * dv, row_v, CellMask::all(), record);
                std::fill(sums.begin(), sums.end(), 0.0f);
                host.values_packed(c.values[h], record, nullptr, one_hot.data(), kPageCells, sums.data(), scratch);
                for (int t = 0; t < kPageCells; ++t) {
                    for (int i = 0; i < d; ++i) k[at(s, h, p * kPageCells + t) * d + i] = scores[size_t(i) * kPageCells + t];
                    if (c.values[h].rotated()) host.rotate(&sums[size_t(t) * dv], dv, c.values[h].rotation_block());
                    std::copy_n(&sums[size_t(t) * dv], dv, &v[at(s, h, p * kPageCells + t) * dv]);
                }
                if (half_k) std::copy_n(&k0[at(s, h, p * kPageCells) * d], size_t(kPageCells) * d, &k[at(s, h, p * kPageCells) * d]);
                if (half_v) std::copy_n(&v0[at(s, h, p * kPageCells) * dv], size_t(kPageCells) * dv, &v[at(s, h, p * kPageCells) * dv]);
            }
            if (half_k) key_refs[s * page_stride + p].rows = arena.up(rows_k);
            else key_refs[s * page_stride + p].records = arena.up(std::vector<uint8_t>(rk, rk + key_bytes));
            if (half_v) value_refs[s * page_stride + p].rows = arena.up(rows_v);
            else value_refs[s * page_stride + p].records = arena.up(std::vector<uint8_t>(rv, rv + value_bytes));
        }
    }
    value_size = std::sqrt(value_size);

    // Queries, masks, sinks.
    cuda::Attention call = {};
    call.n_tokens = c.n_tokens, call.n_heads = n_heads, call.n_kv_heads = n_heads_kv, call.n_streams = c.n_streams, call.n_kv = c.n_kv;
    call.head_size_k = d, call.head_size_v = dv;
    call.scale = 1.0f / std::sqrt(float(d)), call.max_bias = c.max_bias, call.softcap = c.softcap;
    call.q_head = d + 4, call.q_token = call.q_head * n_heads, call.q_stream = call.q_token * c.n_tokens + 8;
    call.out_head = dv, call.out_token = call.out_head * n_heads + (c.n_tokens % 5 == 3 ? 3 : 4), call.out_stream = call.out_token * c.n_tokens;
    std::vector<float> q(call.q_stream * c.n_streams);
    for (float & x : q) x = c.query_size * gauss() * (c.outliers && below(20) == 0 ? 5.0f : 1.0f);
    const int mask_cells = c.n_kv + (c.n_tokens % 2 ? 0 : 5);  // rows that are not aligned
    const int mask_heads = c.mask == Mask::per_head ? n_heads : 1;
    call.mask_token = mask_cells, call.mask_head = c.mask == Mask::per_head ? call.mask_token * c.n_tokens : 0;
    call.mask_stream = call.mask_token * c.n_tokens * mask_heads;
    std::vector<half> mask(call.mask_stream * c.n_streams);
    for (int s = 0; s < c.n_streams; ++s) {
        for (int h = 0; h < mask_heads; ++h) {
            for (int t = 0; t < c.n_tokens; ++t) {
                half * row = &mask[s * call.mask_stream + h * size_t(call.mask_head) + t * call.mask_token];
                const bool blind = c.mask == Mask::nothing || (c.mask == Mask::random && t == c.n_tokens - 1 && c.n_tokens > 1);
                for (int i = 0; i < c.n_kv; ++i) {
                    bool hidden = blind;
                    if (c.mask == Mask::causal) hidden = i > c.n_kv - c.n_tokens + t;
                    if (c.mask == Mask::window) hidden = i > c.n_kv - c.n_tokens + t || i <= c.n_kv - c.n_tokens + t - 200;
                    if (c.mask == Mask::gap) hidden = i > c.n_kv - c.n_tokens + t || (i >= 200 && i < c.n_kv / 3 * 2);
                    if (c.mask == Mask::random || c.mask == Mask::per_head) hidden |= (i / kPageCells) % 3 == 2 ? below(100) < 99 : below(3) == 0;
                    row[i] = hidden ? to_half(-kInf) : 0;
                    if (hidden) row[i] = 0xfc00;
                    else if (c.max_bias > 0 || c.mask == Mask::per_head) row[i] = to_half(-0.01f * float(below(300)));
                }
            }
        }
    }
    std::vector<float> sinks(n_heads);
    for (float & x : sinks) x = 3 * gauss();

    call.q = arena.up(q);
    call.mask = c.mask == Mask::none ? nullptr : arena.up(mask);
    call.sinks = c.sinks ? arena.up(sinks) : nullptr;
    call.key_pages = arena.up(key_refs), call.value_pages = arena.up(value_refs), call.page_stride = page_stride;
    call.key_heads = arena.up(key_heads), call.value_heads = arena.up(value_heads);
    call.row_k = row_k, call.row_v = row_v;
    call.most_n16 = most_n16, call.any_grouped = any_grouped, call.most_key_bytes = most_key_bytes, call.most_value_bytes = most_value_bytes;
    call.unpacked_bytes = c.unpacked_bytes;
    std::vector<float> out(call.out_stream * c.n_streams, 0.0f), again = out;
    call.out = static_cast<float *>(arena.get(out.size() * 4));
    const size_t workspace = cuda::attention_workspace(call);
    const bool is_aligned = (call.q_token | call.q_head | call.q_stream | call.out_token | call.out_head | call.out_stream) % 4 == 0;
    if (call.n_tokens * c.group <= 64 && is_aligned && !any_grouped && most_n16 == 0) {
        const bool for_prefill = call.n_tokens * c.group > 32 && cuda::prefill_workspace(call) > 0;  // where blocks get less than 160 KiB
        CHECK(cuda::decode_workspace(call) > 0 || for_prefill, "%s: decode.cu finds too little shared memory", c.name.c_str());
    }
    call.workspace = static_cast<float *>(arena.get(workspace * 4));
    std::vector<uint32_t> arrivals(cuda::attention_arrivals(call));
    call.arrivals = arena.up(arrivals);
    uint32_t guard = 0;
    for (std::vector<float> * to : {&out, &again}) {
        cuda::attention(nullptr, call);
        const cudaError_t error = cudaDeviceSynchronize();
        CHECK(error == cudaSuccess && cudaGetLastError() == cudaSuccess, "%s: %s", c.name.c_str(), cudaGetErrorString(error));
        if (error != cudaSuccess) std::exit(1);
        cudaMemcpy(to->data(), call.out, out.size() * 4, cudaMemcpyDeviceToHost);
    }
    cudaMemcpy(&guard, call.workspace + workspace, 4, cudaMemcpyDeviceToHost);
    CHECK(guard == 0xffffffffu, "%s: wrote past the workspace", c.name.c_str());
    cudaMemcpy(arrivals.data(), call.arrivals, arrivals.size() * 4, cudaMemcpyDeviceToHost);
    for (uint32_t n : arrivals) CHECK(n == 0, "%s: %u left in a counter", c.name.c_str(), n);

    check_new_rows(c, arena, call, key_refs, value_refs, k0, v0, out);

    // The reference: k and v, and, for the size of the quantisation's own noise, k0 and v0.
    double error = 0, noise = 0;
    size_t n_out = 0;
    auto slope_of = [&](int head) {
        if (c.max_bias <= 0) return 1.0;
        int power = 1;
        while (2 * power <= n_heads) power *= 2;
        return head < power ? std::pow(std::exp2(-c.max_bias / power), head + 1.0) : std::pow(std::exp2(-c.max_bias / 2.0 / power), 2.0 * (head - power) + 1);
    };
    for (int s = 0; s < c.n_streams; ++s) {
        for (int head = 0; head < n_heads; ++head) {
            for (int t = 0; t < c.n_tokens; ++t) {
                const float * query = &q[s * call.q_stream + head * call.q_head + t * call.q_token];
                const half * m = &mask[s * call.mask_stream + head * size_t(call.mask_head) + t * call.mask_token];
                std::vector<double> result[2];
                bool blind = true;
                for (int exact = 0; exact < 2; ++exact) {
                    const std::vector<float> & kk = exact ? k0 : k, & vv = exact ? v0 : v;
                    std::vector<double> z(c.n_kv, -INFINITY);
                    double top = -INFINITY, sum = 0;
                    for (int i = 0; i < c.n_kv; ++i) {
                        const float bias = c.mask == Mask::none ? 0.0f : m[i] == 0xfc00 ? -kInf : from_half(m[i]);
                        if (!has[s * n_pages + i / kPageCells] || bias == -kInf) continue;
                        const float * key = &kk[at(s, head / c.group, i) * d];
                        double dot = 0;
                        for (int j = 0; j < d; ++j) dot += double(query[j]) * double(key[j]);
                        dot *= call.scale;
                        if (c.softcap > 0) dot = c.softcap * std::tanh(dot / c.softcap);
                        z[i] = dot + slope_of(head) * bias;
                        top = std::max(top, z[i]);
                        blind = false;
                    }
                    result[exact].assign(dv, 0.0);
                    if (c.sinks && sinks[head] > top) top = sinks[head];
                    for (int i = 0; i < c.n_kv; ++i) {
                        if (z[i] == -INFINITY) continue;
                        const double w = std::exp(z[i] - top);
                        sum += w;
                        const float * value = &vv[at(s, head / c.group, i) * dv];
                        for (int j = 0; j < dv; ++j) result[exact][j] += w * double(value[j]);
                    }
                    if (c.sinks) sum += std::exp(sinks[head] - top);
                    for (double & x : result[exact]) x = sum > 0 ? x / sum : 0;
                }
                const float * got = &out[s * call.out_stream + head * call.out_head + t * call.out_token];
                for (int j = 0; j < dv; ++j, ++n_out) {
                    CHECK(!blind || got[j] == 0, "%s: head %d, token %d sees nothing: %g", c.name.c_str(), head, t, got[j]);
                    CHECK(std::isfinite(got[j]), "%s: stream %d, head %d, token %d, dimension %d: %g", c.name.c_str(), s, head, t, j, got[j]);
                    CHECK(got[j] == again[&got[j] - out.data()], "%s: another result the second time", c.name.c_str());
                    error += std::pow(double(got[j]) - result[0][j], 2);
                    noise += std::pow(result[1][j] - result[0][j], 2);
                }
            }
        }
    }
    Result r;
    r.error = std::sqrt(error / double(n_out)) / value_size;
    r.noise = std::sqrt(noise / double(n_out)) / value_size;
    const double share = r.error / (r.noise + 4e-4 / (least_bits == 8 ? 0.5 : 0.2));
    CHECK(r.error <= 2e-3 * std::max(1.0f, c.query_size), "%s: error %.2e of the values' size (noise %.2e)", c.name.c_str(), r.error, r.noise);
    CHECK(share <= (least_bits == 8 ? 0.5 : 0.2), "%s: error %.2e beside the quantisation's %.2e", c.name.c_str(), r.error, r.noise);
    worst_error = std::max(worst_error, r.error);
    worst_share = std::max(worst_share, share);
    if (std::getenv("MIXKVQ_TEST_VERBOSE")) std::printf("%-70s error %.2e noise %.2e\n", c.name.c_str(), r.error, r.noise);
    ++n_cases;
    return r;
}

std::vector<Case> all_cases() {
    std::vector<Case> list;
    auto add = [&](Case c, const std::string & what) {
        const KeyFormat & k = c.keys[0];
        const ValueFormat & v = c.values[0];
        char s[300];
        std::snprintf(s, sizeof s, "%s: D=%d %d,%d,%d,%d,%d/%d Dv=%d %d/%d group %d tokens %d streams %d n_kv %d", what.c_str(), k.head_size, k.n16, k.n8, k.n4,
                      k.n3, k.n2, k.group, v.head_size, v.bits, v.group, c.group, c.n_tokens, c.n_streams, c.n_kv);
        c.name = s;
        list.push_back(c);
    };
    auto base = [&](int d, int dv) {
        Case c;
        c.keys.assign(2, key_format(d, 0, 0, quads(d, 1, 4), quads(d, 1, 2), 128));
        c.values.assign(2, value_format(dv, 3, 0));
        c.n_kv = 700;
        return c;
    };
    // Every head size, decoding and prefill.
    for (int d = 32; d <= 256; d += 8) {
        for (int n : {1, 40}) {
            Case c = base(d, d);
            c.group = n == 1 ? 4 : 2;
            c.n_tokens = n;
            add(c, "head size");
        }
    }
    for (auto [d, dv] : std::vector<std::pair<int, int>>{{192, 128}, {64, 128}, {256, 40}, {72, 200}}) {
        for (int n : {2, 70}) {
            Case c = base(d, dv);
            c.group = 3;
            c.n_tokens = n;
            add(c, "K and V of different sizes");
        }
    }
    // Key formats, value formats.
    for (int n : {1, 33}) {
        for (int d : {64, 128}) {
            for (int group : {32, 64, 128}) {
                for (int kind = 0; kind < 9; ++kind) {
                    Case c = base(d, d);
                    KeyFormat f[] = {key_format(d, 0, 4, quads(d, 1, 4), 0, group), key_format(d, 4, 4, 8, 4, group),  key_format(d, 8, 4, 0, d - 20, group),
                                     key_format(d, d, 0, 0, 0, group),             key_format(d, 0, d, 0, 0, group),  key_format(d, 0, 0, d, 0, group),
                                     key_format(d, 0, 0, 0, d, group),             key_format(d, 0, 0, 0, 0, group),  key_format(d, 0, 12, 20, 4, group)};
                    c.keys.assign(2, f[kind]);
                    c.keys[1] = f[(kind + 7) % 9].n16 && !f[kind].n16 ? f[kind] : f[(kind + 7) % 9];
                    c.n_tokens = n;
                    c.group = 4;
                    c.outliers = kind % 2;
                    add(c, "key format");
                }
            }
            for (int bits : {2, 3, 4, 8}) {
                for (int group : {0, 32, 64}) {
                    Case c = base(d, d);
                    c.values = {value_format(d, bits, group), value_format(d, bits == 8 ? 2 : bits, group)};
                    c.n_tokens = n;
                    c.group = 4;
                    add(c, "value format");
                }
            }
        }
    }
    {
        Case c = base(128, 128);  // the paper's layout, and every head its own
        c.keys = {key_format(128, 4, 0, 12, 0, 32), key_format(128, 0, 8, 120, 0, 128), key_format(128, 0, 0, 0, 0, 64)};
        c.values = {value_format(128, 2, 32), value_format(128, 4, 0), value_format(128, 8, 64)};
        for (int n : {1, 5, 130}) {
            c.n_tokens = n;
            c.group = 4;
            add(c, "formats by head");
        }
        c.keys = {key_format(128, 0, 8, 120, 0, 128), key_format(128, 0, 0, 32, 64, 128), key_format(128, 0, 128, 0, 0, 64)};
        c.values = {value_format(128, 2, 0), value_format(128, 4, 0), value_format(128, 8, 0)};
        for (int n : {1, 5, 130}) {
            c.n_tokens = n;
            add(c, "formats by head, fast");
        }
    }
    // Group ratios and token counts.
    for (int group : {1, 2, 3, 4, 5, 7, 8, 16}) {
        for (int n : {1, 2, 3, 5, 17, 64, 130}) {
            Case c = base(n % 2 ? 128 : 64, 64);
            c.group = group;
            c.n_tokens = n;
            c.n_streams = 1 + (n + group) % 2;
            c.mask = n == 3 ? Mask::random : Mask::causal;
            add(c, "rows");
        }
    }
    // Masks, pages, soft caps, biases, sinks, outliers.
    for (Mask mask : {Mask::none, Mask::causal, Mask::random, Mask::per_head, Mask::nothing}) {
        for (Pages pages : {Pages::packed, Pages::mixed, Pages::all_half}) {
            for (int n : {1, 4, 70}) {
                for (int what = 0; what < 5; ++what) {
                    Case c = base(128, 128);
                    c.group = 4;
                    c.n_tokens = n;
                    c.mask = mask;
                    c.pages = pages;
                    c.n_kv = what % 2 ? 640 : 577;
                    c.softcap = what == 1 ? 20.0f : 0.0f;
                    c.max_bias = what == 2 ? 8.0f : 0.0f;
                    c.sinks = what == 3 || what == 2;
                    c.outliers = what == 4;
                    c.n_streams = what == 3 ? 2 : 1;
                    add(c, "mask " + std::to_string(int(mask)) + " pages " + std::to_string(int(pages)) + " option " + std::to_string(what));
                }
            }
        }
    }
    for (int d : {64, 128, 200}) {
        for (int n : {1, 2, 4, 8, 30}) {
            Case c = base(d, d == 200 ? 72 : d);
            c.group = 4;
            c.n_tokens = n;
            c.pages = Pages::crossed;
            c.n_kv = 1100;
            add(c, "crossed");
        }
    }
    for (int n_kv : {1, 3, 64, 65, 127, 128, 129, 256}) {
        for (int n : {1, 48}) {
            Case c = base(128, 128);
            c.n_kv = n_kv;
            c.n_tokens = std::min(n, n_kv);
            if (n > n_kv) c.mask = Mask::none, c.n_tokens = n;
            c.group = 2;
            add(c, "short");
        }
    }
    for (float size : {1e-30f, 1e-6f, 30.0f}) {
        for (int n : {1, 40}) {
            Case c = base(128, 128);
            c.n_tokens = n;
            c.query_size = size;
            c.mask = Mask::random;
            add(c, "query size");
        }
    }
    // Many queries: pages are unpacked first, a chunk at a time.
    for (int d = 32; d <= 256; d += 24) {
        for (int pages : {1, 2, 100}) {
            Case c = base(d, d);
            c.group = 4;
            c.n_tokens = 40;
            c.n_kv = 1100;
            c.unpacked_bytes = size_t(pages) * 2 * kPageCells * (d + d) * sizeof(half);
            add(c, "many: head size, chunks of " + std::to_string(pages));
        }
    }
    for (auto [d, dv] : std::vector<std::pair<int, int>>{{192, 128}, {64, 128}, {256, 40}, {72, 200}, {128, 64}}) {
        Case c = base(d, dv);
        c.group = 3;
        c.n_tokens = 70;
        c.unpacked_bytes = 2 * 2 * kPageCells * (d + dv) * sizeof(half);
        add(c, "many: K and V of different sizes");
    }
    for (int n : {31, 32, 33, 63, 64, 65, 96, 129, 250, 520}) {
        for (int what = 0; what < 3; ++what) {
            Case c = base(what == 2 ? 64 : 128, what == 2 ? 64 : 128);
            c.group = 4;
            c.n_tokens = n;
            c.n_kv = std::max(n, what == 0 ? n + 3 : 1200 + n % 7);
            c.sinks = what == 1;
            c.unpacked_bytes = what == 1 ? 3 * 2 * kPageCells * 256 * sizeof(half) : 0;
            add(c, "many: tokens");
        }
    }
    for (int group : {1, 2, 3, 5, 8, 16}) {
        for (int streams : {1, 3}) {
            Case c = base(64, 64);
            c.group = group;
            c.n_tokens = 300 / group + 1;
            c.n_kv = 900;
            c.n_streams = streams;
            c.mask = group == 3 ? Mask::per_head : Mask::causal;
            c.unpacked_bytes = 3 * size_t(streams) * 2 * kPageCells * 128 * sizeof(half);
            add(c, "many: groups and streams");
        }
    }
    for (Mask mask : {Mask::none, Mask::causal, Mask::random, Mask::per_head, Mask::nothing, Mask::window, Mask::gap}) {
        for (Pages pages : {Pages::packed, Pages::mixed, Pages::all_half}) {
            for (int what = 0; what < 4; ++what) {
                Case c = base(128, 128);
                c.group = 4;
                c.n_tokens = 90;
                c.mask = mask;
                c.pages = pages;
                c.n_kv = what % 2 ? 1280 : 1157;
                c.softcap = what == 1 ? 20.0f : 0.0f;
                c.max_bias = what == 2 ? 8.0f : 0.0f;
                c.sinks = what == 3 || what == 2;
                c.outliers = what == 0;
                c.unpacked_bytes = what < 3 ? 2 * 2 * kPageCells * 256 * sizeof(half) : 0;
                add(c, "many: mask " + std::to_string(int(mask)) + " pages " + std::to_string(int(pages)) + " option " + std::to_string(what));
            }
        }
    }
    {
        Case c = base(128, 128);
        c.n_tokens = 50;
        c.group = 4;
        c.n_kv = 600;
        c.keys = {key_format(128, 4, 0, 12, 0, 32), key_format(128, 0, 8, 120, 0, 128), key_format(128, 0, 0, 0, 0, 64), key_format(128, 128, 0, 0, 0, 128)};
        c.values = {value_format(128, 2, 32), value_format(128, 4, 0), value_format(128, 8, 64), value_format(128, 3, 0)};
        c.unpacked_bytes = 2 * 4 * kPageCells * 256 * sizeof(half);
        add(c, "many: formats by head");
    }
    // Long: splits.
    for (int n : {1, 3, 16, 48}) {
        for (int n_kv : {5000, 20011}) {
            Case c = base(128, 128);
            c.n_tokens = n;
            c.group = 4;
            c.n_kv = n_kv;
            c.sinks = n == 3;
            add(c, "long");
        }
    }
    for (int group : {1, 2, 4, 8}) {  // one KV head: so many splits that warps share their join
        const int d = group == 2 ? 256 : 128;
        Case c = base(d, d);
        c.keys.resize(1), c.values.resize(1);
        c.group = group;
        c.n_kv = 20011;
        c.sinks = group == 4;
        add(c, "many splits");
    }
#ifndef MIXKVQ_EMULATED
    // Several pages for every pair of warps, on a large GPU too; emulated they would take minutes.
    for (int d : {128, 64}) {
        for (Pages pages : {Pages::packed, Pages::mixed}) {
            Case c = base(d, d);
            c.group = 4;
            c.n_kv = 20011;
            c.n_streams = 8;
            c.pages = pages;
            add(c, "long streams");
        }
    }
#endif
    return list;
}

// The places of codes that lanes read, on the host: against the format's own.
void test_layout() {
    uint8_t quad[512], record[128 * 64 + 64];
    for (uint8_t & x : quad) x = uint8_t(below(256));
    for (uint8_t & x : record) x = uint8_t(below(256));
    const int dv = 64;
    auto word = [](const uint8_t * p, int at) {
        uint32_t x;
        std::memcpy(&x, p + 4 * at, 4);
        return x;
    };
    auto key_code = [&](int bits, int t, int r) {
        const int lane = 4 * (t % 8) + r;
        if (bits == 8) return int(quad[4 * t + r]);
        if (bits == 4) return (quad[32 * (t / 16) + lane] >> 4 * (t / 8 % 2)) & 15;
        const int low = (quad[32 * (t / 32) + lane] >> 2 * (t / 8 % 4)) & 3;
        return bits == 2 ? low : low | ((quad[128 + 32 * (t / 64) + lane] >> (t / 8 % 8)) & 1) << 2;
    };
    auto value_code = [&](int bits, int t, int d) {
        const int row = 4 * dv, lane = 4 * d + t % 4;
        if (bits == 8) return int(record[t / 4 * row + lane]);
        if (bits == 4) return (record[t / 8 * row + lane] >> 4 * (t / 4 % 2)) & 15;
        const int low = (record[t / 16 * row + lane] >> 2 * (t / 4 % 4)) & 3;
        return bits == 2 ? low : low | ((record[32 * dv + t / 32 * row + lane] >> (t / 4 % 8)) & 1) << 2;
    };
    auto check = [&](auto codes, int s, int c0, int c1, int c2, int c3, int bits, const char * what) {
        uint32_t even, odd;
        codes.plain(s, even, odd);
        CHECK(even == uint32_t(c0 | c2 << 16) && odd == uint32_t(c1 | c3 << 16), "%s: %d bits, place %d", what, bits, s);
        CHECK(codes.bytes(s) == uint32_t(c0 | c1 << 8 | c2 << 16 | c3 << 24) * (s % 2 ? codes.kTimes : 1), "%s, bytes: %d bits, place %d", what, bits, s);
    };
    auto test = [&](auto tag, int bits) {
        using C = decltype(tag);
        for (int n8 = 0; n8 < 8; ++n8) {
            for (int i = 0; i < 4; ++i) {
                C codes;
                for (int w = 0; w < C::kWords; ++w) codes.word[w] = word(quad, 4 * cuda::key_chunk(bits, n8, w) + i);
                if (bits == 3) codes.word[1] >>= cuda::key_top_shift(n8);
                for (int s = 0; s < 4; ++s) {
                    const int t = cuda::key_token(n8, i, s);
                    check(codes, s, key_code(bits, t, 0), key_code(bits, t, 1), key_code(bits, t, 2), key_code(bits, t, 3), bits, "keys");
                }
            }
            for (int j = 0; j < 4; ++j) {
                for (int c = 0; c < 2; ++c) {
                    for (int i = 0; i < 4; ++i) {
                        const int d = cuda::value_dim(n8, 1, i);
                        C codes;
                        for (int w = 0; w < C::kWords; ++w) {
                            const bool top = bits == 3 && w == 1;
                            codes.word[w] = word(record, cuda::value_row(bits, j, c, w) * dv + d + (top ? 8 * dv : 0)) >> (top ? 4 * c : 0);
                        }
                        for (int s = 0; s < 4; ++s) {
                            auto code = [&](int byte) { return value_code(bits, cuda::value_token(j, c, s, byte), d); };
                            check(codes, s, code(0), code(1), code(2), code(3), bits, "values");
                        }
                    }
                }
            }
        }
    };
    test(cuda::Codes<2>(), 2);
    test(cuda::Codes<3>(), 3);
    test(cuda::Codes<4>(), 4);
    test(cuda::Codes<8>(), 8);
    // A weight goes to the column of its query and the row of its token.
    std::vector<int> written(4 * 64, -1);  // [run][word]: the first of four tokens, query, low
    for (int lane = 0; lane < 32; ++lane) {
        for (int k = 0; k < 8; ++k) {
            const int n8 = lane / 4, j = lane % 4, low = k % 2, s = k / 2;
            written[4 * cuda::weight_run_written(n8, j, low) + s] = (cuda::key_token(n8, 0, s) * 4 + j) * 2 + low;
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        for (int k = 0; k < 8; ++k) {
            const int n8 = lane / 4, j = lane % 4, odd = k % 2, s = k / 2, token = cuda::value_token(j, s >> 1, 2 * (s & 1) + odd, 0);
            CHECK(written[4 * cuda::weight_run_read(n8, j, odd) + s] == token * 8 + n8, "weight: lane %d, run %d, word %d", lane, odd, s);
        }
    }
    bool seen[kPageCells] = {};
    for (int lane = 0; lane < 8; ++lane) {
        for (int i = 0; i < 16; ++i) seen[cuda::key_token(lane, i % 4, i / 4)] = true;
    }
    for (int t = 0; t < kPageCells; ++t) CHECK(seen[t], "key_token never gives %d", t);
    for (int t = 0; t < cuda::kTileCells; ++t) CHECK(cuda::tile_token(cuda::tile_column(t)) == t, "tile_column(%d)", t);
}

}  // namespace

int main(int argc, char ** argv) {
    test_layout();
    if (check::failures) return check_result();
    int n_devices = 0;
    const char * why = cuda::unavailable();
    if (why || cudaGetDeviceCount(&n_devices) != cudaSuccess || n_devices == 0) {
        std::printf("skipped: %s\n", why ? why : "no GPU");
        return 77;
    }
    const int every = argc > 1 ? std::max(1, std::atoi(argv[1])) : 1, first = argc > 2 ? std::atoi(argv[2]) : 0;
    const std::vector<Case> cases = all_cases();
    for (size_t i = first; i < cases.size(); i += every) {
        rng.seed(unsigned(7 + i));  // the same numbers whatever runs before
        run_case(cases[i]);
    }
    std::printf("%d of %zu cases; worst error %.2e of the values' size, worst share of the quantisation's noise %.3f\n", n_cases, cases.size(), worst_error,
                worst_share);
    return check_result();
}
