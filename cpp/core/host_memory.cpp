#include <algorithm>
#include <cmath>
#include <cstring>

#include "mixkvq/page_memory.h"
#include "parallel.h"

namespace mixkvq {

// Queries beyond this many fade: I_d follows the last few thousand queries, as the paper's I_d follows the current ones.
constexpr double kQueryMemory = 4096;

void HostMemory::set_layout(const PageLayout & layout) {
    layout_ = &layout;
    q_sum_.assign(layout.is_value() ? 0 : size_t(layout.n_heads) * layout.head_size, 0.0f);
    q_sqr_ = q_sum_;
}

void HostMemory::zero(half * rows, int n_rows) { std::memset(rows, 0, size_t(2) * n_rows * row_); }
void HostMemory::copy(half * to, const half * from) { std::memcpy(to, from, page_bytes()); }
void HostMemory::copy_records(uint8_t * to, const uint8_t * from) { std::memcpy(to, from, layout_->record_bytes); }

void HostMemory::pack(const PageJob * jobs, int n, int n_threads) {
    if (!layout_->is_value()) read_importance();
    const int n_heads = layout_->n_heads, d = layout_->head_size;
    parallel_for(n_threads, n * n_heads, [&](int i, int) {
        const PageJob & job = jobs[i / n_heads];
        const int h = i % n_heads;
        uint8_t * record = job.records + layout_->record_offset[h];
        const half * rows = job.rows + h * d;
        if (layout_->is_value()) {
            k_.pack_values(layout_->values[h], rows, row_, job.valid, record);
        } else {
            k_.pack_keys(layout_->keys[h], rows, row_, job.valid, importance_.data() + h * d, record);
        }
    });
}

void HostMemory::unpack_head(int h, const uint8_t * records, half * rows) const {
    const uint8_t * record = records + layout_->record_offset[h];
    if (layout_->is_value()) {
        k_.unpack_values(layout_->values[h], record, rows + h * layout_->head_size, row_);
    } else {
        k_.unpack_keys(layout_->keys[h], record, rows + h * layout_->head_size, row_);
    }
}

void HostMemory::unpack(const PageJob * jobs, int n, int n_threads) {
    const int n_heads = layout_->n_heads;
    parallel_for(n_threads, n * n_heads, [&](int i, int) { unpack_head(i % n_heads, jobs[i / n_heads].records, jobs[i / n_heads].rows); });
}

void HostMemory::write(half * const * to, int n, const Rows & from) {
    const auto * source = static_cast<const uint8_t *>(from.data);
    for (int i = 0; i < n; ++i, source += from.stride) {
        half * row = to[i];
        if (!row) continue;
        if (!from.is_half) {
            k_.to_half(reinterpret_cast<const float *>(source), row, row_);
            continue;
        }
        const auto * in = reinterpret_cast<const half *>(source);
        for (int d = 0; d < row_; ++d) {
            const half x = in[d];
            const half magnitude = x & 0x7fff;
            row[d] = magnitude < 0x7c00 ? x : magnitude > 0x7c00 ? half(0) : half((x & 0x8000) | 0x7bff);
        }
    }
}

void HostMemory::read(const PageSpan * spans, int n, half * rows) {
    std::vector<half> page;
    for (const PageSpan * s = spans; s < spans + n; rows += size_t(s->n) * row_, ++s) {
        const size_t skip = size_t(s->cell) * row_, bytes = size_t(2) * s->n * row_;
        if (s->rows) {
            std::memcpy(rows, s->rows + skip, bytes);
        } else if (s->records) {
            const bool whole = s->n == kPageCells;
            if (!whole) page.resize(size_t(kPageCells) * row_);
            const PageJob job = {whole ? rows : page.data(), const_cast<uint8_t *>(s->records), {}};
            unpack(&job, 1, 1);
            if (!whole) std::memcpy(rows, page.data() + skip, bytes);
        } else {
            std::memset(rows, 0, bytes);
        }
    }
}

void HostMemory::observe(const Queries & q, int n_threads) {
    const int d = layout_->head_size, group = q.n_heads / layout_->n_heads;
    // Counting a few queries is done before another thread would wake up.
    parallel_for(q.n_tokens >= 16 ? n_threads : 1, layout_->n_heads, [&](int kv, int) {
        float * sum = q_sum_.data() + size_t(kv) * d;
        float * sqr = q_sqr_.data() + size_t(kv) * d;
        for (int s = 0; s < q.n_streams; ++s) {
            for (int g = 0; g < group; ++g) {
                const float * x = q.q + s * q.stream + (size_t(kv) * group + g) * q.head;
                for (int t = 0; t < q.n_tokens; ++t, x += q.token) {
                    for (int i = 0; i < d; ++i) {
                        sum[i] += std::fabs(x[i]);
                        sqr[i] += x[i] * x[i];
                    }
                }
            }
        }
    });
    q_count_ += double(q.n_tokens) * q.n_streams * group;
    while (q_count_ > 2 * kQueryMemory) {
        q_count_ *= 0.5;
        for (float & x : q_sum_) x *= 0.5f;
        for (float & x : q_sqr_) x *= 0.5f;
    }
}

bool HostMemory::query_statistics(float * mean_abs, float * mean_sqr) {
    const bool any = q_count_ > 0;
    for (size_t i = 0; i < q_sum_.size(); ++i) {
        mean_abs[i] = any ? float(q_sum_[i] / q_count_) : 1.0f;
        mean_sqr[i] = any ? float(q_sqr_[i] / q_count_) : 1.0f;
    }
    return any;
}

void HostMemory::read_importance() {
    if (q_count_ > 0) {
        importance_ = q_sum_;
        for (float & x : importance_) x = float(x / q_count_);
    } else if (layout_->query_prior.empty()) {
        importance_.assign(q_sum_.size(), 1.0f);
    } else {
        importance_ = layout_->query_prior;
    }
}

}  // namespace mixkvq
