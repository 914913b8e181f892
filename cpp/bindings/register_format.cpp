#include <pybind11/stl.h>

#include <array>

#include "mixkvq/checksum.h"
#include "mixkvq/page.h"
#include "mixkvq/profile.h"
#include "register.h"

namespace mixkvq::bindings {

namespace {

using Tiers = std::array<int, 5>;

Tiers tiers(const KeyFormat & f) { return {f.n16, f.n8, f.n4, f.n3, f.n2}; }

std::string text(const KeyFormat & f) {
    std::string s = "KeyFormat(head_size=" + std::to_string(f.head_size) + ", tiers=(";
    for (int i = 0; i < 5; ++i) s += (i ? ", " : "") + std::to_string(tiers(f)[i]);
    return s + "), group=" + std::to_string(f.group) + ")";
}

std::string text(const ValueFormat & f) {
    return "ValueFormat(head_size=" + std::to_string(f.head_size) + ", bits=" + std::to_string(f.bits) + ", group=" + std::to_string(f.group) + ")";
}

template <typename Format> Format accepted(const Format & f) {
    if (const char * error = f.error()) throw py::value_error(text(f) + ": " + error);
    return f;
}

KeyFormat make_key_format(int head_size, const Tiers & counts, int group) {
    KeyFormat f;
    f.head_size = head_size;
    f.n16 = counts[0];
    f.n8 = counts[1];
    f.n4 = counts[2];
    f.n3 = counts[3];
    f.n2 = counts[4];
    f.group = group;
    return accepted(f);
}

ValueFormat make_value_format(int head_size, int bits, int group) {
    ValueFormat f;
    f.head_size = head_size;
    f.bits = bits;
    f.group = group;
    return accepted(f);
}

py::dict describe(const Preset & p) {
    py::dict d;
    d["name"] = p.name;
    d["alias"] = p.alias;
    d["description"] = p.description;
    d["default"] = &p == &default_preset();
    d["body_bits"] = body_bits(key_format(p, 128), value_format(p, 128));  // presets are named at this head size
    d["key_tiers"] = tiers(key_format(p, 128));
    d["key_group"] = p.key_group;
    d["value_bits"] = p.value_bits;
    d["value_group"] = p.value_group;
    return d;
}

std::pair<KeyFormat, ValueFormat> preset(const std::string & name, int head_size) {
    const Preset * p = find_preset(name);
    if (!p) {
        std::string known;
        for (const Preset & each : presets()) known += (known.empty() ? "" : ", ") + std::string(each.name);
        throw py::value_error("there is no preset '" + name + "'; the presets are " + known);
    }
    return {accepted(key_format(*p, head_size)), accepted(value_format(*p, head_size))};
}

}  // namespace

void register_format(py::module_ & m) {
    m.attr("PAGE_CELLS") = kPageCells;
    m.attr("FORMAT_VERSION") = kFormatVersion;

    py::class_<KeyFormat>(m, "KeyFormat")
        .def(py::init(&make_key_format), py::arg("head_size"), py::arg("tiers"), py::arg("group") = kPageCells)
        .def_property_readonly("head_size", [](const KeyFormat & f) { return f.head_size; })
        .def_property_readonly("tiers", [](const KeyFormat & f) { return py::tuple(py::cast(tiers(f))); })
        .def_property_readonly("group", [](const KeyFormat & f) { return f.group; })
        .def_property_readonly("record_bytes", &KeyFormat::record_bytes)
        .def("__repr__", [](const KeyFormat & f) { return text(f); })
        .def("__eq__", [](const KeyFormat & a, const KeyFormat & b) { return text(a) == text(b); }, py::is_operator())
        .def("__hash__", [](const KeyFormat & f) { return py::hash(py::str(text(f))); });

    py::class_<ValueFormat>(m, "ValueFormat")
        .def(py::init(&make_value_format), py::arg("head_size"), py::arg("bits"), py::arg("group") = 0)
        .def_property_readonly("head_size", [](const ValueFormat & f) { return f.head_size; })
        .def_property_readonly("bits", [](const ValueFormat & f) { return f.bits; })
        .def_property_readonly("group", [](const ValueFormat & f) { return f.group; })
        .def_property_readonly("record_bytes", &ValueFormat::record_bytes)
        .def("__repr__", [](const ValueFormat & f) { return text(f); })
        .def("__eq__", [](const ValueFormat & a, const ValueFormat & b) { return text(a) == text(b); }, py::is_operator())
        .def("__hash__", [](const ValueFormat & f) { return py::hash(py::str(text(f))); });

    m.def("checksum", [](const py::buffer & data) {
        const py::buffer_info info = data.request();
        const py::gil_scoped_release release;
        return checksum_of(info.ptr, size_t(info.size) * size_t(info.itemsize));
    }, py::arg("data"));
    m.def("body_bits", &body_bits, py::arg("key_format"), py::arg("value_format"));
    m.def("presets", []() {
        py::list list;
        for (const Preset & p : presets()) list.append(describe(p));
        return list;
    });
    m.def("preset", &preset, py::arg("name"), py::arg("head_size"));
}

}  // namespace mixkvq::bindings
