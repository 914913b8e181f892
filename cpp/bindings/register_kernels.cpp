#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <optional>
#include <variant>

#include "mixkvq/attend.h"
#include "mixkvq/check.h"
#include "mixkvq/kernels.h"
#include "mixkvq/read_back.h"
#include "register.h"

namespace mixkvq::bindings {

namespace {

using OptionalArray = std::optional<py::array>;
using OptionalName = std::optional<std::string>;


std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (Isa isa : kIsas) {
        if (isa_supported(isa)) names.push_back(isa_name(isa));
    }
    return names;
}

}  // namespace

const Kernels & kernels(const OptionalName & name) {
    if (!name) {
        std::string error;
        const Isa   isa = select_isa(error);
        if (!error.empty()) throw std::runtime_error(error);
        return *kernels_for(isa);
    }
    for (Isa isa : kIsas) {
        if (*name == isa_name(isa) && isa_supported(isa)) return *kernels_for(isa);
    }
    std::string here;
    for (const std::string & each : isas()) here += (here.empty() ? "" : ", ") + each;
    throw py::value_error("isa '" + *name + "' cannot be had here; there is " + here);
}

namespace {

// Memory with the alignment that records and scratch need. NumPy's own is less.
template <typename T> class Aligned {
  public:
    explicit Aligned(size_t n) : data_(static_cast<T *>(::operator new(n * sizeof(T) + 1, kAlign))) {}
    ~Aligned() {
        if (data_) ::operator delete(data_, kAlign);
    }
    Aligned(const Aligned &) = delete;
    Aligned & operator=(const Aligned &) = delete;
    T * data() const { return data_; }

  private:
    static constexpr std::align_val_t kAlign{kRecordAlign};
    T * data_;
};

// A new array whose data is aligned, too, so that records go back in without a copy.
py::array_t<uint8_t> new_record(size_t bytes) {
    auto * memory = new Aligned<uint8_t>(bytes);
    std::memset(memory->data(), 0, bytes);
    py::capsule owner(memory, [](void * p) { delete static_cast<Aligned<uint8_t> *>(p); });
    return py::array_t<uint8_t>({py::ssize_t(bytes)}, {py::ssize_t(1)}, memory->data(), owner);
}

// Records of an array that has been checked, aligned: the array's own memory or a copy.
class Records {
  public:
    explicit Records(py::array array) : array_(std::move(array)), copy_(is_aligned() ? 0 : size_t(array_.nbytes())) {
        if (is_aligned()) {
            data_ = static_cast<const uint8_t *>(array_.data());
        } else {
            std::memcpy(copy_.data(), array_.data(), size_t(array_.nbytes()));
            data_ = copy_.data();
        }
    }
    const uint8_t * data() const { return data_; }

  private:
    bool is_aligned() const { return reinterpret_cast<uintptr_t>(array_.data()) % kRecordAlign == 0; }
    py::array        array_;
    Aligned<uint8_t> copy_;
    const uint8_t *  data_;
};

template <typename T> const T * data(const py::array & array) { return static_cast<const T *>(array.data()); }

CellMask take_valid(const OptionalArray & valid) {
    if (!valid) return CellMask::all();
    const py::array array = checked(*valid, "valid", "bool", {kPageCells});
    CellMask        mask;
    for (int t = 0; t < kPageCells; ++t) {
        if (data<bool>(array)[t]) mask.set(t);
    }
    return mask;
}

py::array take_rows(const py::array & rows, int head_size, const CellMask & valid) {
    const py::array array = checked(rows, "rows", "float16", {kPageCells, head_size});
    int cell = 0, channel = 0;
    if (find_non_finite(data<half>(array), head_size, head_size, valid, cell, channel)) {
        throw py::value_error("rows is not finite at cell " + std::to_string(cell) + ", channel " + std::to_string(channel));
    }
    return array;
}

void check_order(const KeyFormat & f, const uint8_t * record, py::ssize_t index) {
    const int place = find_bad_channel(f, record);
    if (place < 0) return;
    throw py::value_error("key record " + std::to_string(index) + " is damaged: place " + std::to_string(place) + " of its order holds channel " +
                          std::to_string(record[f.offset_order() + place]) + ", the head has " + std::to_string(f.head_size));
}

py::array new_rows(int head_size) { return py::array(py::dtype("float16"), std::vector<py::ssize_t>{kPageCells, head_size}); }

py::array_t<uint8_t> pack_keys(const KeyFormat & f, const py::array & rows, const py::array & importance, const OptionalArray & valid,
                               const OptionalName & isa) {
    const Kernels & table = kernels(isa);
    const CellMask  mask = take_valid(valid);
    const py::array r = take_rows(rows, f.head_size, mask);
    const py::array weights = checked(importance, "importance", "float32", {f.head_size});
    const int       bad = find_bad_importance(data<float>(weights), f.head_size);
    if (bad >= 0) {
        throw py::value_error("importance is " + std::to_string(data<float>(weights)[bad]) + " at channel " + std::to_string(bad));
    }
    py::array_t<uint8_t> record = new_record(f.record_bytes());
    uint8_t *            out = record.mutable_data();
    {
        py::gil_scoped_release release;
        table.pack_keys(f, data<half>(r), f.head_size, mask, data<float>(weights), out);
    }
    return record;
}

// The order is part of the record: packing is the one place that selects.
py::array_t<uint8_t> select_tiers(const KeyFormat & f, const py::array & rows, const py::array & importance, const OptionalArray & valid,
                                  const OptionalName & isa) {
    const py::array_t<uint8_t> record = pack_keys(f, rows, importance, valid, isa);
    return py::array_t<uint8_t>(f.head_size, record.data() + f.offset_order());
}

py::array unpack_keys(const KeyFormat & f, const py::array & record, const OptionalName & isa) {
    const Kernels & table = kernels(isa);
    const Records   in(checked(record, "record", "uint8", {py::ssize_t(f.record_bytes())}));
    check_order(f, in.data(), 0);
    py::array rows = new_rows(f.head_size);
    half *    out = static_cast<half *>(rows.mutable_data());
    {
        py::gil_scoped_release release;
        table.unpack_keys(f, in.data(), out, f.head_size);
    }
    return rows;
}

py::array_t<uint8_t> pack_values(const ValueFormat & f, const py::array & rows, const OptionalArray & valid, const OptionalName & isa) {
    const Kernels &      table = kernels(isa);
    const CellMask       mask = take_valid(valid);
    const py::array      r = take_rows(rows, f.head_size, mask);
    py::array_t<uint8_t> record = new_record(f.record_bytes());
    uint8_t *            out = record.mutable_data();
    {
        py::gil_scoped_release release;
        table.pack_values(f, data<half>(r), f.head_size, mask, out);
    }
    return record;
}

py::array unpack_values(const ValueFormat & f, const py::array & record, const OptionalName & isa) {
    const Kernels & table = kernels(isa);
    const Records   in(checked(record, "record", "uint8", {py::ssize_t(f.record_bytes())}));
    py::array       rows = new_rows(f.head_size);
    half *          out = static_cast<half *>(rows.mutable_data());
    {
        py::gil_scoped_release release;
        table.unpack_values(f, in.data(), out, f.head_size);
    }
    return rows;
}

// The rows of a page and the bytes of its records, each head in its format.
py::tuple read_back(const py::array & rows, const std::vector<std::variant<KeyFormat, ValueFormat, py::none>> & formats, const OptionalArray & importance,
                    const OptionalArray & valid, int threads, const OptionalName & isa) {
    const Kernels &   table = kernels(isa);
    const CellMask    mask = take_valid(valid);
    const py::ssize_t heads = py::ssize_t(formats.size());
    const py::array   in = checked(rows, "rows", "float32", {heads, kPageCells, -1});
    const int         d = int(in.shape(2));
    if (threads < 1) throw py::value_error("threads is " + std::to_string(threads) + "; it must be at least 1");
    for (py::ssize_t row = 0; row < heads * kPageCells; ++row) {
        const float * x = data<float>(in) + row * d;
        for (int j = 0; j < d && mask.test(int(row % kPageCells)); ++j) {
            if (std::fabs(x[j]) <= 65504.0f) continue;
            throw py::value_error("rows is " + std::to_string(x[j]) + " in head " + std::to_string(row / kPageCells) + ", cell " +
                                  std::to_string(row % kPageCells) + ", and F16 cannot hold that");
        }
    }
    std::vector<HeadFormat> found(formats.size());
    size_t                  scratch_bytes = 0, n_bytes = 0;
    bool                    has_keys = false;
    for (size_t h = 0; h < formats.size(); ++h) {
        found[h] = {std::get_if<KeyFormat>(&formats[h]), std::get_if<ValueFormat>(&formats[h])};
        const int own = found[h].keys ? found[h].keys->head_size : found[h].values ? found[h].values->head_size : d;
        if (own != d) throw py::value_error("formats[" + std::to_string(h) + "] is for heads of " + std::to_string(own) + ", the rows have " + std::to_string(d));
        has_keys |= found[h].keys != nullptr;
        scratch_bytes = std::max(scratch_bytes, read_back_bytes(found[h], d));
        n_bytes += found[h].record_bytes();
    }
    if (has_keys && !importance) throw py::value_error("keys need their importance");
    const py::array weights = importance ? checked(*importance, "importance", "float32", {heads, d}) : py::array();
    const int       bad = importance ? find_bad_importance(data<float>(weights), int(heads) * d) : -1;
    if (bad >= 0) throw py::value_error("importance is " + std::to_string(data<float>(weights)[bad]) + " in head " + std::to_string(bad / d));
    const Aligned<uint8_t> scratch(scratch_bytes * formats.size());
    py::array_t<float>     result({heads, py::ssize_t(kPageCells), py::ssize_t(d)});
    float *                out = result.mutable_data();
    {
        py::gil_scoped_release release;
        mixkvq::read_back(table, found.data(), int(heads), d, data<float>(in), importance ? data<float>(weights) : nullptr, mask, threads, scratch.data(),
                          scratch_bytes, out);
    }
    return py::make_tuple(result, n_bytes);
}

py::array_t<float> attend(const KeyFormat & k, const ValueFormat & v, const py::array & key_records, const py::array & value_records,
                          const py::array & q, const OptionalArray & mask, float scale, float softcap, const OptionalArray & sink,
                          const OptionalName & isa) {
    const Kernels & table = kernels(isa);
    const Records   keys(checked(key_records, "key_records", "uint8", {-1, py::ssize_t(k.record_bytes())}));
    const auto      n_pages = key_records.shape(0);
    const Records   values(checked(value_records, "value_records", "uint8", {n_pages, py::ssize_t(v.record_bytes())}));
    const py::array queries = checked(q, "q", "float32", {-1, k.head_size});
    const auto      n = queries.shape(0);
    py::array       masks, sinks;
    if (mask) masks = checked(*mask, "mask", "float32", {n, n_pages * kPageCells});
    if (sink) sinks = checked(*sink, "sink", "float32", {n});
    if (!std::isfinite(scale)) throw py::value_error("scale is " + std::to_string(scale));
    if (!(softcap >= 0) || std::isinf(softcap)) throw py::value_error("softcap is " + std::to_string(softcap));

    std::vector<const uint8_t *> key_pages(n_pages), value_pages(n_pages);
    for (py::ssize_t p = 0; p < n_pages; ++p) {
        key_pages[p] = keys.data() + p * k.record_bytes();
        value_pages[p] = values.data() + p * v.record_bytes();
        check_order(k, key_pages[p], p);
    }
    const Aligned<float> scratch(attend_scratch_floats(k, v, int(n)));
    py::array_t<float>   result({n, py::ssize_t(v.head_size)});
    float *              out = result.mutable_data();
    {
        py::gil_scoped_release release;
        attend_records(table, k, v, key_pages.data(), value_pages.data(), int(n_pages), data<float>(queries), int(n),
                       mask ? data<float>(masks) : nullptr, SoftmaxParams{scale, softcap}, sink ? data<float>(sinks) : nullptr, out,
                       scratch.data());
    }
    return result;
}

}  // namespace

void register_kernels(py::module_ & m) {
    using py::arg;
    const auto none = py::none();

    m.def("isa", []() { return isa_name(kernels(std::nullopt).isa); });
    m.def("isas", &isas);
    m.def("select_tiers", &select_tiers, arg("key_format"), arg("rows"), arg("importance"), arg("valid") = none, py::kw_only(), arg("isa") = none);
    m.def("pack_keys", &pack_keys, arg("key_format"), arg("rows"), arg("importance"), arg("valid") = none, py::kw_only(), arg("isa") = none);
    m.def("unpack_keys", &unpack_keys, arg("key_format"), arg("record"), py::kw_only(), arg("isa") = none);
    m.def("pack_values", &pack_values, arg("value_format"), arg("rows"), arg("valid") = none, py::kw_only(), arg("isa") = none);
    m.def("unpack_values", &unpack_values, arg("value_format"), arg("record"), py::kw_only(), arg("isa") = none);
    m.def("read_back", &read_back, arg("rows"), arg("formats"), arg("importance") = none, arg("valid") = none, py::kw_only(), arg("threads") = 1,
          arg("isa") = none);
    m.def("attend", &attend, arg("key_format"), arg("value_format"), arg("key_records"), arg("value_records"), arg("q"), arg("mask") = none,
          arg("scale") = 1.0f, arg("softcap") = 0.0f, arg("sink") = none, py::kw_only(), arg("isa") = none);
}

}  // namespace mixkvq::bindings
