#include "register.h"

namespace mixkvq::bindings {

namespace {

std::string shape_text(const std::vector<py::ssize_t> & shape) {
    std::string text = "(";
    for (size_t i = 0; i < shape.size(); ++i) {
        if (i) text += ", ";
        text += shape[i] < 0 ? "any" : std::to_string(shape[i]);
    }
    return text + (shape.size() == 1 ? ",)" : ")");
}

}  // namespace

py::array checked(const py::array & array, const char * name, const char * dtype, const std::vector<py::ssize_t> & shape) {
    if (!array.dtype().equal(py::dtype(dtype))) {
        throw py::value_error(std::string(name) + " is " + std::string(py::str(array.dtype())) + ", not " + dtype);
    }
    const std::vector<py::ssize_t> got(array.shape(), array.shape() + array.ndim());
    bool same = got.size() == shape.size();
    for (size_t i = 0; same && i < shape.size(); ++i) same = shape[i] < 0 || shape[i] == got[i];
    if (!same) throw py::value_error(std::string(name) + " has shape " + shape_text(got) + ", not " + shape_text(shape));
    return py::array::ensure(array, py::array::c_style);
}

}  // namespace mixkvq::bindings
