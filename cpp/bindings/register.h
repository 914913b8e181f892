// What the parts of the Python module share: their entry points and the checks of what Python hands over.
// Everything a caller gets wrong is a ValueError that names the argument and the numbers.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <vector>

#include "mixkvq/kernels.h"

namespace mixkvq::bindings {

namespace py = pybind11;

void register_format(py::module_ & m);
void register_kernels(py::module_ & m);
void register_divergence(py::module_ & m);
void register_backend(py::module_ & m);

// The array, C-contiguous, after a check of its type (a NumPy name such as "float16") and shape (-1: any length).
py::array checked(const py::array & array, const char * name, const char * dtype, const std::vector<py::ssize_t> & shape);

// The kernels of the named instruction set, or those in use. Raises ValueError if it cannot be had.
const Kernels & kernels(const std::optional<std::string> & isa);

}  // namespace mixkvq::bindings
