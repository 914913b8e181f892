#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "mixkvq/page_memory.h"
#include "parallel.h"

namespace mixkvq {

// Queries beyond this many fade: I_d follows the last few thousand queries, as the paper's I_d follows the current ones.
constexpr double kQueryMemory = 4096;

void HostMemory::set_layout(const PageLayout & layout) {
    layout_ = &layout;
    if (layout.is_value()) return;
    importance_.assign(size_t(layout.n_heads) * layout.head_size, 0.0f);
    queries_.assign(layout.n_streams, {importance_, importance_, 0, std::vector<Mark>(layout.n_marks, {importance_, 0})});
}

void HostMemory::zero(half * rows, int n_rows) { std::memset(rows, 0, size_t(2) * n_rows * row_); }
void HostMemory::copy(half * to, const half * from) { std::memcpy(to, from, page_bytes()); }
void HostMemory::copy_records(uint8_t * to, const uint8_t * from) { std::memcpy(to, from, layout_->record_bytes); }

void HostMemory::pack(int stream, const PageJob * jobs, int n, int n_threads) {
    if (!layout_->is_value()) read_importance(stream);
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

void HostMemory::unpack_from(const uint8_t * host, half * host_rows) {
    const PageJob job = {host_rows, const_cast<uint8_t *>(host), {}};
    unpack(&job, 1, 1);
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

// What a number of a query counts: one that is not finite would spoil its sum for good, and the square of one that no half can hold may be infinite.
static float counted(float x) {
    const float magnitude = std::fabs(x);
    return magnitude <= std::numeric_limits<float>::max() ? std::min(magnitude, 65504.0f) : 0.0f;
}

void HostMemory::observe(const Queries & q, int n_threads) {
    const int n_heads = layout_->n_heads, d = layout_->head_size, group = q.n_heads / n_heads;
    // Counting a few queries is done before another thread would wake up.
    parallel_for(q.n_tokens >= 16 ? n_threads : 1, q.n_streams * n_heads, [&](int i, int) {
        const int s = i / n_heads, kv = i % n_heads;
        float * abs = queries_[q.first_stream + s].abs.data() + size_t(kv) * d;
        float * sqr = queries_[q.first_stream + s].sqr.data() + size_t(kv) * d;
        for (int g = 0; g < group; ++g) {
            const float * x = q.q + s * q.stream + (size_t(kv) * group + g) * q.head;
            for (int t = 0; t < q.n_tokens; ++t, x += q.token) {
                for (int c = 0; c < d; ++c) {
                    const float y = counted(x[c]);
                    abs[c] += y;
                    sqr[c] += y * y;
                }
            }
        }
    });
    for (int s = 0; s < q.n_streams; ++s) {
        QuerySums & sums = queries_[q.first_stream + s];
        sums.count += double(q.n_tokens) * group;
        while (sums.count > 2 * kQueryMemory) {
            sums.count *= 0.5;
            for (float & x : sums.abs) x *= 0.5f;
            for (float & x : sums.sqr) x *= 0.5f;
        }
    }
}

bool HostMemory::query_statistics(int stream, float * mean_abs, float * mean_sqr) {
    if (queries_.empty()) return false;
    const int first = std::max(stream, 0), end = stream < 0 ? int(queries_.size()) : stream + 1;
    double count = 0;
    for (int s = first; s < end; ++s) count += queries_[s].count;
    for (size_t i = 0; i < importance_.size(); ++i) {
        double abs = 0, sqr = 0;
        for (int s = first; s < end; ++s) abs += queries_[s].abs[i], sqr += queries_[s].sqr[i];
        mean_abs[i] = count > 0 ? float(abs / count) : 1.0f;
        mean_sqr[i] = count > 0 ? float(sqr / count) : 1.0f;
    }
    return count > 0;
}

void HostMemory::forget_queries(int stream) {
    QuerySums & sums = queries_[stream];
    std::fill(sums.abs.begin(), sums.abs.end(), 0.0f);
    std::fill(sums.sqr.begin(), sums.sqr.end(), 0.0f);
    sums.count = 0;
}

void HostMemory::mark_queries(int stream, int mark) {
    QuerySums & sums = queries_[stream];
    std::copy(sums.abs.begin(), sums.abs.end(), sums.marks[mark].abs.begin());
    sums.marks[mark].count = sums.count;
}

void HostMemory::recall_queries(int stream, int mark) {
    QuerySums & sums = queries_[stream];
    const Mark & then = sums.marks[mark];
    const auto faded = sums.count > 0 ? float(then.count) / float(sums.count) : 0.0f;
    for (float & x : sums.sqr) x *= faded;
    std::copy(then.abs.begin(), then.abs.end(), sums.abs.begin());
    sums.count = then.count;
}

void HostMemory::copy_queries(int to, PageMemory & other, int from) {
    const QuerySums & source = static_cast<HostMemory &>(other).queries_[from];
    QuerySums & sums = queries_[to];
    std::copy(source.abs.begin(), source.abs.end(), sums.abs.begin());
    std::copy(source.sqr.begin(), source.sqr.end(), sums.sqr.begin());
    sums.count = source.count;
    for (size_t i = 0; i < sums.marks.size(); ++i) {
        std::copy(source.marks[i].abs.begin(), source.marks[i].abs.end(), sums.marks[i].abs.begin());
        sums.marks[i].count = source.marks[i].count;
    }
}

QueryState HostMemory::query_state(int stream, const std::vector<int> & marks) {
    const QuerySums & sums = queries_[stream];
    QueryState state = {sums.abs, sums.sqr, sums.count, {}};
    for (int number : marks) state.marks.push_back({number, sums.marks[number].abs, sums.marks[number].count});
    return state;
}

void HostMemory::restore_queries(int stream, const QueryState & state) {
    QuerySums & sums = queries_[stream];
    std::copy(state.abs.begin(), state.abs.end(), sums.abs.begin());
    std::copy(state.sqr.begin(), state.sqr.end(), sums.sqr.begin());
    sums.count = state.count;
    for (const QueryState::Mark & mark : state.marks) {
        if (mark.number >= int(sums.marks.size())) continue;
        std::copy(mark.abs.begin(), mark.abs.end(), sums.marks[mark.number].abs.begin());
        sums.marks[mark.number].count = mark.count;
    }
}

size_t HostMemory::query_bytes() const {
    size_t n = importance_.size();
    for (const QuerySums & sums : queries_) {
        n += sums.abs.size() + sums.sqr.size();
        for (const Mark & mark : sums.marks) n += mark.abs.size();
    }
    return n * sizeof(float);
}

void HostMemory::read_importance(int stream) {
    const QuerySums & sums = queries_[stream];
    for (size_t i = 0; i < importance_.size(); ++i) {
        importance_[i] = sums.count > 0 ? float(sums.abs[i] / sums.count) : layout_->query_prior.empty() ? 1.0f : layout_->query_prior[i];
    }
}

}  // namespace mixkvq
