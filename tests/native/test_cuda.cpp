// The kernels on a GPU against the scalar kernels: pack and unpack give the same bytes, rows the same halves, for every head size, kind of data,
// mask and format. Query statistics: within 1e-5 of sums in double, and the same bits from run to run. Recordings do what was recorded last.
// Exits with 77 where there is no usable GPU.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "check.h"
#include "mixkvq/cuda.h"
#include "mixkvq/cuda_memory.h"
#include "pages.h"

namespace {

const Kernels & scalar = *kernels_for(Isa::scalar);
int n_compared = 0;

bool cuda_ok(cudaError_t error, const char * what) {
    CHECK(error == cudaSuccess, "%s: %s", what, cudaGetErrorString(error));
    return error == cudaSuccess;
}

// What was launched since the last call has ended, without an error.
void finish(const char * what) {
    cuda_ok(cudaGetLastError(), what);
    cuda_ok(cudaDeviceSynchronize(), what);
}

// An array in device memory.
template <class T>
class Device {
public:
    explicit Device(size_t n) : n_(n) { cuda_ok(cudaMalloc(reinterpret_cast<void **>(&p_), std::max<size_t>(n * sizeof(T), 1)), "cudaMalloc"); }
    explicit Device(const std::vector<T> & x) : Device(x.size()) { set(x); }
    Device(const Device &) = delete;
    ~Device() { cudaFree(p_); }

    T * data() const { return p_; }
    void set(const std::vector<T> & x) const { cuda_ok(cudaMemcpy(p_, x.data(), n_ * sizeof(T), cudaMemcpyHostToDevice), "copy to the device"); }
    std::vector<T> get() const {
        std::vector<T> x(n_);
        cuda_ok(cudaMemcpy(x.data(), p_, n_ * sizeof(T), cudaMemcpyDeviceToHost), "copy to the host");
        return x;
    }

private:
    T * p_ = nullptr;
    size_t n_;
};

half scalar_half(float x) {
    half h;
    scalar.to_half(&x, &h, 1);
    return h;
}

// --- records --------------------------------------------------------------------------------------------------

constexpr int kMasks = 5;
constexpr int kJobs = int(Data::count) * kMasks;
constexpr half kUntouched = 0x1111;

std::string name_of(int job) { return std::string(data_name(Data(job / kMasks))) + " mask " + std::to_string(job % kMasks); }

template <class T>
size_t first_difference(const T * a, const T * b, size_t n) {
    size_t at = 0;
    while (at < n && a[at] == b[at]) ++at;
    return at;
}

// Every head of the store has a format of its own, every page another kind of data or mask. scalar_pack(head, rows, valid, record) and so on
// are given what the device is. `again`: the rows were packed before, and in every third page some were written anew since.
template <class Head, class Format, class ScalarPack, class ScalarUnpack, class Pack, class Unpack>
void compare_records(const std::vector<Format> & formats, bool again, ScalarPack scalar_pack, ScalarUnpack scalar_unpack, Pack pack, Unpack unpack) {
    const int d = formats[0].head_size, n_heads = int(formats.size()), row = n_heads * d + (d % 64 == 0 ? 24 : 0);
    const size_t page = size_t(kPageCells) * row;
    std::vector<Head> heads;
    uint32_t page_bytes = 64;  // records do not begin with the page
    for (const Format & f : formats) {
        CHECK(f.error() == nullptr, "%s: %s", describe(f).c_str(), f.error());
        heads.push_back({f, page_bytes});
        page_bytes += uint32_t(f.record_bytes()) + 64;  // a gap that nobody may write
    }

    // NaN where a kernel must not look; cells without a token hold it in one page and numbers in the next.
    std::vector<half> rows(kJobs * page, 0x7e00);
    std::vector<uint8_t> records(kJobs * size_t(page_bytes), 0xa5);
    std::vector<half> unpacked(rows.size(), kUntouched);
    std::vector<CellMask> masks;
    for (int job = 0; job < kJobs; ++job) {
        masks.push_back(make_mask(job % kMasks));
        const std::vector<half> data = make_rows(scalar, Data(job / kMasks), row, row);
        for (int t = 0; t < kPageCells; ++t) {
            if (masks[job].test(t) || job % 2) std::copy_n(&data[size_t(t) * row], n_heads * d, &rows[job * page + size_t(t) * row]);
        }
        for (int h = 0; h < n_heads && again; ++h) {
            half * head_rows = &rows[job * page + h * d];
            std::vector<uint8_t> before(formats[h].record_bytes());
            scalar_pack(h, head_rows, row, masks[job], before.data());
            scalar_unpack(h, before.data(), head_rows, row);
            for (int t = 0; t < kPageCells && job % 3 == 1; t += 5) std::copy_n(&data[size_t(t) * row + h * d], d, head_rows + size_t(t) * row);
        }
        for (int h = 0; h < n_heads; ++h) {
            uint8_t * record = &records[job * size_t(page_bytes) + heads[h].record_offset];
            scalar_pack(h, &rows[job * page + h * d], row, masks[job], record);
            scalar_unpack(h, record, &unpacked[job * page + h * d], row);
        }
    }

    const Device<Head> device_heads(heads);
    const Device<half> device_rows(rows), device_unpacked(std::vector<half>(rows.size(), kUntouched));
    const Device<uint8_t> device_records(std::vector<uint8_t>(records.size(), 0xa5)), scalar_records(records);
    std::vector<cuda::PageJob> packing, unpacking;
    for (int job = 0; job < kJobs; ++job) {
        packing.push_back({device_rows.data() + job * page, device_records.data() + job * size_t(page_bytes), masks[job]});
        unpacking.push_back({device_unpacked.data() + job * page, scalar_records.data() + job * size_t(page_bytes), CellMask()});
    }
    const Device<cuda::PageJob> pack_jobs(packing), unpack_jobs(unpacking);
    pack(device_heads.data(), n_heads, d, row, pack_jobs.data(), 1);  // one page by itself, then the others together
    pack(device_heads.data(), n_heads, d, row, pack_jobs.data() + 1, kJobs - 1);
    unpack(device_heads.data(), n_heads, d, row, unpack_jobs.data(), kJobs - 1);
    unpack(device_heads.data(), n_heads, d, row, unpack_jobs.data() + kJobs - 1, 1);
    unpack(device_heads.data(), n_heads, d, row, unpack_jobs.data(), 0);
    finish(describe(formats[0]).c_str());

    const std::vector<uint8_t> got = device_records.get();
    const std::vector<half> got_rows = device_unpacked.get();
    for (int job = 0; job < kJobs; ++job) {
        for (int h = 0; h < n_heads; ++h) {
            const size_t begin = job * size_t(page_bytes) + heads[h].record_offset, n = formats[h].record_bytes();
            const size_t at = first_difference(&records[begin], &got[begin], n);
            CHECK(at == n, "%s %s: pack differs at byte %zu of %zu: %02x, on the GPU %02x", describe(formats[h]).c_str(), name_of(job).c_str(), at, n,
                  records[begin + at], got[begin + at]);
            bool same = true;
            for (int t = 0; t < kPageCells && same; ++t) {
                const size_t cell = job * page + size_t(t) * row + h * d;
                const size_t i = first_difference(&unpacked[cell], &got_rows[cell], d);
                same = i == size_t(d);
                CHECK(same, "%s %s: unpack differs at cell %d, dimension %zu: %04x, on the GPU %04x", describe(formats[h]).c_str(), name_of(job).c_str(),
                      t, i, unpacked[cell + i], got_rows[cell + i]);
            }
            ++n_compared;
        }
    }
    CHECK(got == records, "%s: pack wrote between records", describe(formats[0]).c_str());
    CHECK(got_rows == unpacked, "%s: unpack wrote between rows", describe(formats[0]).c_str());
}

void test_keys(int d, bool again) {
    std::vector<KeyFormat> formats = key_formats(d);
    std::shuffle(formats.begin(), formats.end(), rng);
    std::vector<float> importance(formats.size() * d);
    for (size_t i = 0; i < importance.size(); ++i) importance[i] = i / d % 3 == 0 ? 1.0f : i % 5 == 0 ? 1.0f : std::exp(gauss());
    for (size_t head = 0; head < formats.size(); head += 2) {
        importance[head * d + 3] = 0;
        importance[head * d + 4] = std::numeric_limits<float>::quiet_NaN();
        importance[head * d + 9] = -1;
    }
    const Device<float> device_importance(importance);
    compare_records<cuda::KeyHead>(
        formats, again,
        [&](int h, const half * rows, size_t stride, const CellMask & valid, uint8_t * record) {
            scalar.pack_keys(formats[h], rows, stride, valid, &importance[h * d], record);
        },
        [&](int h, const uint8_t * record, half * rows, size_t stride) { scalar.unpack_keys(formats[h], record, rows, stride); },
        [&](const cuda::KeyHead * heads, int n_heads, int head_size, int row, const cuda::PageJob * jobs, int n_jobs) {
            cuda::pack_keys(nullptr, heads, n_heads, head_size, row, jobs, n_jobs, device_importance.data());
        },
        [](const cuda::KeyHead * heads, int n_heads, int head_size, int row, const cuda::PageJob * jobs, int n_jobs) {
            cuda::unpack_keys(nullptr, heads, n_heads, head_size, row, jobs, n_jobs);
        });
}

void test_values(int d, bool again) {
    std::vector<ValueFormat> formats = value_formats(d);
    std::shuffle(formats.begin(), formats.end(), rng);
    compare_records<cuda::ValueHead>(
        formats, again,
        [&](int h, const half * rows, size_t stride, const CellMask & valid, uint8_t * record) {
            scalar.pack_values(formats[h], rows, stride, valid, record);
        },
        [&](int h, const uint8_t * record, half * rows, size_t stride) { scalar.unpack_values(formats[h], record, rows, stride); },
        [](const cuda::ValueHead * heads, int n_heads, int head_size, int row, const cuda::PageJob * jobs, int n_jobs) {
            cuda::pack_values(nullptr, heads, n_heads, head_size, row, jobs, n_jobs);
        },
        [](const cuda::ValueHead * heads, int n_heads, int head_size, int row, const cuda::PageJob * jobs, int n_jobs) {
            cuda::unpack_values(nullptr, heads, n_heads, head_size, row, jobs, n_jobs);
        });
}

// --- rows -----------------------------------------------------------------------------------------------------

float any_float() {
    const float special[] = {0.0f,     -0.0f,      65504.0f,  65519.99f, 65520.0f, -1e30f,   INFINITY, -INFINITY, NAN,
                             5.96e-8f, 2.9802e-8f, -2.99e-8f, 6.1e-5f,   1e-40f,   1.00049f, 2049.0f,  -2051.0f};
    if (below(4) == 0) return special[below(int(std::size(special)))];
    const uint32_t bits = uint32_t(rng());
    float x;
    std::memcpy(&x, &bits, 4);
    return below(2) ? x : gauss();
}

half any_half() { return half(rng()); }
half as_stored(float x) { return scalar_half(x); }
half as_stored(half h) {
    const half magnitude = h & 0x7fff;
    return magnitude < 0x7c00 ? h : magnitude > 0x7c00 ? half(0) : half((h & 0x8000) | 0x7bff);
}

// Every third row goes nowhere. `pad` is in numbers: source rows and their places are aligned to 16 bytes, or are not.
template <class Row, class Make>
void compare_rows(int n, int row, int pad, Make make) {
    const int stride = row + pad, skip = pad % 8;
    std::vector<Row> source(size_t(n) * stride + skip);
    for (Row & x : source) x = make();
    std::vector<half> expected(size_t(n) * stride + skip, kUntouched);
    const Device<Row> device_source(source);
    const Device<half> out(expected);
    std::vector<half *> places(n, nullptr);
    for (int i = 0; i < n; ++i) {
        if (i % 3 == 2) continue;
        const size_t place = size_t(n - 1 - i) * stride + skip;
        places[i] = out.data() + place;
        for (int d = 0; d < row; ++d) expected[place + d] = as_stored(source[skip + size_t(i) * stride + d]);
    }
    const Device<half *> destination(places);
    const cuda::RowWrite all = {device_source.data() + skip, sizeof(Row) == 2, stride * sizeof(Row), destination.data(), n, row};
    cuda::RowWrite first = all, second = all;  // in two parts, one of which may be empty
    first.n = n / 3;
    second.source = device_source.data() + skip + first.n * stride;
    second.destination += first.n;
    second.n -= first.n;
    cuda::write_rows(nullptr, first, second);
    finish("write_rows");
    const std::vector<half> got = out.get();
    const size_t at = first_difference(expected.data(), got.data(), got.size());
    CHECK(at == got.size(), "write_rows of %d-byte numbers, %d rows of %d, %d apart: differs at row %zu, dimension %zu: %04x, on the GPU %04x",
          int(sizeof(Row)), n, row, stride, at / stride, at % stride, expected[at], got[at]);
    ++n_compared;
}

void test_write_rows() {
    for (int n : {1, 2, 5, 300}) {
        for (int row : {8, 37, 128, 1000, 1024, 4096}) {
            for (int pad : {0, 1, 4, 8, 24}) {
                compare_rows<float>(n, row, pad, any_float);
                compare_rows<half>(n, row, pad, any_half);
            }
        }
    }
    cuda::write_rows(nullptr, {nullptr, true, 0, nullptr, 0, 128});
    finish("write_rows of nothing");
}

// --- recordings -----------------------------------------------------------------------------------------------

// A recording writes rows; the next ones take its place: with other numbers, with other work, while it is still under way, and it is made anew.
void test_recordings() {
    constexpr int kRow = 64, kRows = 6;
    std::vector<float> source(kRows * kRow);
    for (float & x : source) x = any_float();
    const Device<float> device_source(source);
    const Device<half> out(std::vector<half>(kRows * kRow, kUntouched));
    const auto queue = std::make_shared<cuda::Queue>(0);

    // Rows `first` to `first + n - 1` of the source, by as many kernels as `parts`.
    const auto record = [&](cuda::Recording & recording, int first, int n, int parts, cuda::Recording * older) {
        recording.begin();
        for (int part = 0; part < parts; ++part) {
            const int from = part * n / parts, to = (part + 1) * n / parts;
            cuda::write_rows(queue->stream(), {device_source.data() + (first + from) * kRow, false, kRow * sizeof(float), recording.rows_there() + from, to - from, kRow});
        }
        CHECK(recording.end(older) && recording.ready(), "rows %d to %d in %d parts are not recorded", first, first + n - 1, parts);
    };
    std::vector<half> expected;
    const auto clear = [&] {
        expected.assign(kRows * kRow, kUntouched);
        out.set(expected);
    };
    const auto launch = [&](cuda::Recording & recording, int first, int n, int place) {  // row i goes to row place - i
        for (int i = 0; i < n; ++i) {
            recording.rows()[i] = out.data() + (place - i) * kRow;
            for (int d = 0; d < kRow; ++d) expected[(place - i) * kRow + d] = as_stored(source[(first + i) * kRow + d]);
        }
        recording.send();
        recording.launch();
    };
    const auto compare = [&](const char * what) {
        queue->synchronize();
        CHECK(!queue->error(), "%s: %s", what, queue->error());
        const std::vector<half> got = out.get();
        const size_t at = first_difference(expected.data(), got.data(), got.size());
        CHECK(at == got.size(), "%s: differs at row %zu, dimension %zu: %04x, on the GPU %04x", what, at / kRow, at % kRow, expected[at], got[at]);
        ++n_compared;
    };

    cuda::Recording a(queue, 3), b(queue, 3), c(queue, 4), d(queue, 4);
    clear();
    record(a, 0, 3, 1, nullptr);
    launch(a, 0, 3, 5);
    compare("a recording");
    clear();
    launch(a, 0, 3, 3);
    compare("a recording again, to other places");

    clear();
    record(b, 2, 2, 1, &a);
    CHECK(!a.ready(), "a recording that another one was made of is still there");
    launch(b, 2, 2, 1);
    launch(b, 2, 2, 4);
    compare("other numbers");

    clear();
    launch(b, 2, 2, 5);
    record(c, 1, 4, 2, &b);  // while that one may be under way
    launch(c, 1, 4, 3);
    compare("other work");

    clear();
    record(a, 5, 1, 1, nullptr);
    record(d, 0, 4, 2, &c);
    record(d, 2, 4, 2, &a);
    CHECK(a.ready() && !c.ready(), "a recording that is made anew is made of itself");
    launch(d, 2, 4, 3);
    launch(a, 5, 1, 5);
    compare("made anew");
}

// --- query statistics -----------------------------------------------------------------------------------------

struct Observed {
    std::vector<float> abs, sqr, importance, count;
    bool operator==(const Observed & o) const { return abs == o.abs && sqr == o.sqr && importance == o.importance && count == o.count; }
};

// Three batches into the same sums, compared with sums in double that fade alike; and again together with a write of rows.
void test_observe(int n_tokens, int n_streams, int n_kv_heads, int group, int d, float memory) {
    const size_t n = size_t(n_kv_heads) * d, all = n * n_streams, q_head = d + 8, q_token = q_head * n_kv_heads * group + 4, q_stream = q_token * n_tokens + 12;
    std::vector<double> abs(all), sqr(all);
    double count = 0;
    const Device<float> q(q_stream * n_streams);
    const Device<float> device_abs(std::vector<float>(all, 0.0f)), device_sqr(std::vector<float>(all, 0.0f));
    const Device<float> importance(std::vector<float>(all, 7.0f)), device_count(std::vector<float>(all, 0.0f));  // of the last, one in n is used
    const cuda::QuerySums sums = {device_abs.data(), device_sqr.data(), importance.data(), device_count.data(), n};
    const cuda::Observation observation = {sums, q.data(), q_token, q_head, q_stream, n_tokens, n_streams, n_kv_heads, group, d, memory};

    const int n_rows = std::min(5, n_tokens * n_streams), row = int(n);
    std::vector<float> rows(2 * n_rows * n);
    for (float & x : rows) x = any_float();
    std::vector<half> stored(rows.size());
    std::transform(rows.begin(), rows.end(), stored.begin(), [](float x) { return as_stored(x); });
    const Device<float> source(rows);
    const Device<half> pages(std::vector<half>(rows.size(), kUntouched));
    std::vector<half *> places;
    for (int i = 0; i < 2 * n_rows; ++i) places.push_back(pages.data() + i * n);
    const Device<half *> destination(places);
    const cuda::RowWrite keys = {source.data(), false, n * sizeof(float), destination.data(), n_rows, row};
    const cuda::RowWrite values = {source.data() + n_rows * n, false, n * sizeof(float), destination.data() + n_rows, n_rows, row};
    auto read = [&] {
        finish("observe");
        return Observed{device_abs.get(), device_sqr.get(), importance.get(), device_count.get()};
    };
    for (int batch = 0; batch < 3; ++batch) {
        std::vector<float> x(q_stream * n_streams, NAN);  // between the queries, too
        for (int s = 0; s < n_streams; ++s) {
            for (int t = 0; t < n_tokens; ++t) {
                for (int h = 0; h < n_kv_heads * group; ++h) {
                    for (int i = 0; i < d; ++i) {
                        float v = gauss() * float(1 + i % 7 + s);
                        if (below(50) == 0) v = below(2) ? INFINITY : below(2) ? NAN : 3e38f;
                        x[s * q_stream + t * q_token + h * q_head + i] = v;
                        const double counts = std::isfinite(v) ? std::min(std::fabs(double(v)), 65504.0) : 0;
                        abs[s * n + h / group * d + i] += counts;
                        sqr[s * n + h / group * d + i] += counts * counts;
                    }
                }
            }
        }
        q.set(x);
        const Observed before = read();
        cuda::observe(nullptr, observation);
        const Observed got = read();
        device_abs.set(before.abs);
        device_sqr.set(before.sqr);
        device_count.set(before.count);
        cuda::write_and_observe(nullptr, {keys, values, observation});
        const char * format = "observe %d tokens %d streams %d x %d heads D=%d, batch %d, channel %zu: %s is %.9g, on the GPU %.9g";
        CHECK(read() == got, "observe of %d tokens: another result the second time", n_tokens);
        CHECK(pages.get() == stored, "write_and_observe of %d tokens: other rows", n_tokens);
        for (count += double(n_tokens) * group; count > memory; count /= 2) {
            for (double & v : abs) v /= 2;
            for (double & v : sqr) v /= 2;
        }
        for (int s = 0; s < n_streams; ++s) {
            CHECK(got.count[s * n] == float(count), format, n_tokens, n_streams, n_kv_heads, group, d, batch, s * n, "the count", count, double(got.count[s * n]));
        }
        auto compare = [&](const char * what, size_t i, double expected, float x) {
            CHECK(std::fabs(x - expected) <= 1e-5 * expected, format, n_tokens, n_streams, n_kv_heads, group, d, batch, i, what, expected, double(x));
        };
        for (size_t i = 0; i < all; ++i) {
            compare("sum |q|", i, abs[i], got.abs[i]);
            compare("sum q^2", i, sqr[i], got.sqr[i]);
            compare("importance", i, abs[i] / count, got.importance[i]);
        }
    }
    ++n_compared;
}

void test_observations() {
    for (int d : {32, 40, 128, 256}) {
        for (int n_tokens : {1, 3, 64, 65, 600}) {
            test_observe(n_tokens, 1, 4, 4, d, 8192.0f);
            test_observe(n_tokens, 2, 3, 1, d, 500.0f);
        }
        test_observe(1, 9, 8, 7, d, 100.0f);
        test_observe(2, 5, 1, 3, d, 1e9f);
    }
}

#if defined(MIXKVQ_EMULATED)
// A list longer than any before, for which there is no memory at first: the queue is as it was, and the next try gets the list to the GPU.
void test_lists_without_memory() {
    const std::vector<uint8_t> list(1 << 20, 7);
    for (const char * call : {"malloc", "host"}) {
        cuda::Queue queue(0);
        bool thrown = false;
        emulator::fail(call, 0, 1);
        try {
            queue.reserve(list.size());
        } catch (const std::bad_alloc &) {
            thrown = true;
        }
        std::memcpy(queue.reserve(list.size()), list.data(), list.size());
        const void * there = queue.send();
        queue.synchronize();
        CHECK(thrown && there && !queue.error() && std::memcmp(there, list.data(), list.size()) == 0, "%s fails once", call);
    }
}
#endif

}  // namespace

int main() {
    if (const char * reason = cuda::unavailable()) {
        std::printf("skipped: %s\n", reason);
        return 77;
    }
    for (int d : kHeadSizes) {
        for (bool again : {false, true}) {
            test_keys(d, again);
            test_values(d, again);
        }
    }
    test_write_rows();
    test_recordings();
    test_observations();
#if defined(MIXKVQ_EMULATED)
    test_lists_without_memory();
#endif
    std::printf("%d cases compared\n", n_compared);
    finish("the end");
    return check_result();
}
