#include "mixkvq/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>

#include "mixkvq/attend.h"
#include "parallel.h"

namespace mixkvq {

namespace {

constexpr int kBlockRows = 64;     // query vectors that share one pass over the pages
constexpr int kMinSplitPages = 4;  // flash decoding gives no thread less than this
constexpr float kHidden = -std::numeric_limits<float>::infinity();
constexpr half kHalfHidden = 0xfc00;

size_t padded(size_t n) { return (n + 15) / 16 * 16; }

// ALiBi: the factor of the mask for a head, 1 without a bias.
float alibi_slope(const AttentionCall & c, int head) {
    if (c.max_bias <= 0) return 1.0f;
    int power = 1;
    while (2 * power <= c.n_heads) power *= 2;
    if (head < power) return std::pow(std::exp2(-c.max_bias / power), float(head + 1));
    return std::pow(std::exp2(-c.max_bias / 2 / power), float(2 * (head - power) + 1));
}

// What the masks of a block of tokens let through of a page: nothing behind its first n_cells; `open`: those without a bias, for every token.
struct Sight {
    int n_cells = 0;
    bool open = true;
};

Sight sight_of(const half * mask, size_t stride, int n_tokens, int n_cells) {
    Sight sight;
    for (int i = 0; i < n_tokens; ++i) {
        const half * row = mask + i * stride;
        int n = n_cells;
        while (n > sight.n_cells && row[n - 1] == kHalfHidden) --n;
        sight.n_cells = std::max(sight.n_cells, n);
    }
    for (int i = 0; i < n_tokens && sight.open; ++i) {
        const half * row = mask + i * stride;
        half bits = 0;
        for (int t = 0; t < sight.n_cells; ++t) bits |= row[t];
        sight.open = bits == 0;
    }
    return sight;
}

// The record of the head in the page after p, if it is packed.
const uint8_t * next_record(const PageStore & store, int stream, int p, int last, int head) {
    if (p + 1 >= last) return nullptr;
    const PageStore::Page & next = store.page(stream, p + 1);
    return next.records ? store.record(next, head) : nullptr;
}

// How the call is cut: items of (stream, KV head, block of tokens, split of the pages).
struct Plan {
    int n_kv_heads, group, block_tokens, n_blocks, n_splits, n_pages, rows;
    int items(const AttentionCall & c) const { return c.n_streams * n_kv_heads * n_blocks * n_splits; }
};

Plan make_plan(const AttentionCall & c, int n_kv_heads, int n_threads) {
    Plan plan;
    plan.n_kv_heads = n_kv_heads;
    plan.group = c.n_heads / n_kv_heads;
    plan.block_tokens = std::min(c.n_tokens, std::max(1, kBlockRows / plan.group));
    plan.n_blocks = (c.n_tokens + plan.block_tokens - 1) / plan.block_tokens;
    plan.n_pages = (c.n_kv + kPageCells - 1) / kPageCells;
    const int items = c.n_streams * n_kv_heads * plan.n_blocks;
    const int wanted = (4 * n_threads + items - 1) / items;
    plan.n_splits = n_threads == 1 ? 1 : std::max(1, std::min(wanted, plan.n_pages / kMinSplitPages));
    plan.rows = plan.block_tokens * plan.group;
    return plan;
}

}  // namespace

AttentionWorkspace::~AttentionWorkspace() { ::operator delete(data_, std::align_val_t(64)); }

float * AttentionWorkspace::get(size_t floats) {
    if (floats > capacity_) {
        ::operator delete(data_, std::align_val_t(64));
        data_ = nullptr;
        capacity_ = 0;
        data_ = static_cast<float *>(::operator new(floats * sizeof(float), std::align_val_t(64)));
        capacity_ = floats;
    }
    return data_;
}

void attention(const Kernels & kernels, PageStore & keys, PageStore & values, const AttentionCall & c, int n_threads,
               AttentionWorkspace & workspace) {
    const int d = keys.head_size(), dv = values.head_size();
    const Plan plan = make_plan(c, keys.n_heads(), n_threads);
    const int n_items = plan.items(c);
    const size_t rows = plan.rows;
    const size_t row_k = keys.shape().row, row_v = values.shape().row;

    // Results of the items, then each thread's own scratch.
    const size_t result_floats = padded(rows * dv) + 2 * padded(rows);
    const size_t block_floats =
        padded(rows * d) + padded(rows * dv) + rows * kPageCells + padded(rows) + size_t(plan.block_tokens) * kPageCells + padded(plan.group);
    const size_t thread_floats = block_floats + scratch_floats(std::max(d, dv));
    float * base = workspace.get(n_items * result_floats + std::max(1, n_threads) * thread_floats);
    float * threads = base + n_items * result_floats;

    keys.look(c.view(c.mask));
    values.look(c.view(c.mask));
    keys.observe({c.q, c.q_token, c.q_head, c.q_stream, c.n_tokens, c.n_heads, c.n_streams, c.first_stream}, n_threads);

    const bool tiny = int64_t(c.n_tokens) * c.n_heads * c.n_kv <= 4096;
    parallel_for(tiny ? 1 : n_threads, n_items, [&](int item, int thread) {
        const int split = item % plan.n_splits;
        const int block = item / plan.n_splits % plan.n_blocks;
        const int kv = item / plan.n_splits / plan.n_blocks % plan.n_kv_heads;
        const int s = item / plan.n_splits / plan.n_blocks / plan.n_kv_heads;
        const int token0 = block * plan.block_tokens;
        const int n_tokens = std::min(plan.block_tokens, c.n_tokens - token0);
        const int n = n_tokens * plan.group;  // rows, head by head

        float * acc = base + item * result_floats;
        float * max = acc + padded(rows * dv);
        float * sum = max + padded(rows);
        float * q = threads + thread * thread_floats;
        float * rotated = q + padded(rows * d);
        float * scores = rotated + padded(rows * dv);
        float * factor = scores + rows * kPageCells;
        float * mask = factor + padded(rows);
        float * slope = mask + size_t(plan.block_tokens) * kPageCells;
        float * scratch = slope + padded(plan.group);

        for (int g = 0; g < plan.group; ++g) {
            slope[g] = alibi_slope(c, kv * plan.group + g);
            for (int t = 0; t < n_tokens; ++t) {
                std::memcpy(q + size_t(g * n_tokens + t) * d,
                            c.q + s * c.q_stream + (size_t(kv) * plan.group + g) * c.q_head + (token0 + t) * c.q_token, sizeof(float) * d);
            }
        }
        std::fill(acc, acc + size_t(n) * dv, 0.0f);
        std::fill(rotated, rotated + size_t(n) * dv, 0.0f);
        std::fill(max, max + n, kHidden);
        std::fill(sum, sum + n, 0.0f);

        const ValueFormat * format = values.configured() ? &values.value_format(kv) : nullptr;
        bool any_rotated = false;
        const int first = int(int64_t(plan.n_pages) * split / plan.n_splits);
        const int last = int(int64_t(plan.n_pages) * (split + 1) / plan.n_splits);
        for (int p = first; p < last; ++p) {
            const PageStore::Page & kp = keys.page(c.first_stream + s, p);
            const PageStore::Page & vp = values.page(c.first_stream + s, p);
            if (kp.empty() || vp.empty()) continue;
            const int n_cells = std::min(kPageCells, c.n_kv - p * kPageCells);

            // Masks differ by head only where the model says so; one look serves the group otherwise.
            auto look = [&](int head) {
                const half * from = c.mask + s * c.mask_stream + head * c.mask_head + token0 * c.mask_token + size_t(p) * kPageCells;
                const Sight sight = sight_of(from, c.mask_token, n_tokens, n_cells);
                for (int t = 0; t < n_tokens && !sight.open; ++t) {
                    kernels.from_half(from + t * c.mask_token, mask + size_t(t) * kPageCells, sight.n_cells);
                }
                return sight;
            };
            Sight sight = {n_cells, true};
            if (c.mask && c.mask_head == 0) sight = look(0);
            if (sight.n_cells == 0) continue;
            const int n_rows = sight.n_cells;  // F16 rows worth reading

            if (kp.records) {
                kernels.scores_packed(keys.key_format(kv), keys.record(kp, kv), next_record(keys, c.first_stream + s, p, last, kv), q, n, scores, scratch);
            } else {
                kernels.scores_half(d, kp.rows + kv * d, row_k, n_rows, q, n, scores, scratch);
            }
            bool seen = false;
            for (int g = 0; g < plan.group; ++g) {
                const int head = kv * plan.group + g, r = g * n_tokens;
                if (c.mask && c.mask_head != 0) sight = look(head);
                seen |= softmax_page(kernels, {c.scale, c.softcap, slope[g]}, scores + size_t(r) * kPageCells, n_tokens, sight.n_cells,
                                     sight.open ? nullptr : mask, kPageCells, max + r, sum + r, factor + r);
            }
            if (!seen) continue;
            for (int i = 0; i < n; ++i) {
                if (factor[i] == 1.0f) continue;
                kernels.scale(acc + size_t(i) * dv, dv, factor[i]);
                if (any_rotated) kernels.scale(rotated + size_t(i) * dv, dv, factor[i]);
            }
            if (vp.records) {
                any_rotated |= format->rotated();
                kernels.values_packed(*format, values.record(vp, kv), next_record(values, c.first_stream + s, p, last, kv), scores, n,
                                      format->rotated() ? rotated : acc, scratch);
            } else {
                kernels.values_half(dv, vp.rows + kv * dv, row_v, n_rows, scores, n, acc, scratch);
            }
        }
        if (any_rotated) {
            for (int i = 0; i < n; ++i) {
                float * from = rotated + size_t(i) * dv;
                kernels.rotate(from, dv, format->rotation_block());
                for (int j = 0; j < dv; ++j) acc[size_t(i) * dv + j] += from[j];
            }
        }
    });

    // Joins the splits: each is a softmax over its pages with its own maximum.
    const int n_groups = n_items / plan.n_splits;
    parallel_for(n_groups * plan.rows >= 512 ? n_threads : 1, n_groups, [&](int i, int) {
        const int block = i % plan.n_blocks;
        const int kv = i / plan.n_blocks % plan.n_kv_heads;
        const int s = i / plan.n_blocks / plan.n_kv_heads;
        const int token0 = block * plan.block_tokens;
        const int n_tokens = std::min(plan.block_tokens, c.n_tokens - token0);
        float * first = base + size_t(i) * plan.n_splits * result_floats;
        for (int r = 0; r < n_tokens * plan.group; ++r) {
            const int head = kv * plan.group + r / n_tokens, token = token0 + r % n_tokens;
            auto max_of = [&](int split) -> float & { return first[split * result_floats + padded(rows * dv) + r]; };
            auto sum_of = [&](int split) -> float & { return first[split * result_floats + padded(rows * dv) + padded(rows) + r]; };
            float max = kHidden, sum = 0;
            for (int split = 0; split < plan.n_splits; ++split) max = std::max(max, max_of(split));
            float * out = c.out + s * c.out_stream + head * c.out_head + token * c.out_token;
            std::fill(out, out + dv, 0.0f);
            for (int split = 0; split < plan.n_splits; ++split) {
                if (max_of(split) == kHidden) continue;
                const float weight = std::exp(max_of(split) - max);
                const float * acc = first + split * result_floats + size_t(r) * dv;
                sum += weight * sum_of(split);
                for (int j = 0; j < dv; ++j) out[j] += weight * acc[j];
            }
            kernels.scale(out, dv, softmax_close(max, sum, c.sinks ? c.sinks + head : nullptr));
        }
    });
}

}  // namespace mixkvq
